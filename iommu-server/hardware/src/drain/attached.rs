//! Which slots use which domain: the lists that a drain of one domain reads instead of all slots.
//!
//! Lists are exact (a tenant never waits for another's device) and exist only while they hold a slot. They
//! stand in a few locked stripes; a lock is held for a push, a removal or a copy, never while anything
//! drains.

use std::collections::BTreeMap;

use crossbeam_utils::CachePadded;
use iommu_types::DomainId;

use super::SlotIndex;
use super::atomics::{Atomics, ExclusiveLock};

type Stripe = BTreeMap<DomainId, Vec<SlotIndex>>;

pub(super) struct Attached<A: Atomics> {
    stripes: Box<[CachePadded<A::Lock<Stripe>>]>,
}

impl<A: Atomics> Attached<A> {
    pub(super) fn new(stripes: usize) -> Self {
        assert!(stripes.is_power_of_two(), "domains are spread over a power of two of stripes");
        let stripe = || CachePadded::new(A::Lock::new(Stripe::new()));
        Self { stripes: (0..stripes).map(|_| stripe()).collect() }
    }

    pub(super) fn add(&self, domain: DomainId, slot: SlotIndex) {
        self.stripe(domain).with(|lists| lists.entry(domain).or_default().push(slot));
    }

    pub(super) fn remove(&self, domain: DomainId, slot: SlotIndex) {
        self.stripe(domain).with(|lists| {
            let Some(list) = lists.get_mut(&domain) else { return };
            list.retain(|&member| member != slot);
            if list.is_empty() {
                lists.remove(&domain);
            }
        });
    }

    /// Runs `op` on every slot of the domain's list, under its lock.
    pub(super) fn for_each(&self, domain: DomainId, op: impl FnMut(SlotIndex)) {
        self.stripe(domain).with(|lists| {
            if let Some(list) = lists.get(&domain) {
                list.iter().copied().for_each(op);
            }
        });
    }

    fn stripe(&self, domain: DomainId) -> &A::Lock<Stripe> {
        &self.stripes[usize::from(domain.get()) & (self.stripes.len() - 1)]
    }
}
