//! Which I/O virtual addresses of a domain are free.
//!
//! Two allocators stand behind one type, because their difference is one of the things that protection costs:
//!
//! - **classic**: a tree of what is *taken*, searched from the top down with one cached node, as Linux did until
//!   4.6. Simple, and linear in what is live as soon as sizes are mixed (EiovaR, FAST'15). It is here to be
//!   measured.
//! - **cached**: size classes with magazines per client and a depot (ATC'15, and Linux since 4.7) in front of the
//!   *free* ranges, ordered by address and by length. A pop and a push in the steady state, logarithmic behind
//!   that.
//!
//! Both count the nodes that they look at, in the shipping code: [`IovaCounters`]. [`IovaReplay`] is the load that
//! tells them apart.
//!
//! **Promises**, of both: page 0 and FEEx_xxxx are never handed out; a range of up to 512 pages is aligned to its
//! size rounded up to a power of two and so lies under one leaf table; larger ones are aligned to 2 MiB; every page
//! of a range, rounded as said, is within the caller's limit; what is below 4 GiB is used first; an allocation
//! fails only when nothing that is not in use would do, cached or not. What is cached was once in use, or is the
//! rest of a 2 MiB region of which a part was; it is bounded by the limits below, and [`IovaAllocator::trim`] gives
//! back what has not been needed.
//!
//! **Memory of the caches**, per domain: 8 clients × 10 classes × 2 magazines and 10 depots × 32 magazines are 480
//! magazines of 128 ranges of 8 bytes: 480 KiB at most, whatever its clients do, and one region per class. An owner's
//! quota of domains bounds the sum. Magazines grow as they fill; a domain that uses one size from one client holds a
//! few KiB, and the magazines' heads take 5 KiB.

mod cached;
mod classic;
mod ranges;
mod replay;

#[cfg(test)]
mod tests;

use iommu_types::IovaAllocation;

use cached::Cached;
use classic::Classic;
pub use replay::IovaReplay;

/// The largest class, as a power of two: 512 pages, what one leaf table covers. More gains no alignment, and is
/// rare enough for the free ranges to serve in logarithmic time.
const CLASS_MAX: usize = 9;
/// 1, 2, 4 … 512 pages.
const CLASSES: usize = CLASS_MAX + 1;
/// Pages under one leaf table.
const REGION_PAGES: u64 = 1 << CLASS_MAX;
/// Pairs of magazines per class. A client is a queue or a stream; eight keep apart what one device has, at 4.5 KiB
/// a domain.
const CLIENTS: usize = 8;
/// Ranges in a magazine, as in Linux: what a burst of a ring maps at once.
const MAGAZINE_RANGES: usize = 128;
/// Full magazines in the depot of a class, as in Linux: what one client frees and another allocates meets there.
const DEPOT_MAGAZINES_MAX: usize = 32;
/// Ranges that one call of `trim` gives back at most, so that the domain's lock is held for a millisecond and not
/// for thirty.
const TRIM_RANGES_MAX: usize = 2048;
/// The first page at 4 GiB.
const PAGE_4G: u64 = 1 << 20;
/// FEE0_0000 to FEEF_FFFF in pages: first, and the first after.
pub(crate) const INTERRUPT_PAGES: (u64, u64) = (0xf_ee00, 0xf_ef00);

// The module's account of its memory: 480 KiB.
const _: () =
    assert!((CLIENTS * 2 + DEPOT_MAGAZINES_MAX) * CLASSES * MAGAZINE_RANGES * size_of::<u64>() == 480 << 10);
// One bit per client says who was active.
const _: () = assert!(CLIENTS == u8::BITS as usize);

/// Whether a range of that many pages lies under one leaf table, and has a class.
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

/// What an allocator has done and holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IovaCounters {
    /// Ranges in use, allocated or fixed.
    pub live_ranges: u64,
    /// Ranges that are free and kept apart from the free ranges of the tree: in magazines, in depots, and what is
    /// left of regions that were split into a class. Always 0 with the classic allocator.
    pub cached_ranges: u64,
    /// Nodes looked at: taken ranges (classic), or the free ranges behind the magazines (cached), by allocations,
    /// frees, fixed ranges, trimming and emptying alike. A node counts once for each operation that compares with
    /// it or changes it; the descent inside the ordered map that finds it, logarithmic in both allocators, does
    /// not. A magazine hit looks at none.
    pub visits: u64,
    /// Allocations that succeeded, without fixed ranges.
    pub allocations: u64,
    /// Ranges that allocations took from the tree: each one (classic); those that bypassed the magazines, and the
    /// regions that refilled them (cached).
    pub tree_allocations: u64,
}

/// The allocator of one domain, in page numbers.
#[derive(Debug)]
pub struct IovaAllocator {
    kind: Kind,
    live_ranges: u64,
    allocations: u64,
}

#[derive(Debug)]
enum Kind {
    Classic(Classic),
    /// In a box, because its magazines are large and not every domain has them.
    Cached(Box<Cached>),
}

impl IovaAllocator {
    /// Everything below 2^`width_bits` is free but what is reserved. The width is one that a unit has: 39, 48 or 57.
    pub fn new(kind: IovaAllocation, width_bits: u8) -> Self {
        assert!((33..=57).contains(&width_bits), "a domain's width is one of the unit's");
        let end = 1 << (width_bits - 12);
        let kind = match kind {
            IovaAllocation::Classic => Kind::Classic(Classic::new(end)),
            IovaAllocation::Cached => Kind::Cached(Box::new(Cached::new(end))),
        };
        Self { kind, live_ranges: 0, allocations: 0 }
    }
    /// First page of a range of `pages` pages, at least one, that ends at or below the page `limit`. `client`
    /// chooses the magazines. `None` when there is no such range.
    pub fn allocate(&mut self, pages: u64, limit: u64, client: u8) -> Option<u64> {
        assert!(pages > 0, "a mapping has a page");
        let rounded = rounded(pages)?;
        let alignment = rounded.min(REGION_PAGES);
        let first = match &mut self.kind {
            Kind::Classic(classic) => classic.allocate(rounded, alignment, limit),
            Kind::Cached(cached) => match class_of(rounded) {
                Some(class) => cached.allocate(class, limit, client),
                None => cached.take(rounded, alignment, limit),
            },
        }?;
        self.live_ranges += 1;
        self.allocations += 1;
        Some(first)
    }
    /// Gives back a range that `allocate` handed out. The client need not be the one that allocated it.
    pub fn free(&mut self, first: u64, pages: u64, client: u8) {
        let rounded = rounded(pages).expect("a range that was allocated");
        match &mut self.kind {
            Kind::Classic(classic) => classic.free(first, rounded),
            Kind::Cached(cached) => match class_of(rounded) {
                Some(class) => cached.free(class, first, client),
                None => cached.insert(first, rounded),
            },
        }
        self.live_ranges -= 1;
    }
    /// Takes exactly this range, if all of it is free.
    pub fn take_exact(&mut self, first: u64, pages: u64) -> bool {
        let taken = match &mut self.kind {
            Kind::Classic(classic) => classic.take_exact(first, pages),
            Kind::Cached(cached) => cached.take_exact(first, pages),
        };
        self.live_ranges += u64::from(taken);
        taken
    }
    /// Gives back a range that `take_exact` took, whole.
    pub fn free_exact(&mut self, first: u64, pages: u64) {
        match &mut self.kind {
            Kind::Classic(classic) => classic.free(first, pages),
            Kind::Cached(cached) => cached.insert(first, pages),
        }
        self.live_ranges -= 1;
    }
    /// Gives cached ranges that have not been needed since the last call back to the tree, a bounded number at a
    /// time, and returns their pages. For a timer: an allocator that is left alone holds nothing after a few calls.
    pub fn trim(&mut self) -> u64 {
        match &mut self.kind {
            Kind::Classic(_) => 0,
            Kind::Cached(cached) => cached.trim(),
        }
    }
    /// What it has done and holds now.
    pub fn counters(&self) -> IovaCounters {
        let &Self { live_ranges, allocations, .. } = self;
        let (cached_ranges, visits, tree_allocations) = match &self.kind {
            Kind::Classic(classic) => (0, classic.visits(), allocations),
            Kind::Cached(cached) => (cached.cached_ranges(), cached.visits(), cached.tree_allocations()),
        };
        IovaCounters { live_ranges, cached_ranges, visits, allocations, tree_allocations }
    }
}

/// The class of a rounded size, if it has one.
fn class_of(rounded: u64) -> Option<usize> {
    is_small(rounded).then(|| rounded.trailing_zeros() as usize)
}
