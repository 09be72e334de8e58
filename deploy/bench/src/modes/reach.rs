//! How far an IOTLB of 64 entries reaches: misses per MiB received, by buffer size and by the order in which buffers come.
//!
//! Farshin, Rizzo, Elmeleegy, Kostic (PeerJ CS 2023): at MTU 1500 two buffers share a page, so a sequential free list misses once for two of
//! the 724 buffers of a MiB; once the list is shuffled, every buffer misses. A page stays mapped while its buffers come and go, as page
//! pools do it. Beside each buffer the device reads its descriptor and writes a completion.

use iommu_hardware::cache::CacheGeometry;
use iommu_hardware::dma::{Run, Transfer};
use iommu_kernel::Tick;
use iommu_types::{Direction, DomainOptions, GpaRange, Iova, PAGE_SIZE_BYTES, Protection};

use super::configuration::Configuration;
use super::replay::Replay;
use super::stage::HostStage;
use super::workload::{Profile, Workload};
use crate::figure::{Figure, RatioOf, Target};
use crate::in_process::host::Caches;
use crate::plot::{Chart, Line, Scale};
use crate::report::Report;
use crate::rounds::Random;
use crate::samples::Samples;
use crate::stand::Bench;

/// As an Intel IOTLB has.
pub(crate) const ENTRIES_64: CacheGeometry = CacheGeometry { sets: 16, ways: 4 };
/// Caches of tables large enough not to matter.
const PAGING: CacheGeometry = CacheGeometry { sets: 64, ways: 4 };
/// A receive ring's pages.
const PAGES: u64 = 1024;
const MIB: u64 = 1 << 20;
/// Bytes of a descriptor and of a completion.
const DESCRIPTOR_BYTES: u64 = 16;

/// What the device receives into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Buffers {
    /// As figures name it.
    pub(crate) name: &'static str,
    /// Bytes of data in each.
    pub(crate) filled_bytes: u64,
    /// Bytes from one to the next.
    pub(crate) stride_bytes: u64,
    /// Mapped page by page, or by superpages.
    pub(crate) protection: Protection,
}

/// Half pages with 1,448 bytes of a packet of 1,500 in each.
pub(crate) const HALF_PAGES: Buffers = Buffers {
    name: "1500",
    filled_bytes: 1448,
    stride_bytes: PAGE_SIZE_BYTES / 2,
    protection: Protection::Strict,
};
/// Whole pages.
pub(crate) const PAGES_4K: Buffers =
    Buffers { name: "4k", filled_bytes: PAGE_SIZE_BYTES, stride_bytes: PAGE_SIZE_BYTES, ..HALF_PAGES };
/// Half pages of a direct map, whose entries cover 2 MiB.
pub(crate) const SUPERPAGES: Buffers =
    Buffers { name: "2m", protection: Protection::Passthrough, ..HALF_PAGES };

/// In which order buffers come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// As they lie.
    Sequential,
    /// At random, as a free list is after a while.
    Shuffled,
}

impl Order {
    const fn name(self) -> &'static str {
        match self {
            Self::Sequential => "sequential",
            Self::Shuffled => "shuffled",
        }
    }
}

/// IOTLB misses per MiB received.
pub(crate) fn misses_per_mib(buffers: Buffers, order: Order, mib: u64) -> anyhow::Result<f64> {
    let options = DomainOptions::new(buffers.protection);
    let mut stage = HostStage::new(64 << 20, Caches { iotlb: ENTRIES_64, paging: PAGING }, options)?;
    let iovas = iovas(&mut stage, buffers, order)?;
    let rings = stage.allocate(2 * PAGE_SIZE_BYTES)?;
    let rings = stage.map(rings, Direction::Bidirectional, 0, Tick(0)).iova;
    let bytes = vec![0x11; buffers.filled_bytes as usize];
    let mut descriptor = [0; DESCRIPTOR_BYTES as usize];
    let mut receive = |stage: &mut HostStage, packets: u64| {
        let mut run = Run::new(&mut stage.port);
        for packet in 0..packets {
            let slot = packet * DESCRIPTOR_BYTES % PAGE_SIZE_BYTES;
            let at = |page: u64| Iova::new(rings.get() + page * PAGE_SIZE_BYTES + slot);
            let buffer = iovas[packet as usize % iovas.len()];
            run.execute(at(0), None, Transfer::Read(&mut descriptor)).expect("the ring is mapped");
            run.execute(buffer, None, Transfer::Write(&bytes)).expect("the buffer is mapped");
            run.execute(at(1), None, Transfer::Write(&descriptor)).expect("the ring is mapped");
        }
    };
    receive(&mut stage, iovas.len() as u64);
    let before = stage.reading().unit.iotlb.misses;
    let packets = (mib * MIB).div_ceil(buffers.filled_bytes);
    receive(&mut stage, packets);
    let misses = stage.reading().unit.iotlb.misses - before;
    Ok(misses as f64 * MIB as f64 / (packets * buffers.filled_bytes) as f64)
}

/// The buffers' addresses, page by page mapped, in the order in which they come.
fn iovas(stage: &mut HostStage, buffers: Buffers, order: Order) -> anyhow::Result<Vec<Iova>> {
    let memory = stage.allocate(PAGES * PAGE_SIZE_BYTES)?;
    let mut iovas = Vec::new();
    for page in 0..PAGES {
        let base = memory.base().checked_add(page * PAGE_SIZE_BYTES).expect("the page lies in the buffer");
        let page = GpaRange::new(base, PAGE_SIZE_BYTES)?;
        let mapped = stage.map(page, Direction::FromDevice, 0, Tick(0)).iova;
        let offsets = (0..PAGE_SIZE_BYTES / buffers.stride_bytes).map(|n| n * buffers.stride_bytes);
        iovas.extend(offsets.map(|offset| Iova::new(mapped.get() + offset)));
    }
    if order == Order::Shuffled {
        let mut random = Random::new(23);
        for index in (1..iovas.len()).rev() {
            iovas.swap(index, usize::try_from(random.below(index as u64 + 1))?);
        }
    }
    Ok(iovas)
}

/// What a miss adds to a DMA, in modelled cycles: a random buffer of a mapped pool; and the DMAs of a ring after the first of a burst.
fn penalties(bench: &Bench) -> anyhow::Result<[Figure; 2]> {
    let each = bench.costs.of("machine.iotlb_miss");
    let shuffled = misses_per_mib(PAGES_4K, Order::Shuffled, 4)? / (MIB / PAGE_SIZE_BYTES) as f64;
    let workload = Workload { profile: Profile::Brcm, descriptors: 256, burst: 64 };
    let counted = Replay::new(Configuration::Ring, workload)?.counted(16);
    let after_the_first = 1.0 - counted.ring_promotions - counted.ring_walks;
    let figure = |name: &str, misses: f64| {
        Figure::alone(name, "modelled cycles/DMA", &Samples::exactly(misses * each))
    };
    Ok([
        figure("modes-iotlb-penalty-random", shuffled),
        figure("modes-iotlb-penalty-ring-sequential", after_the_first).judged(Target::value_at_most(0.0)),
    ])
}

/// By buffer size and order.
pub(crate) fn misses(bench: &mut Bench) -> anyhow::Result<Report> {
    let mib = bench.plan.pick(8, 64);
    let mut report = Report::default();
    let mut lines = Vec::new();
    let mut measured = Vec::new();
    for order in [Order::Sequential, Order::Shuffled] {
        let mut points = Vec::new();
        for buffers in [HALF_PAGES, PAGES_4K, SUPERPAGES] {
            bench.progress.detail(&format!("{} {}", buffers.name, order.name()));
            let misses = misses_per_mib(buffers, order, mib)?;
            let mapped_bytes =
                if buffers == SUPERPAGES { 2.0 * MIB as f64 } else { buffers.stride_bytes as f64 };
            points.push((mapped_bytes, misses));
            measured.push(((buffers.name, order), Samples::exactly(misses)));
        }
        lines.push(Line { name: order.name().into(), points, reference: false });
    }
    let of = |name: &str, order: Order| {
        let found = measured.iter().find(|(key, _)| *key == (name, order));
        &found.expect("it was measured").1
    };
    for ((name, order), misses) in &measured {
        let figure = Figure::alone(format!("modes-iotlb-{name}-{}", order.name()), "misses/MiB", misses);
        let sequential = of("1500", Order::Sequential);
        report.figures.push(match (*name, *order) {
            ("1500", Order::Sequential) => figure.judged(Target::value_between(362.0, 420.0)),
            ("4k", Order::Sequential) => figure.judged(Target::value_between(256.0, 290.0)),
            ("2m", Order::Sequential) => figure
                .beside("1500, sequential", sequential, RatioOf::ValueToReference)
                .judged(Target::ratio_at_most(0.1)),
            ("1500", Order::Shuffled) => figure
                .beside("sequential", sequential, RatioOf::ValueToReference)
                .judged(Target::ratio_at_least(1.3)),
            (name, Order::Shuffled) => {
                figure.beside("sequential", of(name, Order::Sequential), RatioOf::ValueToReference)
            }
            _ => figure,
        });
    }
    report.figures.extend(penalties(bench)?);
    report.charts.push(Chart {
        file: "modes-iotlb".into(),
        title: "IOTLB misses, 64 entries".into(),
        x: "buffer size, or 2 MiB for half pages under superpages (bytes)",
        y: "misses per MiB",
        y_scale: Scale::Linear,
        lines,
    });
    Ok(report)
}

#[cfg(test)]
mod tests {
    use super::{HALF_PAGES, Order, PAGES_4K, SUPERPAGES, misses_per_mib};

    #[test]
    fn misses_follow_pages_and_order() {
        let misses = |buffers, order| misses_per_mib(buffers, order, 2).expect("a stage");
        let sequential = misses(HALF_PAGES, Order::Sequential);
        assert!((362.0..=420.0).contains(&sequential), "{sequential}");
        let whole = misses(PAGES_4K, Order::Sequential);
        assert!((256.0..=290.0).contains(&whole), "{whole}");
        assert!(misses(SUPERPAGES, Order::Shuffled) <= sequential / 10.0);
        assert!(misses(HALF_PAGES, Order::Shuffled) >= 1.3 * sequential);
    }
}
