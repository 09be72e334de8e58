//! The same attack in every protection mode: a device writes into a buffer right after its unmap.
//!
//! What must come stands in a [table](expected) of ours, argued from what each mode promises; drivers in processes of their own
//! [attack](driver), tell what they [saw](seen), and the two are compared.

pub(crate) mod bare;
pub(crate) mod blame;
pub(crate) mod driver;
pub(crate) mod expected;
pub(crate) mod seen;

use anyhow::ensure;

use self::expected::Attack;
use crate::report::{self, Step};
use crate::stage::{DEVICE, Stage};

/// Runs it. `Ok(true)` when every attack ended as expected.
pub(crate) async fn run(json: bool) -> anyhow::Result<bool> {
    let mut stage = Stage::start(json).await?;
    let mut steps = stage.play("drive-no-protection", &[]).await?;
    steps.extend(stage.play("drive-modes", &["--device".to_owned(), DEVICE.1.to_owned()]).await?);
    for attack in Attack::ALL {
        ensure!(steps.iter().any(|step| step.name == attack.name()), "no driver told of {}", attack.name());
    }
    steps.push(stage.end().await?);
    report::close(json, "modes", &steps, stage.took(), summary)
}

/// What the letters of the sanitizer's reports mean (Willmann, Rixner and Cox, USENIX ATC 2008).
const LEGEND: &str = "V1: the driver gave a wrong address. V2: the device made one up. V3: the device used memory that was let go. \
    Blame is unknown where what was seen leaves it open: the driver may have unmapped too early, or the device may have been late.";

/// Mode by mode: what became of the memory, what hardware recorded, what the sanitizer saw, what the unmap cost; and whom to blame.
fn summary(steps: &[Step]) -> String {
    let header = ["a write after unmap, in", "memory", "hardware", "sanitizer (age)", "invalidations", ""];
    let mut modes = report::table(&header);
    let mut ways = report::table(&["an address, in a strict domain", "sanitizer (age)", "blame", ""]);
    let mut others = String::new();
    for step in steps {
        let verdict = report::verdict(step);
        let Some(seen) = &step.attack else {
            others += &format!("{verdict} {}: {}\n", step.name, step.observed);
            continue;
        };
        let sanitizer = seen.sanitizer_in_short();
        if let Some(way) = step.name.strip_prefix(blame::PREFIX) {
            ways.add_row([way, &sanitizer, &seen.blame(), verdict]);
        } else {
            let (memory, hardware, cost) = (seen.memory.to_string(), seen.hardware(), seen.cost());
            modes.add_row([step.name.as_str(), &memory, &hardware, &sanitizer, &cost, verdict]);
        }
    }
    let legend = report::wrapped("", LEGEND).join("\n");
    format!("{modes}\n\n{ways}\n{legend}\n\n{others}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::modes::seen::{Seen, tests::as_expected};

    fn step(name: &str, attack: Option<Seen>) -> Step {
        Step { name: name.to_owned(), passed: true, attack, ..Step::default() }
    }

    #[test]
    fn every_step_has_its_line_in_the_summary() {
        let mut steps: Vec<Step> = Attack::ALL
            .into_iter()
            .map(|attack| step(attack.name(), Some(as_expected(&attack.expected()))))
            .collect();
        steps.push(step("blame: someone", Some(as_expected(&Attack::Strict.expected()))));
        steps.push(step("graceful end", None));
        let summary = summary(&steps);
        for step in &steps {
            let name = step.name.trim_start_matches(blame::PREFIX);
            let lines = summary.lines().filter(|line| line.contains(name) && line.contains('✓')).count();
            assert!(lines >= 1, "{name} in\n{summary}");
        }
        assert_eq!(summary.matches('✓').count(), steps.len());
    }
}
