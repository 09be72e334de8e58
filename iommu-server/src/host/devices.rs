//! What the service keeps of each device: its counters, its owner, and its session.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use crossbeam_utils::CachePadded;
use dashmap::DashMap;
use iommu_kernel::{GivenAddresses, RegisterWrite};
use iommu_types::errors::UnknownDevice;
use iommu_types::{DeviceAddress, DmaLimits};
use parking_lot::{MappedRwLockReadGuard, Mutex, RwLock, RwLockReadGuard};

use crate::ending::Ending;
use crate::host::owners::OwnerState;
use crate::host::sanitizer::WatchedDomain;
use crate::machine::Machine;
use crate::session::device::DeviceSession;

/// What a device did since it was declared. In a cache line of its own: it is written for every batch.
#[derive(Debug, Default)]
pub struct DeviceCounters {
    /// DMA operations answered with success.
    pub operations: AtomicU64,
    /// Bytes read and written.
    pub bytes: AtomicU64,
    /// DMA operations refused by translation.
    pub faults: AtomicU64,
    /// DMA operations refused outside translation.
    pub refusals: AtomicU64,
}

/// What one batch adds to them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BatchCount {
    /// As in [`DeviceCounters`].
    pub operations: u64,
    /// As in [`DeviceCounters`].
    pub bytes: u64,
    /// As in [`DeviceCounters`].
    pub faults: u64,
    /// As in [`DeviceCounters`].
    pub refusals: u64,
}

impl DeviceCounters {
    /// Adds a batch.
    pub fn add(&self, count: BatchCount) {
        let add = |counter: &AtomicU64, by: u64| {
            if by != 0 {
                counter.fetch_add(by, Ordering::Relaxed);
            }
        };
        add(&self.operations, count.operations);
        add(&self.bytes, count.bytes);
        add(&self.faults, count.faults);
        add(&self.refusals, count.refusals);
    }
    /// As they stand.
    pub fn read(&self) -> BatchCount {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        BatchCount {
            operations: get(&self.operations),
            bytes: get(&self.bytes),
            faults: get(&self.faults),
            refusals: get(&self.refusals),
        }
    }
}

/// Behind which unit a device is.
#[derive(Clone, Debug)]
pub enum Home {
    /// The host's managed unit.
    Host,
    /// A bare machine's.
    Machine(Arc<Machine>),
}

#[derive(Debug, Default)]
struct DeviceSeat {
    generation: u64,
    session: Option<Arc<DeviceSession>>,
    /// Sessions that were ended here and whose last batch may be under way still.
    fenced: Vec<Weak<DeviceSession>>,
    removed: bool,
}

impl DeviceSeat {
    /// Takes the session that was just ended, if any, to those that may not be quiet; gives all of these.
    fn fenced(&mut self, before: Option<&Arc<DeviceSession>>) -> Vec<Arc<DeviceSession>> {
        self.fenced.extend(before.map(Arc::downgrade));
        self.fenced.retain(|fenced| fenced.upgrade().is_some_and(|fenced| !fenced.is_gone()));
        self.fenced.iter().filter_map(Weak::upgrade).collect()
    }
}

/// A declared device.
#[derive(Debug)]
pub struct DeviceState {
    /// Where.
    pub address: DeviceAddress,
    /// Name with which its agent says Hello.
    pub name: String,
    /// Behind which unit.
    pub home: Home,
    /// What it did.
    pub counters: CachePadded<DeviceCounters>,
    /// Serialises attach and detach of this device: they wait for drains in between, and nobody but who wants to move this very
    /// device waits for them.
    pub placement: tokio::sync::Mutex<()>,
    /// Counts its changes of hand and its resets, from 1. A DMA that was queued under an earlier one is refused.
    assignment: AtomicU64,
    /// Held during a reset: the device is told its generations in their order.
    resetting: tokio::sync::Mutex<()>,
    owner: RwLock<Option<Arc<OwnerState>>>,
    /// Counts the changes of `owner`, so that a session need not ask for it at every batch.
    owner_changes: AtomicU64,
    /// What its driver said that it can address.
    limits: Mutex<DmaLimits>,
    /// Whether `watched` is there; asked for every batch.
    is_watched: AtomicBool,
    /// Held for reading while a batch is carried out and the sanitizer told of it, so that no DMA is told to the sanitizer of a domain
    /// in which it was not done.
    watched: RwLock<Option<WatchedDomain>>,
    /// What its driver gave it, while no sanitizer keeps that.
    given: Mutex<GivenAddresses>,
    seat: Mutex<DeviceSeat>,
}

impl DeviceState {
    /// A device without owner and session.
    pub fn new(address: DeviceAddress, name: String, home: Home) -> Self {
        Self {
            address,
            name,
            home,
            counters: CachePadded::default(),
            placement: tokio::sync::Mutex::default(),
            assignment: AtomicU64::new(1),
            resetting: tokio::sync::Mutex::default(),
            owner: RwLock::new(None),
            owner_changes: AtomicU64::new(0),
            limits: Mutex::default(),
            is_watched: AtomicBool::new(false),
            watched: RwLock::new(None),
            given: Mutex::default(),
            seat: Mutex::default(),
        }
    }
    /// To whom its interrupts go.
    pub fn owner(&self) -> Option<Arc<OwnerState>> {
        self.owner.read().clone()
    }
    /// Its generation: what was queued in it under an earlier one is not carried out.
    pub fn assignment(&self) -> u64 {
        self.assignment.load(Ordering::Acquire)
    }
    /// Counts the changes of its owner.
    #[inline]
    pub(crate) fn owner_changes(&self) -> u64 {
        self.owner_changes.load(Ordering::Acquire)
    }
    /// Changes to whom its interrupts go.
    pub fn set_owner(&self, owner: Option<Arc<OwnerState>>) {
        *self.owner.write() = owner;
        self.owner_changes.fetch_add(1, Ordering::Release);
    }
    /// What it can address, as its driver said.
    pub fn limits(&self) -> DmaLimits {
        *self.limits.lock()
    }
    /// Changes what it can address.
    pub fn set_limits(&self, limits: DmaLimits) {
        *self.limits.lock() = limits;
    }
    /// The domain whose sanitizer looks at what the device does. One relaxed load where there is none.
    #[inline]
    pub fn watched(&self) -> Option<MappedRwLockReadGuard<'_, WatchedDomain>> {
        if !self.is_watched.load(Ordering::Relaxed) {
            return None;
        }
        RwLockReadGuard::try_map(self.watched.read(), Option::as_ref).ok()
    }
    /// Puts the device before the eyes of a domain's sanitizer, or takes it away. Waits for a batch that is watched. What the device was
    /// given goes with it.
    pub fn watch(&self, domain: Option<WatchedDomain>) {
        let mut watched = self.watched.write();
        let mut given = self.given.lock();
        if let Some(before) = &*watched {
            *given = before.handle().with(|sanitizer| sanitizer.takes_away(self.address));
        }
        if let Some(now) = &domain {
            let given = std::mem::take(&mut *given);
            now.handle().with(|sanitizer| sanitizer.brings(self.address, given));
        }
        self.is_watched.store(domain.is_some(), Ordering::Relaxed);
        *watched = domain;
    }
    /// Something is written to a register of the device. Where no sanitizer is told, it is kept for the next; `tell` tells one.
    pub(crate) fn written(&self, write: RegisterWrite, tell: impl FnOnce(&WatchedDomain)) {
        // With the lock held nobody moves the device, so that nothing is lost between two sanitizers.
        let watched = self.watched.read();
        match (&*watched, &self.home) {
            (Some(domain), _) => tell(domain),
            (None, Home::Host) => self.given.lock().written(write),
            // Nobody ever looks there.
            (None, Home::Machine(_)) => {}
        }
    }
    /// The device may have found addresses in memory that no sanitizer looked at.
    pub fn unwatched(&self) {
        self.given.lock().lose();
    }
    /// Resets the device and raises its generation: whatever was queued in it, or is on its way, is refused from now on, and nothing of it is
    /// under way when this returns. What it was given it has forgotten then; unless it does not say so, or is not there.
    pub async fn reset(&self) {
        let _in_turn = self.resetting.lock().await;
        let assignment = self.assignment.fetch_add(1, Ordering::AcqRel) + 1;
        let is_reset = match self.session() {
            Some(session) => session.reset(assignment).await,
            None => false,
        };
        self.quiet().await;
        let watched = self.watched.read();
        let mut given = self.given.lock();
        let taken = watched
            .as_ref()
            .map(|domain| domain.handle().with(|sanitizer| sanitizer.takes_away(self.address)));
        let before = taken.unwrap_or_else(|| std::mem::take(&mut *given));
        let left = if is_reset || before.is_nothing() {
            GivenAddresses::nothing()
        } else {
            GivenAddresses::unknown()
        };
        match &*watched {
            Some(domain) => domain.handle().with(|sanitizer| sanitizer.brings(self.address, left)),
            None => *given = left,
        }
    }
    /// Resolves when the batches are over that are being carried out now, of sessions that were ended too.
    async fn quiet(&self) {
        let sessions: Vec<_> = {
            let mut seat = self.seat.lock();
            let live = seat.session.clone();
            seat.fenced(None).into_iter().chain(live).collect()
        };
        for session in sessions {
            session.quiet().await;
        }
    }
    /// The live session, if any.
    pub fn session(&self) -> Option<Arc<DeviceSession>> {
        self.seat.lock().session.clone()
    }
    /// Generation of the latest session.
    pub fn generation(&self) -> u64 {
        self.seat.lock().generation
    }
    /// Seats a new session made by `make` from its generation, and fences the one before. Those before it come back too: their last
    /// batch may still be under way.
    pub fn seat(
        &self,
        make: impl FnOnce(u64) -> Arc<DeviceSession>,
    ) -> Result<(Arc<DeviceSession>, Vec<Arc<DeviceSession>>), UnknownDevice> {
        let (session, before, fenced) = {
            let mut seat = self.seat.lock();
            if seat.removed {
                return Err(UnknownDevice { device: self.address });
            }
            seat.generation += 1;
            let session = make(seat.generation);
            let before = seat.session.replace(Arc::clone(&session));
            let fenced = seat.fenced(before.as_ref());
            (session, before, fenced)
        };
        if let Some(before) = before {
            before.end(Ending::Fenced { by_generation: session.generation });
        }
        Ok((session, fenced))
    }
    /// Takes the session away if it is still this one.
    pub fn unseat(&self, session: &Arc<DeviceSession>) {
        let mut seat = self.seat.lock();
        if seat.session.as_ref().is_some_and(|seated| Arc::ptr_eq(seated, session)) {
            seat.session = None;
        }
    }
    /// Ends the session, if there is one, as a newer one would; no DMA of it comes afterwards.
    pub async fn quarantine(&self) -> bool {
        let (session, fenced, by_generation) = {
            let mut seat = self.seat.lock();
            seat.generation += 1;
            let session = seat.session.take();
            let fenced = seat.fenced(session.as_ref());
            (session, fenced, seat.generation)
        };
        let ended = session.is_some_and(|session| session.end(Ending::Fenced { by_generation }));
        for session in fenced {
            session.quiet().await;
        }
        ended
    }
    /// Ends the session for good: the device is not declared any more.
    pub fn remove(&self) {
        let session = {
            let mut seat = self.seat.lock();
            seat.removed = true;
            seat.session.take()
        };
        if let Some(session) = session {
            session.end(Ending::Removed { device: self.address });
        }
    }
}

/// All devices, of the host and of bare machines.
#[derive(Debug, Default)]
pub struct Devices {
    by_address: DashMap<DeviceAddress, Arc<DeviceState>>,
}

impl Devices {
    /// Adds one.
    pub fn insert(&self, state: Arc<DeviceState>) {
        self.by_address.insert(state.address, state);
    }
    /// The device at an address.
    pub fn get(&self, address: DeviceAddress) -> Result<Arc<DeviceState>, UnknownDevice> {
        self.by_address
            .get(&address)
            .map(|entry| Arc::clone(entry.value()))
            .ok_or(UnknownDevice { device: address })
    }
    /// Forgets one.
    pub fn remove(&self, address: DeviceAddress) -> Option<Arc<DeviceState>> {
        self.by_address.remove(&address).map(|(_, state)| state)
    }
    /// All of them by address.
    pub fn list(&self) -> Vec<Arc<DeviceState>> {
        let mut all: Vec<_> = self.by_address.iter().map(|entry| Arc::clone(entry.value())).collect();
        all.sort_by_key(|state| state.address);
        all
    }
}
