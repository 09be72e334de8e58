//! The same attack in every protection mode: a device writes into a buffer right after its unmap.
//!
//! What must come stands in a [table](expected) of ours, argued from what each mode promises; drivers in processes of their own
//! [attack](driver), tell what they [saw](seen), and the two are compared.

pub(crate) mod bare;
pub(crate) mod blame;
pub(crate) mod driver;
pub(crate) mod expected;
pub(crate) mod seen;

use comfy_table::Table;

use crate::report::{self, Step};
use crate::stage::{DEVICE, Stage};

/// Runs it. `Ok(true)` when every attack ended as expected.
pub(crate) async fn run(json: bool) -> anyhow::Result<bool> {
    let mut stage = Stage::start(json).await?;
    let mut steps = stage.play("drive-no-protection", &[]).await?;
    steps.extend(stage.play("drive-modes", &["--device".to_owned(), DEVICE.1.to_owned()]).await?);
    steps.push(stage.end().await?);
    report::close(json, "modes", &steps, stage.took(), summary)
}

/// Mode by mode: what became of the memory, what hardware recorded, what the sanitizer saw, what the unmap cost.
fn summary(steps: &[Step]) -> Table {
    let header = ["the write after unmap, in", "memory", "hardware", "sanitizer", "invalidations", ""];
    let mut table = report::table(&header);
    for step in steps {
        let verdict = report::verdict(step).to_owned();
        table.add_row(match &step.attack {
            Some(seen) => [
                step.name.clone(),
                seen.memory.to_string(),
                seen.hardware(),
                seen.sanitizer_in_short(),
                seen.cost(),
                verdict,
            ],
            None => {
                let nothing = String::new;
                [step.name.clone(), step.observed.clone(), nothing(), nothing(), nothing(), verdict]
            }
        });
    }
    table
}
