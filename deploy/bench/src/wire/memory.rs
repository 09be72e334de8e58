//! What an idle session takes in the server: its resident memory before and after many, beside the echo's.

use std::time::Duration;

use anyhow::Context;
use iommu_launch::Process;

use super::Transport;
use super::peer::{Device, driver};
use crate::figure::{Figure, RatioOf};
use crate::report::Report;
use crate::resident::Resident;
use crate::samples::Samples;
use crate::stand::{Bench, Ends, PEERS};

/// Bytes per idle device session and per idle driver session. In processes of its own, in which nothing else has been.
pub(crate) async fn per_idle_session(bench: &mut Bench) -> anyhow::Result<Report> {
    let binaries = bench.binaries()?;
    let ends = Ends::start(&binaries).await?;
    let measured = sessions(&ends).await;
    ends.stop().await;
    measured
}

async fn sessions(ends: &Ends) -> anyhow::Result<Report> {
    // The first session brings in what all later ones share: code, threads, the first buffers.
    let mut devices = [
        vec![Device::connect(&Transport::Tcp.server(ends), 0).await?],
        vec![Device::connect(&Transport::Tcp.echo(ends), 0).await?],
    ];
    let mut drivers = vec![driver(ends.server.endpoint(), 0).await?];

    let before = [resident(&ends.server.process).await?, resident(&ends.echo.process).await?];
    for peer in 1..PEERS {
        devices[0].push(Device::connect(&Transport::Tcp.server(ends), peer).await?);
        devices[1].push(Device::connect(&Transport::Tcp.echo(ends), peer).await?);
    }
    let after = [resident(&ends.server.process).await?, resident(&ends.echo.process).await?];
    for peer in 1..PEERS {
        drivers.push(driver(ends.server.endpoint(), peer).await?);
    }
    let with_drivers = resident(&ends.server.process).await?;

    let each = |after: Resident, before: Resident| {
        Samples::exactly(after.since(before).all() as f64 / f64::from(PEERS - 1))
    };
    let (ours, echo) = (each(after[0], before[0]), each(after[1], before[1]));
    for device in devices.into_iter().flatten() {
        device.leave().await?;
    }
    drop(drivers);
    Ok(Report {
        figures: vec![
            Figure::alone("memory-session-device", "bytes", &ours).beside(
                "echo, per session",
                &echo,
                RatioOf::ValueToReference,
            ),
            Figure::alone("memory-session-driver", "bytes", &each(with_drivers, after[0])),
        ],
        ..Report::default()
    })
}

/// Once it has come to rest: what connecting left to be done is done.
async fn resident(process: &Process) -> anyhow::Result<Resident> {
    tokio::time::sleep(Duration::from_millis(300)).await;
    Resident::of(process.id().context("the process has ended")?)
}
