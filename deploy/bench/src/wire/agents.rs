//! Many agents at once: what all of them do together, beside what one does alone.

use std::time::Instant;

use anyhow::Context;
use tokio::task::JoinSet;

use super::Transport;
use super::load::{Kind, Load};
use super::peer::{Device, WorkingSet, driver};
use crate::figure::{Figure, RatioOf, Target};
use crate::plot::{Chart, Line, Scale};
use crate::report::Report;
use crate::rounds::in_turn_async;
use crate::stand::{Bench, Ends, PEERS};

/// Mappings of each agent.
const MAPPINGS: u64 = 16;

/// Sums of 1 to 64 agents, reads of 64 bytes in batches of 128 over TCP.
pub(crate) async fn many(bench: &mut Bench) -> anyhow::Result<Report> {
    let ends = bench.take().await?;
    let measured = sums(bench, &ends).await;
    bench.put(ends);
    measured
}

async fn sums(bench: &Bench, ends: &Ends) -> anyhow::Result<Report> {
    let driver = driver(ends.server.endpoint(), 0).await?;
    let mut agents = Vec::new();
    for peer in 0..PEERS {
        let device = Device::connect(&Transport::Tcp.server(ends), peer).await?;
        let set = WorkingSet::map(&driver, peer, MAPPINGS, 4 << 10).await?;
        agents.push((device, Load::new(Kind::Read, 64, set.iovas.clone()), set));
    }
    let counts: &[usize] = bench.plan.pick(&[64], &[2, 4, 8, 16, 32, 64]);
    let mut report = Report::default();
    let mut points = Vec::new();
    for &count in counts {
        bench.progress.detail(&format!("{count} agents"));
        let (value, reference) = in_turn_async(
            bench.plan,
            async || together(bench, &agents[..count]).await,
            async || together(bench, &agents[..1]).await,
        )
        .await?;
        if points.is_empty() {
            points.push((1.0, reference.median()));
        }
        points.push((count as f64, value.median()));
        let mut figure = Figure::alone(format!("agents-{count}"), "operations/s", &value).beside(
            "one agent alone",
            &reference,
            RatioOf::ValueToReference,
        );
        if count == usize::from(PEERS) {
            figure = figure.judged(Target::ratio_at_least(0.8));
        }
        report.figures.push(figure);
    }
    for (device, _, set) in agents {
        set.unmap().await?;
        device.leave().await?;
    }
    report.charts.push(Chart {
        file: "agents".into(),
        title: "Reads of 64 bytes in batches of 128, all agents together".into(),
        x: "agents at once",
        y: "operations per second",
        y_scale: Scale::Linear,
        lines: vec![Line { name: "all together".into(), points, reference: false }],
    });
    Ok(report)
}

/// Operations per second of all together, from the start of the first to the end of the last.
async fn together(bench: &Bench, agents: &[(Device, Load, WorkingSet)]) -> anyhow::Result<f64> {
    let slice = bench.plan.slice();
    let start = Instant::now();
    let mut running = JoinSet::new();
    for (device, load, _) in agents {
        let (dma, load) = (device.dma.clone(), load.clone());
        running.spawn(async move { load.count(&dma, slice).await });
    }
    let mut operations = 0;
    while let Some(done) = running.join_next().await {
        operations += done.context("an agent panicked")??;
    }
    Ok(operations as f64 / start.elapsed().as_secs_f64())
}
