//! The ring IOTLB: one entry for each ring of a source, which holds the slot in use and the slot after it.
//!
//! ```text
//!  tag    63  62          35       18 17        0
//!        [cur|next|  0   | next slot | cur. slot ]     current, next: an rPTE in two words each
//! ```
//!
//! It is real: what is not invalidated is served, stale or not. Of one ring that is at most two slots. A source has its own
//! entries, so that no device displaces what another one cached; the entry of a ring stands in a cache line of its own. A reader
//! takes no lock and writes nothing.
//!
//! **Architecture invariant (I4):** a fill and a promotion ask, behind the writer lock and its fence, whether the generation of the
//! ring is still the one that they read before their walk. An invalidation moves the generation, passes a fence, and then clears
//! under the same lock: either the writer sees the move, or the clearing comes after it. Nothing else of the tables is cached, so
//! a walk that begins between the move and the clearing reads what is in the tables, and may fill.

use std::sync::atomic::Ordering;

use crossbeam_utils::CachePadded;
use iommu_types::Generation;

use super::spec::{RingIova, RingPte, SLOTS_MAX};
use crate::cache::{Filled, Sequence};
use crate::drain::{AtomicWord, Atomics, Std};

const CURRENT: u64 = 1 << 63;
const NEXT: u64 = 1 << 62;
const SLOT_MASK: u64 = SLOTS_MAX as u64 - 1;
const NEXT_SLOT_SHIFT: u32 = SLOTS_MAX.trailing_zeros();

/// How often a reader that a writer disturbed tries again before it walks.
const READ_ATTEMPTS: u32 = 2;

/// A slot as it was read from its ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CachedSlot {
    /// Number of the slot.
    pub slot: u32,
    /// What it opened then.
    pub pte: RingPte,
}

/// The entry of a ring, for observers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingEntryState {
    /// The ring.
    pub ring: u16,
    /// The slot that was used last.
    pub current: CachedSlot,
    /// The slot after it, when it was valid as the entry was filled.
    pub next: Option<CachedSlot>,
}

/// What the cache has for an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cached {
    /// The slot in use.
    Current(RingPte),
    /// The slot that was prefetched.
    Next(RingPte),
    /// Neither.
    Absent,
}

/// The entries of one source.
pub(crate) struct RingCache<A: Atomics = Std> {
    entries: Box<[CachePadded<Entry<A>>]>,
}

struct Entry<A: Atomics> {
    sequence: Sequence<A>,
    /// Moved by every invalidation of the ring.
    generation: A::Word,
    tag: A::Word,
    current: [A::Word; 2],
    next: [A::Word; 2],
}

impl<A: Atomics> RingCache<A> {
    /// Empty entries for `rings` rings. Rings beyond them work, and are not cached.
    pub(crate) fn new(rings: u16) -> Self {
        Self { entries: (0..rings).map(|_| CachePadded::new(Entry::new())).collect() }
    }

    /// What there is for an address. Takes no lock and writes nothing.
    #[inline]
    pub(crate) fn lookup(&self, at: RingIova) -> Cached {
        self.entry(at.ring).map_or(Cached::Absent, |entry| entry.lookup(at.slot.into()))
    }

    /// Taken before a walk reads anything; `None` for a ring without an entry.
    pub(crate) fn generation(&self, ring: u16) -> Option<Generation> {
        self.entry(ring).map(|entry| Generation(entry.generation.load(Ordering::Acquire)))
    }

    /// Replaces the entry of a ring by what a walk found, unless an invalidation overtook it (I4).
    pub(crate) fn fill(
        &self,
        ring: u16,
        walked_under: Generation,
        current: CachedSlot,
        next: Option<CachedSlot>,
    ) -> Filled {
        let Some(entry) = self.entry(ring) else { return Filled::Outdated };
        let sequence = entry.sequence.lock();
        let is_current = entry.is_current(walked_under);
        let evicted = is_current && entry.tag.load(Ordering::Relaxed) & CURRENT != 0;
        if is_current {
            entry.write(current, next);
        }
        entry.sequence.unlock(sequence);
        if is_current { Filled::Inserted { evicted } } else { Filled::Outdated }
    }

    /// Makes the prefetched slot the one in use, and `next` the prefetched one. `None` when the entry no longer holds that slot as
    /// its next, or an invalidation overtook the prefetch (I4).
    pub(crate) fn promote(
        &self,
        at: RingIova,
        walked_under: Generation,
        next: Option<CachedSlot>,
    ) -> Option<RingPte> {
        let entry = self.entry(at.ring)?;
        let sequence = entry.sequence.lock();
        let tag = entry.tag.load(Ordering::Relaxed);
        let promoted = (entry.is_current(walked_under) && is_next(tag, at.slot.into()))
            .then(|| read(&entry.next))
            .inspect(|&pte| entry.write(CachedSlot { slot: at.slot, pte }, next));
        entry.sequence.unlock(sequence);
        promoted
    }

    /// Forgets a ring.
    pub(crate) fn invalidate(&self, ring: u16) {
        if let Some(entry) = self.entry(ring) {
            entry.invalidate();
        }
    }

    /// Forgets every ring.
    pub(crate) fn invalidate_all(&self) {
        self.entries.iter().for_each(|entry| entry.invalidate());
    }

    /// What is cached now, by ring, each entry as it was at one moment.
    pub(crate) fn states(&self) -> Vec<RingEntryState> {
        let states = (0u16..).zip(&self.entries).filter_map(|(ring, entry)| entry.state(ring));
        states.collect()
    }

    #[inline]
    fn entry(&self, ring: u16) -> Option<&Entry<A>> {
        self.entries.get(usize::from(ring)).map(|entry| &**entry)
    }
}

impl<A: Atomics> Entry<A> {
    fn new() -> Self {
        let word = || A::Word::new(0);
        Self {
            sequence: Sequence::new(),
            generation: word(),
            tag: word(),
            current: [word(), word()],
            next: [word(), word()],
        }
    }

    #[inline]
    fn lookup(&self, slot: u64) -> Cached {
        for turn in 0..READ_ATTEMPTS {
            if let Some(before) = self.sequence.begin() {
                let tag = self.tag.load(Ordering::Relaxed);
                let found = if is_current(tag, slot) {
                    Cached::Current(read(&self.current))
                } else if is_next(tag, slot) {
                    Cached::Next(read(&self.next))
                } else {
                    return Cached::Absent;
                };
                if self.sequence.is_unchanged(before) {
                    return found;
                }
            }
            A::relax(turn);
        }
        Cached::Absent
    }

    /// Asked behind the writer lock.
    fn is_current(&self, walked_under: Generation) -> bool {
        Generation(self.generation.load(Ordering::Relaxed)) == walked_under
    }

    /// Behind the writer lock. What is not `next` any more is gone: it never answers for another slot.
    fn write(&self, current: CachedSlot, next: Option<CachedSlot>) {
        let mut tag = CURRENT | u64::from(current.slot);
        write(&self.current, current.pte);
        if let Some(next) = next {
            tag |= NEXT | u64::from(next.slot) << NEXT_SLOT_SHIFT;
            write(&self.next, next.pte);
        }
        self.tag.store(tag, Ordering::Relaxed);
    }

    fn invalidate(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        A::fence(Ordering::SeqCst);
        let sequence = self.sequence.lock();
        self.tag.store(0, Ordering::Relaxed);
        self.sequence.unlock(sequence);
    }

    fn state(&self, ring: u16) -> Option<RingEntryState> {
        let mut turns = 0;
        loop {
            if let Some(before) = self.sequence.begin() {
                let tag = self.tag.load(Ordering::Relaxed);
                let current = CachedSlot { slot: (tag & SLOT_MASK) as u32, pte: read(&self.current) };
                let slot = (tag >> NEXT_SLOT_SHIFT & SLOT_MASK) as u32;
                let next = (tag & NEXT != 0).then(|| CachedSlot { slot, pte: read(&self.next) });
                if self.sequence.is_unchanged(before) {
                    return (tag & CURRENT != 0).then_some(RingEntryState { ring, current, next });
                }
            }
            A::relax(turns);
            turns = turns.saturating_add(1);
        }
    }
}

fn is_current(tag: u64, slot: u64) -> bool {
    tag & (CURRENT | SLOT_MASK) == CURRENT | slot
}

fn is_next(tag: u64, slot: u64) -> bool {
    tag & (NEXT | SLOT_MASK << NEXT_SLOT_SHIFT) == NEXT | slot << NEXT_SLOT_SHIFT
}

#[inline]
fn read<W: AtomicWord>([low, high]: &[W; 2]) -> RingPte {
    let (low, high) = (low.load(Ordering::Relaxed), high.load(Ordering::Relaxed));
    RingPte::from_bits(u128::from(high) << 64 | u128::from(low))
}

fn write<W: AtomicWord>([low, high]: &[W; 2], pte: RingPte) {
    let raw = pte.into_bits();
    low.store(raw as u64, Ordering::Relaxed);
    high.store((raw >> 64) as u64, Ordering::Relaxed);
}
