//! The sequence lock of a cache entry: readers that write nothing, writers that shut each other out.
//!
//! A reader believes what it read between [`Sequence::begin`] and [`Sequence::is_unchanged`] only if no writer was there. A
//! writer makes the sequence odd by compare-and-swap, which is the writer lock, and even again when it is done.

use std::sync::atomic::Ordering;

use crate::drain::{AtomicWord, Atomics};

/// The word of one sequence lock. Even while nobody writes.
pub(crate) struct Sequence<A: Atomics>(A::Word);

impl<A: Atomics> Sequence<A> {
    pub(crate) fn new() -> Self {
        Self(A::Word::new(0))
    }

    /// Begins to read, unless a writer is there.
    #[inline]
    pub(crate) fn begin(&self) -> Option<u64> {
        let sequence = self.0.load(Ordering::Acquire);
        (sequence & 1 == 0).then_some(sequence)
    }

    /// Whether everything read since [`begin`](Self::begin) gave `before` belongs together.
    #[inline]
    pub(crate) fn is_unchanged(&self, before: u64) -> bool {
        A::fence(Ordering::Acquire);
        self.0.load(Ordering::Relaxed) == before
    }

    /// Makes the sequence odd and returns it. The fence orders the lock before what the writer asks about (a generation), and
    /// before what it writes: who sees any of that sees the odd sequence too.
    pub(crate) fn lock(&self) -> u64 {
        let mut turns = 0;
        loop {
            let even = self.0.load(Ordering::Relaxed);
            if even & 1 == 0 && self.0.replace(even, even + 1, Ordering::Acquire) {
                A::fence(Ordering::SeqCst);
                return even + 1;
            }
            A::relax(turns);
            turns = turns.saturating_add(1);
        }
    }

    pub(crate) fn unlock(&self, odd: u64) {
        self.0.store(odd + 1, Ordering::Release);
    }
}
