//! A receive ring over the wire, in each mode: the driver's batches go through its stream, the device's through its session.
//!
//! Per burst, as in the replay in process (`modes`): the device writes the oldest 64 packets, the driver unmaps them in one batch, which ends
//! the burst, and maps 64 new ones. One burst is under way at a time, so what is measured is mostly the wire: three round trips.

use std::collections::VecDeque;
use std::time::Instant;

use anyhow::{Context, ensure};
use bytes::Bytes;
use device_runtime::Batch;
use guest_sdk::{Buffer, Direction, DmaStream, Domain, Driver};
use iommu_types::{DomainOptions, GpaRange, Iova, PAGE_SIZE_BYTES};

use super::peer::{Device, driver};
use crate::figure::{Figure, RatioOf};
use crate::modes::configuration::Configuration;
use crate::modes::workload::{Profile, Workload};
use crate::report::Report;
use crate::rounds::Plan;
use crate::samples::Samples;
use crate::stand::{Bench, Ends, address};

/// The ring: half-page buffers for whole packets.
const WORKLOAD: Workload = Workload { profile: Profile::Brcm, descriptors: 256, burst: 64 };
const STRIDE_BYTES: u64 = PAGE_SIZE_BYTES / 2;
/// Bursts of a round.
const BURSTS: u32 = 16;

/// Those that differ over the wire: a server has no mode without tables, and its processors' walks are coherent.
const CONFIGURATIONS: [Configuration; 9] = [
    Configuration::Strict,
    Configuration::StrictCached,
    Configuration::Deferred,
    Configuration::DeferredCached,
    Configuration::Ring,
    Configuration::Shared,
    Configuration::Persistent,
    Configuration::Bounce,
    Configuration::Passthrough,
];

/// Every mode beside passthrough, which pays for the same messages.
pub(crate) async fn rings(bench: &mut Bench) -> anyhow::Result<Report> {
    let ends = bench.take().await?;
    let measured = all(bench, &ends).await;
    bench.put(ends);
    measured
}

async fn all(bench: &Bench, ends: &Ends) -> anyhow::Result<Report> {
    let driver = driver(ends.server.endpoint(), 0).await?;
    let mut rings = Vec::new();
    for (peer, configuration) in (0u16..).zip(CONFIGURATIONS) {
        bench.progress.detail(&format!("{} is set up", configuration.name()));
        let options = configuration.options(WORKLOAD).context("the mode has a domain")?;
        rings.push(Ring::new(&driver, ends.server.endpoint(), peer, options).await?);
    }
    let times = in_turn(bench, bench.plan, &mut rings).await?;
    let passthrough = times.last().context("something was measured")?;
    let figure = |(configuration, time): (Configuration, &Samples)| {
        let figure = Figure::alone(format!("modes-wire-{}", configuration.name()), "ns/packet", time);
        figure.beside("passthrough", passthrough, RatioOf::ValueToReference)
    };
    let figures = CONFIGURATIONS.into_iter().zip(&times).map(figure).collect();
    for ring in rings {
        ring.leave(&driver).await?;
    }
    Ok(Report { figures, ..Report::default() })
}

/// Nanoseconds per packet of each; who begins changes from round to round. The first round warms caches.
async fn in_turn(bench: &Bench, plan: Plan, rings: &mut [Ring]) -> anyhow::Result<Vec<Samples>> {
    let mut values = vec![Vec::new(); rings.len()];
    for round in 0..=plan.rounds() as usize {
        bench.progress.detail(&format!("round {round} of {}", plan.rounds()));
        for turn in 0..rings.len() {
            let index = (round + turn) % rings.len();
            let start = Instant::now();
            for _ in 0..BURSTS {
                rings[index].burst().await.with_context(|| CONFIGURATIONS[index].name())?;
            }
            if round > 0 {
                let packets = f64::from(BURSTS * WORKLOAD.burst);
                values[index].push(start.elapsed().as_secs_f64() * 1e9 / packets);
            }
        }
    }
    Ok(values.into_iter().map(Samples::new).collect())
}

/// A device with a full receive ring in a domain of its own.
struct Ring {
    domain: Domain,
    device: Device,
    peer: u16,
    stream: DmaStream,
    buffer: Buffer,
    next: u64,
    live: VecDeque<Iova>,
    packet: Bytes,
}

impl Ring {
    async fn new(driver: &Driver, endpoint: &str, peer: u16, options: DomainOptions) -> anyhow::Result<Self> {
        let domain = driver.create_domain(options).await.context("create a domain")?;
        let handle = driver.device(address(peer));
        domain.attach(&handle).await.context("attach the device")?;
        let device = Device::connect(endpoint, peer).await?;
        let stream = driver.dma_stream(&handle);
        let buffers = u64::from(WORKLOAD.descriptors + 2 * WORKLOAD.burst);
        let buffer = driver.allocate(buffers * STRIDE_BYTES).await.context("allocate buffers")?;
        let packet = Bytes::from(vec![0x5a; WORKLOAD.profile.buffers()[0] as usize]);
        let (next, live) = (0, VecDeque::new());
        let mut ring = Self { domain, device, peer, stream, buffer, next, live, packet };
        for _ in 0..WORKLOAD.descriptors / WORKLOAD.burst {
            ring.post().await?;
        }
        Ok(ring)
    }
    /// The device writes a burst, the driver unmaps it and maps the next one.
    async fn burst(&mut self) -> anyhow::Result<()> {
        let packets: Vec<Iova> = self.live.drain(..WORKLOAD.burst as usize).collect();
        let mut batch = Batch::with_capacity(packets.len());
        for &iova in &packets {
            batch.write(iova, self.packet.clone());
        }
        let completed = self.device.dma.execute(batch).await.context("write a burst")?;
        ensure!(completed.first_fault().is_none(), "a DMA was refused: {:?}", completed.first_fault());
        self.unmap(&packets).await?;
        self.post().await
    }
    async fn unmap(&self, packets: &[Iova]) -> anyhow::Result<()> {
        let size_bytes = self.packet.len() as u64;
        let mappings: Vec<_> = packets.iter().map(|&iova| (iova, size_bytes)).collect();
        let answers = self.stream.unmap(&mappings, Direction::FromDevice).await?.await?;
        answers.into_iter().collect::<Result<Vec<()>, _>>().context("unmap a burst")?;
        Ok(())
    }
    async fn post(&mut self) -> anyhow::Result<()> {
        let count = self.buffer.size_bytes() / STRIDE_BYTES;
        let mut ranges: Vec<GpaRange> = Vec::new();
        for _ in 0..WORKLOAD.burst {
            let offset = self.next % count * STRIDE_BYTES;
            self.next += 1;
            ranges.push(self.buffer.slice(offset, self.packet.len() as u64)?);
        }
        let mapped = self.stream.map(&ranges, Direction::FromDevice).await?.await?;
        self.live.extend(mapped.into_iter().collect::<Result<Vec<_>, _>>().context("map a burst")?);
        Ok(())
    }
    /// Unmaps everything and gives domain and device back.
    async fn leave(mut self, driver: &Driver) -> anyhow::Result<()> {
        let live: Vec<Iova> = self.live.drain(..).collect();
        self.unmap(&live).await?;
        let attached = driver.device(address(self.peer)).attach_default().await;
        attached.context("attach the device as it was")?;
        self.domain.destroy().await.context("destroy the domain")?;
        self.device.leave().await
    }
}
