//! Batches of DMA whose instructions are counted: a process of its own, that a counter looks at from outside.
//!
//! The device goes through a few pages side by side, 64 bytes at a time, each piece written and then read; every batch begins at the
//! same addresses. What is counted is [`carry_out`] and what it calls; the stage is built and every translation cached before. The three
//! paths are the shipping code: that of a device session ([`execute_for`]) with and without a sanitizer, and the execution under it,
//! called directly.

use std::hint::black_box;
use std::sync::Arc;

use anyhow::{Context, ensure};
use clap::ValueEnum;
use iommu_hardware::vtd::Port;
use iommu_hardware::vtd::interrupt::DeliveredInterrupt;
use iommu_kernel::Domain;
use iommu_proto::dma::Batch;
use iommu_proto::pb;
use iommu_server::host::devices::{DeviceState, Home};
use iommu_server::host::sanitizer::{SanitizerHub, WatchedDomain};
use iommu_server::session::execute::{Executed, NoWatch, execute, execute_for};
use iommu_types::{DeviceAddress, DomainOptions, Iova, PAGE_SIZE_BYTES, Protection};

use crate::in_process::host::{Caches, Host, LARGE, Pages, map};

/// Bytes of each DMA.
const DMA_BYTES: u32 = 64;
/// Pages that the device goes through side by side.
const PAGES: u32 = 4;
/// The name of the function that is counted, as a pattern: the compiler adds what tells its instances apart.
pub(crate) const COUNTED_FUNCTION: &str = "*modes::counted::carry_out*";

/// How a batch is carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum DmaPath {
    /// As if there were no sanitizer in the program.
    Without,
    /// By a device session whose domain has none.
    Off,
    /// By a device session whose domain has one.
    On,
}

impl DmaPath {
    /// All of them.
    pub(crate) const ALL: [Self; 3] = [Self::Without, Self::Off, Self::On];

    /// As the command line names it.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Without => "without",
            Self::Off => "off",
            Self::On => "on",
        }
    }
}

/// Interrupts go nowhere; none is sent.
fn ignore(_: DeliveredInterrupt) {}

/// A device with mapped pages.
pub(crate) struct Stage {
    host: Host,
    domain: Domain,
    device: DeviceState,
    port: Port,
    /// Its pages.
    bases: Vec<Iova>,
}

impl Stage {
    /// Maps, attaches, and opens a port.
    pub(crate) fn new(path: DmaPath) -> anyhow::Result<Self> {
        let mut host = Host::boot(64 << 20, Caches { iotlb: LARGE, paging: LARGE })?;
        let mut options = DomainOptions::new(Protection::Strict);
        options.sanitizer = path == DmaPath::On;
        let mut domain = host.domain_of(options)?;
        let mut pages = Pages::of(host.buffer(u64::from(PAGES) * PAGE_SIZE_BYTES)?);
        let source_id = host.source(&mut domain)?;
        let port = host.kernel.unit().port(source_id).context("open a port")?;
        let address = DeviceAddress { segment: 0, source_id };
        let device = DeviceState::new(address, "counted".to_owned(), Home::Host);
        // As an attach does.
        let hub = Arc::new(SanitizerHub::default());
        device.watch(domain.sanitizer().map(|handle| WatchedDomain::new(handle.clone(), hub)));
        let bases = (0..PAGES).map(|_| map(&host, &mut domain, &mut pages).base()).collect();
        Ok(Self { host, domain, device, port, bases })
    }

    /// Writes and reads in turn, each read where the write before it was.
    pub(crate) fn batch(&self, operations: u32) -> pb::DmaBatch {
        let mut batch = Batch::new();
        for pair in 0..operations.div_ceil(2) {
            let base = self.bases[(pair % PAGES) as usize];
            let offset = u64::from(pair / PAGES) * u64::from(DMA_BYTES) % PAGE_SIZE_BYTES;
            let iova = base.checked_add(offset).expect("it lies in a mapped page");
            batch.write_slice(iova, &[0x5a; DMA_BYTES as usize]);
            if batch.len() < operations as usize {
                batch.read(iova, DMA_BYTES);
            }
        }
        batch.into_message(0).0
    }

    /// Carries the batch out so many times, counted. Gives the last answer.
    fn counted(&mut self, path: DmaPath, batch: &pb::DmaBatch, batches: u32) -> Result<Executed, String> {
        let Self { device, port, .. } = self;
        match path {
            DmaPath::Without => carry_out(batches, batch, |batch| execute(port, batch, ignore, &mut NoWatch)),
            DmaPath::Off | DmaPath::On => {
                carry_out(batches, batch, |batch| execute_for(device, port, batch, ignore))
            }
        }
    }

    /// The same once, unseen by the counter.
    pub(crate) fn uncounted(&mut self, batch: &pb::DmaBatch) -> Result<Executed, String> {
        execute_for(&self.device, &mut self.port, batch, ignore)
    }

    fn reports(&self) -> u64 {
        self.domain.sanitizer().map_or(0, |sanitizer| sanitizer.total())
    }
}

/// What is counted.
#[inline(never)]
fn carry_out(
    batches: u32,
    batch: &pb::DmaBatch,
    mut execute: impl FnMut(&pb::DmaBatch) -> Result<Executed, String>,
) -> Result<Executed, String> {
    for _ in 1..batches {
        black_box(execute(black_box(batch))?);
    }
    execute(black_box(batch))
}

/// Carries out `batches` batches of `operations` DMA each, all of them served and found in the IOTLB.
pub(crate) fn run(path: DmaPath, operations: u32, batches: u32) -> anyhow::Result<()> {
    let mut stage = Stage::new(path)?;
    let batch = stage.batch(operations);
    // Every page is translated once before, and that is not counted.
    let executed = stage.uncounted(&batch).map_err(anyhow::Error::msg)?;
    ensure!(executed.count.operations == u64::from(operations), "{:?}", executed.count);
    let unit = |stage: &Stage| stage.host.kernel.unit().counters().iotlb;
    let before = unit(&stage);
    let executed = stage.counted(path, &batch, batches).map_err(anyhow::Error::msg)?;
    let after = unit(&stage);
    ensure!(executed.count.operations == u64::from(operations), "{:?}", executed.count);
    ensure!(after.misses == before.misses, "{} DMA missed the IOTLB", after.misses - before.misses);
    ensure!(after.hits > before.hits, "nothing was looked up");
    ensure!(stage.reports() == 0, "the sanitizer reported {} of nothing wrong", stage.reports());
    Ok(())
}

#[cfg(test)]
mod tests {
    use iommu_proto::dma::Batch;
    use iommu_types::Iova;

    use super::{DMA_BYTES, DmaPath, Stage};

    #[test]
    fn every_path_answers_alike_and_only_one_tells_a_sanitizer() {
        let mut answers = Vec::new();
        for path in DmaPath::ALL {
            let mut stage = Stage::new(path).expect("a stage");
            let right = stage.batch(65);
            let executed = stage.counted(path, &right, 3).expect("a batch");
            assert_eq!((executed.count.operations, stage.reports()), (65, 0), "{path:?}");
            let mut wild = Batch::new();
            wild.write_slice(Iova::new(0x1000), &[0; DMA_BYTES as usize]);
            let refused = stage.counted(path, &wild.into_message(7).0, 1).expect("a batch");
            assert_eq!(refused.count.faults, 1, "{path:?}");
            assert_eq!(stage.reports(), u64::from(path == DmaPath::On), "{path:?}");
            answers.push((executed.completions, refused.completions));
        }
        assert!(answers.iter().all(|answer| *answer == answers[0]), "{answers:?}");
    }
}
