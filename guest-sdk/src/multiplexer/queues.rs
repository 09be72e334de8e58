//! Whose batch comes next: a short queue per guest, and the guests in turn.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// Batches of one guest that wait, beside the one that is carried out. A guest that wants more waits for an answer first.
pub const WAITING_PER_GUEST_MAX: usize = 4;

/// The batches that wait. A turn is one command of the device, which is bounded in bytes and entries, and what is left of a batch is put back; so a guest that always has more to do takes as many turns as
/// every other that has something to do, and no more (I7).
#[derive(Debug)]
pub(super) struct Queues<T> {
    state: Mutex<State<T>>,
    came: Notify,
}

#[derive(Debug)]
struct State<T> {
    waiting: BTreeMap<u32, VecDeque<T>>,
    /// Guests that have something waiting, each once, the next one first.
    turns: VecDeque<u32>,
}

impl<T> Queues<T> {
    pub(super) fn new() -> Self {
        let state = State { waiting: BTreeMap::new(), turns: VecDeque::new() };
        Self { state: Mutex::new(state), came: Notify::new() }
    }

    /// Puts a batch behind the others of its guest; gives it back where too many wait.
    pub(super) fn push(&self, guest: u32, batch: T) -> Result<(), T> {
        let mut state = self.lock();
        let queue = state.waiting.entry(guest).or_default();
        if queue.len() >= WAITING_PER_GUEST_MAX {
            return Err(batch);
        }
        queue.push_back(batch);
        if queue.len() == 1 {
            state.turns.push_back(guest);
        }
        drop(state);
        self.came.notify_one();
        Ok(())
    }

    /// Puts back what is left of a batch: before the others of its guest, and its guest behind the others.
    pub(super) fn put_back(&self, guest: u32, rest: T) {
        let mut state = self.lock();
        let queue = state.waiting.entry(guest).or_default();
        queue.push_front(rest);
        if queue.len() == 1 {
            state.turns.push_back(guest);
        }
    }

    /// The next batch of the guest whose turn it is; waits for one.
    pub(super) async fn next(&self) -> (u32, T) {
        loop {
            if let Some(next) = self.lock().next() {
                return next;
            }
            self.came.notified().await;
        }
    }

    /// A panic while the lock was held leaves a state that is still whole.
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> State<T> {
    fn next(&mut self) -> Option<(u32, T)> {
        let guest = self.turns.pop_front()?;
        let queue = self.waiting.get_mut(&guest)?;
        let batch = queue.pop_front()?;
        if queue.is_empty() {
            self.waiting.remove(&guest);
        } else {
            self.turns.push_back(guest);
        }
        Some((guest, batch))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn i7_guests_take_turns_however_much_one_of_them_has() {
        let queues = Queues::new();
        for number in 0..WAITING_PER_GUEST_MAX {
            queues.push(1, number).expect("room");
        }
        assert_eq!(queues.push(1, 99), Err(99), "its queue is full");
        for guest in [2, 3] {
            queues.push(guest, 0).expect("another guest's full queue keeps nobody out");
        }
        let mut order = Vec::new();
        for _ in 0..4 {
            order.push(queues.next().await);
        }
        // One that comes back waits behind the others.
        queues.push(2, 1).expect("room");
        for _ in 0..3 {
            order.push(queues.next().await);
        }
        assert_eq!(order, [(1, 0), (2, 0), (3, 0), (1, 1), (1, 2), (2, 1), (1, 3)]);
        assert!(queues.lock().waiting.is_empty() && queues.lock().turns.is_empty(), "nothing is kept");
    }

    #[tokio::test]
    async fn i7_what_is_left_of_a_batch_comes_after_the_other_guests_and_before_the_guests_own() {
        let queues = Queues::new();
        for (guest, batch) in [(1, 10), (1, 11), (2, 20), (3, 30)] {
            queues.push(guest, batch).expect("room");
        }
        let mut order = vec![queues.next().await];
        queues.put_back(1, 19);
        for _ in 0..2 {
            order.push(queues.next().await);
        }
        queues.put_back(3, 39);
        for _ in 0..3 {
            order.push(queues.next().await);
        }
        assert_eq!(order, [(1, 10), (2, 20), (3, 30), (1, 19), (3, 39), (1, 11)]);
        assert!(queues.lock().waiting.is_empty() && queues.lock().turns.is_empty(), "nothing is kept");
    }

    #[tokio::test]
    async fn who_waits_is_woken() {
        let queues = std::sync::Arc::new(Queues::new());
        let waiting = tokio::spawn({
            let queues = std::sync::Arc::clone(&queues);
            async move { queues.next().await }
        });
        tokio::task::yield_now().await;
        queues.push(7, "batch").expect("room");
        assert_eq!(waiting.await.expect("no panic"), (7, "batch"));
    }
}
