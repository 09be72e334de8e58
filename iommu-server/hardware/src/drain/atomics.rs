//! What shared state is made of: words, fences and locks behind one trait.
//!
//! The drains and the caches are written over [`Atomics`], so that a model checker can run the very code that
//! ships: [`Std`] here, loom's twins in the tests. Orders are named at each use. A sequentially consistent
//! order is only ever given to a fence, because that is what the model checker follows exactly.

use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Mutex, PoisonError};

/// The atomics, locks and fences that this floor shares state through: std in production, loom in tests.
pub trait Atomics: Sized + Send + Sync + 'static {
    /// A 64-bit atomic word.
    type Word: AtomicWord;
    /// A lock around a value. Never held across anything that waits.
    type Lock<T: Send>: ExclusiveLock<T>;
    /// A memory fence.
    fn fence(order: Ordering);
    /// Called by a loop that waits for another thread's next few instructions, with the turns made so far.
    fn relax(turns: u32);
}

/// A 64-bit atomic word; every method is that of `AtomicU64`.
pub trait AtomicWord: Send + Sync {
    /// A word with this value.
    fn new(value: u64) -> Self;
    /// Reads the word.
    fn load(&self, order: Ordering) -> u64;
    /// Writes the word.
    fn store(&self, value: u64, order: Ordering);
    /// Adds and returns what was there.
    fn fetch_add(&self, value: u64, order: Ordering) -> u64;
    /// Subtracts and returns what was there.
    fn fetch_sub(&self, value: u64, order: Ordering) -> u64;
    /// Sets bits and returns what was there.
    fn fetch_or(&self, value: u64, order: Ordering) -> u64;
    /// Replaces `current` by `new`; whether it did.
    fn replace(&self, current: u64, new: u64, order: Ordering) -> bool;
}

/// A lock that is entered by a closure, so that no guard outlives its use.
pub trait ExclusiveLock<T>: Send + Sync {
    /// A lock around `value`.
    fn new(value: T) -> Self;
    /// Runs `op` on the value, alone.
    fn with<R>(&self, op: impl FnOnce(&mut T) -> R) -> R;
}

/// The atomics of the standard library.
#[derive(Clone, Copy, Debug)]
pub struct Std;

/// Turns of a waiting loop before it gives the processor away: the holder may have been descheduled.
const SPIN_TURNS_MAX: u32 = 64;

impl Atomics for Std {
    type Word = AtomicU64;
    type Lock<T: Send> = Mutex<T>;
    #[inline]
    fn fence(order: Ordering) {
        fence(order);
    }
    #[inline]
    fn relax(turns: u32) {
        if turns < SPIN_TURNS_MAX {
            std::hint::spin_loop();
        } else {
            std::thread::yield_now();
        }
    }
}

impl AtomicWord for AtomicU64 {
    fn new(value: u64) -> Self {
        Self::new(value)
    }
    #[inline]
    fn load(&self, order: Ordering) -> u64 {
        self.load(order)
    }
    #[inline]
    fn store(&self, value: u64, order: Ordering) {
        self.store(value, order);
    }
    #[inline]
    fn fetch_add(&self, value: u64, order: Ordering) -> u64 {
        self.fetch_add(value, order)
    }
    #[inline]
    fn fetch_sub(&self, value: u64, order: Ordering) -> u64 {
        self.fetch_sub(value, order)
    }
    #[inline]
    fn fetch_or(&self, value: u64, order: Ordering) -> u64 {
        self.fetch_or(value, order)
    }
    #[inline]
    fn replace(&self, current: u64, new: u64, order: Ordering) -> bool {
        self.compare_exchange(current, new, order, Ordering::Relaxed).is_ok()
    }
}

impl<T: Send> ExclusiveLock<T> for Mutex<T> {
    fn new(value: T) -> Self {
        Self::new(value)
    }
    fn with<R>(&self, op: impl FnOnce(&mut T) -> R) -> R {
        // Every critical section of this floor leaves the value whole at each step, so a panic elsewhere
        // spoils nothing.
        op(&mut self.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
