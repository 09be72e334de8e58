//! Translation as a device meets it: a hit, a hit with a copy, a miss.

use std::hint::black_box;

use iommu_hardware::cache::CacheGeometry;
use iommu_hardware::dma::{Run, Transfer};
use iommu_hardware::vtd::{BURST_OPERATIONS_MAX, Port, Request};
use iommu_kernel::{Domain, MapFixed, Tick};
use iommu_types::{Access, AddressType, Gpa, Hpa, Iova, IovaRange, PAGE_SIZE_BYTES, Permissions, RequestId};

use super::host::{Caches, Host, LARGE, TINY, ensure_share};
use crate::figure::{Figure, RatioOf, Target};
use crate::report::Report;
use crate::rounds::{Random, in_turn, nanoseconds_each};
use crate::stand::Bench;

/// Bytes that a copy moves.
const COPY_BYTES: usize = 64;
/// Pages in turn. Each has tables of its own, so that a walk reads four entries: 768 tables' lines fit the L2.
const PAGES: usize = 256;

/// The three figures.
pub(crate) fn hit_copy_and_miss(bench: &mut Bench) -> anyhow::Result<Report> {
    let mut hitting = Stage::new(Caches { iotlb: LARGE, paging: LARGE })?;
    let mut missing = Stage::new(Caches { iotlb: TINY, paging: TINY })?;
    let mut skipping = Stage::new(Caches { iotlb: TINY, paging: CacheGeometry { sets: 1024, ways: 4 } })?;
    let operations = bench.plan.operations();

    bench.progress.detail("miss");
    let (miss, hit) = in_turn(
        bench.plan,
        || nanoseconds_each(operations, |n| missing.translate(n)),
        || nanoseconds_each(operations, |n| hitting.translate(n)),
    );
    let counters = missing.host.kernel.unit().counters();
    ensure_share("misses", counters.iotlb.misses, counters.iotlb.misses + counters.iotlb.hits, 0.98)?;
    ensure_share("walks of four levels", counters.walk_reads, counters.walks * 4, 0.98)?;
    let counters = hitting.host.kernel.unit().counters();
    ensure_share("hits", counters.iotlb.hits, counters.iotlb.hits + counters.iotlb.misses, 0.999)?;

    bench.progress.detail("miss with cached tables");
    let (short, _) = in_turn(
        bench.plan,
        || nanoseconds_each(operations, |n| skipping.translate(n)),
        || nanoseconds_each(operations, |n| hitting.translate(n)),
    );
    bench.progress.detail("copy");
    let copied = hitting.host.kernel.memory().clone();
    let frames = hitting.frames();
    let mut bytes = [0; COPY_BYTES];
    let (copy, copy_alone) = in_turn(
        bench.plan,
        || nanoseconds_each(operations, |n| hitting.copy(n)),
        || {
            nanoseconds_each(operations, |n| {
                for &frame in frames.iter().cycle().take(n as usize) {
                    copied.read(black_box(frame), &mut bytes).expect("the frame is memory");
                    black_box(&bytes);
                }
            })
        },
    );
    let times = RatioOf::ValueToReference;
    Ok(Report {
        figures: vec![
            Figure::alone("translate-hit", "ns", &hit),
            Figure::alone("translate-miss", "ns", &miss)
                .beside("translate-hit", &hit, times)
                .judged(Target::ratio_at_most(6.0)),
            Figure::alone("translate-miss-cached-tables", "ns", &short).beside("translate-hit", &hit, times),
            Figure::alone("translate-hit-copy-64", "ns", &copy).beside("the copy alone", &copy_alone, times),
        ],
        ..Report::default()
    })
}

/// A device whose domain has [`PAGES`] pages in as many regions of 512 GiB.
struct Stage {
    host: Host,
    _domain: Domain,
    port: Port,
    /// An address in each page, in random order.
    order: Vec<Iova>,
}

impl Stage {
    fn new(caches: Caches) -> anyhow::Result<Self> {
        let mut host = Host::boot(256 << 20, caches)?;
        let buffer = host.buffer(PAGES as u64 * PAGE_SIZE_BYTES)?;
        let mut domain = host.domain()?;
        let mut random = Random::new(3);
        let mut order = Vec::new();
        for page in 0..PAGES as u64 {
            // Random places in the lower tables, so that the entries spread over the sets of the processor's cache.
            let base = Iova::new(page << 39 | random.below(1 << 27) << 12);
            let gpa = Gpa::new(buffer.base().get() + page * PAGE_SIZE_BYTES);
            let permissions = Permissions::READ | Permissions::WRITE;
            let iova = IovaRange::new(base, PAGE_SIZE_BYTES)?;
            let request = MapFixed { iova, gpa, permissions, request_id: RequestId(page + 1) };
            domain.map(&host.kernel, &host.memory, request, Tick(0))?;
            order.push(Iova::new(base.get() + random.below(PAGE_SIZE_BYTES / COPY_BYTES as u64) * 64));
        }
        // In turn, each page once a round: with a cache that holds fewer, every access misses.
        for index in (1..order.len()).rev() {
            order.swap(index, usize::try_from(random.below(index as u64 + 1))?);
        }
        let port = host.device(&mut domain)?;
        Ok(Self { host, _domain: domain, port, order })
    }

    /// Translates, in bursts as batches have them.
    fn translate(&mut self, operations: u32) {
        let mut order = self.order.iter().cycle();
        for _burst in 0..operations / BURST_OPERATIONS_MAX {
            let mut burst = self.port.burst();
            for &iova in order.by_ref().take(BURST_OPERATIONS_MAX as usize) {
                let request = Request {
                    iova: black_box(iova),
                    size_bytes: COPY_BYTES as u32,
                    access: Access::Read,
                    pasid: None,
                    address_type: AddressType::Untranslated,
                };
                let lent = burst.translate(request, |lent| lent.hpa).expect("every page is mapped");
                black_box(lent);
            }
        }
    }

    /// Reads 64 bytes, in bursts as batches have them.
    fn copy(&mut self, operations: u32) {
        let mut bytes = [0; COPY_BYTES];
        let mut order = self.order.iter().cycle();
        for _burst in 0..operations / BURST_OPERATIONS_MAX {
            let mut run = Run::new(&mut self.port);
            for &iova in order.by_ref().take(BURST_OPERATIONS_MAX as usize) {
                let done = run.execute(black_box(iova), None, Transfer::Read(&mut bytes));
                done.expect("every page is mapped");
                black_box(&bytes);
            }
        }
    }

    /// Where the addresses lead to.
    fn frames(&mut self) -> Vec<Hpa> {
        let mut frames = Vec::new();
        for &iova in &self.order {
            let address_type = AddressType::Untranslated;
            let request = Request { iova, size_bytes: 64, access: Access::Read, pasid: None, address_type };
            let lent = self.port.burst().translate(request, |lent| lent.hpa);
            frames.push(lent.expect("every page is mapped"));
        }
        frames
    }
}
