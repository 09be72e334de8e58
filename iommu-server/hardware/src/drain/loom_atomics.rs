//! Loom's twins of the atomics, and how its models are run: bounded, so that plain `cargo test` stays short.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Wake, Waker};

use loom::sync::atomic::{AtomicU64, fence};
use loom::sync::{Mutex, Notify};

use super::{AtomicWord, Atomics, DrainSizes, Drained, Drains, ExclusiveLock, PendingDrain};

/// The atomics of the model checker.
pub(crate) struct Loom;

impl Atomics for Loom {
    type Word = AtomicU64;
    type Lock<T: Send> = Mutex<T>;
    fn fence(order: Ordering) {
        fence(order);
    }
    fn relax(_turns: u32) {
        loom::thread::yield_now();
    }
}

impl AtomicWord for AtomicU64 {
    fn new(value: u64) -> Self {
        Self::new(value)
    }
    fn load(&self, order: Ordering) -> u64 {
        self.load(order)
    }
    fn store(&self, value: u64, order: Ordering) {
        self.store(value, order);
    }
    fn fetch_add(&self, value: u64, order: Ordering) -> u64 {
        self.fetch_add(value, order)
    }
    fn fetch_sub(&self, value: u64, order: Ordering) -> u64 {
        self.fetch_sub(value, order)
    }
    fn fetch_or(&self, value: u64, order: Ordering) -> u64 {
        self.fetch_or(value, order)
    }
    fn replace(&self, current: u64, new: u64, order: Ordering) -> bool {
        self.compare_exchange(current, new, order, Ordering::Relaxed).is_ok()
    }
}

impl<T: Send> ExclusiveLock<T> for Mutex<T> {
    fn new(value: T) -> Self {
        Self::new(value)
    }
    fn with<R>(&self, op: impl FnOnce(&mut T) -> R) -> R {
        op(&mut self.lock().expect("loom does not poison"))
    }
}

/// Explores `model` with at most `preemptions` forced switches of threads.
pub(crate) fn explore(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(model);
}

/// The smallest unit with that many slots, all claimed.
pub(crate) fn drains(slots: u16) -> Drains<Loom> {
    let drains = Drains::with_sizes(DrainSizes { slots, generation_words: 1, list_stripes: 1 });
    while drains.claim_slot().is_some() {}
    drains
}

/// Polls, and waits for the waker when told so. Loom reports a waker that is never called as a deadlock.
pub(crate) fn wait(mut pending: PendingDrain<Loom>) -> Drained {
    struct Woken(Notify);
    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.notify();
        }
    }
    let woken = Arc::new(Woken(Notify::new()));
    let waker = Waker::from(Arc::clone(&woken));
    let mut context = Context::from_waker(&waker);
    loop {
        match std::pin::Pin::new(&mut pending).poll(&mut context) {
            std::task::Poll::Ready(drained) => return drained,
            std::task::Poll::Pending => woken.0.wait(),
        }
    }
}
