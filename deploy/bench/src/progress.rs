//! What is going on: a bar on a terminal, plain lines elsewhere. On standard error, so that `--json` stays clean.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// Tells how far the measurements are.
#[derive(Debug)]
pub(crate) struct Progress {
    bar: Option<ProgressBar>,
    begun: Instant,
    name: &'static str,
}

impl Progress {
    /// For `steps` measurements.
    pub(crate) fn new(steps: usize) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(steps as u64);
            let style = ProgressStyle::with_template("{bar:24} {pos:>2}/{len} {elapsed:>4}  {msg}")
                .expect("the template is a constant");
            bar.set_style(style);
            bar.enable_steady_tick(Duration::from_millis(250));
            bar
        });
        Self { bar, begun: Instant::now(), name: "" }
    }

    /// A measurement begins.
    pub(crate) fn begin(&mut self, name: &'static str) {
        self.name = name;
        match &self.bar {
            Some(bar) => bar.set_message(name),
            None => say(&format!("[{:5.1} s] {name}", self.begun.elapsed().as_secs_f64())),
        }
    }

    /// What of it is being done; only on a terminal.
    pub(crate) fn detail(&self, what: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message(format!("{}: {what}", self.name));
        }
    }

    /// A measurement is done.
    pub(crate) fn done(&self) {
        if let Some(bar) = &self.bar {
            bar.inc(1);
        }
    }

    /// A line that stays.
    pub(crate) fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| say(line)),
            None => say(line),
        }
    }

    /// All is done.
    pub(crate) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn say(line: &str) {
    // Nobody listens on a closed standard error; that is no reason to stop measuring.
    let _ = writeln!(std::io::stderr(), "{line}");
}
