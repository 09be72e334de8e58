//! The caches against flat twins, on the atomics that ship.

use std::collections::HashMap;

use iommu_types::{
    Access, DomainId, FunctionMask, Generation, Hpa, Iova, IovaRange, PageSize, Permissions, SourceId,
};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

use super::*;
use crate::drain::{Drains, Scope};
use crate::vtd::spec::extent::ByteExtent;

const SEED: u64 = 0x10_77_1b;
const DOMAINS: u16 = 4;
/// Bytes from the first to the last address that the twins play on: a few 1 GiB pages.
const PLAYGROUND_BYTES: u64 = 4 << 30;

// === IOTLB against a map ===

#[derive(Clone, Debug)]
enum Step {
    BeginWalk(DomainId),
    Fill {
        walk: usize,
        size: PageSize,
        iova: u64,
        hpa: u64,
        permissions: Permissions,
        extent: Option<ByteExtent>,
    },
    Lookup(DomainId, u64),
    InvalidateAll,
    InvalidateDomain(DomainId),
    InvalidateRange(DomainId, u64, u64),
}

fn domains() -> impl Strategy<Value = DomainId> {
    (0..DOMAINS).prop_map(DomainId::new)
}

/// Few distinct pages, so that steps meet each other.
fn addresses() -> impl Strategy<Value = u64> {
    prop_oneof![0..0x10_000u64, 0..0x80_0000u64, 0..PLAYGROUND_BYTES]
}

fn steps() -> impl Strategy<Value = Step> {
    let size = prop::sample::select(PageSize::ALL.to_vec());
    let permissions = (1..=3u8).prop_map(Permissions::from_bits_truncate);
    let extent = proptest::option::weighted(0.3, (0..4096u16, 0..4096u16))
        .prop_map(|bytes| bytes.and_then(|(one, other)| ByteExtent::new(one.min(other), one.max(other))));
    let fill = (0..8usize, size, addresses(), 0..1u64 << 46, permissions, extent);
    let bytes = prop_oneof![1..0x8000u64, 1..0x100_0000u64, 1..PLAYGROUND_BYTES];
    prop_oneof![
        4 => domains().prop_map(Step::BeginWalk),
        8 => fill.prop_map(|(walk, size, iova, hpa, permissions, extent)| {
            let extent = extent.filter(|_| size == PageSize::Size4K);
            Step::Fill { walk, size, iova, hpa, permissions, extent }
        }),
        8 => (domains(), addresses()).prop_map(|(domain, iova)| Step::Lookup(domain, iova)),
        1 => Just(Step::InvalidateAll),
        1 => domains().prop_map(Step::InvalidateDomain),
        4 => (domains(), addresses(), bytes).prop_map(|(domain, at, bytes)| Step::InvalidateRange(domain, at, bytes)),
    ]
}

fn range_of(entry: &IotlbEntry) -> IovaRange {
    IovaRange::new(entry.iova, entry.size.bytes()).expect("a page does not wrap")
}

/// What an invalidation covers.
type Covers = Box<dyn Fn(&IotlbEntry) -> bool>;

/// A map that forgets what an invalidation covers and nothing else.
struct Twin {
    drains: Drains,
    iotlb: Iotlb,
    map: HashMap<(DomainId, u64, PageSize), IotlbEntry>,
    /// Domain, generation, and how many invalidations there had been.
    walks: Vec<(DomainId, Generation, usize)>,
    invalidations: Vec<Covers>,
    evicted: bool,
}

impl Twin {
    fn new(geometry: CacheGeometry, partitions: u16) -> Self {
        let (drains, iotlb) = (Drains::new(1), Iotlb::partitioned(geometry, partitions));
        Self {
            drains,
            iotlb,
            map: HashMap::new(),
            walks: Vec::new(),
            invalidations: Vec::new(),
            evicted: false,
        }
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::BeginWalk(domain) => {
                let generation = self.drains.generation(domain, self.drains.context_generation());
                self.walks.push((domain, generation, self.invalidations.len()));
            }
            Step::Fill { walk, size, iova, hpa, permissions, extent } => {
                let Some(&walk) = self.walks.iter().rev().nth(walk) else { return };
                let to_page = |raw: u64| raw & !(size.bytes() - 1);
                let (iova, hpa) = (Iova::new(to_page(iova)), Hpa::new(to_page(hpa)));
                self.fill(walk, IotlbEntry { domain_id: walk.0, iova, size, hpa, permissions, extent });
            }
            Step::Lookup(domain, iova) => self.lookup(domain, Iova::new(iova)),
            Step::InvalidateAll => {
                let invalidating = self.drains.move_generation(Scope::Everything);
                self.iotlb.invalidate_all();
                drop(invalidating);
                self.forget(Box::new(|_| true));
            }
            Step::InvalidateDomain(domain) => {
                let invalidating = self.drains.move_generation(Scope::Domain(domain));
                self.iotlb.invalidate_domain(domain);
                drop(invalidating);
                self.forget(Box::new(move |entry| entry.domain_id == domain));
            }
            Step::InvalidateRange(domain, at, bytes) => {
                let range = IovaRange::new(Iova::new(at), bytes).expect("far from the end");
                let invalidating = self.drains.move_generation(Scope::Domain(domain));
                self.iotlb.invalidate_range(domain, range);
                drop(invalidating);
                self.forget(Box::new(move |entry| {
                    entry.domain_id == domain && range_of(entry).overlaps(range)
                }));
            }
        }
    }

    fn forget(&mut self, covers: Covers) {
        self.map.retain(|_, entry| !covers(entry));
        self.invalidations.push(covers);
    }

    fn fill(&mut self, (_, generation, before): (DomainId, Generation, usize), entry: IotlbEntry) {
        let since = &self.invalidations[before..];
        match self.iotlb.fill(&self.drains, generation, entry) {
            Filled::Inserted { evicted } => {
                assert!(!since.iter().any(|covers| covers(&entry)), "I4: {entry:?} was overtaken");
                self.map.insert((entry.domain_id, entry.iova.get(), entry.size), entry);
                self.evicted |= evicted;
            }
            Filled::Outdated => assert!(!since.is_empty(), "{entry:?} was overtaken by nothing"),
        }
    }

    fn lookup(&self, domain: DomainId, iova: Iova) {
        let found = self.iotlb.lookup(domain, iova);
        for access in [Access::Read, Access::Write, Access::Atomic] {
            let whole = found.filter(|entry| entry.extent.is_none() && entry.permissions.allow(access));
            let hpa = whole.map(|entry| Hpa::new(entry.hpa.get() + (iova.get() - entry.iova.get())));
            assert_eq!(
                self.iotlb.hit_whole_page(domain, iova, access),
                hpa,
                "the hot path sees what is whole"
            );
        }
        let covering = |size: PageSize| self.map.get(&(domain, iova.get() & !(size.bytes() - 1), size));
        match found {
            Some(entry) => assert_eq!(Some(&entry), covering(entry.size), "I2: nobody filled this"),
            None if self.evicted => (),
            None => assert!(!PageSize::ALL.into_iter().any(|size| covering(size).is_some()), "lost"),
        }
    }

    /// Until something is evicted the two are equal; after that the cache holds a part.
    fn compare(&self) {
        let entries = self.iotlb.entries();
        for entry in &entries {
            assert_eq!(self.map.get(&(entry.domain_id, entry.iova.get(), entry.size)), Some(entry));
        }
        assert!(self.evicted || entries.len() == self.map.len(), "lost without an eviction");
        assert!(entries.len() <= self.iotlb.capacity());
        assert!(entries.is_sorted_by_key(|entry| (entry.domain_id, entry.iova, entry.size)));
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 256, rng_seed: RngSeed::Fixed(SEED), failure_persistence: None, ..ProptestConfig::default()
    })]

    #[test]
    fn i2_i4_the_iotlb_holds_nothing_that_a_map_does_not(
        sets_log2 in 0..9u32, shared in 0..4u32, ways in 1..=4u8, steps in prop::collection::vec(steps(), 1..200),
    ) {
        let partitions = 1 << sets_log2.saturating_sub(shared);
        let mut twin = Twin::new(CacheGeometry { sets: 1 << sets_log2, ways }, partitions);
        for step in steps {
            twin.take(step);
            twin.compare();
        }
    }
}

// === placement ===

fn fill_pages(iotlb: &Iotlb, drains: &Drains, domain: DomainId, first: u64, pages: u64) -> usize {
    let generation = drains.generation(domain, drains.context_generation());
    let entry = |page: u64| IotlbEntry {
        domain_id: domain,
        iova: Iova::new(page << 12),
        size: PageSize::Size4K,
        hpa: Hpa::new(page << 12),
        permissions: Permissions::READ,
        extent: None,
    };
    let fills = (first..first + pages).map(|page| iotlb.fill(drains, generation, entry(page)));
    fills.filter(|filled| *filled == Filled::Inserted { evicted: true }).count()
}

#[test]
fn a_contiguous_region_of_the_size_of_the_iotlb_fits_without_an_eviction() {
    for (sets, ways, first) in
        [(1, 1, 0), (1, 4, 9), (256, 4, 0), (256, 4, 0xf_ffff_0000), (4096, 4, 0x8_0000)]
    {
        let (drains, iotlb) = (Drains::new(1), Iotlb::new(CacheGeometry { sets, ways }));
        let evicted = fill_pages(&iotlb, &drains, DomainId::new(3), first, iotlb.capacity() as u64);
        assert_eq!(evicted, 0, "{sets} sets, {ways} ways, from page {first:#x}");
    }
}

/// How many of 512 pages are evicted from 1,024 entries: page `n` of a tenant is `n * stride`.
fn check_spread(tenants: impl IntoIterator<Item = u16>, stride: u64) {
    let (drains, iotlb) = (Drains::new(1), Iotlb::new(CacheGeometry { sets: 256, ways: 4 }));
    let tenants: Vec<_> = tenants.into_iter().collect();
    let pages = 512 / tenants.len() as u64;
    let mut evicted = 0;
    for &tenant in &tenants {
        let page = |index| 0xf_fe00 + index * stride;
        evicted += (0..pages)
            .map(|index| fill_pages(&iotlb, &drains, DomainId::new(tenant), page(index), 1))
            .sum::<usize>();
    }
    // Placed at random about 20 would be; piled up, hundreds.
    assert!(evicted <= 96, "{evicted} of 512 evicted at half load: tenants {tenants:?}, stride {stride}");
}

#[test]
fn neither_tenants_with_the_same_addresses_nor_strides_pile_up() {
    for stride_log2 in 0..20 {
        check_spread([3], 1 << stride_log2);
        check_spread(0..8, 1 << stride_log2);
        check_spread((1..=16).map(|tenant| tenant * 256), 1 << stride_log2);
        check_spread((0..512).map(|tenant| tenant * 128), 1 << stride_log2);
    }
}

#[test]
fn addresses_beyond_57_bits_hit_nothing() {
    let (drains, iotlb) = (Drains::new(1), Iotlb::new(CacheGeometry { sets: 4, ways: 4 }));
    fill_pages(&iotlb, &drains, DomainId::new(0), 0, 1);
    assert!(iotlb.lookup(DomainId::new(0), Iova::new(0xfff)).is_some());
    for iova in [1 << 57, 1 << 63, !0xfff] {
        assert_eq!(iotlb.lookup(DomainId::new(0), Iova::new(iova)), None);
        let range = IovaRange::new(Iova::new(iova), 0x1000).expect("does not wrap");
        iotlb.invalidate_range(DomainId::new(0), range);
    }
    assert_eq!(iotlb.entries().len(), 1);
}

#[test]
fn only_powers_of_two_of_one_to_four_ways_are_possible() {
    let possible = |sets, ways| CacheGeometry { sets, ways }.is_possible();
    assert!(possible(1, 1) && possible(1 << 20, 4));
    assert!(!possible(0, 4) && !possible(3, 4) && !possible(4, 0) && !possible(4, 5));
    let takes = |sets, partitions| CacheGeometry { sets, ways: 4 }.takes_partitions(partitions);
    assert!(takes(1, 1) && takes(256, 1) && takes(256, 256) && takes(1 << 20, 1 << 15));
    assert!(!takes(256, 0) && !takes(256, 3) && !takes(256, 512) && !takes(0, 1));
}

// === partitions ===

/// An aggressor thrashes the IOTLB; how many of the victim's pages, a full share of them, are still there.
fn victims_left(partitions: u16, victim: u16, aggressor: u16) -> usize {
    let (drains, iotlb) =
        (Drains::new(1), Iotlb::partitioned(CacheGeometry { sets: 64, ways: 4 }, partitions));
    let pages = (iotlb.capacity() / usize::from(partitions)) as u64;
    let (victim, aggressor) = (DomainId::new(victim), DomainId::new(aggressor));
    assert_eq!(fill_pages(&iotlb, &drains, victim, 0xf_0000, pages), 0, "a share holds what it has room for");
    let evicted = fill_pages(&iotlb, &drains, aggressor, 0xf_0000, 4096);
    assert!(evicted >= 3072, "the aggressor thrashes its own: {evicted}");
    (0xf_0000..0xf_0000 + pages).filter(|page| iotlb.lookup(victim, Iova::new(page << 12)).is_some()).count()
}

#[test]
fn i7_a_domain_of_another_partition_displaces_nothing() {
    assert_eq!(victims_left(1, 5, 6), 0, "sharing all, the aggressor displaces the victim");
    for partitions in [2, 4, 16, 64] {
        let share = 256 / usize::from(partitions);
        for (victim, aggressor) in [(5, 6), (0xffff, 0xfffe), (0, partitions - 1)] {
            assert_eq!(
                victims_left(partitions, victim, aggressor),
                share,
                "{partitions}: {victim} {aggressor}"
            );
        }
        assert_eq!(victims_left(partitions, 5, 5 + partitions), 0, "two domains of one share meet in it");
    }
}

/// What is left of two pages of each of 16 domains, in four shares, after an invalidation.
fn check_partitioned(invalidate: impl Fn(&Iotlb), is_left: impl Fn(u16, u64) -> bool) {
    let (drains, iotlb) = (Drains::new(1), Iotlb::partitioned(CacheGeometry { sets: 64, ways: 4 }, 4));
    const FAR: u64 = 0x12_3456;
    for domain in 0..16 {
        for page in [1, FAR] {
            assert_eq!(fill_pages(&iotlb, &drains, DomainId::new(domain), page, 1), 0);
        }
    }
    let invalidating = drains.move_generation(Scope::Everything);
    invalidate(&iotlb);
    drop(invalidating);
    let left: Vec<_> =
        iotlb.entries().iter().map(|entry| (entry.domain_id.get(), entry.iova.get() >> 12)).collect();
    let all = (0..16).flat_map(|domain| [(domain, 1), (domain, FAR)]);
    let expected: Vec<_> = all.filter(|&(domain, page)| is_left(domain, page)).collect();
    assert_eq!(left, expected);
}

#[test]
fn an_invalidation_finds_everything_in_every_partition() {
    let range = |page: u64, pages: u64| IovaRange::new(Iova::new(page << 12), pages << 12).expect("a range");
    check_partitioned(|iotlb| iotlb.invalidate_all(), |_, _| false);
    for gone in [0, 3, 7, 14] {
        let id = DomainId::new(gone);
        check_partitioned(|iotlb| iotlb.invalidate_domain(id), |domain, _| domain != gone);
        check_partitioned(
            |iotlb| iotlb.invalidate_range(id, range(0, 2)),
            |domain, page| domain != gone || page != 1,
        );
        // So many pages that the sets are scanned rather than probed.
        let many = range(0, 1 << 40);
        check_partitioned(|iotlb| iotlb.invalidate_range(id, many), |domain, _| domain != gone);
    }
}

// === paging-structure cache ===

fn table(level: u8, iova: u64) -> PagingEntry {
    let base = iova & !((1 << (12 + 9 * u32::from(level))) - 1);
    PagingEntry {
        domain_id: DomainId::new(5),
        iova: Iova::new(base),
        level,
        table: Hpa::new(u64::from(level) << 12),
        permissions: Permissions::READ_WRITE,
    }
}

/// Which levels are still cached after tables of all levels for the first and the last gigabyte were filled
/// and then invalidated.
fn check_tables(invalidate: impl Fn(&PagingStructureCache), left: &[(u8, u64)]) {
    const FAR: u64 = 1 << 50;
    let (drains, cache) = (Drains::new(1), PagingStructureCache::new(CacheGeometry { sets: 8, ways: 4 }));
    let generation = drains.generation(DomainId::new(5), drains.context_generation());
    for at in [0, FAR] {
        for level in 1..=3 {
            assert_eq!(
                cache.fill(&drains, generation, table(level, at)),
                Filled::Inserted { evicted: false }
            );
        }
        assert_eq!(cache.lookup(DomainId::new(5), Iova::new(at)), Some(table(1, at)), "deepest first");
        assert_eq!(cache.lookup(DomainId::new(5), Iova::new(at + (1 << 21))), Some(table(2, at)));
        assert_eq!(cache.lookup(DomainId::new(5), Iova::new(at + (1 << 30))), Some(table(3, at)));
        assert_eq!(cache.lookup(DomainId::new(6), Iova::new(at)), None);
    }
    let invalidating = drains.move_generation(Scope::Everything);
    invalidate(&cache);
    drop(invalidating);
    let entries: Vec<_> = cache.entries().iter().map(|entry| (entry.level, entry.iova.get())).collect();
    assert_eq!(entries, left);
    assert_eq!(cache.fill(&drains, generation, table(1, 0)), Filled::Outdated);
}

#[test]
fn an_invalidation_forgets_the_tables_above_its_range_and_no_others() {
    const FAR: u64 = 1 << 50;
    let range = |base, bytes| IovaRange::new(Iova::new(base), bytes).expect("a range");
    let all = [(1, 0), (2, 0), (3, 0), (1, FAR), (2, FAR), (3, FAR)];
    let domain = DomainId::new(5);
    check_tables(|cache| cache.invalidate_all(), &[]);
    check_tables(|cache| cache.invalidate_domain(domain), &[]);
    check_tables(|cache| cache.invalidate_domain(DomainId::new(6)), &all);
    check_tables(|cache| cache.invalidate_range(domain, range(0x1000, 1)), &all[3..]);
    check_tables(
        |cache| cache.invalidate_range(domain, range(1 << 21, 1)),
        &[all[0], all[3], all[4], all[5]],
    );
    check_tables(|cache| cache.invalidate_range(domain, range(FAR + (1 << 39), 1)), &all);
    check_tables(|cache| cache.invalidate_range(domain, range(0, u64::MAX)), &[]);
    check_tables(|cache| cache.invalidate_range(DomainId::new(6), range(0, u64::MAX)), &all);
}

// === context cache ===

fn context_of(source: u16) -> CachedContext {
    let table = Hpa::new((u64::from(source) << 30) | 0xf_ffff_0000_0000 | 0xf000);
    let translation = match source % 4 {
        0 => ContextTranslation::PassThrough,
        levels => ContextTranslation::SecondStage { table, levels: levels as u8 + 2 },
    };
    CachedContext {
        domain_id: DomainId::new(source % 3),
        translation,
        fault_processing_disable: source % 2 == 1,
    }
}

/// Which of the sources are still cached after an invalidation.
fn check_contexts(invalidate: impl Fn(&ContextCache), is_left: impl Fn(u16) -> bool) {
    let sources = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0x1f2, 0x1f3, 0xfff8, 0xffff];
    let (drains, cache) = (Drains::new(1), ContextCache::new(CacheGeometry { sets: 64, ways: 4 }));
    let generation = drains.context_generation();
    for source in sources {
        let filled = cache.fill(&drains, generation, SourceId::new(source), context_of(source));
        assert_eq!(filled, Filled::Inserted { evicted: false });
        assert_eq!(cache.lookup(SourceId::new(source)), Some(context_of(source)), "comes back as it was");
    }
    let invalidating = drains.move_context_generation(Scope::Everything);
    invalidate(&cache);
    drop(invalidating);
    let left = sources.into_iter().filter(|&source| is_left(source));
    let expected: Vec<_> = left.map(|source| (SourceId::new(source), context_of(source))).collect();
    assert_eq!(cache.entries(), expected);
    assert_eq!(cache.fill(&drains, generation, SourceId::new(1), context_of(1)), Filled::Outdated);
}

#[test]
fn an_invalidation_forgets_the_contexts_of_its_granularity_and_no_others() {
    check_contexts(|cache| cache.invalidate_all(), |_| false);
    check_contexts(|cache| cache.invalidate_domain(DomainId::new(1)), |source| source % 3 != 1);
    check_contexts(|cache| cache.invalidate_domain(DomainId::new(9)), |_| true);
    for (mask, forgotten) in [
        (FunctionMask::Exact, vec![6]),
        (FunctionMask::IgnoreBit2, vec![2, 6]),
        (FunctionMask::IgnoreBits2To1, vec![0, 2, 4, 6]),
        (FunctionMask::IgnoreAll, vec![0, 1, 2, 3, 4, 5, 6, 7]),
    ] {
        let invalidate = |cache: &ContextCache| cache.invalidate_device(SourceId::new(6), mask);
        check_contexts(invalidate, |source| !forgotten.contains(&source));
    }
}
