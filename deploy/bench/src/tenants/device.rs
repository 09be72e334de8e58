//! A device that does the DMA it is asked for, as fast as it can or at a pace.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use device_runtime::{Agent, Batch, Completed, Dma};
use hdrhistogram::Histogram;
use iommu_types::{Iova, Refusal};

use super::actor::Options;
use super::words::{Ask, DmaDone, DmaWork, Shape, Told};
use crate::wire::peer::{Nothing, PATIENCE};

/// Nothing is ever mapped here: the allocators hand out addresses from the top of the first 4 GiB down, and rings have small numbers.
const STRAY: u64 = 0x4000_0000;
/// Strays go to so many pages in turn.
const STRAY_PAGES: u64 = 4096;
/// Longest time told apart: a minute.
const TIME_MAX: u64 = 60_000_000_000;

/// The device, connected.
pub(super) struct Generator {
    dma: Dma,
    strays: u64,
}

impl Generator {
    pub(super) async fn start(options: &Options) -> anyhow::Result<Self> {
        let address = options.device.context("--device says where it is")?;
        let agent = Agent::builder(&options.server, &options.name, address).build();
        let dma = agent.dma();
        tokio::spawn(agent.run(Nothing));
        let connected = tokio::time::timeout(PATIENCE, dma.connected()).await.context("no session")?;
        ensure!(connected.is_some(), "it was refused");
        Ok(Self { dma, strays: 0 })
    }
    pub(super) async fn answer(&mut self, ask: Ask) -> anyhow::Result<Told> {
        match ask {
            Ask::Dma(work) => Ok(Told::Dma(self.run(&work).await?)),
            other => bail!("a device does not do {other:?}"),
        }
    }
    async fn run(&mut self, work: &DmaWork) -> anyhow::Result<DmaDone> {
        let (mut done, mut times) = (DmaDone::default(), Histogram::<u64>::new_with_max(TIME_MAX, 3)?);
        let mut under_way = VecDeque::with_capacity(work.in_flight);
        let mut sent = 0_u64;
        let begun = Instant::now();
        for shape in work.shapes.iter().cycle() {
            if begun.elapsed() >= Duration::from_millis(work.milliseconds) {
                break;
            }
            if let Some(per_second) = work.operations_per_second {
                let due = begun + Duration::from_secs_f64(sent as f64 / f64::from(per_second));
                tokio::time::sleep_until(due.into()).await;
            }
            sent += u64::from(shape.operations);
            if under_way.len() == work.in_flight {
                let (at, ticket) = under_way.pop_front().context("batches are under way")?;
                finish(&mut done, &mut times, at, ticket).await?;
            }
            let batch = self.batch(work, *shape);
            under_way.push_back((Instant::now(), self.dma.submit(batch).await.context("submit a batch")?));
        }
        for (at, ticket) in under_way {
            finish(&mut done, &mut times, at, ticket).await?;
        }
        done.seconds = begun.elapsed().as_secs_f64();
        let microseconds = |quantile: f64| times.value_at_quantile(quantile) as f64 / 1e3;
        (done.p50_us, done.p99_us) = (microseconds(0.5), microseconds(0.99));
        Ok(done)
    }
    /// The strays of a batch come first.
    fn batch(&mut self, work: &DmaWork, shape: Shape) -> Batch {
        let mut batch = Batch::with_capacity(shape.operations as usize);
        let places = (work.mapped_bytes / u64::from(shape.size_bytes)).max(1);
        for index in 0..shape.operations {
            let at = if index < shape.strays {
                self.strays += 1;
                STRAY + self.strays % STRAY_PAGES * 4096
            } else {
                work.iova + u64::from(index) % places * u64::from(shape.size_bytes)
            };
            batch.read(Iova::new(at), shape.size_bytes);
        }
        batch
    }
}

async fn finish(
    done: &mut DmaDone,
    times: &mut Histogram<u64>,
    at: Instant,
    ticket: device_runtime::Ticket,
) -> anyhow::Result<()> {
    let completed: Completed = ticket.await.context("await a batch")?;
    times.record(u64::try_from(at.elapsed().as_nanos())?.clamp(1, TIME_MAX))?;
    for result in completed.results() {
        match result.fault.map(|fault| fault.reason) {
            None => done.operations += 1,
            Some(Ok(_)) => done.faults += 1,
            Some(Err(refusal)) => *done.refused.entry(limit(refusal)).or_default() += 1,
        }
    }
    Ok(())
}

/// The name of the limit behind a refusal.
fn limit(refusal: Refusal) -> String {
    match refusal {
        Refusal::OverOperationRate => "dma_operations_per_second".to_owned(),
        Refusal::OverByteRate => "dma_bytes_per_second".to_owned(),
        other => other.to_string(),
    }
}
