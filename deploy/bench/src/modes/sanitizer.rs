//! What the sanitizer costs a DMA when it is off: nothing, counted in instructions.
//!
//! Valgrind's callgrind counts the instructions of [`counted`](super::counted) in a process of its own, for batches of two sizes. What the larger ones
//! take more is that of the DMA alone: whatever is per batch, and all else, cancels. Counts are the same in every round, so the
//! verdict is exact; they are of user space, and of this build.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use tokio::process::Command;

use super::counted::{COUNTED_FUNCTION, DmaPath};
use crate::figure::{Figure, RatioOf, Target};
use crate::report::{Report, Skipped};
use crate::samples::Samples;
use crate::stand::Bench;

/// What counts.
const VALGRIND: &str = "valgrind";
/// DMA per batch, less and more.
const OPERATIONS: [u32; 2] = [64, 128];
/// Batches of a run.
const BATCHES: u32 = 64;
/// How long one run may take: a counted program is some fifty times slower, and this one takes milliseconds otherwise.
const PATIENCE: Duration = Duration::from_secs(120);

/// The instructions of one path.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Instructions {
    per_dma: f64,
    per_batch: f64,
}

impl Instructions {
    /// From the counts of both sizes of batches.
    fn of([fewer, more]: [u64; 2]) -> Self {
        let [dma_fewer, dma_more] = OPERATIONS.map(f64::from);
        let batches = f64::from(BATCHES);
        let per_dma = (more as f64 - fewer as f64) / (dma_more - dma_fewer) / batches;
        Self { per_dma, per_batch: fewer as f64 / batches - per_dma * dma_fewer }
    }
}

/// Per DMA and per batch, on each path.
pub(crate) async fn instructions(bench: &mut Bench) -> anyhow::Result<Report> {
    if !has_valgrind().await? {
        let skipped = vec![Skipped { name: "modes-sanitizer", skipped: "no valgrind" }];
        return Ok(Report { skipped, ..Report::default() });
    }
    let own = std::env::current_exe().context("find this program's own path")?;
    let mut rounds = DmaPath::ALL.map(|_| Vec::new());
    for round in 0..bench.plan.pick(1, 3) {
        for (path, of_path) in DmaPath::ALL.into_iter().zip(&mut rounds) {
            bench.progress.detail(&format!("round {round}, {}", path.name()));
            let mut counts = [0; 2];
            for (operations, count) in OPERATIONS.into_iter().zip(&mut counts) {
                *count = count_run(&own, path, operations).await?;
            }
            of_path.push(Instructions::of(counts));
        }
    }
    Ok(Report { figures: figures(&rounds), ..Report::default() })
}

/// The figures of the rounds of all paths, in the order of [`DmaPath::ALL`].
fn figures([without, off, on]: &[Vec<Instructions>; 3]) -> Vec<Figure> {
    let samples =
        |rounds: &[Instructions], of: fn(&Instructions) -> f64| Samples::new(rounds.iter().map(of).collect());
    // When it is on, what it looks through depends on the transfers it remembers: nothing of that is the batch's own.
    let per_dma: fn(&Instructions) -> f64 = |count| count.per_dma;
    let per_batch: fn(&Instructions) -> f64 = |count| count.per_batch;
    let mut figures = Vec::new();
    for (name, unit, rounds, of) in [
        ("off-dma", "instructions/DMA", off, per_dma),
        ("off-batch", "instructions/batch", off, per_batch),
        ("on-dma", "instructions/DMA", on, per_dma),
    ] {
        let figure = Figure::alone(format!("modes-sanitizer-{name}"), unit, &samples(rounds, of));
        let reference = samples(without, of);
        figures.push(figure.beside("without it in the code", &reference, RatioOf::ValueToReference));
    }
    let name = "modes-sanitizer-off-more";
    let more = off.iter().zip(without).map(|(off, without)| off.per_dma - without.per_dma).collect();
    let figure = Figure::alone(name, "instructions/DMA", &Samples::new(more));
    figures.push(figure.judged(Target::value_at_most(0.0)));
    figures
}

/// Whether the counter is installed. One that does not work is an error.
async fn has_valgrind() -> anyhow::Result<bool> {
    let asked = Command::new(VALGRIND).arg("--version").stdout(Stdio::null()).status().await;
    match asked {
        Ok(status) => {
            ensure!(status.success(), "{VALGRIND} --version failed");
            Ok(true)
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error).context("run valgrind --version"),
    }
}

/// Instructions that [`counted`](super::counted) takes.
async fn count_run(own: &Path, path: DmaPath, operations: u32) -> anyhow::Result<u64> {
    let directory = tempfile::tempdir().context("make a directory for what callgrind writes")?;
    let output = directory.path().join("callgrind.out");
    let mut command = Command::new(VALGRIND);
    command
        .arg("--tool=callgrind")
        .arg(format!("--toggle-collect={COUNTED_FUNCTION}"))
        .arg(format!("--callgrind-out-file={}", output.display()))
        .arg(own)
        .args(["count-dma", "--path", path.name()])
        .args(["--operations", &operations.to_string(), "--batches", &BATCHES.to_string()])
        .stdin(Stdio::null())
        .kill_on_drop(true);
    let ended = tokio::time::timeout(PATIENCE, command.output()).await;
    let ended = ended.with_context(|| format!("callgrind takes longer than {PATIENCE:?}"))?;
    let ended = ended.context("run callgrind")?;
    if !ended.status.success() {
        bail!("{} under callgrind: {}", ended.status, String::from_utf8_lossy(&ended.stderr).trim());
    }
    let written = std::fs::read_to_string(&output).context("read what callgrind wrote")?;
    let total = total(&written).context("callgrind did not write how many instructions it counted")?;
    // The build has no symbols, or the function another name.
    ensure!(total > 0, "callgrind saw nothing of {COUNTED_FUNCTION}");
    Ok(total)
}

/// The sum that stands in a profile of callgrind.
fn total(profile: &str) -> Option<u64> {
    let told = |line: &str| {
        line.strip_prefix("totals:").or_else(|| line.strip_prefix("summary:"))?.trim().parse().ok()
    };
    profile.lines().find_map(told)
}

#[cfg(test)]
mod tests {
    use super::{BATCHES, Instructions, figures, total};

    #[test]
    fn what_is_per_batch_and_per_process_is_not_per_dma() {
        for (per_dma, per_batch) in [(100, 0), (100, 777), (0, 5), (350, 12_345)] {
            let run = |operations: u64| u64::from(BATCHES) * (per_batch + operations * per_dma);
            let counted = Instructions::of([run(64), run(128)]);
            assert_eq!((counted.per_dma, counted.per_batch), (per_dma as f64, per_batch as f64));
        }
    }

    #[test]
    fn not_one_instruction_more_is_met_and_one_in_all_is_missed() {
        let at = |instructions: u64| vec![Instructions::of([6400, 6400 + instructions])];
        for (off, met) in [(640_000, true), (639_999, true), (640_001, false)] {
            let judged: Vec<_> = figures(&[at(640_000), at(off), at(900_000)])
                .iter()
                .filter_map(|figure| figure.met)
                .collect();
            assert_eq!(judged, [met], "{off}");
        }
    }

    #[test]
    fn the_sum_is_read_from_a_profile() {
        let profile =
            "# callgrind format\nevents: Ir\nsummary: 123456\n\nfn=(1) x\n12 totals: 3\n\ntotals: 123456\n";
        assert_eq!(total(profile), Some(123_456));
        assert_eq!(total("events: Ir\nfn=(1) summary: 5\n"), None);
        assert_eq!(total("summary: \n"), None);
    }
}
