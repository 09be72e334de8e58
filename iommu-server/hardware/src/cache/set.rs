//! Sets of a cache: a few ways behind a sequence lock.
//!
//! An entry is two words, a tag and its data; tag 0 is an empty way. A reader takes no lock and writes
//! nothing ([`Sequence`]).
//!
//! **Architecture invariant (I4):** a fill asks whether its generation is current *behind the writer lock and
//! a fence*, and an invalidation has moved the generation, behind a fence, before it looks at a set. Hence an
//! invalidation may look before it locks: if the sequence it reads is even, every fill that it could miss had
//! not locked the set yet, and will see the new generation. A way that changes after that look was
//! overwritten by such a later writer, which is as good as cleared. So an invalidation of a page that is not
//! cached takes no lock and writes nothing.

use std::ops::Range;
use std::sync::atomic::Ordering;

use super::{CacheGeometry, Filled, Sequence};
use crate::drain::{AtomicWord, Atomics};

/// Ways that a set has room for.
pub(super) const WAYS_MAX: usize = 4;

/// How often a reader that a writer disturbed tries again. After that it misses, which is always allowed and
/// costs a walk.
const READ_ATTEMPTS: u32 = 2;

struct Set<A: Atomics> {
    sequence: Sequence<A>,
    tags: [A::Word; WAYS_MAX],
    data: [A::Word; WAYS_MAX],
}

/// All sets of one cache.
pub(super) struct Sets<A: Atomics> {
    sets: Box<[Set<A>]>,
    ways: usize,
}

impl<A: Atomics> Sets<A> {
    pub(super) fn new(geometry: CacheGeometry) -> Self {
        assert!(geometry.is_possible(), "the sets are a power of two, of 1 to {WAYS_MAX} ways: {geometry:?}");
        Self { sets: (0..geometry.sets).map(|_| Set::new()).collect(), ways: usize::from(geometry.ways) }
    }

    pub(super) fn len(&self) -> usize {
        self.sets.len()
    }

    pub(super) fn capacity(&self) -> usize {
        self.sets.len() * self.ways
    }

    /// The data of a tag, or `None` when the set does not hold it or is being written.
    #[inline]
    pub(super) fn find(&self, index: usize, tag: u64) -> Option<u64> {
        let set = self.set(index);
        for turn in 0..READ_ATTEMPTS {
            if let Some(before) = set.sequence.begin() {
                // Every way is compared, without a branch: which of them holds the tag is not predictable.
                let holds = |way: usize| usize::from(set.tags[way].load(Ordering::Relaxed) == tag);
                let (first, second, third, fourth) = (holds(0), holds(1), holds(2), holds(3));
                if first + second + third + fourth == 0 {
                    return None;
                }
                let data = set.data[(second + 2 * third + 3 * fourth) % WAYS_MAX].load(Ordering::Relaxed);
                if set.sequence.is_unchanged(before) {
                    return Some(data);
                }
            }
            A::relax(turn);
        }
        None
    }

    /// Puts an entry in, unless `is_current` says under the writer lock that it has been overtaken (I4). An
    /// entry of the same tag is replaced; else an empty way is taken; else the victims go round.
    pub(super) fn insert(
        &self,
        index: usize,
        tag: u64,
        data: u64,
        is_current: impl FnOnce() -> bool,
    ) -> Filled {
        let set = self.set(index);
        let sequence = set.sequence.lock();
        if !is_current() {
            set.sequence.unlock(sequence);
            return Filled::Outdated;
        }
        let holds = |wanted: u64| {
            set.tags[..self.ways].iter().position(|known| known.load(Ordering::Relaxed) == wanted)
        };
        let (way, evicted) = match holds(tag).or_else(|| holds(0)) {
            Some(way) => (way, false),
            // The sequence moves with every write, so it serves as the counter.
            None => ((sequence >> 1) as usize % self.ways, true),
        };
        set.tags[way].store(tag, Ordering::Relaxed);
        set.data[way].store(data, Ordering::Relaxed);
        set.sequence.unlock(sequence);
        Filled::Inserted { evicted }
    }

    /// Empties the ways of a set whose tag and data match. The generation has been moved before, behind a
    /// fence.
    pub(super) fn clear(&self, index: usize, matches: impl Fn(u64, u64) -> bool) {
        let set = self.set(index);
        let is_meant = |way: usize| {
            let tag = set.tags[way].load(Ordering::Relaxed);
            tag != 0 && matches(tag, set.data[way].load(Ordering::Relaxed))
        };
        if set.sequence.begin().is_some() && !(0..WAYS_MAX).any(is_meant) {
            return;
        }
        let sequence = set.sequence.lock();
        for way in (0..WAYS_MAX).filter(|&way| is_meant(way)) {
            set.tags[way].store(0, Ordering::Relaxed);
        }
        set.sequence.unlock(sequence);
    }

    /// As [`Self::clear`], in several sets.
    pub(super) fn clear_among(&self, indexes: Range<usize>, matches: impl Fn(u64, u64) -> bool) {
        for index in indexes {
            self.clear(index, &matches);
        }
    }

    /// As [`Self::clear`], in every set.
    pub(super) fn clear_everywhere(&self, matches: impl Fn(u64, u64) -> bool) {
        self.clear_among(0..self.sets.len(), matches);
    }

    /// Every entry as (tag, data), each set as it was at one moment.
    pub(super) fn entries(&self) -> Vec<(u64, u64)> {
        self.sets.iter().flat_map(Set::snapshot).filter(|&(tag, _)| tag != 0).collect()
    }

    #[inline]
    fn set(&self, index: usize) -> &Set<A> {
        // The number of sets is a power of two; the mask is what keeps an index inside.
        &self.sets[index & (self.sets.len() - 1)]
    }
}

impl<A: Atomics> Set<A> {
    fn new() -> Self {
        let words = || std::array::from_fn(|_| A::Word::new(0));
        Self { sequence: Sequence::new(), tags: words(), data: words() }
    }

    fn snapshot(&self) -> [(u64, u64); WAYS_MAX] {
        let mut turns = 0;
        loop {
            if let Some(before) = self.sequence.begin() {
                let ways = std::array::from_fn(|way| {
                    (self.tags[way].load(Ordering::Relaxed), self.data[way].load(Ordering::Relaxed))
                });
                if self.sequence.is_unchanged(before) {
                    return ways;
                }
            }
            A::relax(turns);
            turns = turns.saturating_add(1);
        }
    }
}
