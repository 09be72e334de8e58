//! What still has to become quiet before an invalidation may be answered.

use std::fmt;
use std::future::Future;
use std::mem;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;

use super::atomics::{Atomics, Std};
use super::slots::{Epoch, WaiterId};
use super::{Shared, SlotIndex};

/// Not yet quiet: the devices that were in an epoch when the caches had been cleared. A future that resolves
/// to [`Drained`]; dropping it is allowed and forgets the waiter.
///
/// It holds at most one entry for each slot of a unit, and allocates nothing when all was quiet from the
/// start.
#[must_use = "an unmapped page is not quiet until the drain completes"]
pub struct PendingDrain<A: Atomics = Std> {
    /// Never holds a unit without slots.
    units: Vec<UnitWait<A>>,
    /// Set while the last slot of the last unit knows our waker.
    watching: Option<WaiterId>,
}

/// What one unit still owes.
struct UnitWait<A: Atomics> {
    unit: Arc<Shared<A>>,
    slots: Vec<(SlotIndex, Epoch)>,
}

/// Proof that a drain completed (I1). Nothing but a drain makes one.
#[derive(Debug)]
pub struct Drained(());

impl PendingDrain {
    /// Nothing to wait for.
    pub fn none() -> Self {
        Self::quiet()
    }

    /// Parks the thread until all is quiet: for tests and benches.
    pub fn wait_blocking(mut self) -> Drained {
        struct Unpark(Thread);
        impl Wake for Unpark {
            fn wake(self: Arc<Self>) {
                self.0.unpark();
            }
        }
        if self.units.is_empty() {
            return Drained(());
        }
        let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
        let mut context = Context::from_waker(&waker);
        loop {
            match Pin::new(&mut self).poll(&mut context) {
                Poll::Ready(drained) => return drained,
                Poll::Pending => std::thread::park(),
            }
        }
    }
}

impl<A: Atomics> PendingDrain<A> {
    pub(super) fn quiet() -> Self {
        Self { units: Vec::new(), watching: None }
    }

    pub(super) fn waiting_for(unit: Arc<Shared<A>>, slots: Vec<(SlotIndex, Epoch)>) -> Self {
        Self { units: vec![UnitWait { unit, slots }], watching: None }
    }

    /// Looks, without waiting: `Ok` when all is quiet.
    pub fn try_complete(mut self) -> Result<Drained, Self> {
        self.stop_watching();
        for UnitWait { unit, slots } in &mut self.units {
            slots.retain(|&(slot, epoch)| !unit.slots.get(slot).is_quiet(epoch));
        }
        self.units.retain(|wait| !wait.slots.is_empty());
        if self.units.is_empty() { Ok(Drained(())) } else { Err(self) }
    }

    /// Both must be quiet.
    pub fn and(mut self, mut other: Self) -> Self {
        self.stop_watching();
        other.stop_watching();
        for wait in mem::take(&mut other.units) {
            match self.units.iter_mut().find(|known| Arc::ptr_eq(&known.unit, &wait.unit)) {
                Some(known) => known.merge(wait.slots),
                None => self.units.push(wait),
            }
        }
        self
    }

    /// The slot that is waited for now; the others have their turn after it.
    fn last(&self) -> Option<(&Arc<Shared<A>>, SlotIndex, Epoch)> {
        let wait = self.units.last()?;
        wait.slots.last().map(|&(slot, epoch)| (&wait.unit, slot, epoch))
    }

    fn stop_watching(&mut self) {
        if let (Some(id), Some((unit, slot, _))) = (self.watching, self.last()) {
            unit.slots.get(slot).forget(id);
        }
        self.watching = None;
    }

    fn pop(&mut self) {
        self.stop_watching();
        if let Some(wait) = self.units.last_mut() {
            wait.slots.pop();
            if wait.slots.is_empty() {
                self.units.pop();
            }
        }
    }
}

impl<A: Atomics> UnitWait<A> {
    fn merge(&mut self, slots: Vec<(SlotIndex, Epoch)>) {
        for (slot, epoch) in slots {
            match self.slots.iter_mut().find(|(known, _)| *known == slot) {
                Some((_, known)) => *known = epoch.max(*known),
                None => self.slots.push((slot, epoch)),
            }
        }
    }
}

impl<A: Atomics> Future for PendingDrain<A> {
    type Output = Drained;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Drained> {
        while let Some((unit, slot, epoch)) = self.last() {
            let slot = unit.slots.get(slot);
            if !slot.is_quiet(epoch) {
                let id = slot.watch(self.watching, context.waker());
                let quiet = slot.is_quiet(epoch);
                self.watching = Some(id);
                if !quiet {
                    return Poll::Pending;
                }
            }
            self.pop();
        }
        Poll::Ready(Drained(()))
    }
}

impl<A: Atomics> Drop for PendingDrain<A> {
    fn drop(&mut self) {
        self.stop_watching();
    }
}

impl<A: Atomics> fmt::Debug for PendingDrain<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let slots = self.units.iter().flat_map(|wait| &wait.slots);
        f.debug_list().entries(slots).finish()
    }
}
