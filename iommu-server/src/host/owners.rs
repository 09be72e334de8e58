//! What the service keeps of each owner: its memory, its account, its seat, its interrupts.

use std::collections::BTreeMap;
use std::sync::Arc;

use dashmap::DashMap;
use iommu_kernel::{Kernel, OwnerAccount, OwnerMemory};
use iommu_types::errors::UnknownOwner;
use iommu_types::{DeviceAddress, Gpa, Iova, Owner};
use parking_lot::{Mutex, RwLock};

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
    pub fn new(kernel: &Kernel, owner: Owner, name: String) -> Self {
        let account = kernel.account(owner);
        let memory = RwLock::new(OwnerMemory::new(kernel, Arc::clone(&account)));
        let (interrupts, seat) = (InterruptFeed::new(), Seat::new());
        let (direct_maps, unmapped_coherent) = (tokio::sync::Mutex::default(), Mutex::default());
        Self { owner, name, account, memory, direct_maps, unmapped_coherent, interrupts, seat }
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
    /// All of them in order.
    pub fn list(&self) -> Vec<Arc<OwnerState>> {
        let mut all: Vec<_> = self.by_owner.iter().map(|entry| Arc::clone(entry.value())).collect();
        all.sort_by_key(|state| state.owner);
        all
    }
}
