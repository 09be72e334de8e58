//! The allocator that Linux had until 4.6: a tree of what is taken, searched from the top down.
//!
//! One node is cached: where the last allocation below 4 GiB ended. A search begins below it. Freeing a range at or
//! above it moves it up to the range that follows the freed one, because there may be room now. While every range
//! has the same size, both are one step. With mixed sizes they are not: a small hole near the top takes the cached
//! node up, the next larger request does not fit there, and walks down node by node through everything that is
//! live. That is the linear cost that strict protection was long blamed for (EiovaR, FAST'15), and it is kept here
//! on purpose.
//!
//! Two things are better than in Linux. When nothing is free below the cached node, the search is repeated from the
//! top, so that an allocation fails only when there is no room. And a search begins at the limit, not at the top of
//! the tree.

use std::collections::BTreeMap;

use super::{INTERRUPT_PAGES, PAGE_4G};

/// What is taken, and where to begin to search.
#[derive(Debug)]
pub(super) struct Classic {
    /// First page and pages. Page 0 and FEEx_xxxx are in it for ever, so every search ends at a node.
    taken: BTreeMap<u64, u64>,
    /// The first page after the space.
    end: u64,
    /// The cached node, by its first page: one of `taken`, below 4 GiB.
    cached: Option<u64>,
    visits: u64,
}

impl Classic {
    pub(super) fn new(end: u64) -> Self {
        let (interrupts, after) = INTERRUPT_PAGES;
        let taken = BTreeMap::from([(0, 1), (interrupts, after - interrupts)]);
        Self { taken, end, cached: None, visits: 0 }
    }
    pub(super) fn allocate(&mut self, pages: u64, alignment: u64, limit: u64) -> Option<u64> {
        let end = limit.saturating_add(1).min(self.end);
        let low_end = end.min(PAGE_4G);
        let below_cached = self.cached.filter(|cached| *cached < low_end);
        let low = (below_cached.and_then(|cached| self.search(0, cached, pages, alignment)))
            .or_else(|| self.search(0, low_end, pages, alignment));
        if let Some(first) = low {
            self.taken.insert(first, pages);
            if low_end == PAGE_4G {
                self.cached = Some(first);
            }
            return Some(first);
        }
        let first = (end > PAGE_4G).then(|| self.search(PAGE_4G, end, pages, alignment)).flatten()?;
        self.taken.insert(first, pages);
        Some(first)
    }
    /// Takes a range out of the tree. It was put there as one.
    pub(super) fn free(&mut self, first: u64, pages: u64) {
        assert!(self.taken.remove(&first) == Some(pages), "a range is freed once, as it was taken");
        self.visits += 1;
        if self.cached.is_some_and(|cached| first >= cached) {
            let next = self.taken.range(first..).next();
            self.visits += u64::from(next.is_some());
            self.cached = next.map(|(&start, _)| start).filter(|start| *start < PAGE_4G);
        }
    }
    pub(super) fn take_exact(&mut self, first: u64, pages: u64) -> bool {
        let end = first + pages;
        let (&start, &length) = self.taken.range(..end).next_back().expect("page 0 is taken");
        self.visits += 1;
        let is_free = start + length <= first && end <= self.end;
        if is_free {
            self.taken.insert(first, pages);
        }
        is_free
    }
    pub(super) fn visits(&self) -> u64 {
        self.visits
    }
    /// The highest aligned room in `[floor, end)`, by a walk down from `end`.
    fn search(&mut self, floor: u64, end: u64, pages: u64, alignment: u64) -> Option<u64> {
        let mut ceiling = end;
        for (&start, &length) in self.taken.range(..end).rev() {
            self.visits += 1;
            let first = ceiling.checked_sub(pages)? & !(alignment - 1);
            if first >= floor.max(start + length) {
                return Some(first);
            }
            ceiling = ceiling.min(start);
            if ceiling <= floor {
                break;
            }
        }
        None
    }
    /// Every range that is free: first page and pages.
    #[cfg(test)]
    pub(super) fn free_ranges(&self) -> impl Iterator<Item = (u64, u64)> {
        let starts = self.taken.keys().copied().skip(1).chain([self.end]);
        let gaps = self.taken.iter().zip(starts).map(|((start, length), next)| (start + length, next));
        gaps.filter(|(first, next)| first < next).map(|(first, next)| (first, next - first))
    }
}
