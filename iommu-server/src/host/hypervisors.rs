//! What the service keeps of each hypervisor: its seat, its virtual machines, and the hypercalls of these.

use std::collections::BTreeSet;
use std::sync::Arc;

use dashmap::DashMap;
use iommu_types::Owner;
use iommu_types::errors::LimitReached;
use parking_lot::Mutex;

use crate::bounds;
use crate::host::hypercalls::Hypercalls;
use crate::session::driver::Seat;

/// A hypervisor.
#[derive(Debug)]
pub struct HypervisorState {
    /// Its name.
    pub name: String,
    /// Its session.
    pub seat: Seat,
    /// What its virtual machines ask of it.
    pub hypercalls: Hypercalls,
    /// Held while functions change hands, and while a virtual machine ends.
    pub moves: tokio::sync::Mutex<()>,
    /// Its virtual machines, by number.
    vms: Mutex<BTreeSet<u32>>,
}

impl HypervisorState {
    fn new(name: &str) -> Arc<Self> {
        let (seat, hypercalls) = (Seat::new(), Hypercalls::default());
        let (moves, vms) = (tokio::sync::Mutex::default(), Mutex::default());
        Arc::new(Self { name: name.to_owned(), seat, hypercalls, moves, vms })
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

/// All hypervisors that ever opened a session; their number is bounded.
#[derive(Debug, Default)]
pub struct Hypervisors {
    by_name: DashMap<String, Arc<HypervisorState>>,
}

impl Hypervisors {
    /// The hypervisor of that name; made when there is none.
    pub fn get_or_make(&self, name: &str) -> Result<Arc<HypervisorState>, LimitReached> {
        if let Some(found) = self.by_name.get(name) {
            return Ok(Arc::clone(found.value()));
        }
        if self.by_name.len() >= bounds::HYPERVISORS_MAX {
            // Names that hold nothing and whose session is gone make room.
            self.by_name.retain(|_, state| !state.vms().is_empty() || state.seat.connected().is_some());
        }
        if self.by_name.len() >= bounds::HYPERVISORS_MAX {
            let allowed = bounds::HYPERVISORS_MAX as u64;
            return Err(LimitReached { limit: "hypervisors".to_owned(), allowed });
        }
        let entry = self.by_name.entry(name.to_owned()).or_insert_with(|| HypervisorState::new(name));
        Ok(Arc::clone(entry.value()))
    }
    /// All of them, by name.
    pub fn list(&self) -> Vec<Arc<HypervisorState>> {
        let mut all: Vec<_> = self.by_name.iter().map(|entry| Arc::clone(entry.value())).collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }
    /// Whose a virtual machine is.
    pub fn of(&self, vm: Owner) -> Option<Arc<HypervisorState>> {
        self.list().into_iter().find(|hypervisor| hypervisor.owns(vm))
    }
}
