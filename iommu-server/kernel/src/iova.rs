//! Which I/O virtual addresses of a domain are free.
//!
//! Two parts. Behind is a set of free ranges, ordered by address (to give back and merge) and by length (to find one in
//! logarithmic time); below 4 GiB is used first, from the top down, then what is above. In front, for each power of two up
//! to 512 pages, is a stack of free ranges of that size: taking and giving back are a pop and a push. A stack is
//! refilled with a whole 2 MiB region, so that neighbours in a stack share a page table.
//!
//! **Promises:** page 0 and FEEx_xxxx are never handed out; a range of up to 512 pages is aligned to its size rounded up to a power
//! of two and so lies under one leaf table; larger ones are aligned to 2 MiB. Stacks never hold more than was
//! once in use, and are emptied into the set before an allocation fails.

use std::collections::{BTreeMap, BTreeSet};

/// The largest size, as a power of two, that has a stack: 512 pages, what one leaf table covers.
const CLASS_MAX: u32 = 9;
/// Pages under one leaf table.
const REGION_PAGES: u64 = 1 << CLASS_MAX;
/// The first page at 4 GiB.
const PAGE_4G: u64 = 1 << 20;
/// FEE0_0000 to FEEF_FFFF in pages: first, and the first after.
pub(crate) const INTERRUPT_PAGES: (u64, u64) = (0xf_ee00, 0xf_ef00);

/// Whether a range of that many pages comes from a stack.
pub(crate) fn is_small(pages: u64) -> bool {
    pages <= REGION_PAGES
}

/// How many pages are taken for a range of `pages`; `None` when the number is absurd.
fn rounded(pages: u64) -> Option<u64> {
    if is_small(pages) {
        Some(pages.next_power_of_two())
    } else {
        pages.checked_next_multiple_of(REGION_PAGES)
    }
}

/// c
#[derive(Clone, Copy, Debug, Default)]
pub struct IovaCounters {
    pub live_ranges: u64,
    pub cached_ranges: u64,
    pub visits: u64,
    pub allocations: u64,
    pub tree_allocations: u64,
}
/// The allocator of one domain, in page numbers.
#[derive(Debug)]
pub(crate) struct IovaAllocator {
    stacks: [Vec<u64>; CLASS_MAX as usize + 1],
    low: FreeRanges,
    high: FreeRanges,
}

impl IovaAllocator {
    /// Everything below 2^`width_bits` is free but what is reserved.
    pub(crate) fn new(_kind: iommu_types::IovaAllocation, width_bits: u8) -> Self {
        let (interrupts, after) = INTERRUPT_PAGES;
        let mut low = FreeRanges::default();
        low.insert(1, interrupts - 1);
        low.insert(after, PAGE_4G - after);
        let mut high = FreeRanges::default();
        high.insert(PAGE_4G, (1 << (width_bits - 12)) - PAGE_4G);
        Self { stacks: Default::default(), low, high }
    }
    /// First page of a range of `pages` pages.
    pub(crate) fn allocate(&mut self, pages: u64, _limit: u64, _client: u8) -> Option<u64> {
        let rounded = rounded(pages)?;
        if !is_small(pages) {
            return self.take(rounded, REGION_PAGES).or_else(|| {
                self.empty_stacks();
                self.take(rounded, REGION_PAGES)
            });
        }
        let class = rounded.trailing_zeros() as usize;
        if let Some(first) = self.stacks[class].pop() {
            return Some(first);
        }
        self.refill(class);
        self.stacks[class].pop()
    }
    /// Gives back a range that `allocate` handed out.
    pub(crate) fn free(&mut self, first: u64, pages: u64, _client: u8) {
        let rounded = rounded(pages).expect("a range that was allocated");
        if is_small(pages) {
            self.stacks[rounded.trailing_zeros() as usize].push(first);
        } else {
            self.free_exact(first, rounded);
        }
    }
    pub(crate) fn trim(&mut self) -> u64 {
        0
    }
    pub(crate) fn counters(&self) -> IovaCounters {
        IovaCounters::default()
    }
    /// Takes exactly this range, if all of it is free.
    pub(crate) fn take_exact(&mut self, first: u64, pages: u64) -> bool {
        if !self.is_free(first, pages) {
            self.empty_stacks();
            if !self.is_free(first, pages) {
                return false;
            }
        }
        for (set, first, pages) in self.split(first, pages) {
            set.remove(first, pages);
        }
        true
    }
    /// Gives back a range that `take_exact` took.
    pub(crate) fn free_exact(&mut self, first: u64, pages: u64) {
        for (set, first, pages) in self.split(first, pages) {
            set.insert(first, pages);
        }
    }
    /// Pages that are free, in stacks or not.
    #[cfg(test)]
    pub(crate) fn free_pages(&self) -> u64 {
        let stacked = |(class, stack): (usize, &Vec<u64>)| (stack.len() as u64) << class;
        let stacked: u64 = self.stacks.iter().enumerate().map(stacked).sum();
        stacked + self.low.by_start.values().sum::<u64>() + self.high.by_start.values().sum::<u64>()
    }
    fn refill(&mut self, class: usize) {
        let pages = 1 << class;
        if let Some(region) = self.take(REGION_PAGES, REGION_PAGES) {
            // Popped in ascending order.
            self.stacks[class].extend((0..REGION_PAGES >> class).rev().map(|n| region + (n << class)));
            return;
        }
        if let Some(first) = self.take(pages, pages) {
            self.stacks[class].push(first);
            return;
        }
        self.empty_stacks();
        let first = self.take(pages, pages);
        self.stacks[class].extend(first);
    }
    fn take(&mut self, pages: u64, alignment: u64) -> Option<u64> {
        // What surely fits is found in logarithmic time; only when nothing does are tight fits looked at.
        (self.low.take_roomy(pages, alignment))
            .or_else(|| self.high.take_roomy(pages, alignment))
            .or_else(|| self.low.take_tight(pages, alignment))
            .or_else(|| self.high.take_tight(pages, alignment))
    }
    fn empty_stacks(&mut self) {
        for class in 0..self.stacks.len() {
            for first in std::mem::take(&mut self.stacks[class]) {
                self.free_exact(first, 1 << class);
            }
        }
    }
    fn is_free(&self, first: u64, pages: u64) -> bool {
        let end = first + pages;
        (first >= PAGE_4G || self.low.covers(first, pages.min(PAGE_4G - first)))
            && (end <= PAGE_4G || self.high.covers(first.max(PAGE_4G), end - first.max(PAGE_4G)))
    }
    /// The parts of a range below and above 4 GiB.
    fn split(&mut self, first: u64, pages: u64) -> impl Iterator<Item = (&mut FreeRanges, u64, u64)> {
        let end = first + pages;
        let low = (first < PAGE_4G).then(|| (&mut self.low, first, end.min(PAGE_4G) - first));
        let high = (end > PAGE_4G).then(|| (&mut self.high, first.max(PAGE_4G), end - first.max(PAGE_4G)));
        low.into_iter().chain(high)
    }
}

/// Free ranges that do not touch each other.
#[derive(Debug, Default)]
struct FreeRanges {
    by_start: BTreeMap<u64, u64>,
    by_pages: BTreeSet<(u64, u64)>,
}

impl FreeRanges {
    fn covers(&self, first: u64, pages: u64) -> bool {
        let below = self.by_start.range(..=first).next_back();
        below.is_some_and(|(start, length)| first + pages <= start + length)
    }
    fn insert(&mut self, first: u64, pages: u64) {
        let (mut first, mut pages) = (first, pages);
        if let Some((&start, &length)) = self.by_start.range(..first).next_back() {
            assert!(start + length <= first, "a range is freed once");
            if start + length == first {
                self.forget(start, length);
                (first, pages) = (start, length + pages);
            }
        }
        if let Some((&start, &length)) = self.by_start.range(first..).next() {
            assert!(first + pages <= start, "a range is freed once");
            if first + pages == start {
                self.forget(start, length);
                pages += length;
            }
        }
        self.keep(first, pages);
    }
    /// Takes a part out of the range that covers it.
    fn remove(&mut self, first: u64, pages: u64) {
        let below = self.by_start.range(..=first).next_back();
        let (&start, &length) = below.expect("a range is taken only where one is free");
        assert!(first + pages <= start + length, "a range is taken only where all of it is free");
        self.forget(start, length);
        self.keep(start, first - start);
        self.keep(first + pages, start + length - (first + pages));
    }
    fn take_roomy(&mut self, pages: u64, alignment: u64) -> Option<u64> {
        let roomy = pages.checked_add(alignment - 1)?;
        let &(length, start) = self.by_pages.range((roomy, 0)..).next()?;
        let first = (start + length - pages) & !(alignment - 1);
        self.remove(first, pages);
        Some(first)
    }
    fn take_tight(&mut self, pages: u64, alignment: u64) -> Option<u64> {
        let fit = |&(length, start): &(u64, u64)| {
            let first = (start + length - pages) & !(alignment - 1);
            (first >= start).then_some(first)
        };
        let first = self.by_pages.range((pages, 0)..).find_map(fit)?;
        self.remove(first, pages);
        Some(first)
    }
    fn keep(&mut self, first: u64, pages: u64) {
        if pages > 0 {
            self.by_start.insert(first, pages);
            self.by_pages.insert((pages, first));
        }
    }
    fn forget(&mut self, first: u64, pages: u64) {
        self.by_start.remove(&first);
        self.by_pages.remove(&(pages, first));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn small_ranges_are_aligned_to_their_size_and_stay_under_one_leaf_table() {
        let mut iovas = IovaAllocator::new(39);
        for pages in [1, 2, 3, 5, 8, 100, 257, 512] {
            let first = iovas.allocate(pages).expect("space");
            assert_eq!(first % pages.next_power_of_two(), 0, "{pages} pages at {first:#x}");
            assert_eq!(first / 512, (first + pages - 1) / 512);
        }
        let first = iovas.allocate(513).expect("space");
        assert_eq!(first % 512, 0);
    }

    #[test]
    fn below_4_gib_is_used_first_and_then_the_rest_until_nothing_is_left() {
        let mut iovas = IovaAllocator::new(39);
        let total = iovas.free_pages();
        let mut taken = Vec::new();
        // Of 2,048 regions below 4 GiB page 0 and FEEx_xxxx break one each, and one fits only tightly.
        for n in 0..2045 {
            let first = iovas.allocate(512).expect("space");
            assert!(first < PAGE_4G, "allocation {n} at {first:#x}");
            taken.push((first, 512));
        }
        let first = iovas.allocate(512).expect("space above 4 GiB");
        assert!(first >= PAGE_4G);
        taken.push((first, 512));
        let above = (1 << 27) - PAGE_4G - 512;
        taken.push((iovas.allocate(above).expect("one range"), above));
        let tight = iovas.allocate(512).expect("what fits tightly");
        assert!(tight < PAGE_4G);
        taken.push((tight, 512));
        assert_eq!(iovas.allocate(512), None);
        let left = [iovas.allocate(256), iovas.allocate(256), iovas.allocate(256)];
        assert_eq!(left, [Some(256), Some(INTERRUPT_PAGES.1), None], "beside page 0 and FEEx_xxxx");
        assert_eq!(iovas.allocate(u64::MAX), None);
        taken.extend([(256, 256), (INTERRUPT_PAGES.1, 256)]);
        for (first, pages) in taken {
            iovas.free(first, pages);
        }
        assert_eq!(iovas.free_pages(), total);
    }

    #[test]
    fn an_address_in_a_stack_can_still_be_taken_exactly() {
        let mut iovas = IovaAllocator::new(48);
        let first = iovas.allocate(1).expect("space");
        assert!(!iovas.take_exact(first, 1), "in use");
        iovas.free(first, 1);
        assert!(iovas.take_exact(first, 1));
        assert!(!iovas.take_exact(first, 1), "taken");
        assert!(iovas.take_exact(PAGE_4G - 3, 8), "across 4 GiB");
        iovas.free_exact(PAGE_4G - 3, 8);
        assert!(!iovas.take_exact(0, 1), "page 0");
        assert!(!iovas.take_exact(INTERRUPT_PAGES.0 - 1, 2), "FEEx_xxxx");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn ranges_in_use_never_overlap_and_everything_comes_back(
            steps in prop::collection::vec((0u8..4, 1u64..1200, any::<prop::sample::Index>()), 1..200)
        ) {
            let mut iovas = IovaAllocator::new(39);
            let total = iovas.free_pages();
            let mut live: Vec<(u64, u64, bool)> = Vec::new();
            for (kind, pages, pick) in steps {
                match kind {
                    0 | 1 => {
                        let first = iovas.allocate(pages).expect("39 bits are enough");
                        live.push((first, pages, false));
                    }
                    2 => {
                        let first = pages * 31;
                        let clashes = live.iter().any(|(start, length, exact)| {
                            let length = if *exact { *length } else { rounded(*length).expect("small") };
                            first < start + length && *start < first + pages
                        });
                        prop_assert_eq!(iovas.take_exact(first, pages), !clashes);
                        if !clashes {
                            live.push((first, pages, true));
                        }
                    }
                    _ if live.is_empty() => {}
                    _ => {
                        let (first, pages, exact) = live.swap_remove(pick.index(live.len()));
                        if exact { iovas.free_exact(first, pages) } else { iovas.free(first, pages) }
                    }
                }
                let mut sorted = live.clone();
                sorted.sort_unstable();
                for pair in sorted.windows(2) {
                    prop_assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{:?} overlaps {:?}", pair[0], pair[1]);
                }
            }
            for (first, pages, exact) in live {
                if exact { iovas.free_exact(first, pages) } else { iovas.free(first, pages) }
            }
            prop_assert_eq!(iovas.free_pages(), total);
        }
    }
}
