//! The measurements, each beside its reference in the same run.
//!
//! `cargo measure` runs them, prints a table, and writes `report.json` and SVG plots into the directory `measure` of cargo's
//! target directory. Nothing here is compared with a number from another machine: the reference runs beside it, in
//! turn, and medians of the rounds are compared.

mod catalogue;
mod cli;
mod figure;
mod in_process;
mod modes;
mod others;
mod plot;
mod progress;
mod report;
mod resident;
mod rounds;
mod samples;
mod stand;
mod tenants;
mod wire;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{CommandFactory, Parser, error::ErrorKind};

use crate::catalogue::Wanted;
use crate::cli::{Cli, Role};
use crate::modes::costs::Costs;
use crate::others::Processors;
use crate::progress::Progress;
use crate::report::Report;
use crate::rounds::Plan;
use crate::stand::Bench;

/// Payloads of a megabyte come and go thousands of times a second; the C library's allocator gives their pages back to the system
/// each time and takes them again, fault by fault (measured: half of the bytes per second).
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Processors that other programs may take before the reader is warned.
const OTHERS_MAX: f64 = 0.2;
/// With `--require`, when a target was missed.
const EXIT_MISSED: u8 = 3;

#[tokio::main]
async fn main() -> anyhow::Result<ExitCode> {
    let cli = Cli::parse();
    if let Some(Role::EchoServer { listen, listen_unix }) = &cli.role {
        wire::echo::serve(*listen, listen_unix).await?;
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(Role::CountDma { path, operations, batches }) = &cli.role {
        modes::counted::run(*path, *operations, *batches)?;
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(Role::Tenant(options)) = &cli.role {
        tenants::actor::play(options).await?;
        return Ok(ExitCode::SUCCESS);
    }
    let wanted = Wanted(cli.words());
    let chosen = wanted.measurements().unwrap_or_else(|word| {
        let told = format!("no figure's name begins with {word:?}; --list tells the names");
        Cli::command().error(ErrorKind::InvalidValue, told).exit()
    });
    if cli.list {
        let mut listed = String::new();
        for measurement in chosen {
            listed += &format!("{:22} {}\n", measurement.name, measurement.about);
        }
        print(&listed)?;
        return Ok(ExitCode::SUCCESS);
    }
    let costs = cli.costs.as_deref().map_or_else(|| Ok(Costs::of_riommu_paper()), Costs::read);
    let costs = costs.unwrap_or_else(|error| {
        let told = format!("{:#}", anyhow::Error::from(error));
        Cli::command().error(ErrorKind::InvalidValue, told).exit()
    });
    measure(&cli, &chosen, wanted, costs).await
}

async fn measure(
    cli: &Cli,
    chosen: &[catalogue::Measurement],
    wanted: Wanted,
    costs: Costs,
) -> anyhow::Result<ExitCode> {
    let directory = target_directory()?.join("measure");
    let mut bench = Bench::new(Plan { quick: cli.quick }, Progress::new(chosen.len()), wanted, costs);
    let mut report = Report::default();
    let mut could_not_run = Vec::new();
    let before = Processors::now()?;
    for &measurement in chosen {
        bench.progress.begin(measurement.name);
        match catalogue::run(measurement, &mut bench).await {
            Ok(measured) => {
                for skipped in &measured.skipped {
                    bench.progress.say(&format!("{} skipped: {}", skipped.name, skipped.skipped));
                }
                report.add(measured);
            }
            Err(error) => {
                bench.progress.say(&format!("{} could not run: {error:#}", measurement.name));
                could_not_run.push(measurement.name);
            }
        }
        bench.progress.done();
    }
    bench.progress.finish();
    bench.stop().await;
    let others = before.taken_by_others(Processors::now()?);
    report.figures.retain(|figure| bench.wanted.figure(&figure.name));
    report.figures.push(others::figure(others));
    if others > OTHERS_MAX {
        bench
            .progress
            .say(&format!("other programs took {others:.1} processors: trust no ratio on the wire"));
    }
    let written = report.write_into(&directory)?;
    if cli.json {
        print(&format!("{}\n", report.json()?))?;
    } else {
        let missed = report.figures.iter().filter(|figure| figure.met == Some(false)).count();
        let judged = report.figures.iter().filter(|figure| figure.met.is_some()).count();
        let mut told = format!("{}\n{} of {judged} targets met", report.table(), judged - missed);
        if !report.skipped.is_empty() {
            told += &format!(", {} skipped", report.skipped.len());
        }
        told +=
            &format!("; {} and {} plots are in {}\n", "report.json", written.len() - 1, directory.display());
        print(&told)?;
    }
    if !could_not_run.is_empty() {
        bench.progress.say(&format!("could not run: {}", could_not_run.join(", ")));
        return Ok(ExitCode::FAILURE);
    }
    let missed = cli.require && report.missed_any();
    Ok(if missed { ExitCode::from(EXIT_MISSED) } else { ExitCode::SUCCESS })
}

fn print(text: &str) -> anyhow::Result<()> {
    std::io::stdout().lock().write_all(text.as_bytes()).context("write to standard output")
}

/// Cargo's target directory: two above this program.
fn target_directory() -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe().context("find this program's own path")?;
    let above =
        own.ancestors().nth(2).with_context(|| format!("{} is not in a target directory", own.display()))?;
    Ok(above.to_owned())
}
