//! What the service keeps of each owner: its memory, its account, its seat, its interrupts.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use dashmap::DashMap;
use iommu_kernel::{Kernel, OwnerAccount, OwnerMemory};
use iommu_proto::model::{LimitState, TenantLimits};
use iommu_types::errors::UnknownOwner;
use iommu_types::{DeviceAddress, Gpa, Iova, Owner};
use parking_lot::{Mutex, RwLock};

use crate::host::hypervisors::HypervisorState;
use crate::host::rates::OwnerBounds;
use crate::interrupts::InterruptFeed;
use crate::session::driver::Seat;

/// An owner.
pub struct OwnerState {
    /// Who.
    pub owner: Owner,
    /// Under which name its driver opens its session.
    pub name: String,
    /// What it uses of its limits.
    pub account: Arc<OwnerAccount>,
    /// Its memory map. Read to map and to move bytes, written to allocate and free.
    pub memory: RwLock<OwnerMemory>,
    /// Held by who opens or closes buffers in direct maps, drains included: a buffer is open in all of them or in none when another comes.
    pub direct_maps: tokio::sync::Mutex<()>,
    /// Coherent buffers that were unmapped and then not freed, as something else maps them still: for which device, and where they were
    /// mapped. Freeing one again goes on where it stopped.
    pub unmapped_coherent: Mutex<BTreeMap<Gpa, (DeviceAddress, Iova)>>,
    /// Interrupts of its devices.
    pub interrupts: InterruptFeed,
    /// Its session.
    pub seat: Seat,
    /// What it may do in a second and have at once, beside what its account counts.
    pub bounds: Arc<OwnerBounds>,
    /// Set when the owner is being destroyed: no device is attached for it and no memory given to it any more.
    pub is_leaving: AtomicBool,
    /// Whose virtual machine it is; `None` for a driver of the host.
    pub hypervisor: Option<Arc<HypervisorState>>,
}

impl std::fmt::Debug for OwnerState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OwnerState")
            .field("owner", &self.owner)
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl OwnerState {
    /// An owner with nothing.
    pub fn new(kernel: &Kernel, account: Arc<OwnerAccount>, name: String, limits: TenantLimits) -> Self {
        let owner = account.owner();
        let memory = RwLock::new(OwnerMemory::new(kernel, Arc::clone(&account)));
        let (interrupts, seat) = (InterruptFeed::new(), Seat::new());
        let (direct_maps, unmapped_coherent) = (tokio::sync::Mutex::default(), Mutex::default());
        Self {
            owner,
            name,
            account,
            memory,
            direct_maps,
            unmapped_coherent,
            interrupts,
            seat,
            bounds: Arc::new(OwnerBounds::new(limits)),
            is_leaving: AtomicBool::new(false),
            hypervisor: None,
        }
    }
    /// The same, as a virtual machine of a hypervisor.
    pub fn of_hypervisor(self, hypervisor: &Arc<HypervisorState>) -> Self {
        Self { hypervisor: Some(Arc::clone(hypervisor)), ..self }
    }
    /// Every limit of it, with how it stands.
    pub fn limits(&self) -> Vec<LimitState> {
        let of_account = self.account.usage().into_iter().map(|usage| LimitState {
            limit: usage.limit.to_owned(),
            used: usage.used,
            allowed: usage.allowed,
            refused_count: usage.refused,
        });
        of_account.chain(self.bounds.state()).collect()
    }
    /// Refuses when the owner is being destroyed.
    pub fn still_there(&self) -> Result<(), UnknownOwner> {
        if self.is_leaving.load(Ordering::Acquire) { Err(UnknownOwner { owner: self.owner }) } else { Ok(()) }
    }
    /// Whether it is a virtual machine: it has the memory that its hypervisor gives it.
    pub fn is_vm(&self) -> bool {
        self.hypervisor.is_some()
    }
}

/// All owners.
#[derive(Debug, Default)]
pub struct Owners {
    by_owner: DashMap<Owner, Arc<OwnerState>>,
}

impl Owners {
    /// Adds one.
    pub fn insert(&self, state: Arc<OwnerState>) {
        self.by_owner.insert(state.owner, state);
    }
    /// The owner, when declared.
    pub fn get(&self, owner: Owner) -> Result<Arc<OwnerState>, UnknownOwner> {
        self.by_owner.get(&owner).map(|entry| Arc::clone(entry.value())).ok_or(UnknownOwner { owner })
    }
    /// Forgets one.
    pub fn remove(&self, owner: Owner) {
        self.by_owner.remove(&owner);
    }
    /// All of them in order.
    pub fn list(&self) -> Vec<Arc<OwnerState>> {
        let mut all: Vec<_> = self.by_owner.iter().map(|entry| Arc::clone(entry.value())).collect();
        all.sort_by_key(|state| state.owner);
        all
    }
}
