//! What a register file still has to finish: effects that wait for drains, in order.
//!
//! A drain is awaited by whoever runs the queue, outside every lock. The file keeps the effect; the drain is either parked
//! here or lent out as a [`HeldDrain`], which parks itself again when it is dropped unfinished. So an effect never happens before
//! its drain, whoever gives up waiting.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use super::Effect;
use crate::drain::PendingDrain;

/// What running a register file came to.
pub enum QueueProgress {
    /// There is nothing to do for this caller until the next register write.
    Idle,
    /// The bound of one step is reached: call again, after letting others run.
    More,
    /// DMA in flight has to land: await the drain, then call again.
    Draining(HeldDrain),
}

/// A drain that a register file waits for, lent to whoever runs its queue. Resolves when drained; may be dropped before.
#[must_use = "the register file goes on when the drain has completed and the queue is run again"]
pub struct HeldDrain {
    cell: Arc<Mutex<Cell>>,
    pending: Option<PendingDrain>,
}

enum Cell {
    Parked(PendingDrain),
    Lent,
    Drained,
}

fn lock(cell: &Mutex<Cell>) -> MutexGuard<'_, Cell> {
    cell.lock().unwrap_or_else(PoisonError::into_inner)
}

impl HeldDrain {
    /// Blocks the thread until drained: for tests and examples.
    pub fn wait_blocking(mut self) {
        if let Some(pending) = self.pending.take() {
            let _drained = pending.wait_blocking();
            *lock(&self.cell) = Cell::Drained;
        }
    }
}

impl Future for HeldDrain {
    type Output = ();
    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let Some(pending) = self.pending.as_mut() else { return Poll::Ready(()) };
        match Pin::new(pending).poll(context) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(_drained) => {
                self.pending = None;
                *lock(&self.cell) = Cell::Drained;
                Poll::Ready(())
            }
        }
    }
}

impl Drop for HeldDrain {
    fn drop(&mut self) {
        if let Some(pending) = self.pending.take() {
            *lock(&self.cell) = Cell::Parked(pending);
        }
    }
}

/// The effects that wait, oldest first.
pub(super) struct Waiting {
    effects: VecDeque<(Arc<Mutex<Cell>>, Effect)>,
}

/// What stands first.
pub(super) enum Front {
    /// Nothing.
    Empty,
    /// An effect whose drain is done.
    Due(Effect),
    /// A drain that is not done, to be awaited.
    Undrained(HeldDrain),
    /// A drain that somebody else awaits.
    Lent,
}

impl Waiting {
    pub(super) fn new() -> Self {
        Self { effects: VecDeque::new() }
    }
    pub(super) fn push(&mut self, pending: PendingDrain, effect: Effect) {
        self.effects.push_back((Arc::new(Mutex::new(Cell::Parked(pending))), effect));
    }
    /// Whether an effect of the same kind waits already. Such commands are ignored, which also bounds the list: software
    /// must wait for the status of a command before it gives the next.
    pub(super) fn holds_kind_of(&self, effect: &Effect) -> bool {
        let kind = std::mem::discriminant(effect);
        self.effects.iter().any(|(_, waiting)| std::mem::discriminant(waiting) == kind)
    }
    pub(super) fn is_empty(&self) -> bool {
        self.effects.is_empty()
    }
    pub(super) fn front(&mut self) -> Front {
        let Some((cell, _)) = self.effects.front() else { return Front::Empty };
        let cell = Arc::clone(cell);
        let mut state = lock(&cell);
        match std::mem::replace(&mut *state, Cell::Lent) {
            Cell::Lent => return Front::Lent,
            Cell::Drained => {}
            Cell::Parked(pending) => {
                if let Err(pending) = pending.try_complete() {
                    drop(state);
                    return Front::Undrained(HeldDrain { cell, pending: Some(pending) });
                }
            }
        }
        drop(state);
        match self.effects.pop_front() {
            Some((_, effect)) => Front::Due(effect),
            None => Front::Empty,
        }
    }
}
