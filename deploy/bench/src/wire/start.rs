//! How long the server takes until it is ready.

use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, ensure};
use iommu_launch::{Server, ServerOptions, Wire};

use crate::figure::{Figure, RatioOf, Target};
use crate::report::Report;
use crate::rounds::in_turn_async;
use crate::stand::Bench;

/// From spawning the process to its ready line, with its default settings; beside the bare process.
pub(crate) async fn ready(bench: &mut Bench) -> anyhow::Result<Report> {
    let binaries = bench.binaries()?;
    let plaintext = ServerOptions { wire: Wire::Plaintext, ..ServerOptions::default() };
    let (value, reference) = in_turn_async(
        bench.plan,
        async || {
            let start = Instant::now();
            let mut server = Server::start(&binaries, &plaintext).await?;
            let milliseconds = start.elapsed().as_secs_f64() * 1e3;
            server.process.kill().await?;
            Ok(milliseconds)
        },
        async || {
            let start = Instant::now();
            let ended = tokio::task::block_in_place(|| {
                Command::new(&binaries.server).arg("--version").stdout(Stdio::null()).status()
            });
            let milliseconds = start.elapsed().as_secs_f64() * 1e3;
            ensure!(ended.context("run iommu-server --version")?.success(), "iommu-server --version failed");
            Ok(milliseconds)
        },
    )
    .await?;
    let figure = Figure::alone("start", "ms", &value)
        .beside("iommu-server --version", &reference, RatioOf::ValueToReference)
        .judged(Target::value_at_most(100.0));
    Ok(Report { figures: vec![figure], ..Report::default() })
}
