//! Virtual machines: owners that a hypervisor makes and unmakes.
//!
//! A virtual machine is an owner like a driver of the host, with limits of its own. Its end is in an order that leaves nothing behind: its driver's session
//! is fenced and its requests are awaited, its devices are released (which drains and resets them), its mappings go, and only then its memory,
//! wiped (I9).

use std::sync::Arc;
use std::sync::atomic::Ordering;

use iommu_kernel::OwnerEntry;
use iommu_proto::model::TenantLimits;
use iommu_types::errors::{
    CreateVmError, DeclareError, DestroyVmError, InvalidField, NotYours, UnknownOwner,
};
use iommu_types::{Owner, Role};

use super::Host;
use super::hypervisors::HypervisorState;
use super::limits::within;
use super::owners::OwnerState;
use super::placement::OPERATOR;
use crate::bounds;
use crate::session::open::end_for_good;

fn invalid(field: &str, why: String) -> InvalidField {
    InvalidField { field: field.to_owned(), why }
}

fn declare_error(error: DeclareError) -> CreateVmError {
    match error {
        DeclareError::InvalidField(error) => error.into(),
        DeclareError::LimitReached(error) => error.into(),
        DeclareError::DeviceExists(error) => invalid("name", error.to_string()).into(),
        DeclareError::UnknownOwner(error) => invalid("number", error.to_string()).into(),
    }
}

impl Host {
    /// Creates a virtual machine of a hypervisor.
    pub async fn create_vm(
        &self,
        hypervisor: &Arc<HypervisorState>,
        name: String,
        number: Option<u32>,
        asked: TenantLimits,
    ) -> Result<u32, CreateVmError> {
        let limits = within(&self.kernel.config().owner, asked)?;
        // It is not destroyed before it stands, certificate included.
        let _in_turn = hypervisor.moves.lock().await;
        let number = {
            let mut topology = self.topology.write();
            let mut last = self.last_vm.lock();
            let free = |number: &u32| topology.owner(Owner::Vm(*number)).is_err();
            // Upwards, so that what still means an earlier machine by its number does not mean another one soon.
            let mut upwards = (last.wrapping_add(1).max(1)..=u32::MAX).chain(1..=u32::MAX);
            let next = || upwards.find(free).expect("owners are fewer than numbers");
            let chosen = number.unwrap_or_else(next);
            let entry = OwnerEntry { owner: Owner::Vm(chosen), name: name.clone() };
            topology.declare_owner(entry).map_err(declare_error)?;
            if number.is_none() {
                // What was asked for by number, or refused, moves nothing.
                *last = chosen;
            }
            chosen
        };
        let owner = Owner::Vm(number);
        let made = hypervisor.add_vm(number).and_then(|()| self.kernel.account_with(owner, limits));
        let account = made.inspect_err(|_| {
            hypervisor.remove_vm(owner);
            let removed = self.topology.write().remove_owner(owner);
            removed.expect("it was just declared, and nobody has heard of it");
        })?;
        let state = OwnerState::new(&self.kernel, account, name, asked).of_hypervisor(hypervisor);
        let name = state.name.clone();
        // First the certificate: with that of an earlier one nobody finds this one open.
        self.peer_comes(&name, Role::Driver(owner)).await;
        self.owners.insert(Arc::new(state));
        tracing::info!(%owner, hypervisor = %hypervisor.name, "virtual machine created");
        Ok(number)
    }

    /// A virtual machine of a hypervisor.
    pub(super) fn vm_of(
        &self,
        hypervisor: &HypervisorState,
        number: u32,
    ) -> Result<Arc<OwnerState>, VmOfError> {
        let state = self.owners.get(Owner::Vm(number))?;
        if !hypervisor.owns(state.owner) {
            return Err(NotYours { object: state.owner.to_string() }.into());
        }
        Ok(state)
    }

    /// Destroys a virtual machine of a hypervisor.
    pub async fn destroy_vm(
        self: &Arc<Self>,
        hypervisor: &Arc<HypervisorState>,
        number: u32,
        why: &str,
    ) -> Result<(), DestroyVmError> {
        let _in_turn = hypervisor.moves.lock().await;
        let owner = self.vm_of(hypervisor, number)?;
        owner.is_leaving.store(true, Ordering::Release);
        end_for_good(self, &owner, why).await;
        // What of its memory is on the move arrives, or stays, before it is taken back. Not before: calls of its driver wait for this lock too.
        let _steady = owner.direct_maps.lock().await;
        self.release_all(&owner).await;
        for slot in self.domains.list(|slot| slot.owner == owner.owner) {
            self.dissolve(&slot).await;
        }
        self.wait_for_mappings(&owner).await;
        self.wipe_all_of(&owner).await;
        self.forget_vm(hypervisor, &owner).await;
        tracing::info!(owner = %owner.owner, hypervisor = %hypervisor.name, reason = why, "virtual machine destroyed");
        Ok(())
    }

    /// Releases every device of an owner, all at once: one that does not answer its reset holds up no other.
    async fn release_all(self: &Arc<Self>, owner: &OwnerState) {
        let mut releases = tokio::task::JoinSet::new();
        for device in self.topology.read().devices_of(owner.owner) {
            let (host, owner) = (Arc::clone(self), owner.owner);
            releases.spawn(async move {
                if let Err(reason) = host.release(device, owner, OPERATOR).await {
                    tracing::error!(%owner, %device, %reason, "device not released");
                }
            });
        }
        releases.join_all().await;
    }

    /// Forgets a virtual machine that holds nothing; its number and name are free from the last line on.
    async fn forget_vm(&self, hypervisor: &HypervisorState, owner: &OwnerState) {
        self.faults.forget(owner.owner);
        self.reports.forget(owner.owner);
        self.peer_goes(&owner.name, Role::Driver(owner.owner)).await;
        while !self.kernel.forget_account(owner.owner) {
            // A call that was refused a moment ago is giving back what it had begun to take.
            tokio::time::sleep(bounds::RECLAIM_TICK).await;
        }
        self.owners.remove(owner.owner);
        hypervisor.remove_vm(owner.owner);
        let removed = self.topology.write().remove_owner(owner.owner);
        if let Err(reason) = removed {
            tracing::error!(owner = %owner.owner, %reason, "owner not forgotten");
        }
    }

    /// Takes back everything that a hypervisor holds: its virtual machines, and the functions that it declared.
    pub async fn reclaim_hypervisor(self: &Arc<Self>, hypervisor: &Arc<HypervisorState>, why: &str) {
        for number in hypervisor.vms() {
            if let Err(reason) = self.destroy_vm(hypervisor, number, why).await {
                tracing::error!(vm = number, hypervisor = %hypervisor.name, %reason, "virtual machine not destroyed");
            }
        }
        self.forget_functions_of(hypervisor).await;
    }
}

/// Why a virtual machine is not a hypervisor's to use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VmOfError {
    /// There is none of the number.
    #[error(transparent)]
    UnknownOwner(#[from] UnknownOwner),
    /// Another's.
    #[error(transparent)]
    NotYours(#[from] NotYours),
}

macro_rules! into_operations {
    ($($operation:ident),*) => { $(
        impl From<VmOfError> for iommu_types::errors::$operation {
            fn from(error: VmOfError) -> Self {
                match error {
                    VmOfError::UnknownOwner(error) => error.into(),
                    VmOfError::NotYours(error) => error.into(),
                }
            }
        }
    )* };
}
into_operations!(DestroyVmError, AddMemoryError, TakeMemoryError, AssignError);
