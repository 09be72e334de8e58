//! Runs cells, column by column, and compares what comes with what must come.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::ensure;
use rogue::language::{Behave, Command};
use serde::Serialize;

use super::act::language::Ask;
use super::catalogue::{ROWS, Row};
use super::column::Column;
use super::evidence::Evidence;
use super::expected::{Lecture, Table};
use super::outcome::{Expected, Outcome, Seen, is_fault};
use super::rows;
use super::scene::{Scene, Sides, Stage};
use crate::report::progress;

/// Most cells take a second at most, the storm of row 29 half a minute; more is a hang.
const CELL_DEADLINE: Duration = Duration::from_secs(60);

/// Tells how far it is.
pub(crate) struct Progress {
    pub(crate) json: bool,
}

/// A cell: what must come, what came, and how the two differ.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Cell {
    pub(crate) expected: Expected,
    /// `None` where the cell has no meaning, or could not be carried out.
    pub(crate) seen: Option<Seen>,
    /// Empty when all is as it must be.
    pub(crate) differs: Vec<String>,
}

impl Cell {
    pub(crate) fn passed(&self) -> bool {
        self.differs.is_empty()
    }

    /// What is shown: what came, where anything did.
    pub(crate) fn outcome(&self) -> Outcome {
        self.seen.as_ref().map_or(self.expected.outcome, |seen| seen.outcome)
    }
}

/// A row that was run.
#[derive(Clone, Debug)]
pub(crate) struct RowResult {
    pub(crate) row: Row,
    pub(crate) cells: Vec<(Column, Cell)>,
}

/// A cell of the lecture's tables that was run.
#[derive(Clone, Debug)]
pub(crate) struct LectureResult {
    pub(crate) lecture: Lecture,
    pub(crate) strict: Cell,
    pub(crate) none: Cell,
}

/// Everything that was run.
#[derive(Clone, Debug)]
pub(crate) struct Outcomes {
    pub(crate) rows: Vec<RowResult>,
    pub(crate) lecture: Vec<LectureResult>,
    pub(crate) columns: Vec<Column>,
    pub(crate) took: Duration,
}

impl Outcomes {
    /// Every cell, with the name of its place.
    pub(crate) fn cells(&self) -> impl Iterator<Item = (String, &'static str, &Cell)> {
        let rows = self.rows.iter().flat_map(|result| {
            let Row { number, stake, .. } = result.row;
            result.cells.iter().map(move |(column, cell)| (format!("row {number}, {column}"), stake, cell))
        });
        let lecture = self.lecture.iter().flat_map(|result| {
            let Lecture { violation, usage, .. } = &result.lecture;
            let at = format!("{violation} x {usage}");
            let stake = "this is what the lecture promises";
            [(format!("{at}, strict"), stake, &result.strict), (format!("{at}, none"), stake, &result.none)]
        });
        rows.chain(lecture)
    }

    /// The lecture's tables that were run: R1 or R2, what that is, and the cells.
    pub(crate) fn of_usage(&self) -> impl Iterator<Item = (&'static str, &'static str, Vec<&LectureResult>)> {
        let usages = [("R1", "within one operating system"), ("R2", "between virtual machines")];
        usages.into_iter().filter_map(|(usage, meaning)| {
            let of_usage: Vec<_> =
                self.lecture.iter().filter(|result| result.lecture.usage == usage).collect();
            (!of_usage.is_empty()).then_some((usage, meaning, of_usage))
        })
    }

    pub(crate) fn passed(&self) -> bool {
        let mut cells = self.cells().peekable();
        cells.peek().is_some() && cells.all(|(_, _, cell)| cell.passed())
    }
}

/// An attack: a row, or the one of the lecture that is none.
#[derive(Clone, Copy)]
enum Attack {
    Row(u8),
    ScanOfAnotherTenant,
}

/// Runs what is asked for: these rows and columns, or everything.
pub(crate) async fn all(
    stage: &Stage,
    table: &Table,
    only_rows: &[u8],
    only_columns: &[Column],
    told: &Progress,
) -> anyhow::Result<Outcomes> {
    let started = Instant::now();
    let columns: Vec<Column> = Column::ALL
        .into_iter()
        .filter(|column| only_columns.is_empty() || only_columns.contains(column))
        .collect();
    let mut results: Vec<RowResult> = ROWS
        .into_iter()
        .filter(|row| only_rows.is_empty() || only_rows.contains(&row.number))
        .map(|row| RowResult { row, cells: Vec::new() })
        .collect();
    for column in &columns {
        progress(told.json, &format!("\n── {column}: {}", column.meaning()));
        for result in &mut results {
            let expected = &table.cells[&(result.row.number, *column)];
            let cell = cell(stage, Attack::Row(result.row.number), *column, expected).await;
            told.cell(&format!("{:2} {}", result.row.number, result.row.what), &cell);
            result.cells.push((*column, cell));
        }
    }
    let mut lecture = Vec::new();
    if only_rows.is_empty() && only_columns.is_empty() {
        progress(told.json, "\n── the lecture's tables");
        for cell_of in &table.lecture {
            let attack = match (cell_of.violation.as_str(), cell_of.usage.as_str()) {
                ("V1", "R1") => Attack::Row(1),
                ("V2", "R1") => Attack::Row(11),
                ("V3", "R1") => Attack::Row(12),
                ("V1", "R2") => Attack::Row(23),
                ("V2", "R2") => Attack::ScanOfAnotherTenant,
                _ => Attack::Row(24),
            };
            let strict = cell(stage, attack, Column::Strict, &cell_of.strict).await;
            let none = cell(stage, attack, Column::None, &cell_of.none).await;
            for (column, cell) in [("strict", &strict), ("none", &none)] {
                told.cell(&format!("{} x {}, {column}", cell_of.violation, cell_of.usage), cell);
            }
            lecture.push(LectureResult { lecture: cell_of.clone(), strict, none });
        }
    }
    Ok(Outcomes { rows: results, lecture, columns, took: started.elapsed() })
}

async fn cell(stage: &Stage, attack: Attack, column: Column, expected: &Expected) -> Cell {
    let expected = expected.clone();
    if expected.outcome == Outcome::None {
        return Cell { expected, seen: None, differs: Vec::new() };
    }
    let mut scene = stage.scene(column);
    let carried = tokio::time::timeout(CELL_DEADLINE, carry_out(&mut scene, attack)).await;
    let carried =
        carried.unwrap_or_else(|_| Err(anyhow::anyhow!("it was not over within {CELL_DEADLINE:?}")));
    let ended = match &carried {
        Ok(_) => scene.end().await,
        Err(_) => recover(&mut scene).await,
    };
    match carried.and_then(|seen| ended.map(|()| seen)) {
        Ok(seen) => Cell { differs: seen.differs(&expected), seen: Some(seen), expected },
        Err(error) => {
            Cell { expected, seen: None, differs: vec![format!("it could not be carried out: {error:#}")] }
        }
    }
}

/// Attacks, and asks the judge.
async fn carry_out(scene: &mut Scene<'_>, attack: Attack) -> anyhow::Result<Seen> {
    let sides = match attack {
        Attack::Row(number) => rows::sides(number),
        Attack::ScanOfAnotherTenant => Sides::Tenants,
    };
    let device = match sides {
        Sides::Own => scene.own.connect.address,
        Sides::Tenants => scene.attacker.connect.address,
    };
    let mark = scene.judge.mark(device).await?;
    let evidence: Evidence = match attack {
        Attack::Row(number) => rows::attack(number, scene).await?,
        Attack::ScanOfAnotherTenant => rows::scan_of_another_tenant(scene).await?,
    };
    let due: BTreeSet<String> = evidence.told.iter().filter(|reason| is_fault(reason)).cloned().collect();
    let logged = if scene.own.is_bare() {
        let unit = scene.own.actor.request(Ask::Unit).await?;
        ensure!(unit.value == 0, "a fault was recorded where nothing is translated: FSTS {:#x}", unit.value);
        None
    } else {
        Some(scene.judge.since(device, &mark, &due).await?)
    };
    let outcome = evidence.outcome();
    let Evidence { told, window_us, notes, .. } = evidence;
    Ok(Seen { outcome, reasons: told, logged, window_us, notes })
}

/// After an attack that broke off half-way: devices are connected and quiet, drivers hold nothing, as far as that can be had.
async fn recover(scene: &mut Scene<'_>) -> anyhow::Result<()> {
    scene.stage.stop_hammers().await;
    for site in [&scene.own, &scene.attacker, &scene.victim] {
        // The session may be gone: that is well then.
        let _ = site.rogue.tell(&Command::Behave(Behave::default())).await;
        site.rogue.connect(&site.connect).await?;
    }
    scene.end().await
}

impl Progress {
    fn cell(&self, name: &str, cell: &Cell) {
        let came = match &cell.seen {
            Some(seen) => seen.in_short(),
            None => cell.outcome().words().to_owned(),
        };
        let verdict = if cell.passed() { "as expected" } else { "NOT AS EXPECTED" };
        progress(self.json, &format!("   {name:48} {} {came}  [{verdict}]", cell.outcome().symbol()));
        for differs in &cell.differs {
            progress(self.json, &format!("      {differs}"));
        }
    }
}
