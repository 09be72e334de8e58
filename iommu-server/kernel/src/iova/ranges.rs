//! Free ranges, ordered by address (to give back and merge) and by length (to find one in logarithmic time).
//!
//! What is below 4 GiB and what is above are two sets, so that the first is used first. **Promise:** the nodes
//! looked at are few and do not depend on how many there are, with two exceptions: a limit that cuts a set may cost
//! one for each *length* that is free, and when nothing surely fits, each range that is long enough is looked at,
//! because alignment decides.

use std::collections::{BTreeMap, BTreeSet};

use super::{INTERRUPT_PAGES, PAGE_4G};

/// All that is free in one address space.
#[derive(Debug)]
pub(super) struct FreeSpace {
    low: FreeRanges,
    high: FreeRanges,
    allocations: u64,
}

impl FreeSpace {
    /// Everything below the page `end` but what is reserved.
    pub(super) fn new(end: u64) -> Self {
        let (interrupts, after) = INTERRUPT_PAGES;
        let mut low = FreeRanges::default();
        low.keep(1, interrupts - 1);
        low.keep(after, PAGE_4G - after);
        let mut high = FreeRanges::default();
        high.keep(PAGE_4G, end - PAGE_4G);
        Self { low, high, allocations: 0 }
    }
    /// An aligned range that ends at or below the page `limit`.
    pub(super) fn take(&mut self, pages: u64, alignment: u64, limit: u64) -> Option<u64> {
        let end = limit.saturating_add(1);
        let is_high = end > PAGE_4G;
        // What surely fits is found in logarithmic time; only when nothing does are tight fits looked at.
        let first = (self.low.take_roomy(pages, alignment, end))
            .or_else(|| is_high.then(|| self.high.take_roomy(pages, alignment, end)).flatten())
            .or_else(|| self.low.take_tight(pages, alignment, end))
            .or_else(|| is_high.then(|| self.high.take_tight(pages, alignment, end)).flatten())?;
        self.allocations += 1;
        Some(first)
    }
    /// Takes exactly this range out; all of it is free.
    pub(super) fn remove(&mut self, first: u64, pages: u64) {
        for (set, first, pages) in self.split(first, pages) {
            set.remove(first, pages);
        }
    }
    pub(super) fn insert(&mut self, first: u64, pages: u64) {
        for (set, first, pages) in self.split(first, pages) {
            set.insert(first, pages);
        }
    }
    pub(super) fn covers(&mut self, first: u64, pages: u64) -> bool {
        self.split(first, pages).all(|(set, first, pages)| set.covers(first, pages))
    }
    /// Nodes looked at.
    pub(super) fn visits(&self) -> u64 {
        self.low.visits + self.high.visits
    }
    /// Ranges that `take` handed out.
    pub(super) fn allocations(&self) -> u64 {
        self.allocations
    }
    /// Every free range: first page and pages.
    #[cfg(test)]
    pub(super) fn ranges(&self) -> impl Iterator<Item = (u64, u64)> {
        self.low.by_start.iter().chain(&self.high.by_start).map(|(&first, &pages)| (first, pages))
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
    visits: u64,
}

impl FreeRanges {
    fn covers(&mut self, first: u64, pages: u64) -> bool {
        let Some((&start, &length)) = self.by_start.range(..=first).next_back() else { return false };
        self.visits += 1;
        first + pages <= start + length
    }
    fn insert(&mut self, first: u64, pages: u64) {
        let (mut first, mut pages) = (first, pages);
        if let Some((&start, &length)) = self.by_start.range(..first).next_back() {
            self.visits += 1;
            assert!(start + length <= first, "a range is freed once");
            if start + length == first {
                self.forget(start, length);
                (first, pages) = (start, length + pages);
            }
        }
        if let Some((&start, &length)) = self.by_start.range(first..).next() {
            self.visits += 1;
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
        self.visits += 1;
        self.cut((start, length), first, pages);
    }
    /// Takes a part out of this free range.
    fn cut(&mut self, (start, length): (u64, u64), first: u64, pages: u64) {
        assert!(
            start <= first && first + pages <= start + length,
            "a range is taken only where all of it is free"
        );
        self.forget(start, length);
        self.keep(start, first - start);
        self.keep(first + pages, start + length - (first + pages));
    }
    /// From a range so long that alignment cannot matter, best fit, from its top.
    fn take_roomy(&mut self, pages: u64, alignment: u64, end: u64) -> Option<u64> {
        let roomy = pages.checked_add(alignment - 1)?;
        let mut length_min = roomy;
        loop {
            let &(length, start) = self.by_pages.range((length_min, 0)..).next()?;
            self.visits += 1;
            let usable_end = (start + length).min(end);
            if usable_end.checked_sub(start).is_some_and(|usable| usable >= roomy) {
                let first = (usable_end - pages) & !(alignment - 1);
                self.cut((start, length), first, pages);
                return Some(first);
            }
            // Of this length it is the lowest, so the limit cuts the others even more.
            length_min = length + 1;
        }
    }
    fn take_tight(&mut self, pages: u64, alignment: u64, end: u64) -> Option<u64> {
        if alignment == 1 {
            return None; // What fits at all was roomy.
        }
        let visits = &mut self.visits;
        let fit = |&(length, start): &(u64, u64)| {
            *visits += 1;
            let first = (start + length).min(end).checked_sub(pages)? & !(alignment - 1);
            (first >= start).then_some((length, start, first))
        };
        let (length, start, first) = self.by_pages.range((pages, 0)..).find_map(fit)?;
        self.cut((start, length), first, pages);
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
