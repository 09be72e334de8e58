//! The registry of domains: by identifier, and the default domain of each (owner, device) pair.
//!
//! A domain is locked by itself, never together with another. Whoever has to wait for a drain lets go of the lock, and the slot
//! remembers that somebody is still to come back (`pending`), so that a domain is not destroyed under an unfinished unmap.

use std::sync::Arc;
use std::time::Duration;

use dashmap::DashMap;
use iommu_kernel::{Domain, Kernel, PendingUnmap, Tick};
use iommu_types::errors::UnknownDomain;
use iommu_types::{DeviceAddress, DomainId, Owner};
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::telemetry;

struct SlotState {
    /// `None` once the domain is being destroyed.
    domain: Option<Domain>,
    closing: bool,
    /// Unmaps that wait for their drain.
    pending: usize,
    /// Whether somebody sleeps until the domain's deferred unmaps are to be flushed.
    flush_armed: bool,
}

/// A domain and its lock.
pub struct DomainSlot {
    /// Its identifier.
    pub id: DomainId,
    /// Whose it is.
    pub owner: Owner,
    /// The device whose default domain it is.
    pub default_of: Option<DeviceAddress>,
    state: Mutex<SlotState>,
    settled: Notify,
}

impl std::fmt::Debug for DomainSlot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DomainSlot").field("id", &self.id).field("owner", &self.owner).finish_non_exhaustive()
    }
}

impl DomainSlot {
    fn new(domain: Domain, default_of: Option<DeviceAddress>) -> Self {
        Self {
            id: domain.id(),
            owner: domain.owner(),
            default_of,
            state: Mutex::new(SlotState {
                domain: Some(domain),
                closing: false,
                pending: 0,
                flush_armed: false,
            }),
            settled: Notify::new(),
        }
    }

    /// Runs `operation` under the domain's lock.
    pub fn with<R>(&self, operation: impl FnOnce(&mut Domain) -> R) -> Result<R, UnknownDomain> {
        let mut state = self.state.lock();
        if state.closing {
            return Err(UnknownDomain { domain_id: self.id });
        }
        let domain = state.domain.as_mut().ok_or(UnknownDomain { domain_id: self.id })?;
        Ok(operation(domain))
    }

    /// Runs `operation`, which removes mappings. Where all DMA is quiet the unmap is finished under the same lock; else the
    /// [`Unsettled`] rest comes back and must be settled before anybody is answered (I1).
    pub fn unmap_with<R>(
        self: &Arc<Self>,
        kernel: &Arc<Kernel>,
        operation: impl FnOnce(&mut Domain) -> (R, Option<PendingUnmap>),
    ) -> Result<(R, Option<Unsettled>), UnknownDomain> {
        let mut state = self.state.lock();
        if state.closing {
            return Err(UnknownDomain { domain_id: self.id });
        }
        let state = &mut *state;
        let domain = state.domain.as_mut().ok_or(UnknownDomain { domain_id: self.id })?;
        let (result, pending) = operation(domain);
        let unsettled = pending.and_then(|pending| self.settle_or_keep(kernel, state, pending));
        self.arm_flush(kernel, state);
        Ok((result, unsettled))
    }

    /// Runs `operation`, which maps. What it had to evict for that is settled behind the answer: nobody waits for it.
    pub fn map_with<R>(
        self: &Arc<Self>,
        kernel: &Arc<Kernel>,
        operation: impl FnOnce(&mut Domain) -> R,
    ) -> Result<R, UnknownDomain> {
        let mut state = self.state.lock();
        if state.closing {
            return Err(UnknownDomain { domain_id: self.id });
        }
        let state = &mut *state;
        let domain = state.domain.as_mut().ok_or(UnknownDomain { domain_id: self.id })?;
        let result = operation(domain);
        for evicted in domain.take_evicted() {
            if let Some(unsettled) = self.settle_or_keep(kernel, state, evicted) {
                tokio::spawn(unsettled.settle());
            }
        }
        Ok(result)
    }

    /// Finishes an unmap where all DMA is quiet, under the lock that is held; else it is to be settled.
    fn settle_or_keep(
        self: &Arc<Self>,
        kernel: &Arc<Kernel>,
        state: &mut SlotState,
        pending: PendingUnmap,
    ) -> Option<Unsettled> {
        let (drain, undone) = pending.split();
        match drain.try_complete() {
            Ok(drained) => {
                let domain = state.domain.as_mut().expect("the caller found the domain under this lock");
                domain.finish_unmap(kernel, undone, drained);
                None
            }
            Err(drain) => {
                state.pending += 1;
                let pending = PendingUnmap { undone, drain };
                Some(Unsettled { slot: Arc::clone(self), kernel: Arc::clone(kernel), pending })
            }
        }
    }

    /// Sees to it that deferred unmaps are flushed in time: one sleeper a domain, as long as something waits.
    fn arm_flush(self: &Arc<Self>, kernel: &Arc<Kernel>, state: &mut SlotState) {
        let due = state.domain.as_ref().and_then(Domain::flush_at);
        if let Some(due) = due.filter(|_| !state.flush_armed) {
            state.flush_armed = true;
            tokio::spawn(flush_when_due(Arc::clone(self), Arc::clone(kernel), due));
        }
    }

    /// From now on nobody finds it.
    pub fn close(&self) {
        self.state.lock().closing = true;
    }

    /// Takes the domain out for destruction, once no unmap is under way. `None` when somebody else did.
    pub async fn take(&self) -> Option<Domain> {
        self.close();
        loop {
            let settled = self.settled.notified();
            tokio::pin!(settled);
            settled.as_mut().enable();
            {
                let mut state = self.state.lock();
                if state.pending == 0 {
                    return state.domain.take();
                }
            }
            settled.await;
        }
    }
}

/// An unmap whose entries are gone and whose DMA may still be in flight. Dropping it would leave memory pinned, so it is
/// settled in a task of its own, whatever becomes of the call that began it.
#[must_use = "memory stays pinned until it is settled"]
pub struct Unsettled {
    slot: Arc<DomainSlot>,
    kernel: Arc<Kernel>,
    pending: PendingUnmap,
}

impl Unsettled {
    /// Waits for the drain with no lock held, then finishes.
    pub async fn settle(self) {
        let PendingUnmap { undone, drain } = self.pending;
        let drained = drain.await;
        {
            let mut state = self.slot.state.lock();
            let domain = state.domain.as_mut().expect("a domain with a pending unmap is not taken");
            domain.finish_unmap(&self.kernel, undone, drained);
            state.pending -= 1;
        }
        self.slot.settled.notify_waiters();
    }
}

/// Flushes a domain each time that it is due, until nothing waits or it is gone.
async fn flush_when_due(slot: Arc<DomainSlot>, kernel: Arc<Kernel>, first_due: Tick) {
    let mut due = first_due;
    loop {
        tokio::time::sleep(Duration::from_micros(due.since_us(telemetry::now()))).await;
        let flushed = {
            let mut state = slot.state.lock();
            let state = &mut *state;
            let next = state.domain.as_ref().filter(|_| !state.closing).and_then(Domain::flush_at);
            match next {
                None => {
                    state.flush_armed = false;
                    return;
                }
                // What waited then was flushed by a full batch, and younger ones wait now.
                Some(next) if next > telemetry::now() => {
                    due = next;
                    continue;
                }
                Some(_) => {
                    let domain = state.domain.as_mut().expect("it said when it is due");
                    let pending = domain.flush(&kernel);
                    slot.settle_or_keep(&kernel, state, pending)
                }
            }
        };
        if let Some(unsettled) = flushed {
            unsettled.settle().await;
        }
    }
}

/// All domains.
#[derive(Debug, Default)]
pub struct Domains {
    by_id: DashMap<DomainId, Arc<DomainSlot>>,
    defaults: DashMap<(Owner, DeviceAddress), Arc<DomainSlot>>,
}

impl Domains {
    /// Adds a domain.
    pub fn insert(&self, domain: Domain, default_of: Option<DeviceAddress>) -> Arc<DomainSlot> {
        let slot = Arc::new(DomainSlot::new(domain, default_of));
        self.by_id.insert(slot.id, Arc::clone(&slot));
        if let Some(device) = default_of {
            self.defaults.insert((slot.owner, device), Arc::clone(&slot));
        }
        slot
    }
    /// The domain with this identifier.
    pub fn get(&self, id: DomainId) -> Result<Arc<DomainSlot>, UnknownDomain> {
        self.by_id.get(&id).map(|entry| Arc::clone(entry.value())).ok_or(UnknownDomain { domain_id: id })
    }
    /// The default domain of a pair.
    pub fn default_of(&self, owner: Owner, device: DeviceAddress) -> Option<Arc<DomainSlot>> {
        self.defaults.get(&(owner, device)).map(|entry| Arc::clone(entry.value()))
    }
    /// Takes a domain out of the registry; its identifier is reused only after its destruction.
    pub fn remove(&self, slot: &DomainSlot) {
        self.by_id.remove(&slot.id);
        if let Some(device) = slot.default_of {
            self.defaults.remove(&(slot.owner, device));
        }
    }
    /// All domains that pass, by identifier.
    pub fn list(&self, wanted: impl Fn(&DomainSlot) -> bool) -> Vec<Arc<DomainSlot>> {
        let mut found: Vec<_> =
            self.by_id.iter().map(|entry| Arc::clone(entry.value())).filter(|slot| wanted(slot)).collect();
        found.sort_by_key(|slot| slot.id);
        found
    }
    /// How many there are.
    pub fn count(&self) -> usize {
        self.by_id.len()
    }
}
