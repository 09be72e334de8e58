//! Generations, epochs and drains: when an invalidation is really done.
// CONTRACT (helper B owns drain/ and cache/)
//
// DESIGN.md §4 "Invalidate": (1) move the domain's generation; (2) clear matching entries of every cache under each set's writer lock
// (a fill checks its generation under that same lock); (3) *then* take a new epoch; (4) drained when every slot of a device attached to that
// domain is idle or at least at (3). Generation and epoch are two numbers. Whoever leaves wakes the waiter through a flag in its own cache line.
//
// How a slot is known to be "attached to the domain" without the invalidator scanning all slots: per domain a list of slots, under a small lock. A port that gets a
// context with domain d in its epoch (slow path: the slot's registered domain differs) registers its slot in d's list, fences, and RE-READS the context
// (cache and table) before it uses translations of d. So an invalidator of d (clears; fence; new epoch; reads the list) either sees the slot, or the
// port's lookups come after the clears. Leaving a domain's list is lazy (when the slot registers elsewhere or is released). The hot path compares one private field.
//
// Everything here is generic over `Atomics`, so that loom runs the shipping code in plain `cargo test` (no cfg(loom)).

use iommu_types::{DomainId, Generation};
use std::task::{Context, Poll};

/// The atomics, lock and fence that this module and the caches are built from: std in production, loom in tests.
pub trait Atomics: 'static {
    /* type U64: ..; type Bool; type Mutex<T>; fn fence(); spin/yield hint */
}
pub struct Std;
impl Atomics for Std {}

/// All generations, slots and domain lists of one unit. `Drains<Std>` in production.
pub struct Drains<A: Atomics = Std> {
    _a: std::marker::PhantomData<A>,
}
/// Index of a slot. One slot per port (device), each in its own cache line (crossbeam_utils::CachePadded).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotIndex(pub u16);
/// What must be quiet before an invalidation is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    Everything,
    Domain(DomainId),
    Slot(SlotIndex),
}

impl<A: Atomics> Drains<A> {
    pub fn new(slots_max: u16) -> Self {
        todo!()
    }
    pub fn claim_slot(&self) -> Option<SlotIndex> {
        todo!()
    }
    pub fn release_slot(&self, slot: SlotIndex) {
        todo!()
    }
    pub fn generation(&self, domain: DomainId) -> Generation {
        todo!()
    }
    /// (1): called before the caches are cleared.
    pub fn move_generation(&self, scope: Scope) {
        todo!()
    } // Everything moves all (e.g. a global counter folded into generation())
    /// (3) + (4): called after the caches are cleared. Completes synchronously if all is quiet.
    pub fn drain(&self, scope: Scope) -> PendingDrain {
        todo!()
    }
    // device side; a slot is used by one thread at a time (the port is &mut)
    pub fn enter(&self, slot: SlotIndex) {
        todo!()
    } // store epoch; SeqCst fence
    pub fn leave(&self, slot: SlotIndex) {
        todo!()
    } // store idle; wake a waiter if its flag is set
    pub fn register(&self, slot: SlotIndex, domain: DomainId) {
        todo!()
    } // slow path, as above
}

/// Not yet quiet. A future (std::task only): resolves to `Drained`. Dropping it is allowed and forgets the waiter.
#[must_use = "an unmapped page is not quiet until the drain completes"]
pub struct PendingDrain {}
/// Proof that a drain completed. Cannot be made elsewhere.
#[derive(Debug)]
pub struct Drained(());
impl PendingDrain {
    /// Synchronous check, without a waker: `Ok(Drained)` when all is quiet.
    pub fn try_complete(self) -> Result<Drained, PendingDrain> {
        todo!()
    }
    /// Both must be quiet.
    pub fn and(self, other: PendingDrain) -> PendingDrain {
        todo!()
    }
    /// Nothing to wait for.
    pub fn none() -> PendingDrain {
        todo!()
    }
    /// Spins/parks the thread until drained: for tests and benches.
    pub fn wait_blocking(self) -> Drained {
        todo!()
    }
}
impl std::future::Future for PendingDrain {
    type Output = Drained;
    fn poll(self: std::pin::Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Drained> {
        todo!()
    }
}
