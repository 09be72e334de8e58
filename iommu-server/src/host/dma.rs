//! The DMA API and the domain API of an owner, over its default and explicit domains.
//!
//! An unmap is answered after its drain (I1): at once where all DMA is quiet, else after waiting with no lock held.

use std::sync::Arc;

use iommu_kernel::{DmaMap, DmaUnmap, MapFixed, PendingUnmap};
use iommu_types::errors::{
    DmaMapError, DmaUnmapError, MapError, NotAttached, NotYours, UnknownDomain, UnmapError,
};
use iommu_types::{DeviceAddress, Direction, DomainId, GpaRange, Iova, IovaRange, Owner, RequestId};

use super::Host;
use super::domains::{DomainSlot, Unsettled};
use super::owners::OwnerState;
use super::placement::DeviceOfError;

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

impl Host {
    /// The domain that the DMA API uses for a device of this owner: its default domain.
    fn dma_domain(
        &self,
        owner: Owner,
        device: DeviceAddress,
    ) -> Result<Option<Arc<DomainSlot>>, DeviceOfError> {
        self.device_of(owner, device)?;
        Ok(self.domains.default_of(owner, device))
    }

    /// The same, when the device is attached to it: a mapping elsewhere would be of no use to it.
    fn attached_dma_domain(
        &self,
        owner: Owner,
        device: DeviceAddress,
    ) -> Result<Arc<DomainSlot>, DmaMapError> {
        let attached = self.device_of(owner, device)?.domain_id;
        let slot = self.domains.default_of(owner, device).filter(|slot| Some(slot.id) == attached);
        Ok(slot.ok_or(NotAttached { device })?)
    }

    /// Maps one buffer.
    pub fn dma_map(
        &self,
        owner: &OwnerState,
        device: DeviceAddress,
        map: DmaMap,
    ) -> Result<Iova, DmaMapError> {
        let slot = self.attached_dma_domain(owner.owner, device)?;
        let memory = owner.memory.read();
        // A domain that is gone was the device's default domain until just now.
        slot.with(|domain| domain.dma_map(&self.kernel, &memory, map)).map_err(|_| NotAttached { device })?
    }

    /// Maps many buffers under one lock. The error is that of the whole batch.
    pub fn dma_map_batch(
        &self,
        owner: &OwnerState,
        device: DeviceAddress,
        ranges: impl Iterator<Item = Result<GpaRange, iommu_types::InvalidRange>>,
        direction: Direction,
        request_id: RequestId,
    ) -> Result<Vec<Result<Iova, DmaMapError>>, DmaMapError> {
        let slot = self.attached_dma_domain(owner.owner, device)?;
        let memory = owner.memory.read();
        let mapped = slot.with(|domain| {
            ranges
                .map(|range| {
                    let map = DmaMap { range: range?, direction, request_id, coherent: false };
                    domain.dma_map(&self.kernel, &memory, map)
                })
                .collect()
        });
        Ok(mapped.map_err(|_| NotAttached { device })?)
    }

    /// Unmaps many buffers with one invalidation and one drain. Works while the device is detached, too: what was mapped can be unmapped.
    pub fn dma_unmap_batch(
        &self,
        owner: Owner,
        device: DeviceAddress,
        requests: &[DmaUnmap],
    ) -> Result<Unmapped, DmaUnmapError> {
        let slot = self.dma_domain(owner, device)?.ok_or(NotAttached { device })?;
        let unmapped = slot.unmap_with(&self.kernel, |domain| {
            let (results, pending) = domain.dma_unmap_batch(&self.kernel, requests);
            (results, Some(pending))
        });
        Ok(unmapped.map_err(|_| NotAttached { device })?)
    }

    /// Unmaps one buffer; resolves when it is quiet.
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
        slot.with(|domain| domain.map(&self.kernel, &memory, map))?
    }

    /// Unmaps a range; resolves with the bytes removed when it is quiet.
    pub async fn unmap_fixed(&self, owner: Owner, id: DomainId, range: IovaRange) -> Result<u64, UnmapError> {
        let slot = self.domain_of(owner, id)?;
        let (unmapped, unsettled) =
            slot.unmap_with(&self.kernel, |domain| match domain.unmap(&self.kernel, range) {
                Ok(pending) => {
                    let bytes = pending.undone.unmapped_bytes();
                    (Ok(bytes), Some(pending))
                }
                Err(error) => (Err(error), None::<PendingUnmap>),
            })?;
        if let Some(unsettled) = unsettled {
            unsettled.settle().await;
        }
        unmapped
    }
}
