//! The orchestrator of the first protected DMA: server, agent and driver as three processes.

use std::path::{Path, PathBuf};

use anyhow::Context;

use crate::report;
use crate::stage::{DEVICE, Stage};

/// Size of the file that is made when none is given.
const DEFAULT_FILE_BYTES: usize = 1 << 20;

/// Runs it. `Ok(true)` when every step came out as expected.
pub(crate) async fn run(file: Option<PathBuf>, json: bool) -> anyhow::Result<bool> {
    if let Some(file) = &file {
        std::fs::metadata(file).with_context(|| format!("FILE: {}", file.display()))?;
    }
    let mut stage = Stage::start(json).await?;
    let file = match file {
        Some(file) => file,
        None => default_file(&stage.path("payload.bin"))?,
    };
    let arguments = ["--device", DEVICE.1, "--file"].map(str::to_owned);
    let arguments = [arguments.as_slice(), &[file.display().to_string()]].concat();
    let mut steps = stage.play("drive-first-dma", &arguments).await?;
    steps.push(stage.end().await?);
    report::close(json, "first-dma", &steps, stage.took(), report::steps_table)
}

/// A file with contents that no accident repeats.
fn default_file(path: &Path) -> anyhow::Result<PathBuf> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let bytes: Vec<u8> = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 24) as u8
    })
    .take(DEFAULT_FILE_BYTES)
    .collect();
    std::fs::write(path, bytes).with_context(|| format!("write {}", path.display()))?;
    Ok(path.to_owned())
}
