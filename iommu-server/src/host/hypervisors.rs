//! What the service keeps of each hypervisor: its seat, its virtual machines, and the hypercalls of these.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use iommu_proto::model::TenantLimits;
use iommu_types::Owner;
use iommu_types::errors::LimitReached;
use parking_lot::Mutex;

use crate::bounds;
use crate::host::hypercalls::Hypercalls;
use crate::host::rates::OwnerBounds;
use crate::session::driver::Seat;

/// A hypervisor.
#[derive(Debug)]
pub struct HypervisorState {
    /// Its name.
    pub name: String,
    /// Its session.
    pub seat: Seat,
    /// What it may ask in a second and at once.
    pub bounds: Arc<OwnerBounds>,
    /// What its virtual machines ask of it.
    pub hypercalls: Hypercalls,
    /// Held while functions change hands, and while a virtual machine ends.
    pub moves: tokio::sync::Mutex<()>,
    /// Held while memory is added to one of its virtual machines, so that what they have together is counted.
    pub adding: Mutex<()>,
    /// Its virtual machines, by number.
    vms: Mutex<BTreeSet<u32>>,
}

impl HypervisorState {
    fn new(name: &str) -> Arc<Self> {
        let (seat, hypercalls) = (Seat::new(), Hypercalls::default());
        let (moves, vms) = (tokio::sync::Mutex::default(), Mutex::default());
        let requests_per_second = Some(bounds::HYPERVISOR_REQUESTS_PER_SECOND_MAX);
        let bounds = OwnerBounds::new(TenantLimits { requests_per_second, ..TenantLimits::default() });
        let (name, bounds, adding) = (name.to_owned(), Arc::new(bounds), Mutex::default());
        Arc::new(Self { name, seat, bounds, hypercalls, moves, adding, vms })
    }
    /// Whether it owns a virtual machine.
    pub fn owns(&self, owner: Owner) -> bool {
        matches!(owner, Owner::Vm(number) if self.vms.lock().contains(&number))
    }
    /// Its virtual machines.
    pub fn vms(&self) -> Vec<u32> {
        self.vms.lock().iter().copied().collect()
    }
    pub(super) fn add_vm(&self, number: u32) -> Result<(), LimitReached> {
        let mut vms = self.vms.lock();
        if vms.len() >= bounds::VMS_PER_HYPERVISOR_MAX {
            let allowed = bounds::VMS_PER_HYPERVISOR_MAX as u64;
            return Err(LimitReached { limit: "vms_per_hypervisor".to_owned(), allowed });
        }
        vms.insert(number);
        Ok(())
    }
    pub(super) fn remove_vm(&self, owner: Owner) {
        if let Owner::Vm(number) = owner {
            self.vms.lock().remove(&number);
        }
    }
}

/// The hypervisors that are known by name; their number is bounded.
#[derive(Debug, Default)]
pub struct Hypervisors {
    by_name: Mutex<BTreeMap<String, Arc<HypervisorState>>>,
}

impl Hypervisors {
    /// The hypervisor of that name; made when there is none. One that nobody holds (no session, grace or call of it) makes room.
    pub fn get_or_make(&self, name: &str) -> Result<Arc<HypervisorState>, LimitReached> {
        let mut by_name = self.by_name.lock();
        if let Some(found) = by_name.get(name) {
            return Ok(Arc::clone(found));
        }
        if by_name.len() >= bounds::HYPERVISORS_MAX {
            by_name.retain(|_, state| Arc::strong_count(state) > 1 || !state.vms.lock().is_empty());
        }
        if by_name.len() >= bounds::HYPERVISORS_MAX {
            let allowed = bounds::HYPERVISORS_MAX as u64;
            return Err(LimitReached { limit: "hypervisors".to_owned(), allowed });
        }
        let state = HypervisorState::new(name);
        by_name.insert(name.to_owned(), Arc::clone(&state));
        Ok(state)
    }
    /// All of them, by name.
    pub fn list(&self) -> Vec<Arc<HypervisorState>> {
        self.by_name.lock().values().cloned().collect()
    }
}
