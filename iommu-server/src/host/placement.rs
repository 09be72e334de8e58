//! Where devices are attached, and to whom they belong.
//!
//! A device is moved by one call at a time (its `placement` lock). First what is new is made, so that a refusal changes nothing; then the device
//! is detached and drained; then it is attached. In between it is attached to nothing and every DMA of it is refused.

use std::sync::Arc;

use iommu_kernel::DeviceEntry;
use iommu_types::errors::{
    AttachError, CreateDomainError, DestroyDomainError, DetachError, DomainInUse, LimitReached, NotYours,
    UnknownDevice,
};
use iommu_types::{DeviceAddress, DomainId, DomainOptions, Owner, Protection};

use super::Host;
use super::devices::DeviceState;
use super::domains::DomainSlot;
use super::owners::OwnerState;

fn not_yours(object: impl std::fmt::Display) -> NotYours {
    NotYours { object: object.to_string() }
}

impl Host {
    /// The entry of a device that belongs to `owner`.
    pub fn device_of(&self, owner: Owner, device: DeviceAddress) -> Result<DeviceEntry, DeviceOfError> {
        let topology = self.topology.read();
        let entry = topology.device(device)?;
        if entry.owner != Some(owner) {
            return Err(not_yours(device).into());
        }
        Ok(entry.clone())
    }

    /// Whether the device is still the one at its address. It may have been removed, and another declared there, while a call waited for
    /// its placement.
    fn still_declared(&self, device: &Arc<DeviceState>) -> Result<(), UnknownDevice> {
        let declared = self.devices.get(device.address)?;
        if Arc::ptr_eq(&declared, device) { Ok(()) } else { Err(UnknownDevice { device: device.address }) }
    }

    /// The default domain of a pair; made when there is none.
    fn default_domain(
        &self,
        owner: &OwnerState,
        device: DeviceAddress,
    ) -> Result<Arc<DomainSlot>, CreateDomainError> {
        if let Some(slot) = self.domains.default_of(owner.owner, device) {
            return Ok(slot);
        }
        let domain = self.kernel.create_domain(&owner.account, DomainOptions::new(Protection::Strict))?;
        Ok(self.domains.insert(domain, Some(device)))
    }

    /// Gives a device to an owner and attaches it: to a domain of that owner, or to its default domain of the device.
    pub async fn give(
        self: &Arc<Self>,
        device: &Arc<DeviceState>,
        owner: &Arc<OwnerState>,
        domain_id: Option<DomainId>,
    ) -> Result<DomainId, AttachError> {
        let _placement = device.placement.lock().await;
        self.give_locked(device, owner, domain_id).await
    }

    /// The same for a device that the owner already has: it may have been given to another while this call waited.
    pub async fn give_own(
        self: &Arc<Self>,
        device: &Arc<DeviceState>,
        owner: &Arc<OwnerState>,
        domain_id: Option<DomainId>,
    ) -> Result<DomainId, AttachError> {
        let _placement = device.placement.lock().await;
        self.device_of(owner.owner, device.address)?;
        self.give_locked(device, owner, domain_id).await
    }

    async fn give_locked(
        self: &Arc<Self>,
        device: &Arc<DeviceState>,
        owner: &Arc<OwnerState>,
        domain_id: Option<DomainId>,
    ) -> Result<DomainId, AttachError> {
        let address = device.address;
        self.still_declared(device)?;
        let before = self.topology.read().device(address)?.clone();
        let had_default = self.domains.default_of(owner.owner, address).is_some();
        let default = self.default_domain(owner, address).map_err(create_error)?;
        let target = match domain_id {
            None => Arc::clone(&default),
            Some(id) => {
                let slot = self.domains.get(id).map_err(AttachError::from).and_then(|slot| {
                    if slot.owner == owner.owner && slot.default_of.is_none_or(|of| of == address) {
                        Ok(slot)
                    } else {
                        Err(not_yours(format!("domain {id}")).into())
                    }
                });
                match slot {
                    Ok(slot) => slot,
                    Err(error) => {
                        if !had_default {
                            self.dissolve(&default).await;
                        }
                        return Err(error);
                    }
                }
            }
        };
        if before.domain_id == Some(target.id) {
            return Ok(target.id);
        }
        self.detach_locked(device).await;
        if let Some(former) = before.owner.filter(|former| *former != owner.owner) {
            self.leave_owner(device, former).await;
        }
        self.attach_now(device, owner, &target)?;
        Ok(target.id)
    }

    fn attach_now(
        &self,
        device: &DeviceState,
        owner: &Arc<OwnerState>,
        target: &Arc<DomainSlot>,
    ) -> Result<(), AttachError> {
        let mut topology = self.topology.write();
        topology.device(device.address)?;
        target.with(|domain| self.kernel.attach(device.address.source_id, domain))??;
        topology.set_attached(device.address, owner.owner, target.id)?;
        drop(topology);
        device.set_owner(Some(Arc::clone(owner)));
        Ok(())
    }

    /// Detaches a device, invalidated and drained. Nothing to do when it is attached to nothing.
    async fn detach_locked(&self, device: &DeviceState) -> Option<DomainId> {
        let (domain_id, drain) = {
            let mut topology = self.topology.write();
            let domain_id = topology.set_detached(device.address).ok()?;
            let slot = self.domains.get(domain_id).expect("a domain with a device is in the registry");
            let drain = slot.with(|domain| self.kernel.detach(device.address.source_id, domain));
            (domain_id, drain.expect("a domain with a device is not destroyed"))
        };
        let _drained = drain.await;
        Some(domain_id)
    }

    /// Detaches a device; it keeps its owner.
    pub async fn detach(&self, device: &DeviceState) -> Result<(), DetachError> {
        let _placement = device.placement.lock().await;
        self.detach_or_say_why(device).await
    }

    /// The same for a device that the owner still has.
    pub async fn detach_own(&self, device: &DeviceState, owner: Owner) -> Result<(), DetachError> {
        let _placement = device.placement.lock().await;
        self.device_of(owner, device.address)?;
        self.detach_or_say_why(device).await
    }

    async fn detach_or_say_why(&self, device: &DeviceState) -> Result<(), DetachError> {
        match self.detach_locked(device).await {
            Some(_) => Ok(()),
            None => {
                // Says which of the two reasons it is: unknown, or attached to nothing.
                self.topology.read().device(device.address)?;
                Err(iommu_types::errors::NotAttached { device: device.address }.into())
            }
        }
    }

    /// What a former owner had for a device goes: what the device holds of it, interrupts, the default domain with its mappings.
    async fn leave_owner(&self, device: &DeviceState, former: Owner) {
        device.set_owner(None);
        if let Some(session) = device.session() {
            session.reset().await;
        }
        let drain = self.kernel.free_interrupts(device.address.source_id);
        let _drained = drain.await;
        // What it was refused until now is the former owner's to see, and nobody else's.
        self.faults.collect(self);
        if let Some(slot) = self.domains.default_of(former, device.address) {
            self.dissolve(&slot).await;
        }
    }

    /// Destroys a domain to which nothing is attached.
    pub(super) async fn dissolve(&self, slot: &Arc<DomainSlot>) {
        let Some(domain) = slot.take().await else { return };
        // Out of the registry before its identifier can be given to another.
        self.domains.remove(slot);
        let mut destroy = self.kernel.destroy_domain(domain);
        let drained = destroy.take_drain().await;
        destroy.finish(&self.kernel, drained);
    }

    /// Destroys an explicit domain of `owner`.
    pub async fn destroy_domain(
        self: &Arc<Self>,
        owner: Owner,
        id: DomainId,
    ) -> Result<(), DestroyDomainError> {
        let slot = self.domains.get(id)?;
        if slot.owner != owner {
            return Err(not_yours(format!("domain {id}")).into());
        }
        if let Some(device) = slot.default_of {
            // A default domain lives as long as its owner has the device.
            return Err(DomainInUse { domain_id: id, device }.into());
        }
        {
            // Nobody attaches a device meanwhile: attaching needs this lock too.
            let topology = self.topology.write();
            if let Some(device) = topology.attached_to(id).first() {
                return Err(DomainInUse { domain_id: id, device: *device }.into());
            }
            slot.close();
        }
        self.dissolve(&slot).await;
        Ok(())
    }

    /// Forgets a device: session, attachment, interrupts, default domain.
    pub async fn remove_device(self: &Arc<Self>, address: DeviceAddress) -> Result<(), UnknownDevice> {
        let device = self.devices.get(address)?;
        self.topology.read().device(address)?;
        device.remove();
        let _placement = device.placement.lock().await;
        self.still_declared(&device)?;
        self.detach_locked(&device).await;
        // The address can be declared anew from the last line on, so nothing of this device is left then.
        let owner = self.topology.read().device(address)?.owner;
        if let Some(owner) = owner {
            self.leave_owner(&device, owner).await;
        }
        self.devices.remove(address);
        self.topology.write().remove_device(address)?;
        Ok(())
    }

    /// Puts a device of an owner back where the configuration has it: on the owner's default domain.
    pub(super) async fn restore(self: &Arc<Self>, owner: &Arc<OwnerState>, address: DeviceAddress) {
        let Ok(device) = self.devices.get(address) else { return };
        let _placement = device.placement.lock().await;
        if self.device_of(owner.owner, address).is_err() {
            return;
        }
        if let Err(reason) = self.give_locked(&device, owner, None).await {
            tracing::error!(device = %address, owner = %owner.owner, %reason, "device not attached again");
        }
    }
}

fn create_error(error: CreateDomainError) -> AttachError {
    match error {
        CreateDomainError::OutOfMemory(error) => error.into(),
        CreateDomainError::LimitReached(error) => error.into(),
        CreateDomainError::InvalidField(error) => LimitReached { limit: error.field, allowed: 0 }.into(),
    }
}

/// Why a device is not an owner's to use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceOfError {
    /// Not declared.
    #[error(transparent)]
    UnknownDevice(#[from] UnknownDevice),
    /// Another's.
    #[error(transparent)]
    NotYours(#[from] NotYours),
}

macro_rules! into_operations {
    ($($operation:ty),*) => { $(
        impl From<DeviceOfError> for $operation {
            fn from(error: DeviceOfError) -> Self {
                match error {
                    DeviceOfError::UnknownDevice(error) => error.into(),
                    DeviceOfError::NotYours(error) => error.into(),
                }
            }
        }
    )* };
}
into_operations!(
    iommu_types::errors::DmaMapError,
    iommu_types::errors::DmaUnmapError,
    iommu_types::errors::DmaSyncError,
    iommu_types::errors::InterruptError,
    iommu_types::errors::MmioError,
    AttachError,
    DetachError
);
