//! What the IOTLB costs, beside vm-memory's `Iotlb` in the same run.
//!
//! Hits: random keys, capacity at least the number of mappings, all of them cached, permission check
//! included. Both hold the same pages with the same frames, in an order in which no two neighbours could be
//! merged into one range.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use iommu_hardware::cache::{CacheGeometry, Iotlb, IotlbEntry, PagingStructureCache};
use iommu_hardware::drain::{Drains, Scope};
use iommu_types::{Access, DomainId, Hpa, Iova, IovaRange, PageSize, Permissions};
use vm_memory::GuestAddress;
use vm_memory::iommu::Iotlb as ReferenceIotlb;

const DOMAIN: DomainId = DomainId::new(3);
const FIRST_PAGE: u64 = 0xf_0000;
const FRAMES_LOG2: u32 = 24;
/// Lookups of one iteration; enough that the order is not learnt.
const LOOKUPS: usize = 1 << 16;

/// A fixed sequence of numbers that look random (xorshift64*).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) % limit
    }
}

/// Where page `index` leads: an odd factor permutes the frames, and no neighbours stay neighbours.
fn frame(index: u64) -> u64 {
    (index.wrapping_mul(0x9e_3779) & ((1 << FRAMES_LOG2) - 1)) << 12
}

fn iova(index: u64) -> u64 {
    (FIRST_PAGE + index) << 12
}

fn entry(index: u64) -> IotlbEntry {
    IotlbEntry {
        domain_id: DOMAIN,
        iova: Iova::new(iova(index)),
        size: PageSize::Size4K,
        hpa: Hpa::new(frame(index)),
        permissions: Permissions::READ_WRITE,
        extent: None,
    }
}

fn filled(drains: &Drains, mappings: u64) -> Iotlb {
    let iotlb = Iotlb::new(CacheGeometry { sets: (mappings / 4) as u32, ways: 4 });
    let generation = drains.generation(DOMAIN, drains.context_generation());
    for index in 0..mappings {
        iotlb.fill(drains, generation, entry(index));
    }
    assert_eq!(iotlb.entries().len() as u64, mappings, "every mapping is cached");
    iotlb
}

fn filled_reference(mappings: u64) -> ReferenceIotlb {
    let mut reference = ReferenceIotlb::new();
    for index in 0..mappings {
        let (iova, frame) = (GuestAddress(iova(index)), GuestAddress(frame(index)));
        let mapped = reference.set_mapping(iova, frame, 4096, vm_memory::Permissions::ReadWrite);
        mapped.expect("the mapping fits");
    }
    reference
}

fn hits(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("iotlb_hit");
    group.throughput(Throughput::Elements(LOOKUPS as u64));
    for mappings in [1_024, 16_384] {
        let mut numbers = Numbers(0x10_77_1b);
        let keys: Vec<u64> =
            (0..LOOKUPS).map(|_| iova(numbers.below(mappings)) + numbers.below(4096 / 64) * 64).collect();

        let drains = Drains::new(1);
        let iotlb = filled(&drains, mappings);
        group.bench_function(BenchmarkId::new("iommu-hardware", mappings), |bench| {
            bench.iter(|| {
                for &key in &keys {
                    let iova = Iova::new(black_box(key));
                    let found = iotlb.hit_whole_page(DOMAIN, iova, Access::Read);
                    black_box(found.expect("a hit"));
                }
            });
        });

        let reference = filled_reference(mappings);
        group.bench_function(BenchmarkId::new("vm-memory", mappings), |bench| {
            bench.iter(|| {
                for &key in &keys {
                    let access = vm_memory::Permissions::Read;
                    let found = ReferenceIotlb::lookup(&reference, GuestAddress(black_box(key)), 64, access);
                    black_box(found.expect("a hit").next().expect("one range").base);
                }
            });
        });
    }
    group.finish();
}

/// The caches' part of a miss and of a strict unmap.
fn changes(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("iotlb_change");
    let drains = Drains::new(64);
    let iotlb = filled(&drains, 1_024);
    let paging: PagingStructureCache = PagingStructureCache::new(CacheGeometry { sets: 64, ways: 4 });
    let slot = drains.claim_slot().expect("a slot");
    drains.register(slot, DOMAIN);
    let range = |index: u64| IovaRange::new(Iova::new(iova(index)), 4096).expect("a page");
    let fill = |index: u64| {
        iotlb.fill(&drains, drains.generation(DOMAIN, drains.context_generation()), entry(index))
    };
    let invalidate = |index: u64| {
        let invalidating = drains.move_generation(Scope::Domain(DOMAIN));
        paging.invalidate_range(DOMAIN, range(index));
        iotlb.invalidate_range(DOMAIN, range(index));
        invalidating.drain().try_complete().expect("the device is idle")
    };

    let mut index = 0;
    let mut next = move || {
        index = (index + 377) % 1_024;
        index
    };
    group.bench_function("epoch", |bench| {
        bench.iter(|| {
            drains.enter(black_box(slot));
            drains.leave(black_box(slot));
        });
    });
    group.bench_function("fill", |bench| bench.iter(|| fill(black_box(next()))));
    group.bench_function("fill, then invalidate and drain", |bench| {
        bench.iter(|| {
            let index = black_box(next());
            fill(index);
            invalidate(index)
        });
    });
    group.bench_function("invalidate what is not cached, and drain", |bench| {
        bench.iter(|| invalidate(black_box(5_000)));
    });
    group.finish();
}

criterion_group!(benches, hits, changes);
criterion_main!(benches);
