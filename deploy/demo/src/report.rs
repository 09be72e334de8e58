//! What a demonstration found, step by step, for people and for programs.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "printing is what this module is for")]

use comfy_table::{ContentArrangement, Table, presets};
use serde::{Deserialize, Serialize};

use crate::modes::seen::Seen;

/// A page has 110 columns, and three of them are the margin.
const LINE_COLUMNS: usize = 107;

/// One step: what was tried, what was expected, what came.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Step {
    /// Short name.
    pub(crate) name: String,
    /// What was expected.
    pub(crate) expected: String,
    /// What came.
    pub(crate) observed: String,
    /// Whether the two agree.
    pub(crate) passed: bool,
    /// What a person should see, line by line: records, walks, counters.
    pub(crate) details: Vec<String>,
    /// For programs: what an attack did, where the step was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) attack: Option<Seen>,
}

/// What the driver process tells its parent, one JSON line each.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub(crate) enum Told {
    /// A step is about to begin.
    Begin {
        /// Its name.
        name: String,
        /// What will be tried, in a sentence.
        story: String,
    },
    /// The driver made a device and needs an agent for it.
    NeedsAgent {
        /// Name of the device.
        name: String,
        /// Its address.
        address: String,
    },
    /// A step is over.
    End(Box<Step>),
}

impl Told {
    /// Prints it for the parent.
    pub(crate) fn tell(&self) -> anyhow::Result<()> {
        println!("{}", serde_json::to_string(self)?);
        Ok(())
    }
}

/// A line about progress; on standard error where JSON goes to standard output.
pub(crate) fn progress(json: bool, line: &str) {
    if json { eprintln!("{line}") } else { println!("{line}") }
}

/// A step as it begins.
pub(crate) fn begin(json: bool, name: &str, story: &str) {
    progress(json, &format!("\n── {name}"));
    for line in wrapped("", story) {
        progress(json, &format!("   {line}"));
    }
}

/// A step as it ends.
pub(crate) fn end(json: bool, step: &Step) {
    for line in &step.details {
        progress(json, &format!("   {line}"));
    }
    let verdict = if step.passed { "as expected" } else { "NOT AS EXPECTED" };
    progress(json, &format!("   {verdict}: {}", step.observed));
}

/// The closing table, or the JSON document. Whether every step passed.
pub(crate) fn close(
    json: bool,
    name: &str,
    steps: &[Step],
    took: std::time::Duration,
    summary: impl Fn(&[Step]) -> String,
) -> anyhow::Result<bool> {
    let passed = !steps.is_empty() && steps.iter().all(|step| step.passed);
    if json {
        let document = serde_json::json!({ "demonstration": name, "passed": passed, "took_ms": took.as_millis() as u64, "steps": steps });
        println!("{}", serde_json::to_string_pretty(&document)?);
        return Ok(passed);
    }
    println!("\n{}", summary(steps));
    let count = steps.iter().filter(|step| step.passed).count();
    println!("{count} of {} steps as expected, in {:.1} s", steps.len(), took.as_secs_f64());
    Ok(passed)
}

/// A sentence in lines that fit a page, behind a label of as many columns as `label` has.
pub(crate) fn wrapped(label: &str, sentence: &str) -> Vec<String> {
    let mut lines = vec![label.to_owned()];
    for word in sentence.split_whitespace() {
        let line = lines.last_mut().expect("there is a line");
        if line.len() + word.len() >= LINE_COLUMNS && line.trim_end() != label.trim_end() {
            lines.push(" ".repeat(label.len()) + word);
        } else {
            if line.len() > label.len() {
                line.push(' ');
            }
            line.push_str(word);
        }
    }
    lines
}

/// An empty table as wide as a page.
pub(crate) fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table
        .load_style(presets::UTF8_FULL_CONDENSED)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_width(110);
    table.set_header(header);
    table
}

/// What was expected of each step, and what came.
pub(crate) fn steps_table(steps: &[Step]) -> String {
    let mut table = table(&["step", "expected", "observed", ""]);
    for step in steps {
        table.add_row([step.name.as_str(), &step.expected, &step.observed, verdict(step)]);
    }
    table.to_string()
}

/// Whether a step passed, in one character.
pub(crate) fn verdict(step: &Step) -> &'static str {
    if step.passed { "✓" } else { "✗" }
}

/// Why the demonstration could not run.
pub(crate) fn failure(error: &anyhow::Error) {
    eprintln!("the demonstration could not run: {error:#}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sentence_is_wrapped_between_words_and_loses_none() {
        let sentence = "word ".repeat(60) + "end";
        let lines = wrapped("because   ", &sentence);
        assert!(lines.len() > 2);
        for (n, line) in lines.iter().enumerate() {
            let label = if n == 0 { "because   " } else { "          " };
            assert!(line.starts_with(label) && line.len() <= LINE_COLUMNS, "{line:?}");
        }
        let words: Vec<&str> = lines.iter().flat_map(|line| line[10..].split(' ')).collect();
        assert_eq!(words, sentence.split(' ').collect::<Vec<_>>());
        let long = "x".repeat(2 * LINE_COLUMNS);
        assert_eq!(wrapped("a ", &long), [format!("a {long}")], "a word is never cut");
    }
}
