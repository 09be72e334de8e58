//! The report: a table for people, `report.json` and plots for the rest.

use std::path::{Path, PathBuf};

use anyhow::Context;
use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use serde::Serialize;

use crate::figure::{Bound, Bounded, Figure};
use crate::plot::{Chart, bars_against_targets};

/// What the measurements gave.
#[derive(Debug, Default)]
pub(crate) struct Report {
    /// The figures, in the order of their measurement.
    pub(crate) figures: Vec<Figure>,
    /// The charts.
    pub(crate) charts: Vec<Chart>,
    /// Tables of their own, for figures that stand side by side.
    pub(crate) tables: Vec<Sheet>,
    /// Measurements that this machine has not the means for. Neither met nor missed.
    pub(crate) skipped: Vec<Skipped>,
}

/// A measurement that was not made. The fields are those of `report.json`.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Skipped {
    /// Its name.
    pub(crate) name: &'static str,
    /// Why.
    pub(crate) skipped: &'static str,
}

/// An entry of `report.json`.
#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Entry<'r> {
    Figure(&'r Figure),
    Skipped(&'r Skipped),
}

/// A table of its own.
#[derive(Clone, Debug)]
pub(crate) struct Sheet {
    /// What it shows.
    pub(crate) title: String,
    /// What stands above its columns.
    pub(crate) header: Vec<String>,
    /// Its rows.
    pub(crate) rows: Vec<Vec<String>>,
}

impl Sheet {
    fn text(&self) -> String {
        let mut table = Table::new();
        table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
        table.set_header(&self.header);
        table.add_rows(&self.rows);
        for column in table.column_iter_mut().skip(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        format!("{}\n{table}", self.title)
    }
}

impl Report {
    /// Adds what a measurement gave.
    pub(crate) fn add(&mut self, other: Self) {
        self.figures.extend(other.figures);
        self.charts.extend(other.charts);
        self.tables.extend(other.tables);
        self.skipped.extend(other.skipped);
    }

    /// Whether a target is missed.
    pub(crate) fn missed_any(&self) -> bool {
        self.figures.iter().any(|figure| figure.met == Some(false))
    }

    /// `report.json`: an array of figures, then of what was skipped.
    pub(crate) fn json(&self) -> anyhow::Result<String> {
        let figures = self.figures.iter().map(Entry::Figure);
        let entries: Vec<_> = figures.chain(self.skipped.iter().map(Entry::Skipped)).collect();
        serde_json::to_string_pretty(&entries).context("write the report as JSON")
    }

    /// Writes `report.json` and the plots, and says where each of them is.
    pub(crate) fn write_into(&self, directory: &Path) -> anyhow::Result<Vec<PathBuf>> {
        std::fs::create_dir_all(directory).with_context(|| format!("create {}", directory.display()))?;
        let mut contents = vec![("report.json".to_owned(), self.json()?)];
        contents.push(("targets.svg".to_owned(), bars_against_targets(&self.figures)));
        contents.extend(self.charts.iter().map(|chart| (format!("{}.svg", chart.file), chart.svg())));
        let mut written = Vec::new();
        for (name, content) in contents {
            let path = directory.join(name);
            std::fs::write(&path, content).with_context(|| format!("write {}", path.display()))?;
            written.push(path);
        }
        Ok(written)
    }

    /// The tables.
    pub(crate) fn table(&self) -> String {
        let mut table = Table::new();
        table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
        table.set_header([
            "name",
            "value",
            "unit",
            "min..max",
            "reference",
            "is",
            "ratio",
            "target",
            "verdict",
        ]);
        for figure in self.figures.iter().filter(|figure| !figure.tabulated) {
            table.add_row([
                figure.name.clone(),
                number(figure.value),
                figure.unit.to_owned(),
                format!("{}..{}", number(figure.spread.min), number(figure.spread.max)),
                figure.reference.map(number).unwrap_or_default(),
                figure.reference_is.unwrap_or_default().to_owned(),
                figure.ratio.map(|ratio| format!("{ratio:.2}")).unwrap_or_default(),
                target(figure),
                figure.met.map(|met| if met { "met" } else { "MISSED" }.to_owned()).unwrap_or_default(),
            ]);
        }
        for Skipped { name, skipped } in &self.skipped {
            let mut row = [const { String::new() }; 9];
            row[0] = (*name).to_owned();
            row[8] = format!("skipped: {skipped}");
            table.add_row(row);
        }
        for index in [1, 3, 4, 6, 7] {
            let column = table.column_mut(index).expect("the header has nine columns");
            column.set_cell_alignment(CellAlignment::Right);
        }
        let mut told: Vec<String> = self.tables.iter().map(Sheet::text).collect();
        told.push(table.to_string());
        told.join("\n\n")
    }
}

fn target(figure: &Figure) -> String {
    let (Some(target), Some(bound), Some(of)) = (figure.target, figure.bound, figure.target_of) else {
        return String::new();
    };
    let told = |target: f64| match of {
        Bounded::Ratio => format!("{target:.2}"),
        Bounded::Value => format!("{} {}", number(target), figure.unit),
    };
    match (bound, figure.target_max) {
        (Bound::AtLeast, _) => format!("≥ {}", told(target)),
        (Bound::AtMost, _) => format!("≤ {}", told(target)),
        (Bound::Between, high) => format!("{}..{}", number(target), told(high.unwrap_or(f64::NAN))),
    }
}

/// Three significant digits or more, thousands apart.
pub(crate) fn number(value: f64) -> String {
    if value.abs() < 100.0 {
        let digits = if value.abs() < 10.0 { 2 } else { 1 };
        return format!("{value:.digits$}");
    }
    let digits = format!("{value:.0}");
    let mut grouped = String::new();
    for (index, digit) in digits.chars().enumerate() {
        let left = digits.len() - index;
        if index > 0 && left % 3 == 0 && !grouped.ends_with('-') {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

#[cfg(test)]
mod tests {
    use super::{Report, Sheet, Skipped, number};
    use crate::figure::{Figure, RatioOf, Target};
    use crate::samples::Samples;

    fn report() -> Report {
        let figure = Figure::alone("iotlb-hit-1024", "ns", &Samples::new(vec![9.0, 8.0, 10.0]))
            .beside("vm-memory Iotlb", &Samples::new(vec![110.0, 118.0, 115.0]), RatioOf::ReferenceToValue)
            .judged(Target::ratio_at_least(5.0));
        Report { figures: vec![figure], ..Report::default() }
    }

    #[test]
    fn the_report_has_the_promised_fields() {
        let json = report().json().expect("figures are plain");
        let read: serde_json::Value = serde_json::from_str(&json).expect("what was written can be read");
        let figure = &read[0];
        for field in ["name", "value", "unit", "reference", "ratio", "target", "met"] {
            assert!(!figure[field].is_null(), "{field} is missing in {json}");
        }
        assert_eq!(
            (figure["spread"]["min"].as_f64(), figure["spread"]["max"].as_f64()),
            (Some(8.0), Some(10.0))
        );
        assert_eq!(figure["met"], true);
    }

    #[test]
    fn the_table_names_value_reference_and_verdict() {
        let table = report().table();
        for word in ["iotlb-hit-1024", "9.00", "8.00..10.0", "115", "12.78", "≥ 5.00", "met"] {
            assert!(table.contains(word), "{word} is missing in\n{table}");
        }
    }

    #[test]
    fn what_was_skipped_is_told_and_is_neither_met_nor_missed() {
        let mut all = Report::default();
        let skipped = vec![Skipped { name: "modes-sanitizer", skipped: "no valgrind" }];
        all.add(report());
        all.add(Report { skipped, ..Report::default() });
        assert!(!all.missed_any());
        let table = all.table();
        let row = table.lines().find(|line| line.contains("modes-sanitizer")).unwrap_or_default();
        assert!(row.contains("skipped: no valgrind"), "{table}");
        let json = all.json().expect("both are plain");
        let read: serde_json::Value = serde_json::from_str(&json).expect("what was written can be read");
        assert_eq!(read[1], serde_json::json!({"name": "modes-sanitizer", "skipped": "no valgrind"}));
    }

    #[test]
    fn a_table_of_its_own_stands_before_the_others_and_takes_its_figures() {
        let mut report = report();
        report.figures[0].tabulated = true;
        let sheet =
            Sheet { title: "Side by side".into(), header: vec!["x".into()], rows: vec![vec!["y".into()]] };
        report.tables.push(sheet);
        let told = report.table();
        assert!(told.starts_with("Side by side\n x \n y "), "{told}");
        assert!(!told.contains("iotlb-hit-1024"), "{told}");
    }

    #[test]
    fn large_numbers_are_grouped() {
        for (value, text) in [
            (0.5, "0.50"),
            (42.0, "42.0"),
            (999.6, "1,000"),
            (12_345_678.0, "12,345,678"),
            (-1234.0, "-1,234"),
        ] {
            assert_eq!(number(value), text);
        }
    }
}
