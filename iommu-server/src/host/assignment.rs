//! Giving functions to virtual machines, by isolation group.
//!
//! Functions of one group reach each other around the IOMMU, so a group goes to one owner as a whole or to nobody. A function is moved by its
//! [placement](super::placement): detached and drained, reset with its generation raised, and only then attached for its new owner, so that nothing that
//! the old one had queued is carried out in the new one's memory.

use std::sync::Arc;

use iommu_kernel::DeviceEntry;
use iommu_proto::model::FunctionState;
use iommu_types::errors::{
    AssignError, DeclareError, GroupInUse, LimitReached, NotAssignable, NotAttached, ReleaseError,
    RemoveDeviceError,
};
use iommu_types::{DeviceAddress, Generation, Owner, PciFunction, RequestId, Role};

use super::Host;
use super::hypervisors::HypervisorState;
use super::placement::not_yours;
use crate::bounds;

impl Host {
    /// Whether a function is a hypervisor's to assign: nobody's, or one of its virtual machines'; and declared by itself or by no hypervisor.
    fn may_assign(&self, hypervisor: &HypervisorState, entry: &DeviceEntry) -> bool {
        let declared_by_another = entry.declared_by.as_ref().is_some_and(|name| *name != hypervisor.name);
        !declared_by_another && entry.owner.is_none_or(|owner| hypervisor.owns(owner))
    }

    /// Describes a function for a hypervisor.
    pub async fn declare_function(
        self: &Arc<Self>,
        hypervisor: &HypervisorState,
        address: DeviceAddress,
        name: String,
        function: PciFunction,
    ) -> Result<(), DeclareError> {
        let declared_by = Some(hypervisor.name.clone());
        // One at a time, so that as many as are allowed are found here.
        let _in_turn = hypervisor.moves.lock().await;
        let own = self.topology.read().devices().filter(|entry| entry.declared_by == declared_by).count();
        if own >= bounds::FUNCTIONS_PER_HYPERVISOR_MAX {
            let allowed = bounds::FUNCTIONS_PER_HYPERVISOR_MAX as u64;
            return Err(LimitReached { limit: "functions_per_hypervisor".to_owned(), allowed }.into());
        }
        let entry = DeviceEntry::new(address, name.clone(), None);
        self.declare_device(DeviceEntry { function, declared_by, ..entry }).await?;
        self.peer_comes(&name, Role::Device(address)).await;
        tracing::info!(device = %address, hypervisor = %hypervisor.name, "function declared");
        Ok(())
    }

    /// Forgets a function that the hypervisor declared and nobody has.
    pub async fn remove_function(
        self: &Arc<Self>,
        hypervisor: &HypervisorState,
        address: DeviceAddress,
    ) -> Result<(), RemoveDeviceError> {
        // Nobody assigns it meanwhile.
        let _in_turn = hypervisor.moves.lock().await;
        {
            let topology = self.topology.read();
            let entry = topology.device(address)?;
            if entry.declared_by.as_ref() != Some(&hypervisor.name) {
                return Err(not_yours(address).into());
            }
            if let Some(owner) = entry.owner {
                return Err(GroupInUse { device: address, owner }.into());
            }
            topology.check_removable(address)?;
        }
        self.remove_device(address).await
    }

    /// Forgets the functions that a hypervisor declared; virtual functions before their physical ones.
    pub(super) async fn forget_functions_of(self: &Arc<Self>, hypervisor: &HypervisorState) {
        let mut own: Vec<DeviceEntry> = {
            let topology = self.topology.read();
            let is_own = |entry: &&DeviceEntry| entry.declared_by.as_ref() == Some(&hypervisor.name);
            topology.devices().filter(is_own).cloned().collect()
        };
        // Virtual functions before their physical ones, what lies below a bridge (on a higher bus) before the bridge.
        own.sort_by_key(|entry| (!entry.function.is_virtual(), std::cmp::Reverse(entry.address)));
        for entry in own {
            if let Err(reason) = self.remove_device(entry.address).await {
                tracing::error!(device = %entry.address, %reason, "function not forgotten");
            }
        }
    }

    /// The functions that a hypervisor may assign or has assigned.
    pub fn functions_of(&self, hypervisor: &HypervisorState) -> Vec<FunctionState> {
        let topology = self.topology.read();
        let groups = topology.groups();
        let state = |entry: &DeviceEntry| {
            let device = self.devices.get(entry.address).ok()?;
            let group = *groups.get(&entry.address)?;
            Some(FunctionState {
                device: entry.address,
                name: entry.name.clone(),
                function: entry.function,
                group,
                owner: entry.owner,
                connected: device.session().is_some(),
                assignment_generation: Generation(device.assignment()),
            })
        };
        topology.devices().filter(|entry| self.may_assign(hypervisor, entry)).filter_map(state).collect()
    }

    /// The functions of a group that can be assigned, all of which the hypervisor may assign: first refused, first told.
    fn group_to_assign(
        &self,
        hypervisor: &HypervisorState,
        address: DeviceAddress,
    ) -> Result<Vec<DeviceEntry>, AssignError> {
        let topology = self.topology.read();
        let named = topology.device(address)?;
        if named.function.is_bridge() {
            let why = "it is a bridge; assign a function below it".to_owned();
            return Err(NotAssignable { device: address, why }.into());
        }
        if !self.may_assign(hypervisor, named) {
            return Err(not_yours(address).into());
        }
        let mut group = Vec::new();
        for member in topology.group_of(address)? {
            let entry = topology.device(member)?;
            if entry.function.is_bridge() {
                continue;
            }
            match entry.owner {
                Some(owner) if !hypervisor.owns(owner) => {
                    return Err(GroupInUse { device: member, owner }.into());
                }
                _ if !self.may_assign(hypervisor, entry) => return Err(not_yours(member).into()),
                _ => group.push(entry.clone()),
            }
        }
        Ok(group)
    }

    /// Assigns the group of a function to a virtual machine. When it fails half-way, what the machine did not have before is nobody's.
    pub async fn assign_group(
        self: &Arc<Self>,
        hypervisor: &Arc<HypervisorState>,
        address: DeviceAddress,
        vm: u32,
        by: RequestId,
    ) -> Result<Vec<DeviceAddress>, AssignError> {
        // One at a time of a hypervisor, and never beside the end of one of its virtual machines.
        let _in_turn = hypervisor.moves.lock().await;
        let owner = self.vm_of(hypervisor, vm)?;
        let group = self.group_to_assign(hypervisor, address)?;
        // What it has already stays as it is, in the domain that its driver chose; what its driver detached is attached again.
        let is_own = |entry: &DeviceEntry| entry.owner == Some(owner.owner);
        let missing: Vec<_> =
            group.iter().filter(|entry| !is_own(entry) || entry.domain_id.is_none()).collect();
        let more = missing.iter().filter(|entry| !is_own(entry)).count();
        let has = self.topology.read().devices_of(owner.owner).len();
        if has + more > bounds::FUNCTIONS_PER_OWNER_MAX {
            let allowed = bounds::FUNCTIONS_PER_OWNER_MAX as u64;
            return Err(LimitReached { limit: "functions_per_owner".to_owned(), allowed }.into());
        }
        let devices = missing.iter().map(|entry| self.devices.get(entry.address));
        let devices = devices.collect::<Result<Vec<_>, _>>()?;
        // All are released before any is given: two owners never have a part each.
        for entry in &missing {
            if let Some(former) = entry.owner.filter(|former| *former != owner.owner) {
                match self.release(entry.address, former, by).await {
                    // Its driver gave it back meanwhile; that it is nobody's is looked at again when it is given.
                    Ok(()) | Err(ReleaseError::NotAttached(_)) => {}
                    Err(ReleaseError::UnknownDevice(error)) => return Err(error.into()),
                    Err(ReleaseError::NotYours(error)) => return Err(error.into()),
                }
            }
        }
        for (given, device) in devices.iter().enumerate() {
            if let Err(error) = self.give_unowned(device, &owner, by).await {
                for entry in missing[..given].iter().filter(|entry| !is_own(entry)) {
                    let _gone = self.release(entry.address, owner.owner, by).await;
                }
                return Err(error);
            }
        }
        tracing::info!(device = %address, functions = devices.len(), owner = %owner.owner, "group assigned");
        Ok(group.into_iter().map(|entry| entry.address).collect())
    }

    /// Releases the group of a function.
    pub async fn release_group(
        self: &Arc<Self>,
        hypervisor: &HypervisorState,
        address: DeviceAddress,
        by: RequestId,
    ) -> Result<Vec<DeviceAddress>, ReleaseError> {
        let _in_turn = hypervisor.moves.lock().await;
        let assigned = {
            let topology = self.topology.read();
            let named = topology.device(address)?;
            let owner = named.owner.ok_or(NotAttached { device: address })?;
            if !hypervisor.owns(owner) {
                return Err(not_yours(address).into());
            }
            let group = topology.group_of(address)?;
            let member = |member: DeviceAddress| {
                topology.device(member).ok().and_then(|entry| Some((member, entry.owner?)))
            };
            group.into_iter().filter_map(member).collect::<Vec<_>>()
        };
        let mut released = Vec::new();
        for (member, owner) in assigned {
            self.release(member, owner, by).await?;
            released.push(member);
        }
        Ok(released)
    }

    /// Takes a device from an owner: detached, drained, reset, nobody's.
    pub(super) async fn release(
        self: &Arc<Self>,
        address: DeviceAddress,
        owner: Owner,
        by: RequestId,
    ) -> Result<(), ReleaseError> {
        let device = self.devices.get(address)?;
        let _placement = device.placement.lock().await;
        self.still_declared(&device)?;
        if self.topology.read().device(address)?.owner != Some(owner) {
            return Err(NotAttached { device: address }.into());
        }
        self.detach_locked(&device, by).await;
        self.leave_owner(&device, owner).await;
        let unowned = self.topology.write().set_owner(address, None);
        unowned.expect("a declared device that was just detached changes hands");
        Ok(())
    }
}
