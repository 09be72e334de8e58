//! Slots: where each device says in which epoch it is, and where whoever waits for it leaves a flag.
//!
//! A slot is written by one device only and stands in a cache line of its own, so entering and leaving an
//! epoch costs two stores, two fences and no traffic between devices.

use std::sync::atomic::Ordering;
use std::task::Waker;

use crossbeam_utils::CachePadded;
use iommu_types::DomainId;

use super::SlotIndex;
use super::atomics::{AtomicWord, Atomics, ExclusiveLock};

/// A number of the unit's epoch counter. Epochs start at 1, so that a slot's word can say "idle" by 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Epoch(pub(super) u64);

const IDLE: u64 = 0;
const NO_DOMAIN: u64 = u64::MAX;

/// Names one waiter of one slot, so that it can be forgotten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct WaiterId(u64);

#[derive(Default)]
struct Waiters {
    next_id: u64,
    wakers: Vec<(WaiterId, Waker)>,
}

pub(super) struct Slot<A: Atomics> {
    /// The epoch that the device entered, or `IDLE`.
    state: A::Word,
    /// 1 while `waiters` may hold someone. Written under the lock of `waiters`.
    awaited: A::Word,
    /// The domain whose list holds this slot, or `NO_DOMAIN`. Written by the slot's device only.
    registered: A::Word,
    /// A waker is woken and dropped outside the lock: it is somebody else's code, which may come back here.
    waiters: A::Lock<Waiters>,
}

impl<A: Atomics> Slot<A> {
    fn new() -> Self {
        Self {
            state: A::Word::new(IDLE),
            awaited: A::Word::new(0),
            registered: A::Word::new(NO_DOMAIN),
            waiters: A::Lock::new(Waiters::default()),
        }
    }

    /// Device side. The fence orders the store before every lookup of the epoch; it pairs with the fence of a
    /// drain. The store releases, so that whoever reads the new epoch knows the copies of earlier ones to be
    /// over.
    #[inline]
    pub(super) fn enter(&self, epoch: Epoch) {
        self.state.store(epoch.0, Ordering::Release);
        A::fence(Ordering::SeqCst);
    }

    /// Device side. The fence orders the store before the look at the flag; it pairs with the fence of
    /// [`Self::watch`]: either the device sees the flag or the waiter sees the slot idle.
    #[inline]
    pub(super) fn leave(&self) {
        self.state.store(IDLE, Ordering::Release);
        A::fence(Ordering::SeqCst);
        if self.awaited.load(Ordering::Relaxed) != 0 {
            self.wake();
        }
    }

    #[cold]
    fn wake(&self) {
        let wakers = self.waiters.with(|waiters| {
            self.awaited.store(0, Ordering::Relaxed);
            std::mem::take(&mut waiters.wakers)
        });
        for (_, waker) in wakers {
            waker.wake();
        }
    }

    pub(super) fn is_idle(&self) -> bool {
        self.state.load(Ordering::Acquire) == IDLE
    }

    /// Whether nothing that the device does can have begun before `epoch`.
    pub(super) fn is_quiet(&self, epoch: Epoch) -> bool {
        let state = self.state.load(Ordering::Acquire);
        state == IDLE || state >= epoch.0
    }

    /// Has `waker` woken at the next leave. The caller asks [`Self::is_quiet`] *again* after this, and only
    /// then waits.
    pub(super) fn watch(&self, earlier: Option<WaiterId>, waker: &Waker) -> WaiterId {
        let (id, replaced) = self.waiters.with(|waiters| {
            self.awaited.store(1, Ordering::Relaxed);
            waiters.put(earlier, waker)
        });
        A::fence(Ordering::SeqCst);
        drop(replaced);
        id
    }

    /// Forgets a waiter. The flag may stay up, which costs one leave a look at an empty list.
    pub(super) fn forget(&self, id: WaiterId) {
        let forgotten = self.waiters.with(|waiters| {
            let index = waiters.wakers.iter().position(|(waiter, _)| *waiter == id)?;
            Some(waiters.wakers.swap_remove(index))
        });
        drop(forgotten);
    }

    pub(super) fn registered(&self) -> Option<DomainId> {
        u16::try_from(self.registered.load(Ordering::Relaxed)).ok().map(DomainId::new)
    }

    pub(super) fn set_registered(&self, domain: Option<DomainId>) {
        let word = domain.map_or(NO_DOMAIN, |domain| u64::from(domain.get()));
        self.registered.store(word, Ordering::Relaxed);
    }
}

impl Waiters {
    /// The name of the waiter, and the waker that it had before.
    fn put(&mut self, earlier: Option<WaiterId>, waker: &Waker) -> (WaiterId, Option<Waker>) {
        if let Some((id, known)) = self.wakers.iter_mut().find(|(id, _)| Some(*id) == earlier) {
            return (*id, Some(std::mem::replace(known, waker.clone())));
        }
        let id = WaiterId(self.next_id);
        self.next_id += 1;
        self.wakers.push((id, waker.clone()));
        (id, None)
    }
}

/// All slots of a unit, and which are free.
pub(super) struct Slots<A: Atomics> {
    slots: Box<[CachePadded<Slot<A>>]>,
    free: A::Lock<Vec<SlotIndex>>,
}

impl<A: Atomics> Slots<A> {
    pub(super) fn new(slots_max: u16) -> Self {
        Self {
            slots: (0..slots_max).map(|_| CachePadded::new(Slot::new())).collect(),
            free: A::Lock::new((0..slots_max).rev().map(SlotIndex).collect()),
        }
    }

    #[inline]
    pub(super) fn get(&self, slot: SlotIndex) -> &Slot<A> {
        &self.slots[usize::from(slot.0)]
    }

    pub(super) fn indexes(&self) -> impl Iterator<Item = SlotIndex> {
        // The constructor took the count as a u16.
        (0..self.slots.len() as u16).map(SlotIndex)
    }

    pub(super) fn claim(&self) -> Option<SlotIndex> {
        self.free.with(Vec::pop)
    }

    pub(super) fn give_back(&self, slot: SlotIndex) {
        self.free.with(|free| {
            assert!(!free.contains(&slot), "a slot is released once");
            free.push(slot);
        });
    }
}
