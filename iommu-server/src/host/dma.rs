//! The DMA API and the domain API of an owner, over its default and explicit domains.
//!
//! An unmap is answered after its drain (I1): at once where all DMA is quiet, else after waiting with no lock held.

use std::sync::Arc;

use iommu_kernel::{
    DmaMap, DmaSync, DmaUnmap, DmaUnmapSg, Domain, MapFixed, OwnerMemory, PendingUnmap, Segment,
};
use iommu_types::errors::{
    DmaMapError, DmaSyncError, DmaUnmapError, InvalidField, MapError, NotAttached, NotYours, UnknownDevice,
    UnknownDomain, UnmapError,
};
use iommu_types::{
    DeviceAddress, Direction, DmaAttributes, DomainId, GpaRange, Iova, IovaRange, Owner, Protection,
    RequestId,
};

use super::Host;
use super::domains::{DomainSlot, Unsettled};
use super::owners::OwnerState;
use super::placement::DeviceOfError;
use crate::telemetry;

/// Results of a batch of unmaps, and what is left to settle before they are told.
pub type Unmapped = (Vec<Result<(), DmaUnmapError>>, Option<Unsettled>);

/// Why a domain is not an owner's to use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DomainOfError {
    /// There is none.
    UnknownDomain(UnknownDomain),
    /// Another's.
    NotYours(NotYours),
}

macro_rules! into_operations {
    ($($operation:ty),*) => { $(
        impl From<DomainOfError> for $operation {
            fn from(error: DomainOfError) -> Self {
                match error {
                    DomainOfError::UnknownDomain(error) => error.into(),
                    DomainOfError::NotYours(error) => error.into(),
                }
            }
        }
    )* };
}
into_operations!(MapError, UnmapError);

/// Why a device has no domain that its driver could map in.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AttachedDomainError {
    /// Not declared.
    #[error(transparent)]
    UnknownDevice(#[from] UnknownDevice),
    /// Another's.
    #[error(transparent)]
    NotYours(#[from] NotYours),
    /// Attached to nothing.
    #[error(transparent)]
    NotAttached(#[from] NotAttached),
}

impl From<DeviceOfError> for AttachedDomainError {
    fn from(error: DeviceOfError) -> Self {
        match error {
            DeviceOfError::UnknownDevice(error) => error.into(),
            DeviceOfError::NotYours(error) => error.into(),
        }
    }
}

macro_rules! attached_into_operations {
    ($($operation:ty),*) => { $(
        impl From<AttachedDomainError> for $operation {
            fn from(error: AttachedDomainError) -> Self {
                match error {
                    AttachedDomainError::UnknownDevice(error) => error.into(),
                    AttachedDomainError::NotYours(error) => error.into(),
                    AttachedDomainError::NotAttached(error) => error.into(),
                }
            }
        }
    )* };
}
attached_into_operations!(DmaMapError);

/// What is mapped by one call, and how.
#[derive(Clone, Copy, Debug)]
pub struct MapAsk {
    /// Which way data flows.
    pub direction: Direction,
    /// The client's number for the request.
    pub request_id: RequestId,
    /// What is special about it.
    pub attributes: DmaAttributes,
    /// Ring domains: the ring.
    pub ring: u16,
    /// Which of the client's threads asks.
    pub client: u8,
}

impl MapAsk {
    fn of(self, range: GpaRange) -> DmaMap {
        let Self { direction, request_id, attributes, ring, client } = self;
        DmaMap { attributes, ring, client, ..DmaMap::single(range, direction, request_id) }
    }
}

/// Only ring domains have rings; elsewhere the number is 0.
fn check_ring(domain: &Domain, ring: u16) -> Result<(), InvalidField> {
    if ring == 0 || matches!(domain.protection(), Protection::Ring(_)) {
        return Ok(());
    }
    let why = format!("is {ring}, and a {} domain has no rings; leave it out", domain.protection().name());
    Err(InvalidField { field: "ring".to_owned(), why })
}

/// Whether giving up what a domain keeps may help.
fn is_shortage(error: &DmaMapError) -> bool {
    matches!(
        error,
        DmaMapError::IovaExhausted(_) | DmaMapError::OutOfMemory(_) | DmaMapError::LimitReached(_)
    )
}

impl Host {
    /// The domains in which the DMA API of an owner may have mapped for a device: the one that it is attached to, and its default domain.
    fn dma_domains(
        &self,
        owner: Owner,
        device: DeviceAddress,
    ) -> Result<impl Iterator<Item = Arc<DomainSlot>>, DeviceOfError> {
        let attached = self.device_of(owner, device)?.domain_id;
        let attached = attached.and_then(|id| self.domains.get(id).ok()).filter(|slot| slot.owner == owner);
        let default = self.domains.default_of(owner, device);
        let default = default.filter(|slot| attached.as_ref().is_none_or(|attached| attached.id != slot.id));
        Ok(attached.into_iter().chain(default))
    }

    /// The domain that the DMA API maps in: the one that the device is attached to. A mapping elsewhere would be of no use to it.
    pub fn attached_domain(
        &self,
        owner: Owner,
        device: DeviceAddress,
    ) -> Result<Arc<DomainSlot>, AttachedDomainError> {
        let attached = self.device_of(owner, device)?.domain_id;
        let slot = attached.and_then(|id| self.domains.get(id).ok()).filter(|slot| slot.owner == owner);
        Ok(slot.ok_or(NotAttached { device })?)
    }

    /// Runs a map. When the domain runs out of something, it gives up what it keeps and does not need, and the map is tried once more.
    async fn map_with_reclaim<R>(
        &self,
        owner: &OwnerState,
        device: DeviceAddress,
        map: impl Fn(&mut Domain, &OwnerMemory) -> Result<R, DmaMapError>,
    ) -> Result<R, DmaMapError> {
        let slot = self.attached_domain(owner.owner, device)?;
        let attempt = || {
            let memory = owner.memory.read();
            // A domain that is gone was the device's domain until just now.
            slot.map_with(&self.kernel, |domain| map(domain, &memory)).map_err(|_| NotAttached { device })?
        };
        let outcome = attempt();
        match &outcome {
            Err(error) if is_shortage(error) => {}
            _ => return outcome,
        }
        let given_up = slot.unmap_with(&self.kernel, |domain| ((), Some(domain.reclaim(&self.kernel))));
        if let Ok(((), Some(unsettled))) = given_up {
            unsettled.settle().await;
        }
        attempt()
    }

    /// Maps one buffer.
    pub async fn dma_map(
        &self,
        owner: &OwnerState,
        device: DeviceAddress,
        request: DmaMap,
    ) -> Result<Iova, DmaMapError> {
        let now = telemetry::now();
        let map = |domain: &mut Domain, memory: &OwnerMemory| {
            check_ring(domain, request.ring)?;
            domain.dma_map(&self.kernel, memory, request, now)
        };
        self.map_with_reclaim(owner, device, map).await
    }

    /// Maps many buffers for one DMA.
    pub async fn dma_map_sg(
        &self,
        owner: &OwnerState,
        device: DeviceAddress,
        ranges: &[GpaRange],
        ask: MapAsk,
    ) -> Result<Vec<Segment>, DmaMapError> {
        let now = telemetry::now();
        let Some(first) = ranges.first() else {
            let why = "must have at least one element".to_owned();
            return Err(InvalidField { field: "gpa".to_owned(), why }.into());
        };
        let request = ask.of(*first);
        let map = |domain: &mut Domain, memory: &OwnerMemory| {
            check_ring(domain, request.ring)?;
            domain.dma_map_sg(&self.kernel, memory, ranges, request, now)
        };
        self.map_with_reclaim(owner, device, map).await
    }

    /// Maps many buffers under one lock. The error is that of the whole batch. What fails for want of something is not tried again: a
    /// stream goes on.
    pub fn dma_map_batch(
        &self,
        owner: &OwnerState,
        device: DeviceAddress,
        ranges: impl Iterator<Item = Result<GpaRange, iommu_types::InvalidRange>>,
        ask: MapAsk,
    ) -> Result<Vec<Result<Iova, DmaMapError>>, DmaMapError> {
        let slot = self.attached_domain(owner.owner, device)?;
        let memory = owner.memory.read();
        let now = telemetry::now();
        let mapped = slot.map_with(&self.kernel, |domain| {
            check_ring(domain, ask.ring)?;
            Ok(ranges.map(|range| domain.dma_map(&self.kernel, &memory, ask.of(range?), now)).collect())
        });
        mapped.map_err(|_| NotAttached { device })?
    }

    /// Unmaps many buffers with one invalidation and one drain. Works while the device is detached, too: what was mapped can be unmapped.
    pub fn dma_unmap_batch(
        &self,
        owner: Owner,
        device: DeviceAddress,
        requests: &[DmaUnmap],
    ) -> Result<Unmapped, DmaUnmapError> {
        let now = telemetry::now();
        let mut last = Err(NotAttached { device }.into());
        for slot in self.dma_domains(owner, device)? {
            let unmapped = slot.unmap_with(&self.kernel, |domain| {
                let (results, pending) = domain.dma_unmap_batch(&self.kernel, requests, now);
                (results, Some(pending))
            });
            let Ok((results, unsettled)) = unmapped else { continue };
            let is_elsewhere = !results.is_empty()
                && results.iter().all(|result| matches!(result, Err(DmaUnmapError::NotMapped(_))));
            if !is_elsewhere {
                return Ok((results, unsettled));
            }
            last = Ok((results, unsettled));
        }
        last
    }

    /// Unmaps one buffer; resolves when it may be answered.
    pub async fn dma_unmap(
        &self,
        owner: Owner,
        device: DeviceAddress,
        request: DmaUnmap,
    ) -> Result<(), DmaUnmapError> {
        let (results, unsettled) = self.dma_unmap_batch(owner, device, &[request])?;
        if let Some(unsettled) = unsettled {
            unsettled.settle().await;
        }
        results.into_iter().collect()
    }

    /// Unmaps a scatter-gather mapping; resolves when it may be answered.
    pub async fn dma_unmap_sg(
        &self,
        owner: Owner,
        device: DeviceAddress,
        request: DmaUnmapSg,
    ) -> Result<(), DmaUnmapError> {
        let now = telemetry::now();
        let mut last = Err(NotAttached { device }.into());
        for slot in self.dma_domains(owner, device)? {
            let unmapped = slot.unmap_with(&self.kernel, |domain| {
                match domain.dma_unmap_sg(&self.kernel, request, now) {
                    Ok(pending) => (Ok(()), Some(pending)),
                    Err(error) => (Err(error), None),
                }
            });
            let Ok((result, unsettled)) = unmapped else { continue };
            if let Some(unsettled) = unsettled {
                unsettled.settle().await;
            }
            last = result;
            if !matches!(last, Err(DmaUnmapError::NotMapped(_))) {
                break;
            }
        }
        last
    }

    /// Syncs a part of a mapping.
    pub fn dma_sync(
        &self,
        owner: Owner,
        device: DeviceAddress,
        request: DmaSync,
    ) -> Result<(), DmaSyncError> {
        let now = telemetry::now();
        let mut last = Err(NotAttached { device }.into());
        for slot in self.dma_domains(owner, device)? {
            let Ok(result) = slot.with(|domain| domain.dma_sync(&self.kernel, request, now)) else {
                continue;
            };
            last = result;
            if !matches!(last, Err(DmaSyncError::NotMapped(_))) {
                break;
            }
        }
        last
    }

    /// The domain `id` of this owner.
    pub fn domain_of(&self, owner: Owner, id: DomainId) -> Result<Arc<DomainSlot>, DomainOfError> {
        let slot = self.domains.get(id).map_err(DomainOfError::UnknownDomain)?;
        if slot.owner != owner {
            return Err(DomainOfError::NotYours(NotYours { object: format!("domain {id}") }));
        }
        Ok(slot)
    }

    /// Maps at a fixed address.
    pub fn map_fixed(&self, owner: &OwnerState, id: DomainId, map: MapFixed) -> Result<(), MapError> {
        let slot = self.domain_of(owner.owner, id)?;
        let memory = owner.memory.read();
        slot.with(|domain| domain.map(&self.kernel, &memory, map, telemetry::now()))?
    }

    /// Unmaps a range; resolves with the bytes removed when it is quiet.
    pub async fn unmap_fixed(&self, owner: Owner, id: DomainId, range: IovaRange) -> Result<u64, UnmapError> {
        let slot = self.domain_of(owner, id)?;
        let (unmapped, unsettled) = slot.unmap_with(&self.kernel, |domain| {
            match domain.unmap(&self.kernel, range, telemetry::now()) {
                Ok(pending) => {
                    let bytes = pending.undone.unmapped_bytes();
                    (Ok(bytes), Some(pending))
                }
                Err(error) => (Err(error), None::<PendingUnmap>),
            }
        })?;
        if let Some(unsettled) = unsettled {
            unsettled.settle().await;
        }
        unmapped
    }
}
