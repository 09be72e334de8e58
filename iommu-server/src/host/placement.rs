//! Where devices are attached, and to whom they belong.
//!
//! A device is moved by one call at a time (its `placement` lock). First what is new is made, so that a refusal changes nothing; then the device
//! is detached and drained; then it is attached. In between it is attached to nothing and every DMA of it is refused.

use std::sync::Arc;

use iommu_kernel::{DeviceEntry, Domain, Topology};
use iommu_types::errors::{
    AssignError, AttachError, CreateDomainError, DestroyDomainError, DetachError, DmaLimitsError,
    DomainInUse, GroupInUse, LimitReached, NotAssignable, NotAttached, NotYours, RemoveDeviceError,
    UnknownDevice,
};
use iommu_types::{
    DMA_MASK_BITS_MAX, DeviceAddress, DmaLimits, DomainId, DomainOptions, Owner, Protection, RequestId, Role,
};

use super::Host;
use super::devices::DeviceState;
use super::domains::DomainSlot;
use super::owners::OwnerState;

/// Stands where a driver's request is named, for what no driver asked for.
pub const OPERATOR: RequestId = RequestId(0);

/// Bridges are nobody's, and two owners never have a part each of a group of functions that reach each other.
fn check_group(topology: &Topology, device: DeviceAddress, owner: Owner) -> Result<(), AttachError> {
    if topology.device(device)?.function.is_bridge() {
        let why = "it is a bridge; give a function below it".to_owned();
        return Err(NotAssignable { device, why }.into());
    }
    // Who has it already shares its group with nobody: whoever was given or declared a part of it was asked the same.
    if topology.device(device)?.owner == Some(owner) {
        return Ok(());
    }
    match topology.neighbour_of_another(device, owner)? {
        Some((device, owner)) => Err(GroupInUse { device, owner }.into()),
        None => Ok(()),
    }
}

pub(super) fn not_yours(object: impl std::fmt::Display) -> NotYours {
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
    pub(super) fn still_declared(&self, device: &Arc<DeviceState>) -> Result<(), UnknownDevice> {
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
        by: RequestId,
    ) -> Result<DomainId, AttachError> {
        let _placement = device.placement.lock().await;
        self.give_locked(device, owner, domain_id, by).await
    }

    /// The same for a device that must still be nobody's, or the owner's already.
    pub async fn give_unowned(
        self: &Arc<Self>,
        device: &Arc<DeviceState>,
        owner: &Arc<OwnerState>,
        by: RequestId,
    ) -> Result<(), AssignError> {
        let _placement = device.placement.lock().await;
        let now = self.topology.read().device(device.address)?.owner;
        if let Some(now) = now.filter(|now| *now != owner.owner) {
            return Err(GroupInUse { device: device.address, owner: now }.into());
        }
        self.give_locked(device, owner, None, by).await.map(drop).map_err(AssignError::from)
    }

    /// The same for a device that the owner already has: it may have been given to another while this call waited.
    pub async fn give_own(
        self: &Arc<Self>,
        device: &Arc<DeviceState>,
        owner: &Arc<OwnerState>,
        domain_id: Option<DomainId>,
        by: RequestId,
    ) -> Result<DomainId, AttachError> {
        let _placement = device.placement.lock().await;
        self.device_of(owner.owner, device.address)?;
        self.give_locked(device, owner, domain_id, by).await
    }

    async fn give_locked(
        self: &Arc<Self>,
        device: &Arc<DeviceState>,
        owner: &Arc<OwnerState>,
        domain_id: Option<DomainId>,
        by: RequestId,
    ) -> Result<DomainId, AttachError> {
        let address = device.address;
        self.still_declared(device)?;
        owner.still_there()?;
        check_group(&self.topology.read(), address, owner.owner)?;
        let before = self.topology.read().device(address)?.clone();
        let had_default = self.domains.default_of(owner.owner, address).is_some();
        let default = self.default_domain(owner, address).map_err(create_error)?;
        let given = match domain_id {
            None => self.move_to(device, owner, &before, &default, by).await,
            Some(id) => match self.target(owner.owner, address, id) {
                Ok(target) => self.move_to(device, owner, &before, &target, by).await,
                Err(error) => Err(error),
            },
        };
        if given.is_err() && !had_default {
            self.dissolve(&default).await;
        }
        given
    }

    /// The domain `id`, when a device of this owner may be attached to it.
    fn target(
        &self,
        owner: Owner,
        device: DeviceAddress,
        id: DomainId,
    ) -> Result<Arc<DomainSlot>, AttachError> {
        let slot = self.domains.get(id)?;
        if slot.owner != owner || slot.default_of.is_some_and(|of| of != device) {
            return Err(not_yours(format!("domain {id}")).into());
        }
        Ok(slot)
    }

    async fn move_to(
        &self,
        device: &DeviceState,
        owner: &Arc<OwnerState>,
        before: &DeviceEntry,
        target: &Arc<DomainSlot>,
        by: RequestId,
    ) -> Result<DomainId, AttachError> {
        if before.domain_id == Some(target.id) {
            return Ok(target.id);
        }
        let former = before.owner.filter(|former| *former != owner.owner);
        // What a former owner said of it goes with that owner.
        let limits = if former.is_some() { DmaLimits::NONE } else { device.limits() };
        self.fits(limits, target)?;
        self.detach_locked(device, by).await;
        match former {
            Some(former) => self.leave_owner(device, former).await,
            // What it did while it was nobody's is not carried into somebody's domain.
            None if before.owner.is_none() => device.reset().await,
            None => {}
        }
        if target.watched.is_some() {
            // Before it is attached, so that everything that it does there is seen. A batch that began earlier is waited for.
            device.watch(target.watched.clone());
            if let Some(session) = device.session() {
                session.quiet().await;
            }
        }
        self.attach_now(device, owner, target).inspect_err(|_| device.watch(None))?;
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
        // Whoever destroys an owner says so first, and looks under this lock what it has then.
        owner.still_there()?;
        check_group(&topology, device.address, owner.owner)?;
        let limits = self.limits_in(&topology, target.id, Some(device));
        target.with(|domain| {
            self.kernel.attach(device.address.source_id, domain)?;
            // A ring domain has addresses of 64 bits, whatever the device; that it fits was asked before it was detached.
            let _refused = domain.set_limits(limits);
            Ok::<(), AttachError>(())
        })??;
        topology.set_attached(device.address, owner.owner, target.id)?;
        drop(topology);
        target.taken_up();
        device.set_owner(Some(Arc::clone(owner)));
        Ok(())
    }

    /// Detaches a device, invalidated and drained. Nothing to do when it is attached to nothing. What the last device of a domain leaves
    /// mapped there was leaked.
    pub(super) async fn detach_locked(&self, device: &DeviceState, by: RequestId) -> Option<DomainId> {
        let (slot, drain) = {
            let mut topology = self.topology.write();
            let domain_id = topology.set_detached(device.address).ok()?;
            let slot = self.domains.get(domain_id).expect("a domain with a device is in the registry");
            if topology.attached_to(domain_id).is_empty() {
                slot.leaked(by);
            }
            let limits = self.limits_in(&topology, domain_id, None);
            let drain = slot.with(|domain| {
                let drain = self.kernel.detach(device.address.source_id, domain);
                // Those of fewer devices are no stricter, so nothing refuses them.
                let _refused = domain.set_limits(limits);
                drain
            });
            (slot, drain.expect("a domain with a device is not destroyed"))
        };
        let drained = drain.await;
        // One that is being destroyed meanwhile waits for the source by itself.
        let _gone = slot.with(|domain| domain.forget_source(device.address.source_id, drained));
        // Not before: until here its sanitizer is told what the device is refused.
        device.watch(None);
        if slot.gives_unseen() {
            device.unwatched();
        }
        Some(slot.id)
    }

    /// What all devices of a domain can address, together with one that is not attached to it yet.
    fn limits_in(&self, topology: &Topology, id: DomainId, also: Option<&DeviceState>) -> DmaLimits {
        let attached = topology.attached_to(id);
        let attached = attached.iter().filter_map(|address| self.devices.get(*address).ok());
        let attached = attached.map(|device| device.limits());
        attached.chain(also.map(DeviceState::limits)).fold(DmaLimits::NONE, |strictest, limits| DmaLimits {
            mask_bits: strictest.mask_bits.min(limits.mask_bits),
            segment_bytes_max: strictest.segment_bytes_max.min(limits.segment_bytes_max),
            segment_boundary_mask: strictest.segment_boundary_mask.min(limits.segment_boundary_mask),
        })
    }

    /// Whether a device can name the addresses of a domain: those of a ring domain have 64 bits.
    fn fits(&self, limits: DmaLimits, target: &DomainSlot) -> Result<(), AttachError> {
        let is_ring = target.with(|domain| matches!(domain.protection(), Protection::Ring(_)))?;
        if is_ring && limits.mask_bits < DMA_MASK_BITS_MAX {
            let limit = "mask_bits of the device in a ring domain, at least".to_owned();
            return Err(LimitReached { limit, allowed: DMA_MASK_BITS_MAX.into() }.into());
        }
        Ok(())
    }

    /// Says what a device can address. It holds for the domain that it is attached to now, together with what its other devices can, and goes
    /// with the device from domain to domain, until it is given to another owner. Returns what holds from now on.
    pub fn set_dma_limits(
        &self,
        owner: Owner,
        device: DeviceAddress,
        change: impl Fn(DmaLimits) -> DmaLimits,
    ) -> Result<DmaLimits, DmaLimitsError> {
        // With this lock held nobody attaches a device meanwhile.
        let topology = self.topology.write();
        let entry = topology.device(device)?;
        if entry.owner != Some(owner) {
            return Err(not_yours(device).into());
        }
        let slot = entry.domain_id.and_then(|id| self.domains.get(id).ok());
        let slot = slot.filter(|slot| slot.owner == owner).ok_or(NotAttached { device })?;
        let state = self.devices.get(device)?;
        let before = state.limits();
        let wanted = change(before);
        wanted.check()?;
        state.set_limits(wanted);
        let all = self.limits_in(&topology, slot.id, None);
        let set = slot.with(|domain| domain.set_limits(all)).unwrap_or(Err(NotAttached { device }.into()));
        if let Err(refused) = set {
            state.set_limits(before);
            return Err(refused);
        }
        Ok(wanted)
    }

    /// Detaches a device; it keeps its owner.
    pub async fn detach(&self, device: &DeviceState, by: RequestId) -> Result<(), DetachError> {
        let _placement = device.placement.lock().await;
        self.detach_or_say_why(device, by).await
    }

    /// The same for a device that the owner still has.
    pub async fn detach_own(
        &self,
        device: &DeviceState,
        owner: Owner,
        by: RequestId,
    ) -> Result<(), DetachError> {
        let _placement = device.placement.lock().await;
        self.device_of(owner, device.address)?;
        self.detach_or_say_why(device, by).await
    }

    async fn detach_or_say_why(&self, device: &DeviceState, by: RequestId) -> Result<(), DetachError> {
        match self.detach_locked(device, by).await {
            Some(_) => Ok(()),
            None => {
                // Says which of the two reasons it is: unknown, or attached to nothing.
                self.topology.read().device(device.address)?;
                Err(NotAttached { device: device.address }.into())
            }
        }
    }

    /// What a former owner had for a device goes: what the device holds of it, interrupts, the default domain with its mappings.
    pub(super) async fn leave_owner(&self, device: &DeviceState, former: Owner) {
        device.set_owner(None);
        device.set_limits(DmaLimits::NONE);
        device.reset().await;
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
        self.destroy_now(domain).await;
    }

    /// Destroys a domain that is in no registry and to which nothing is attached.
    pub(super) async fn destroy_now(&self, domain: Domain) {
        let mut destroy = self.kernel.destroy_domain(domain);
        let drained = destroy.take_drain().await;
        destroy.finish(&self.kernel, drained);
    }

    /// Destroys an explicit domain of `owner`.
    pub async fn destroy_domain(
        self: &Arc<Self>,
        owner: Owner,
        id: DomainId,
        by: RequestId,
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
            slot.leaked_at_last(by);
            slot.close();
        }
        self.dissolve(&slot).await;
        Ok(())
    }

    /// Forgets a device: session, attachment, interrupts, default domain.
    pub async fn remove_device(self: &Arc<Self>, address: DeviceAddress) -> Result<(), RemoveDeviceError> {
        let device = self.devices.get(address)?;
        // From here on nothing that is declared refers to it, so that its entry can go at the end.
        self.topology.write().begin_removal(address)?;
        device.remove();
        let _placement = device.placement.lock().await;
        self.still_declared(&device)?;
        self.detach_locked(&device, OPERATOR).await;
        // The address can be declared anew from the last line on, so nothing of this device is left then.
        let owner = self.topology.read().device(address)?.owner;
        if let Some(owner) = owner {
            self.leave_owner(&device, owner).await;
        }
        self.peer_goes(&device.name, Role::Device(address)).await;
        self.devices.remove(address);
        self.topology.write().remove_device(address)?;
        Ok(())
    }

    /// Forgets what a driver said that a device can address. The domain that it is attached to goes on with what its other devices can.
    fn without_limits(&self, device: &DeviceState) {
        let topology = self.topology.write();
        device.set_limits(DmaLimits::NONE);
        let attached = topology.device(device.address).ok().and_then(|entry| entry.domain_id);
        if let Some(slot) = attached.and_then(|id| self.domains.get(id).ok()) {
            let limits = self.limits_in(&topology, slot.id, None);
            // Fewer limits are no stricter, so nothing refuses them.
            let _refused = slot.with(|domain| domain.set_limits(limits));
        }
    }

    /// Puts a device of an owner back where the configuration has it: on the owner's default domain.
    pub(super) async fn restore(self: &Arc<Self>, owner: &Arc<OwnerState>, address: DeviceAddress) {
        let Ok(device) = self.devices.get(address) else { return };
        let _placement = device.placement.lock().await;
        if self.device_of(owner.owner, address).is_err() {
            return;
        }
        self.without_limits(&device);
        if let Err(reason) = self.give_locked(&device, owner, None, OPERATOR).await {
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
