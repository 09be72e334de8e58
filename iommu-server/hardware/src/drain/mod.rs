//! Generations, epochs and drains: when an invalidation is really done.
//!
//! A translation that was removed from the tables may still be in a cache, on its way into one, or in use by
//! a device that found it earlier. An invalidation deals with the three in this order, and in no other:
//!
//! ```text
//!  invalidation                                   device
//!  ------------                                   ------
//!  (1) move the generation, fence          [I4]   enter: slot := epoch, fence
//!  (2) clear the caches, set by set               look up, walk, fill (generation unchanged?)
//!  (3) fence, new epoch                    [I1]   copy
//!  (4) every slot of the domain idle or >= (3)    leave: slot := idle, fence, awaited?
//! ```
//!
//! **Architecture invariant (I1):** for each device, either (4) sees its slot busy in an older epoch, and
//! waits for it; or the device's fence came after (3), and its lookups see what (2) cleared. **(I4):** for
//! each fill, either it sees that (1) moved the generation, and is dropped; or (2) sees what it wrote.
//! Generation and epoch are two numbers because the first must move before the clearing and the second after
//! it.
//!
//! **Which slots belong to a domain** is said by a list per domain. A device that finds itself in a domain
//! other than the one its slot is registered for registers it and then looks its context up *again*: the
//! drain either finds the slot in the list, or had cleared everything before the device looked again.
//!
//! Everything is generic over [`Atomics`], so that loom runs the code that ships.

mod atomics;
mod attached;
mod generations;
mod pending;
mod slots;

#[cfg(test)]
pub(crate) mod loom_atomics;
#[cfg(test)]
mod loom_tests;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crossbeam_utils::CachePadded;
use iommu_types::{DomainId, Generation};

pub use atomics::{AtomicWord, Atomics, ExclusiveLock, Std};
use attached::Attached;
pub use generations::NEVER;
use generations::{Covered, Generations};
pub use pending::{Drained, PendingDrain};
use slots::{Epoch, Slots};

/// Index of a slot. One slot per port, each in a cache line of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotIndex(pub u16);

/// What must be quiet before an invalidation is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Every slot.
    Everything,
    /// The slots registered for a domain.
    Domain(DomainId),
    /// One slot.
    Slot(SlotIndex),
}

/// How much there is of everything.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DrainSizes {
    pub(crate) slots: u16,
    /// Words that the generations of domains share; a power of two.
    pub(crate) generation_words: usize,
    /// Locks that the lists of domains share; a power of two.
    pub(crate) list_stripes: usize,
}

/// All generations, slots and domain lists of one unit.
pub struct Drains<A: Atomics = Std> {
    /// Shared with the drains that are still pending. Entering and leaving never touches the count.
    shared: Arc<Shared<A>>,
}

pub(super) struct Shared<A: Atomics> {
    epoch: CachePadded<A::Word>,
    slots: Slots<A>,
    generations: Generations<A>,
    attached: Attached<A>,
}

impl Drains {
    /// For at most `slots_max` devices at a time.
    pub fn new(slots_max: u16) -> Self {
        Self::with_sizes(DrainSizes { slots: slots_max, generation_words: 1024, list_stripes: 64 })
    }
}

impl<A: Atomics> Drains<A> {
    pub(crate) fn with_sizes(sizes: DrainSizes) -> Self {
        Self {
            shared: Arc::new(Shared {
                epoch: CachePadded::new(A::Word::new(1)),
                slots: Slots::new(sizes.slots),
                generations: Generations::new(sizes.generation_words),
                attached: Attached::new(sizes.list_stripes),
            }),
        }
    }

    // === devices ===

    /// A slot for a new device, or `None` when all are taken.
    pub fn claim_slot(&self) -> Option<SlotIndex> {
        self.shared.slots.claim()
    }

    /// Takes a slot back: leaves its epoch if it is in one, and removes it from its domain's list.
    pub fn release_slot(&self, index: SlotIndex) {
        let slot = self.shared.slots.get(index);
        if !slot.is_idle() {
            slot.leave();
        }
        self.unregister(index);
        self.shared.slots.give_back(index);
    }

    /// Begins a burst. What the device looks up from here to [`leave`](Self::leave), and what that leads to,
    /// is waited for by every drain that began after it was removed. A slot is used by one thread at a time.
    #[inline]
    pub fn enter(&self, slot: SlotIndex) {
        // Acquire: whoever sees a drain's epoch sees what was cleared before it.
        let epoch = Epoch(self.shared.epoch.load(Ordering::Acquire));
        self.shared.slots.get(slot).enter(epoch);
    }

    /// Ends a burst and wakes whoever waits for it.
    #[inline]
    pub fn leave(&self, slot: SlotIndex) {
        self.shared.slots.get(slot).leave();
    }

    /// Puts the slot on the domain's list and takes it off the one where it was. Its device holds no
    /// translation meanwhile, whether it is in an epoch or between two. Afterwards, in an epoch, it looks its
    /// context up *again*, in the cache and then in the tables, and uses no translation before the context
    /// names the registered domain.
    ///
    /// The list's lock orders this against a drain: one that reads the list later finds the slot, and sees it
    /// busy or is seen by it; after one that read it earlier the device sees what was cleared.
    pub fn register(&self, index: SlotIndex, domain: DomainId) {
        let slot = self.shared.slots.get(index);
        let previous = slot.registered();
        if previous == Some(domain) {
            return;
        }
        self.shared.attached.add(domain, index);
        slot.set_registered(Some(domain));
        if let Some(previous) = previous {
            self.shared.attached.remove(previous, index);
        }
    }

    /// Takes the slot off the list of its domain. Its device uses no translation of that domain any more.
    pub fn unregister(&self, index: SlotIndex) {
        let slot = self.shared.slots.get(index);
        if let Some(domain) = slot.registered() {
            slot.set_registered(None);
            self.shared.attached.remove(domain, index);
        }
    }

    /// The domain that a slot is registered for.
    pub fn registered(&self, slot: SlotIndex) -> Option<DomainId> {
        self.shared.slots.get(slot).registered()
    }

    // === walks and fills ===

    /// Taken *before* a device looks its context up, in the cache or in the tables; carried by the fill of
    /// the context cache and by every walk through that context.
    pub fn context_generation(&self) -> Generation {
        self.shared.generations.of_contexts()
    }

    /// Taken *before* a walk looks at the paging-structure cache or the tables; carried by its fills.
    /// `context` is the [context generation](Self::context_generation) of the burst: tables found through a
    /// context that has since been invalidated fill nothing.
    pub fn generation(&self, domain: DomainId, context: Generation) -> Generation {
        self.shared.generations.of_walk(domain, context)
    }

    /// Whether a walk under that generation may still fill. Asked behind a sequentially consistent fence,
    /// under the set's writer lock.
    pub(crate) fn is_current(&self, domain: DomainId, walked_under: Generation) -> bool {
        self.shared.generations.is_current(domain, walked_under)
    }

    /// As [`Self::is_current`], for the context cache.
    pub(crate) fn is_current_context(&self, walked_under: Generation) -> bool {
        self.shared.generations.is_current_context(walked_under)
    }

    // === invalidations ===

    /// Step (1) of an invalidation of translations: the IOTLB and the paging-structure cache. The caches are
    /// cleared while the result is held; [`Invalidating::drain`] does the rest. A scope that is no domain
    /// moves the generation of all.
    pub fn move_generation(&self, scope: Scope) -> Invalidating<'_, A> {
        let covered = match scope {
            Scope::Domain(domain) => Covered::TranslationsOf(domain),
            Scope::Everything | Scope::Slot(_) => Covered::Translations,
        };
        self.begin(covered, scope)
    }

    /// Step (1) of an invalidation of contexts, all of which share one generation. The scope is that of the
    /// drain.
    pub fn move_context_generation(&self, scope: Scope) -> Invalidating<'_, A> {
        self.begin(Covered::Contexts, scope)
    }

    fn begin(&self, covered: Covered, scope: Scope) -> Invalidating<'_, A> {
        self.shared.generations.begin(covered);
        Invalidating { drains: self, covered, scope }
    }

    /// Steps (3) and (4): everything that the scope's devices began before now. Complete at once if they are
    /// quiet.
    ///
    /// A slot that is idle behind the fence needs no epoch: whoever enters later sees what was cleared. So
    /// the epoch, which every device reads, is written only when there is someone to tell apart.
    pub fn drain(&self, scope: Scope) -> PendingDrain<A> {
        let shared = &self.shared;
        A::fence(Ordering::SeqCst);
        let mut busy = Vec::new();
        let mut look = |slot| {
            if !shared.slots.get(slot).is_idle() {
                busy.push(slot);
            }
        };
        match scope {
            Scope::Everything => shared.slots.indexes().for_each(look),
            Scope::Domain(domain) => shared.attached.for_each(domain, look),
            Scope::Slot(slot) => look(slot),
        }
        if busy.is_empty() {
            return PendingDrain::quiet();
        }
        let epoch = Epoch(shared.epoch.fetch_add(1, Ordering::AcqRel) + 1);
        let slots = busy.into_iter().map(|slot| (slot, epoch)).collect();
        PendingDrain::waiting_for(Arc::clone(shared), slots)
    }
}

/// An invalidation that has moved the generation and clears caches while this is held. Walks that begin
/// meanwhile fill nothing: they may have started from an entry that was about to be cleared.
#[must_use = "the caches are cleared while this is held; then it is drained"]
pub struct Invalidating<'d, A: Atomics = Std> {
    drains: &'d Drains<A>,
    covered: Covered,
    scope: Scope,
}

impl<A: Atomics> Invalidating<'_, A> {
    /// The caches are clear: what is left is to wait for the devices of the scope.
    pub fn drain(self) -> PendingDrain<A> {
        let (drains, scope) = (self.drains, self.scope);
        drop(self);
        drains.drain(scope)
    }
}

impl<A: Atomics> Drop for Invalidating<'_, A> {
    fn drop(&mut self) {
        self.drains.shared.generations.end(self.covered);
    }
}
