//! The page: the lecture's two tables, the matrix, and every cell in words. One file, with nothing from elsewhere and no scripts.

use super::outcome::{Outcome, milliseconds};
use super::page::{STYLE, escaped};
use super::run::{Cell, Outcomes, RowResult};

/// The whole page.
pub(crate) fn page(outcomes: &Outcomes) -> String {
    let count = outcomes.cells().count();
    let passed = outcomes.cells().filter(|(_, _, cell)| cell.passed()).count();
    let verdict = format!("{passed} of {count} cells as expected, in {:.1} s", outcomes.took.as_secs_f64());
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <title>DMA attacks and protection modes</title><style>{STYLE}</style></head><body>\
         <h1>Every DMA attack, in every protection mode</h1><p>Attacked for real, by processes of their own. What must come was argued from the \
         design before anything was run. <b>{}</b></p>{}{}{}{}</body></html>\n",
        escaped(&verdict),
        lecture(outcomes),
        legend(),
        matrix(outcomes),
        words(outcomes),
    )
}

const fn class(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Refused => "refused",
        Outcome::Deflected => "deflected",
        Outcome::Page => "page",
        Outcome::Window => "window",
        Outcome::Succeeds => "succeeds",
        Outcome::None => "none",
    }
}

/// What is said of a cell when one points at it.
fn hover(cell: &Cell) -> String {
    let mut said = format!("{} Held by: {}.", cell.expected.because, cell.expected.held_by);
    for differs in &cell.differs {
        said += &format!(" NOT AS EXPECTED: {differs}.");
    }
    escaped(&said)
}

fn reasons(cell: &Cell) -> String {
    let reasons = cell.seen.as_ref().map_or(&cell.expected.reasons, |seen| &seen.reasons);
    let all: Vec<String> = reasons.iter().map(|reason| reason.replace(':', ": ")).collect();
    all.join(", ")
}

fn cell_of(cell: &Cell) -> String {
    let outcome = cell.outcome();
    let differs = if cell.passed() { "" } else { " differs" };
    let window = cell.seen.as_ref().and_then(|seen| seen.window_us);
    let detail = match (outcome, window) {
        (Outcome::Window, Some(us)) => milliseconds(us),
        (Outcome::Refused | Outcome::Page, _) => reasons(cell),
        _ => String::new(),
    };
    let words = if outcome == Outcome::None { String::new() } else { format!(" {outcome}") };
    format!(
        "<td class=\"cell {}{differs}\" title=\"{}\"><b>{}{}</b><small>{}</small></td>",
        class(outcome),
        hover(cell),
        outcome.symbol(),
        escaped(&words),
        escaped(&detail),
    )
}

fn lecture(outcomes: &Outcomes) -> String {
    let mut all = String::new();
    for (usage, meaning, of_usage) in outcomes.of_usage() {
        all += &format!(
            "<h2>{usage}: {meaning}</h2><div class=\"wide\"><table class=\"lecture\"><thead><tr><th></th><th>the attack</th><th>strict</th>\
             <th>no protection</th></tr></thead><tbody>"
        );
        for result in of_usage {
            all += &format!(
                "<tr><th>{}<small class=\"quiet\"> {}</small></th><td>{}</td>{}{}</tr>",
                escaped(&result.lecture.violation),
                violation(&result.lecture.violation),
                escaped(&result.lecture.attack),
                cell_of(&result.strict),
                cell_of(&result.none),
            );
        }
        all += "</tbody></table></div>";
    }
    all
}

fn violation(name: &str) -> &'static str {
    match name {
        "V1" => "bad address",
        "V2" => "bad device",
        "V3" => "invalid use",
        _ => "",
    }
}

fn legend() -> String {
    let items: String = Outcome::ALL
        .iter()
        .map(|outcome| {
            format!(
                "<li class=\"{}\">{} {}</li>",
                class(*outcome),
                outcome.symbol(),
                escaped(outcome.meaning())
            )
        })
        .collect();
    format!("<h2>The matrix</h2><ul class=\"legend\">{items}</ul>")
}

fn matrix(outcomes: &Outcomes) -> String {
    let columns: String = outcomes
        .columns
        .iter()
        .map(|column| format!("<th>{column}<small>{}</small></th>", escaped(column.meaning())))
        .collect();
    let rows: String = outcomes.rows.iter().map(row).collect();
    format!(
        "<div class=\"wide\"><table><thead><tr><th>#</th><th>who, and what</th><th>kind</th>{columns}</tr></thead><tbody>{rows}</tbody></table></div>"
    )
}

fn row(result: &RowResult) -> String {
    let row = result.row;
    let cells: String = result.cells.iter().map(|(_, cell)| cell_of(cell)).collect();
    format!(
        "<tr><th>{n}</th><td><a class=\"in\" href=\"#row{n}\"><b>{}</b>: {}</a></td><td>{}<br><span class=\"quiet\">{}</span></td>{cells}</tr>",
        escaped(row.who),
        escaped(row.what),
        row.violation,
        row.usage,
        n = row.number,
    )
}

/// Every cell in words.
fn words(outcomes: &Outcomes) -> String {
    let mut all = String::from("<h2>Cell by cell</h2>");
    for result in &outcomes.rows {
        let row = result.row;
        let open = if result.cells.iter().all(|(_, cell)| cell.passed()) { "" } else { " open" };
        all += &format!(
            "<details id=\"row{}\"{open}><summary>{}. {}: {}</summary><p class=\"quiet\">At stake: {}.</p><dl>",
            row.number,
            row.number,
            escaped(row.who),
            escaped(row.what),
            escaped(row.stake),
        );
        for (column, cell) in &result.cells {
            let came =
                cell.seen.as_ref().map_or_else(|| cell.outcome().words().to_owned(), |seen| seen.in_short());
            let notes =
                cell.seen.as_ref().map(|seen| seen.notes.join("; ")).filter(|notes| !notes.is_empty());
            let notes = notes.map_or_else(String::new, |notes| {
                format!(" <span class=\"quiet\">({})</span>", escaped(&notes))
            });
            all += &format!(
                "<dt>{} {column}</dt><dd><b>{}</b>{notes}<br>{}</dd>",
                cell.outcome().symbol(),
                escaped(&came),
                hover(cell)
            );
        }
        all += "</dl></details>";
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matrix::catalogue::ROWS;
    use crate::matrix::column::Column;
    use crate::matrix::expected::Table;
    use crate::matrix::outcome::Seen;

    /// What comes when all is as it must be.
    fn as_expected() -> Outcomes {
        let table = Table::load().expect("the table is whole");
        let cell = |number, column| {
            let expected = table.cells[&(number, column)].clone();
            let reasons = expected.reasons.clone();
            let seen = Seen {
                outcome: expected.outcome,
                logged: Some(reasons.clone()),
                reasons,
                window_us: (expected.outcome == Outcome::Window).then_some(250_100),
                notes: Vec::new(),
            };
            let seen = (expected.outcome != Outcome::None).then_some(seen);
            let differs = seen.as_ref().map(|seen| seen.differs(&expected)).unwrap_or_default();
            Cell { expected, seen, differs }
        };
        let rows = ROWS
            .into_iter()
            .map(|row| RowResult {
                row,
                cells: Column::ALL.into_iter().map(|column| (column, cell(row.number, column))).collect(),
            })
            .collect();
        Outcomes { rows, lecture: Vec::new(), columns: Column::ALL.to_vec(), took: Default::default() }
    }

    #[test]
    fn the_page_has_every_cell_and_nothing_from_elsewhere() {
        let outcomes = as_expected();
        assert!(outcomes.passed());
        let page = page(&outcomes);
        assert_eq!(page.matches("<td class=\"cell ").count(), 217);
        assert_eq!(page.matches("<dt>").count(), 217);
        for foreign in ["<script", "http://", "https://", "src=", "@import", "url("] {
            assert!(!page.contains(foreign), "{foreign}");
        }
    }

    #[test]
    fn a_cell_that_differs_is_seen_on_the_page() {
        let mut outcomes = as_expected();
        outcomes.rows[4].cells[3].1.differs.push("otherwise".to_owned());
        assert!(!outcomes.passed());
        let page = page(&outcomes);
        assert!(page.contains("NOT AS EXPECTED: otherwise") && page.contains(" differs\""));
        assert!(page.contains("<details id=\"row5\" open>"));
    }
}
