//! What a translation costs: a hit with its permission check, a hit with a copy of 64 bytes, and a miss (four levels and the
//! fills) with the tables in the L2 cache.

use std::hint::black_box;
use std::sync::Arc;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use iommu_hardware::cache::CacheGeometry;
use iommu_hardware::dma::{Run, Transfer};
use iommu_hardware::memory::{Backing, MemoryConfig, PhysicalMemory};
use iommu_hardware::vtd::spec::pte::{SecondStageEntry, entry_address};
use iommu_hardware::vtd::spec::root_context::{self, ContextEntry, RootEntry};
use iommu_hardware::vtd::walk::{RootMode, RootTable};
use iommu_hardware::vtd::{EventMessage, EventSink, Port, Request, Unit, UnitConfig};
use iommu_types::{Access, AddressType, Capabilities, DomainId, Hpa, Iova, PageSize, Permissions, SourceId};

/// Operations of one measured round: the most that one epoch covers.
const OPERATIONS: u64 = 128;
const DEVICE: SourceId = SourceId::new(8);
const DOMAIN: DomainId = DomainId::new(1);
/// Pages that are mapped. The tables of 16,384 pages are 32 frames: they fit an L2 cache.
const PAGES: u64 = 16_384;
const ROOT: Hpa = Hpa::new(0x1000);
const CONTEXTS: Hpa = Hpa::new(0x2000);
const TOP: Hpa = Hpa::new(0x3000);
const TABLES: u64 = 0x10_0000;
const BUFFERS: u64 = 0x400_0000;

struct NoEvents;
impl EventSink for NoEvents {
    fn deliver(&self, _message: EventMessage) {}
}

/// A unit whose IOTLB has that many sets, with PAGES pages mapped from IOVA 0 and one device.
fn port(sets: u32, paging_sets: u32) -> Port {
    let size_bytes = BUFFERS + PAGES * 4096;
    let memory = PhysicalMemory::new(&MemoryConfig { size_bytes, backing: Backing::Memfd }).expect("memory");
    write_tables(&memory);
    let geometry = |sets| CacheGeometry { sets, ways: 4 };
    let config = UnitConfig {
        capabilities: Capabilities::FULL,
        iotlb: geometry(sets),
        context_cache: geometry(16),
        paging_structure_cache: geometry(paging_sets),
        iotlb_partitions: 1,
        ports_max: 4,
        byte_extents: true,
    };
    let unit = Unit::new(config, Arc::new(memory), Arc::new(NoEvents)).expect("sound");
    unit.set_root_table(RootTable { base: ROOT, mode: RootMode::Legacy });
    let _drained = unit.set_translation(true).wait_blocking();
    unit.port(DEVICE).expect("a port")
}

fn write_tables(memory: &PhysicalMemory) {
    let root_at = root_context::entry_address(ROOT, DEVICE.bus()).expect("inside memory");
    memory.store_u128(root_at, RootEntry::present(CONTEXTS).into_bits()).expect("inside memory");
    let context_at = root_context::entry_address(CONTEXTS, DEVICE.devfn()).expect("inside memory");
    let context = ContextEntry::second_stage(TOP, 4, DOMAIN);
    memory.store_u128(context_at, context.into_bits()).expect("inside memory");
    let mut next = TABLES;
    for page in 0..PAGES {
        let iova = Iova::new(page * 4096);
        let mut table = TOP;
        for level in (2..=4).rev() {
            let at = entry_address(table, iova, level).expect("inside memory");
            let mut entry = SecondStageEntry::from_bits(memory.load_u64(at).expect("inside memory"));
            if !entry.is_present() {
                entry = SecondStageEntry::table(Hpa::new(next));
                next += 4096;
                memory.store_u64(at, entry.into_bits()).expect("inside memory");
            }
            table = entry.address();
        }
        let leaf = SecondStageEntry::leaf(
            Hpa::new(BUFFERS + page * 4096),
            PageSize::Size4K,
            Permissions::READ_WRITE,
        );
        let at = entry_address(table, iova, 1).expect("inside memory");
        memory.store_u64(at, leaf.into_bits()).expect("inside memory");
    }
}

/// Pages below `pages` in an order without a pattern, drawn before anything is measured.
struct Shuffled {
    pages: Vec<u16>,
    at: usize,
}

impl Shuffled {
    fn new(pages: u64) -> Self {
        let mut state = 0x2545_f491_4f6c_dd1d_u64;
        let mut draw = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state % pages) as u16
        };
        Self { pages: (0..8192).map(|_| draw()).collect(), at: 0 }
    }
    fn next(&mut self) -> u64 {
        self.at = (self.at + 1) % self.pages.len();
        self.pages[self.at].into()
    }
}

fn read(page: u64) -> Request {
    Request {
        iova: Iova::new(page * 4096),
        size_bytes: 64,
        access: Access::Read,
        pasid: None,
        address_type: AddressType::Untranslated,
    }
}

fn round(port: &mut Port, pages: &mut Shuffled) {
    let mut burst = port.burst();
    for _ in 0..OPERATIONS {
        let _hpa = black_box(burst.translate(black_box(read(pages.next())), |lent| lent.hpa));
    }
}

fn translate(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("translate");
    group.throughput(Throughput::Elements(OPERATIONS));

    // 1,024 pages in an IOTLB of 4,096: every lookup hits.
    let mut warm = port(1024, 64);
    let mut pages = Shuffled::new(1024);
    (0..200).for_each(|_| round(&mut warm, &mut pages));
    group.bench_function("hit", |bencher| bencher.iter(|| round(&mut warm, &mut pages)));

    group.bench_function("hit and copy of 64 bytes", |bencher| {
        let mut into = [0; 64];
        bencher.iter(|| {
            let mut run = Run::new(&mut warm);
            for _ in 0..OPERATIONS {
                let iova = Iova::new(pages.next() * 4096);
                let _done = black_box(run.execute(iova, None, Transfer::Read(&mut into)));
            }
        });
    });

    // An IOTLB of one set, so that nearly every lookup misses; the paging-structure cache of one set misses with it.
    let mut cold = port(1, 1);
    let mut pages = Shuffled::new(PAGES);
    group.bench_function("miss: walk of 4 levels and fill", |bencher| {
        bencher.iter(|| round(&mut cold, &mut pages));
    });

    // The same with a paging-structure cache that knows the level-1 tables.
    let mut half_cold = port(1, 64);
    let mut pages = Shuffled::new(PAGES);
    group.bench_function("miss: level-1 table cached", |bencher| {
        bencher.iter(|| round(&mut half_cold, &mut pages));
    });
    group.finish();
}

criterion_group!(benches, translate);
criterion_main!(benches);
