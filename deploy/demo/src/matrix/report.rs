//! What came of the matrix, for people at a terminal and for programs.
#![expect(clippy::print_stdout, reason = "printing is what this module is for")]

use std::collections::BTreeSet;

use comfy_table::{ColumnConstraint, Table, Width};
use serde_json::{Value, json};

use super::column::Column;
use super::outcome::{Outcome, milliseconds};
use super::run::{Cell, Outcomes};
use crate::report::{table, wrapped};

/// Prints the tables, or the JSON document. Whether every cell came out as it must.
pub(crate) fn close(json: bool, outcomes: &Outcomes) -> anyhow::Result<bool> {
    if json {
        println!("{}", serde_json::to_string_pretty(&document(outcomes))?);
    } else {
        println!("{}", text(outcomes));
    }
    Ok(outcomes.passed())
}

/// A cell in a few characters.
fn short(cell: &Cell) -> String {
    let outcome = cell.outcome();
    let mut words = if cell.passed() { outcome.symbol().to_owned() } else { "!!".to_owned() };
    let detail = match (&cell.seen, outcome) {
        (Some(seen), Outcome::Window) => seen.window_us.map(|us| format!("{} ms", us / 1000)),
        (Some(seen), Outcome::Refused) => Some(brief(&seen.reasons)),
        (_, Outcome::Page) => Some("page".to_owned()),
        (_, Outcome::Deflected) => Some("shadow".to_owned()),
        (_, Outcome::Succeeds) => Some("lands".to_owned()),
        _ => None,
    };
    if let Some(detail) = detail {
        words += &format!(" {detail}");
    }
    words
}

/// The reason that says most, shortened: a code of the unit or of the device's session, a limit, or the first word of an error.
fn brief(reasons: &BTreeSet<String>) -> String {
    if reasons.iter().any(|reason| reason.starts_with("LIMIT_REACHED")) {
        return "limit".to_owned();
    }
    let code = reasons.iter().find(|reason| reason.starts_with("0x"));
    match code.or_else(|| reasons.first()).map(String::as_str) {
        Some("IDENTITY_REFUSED") => "name".to_owned(),
        Some("STILL_MAPPED") => "pinned".to_owned(),
        Some("NO_EVICTION") => "silent".to_owned(),
        Some(reason) => reason.to_owned(),
        None => String::new(),
    }
}

/// Columns of a terminal that a number, an attack and a cell take, margins included: 110 with seven modes.
const WIDTHS: (u16, u16, u16) = (4, 26, 10);

fn matrix(outcomes: &Outcomes) -> Table {
    let mut header = vec!["#", "what is done"];
    // As much of a name as a cell is wide.
    header.extend(outcomes.columns.iter().map(|column| match column {
        Column::Passthrough => "passthr.",
        other => other.name(),
    }));
    let mut matrix = table(&header);
    let (number, attack, cell) = WIDTHS;
    let widths = [number, attack].into_iter().chain(std::iter::repeat(cell));
    matrix.set_constraints(
        widths.take(header.len()).map(|width| ColumnConstraint::Absolute(Width::Fixed(width))),
    );
    for result in &outcomes.rows {
        let mut line = vec![result.row.number.to_string(), result.row.what.to_owned()];
        line.extend(result.cells.iter().map(|(_, cell)| short(cell)));
        matrix.add_row(line);
    }
    matrix
}

fn text(outcomes: &Outcomes) -> String {
    let mut text = String::new();
    for (usage, meaning, of_usage) in outcomes.of_usage() {
        let mut lecture = table(&[&format!("{meaning} ({usage})"), "the attack", "strict", "no protection"]);
        for result in of_usage {
            let of = |cell: &Cell| format!("{} {}", cell.outcome().symbol(), cell.outcome());
            let (strict, none) = (of(&result.strict), of(&result.none));
            lecture.add_row([&result.lecture.violation, &result.lecture.attack, &strict, &none]);
        }
        text += &format!("\n{lecture}\n");
    }
    text += &format!("\n{}\n", matrix(outcomes));
    let legend: Vec<String> =
        Outcome::ALL.iter().map(|outcome| format!("{} {}", outcome.symbol(), outcome.meaning())).collect();
    text += &wrapped("", &legend.join("; ")).join("\n");
    text += "\n";
    for (place, stake, cell) in outcomes.cells().filter(|(_, _, cell)| !cell.passed()) {
        text += &format!("\n!! {place}\n   expected  {}", expected_in_short(cell));
        let came = cell
            .seen
            .as_ref()
            .map_or_else(|| "nothing that can be judged".to_owned(), |seen| seen.in_short());
        text += &format!("\n   came      {came}");
        for differs in &cell.differs {
            text += &format!("\n   differs   {differs}");
        }
        for line in wrapped("   argued    ", &cell.expected.because) {
            text += &format!("\n{line}");
        }
        text += &format!("\n   at stake  {stake}\n");
    }
    let (passed, count) = outcomes
        .cells()
        .fold((0, 0), |(passed, count), (_, _, cell)| (passed + u32::from(cell.passed()), count + 1));
    text += &format!("\n{passed} of {count} cells as expected, in {:.1} s", outcomes.took.as_secs_f64());
    text
}

fn expected_in_short(cell: &Cell) -> String {
    let reasons: Vec<&str> = cell.expected.reasons.iter().map(String::as_str).collect();
    let told = if reasons.is_empty() { String::new() } else { format!(": {}", reasons.join(", ")) };
    format!("{}{told}, held by {}", cell.expected.outcome, cell.expected.held_by)
}

fn cell_document(cell: &Cell) -> Value {
    json!({
        "passed": cell.passed(),
        "expected": cell.expected,
        "seen": cell.seen,
        "differs": cell.differs,
        "window": cell.seen.as_ref().and_then(|seen| seen.window_us).map(milliseconds),
    })
}

fn document(outcomes: &Outcomes) -> Value {
    let rows: Vec<Value> = outcomes
        .rows
        .iter()
        .map(|result| {
            let cells: serde_json::Map<String, Value> = result
                .cells
                .iter()
                .map(|(column, cell)| (column.name().to_owned(), cell_document(cell)))
                .collect();
            let row = result.row;
            json!({
                "number": row.number, "who": row.who, "what": row.what, "violation": row.violation, "usage": row.usage,
                "at_stake": row.stake, "cells": cells,
            })
        })
        .collect();
    let lecture: Vec<Value> = outcomes
        .lecture
        .iter()
        .map(|result| {
            let lecture = &result.lecture;
            json!({
                "violation": lecture.violation, "usage": lecture.usage, "attack": lecture.attack,
                "strict": cell_document(&result.strict), "none": cell_document(&result.none),
            })
        })
        .collect();
    json!({
        "demonstration": "matrix",
        "passed": outcomes.passed(),
        "took_ms": outcomes.took.as_millis() as u64,
        "lecture": lecture,
        "rows": rows,
    })
}
