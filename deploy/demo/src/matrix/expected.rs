//! The checked-in table of what must come, parsed.

use std::collections::BTreeMap;

use anyhow::{Context, ensure};
use serde::Deserialize;

use super::catalogue::ROWS;
use super::column::Column;
use super::outcome::{Expected, Outcome};

/// The table, as it is checked in.
const TABLE: &str = include_str!("../../matrix/expected.toml");

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    row: Vec<FileRow>,
    lecture: Vec<Lecture>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileRow {
    number: u8,
    cell: Vec<FileCell>,
}

#[derive(Debug, Deserialize)]
struct FileCell {
    columns: Vec<Column>,
    #[serde(flatten)]
    expected: Expected,
}

/// A cell of the lecture's two tables.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Lecture {
    /// V1, V2 or V3.
    pub(crate) violation: String,
    /// R1 or R2.
    pub(crate) usage: String,
    /// What is done.
    pub(crate) attack: String,
    /// Under strict protection.
    pub(crate) strict: Expected,
    /// Under none.
    pub(crate) none: Expected,
}

/// All that must come.
#[derive(Debug)]
pub(crate) struct Table {
    /// By row and column.
    pub(crate) cells: BTreeMap<(u8, Column), Expected>,
    /// The lecture's.
    pub(crate) lecture: Vec<Lecture>,
}

impl Table {
    /// Parses the table and checks that every cell is there once.
    pub(crate) fn load() -> anyhow::Result<Self> {
        let file: File = toml::from_str(TABLE).context("matrix/expected.toml")?;
        let mut cells = BTreeMap::new();
        for row in file.row {
            for cell in row.cell {
                for column in cell.columns {
                    let before = cells.insert((row.number, column), cell.expected.clone());
                    ensure!(before.is_none(), "row {} has {column} twice", row.number);
                }
            }
        }
        for row in ROWS {
            for column in Column::ALL {
                let expected = cells.get(&(row.number, column));
                let expected = expected.with_context(|| format!("row {} lacks {column}", row.number))?;
                ensure!(
                    !expected.because.is_empty() && !expected.held_by.is_empty(),
                    "row {} is not argued",
                    row.number
                );
                let told = !expected.reasons.is_empty();
                ensure!(
                    told || expected.outcome != Outcome::Refused,
                    "row {}, {column}: refused, and not told",
                    row.number
                );
            }
        }
        ensure!(cells.len() == ROWS.len() * Column::ALL.len(), "there are cells of no row");
        Ok(Self { cells, lecture: file.lecture })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cell_is_there_once_and_argued() {
        let table = Table::load().expect("the table is whole");
        assert_eq!(table.cells.len(), 217);
        let of_lecture: Vec<String> =
            table.lecture.iter().map(|cell| format!("{} {}", cell.violation, cell.usage)).collect();
        assert_eq!(of_lecture, ["V1 R1", "V2 R1", "V3 R1", "V1 R2", "V2 R2", "V3 R2"]);
    }

    #[test]
    fn protection_never_grows_weaker_from_deferred_to_strict_to_byte() {
        let table = Table::load().expect("the table is whole");
        for row in ROWS {
            let outcome = |column| table.cells[&(row.number, column)].outcome;
            let ranks =
                [Column::Deferred, Column::Strict, Column::Byte].map(|column| match outcome(column) {
                    Outcome::Window => Outcome::Succeeds,
                    other => other,
                });
            assert!(ranks.is_sorted_by(|a, b| a >= b), "row {}: {ranks:?}", row.number);
        }
    }

    #[test]
    fn without_translation_only_what_stands_in_front_of_memory_refuses() {
        let table = Table::load().expect("the table is whole");
        let refused: Vec<u8> = ROWS
            .iter()
            .filter(|row| table.cells[&(row.number, Column::None)].outcome == Outcome::Refused)
            .map(|row| row.number)
            .collect();
        assert_eq!(refused, [19, 20, 21], "identity, the AT field, and the one way there is");
    }
}
