//! The two ways to print: tables and pages for people, JSON for programs.
#![expect(clippy::print_stderr, reason = "printing is what this module is for")]

use std::fmt::Display;
use std::io::Write;

use comfy_table::{ContentArrangement, Table, presets};
use serde_json::Value;

/// How to print.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Output {
    /// JSON instead of words.
    pub(crate) json: bool,
}

impl Output {
    /// Prints `value` as JSON, or what `page` makes of it in words.
    pub(crate) fn page(self, value: &Value, page: impl FnOnce() -> String) {
        if self.json { write(format!("{value:#}\n").as_bytes()) } else { write(page().as_bytes()) }
    }
    /// Prints one record in one line.
    pub(crate) fn line(self, value: &Value, line: impl FnOnce() -> String) {
        if self.json {
            write(format!("{value}\n").as_bytes())
        } else {
            write(format!("{}\n", line()).as_bytes())
        }
    }
    /// Prints rows under a head.
    pub(crate) fn table(self, value: &Value, head: &[&str], rows: Vec<Vec<String>>) {
        self.page(value, || table(head, rows));
    }
}

/// Writes to standard output. A reader that has seen enough (`| head`) ends the program, without an error.
pub(crate) fn write(bytes: &[u8]) {
    let mut out = std::io::stdout().lock();
    if let Err(failed) = out.write_all(bytes).and_then(|()| out.flush()) {
        if failed.kind() == std::io::ErrorKind::BrokenPipe {
            std::process::exit(0);
        }
        error(&format_args!("write to standard output: {failed}"));
        std::process::exit(1);
    }
}

/// Rows under a head, as text.
pub(crate) fn table(head: &[&str], rows: Vec<Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(head.to_vec());
    let count = rows.len();
    table.add_rows(rows);
    if count == 0 { format!("{table}\n(none)\n") } else { format!("{table}\n") }
}

/// Says on standard error why the command failed.
pub(crate) fn error(error: &dyn Display) {
    eprintln!("iommuctl: {error}");
}
