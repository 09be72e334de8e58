//! Strict map and unmap over one stream, batches of 64, beside the same batches without a wire.

use std::collections::VecDeque;
use std::time::Instant;

use anyhow::Context;
use guest_sdk::{Direction, DmaStream, MapTicket, UnmapTicket};
use iommu_types::{GpaRange, Iova, PAGE_SIZE_BYTES};

use super::peer::driver;
use crate::figure::{Figure, RatioOf, Target};
use crate::in_process::mapping::Batches;
use crate::report::Report;
use crate::rounds::in_turn_async;
use crate::stand::{Bench, Ends, address};

/// Operations in a batch.
const BATCH: usize = 64;
/// Batches of maps, and as many of unmaps, in flight.
const IN_FLIGHT: usize = 16;

/// Pairs per second.
pub(crate) async fn pairs(bench: &mut Bench) -> anyhow::Result<Report> {
    let ends = bench.take().await?;
    let measured = one_stream(bench, &ends).await;
    bench.put(ends);
    measured
}

async fn one_stream(bench: &Bench, ends: &Ends) -> anyhow::Result<Report> {
    let driver = driver(ends.server.endpoint(), 0).await?;
    let stream = driver.dma_stream(&driver.device(address(0)));
    let buffer = driver.allocate(BATCH as u64 * PAGE_SIZE_BYTES).await.context("allocate a buffer")?;
    let pages = (0..BATCH as u64).map(|page| buffer.slice(page * PAGE_SIZE_BYTES, PAGE_SIZE_BYTES));
    let pages = pages.collect::<Result<Vec<_>, _>>()?;
    let mut batches = Batches::new(BATCH)?;
    let slice = bench.plan.slice();
    let (value, reference) = in_turn_async(
        bench.plan,
        async || {
            let start = Instant::now();
            let mut pipeline = Pipeline { stream: &stream, maps: VecDeque::new(), unmaps: VecDeque::new() };
            let mut pairs = 0;
            while start.elapsed() < slice {
                pairs += pipeline.step(&pages).await?;
            }
            pairs += pipeline.finish().await?;
            Ok(pairs as f64 / start.elapsed().as_secs_f64())
        },
        async || {
            let start = Instant::now();
            let mut pairs = 0;
            while start.elapsed() < slice {
                pairs += batches.map_and_unmap();
            }
            Ok(pairs as f64 / start.elapsed().as_secs_f64())
        },
    )
    .await?;
    let figure = Figure::alone("map-unmap-stream", "pairs/s", &value)
        .beside("the same batches in process", &reference, RatioOf::ValueToReference)
        .judged(Target::value_at_least(1e6));
    Ok(Report { figures: vec![figure], ..Report::default() })
}

/// Batches under way: maps first, then the unmaps of what they mapped.
struct Pipeline<'s> {
    stream: &'s DmaStream,
    maps: VecDeque<MapTicket>,
    unmaps: VecDeque<UnmapTicket>,
}

impl Pipeline<'_> {
    /// Sends another batch of maps, unmaps what the oldest mapped, and says how many pairs were completed by now.
    async fn step(&mut self, pages: &[GpaRange]) -> anyhow::Result<usize> {
        self.maps.push_back(self.stream.map(pages, Direction::Bidirectional).await?);
        let mut pairs = 0;
        if self.maps.len() > IN_FLIGHT {
            self.unmap_oldest().await?;
        }
        if self.unmaps.len() > IN_FLIGHT {
            pairs += self.settle_oldest().await?;
        }
        Ok(pairs)
    }

    /// Unmaps and awaits what is under way; how many pairs that were.
    async fn finish(&mut self) -> anyhow::Result<usize> {
        let mut pairs = 0;
        while !self.maps.is_empty() {
            self.unmap_oldest().await?;
        }
        while !self.unmaps.is_empty() {
            pairs += self.settle_oldest().await?;
        }
        Ok(pairs)
    }

    async fn unmap_oldest(&mut self) -> anyhow::Result<()> {
        let oldest = self.maps.pop_front().context("there are maps under way")?;
        let mapped: Result<Vec<Iova>, _> =
            oldest.await.context("await a batch of maps")?.into_iter().collect();
        let mapped: Vec<_> =
            mapped.context("a map was refused")?.into_iter().map(|iova| (iova, PAGE_SIZE_BYTES)).collect();
        self.unmaps.push_back(self.stream.unmap(&mapped, Direction::Bidirectional).await?);
        Ok(())
    }

    async fn settle_oldest(&mut self) -> anyhow::Result<usize> {
        let oldest = self.unmaps.pop_front().context("there are unmaps under way")?;
        let unmapped: Result<Vec<()>, _> =
            oldest.await.context("await a batch of unmaps")?.into_iter().collect();
        Ok(unmapped.context("an unmap was refused")?.len())
    }
}
