//! When cached page tables are forgotten, and what a miss then reads.
//!
//! Rubin, Agarwal, Cai, Agarwal (SOSP'24): a strict driver cannot avoid a miss per page, but it can make the miss cheap. Linux forgets
//! cached tables with every unmap; that is needed only when a table is reclaimed (A). Contiguous addresses for the 64 pages of a descriptor,
//! unmapped with one invalidation, keep misses under few tables (B). Throughput is modelled from the reads as the paper does.
//!
//! The load: flows with a receive ring of 256 pages each, pages of the flows in turn, a descriptor of 64 pages unmapped when it is full; an
//! acknowledgement is sent for every fifth page.

use std::collections::{BTreeMap, VecDeque};

use iommu_hardware::cache::CacheGeometry;
use iommu_kernel::Tick;
use iommu_types::{
    Direction, DomainOptions, Gpa, GpaRange, Iova, PAGE_SIZE_BYTES, Protection, WalkCachePolicy,
};

use super::counts::Reading;
use super::reach::ENTRIES_64;
use super::stage::{Buffer, HostStage};
use crate::figure::{Figure, RatioOf, Target};
use crate::in_process::host::Caches;
use crate::plot::{Chart, Line, Scale};
use crate::report::Report;
use crate::samples::Samples;
use crate::stand::Bench;

/// 128 cached tables, of all levels together.
const PAGING: CacheGeometry = CacheGeometry { sets: 32, ways: 4 };
const PAGES_PER_DESCRIPTOR: u64 = 64;
const PAGES_PER_RING: u64 = 256;
const PAGES_PER_ACKNOWLEDGEMENT: u64 = 5;
const NOW: Tick = Tick(0);

/// What a driver does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Driver {
    /// As figures name it.
    pub(crate) name: &'static str,
    /// When cached tables are forgotten.
    pub(crate) policy: WalkCachePolicy,
    /// Whether a descriptor's pages are mapped and unmapped together.
    pub(crate) contiguous: bool,
}

/// As Linux, with each of the two changes, with both.
pub(crate) const DRIVERS: [Driver; 4] = [
    Driver { name: "on-every-unmap", policy: WalkCachePolicy::OnEveryUnmap, contiguous: false },
    Driver { name: "on-reclaim", policy: WalkCachePolicy::OnReclaim, contiguous: false },
    Driver { name: "on-every-unmap-contiguous", policy: WalkCachePolicy::OnEveryUnmap, contiguous: true },
    Driver { name: "on-reclaim-contiguous", policy: WalkCachePolicy::OnReclaim, contiguous: true },
];

/// Per page received.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Reads {
    /// Table entries by level, leaves first.
    pub(crate) by_level: [f64; 5],
    /// IOTLB misses.
    pub(crate) misses: f64,
    /// Ranges that invalidations named, those of acknowledgements left out.
    pub(crate) invalidated: f64,
}

impl Reads {
    /// All levels together.
    pub(crate) fn all(&self) -> f64 {
        self.by_level.iter().sum()
    }
}

/// A descriptor: its mappings, and how many of its pages are filled.
struct Descriptor {
    mappings: Vec<Buffer>,
    filled: u64,
}

impl Descriptor {
    fn page(&self, number: u64) -> Iova {
        match self.mappings.as_slice() {
            [one] => Iova::new(one.iova.get() + number * PAGE_SIZE_BYTES),
            many => many[number as usize].iova,
        }
    }
}

/// A driver with flows.
struct Receiver {
    driver: Driver,
    stage: HostStage,
    memory: Gpa,
    /// Descriptors of each flow, the one being filled first.
    flows: Vec<VecDeque<Descriptor>>,
    pages: u64,
    acknowledgements: u64,
    bytes: Vec<u8>,
}

impl Receiver {
    fn new(driver: Driver, flows: u64) -> anyhow::Result<Self> {
        let options = DomainOptions::new(Protection::Strict).with_walk_cache(driver.policy);
        let mut stage = HostStage::new(128 << 20, Caches { iotlb: ENTRIES_64, paging: PAGING }, options)?;
        let memory = stage.allocate(flows * PAGES_PER_RING * PAGE_SIZE_BYTES)?.base();
        let bytes = vec![0x22; PAGE_SIZE_BYTES as usize];
        let mut receiver =
            Self { driver, stage, memory, flows: Vec::new(), pages: 0, acknowledgements: 0, bytes };
        for flow in 0..flows {
            let descriptors = PAGES_PER_RING / PAGES_PER_DESCRIPTOR;
            let ring =
                (0..descriptors).map(|n| receiver.post(flow * PAGES_PER_RING + n * PAGES_PER_DESCRIPTOR));
            let ring = ring.collect();
            receiver.flows.push(ring);
        }
        Ok(receiver)
    }
    /// Maps the pages of a descriptor.
    fn post(&mut self, first_page: u64) -> Descriptor {
        let (count, pages) =
            if self.driver.contiguous { (1, PAGES_PER_DESCRIPTOR) } else { (PAGES_PER_DESCRIPTOR, 1) };
        let range = |n: u64| {
            let base = self.memory.checked_add((first_page + n * pages) * PAGE_SIZE_BYTES);
            GpaRange::new(base.expect("it lies in memory"), pages * PAGE_SIZE_BYTES)
                .expect("it does not wrap")
        };
        let ranges: Vec<_> = (0..count).map(range).collect();
        let mappings = ranges.into_iter().map(|range| self.stage.map(range, Direction::FromDevice, 0, NOW));
        Descriptor { mappings: mappings.collect(), filled: 0 }
    }
    /// Receives so many pages, the flows in turn.
    fn receive(&mut self, pages: u64) {
        for _ in 0..pages {
            let flow = (self.pages % self.flows.len() as u64) as usize;
            self.pages += 1;
            let descriptor = self.flows[flow].front_mut().expect("a ring has descriptors");
            let page = Buffer { iova: descriptor.page(descriptor.filled), ..descriptor.mappings[0] };
            descriptor.filled += 1;
            let is_full = descriptor.filled == PAGES_PER_DESCRIPTOR;
            let memory = GpaRange::new(page.memory.base(), PAGE_SIZE_BYTES).expect("a page does not wrap");
            write(&mut self.stage, Buffer { memory, ..page }, &mut self.bytes);
            if is_full {
                self.recycle(flow);
            }
            if self.pages.is_multiple_of(PAGES_PER_ACKNOWLEDGEMENT) {
                self.acknowledge(memory);
            }
        }
    }
    /// Unmaps a full descriptor and posts its pages again.
    fn recycle(&mut self, flow: usize) {
        let full = self.flows[flow].pop_front().expect("a ring has descriptors");
        full.mappings.iter().for_each(|mapping| self.stage.unmap(mapping, 0, true, NOW));
        let first = full.mappings[0].memory.base().get() - self.memory.get();
        let fresh = self.post(first / PAGE_SIZE_BYTES);
        self.flows[flow].push_back(fresh);
    }
    /// Maps, sends and unmaps an acknowledgement.
    fn acknowledge(&mut self, memory: GpaRange) {
        self.acknowledgements += 1;
        let sent = self.stage.map(memory, Direction::ToDevice, 1, NOW);
        write(&mut self.stage, sent, &mut self.bytes);
        self.stage.unmap(&sent, 1, true, NOW);
    }
}

/// The device uses a buffer once.
fn write(stage: &mut HostStage, buffer: Buffer, bytes: &mut [u8]) {
    stage.use_all(std::iter::once(&buffer), bytes);
}

/// What the device waits for, per page, in the steady state.
pub(crate) fn reads(driver: Driver, flows: u64, rounds: u64) -> anyhow::Result<Reads> {
    let mut receiver = Receiver::new(driver, flows)?;
    let ring = flows * PAGES_PER_RING;
    receiver.receive(2 * ring);
    let (before, sent) = (receiver.stage.reading(), receiver.acknowledgements);
    receiver.receive(rounds * ring);
    let after = receiver.stage.reading();
    let pages = (rounds * ring) as f64;
    let since = |of: &dyn Fn(&Reading) -> u64| (of(&after) - of(&before)) as f64 / pages;
    Ok(Reads {
        by_level: [0, 1, 2, 3, 4].map(|level| since(&|reading| reading.unit.table_reads[level])),
        misses: since(&|reading| reading.unit.iotlb.misses),
        invalidated: since(&|reading| reading.unit.invalidated_ranges)
            - (receiver.acknowledgements - sent) as f64 / pages,
    })
}

/// The four drivers with few and many flows.
pub(crate) fn policies(bench: &mut Bench) -> anyhow::Result<Report> {
    let flows: &[u64] = bench.plan.pick(&[5, 40], &[5, 10, 20, 40]);
    let mut report = Report::default();
    let mut lines =
        DRIVERS.map(|driver| Line { name: driver.name.into(), points: Vec::new(), reference: false });
    for &count in flows {
        let mut base = None;
        for (driver, line) in DRIVERS.into_iter().zip(&mut lines) {
            bench.progress.detail(&format!("{}, {count} flows", driver.name));
            let reads = reads(driver, count, bench.plan.pick(4, 16))?;
            line.points.push((count as f64, reads.all()));
            let all = Samples::exactly(reads.all());
            let base = base.get_or_insert_with(|| all.clone());
            report.figures.extend(figures(bench, driver, count, &reads, base));
        }
    }
    report.charts.push(Chart {
        file: "modes-walk-cache".into(),
        title: "Table entries read per 4 KiB page, strict".into(),
        x: "flows",
        y: "reads per page",
        y_scale: Scale::Linear,
        lines: lines.into(),
    });
    Ok(report)
}

fn figures(bench: &Bench, driver: Driver, flows: u64, reads: &Reads, base: &Samples) -> Vec<Figure> {
    let name = |what: &str| format!("modes-walk-cache-{}-{flows}{what}", driver.name);
    let [leaf, l3, l2, l1, _] = reads.by_level;
    let page_bits = (PAGE_SIZE_BYTES * 8) as f64;
    let gigabits = page_bits / (bench.costs.of("walk.first") + reads.all() * bench.costs.of("walk.each"));
    let counts = BTreeMap::from([
        ("leaf_reads", leaf),
        ("level_2_reads", l3),
        ("level_3_reads", l2),
        ("level_4_reads", l1),
        ("iotlb_misses", reads.misses),
        ("invalidated_ranges", reads.invalidated),
        ("gigabits_per_second_modelled", gigabits),
    ]);
    let all = Figure::alone(name(""), "reads/page", &Samples::exactly(reads.all()));
    let all = Figure { counts: Some(counts), ..all };
    if driver == DRIVERS[0] {
        return vec![all];
    }
    let all = all.beside("on every unmap", base, RatioOf::ValueToReference);
    if driver != DRIVERS[3] {
        return vec![all.judged(Target::ratio_at_most(1.0))];
    }
    let alone = |what: &str, unit, value| Figure::alone(name(what), unit, &Samples::exactly(value));
    vec![
        all.judged(Target::ratio_at_most(1.0)),
        alone("-upper-levels", "reads/page", l1 + l2).judged(Target::value_at_most(0.0)),
        alone("-level-2", "reads/page", l3).judged(Target::value_at_most(0.054)),
        alone("-invalidated", "ranges/page", reads.invalidated).judged(Target::value_at_most(1.0 / 64.0)),
        alone("-throughput", "Gbit/s, modelled", gigabits).judged(Target::value_at_least(95.0)),
    ]
}

#[cfg(test)]
mod tests {
    use super::{DRIVERS, reads};

    #[test]
    fn tables_that_are_kept_make_misses_cheap() {
        let [linux, kept, together, both] = DRIVERS.map(|driver| reads(driver, 5, 2).expect("a receiver"));
        assert!(kept.all() < linux.all(), "{linux:?} {kept:?}");
        // Acknowledgements are unmapped one by one, so contiguity alone saves no forgetting between them.
        assert!(together.all() <= linux.all(), "{linux:?} {together:?}");
        assert!(both.all() <= kept.all() && both.all() <= together.all(), "{kept:?} {together:?} {both:?}");
        assert_eq!(both.by_level[2..], [0.0; 3], "the upper levels are never read");
        assert!(both.by_level[1] <= 0.054, "{both:?}");
        assert_eq!((linux.invalidated, both.invalidated), (1.0, 1.0 / 64.0));
    }
}
