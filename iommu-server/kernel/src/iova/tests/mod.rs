//! What the allocators promise; what they cost is in `cost`, and random sequences against a twin in `twin`.

mod cost;
mod twin;

use iommu_types::IovaAllocation::{self, Cached, Classic};

use super::*;

/// No limit but the domain's width.
const ANY: u64 = u64::MAX;
/// The last page of a 32-bit mask.
const LAST_32: u64 = PAGE_4G - 1;

impl IovaAllocator {
    /// Every free range of the tree.
    fn free_ranges(&self) -> Vec<(u64, u64)> {
        match &self.kind {
            Kind::Classic(classic) => classic.free_ranges().collect(),
            Kind::Cached(cached) => cached.space().ranges().collect(),
        }
    }
    /// Trims as a timer would, until nothing is left to trim.
    fn left_alone(&mut self) -> u64 {
        let mut calls = 0;
        while self.counters().cached_ranges > 0 {
            self.trim();
            calls += 1;
            assert!(calls < 100, "{:?}", self.counters());
        }
        calls
    }
}

fn check_empty(mut iovas: IovaAllocator, width_bits: u8, kind: IovaAllocation) {
    iovas.left_alone();
    assert_eq!(iovas.counters().live_ranges, 0);
    assert_eq!(iovas.free_ranges(), IovaAllocator::new(kind, width_bits).free_ranges(), "{kind}");
}

#[test]
fn small_ranges_are_aligned_to_their_size_and_stay_under_one_leaf_table() {
    for kind in [Classic, Cached] {
        let mut iovas = IovaAllocator::new(kind, 39);
        for pages in [1, 2, 3, 5, 8, 100, 257, 512] {
            let first = iovas.allocate(pages, ANY, 0).expect("space");
            assert_eq!(first % pages.next_power_of_two(), 0, "{kind}: {pages} pages at {first:#x}");
            assert_eq!(first / 512, (first + pages - 1) / 512);
        }
        let first = iovas.allocate(513, ANY, 0).expect("space");
        assert_eq!(first % 512, 0, "{kind}");
    }
}

#[test]
fn below_4_gib_is_used_first_and_then_the_rest_until_nothing_is_left() {
    // Of 2,048 regions below 4 GiB page 0 and FEEx_xxxx break one each; one more fits only tightly, which the cached
    // allocator looks at last.
    for (kind, low, tight) in [(Classic, 2046, 0), (Cached, 2045, 1)] {
        let mut iovas = IovaAllocator::new(kind, 39);
        let mut taken = Vec::new();
        for n in 0..low {
            let first = iovas.allocate(512, ANY, 0).expect("space");
            assert!(first < PAGE_4G, "{kind}: allocation {n} at {first:#x}");
            taken.push((first, 512));
        }
        let first = iovas.allocate(512, ANY, 0).expect("space above 4 GiB");
        assert!(first >= PAGE_4G, "{kind}");
        taken.push((first, 512));
        let above = (1 << 27) - PAGE_4G - 512;
        taken.push((iovas.allocate(above, ANY, 0).expect("one range"), above));
        for _ in 0..tight {
            let tight = iovas.allocate(512, ANY, 0).expect("what fits tightly");
            assert!(tight < PAGE_4G);
            taken.push((tight, 512));
        }
        assert_eq!(iovas.allocate(512, ANY, 0), None, "{kind}");
        let mut left = [0; 3].map(|_| iovas.allocate(256, ANY, 0));
        left.sort_unstable();
        assert_eq!(left, [None, Some(256), Some(INTERRUPT_PAGES.1)], "{kind}: beside page 0 and FEEx_xxxx");
        assert_eq!(iovas.allocate(u64::MAX, ANY, 0), None, "{kind}");
        taken.extend([(256, 256), (INTERRUPT_PAGES.1, 256)]);
        for (first, pages) in taken {
            iovas.free(first, pages, 0);
        }
        check_empty(iovas, 39, kind);
    }
}

#[test]
fn a_freed_address_can_still_be_taken_exactly() {
    for kind in [Classic, Cached] {
        let mut iovas = IovaAllocator::new(kind, 48);
        let first = iovas.allocate(1, ANY, 0).expect("space");
        assert!(!iovas.take_exact(first, 1), "{kind}: in use");
        iovas.free(first, 1, 0);
        assert!(iovas.take_exact(first, 1), "{kind}");
        assert!(!iovas.take_exact(first, 1), "{kind}: taken");
        assert_eq!(iovas.counters().live_ranges, 1);
        iovas.free_exact(first, 1);
        assert!(iovas.take_exact(PAGE_4G - 3, 8), "{kind}: across 4 GiB");
        iovas.free_exact(PAGE_4G - 3, 8);
        assert!(!iovas.take_exact(0, 1), "{kind}: page 0");
        assert!(!iovas.take_exact(INTERRUPT_PAGES.0 - 1, 2), "{kind}: FEEx_xxxx");
        assert!(!iovas.take_exact((1 << 36) - 1, 2), "{kind}: beyond the width");
        check_empty(iovas, 48, kind);
    }
}

#[test]
fn every_page_of_a_range_is_within_the_limit() {
    // With nothing free below 4 GiB but the first seven pages, where the first is never handed out.
    let cases = [
        (1, 0, None),
        (1, 1, Some(1)),
        (2, 2, None),
        (2, 3, Some(2)),
        (3, 6, None),
        (3, 7, Some(4)),
        (8, LAST_32, None),
        (8, PAGE_4G + 6, None),
        (8, PAGE_4G + 7, Some(PAGE_4G)),
        (1024, PAGE_4G + 1022, None),
        (1024, PAGE_4G + 1023, Some(PAGE_4G)),
    ];
    for (kind, (pages, limit, expected)) in
        [Classic, Cached].into_iter().flat_map(|kind| cases.map(|case| (kind, case)))
    {
        let mut iovas = IovaAllocator::new(kind, 48);
        assert!(iovas.take_exact(8, INTERRUPT_PAGES.0 - 8));
        assert!(iovas.take_exact(INTERRUPT_PAGES.1, PAGE_4G - INTERRUPT_PAGES.1));
        let first = iovas.allocate(pages, limit, 0);
        assert_eq!(first, expected, "{kind}: {pages} pages up to {limit:#x}");
    }
}

#[test]
fn a_cached_range_beyond_the_limit_is_passed_over() {
    let mut iovas = IovaAllocator::new(Cached, 48);
    assert!(iovas.take_exact(1, INTERRUPT_PAGES.0 - 1), "almost all below 4 GiB");
    assert!(iovas.take_exact(0xf_f000, 0x1000), "all but half a region");
    let low = iovas.allocate(256, LAST_32, 0).expect("beside FEEx_xxxx");
    let [a, b] = [0; 2].map(|_| iovas.allocate(256, ANY, 0).expect("above"));
    assert!(low < PAGE_4G && a >= PAGE_4G && b >= PAGE_4G);
    for first in [a, low, b] {
        iovas.free(first, 256, 0);
    }
    assert_eq!(iovas.allocate(256, LAST_32, 0), Some(low), "between two beyond the limit");
    let visits = iovas.counters().visits;
    assert_eq!(iovas.allocate(256, ANY, 0).map(|first| first >= PAGE_4G), Some(true));
    assert_eq!(iovas.counters().visits, visits, "from the magazine");
}

#[test]
fn everything_cached_is_given_back_before_an_allocation_fails() {
    const LIMIT: u64 = 4 * REGION_PAGES - 1;
    let mut iovas = IovaAllocator::new(Cached, 48);
    let pages: Vec<u64> = std::iter::from_fn(|| iovas.allocate(1, LIMIT, 0)).collect();
    assert_eq!(pages.len() as u64, LIMIT, "all but page 0");
    for (n, first) in pages.into_iter().enumerate() {
        iovas.free(first, 1, n as u8);
    }
    assert!(iovas.counters().cached_ranges > 1500);
    for n in 0..3 {
        assert!(iovas.allocate(512, LIMIT, 3).is_some(), "region {n}");
    }
    assert_eq!(iovas.allocate(512, LIMIT, 3), None, "page 0 breaks the last one");
}

#[test]
fn a_refill_hands_out_the_pages_of_one_leaf_table_in_ascending_order() {
    let mut iovas = IovaAllocator::new(Cached, 48);
    for pages in [1, 2, 16, 512] {
        let firsts: Vec<u64> =
            (0..512 / pages).map(|_| iovas.allocate(pages, ANY, 5).expect("space")).collect();
        assert_eq!(firsts[0] % 512, 0);
        assert!(firsts.iter().zip(0..).all(|(first, n)| *first == firsts[0] + n * pages), "{firsts:x?}");
    }
    assert_eq!(iovas.counters().tree_allocations, 4);
}

#[test]
fn caches_are_bounded_and_what_is_over_goes_back_to_the_tree() {
    let mut iovas = IovaAllocator::new(Cached, 48);
    let pages: Vec<u64> = (0..50_000).map(|_| iovas.allocate(1, ANY, 0).expect("space")).collect();
    for (n, first) in pages.into_iter().enumerate() {
        iovas.free(first, 1, (n / 5_000) as u8);
    }
    let bound = (CLIENTS * 2 + DEPOT_MAGAZINES_MAX) * MAGAZINE_RANGES;
    let cached = iovas.counters().cached_ranges;
    assert!(cached <= (bound as u64) + REGION_PAGES, "{cached}");
    assert!(cached >= (DEPOT_MAGAZINES_MAX * MAGAZINE_RANGES) as u64, "{cached}");
    let Kind::Cached(inner) = &iovas.kind else { unreachable!("as created") };
    let free: u64 = inner.space().ranges().map(|(_, pages)| pages).sum();
    let all: u64 = IovaAllocator::new(Cached, 48).free_ranges().iter().map(|(_, pages)| pages).sum();
    assert_eq!(free + cached, all, "nothing is lost and nothing is cached twice");
    check_empty(iovas, 48, Cached);
}

#[test]
fn trimming_gives_back_half_of_what_was_not_needed_a_bounded_part_at_a_time() {
    const MAGAZINE: u64 = MAGAZINE_RANGES as u64;
    let mut iovas = IovaAllocator::new(Cached, 48);
    let mut live: Vec<u64> = (0..20 * 512).map(|_| iovas.allocate(1, ANY, 0).expect("space")).collect();
    for first in live.drain(..11 * MAGAZINE_RANGES + 1) {
        iovas.free(first, 1, 0);
    }
    // The client has one full magazine and one range, the depot ten magazines; all came only now.
    assert_eq!(iovas.trim(), MAGAZINE, "one more than there are clients");
    let taken: Vec<u64> = (0..3 * MAGAZINE).map(|_| iovas.allocate(1, ANY, 0).expect("cached")).collect();
    for first in taken {
        iovas.free(first, 1, 0);
    }
    assert_eq!(iovas.trim(), 4 * MAGAZINE, "of nine in the depot two were needed");
    assert_eq!(iovas.trim(), 3 * MAGAZINE + 65, "of five nothing was, nor of the client's 129 ranges");
    for first in live.drain(..) {
        iovas.free(first, 1, 0);
    }
    iovas.trim();
    let (given, bound) = (iovas.trim(), TRIM_RANGES_MAX as u64);
    assert!(
        given <= bound && given + MAGAZINE > bound,
        "as much as one call may, in whole magazines: {given}"
    );
    let calls = iovas.left_alone();
    assert!(calls <= 10, "{calls}");
    check_empty(iovas, 48, Cached);
}
