//! Size classes with magazines in front of the free ranges.
//!
//! A client has two magazines per class, stacks of free ranges: *loaded*, which it pops and pushes, and *previous*,
//! which takes its place when it is empty or full. Only when both are is a depot asked, so a client that goes to
//! and fro at a border does not (Bonwick and Adams, USENIX ATC 2001). Through the depot, what one client frees is
//! allocated by another. A depot that is full gives back to the free ranges; one that is empty is refilled by
//! splitting a whole 2 MiB region into the class, popped in ascending order, so that neighbours in a magazine share
//! a page table and the ranges of a ring stay where they are.
//!
//! Trimming keeps the caches from ageing. Linux's grew for a day (Garry, linux-iommu, 2020-11-17), and so would
//! these: sizes that are rare wander between clients, until every client has full magazines of every class. The
//! fewest ranges that a client or a depot had at any time since the last trim were not needed, and half of them go,
//! the coldest first; so does one magazine more while a depot holds more than there are active clients, and a
//! region that nobody asked for. Half, so that a pause of one interval does not empty what the next needs.
//!
//! **Promises:** a hit looks at no node of the tree; a range is handed out only under the limit, and one that does
//! not fit in the cache is looked for in the tree; all caches are emptied before an allocation fails.

use std::mem;
use std::ops::Range;

use super::ranges::FreeSpace;
use super::{CLASSES, CLIENTS, DEPOT_MAGAZINES_MAX, MAGAZINE_RANGES, REGION_PAGES, TRIM_RANGES_MAX};

/// First pages of free ranges of one class, at most [`MAGAZINE_RANGES`].
type Magazine = Vec<u64>;

/// The caches, and the free ranges behind them.
#[derive(Debug)]
pub(super) struct Cached {
    clients: [[Pair; CLASSES]; CLIENTS],
    depots: [Depot; CLASSES],
    /// A bit for each client that allocated or freed since the last trim.
    active: u8,
    space: FreeSpace,
}

/// A client's magazines of one class.
#[derive(Debug, Default)]
struct Pair {
    loaded: Magazine,
    previous: Magazine,
    /// The fewest ranges that were here at any time since the last trim.
    fewest: usize,
}

/// What the clients share of one class.
#[derive(Debug, Default)]
struct Depot {
    full: Vec<Magazine>,
    /// The fewest magazines that were here at any time since the last trim.
    fewest: usize,
    /// The pages of the last region that are not in a magazine yet.
    region: Range<u64>,
    /// Whether a client's magazines ran empty since the last trim.
    was_asked: bool,
}

impl Cached {
    pub(super) fn new(end: u64) -> Self {
        let (clients, depots) = Default::default();
        Self { clients, depots, active: 0, space: FreeSpace::new(end) }
    }
    pub(super) fn allocate(&mut self, class: usize, limit: u64, client: u8) -> Option<u64> {
        let pages = 1 << class;
        let first_max = limit.checked_sub(pages - 1)?;
        let pair = pair(&mut self.clients, &mut self.active, class, client);
        if let Some(first) = pair.pop(first_max) {
            return Some(first);
        }
        if pair.loaded.is_empty() && pair.previous.is_empty() {
            self.depots[class].load(&mut pair.loaded, class, limit, &mut self.space);
            if let Some(first) = pair.pop(first_max) {
                return Some(first);
            }
        }
        self.take(pages, pages, limit)
    }
    pub(super) fn free(&mut self, class: usize, first: u64, client: u8) {
        let pair = pair(&mut self.clients, &mut self.active, class, client);
        if pair.loaded.len() == MAGAZINE_RANGES {
            mem::swap(&mut pair.loaded, &mut pair.previous);
        }
        if pair.loaded.len() == MAGAZINE_RANGES {
            // Both are full, and the one that was not in use is the colder one.
            let full = mem::take(&mut pair.loaded);
            pair.note_fewest();
            let depot = &mut self.depots[class];
            if depot.full.len() < DEPOT_MAGAZINES_MAX {
                depot.full.push(full);
            } else {
                give_back(&mut self.space, class, full);
            }
        }
        pair.loaded.push(first);
    }
    /// A range from the tree; everything cached is in the tree before there is none.
    pub(super) fn take(&mut self, pages: u64, alignment: u64, limit: u64) -> Option<u64> {
        self.space.take(pages, alignment, limit).or_else(|| {
            self.empty();
            self.space.take(pages, alignment, limit)
        })
    }
    pub(super) fn take_exact(&mut self, first: u64, pages: u64) -> bool {
        if !self.space.covers(first, pages) {
            self.empty();
            if !self.space.covers(first, pages) {
                return false;
            }
        }
        self.space.remove(first, pages);
        true
    }
    /// Gives a range to the tree.
    pub(super) fn insert(&mut self, first: u64, pages: u64) {
        self.space.insert(first, pages);
    }
    pub(super) fn trim(&mut self) -> u64 {
        let clients = mem::take(&mut self.active).count_ones() as usize;
        let (space, mut budget, mut pages) = (&mut self.space, TRIM_RANGES_MAX, 0);
        for (class, depot) in self.depots.iter_mut().enumerate() {
            for pair in self.clients.iter_mut().map(|pairs| &mut pairs[class]) {
                pages += give_back(space, class, pair.trim(&mut budget));
            }
            for magazine in depot.trim(clients, &mut budget) {
                pages += give_back(space, class, magazine);
            }
            if !mem::take(&mut depot.was_asked) {
                pages += depot.give_back_region(space);
            }
        }
        pages
    }
    pub(super) fn cached_ranges(&self) -> u64 {
        let in_pairs = self.clients.iter().flatten().map(Pair::ranges);
        let in_depots = self.depots.iter().flat_map(|depot| &depot.full).map(Magazine::len);
        let in_regions = self.depots.iter().enumerate().map(|(class, depot)| depot.region_ranges(class));
        in_pairs.chain(in_depots).map(|ranges| ranges as u64).chain(in_regions).sum()
    }
    pub(super) fn visits(&self) -> u64 {
        self.space.visits()
    }
    pub(super) fn tree_allocations(&self) -> u64 {
        self.space.allocations()
    }
    #[cfg(test)]
    pub(super) fn space(&self) -> &FreeSpace {
        &self.space
    }
    /// Gives everything cached to the tree.
    pub(super) fn empty(&mut self) {
        for (class, depot) in self.depots.iter_mut().enumerate() {
            let in_pairs = self.clients.iter_mut().map(|pairs| mem::take(&mut pairs[class]));
            let in_pairs = in_pairs.flat_map(|Pair { loaded, previous, .. }| [loaded, previous]);
            for magazine in in_pairs.chain(depot.full.drain(..)) {
                give_back(&mut self.space, class, magazine);
            }
            depot.fewest = 0;
            depot.give_back_region(&mut self.space);
        }
    }
}

/// The magazines of a client, which is active now.
fn pair<'a>(
    clients: &'a mut [[Pair; CLASSES]; CLIENTS],
    active: &mut u8,
    class: usize,
    client: u8,
) -> &'a mut Pair {
    let client = usize::from(client) % CLIENTS;
    *active |= 1 << client;
    &mut clients[client][class]
}

/// Gives ranges of a class to the tree and returns their pages.
fn give_back(space: &mut FreeSpace, class: usize, firsts: impl IntoIterator<Item = u64>) -> u64 {
    let give_back = |first| {
        space.insert(first, 1 << class);
        1 << class
    };
    firsts.into_iter().map(give_back).sum()
}

impl Pair {
    /// A range that begins at or below `first_max`: the last one freed, unless the limit excludes it.
    fn pop(&mut self, first_max: u64) -> Option<u64> {
        if self.loaded.is_empty() {
            mem::swap(&mut self.loaded, &mut self.previous);
        }
        let first = [&mut self.loaded, &mut self.previous].into_iter().find_map(|magazine| {
            let at = magazine.iter().rposition(|first| *first <= first_max)?;
            Some(magazine.swap_remove(at))
        })?;
        self.note_fewest();
        Some(first)
    }
    fn note_fewest(&mut self) {
        self.fewest = self.fewest.min(self.ranges());
    }
    fn ranges(&self) -> usize {
        self.loaded.len() + self.previous.len()
    }
    /// Half of what was not needed, the coldest ones.
    fn trim(&mut self, budget: &mut usize) -> impl Iterator<Item = u64> {
        let surplus = self.fewest.div_ceil(2).min(*budget);
        *budget -= surplus;
        self.fewest = self.ranges() - surplus;
        let from_previous = surplus.min(self.previous.len());
        self.previous.drain(..from_previous).chain(self.loaded.drain(..surplus - from_previous))
    }
}

impl Depot {
    /// Half of what was not needed, and one more than there are clients, the coldest ones.
    fn trim(&mut self, clients: usize, budget: &mut usize) -> impl Iterator<Item = Magazine> {
        let excess = usize::from(self.full.len() > clients);
        let surplus = self.fewest.div_ceil(2).max(excess).min(*budget / MAGAZINE_RANGES);
        *budget -= surplus * MAGAZINE_RANGES;
        self.fewest = self.full.len() - surplus;
        self.full.drain(..surplus)
    }
    /// Fills an empty magazine: with a full one, or with ranges of a region that lies below the limit.
    fn load(&mut self, magazine: &mut Magazine, class: usize, limit: u64, space: &mut FreeSpace) {
        self.was_asked = true;
        if let Some(full) = self.full.pop() {
            self.fewest = self.fewest.min(self.full.len());
            *magazine = full;
            return;
        }
        if self.region.is_empty() {
            let Some(first) = space.take(REGION_PAGES, REGION_PAGES, limit) else { return };
            self.region = first..first + REGION_PAGES;
        }
        let Range { start, end } = self.region;
        let ranges = self.region_ranges(class).min(MAGAZINE_RANGES as u64);
        self.region = start + (ranges << class)..end;
        // Popped in ascending order.
        magazine.extend((0..ranges).rev().map(|n| start + (n << class)));
    }
    fn region_ranges(&self, class: usize) -> u64 {
        (self.region.end - self.region.start) >> class
    }
    fn give_back_region(&mut self, space: &mut FreeSpace) -> u64 {
        let Range { start, end } = mem::take(&mut self.region);
        if start < end {
            space.insert(start, end - start);
        }
        end - start
    }
}
