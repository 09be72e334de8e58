//! Load: batches of DMA, some in flight at any time.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use device_runtime::{Batch, Completed, Dma};
use iommu_types::Iova;

/// Which way data moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Read,
    Write,
}

impl Kind {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
        }
    }
}

/// One kind of load.
#[derive(Clone, Debug)]
pub(crate) struct Load {
    kind: Kind,
    size_bytes: u32,
    operations_per_batch: usize,
    in_flight: usize,
    iovas: Vec<Iova>,
    data: Bytes,
}

impl Load {
    /// Operations of a size, in batches of 128 or of what fits the batch's bytes, over a working set.
    pub(crate) fn new(kind: Kind, size_bytes: u32, iovas: Vec<Iova>) -> Self {
        /// Half of what a batch may carry, so that two are under way while one is carried out.
        const BATCH_BYTES: usize = 1 << 20;
        /// Bytes in flight at once, at most.
        const IN_FLIGHT_BYTES: usize = 4 << 20;
        let size = size_bytes as usize;
        let operations_per_batch = (BATCH_BYTES / size).clamp(1, 128);
        let in_flight = (IN_FLIGHT_BYTES / (operations_per_batch * size)).clamp(2, 16);
        let data = Bytes::from(vec![0x5a; size]);
        Self { kind, size_bytes, operations_per_batch, in_flight, iovas, data }
    }

    /// One operation at a time.
    pub(crate) fn one_at_a_time(mut self) -> Self {
        (self.operations_per_batch, self.in_flight) = (1, 1);
        self
    }

    fn batch(&self, next: &mut usize) -> Batch {
        let mut batch = Batch::with_capacity(self.operations_per_batch);
        for _ in 0..self.operations_per_batch {
            let iova = self.iovas[*next % self.iovas.len()];
            *next += 1;
            match self.kind {
                Kind::Read => batch.read(iova, self.size_bytes),
                Kind::Write => batch.write(iova, self.data.clone()),
            };
        }
        batch
    }

    /// That a batch did what it was to do.
    fn check(&self, completed: &Completed) -> anyhow::Result<()> {
        if let Some(fault) = completed.first_fault() {
            bail!("a DMA was refused: {fault:?}");
        }
        let expected = match self.kind {
            Kind::Read => self.operations_per_batch * self.size_bytes as usize,
            Kind::Write => 0,
        };
        ensure!(completed.payload().len() == expected, "an answer has {} bytes", completed.payload().len());
        Ok(())
    }

    /// Keeps the device busy for so long; operations per second. What is in flight at the end is awaited and counts, in both.
    pub(crate) async fn run(&self, dma: &Dma, duration: Duration) -> anyhow::Result<f64> {
        let start = Instant::now();
        let operations = self.count(dma, duration).await?;
        Ok(operations as f64 / start.elapsed().as_secs_f64())
    }

    /// Keeps the device busy for so long; how many operations that were.
    pub(crate) async fn count(&self, dma: &Dma, duration: Duration) -> anyhow::Result<u64> {
        let mut tickets = VecDeque::with_capacity(self.in_flight);
        let (mut next, mut batches) = (0, 0u64);
        let start = Instant::now();
        while start.elapsed() < duration {
            while tickets.len() < self.in_flight {
                tickets.push_back(dma.submit(self.batch(&mut next)).await.context("submit a batch")?);
                batches += 1;
            }
            let oldest = tickets.pop_front().expect("there are batches in flight");
            self.check(&oldest.await.context("await a batch")?)?;
        }
        for ticket in tickets {
            self.check(&ticket.await.context("await the last batches")?)?;
        }
        Ok(batches * self.operations_per_batch as u64)
    }

    /// Times each operation for so long, in nanoseconds.
    pub(crate) async fn time_each(&self, dma: &Dma, duration: Duration) -> anyhow::Result<Vec<u64>> {
        let (mut next, mut times) = (0, Vec::new());
        let start = Instant::now();
        while start.elapsed() < duration {
            let batch = self.batch(&mut next);
            let begun = Instant::now();
            let completed = dma.execute(batch).await.context("execute an operation")?;
            times.push(u64::try_from(begun.elapsed().as_nanos())?);
            self.check(&completed)?;
        }
        Ok(times)
    }
}
