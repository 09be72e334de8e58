//! The DMA API and the domain API of an owner, over its default and explicit domains.
//!
//! An unmap is answered after its drain (I1): at once where all DMA is quiet, else after waiting with no lock held.

use std::sync::Arc;

use iommu_kernel::{
    DmaFunction, DmaMap, DmaSync, DmaUnmap, DmaUnmapSg, Domain, Held, MapFixed, OwnerMemory, PendingUnmap,
    Segment,
};
use iommu_types::errors::{
    DmaMapError, DmaSyncError, DmaUnmapError, FreeError, InvalidField, MapError, NotAttached, NotYours,
    UnknownDevice, UnknownDomain, UnmapError,
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
pub type Unmapped = (Vec<Result<(), DmaUnmapError>>, Vec<Unsettled>);

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

/// Why coherent memory was not freed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FreeCoherentError {
    /// Its unmap was refused, and nothing was changed.
    #[error(transparent)]
    Unmap(#[from] DmaUnmapError),
    /// It is unmapped, and cannot be freed.
    #[error(transparent)]
    Free(#[from] FreeError),
}

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

/// Whether a mapping could be found in a domain at all.
fn holds_something(slot: &DomainSlot) -> bool {
    slot.with(|domain| domain.counters().mappings > 0).unwrap_or(false)
}

/// Waits until all is quiet.
pub async fn settle_all(unsettled: Vec<Unsettled>) {
    for unsettled in unsettled {
        unsettled.settle().await;
    }
}

/// What nobody waits for.
fn settle_behind(evicted: Vec<Unsettled>) {
    for evicted in evicted {
        tokio::spawn(evicted.settle());
    }
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

    /// Of the domains of a device the one that has most of what is asked for: the one that it is attached to, unless only its default
    /// domain does. Asked without telling a sanitizer, so that exactly one is told of the operation and what became of it.
    fn domain_that_holds(
        &self,
        owner: Owner,
        device: DeviceAddress,
        held: impl Fn(&Domain) -> Held,
    ) -> Result<Option<Arc<DomainSlot>>, DeviceOfError> {
        let mut slots = self.dma_domains(owner, device)?;
        let Some(first) = slots.next() else { return Ok(None) };
        let Some(default) = slots.find(|slot| holds_something(slot)) else { return Ok(Some(first)) };
        let ask = |slot: &DomainSlot| slot.with(|domain| held(domain)).unwrap_or(Held::Nothing);
        Ok(Some(if ask(&default) > ask(&first) { default } else { first }))
    }

    /// Runs a map. When the domain runs out of something, it gives up what it keeps and does not need, and the map is tried once more.
    async fn map_with_reclaim<R>(
        &self,
        owner: &OwnerState,
        device: DeviceAddress,
        request: &DmaMap,
        map: impl Fn(&mut Domain, &OwnerMemory) -> Result<R, DmaMapError>,
    ) -> Result<R, DmaMapError> {
        let slot = self.attached_domain(owner.owner, device)?;
        if request.function == DmaFunction::Coherent {
            slot.takes_coherent();
        }
        let attempt = || {
            let memory = owner.memory.read();
            slot.map_with(&self.kernel, |domain| map(domain, &memory))
        };
        // A domain that is gone was the device's domain until just now.
        let (outcome, evicted) = attempt().map_err(|_| NotAttached { device })?;
        match &outcome {
            Err(error) if is_shortage(error) => {}
            _ => {
                settle_behind(evicted);
                return outcome;
            }
        }
        // What was evicted for the first attempt is there for the second one only when it is quiet.
        settle_all(evicted).await;
        let given_up = slot.unmap_with(&self.kernel, |domain| ((), Some(domain.reclaim(&self.kernel))));
        if let Ok(((), Some(unsettled))) = given_up {
            unsettled.settle().await;
        }
        if let Some(watched) = &slot.watched {
            watched.handle().with(|sanitizer| sanitizer.retried_map(request.request_id));
        }
        let (outcome, evicted) = attempt().map_err(|_| NotAttached { device })?;
        settle_behind(evicted);
        outcome
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
        self.map_with_reclaim(owner, device, &request, map).await
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
        self.map_with_reclaim(owner, device, &request, map).await
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
        let (mapped, evicted) = mapped.map_err(|_| NotAttached { device })?;
        settle_behind(evicted);
        mapped
    }

    /// Unmaps many buffers with one invalidation and one drain. Works while the device is detached, too: what was mapped can be unmapped.
    pub fn dma_unmap_batch(
        &self,
        owner: Owner,
        device: DeviceAddress,
        requests: &[DmaUnmap],
    ) -> Result<Unmapped, DmaUnmapError> {
        let mut slots = self.dma_domains(owner, device)?;
        let first = slots.next().ok_or(NotAttached { device })?;
        let Some(default) = slots.find(|slot| holds_something(slot)) else {
            return self.unmap_in(&first, device, requests);
        };
        let held = |slot: &DomainSlot| {
            let held = |domain: &mut Domain| {
                requests.iter().map(|request| domain.holds(&self.kernel, request)).collect::<Vec<_>>()
            };
            slot.with(held).unwrap_or_else(|_| vec![Held::Nothing; requests.len()])
        };
        let (in_default, in_first) = (held(&default), held(&first));
        let is_default: Vec<_> =
            in_default.iter().zip(&in_first).map(|(default, first)| default > first).collect();
        if !is_default.contains(&true) {
            return self.unmap_in(&first, device, requests);
        }
        let of = |wanted: bool| {
            let chosen = requests.iter().zip(&is_default).filter(|(_, is_default)| **is_default == wanted);
            chosen.map(|(request, _)| *request).collect::<Vec<_>>()
        };
        let (there, mut unsettled) = self.unmap_in(&default, device, &of(true))?;
        let (here, more) = self.unmap_in(&first, device, &of(false))?;
        unsettled.extend(more);
        let (mut there, mut here) = (there.into_iter(), here.into_iter());
        let result = |is_default: &bool| if *is_default { there.next() } else { here.next() };
        let results = is_default.iter().map(result).map(|result| result.expect("each has its result"));
        Ok((results.collect(), unsettled))
    }

    fn unmap_in(
        &self,
        slot: &Arc<DomainSlot>,
        device: DeviceAddress,
        requests: &[DmaUnmap],
    ) -> Result<Unmapped, DmaUnmapError> {
        if requests.is_empty() {
            return Ok((Vec::new(), Vec::new()));
        }
        let now = telemetry::now();
        let unmapped = slot.unmap_with(&self.kernel, |domain| {
            let (results, pending) = domain.dma_unmap_batch(&self.kernel, requests, now);
            (results, Some(pending))
        });
        // One that is gone has nothing mapped any more.
        let (results, unsettled) = unmapped.map_err(|_| NotAttached { device })?;
        Ok((results, unsettled.into_iter().collect()))
    }

    /// Unmaps one buffer; resolves when it may be answered.
    pub async fn dma_unmap(
        &self,
        owner: Owner,
        device: DeviceAddress,
        request: DmaUnmap,
    ) -> Result<(), DmaUnmapError> {
        let (results, unsettled) = self.dma_unmap_batch(owner, device, &[request])?;
        settle_all(unsettled).await;
        results.into_iter().collect()
    }

    /// Unmaps a coherent buffer and frees it. Where it is mapped elsewhere too it is not freed, and may be freed again with the same call.
    pub async fn free_coherent(
        &self,
        owner: &OwnerState,
        device: DeviceAddress,
        buffer: GpaRange,
        request: DmaUnmap,
    ) -> Result<(), FreeCoherentError> {
        let (gpa, place) = (buffer.base(), (device, request.range.base()));
        let is_unmapped = owner.unmapped_coherent.lock().get(&gpa) == Some(&place);
        if !is_unmapped {
            let held = |domain: &Domain| domain.holds(&self.kernel, &request);
            let slot = self.domain_that_holds(owner.owner, device, held).map_err(DmaUnmapError::from)?;
            let slot = slot.ok_or(NotAttached { device }).map_err(DmaUnmapError::from)?;
            let is_anothers = |domain: &mut Domain| {
                held(domain) == Held::Exactly && !domain.shows(&self.kernel, &request, gpa)
            };
            if slot.with(is_anothers).unwrap_or(false) {
                let why = format!("{gpa} is not the memory that is mapped at {}", request.range.base());
                return Err(DmaUnmapError::from(InvalidField { field: "gpa".to_owned(), why }).into());
            }
            self.dma_unmap(owner.owner, device, request).await?;
            owner.unmapped_coherent.lock().insert(gpa, place);
        }
        self.free_buffer(owner, gpa, request.request_id).await?;
        Ok(())
    }

    /// Unmaps a scatter-gather mapping; resolves when it may be answered.
    pub async fn dma_unmap_sg(
        &self,
        owner: Owner,
        device: DeviceAddress,
        request: DmaUnmapSg,
    ) -> Result<(), DmaUnmapError> {
        let slot =
            self.domain_that_holds(owner, device, |domain| domain.holds_sg(&self.kernel, request.iova))?;
        let slot = slot.ok_or(NotAttached { device })?;
        let now = telemetry::now();
        let unmapped =
            slot.unmap_with(&self.kernel, |domain| match domain.dma_unmap_sg(&self.kernel, request, now) {
                Ok(pending) => (Ok(()), Some(pending)),
                Err(error) => (Err(error), None),
            });
        let (result, unsettled) = unmapped.map_err(|_| NotAttached { device })?;
        if let Some(unsettled) = unsettled {
            unsettled.settle().await;
        }
        result
    }

    /// Syncs a part of a mapping.
    pub fn dma_sync(
        &self,
        owner: Owner,
        device: DeviceAddress,
        request: DmaSync,
    ) -> Result<(), DmaSyncError> {
        let held = |domain: &Domain| domain.holds_part(&self.kernel, &request);
        let slot = self.domain_that_holds(owner, device, held)?.ok_or(NotAttached { device })?;
        let now = telemetry::now();
        slot.with(|domain| domain.dma_sync(&self.kernel, request, now)).map_err(|_| NotAttached { device })?
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
