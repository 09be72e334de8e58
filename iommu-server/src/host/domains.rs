//! The registry of domains: by identifier, and the default domain of each (owner, device) pair.
//!
//! A domain is locked by itself, never together with another. Whoever has to wait for a drain lets go of the lock, and the slot
//! remembers that somebody is still to come back (`pending`), so that a domain is not destroyed under an unfinished unmap.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use dashmap::DashMap;
use iommu_kernel::{Domain, DomainCounters, Kernel, PendingUnmap, Tick};
use iommu_types::errors::UnknownDomain;
use iommu_types::{DeviceAddress, DomainId, Owner, RequestId};
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::sanitizer::{SanitizerHub, WatchedDomain};
use crate::telemetry;

struct SlotState {
    /// `None` once the domain is being destroyed.
    domain: Option<Domain>,
    closing: bool,
    /// Unmaps that wait for their drain.
    pending: usize,
    /// Whether somebody sleeps until the domain's deferred unmaps are to be flushed.
    flush_armed: bool,
    /// What it had done when it was taken out.
    done: Option<(&'static str, DomainCounters)>,
}

fn counted(domain: &Domain) -> (&'static str, DomainCounters) {
    (domain.protection().name(), domain.counters())
}

impl SlotState {
    /// The domain, for those who looked under this lock whether it is there.
    fn there(&mut self) -> &mut Domain {
        self.domain.as_mut().expect("the caller found the domain under this lock")
    }
}

/// A domain and its lock.
pub struct DomainSlot {
    /// Its identifier.
    pub id: DomainId,
    /// Whose it is.
    pub owner: Owner,
    /// The device whose default domain it is.
    pub default_of: Option<DeviceAddress>,
    /// Its sanitizer, if it has one. What a call causes it to report is filed when the domain's lock is free again.
    pub watched: Option<WatchedDomain>,
    state: Mutex<SlotState>,
    settled: Notify,
    /// Whether memory for descriptors, in which devices find addresses, was ever mapped in it.
    has_had_coherent: AtomicBool,
    /// Whether what is mapped was reported as leaked when the last device went.
    leak_told: AtomicBool,
}

impl std::fmt::Debug for DomainSlot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DomainSlot").field("id", &self.id).field("owner", &self.owner).finish_non_exhaustive()
    }
}

impl DomainSlot {
    fn new(domain: Domain, default_of: Option<DeviceAddress>, reports: &Arc<SanitizerHub>) -> Self {
        let watched =
            domain.sanitizer().map(|handle| WatchedDomain::new(handle.clone(), Arc::clone(reports)));
        Self {
            id: domain.id(),
            owner: domain.owner(),
            default_of,
            watched,
            has_had_coherent: AtomicBool::new(false),
            leak_told: AtomicBool::new(false),
            state: Mutex::new(SlotState {
                domain: Some(domain),
                closing: false,
                pending: 0,
                flush_armed: false,
                done: None,
            }),
            settled: Notify::new(),
        }
    }

    /// Runs `operation` under the slot's lock, if the domain is there; then files what its sanitizer reported.
    fn locked<R>(&self, operation: impl FnOnce(&mut SlotState) -> R) -> Result<R, UnknownDomain> {
        let result = {
            let mut state = self.state.lock();
            if state.closing || state.domain.is_none() {
                return Err(UnknownDomain { domain_id: self.id });
            }
            operation(&mut state)
        };
        if let Some(watched) = &self.watched {
            watched.file();
        }
        Ok(result)
    }

    /// Runs `operation` under the domain's lock.
    pub fn with<R>(&self, operation: impl FnOnce(&mut Domain) -> R) -> Result<R, UnknownDomain> {
        self.locked(|state| operation(state.there()))
    }

    /// The last device or the driver lets go: what is mapped now was leaked. Nothing where no sanitizer looks.
    pub fn leaked(&self, by: RequestId) {
        if self.watched.is_some() {
            let _gone = self.with(|domain| domain.leaked(telemetry::now(), by));
            self.leak_told.store(true, Ordering::Relaxed);
        }
    }
    /// The same when the domain is to go, unless that was said when its last device went.
    pub fn leaked_at_last(&self, by: RequestId) {
        if !self.leak_told.load(Ordering::Relaxed) {
            self.leaked(by);
        }
    }
    /// Coherent memory is to be mapped in it.
    pub fn takes_coherent(&self) {
        self.has_had_coherent.store(true, Ordering::Relaxed);
    }
    /// Whether a device in it may have been given addresses that no sanitizer saw.
    pub fn gives_unseen(&self) -> bool {
        self.watched.is_none() && self.has_had_coherent.load(Ordering::Relaxed)
    }
    /// A device is attached: what is mapped is in use again.
    pub fn taken_up(&self) {
        self.leak_told.store(false, Ordering::Relaxed);
    }

    /// Runs `operation`, which removes mappings. Where all DMA is quiet the unmap is finished under the same lock; else the
    /// [`Unsettled`] rest comes back and must be settled before anybody is answered (I1).
    pub fn unmap_with<R>(
        self: &Arc<Self>,
        kernel: &Arc<Kernel>,
        operation: impl FnOnce(&mut Domain) -> (R, Option<PendingUnmap>),
    ) -> Result<(R, Option<Unsettled>), UnknownDomain> {
        self.locked(|state| {
            let (result, pending) = operation(state.there());
            let unsettled = pending.and_then(|pending| self.settle_or_keep(kernel, state, pending));
            self.arm_flush(kernel, state);
            (result, unsettled)
        })
    }

    /// Runs `operation`, which maps. What it had to evict for that and is not quiet yet comes back, to be settled: behind the answer, or
    /// before the map is tried again.
    pub fn map_with<R>(
        self: &Arc<Self>,
        kernel: &Arc<Kernel>,
        operation: impl FnOnce(&mut Domain) -> R,
    ) -> Result<(R, Vec<Unsettled>), UnknownDomain> {
        self.locked(|state| {
            let result = operation(state.there());
            let evicted = state.there().take_evicted();
            let settle = |evicted| self.settle_or_keep(kernel, state, evicted);
            (result, evicted.into_iter().filter_map(settle).collect())
        })
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
                state.there().finish_unmap(kernel, undone, drained);
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

    /// Its mode and what it has done, also while it is being destroyed.
    fn counted(&self) -> Option<(&'static str, DomainCounters)> {
        let state = self.state.lock();
        state.domain.as_ref().map(counted).or(state.done)
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
                    let domain = state.domain.take()?;
                    state.done = Some(counted(&domain));
                    return Some(domain);
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
                    let pending = state.there().flush(&kernel);
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
    /// Where their sanitizers' reports go.
    reports: Arc<SanitizerHub>,
    retired: Mutex<BTreeMap<&'static str, ModeCount>>,
    by_id: DashMap<DomainId, Arc<DomainSlot>>,
    defaults: DashMap<(Owner, DeviceAddress), Arc<DomainSlot>>,
}

/// What the domains of one mode have done, those that are gone included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ModeCount {
    /// Invalidations asked for.
    pub invalidations: u64,
    /// Of them flushes of deferred unmaps.
    pub flushes: u64,
    /// Pages evicted.
    pub evictions: u64,
    /// Bytes copied from and to shadow buffers.
    pub copied_bytes: u64,
}

impl ModeCount {
    fn add(&mut self, counters: DomainCounters) {
        self.invalidations += counters.invalidations;
        self.flushes += counters.flushes;
        self.evictions += counters.evictions;
        self.copied_bytes += counters.copied_bytes;
    }
}

impl Domains {
    /// None yet; what their sanitizers report goes to `reports`.
    pub fn new(reports: Arc<SanitizerHub>) -> Self {
        Self { reports, ..Self::default() }
    }
    /// Adds a domain.
    pub fn insert(&self, domain: Domain, default_of: Option<DeviceAddress>) -> Arc<DomainSlot> {
        let slot = Arc::new(DomainSlot::new(domain, default_of, &self.reports));
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
    /// Takes a domain out of the registry; its identifier is reused only after its destruction. What it has done is still counted.
    pub fn remove(&self, slot: &DomainSlot) {
        let mut retired = self.retired.lock();
        if let Some((mode, counters)) = slot.counted() {
            retired.entry(mode).or_default().add(counters);
        }
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
    /// What the domains of each mode have done. Never goes back: a domain goes from the registry to the retired in one step.
    pub fn mode_counts(&self) -> BTreeMap<&'static str, ModeCount> {
        let retired = self.retired.lock();
        let mut counts = retired.clone();
        for slot in self.list(|_| true) {
            if let Some((mode, counters)) = slot.counted() {
                counts.entry(mode).or_default().add(counters);
            }
        }
        drop(retired);
        counts
    }
    /// How many there are.
    pub fn count(&self) -> usize {
        self.by_id.len()
    }
}
