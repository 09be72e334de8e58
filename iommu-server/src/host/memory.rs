//! Buffers of owners, and the domains that keep something of them.
//!
//! Most modes know of a buffer only while it is mapped. A passthrough domain has every buffer of its owner open, so each is opened when
//! it comes and closed before it goes; persistent and deferred domains keep pages that nobody uses any more, and let go of them when the
//! owner takes the memory back. A buffer is freed only when nothing of it is pinned (I9).

use std::sync::Arc;

use iommu_kernel::Domain;
use iommu_types::errors::{AllocateError, CreateDomainError, FreeError, LimitReached, MapError, StillMapped};
use iommu_types::{DomainOptions, Gpa, GpaRange, Owner, RequestId};

use super::Host;
use super::domains::DomainSlot;
use super::owners::OwnerState;
use crate::telemetry;

impl Host {
    fn passthrough_domains(&self, owner: Owner) -> Vec<Arc<DomainSlot>> {
        let is_passthrough = |slot: &DomainSlot| slot.with(|domain| domain.is_passthrough()).unwrap_or(false);
        self.domains.list(|slot| slot.owner == owner && is_passthrough(slot))
    }

    /// Creates a domain of an owner. A passthrough one has all memory of its owner open from the start.
    pub fn create_domain(
        &self,
        owner: &OwnerState,
        options: DomainOptions,
    ) -> Result<Arc<DomainSlot>, CreateDomainError> {
        // Nobody allocates meanwhile, so that no buffer is missed.
        let memory = owner.memory.read();
        let mut domain = self.kernel.create_domain(&owner.account, options)?;
        if domain.is_passthrough() {
            for buffer in memory.buffers() {
                if let Err(error) = domain.open_direct(&self.kernel, &memory, buffer) {
                    let mut destroy = self.kernel.destroy_domain(domain);
                    // Nothing is attached to it, so nothing can be in flight.
                    if let Ok(drained) = destroy.take_drain().try_complete() {
                        destroy.finish(&self.kernel, drained);
                    }
                    return Err(create_error(error));
                }
            }
        }
        Ok(self.domains.insert(domain, None))
    }

    /// Allocates a buffer, and opens it where all memory of the owner is open.
    pub async fn allocate_buffer(
        &self,
        owner: &OwnerState,
        size_bytes: u64,
    ) -> Result<GpaRange, AllocateError> {
        let (buffer, refused) = {
            let mut memory = owner.memory.write();
            let buffer = memory.allocate(&self.kernel, size_bytes)?;
            let open = |domain: &mut Domain| domain.open_direct(&self.kernel, &memory, buffer);
            let opened = self.passthrough_domains(owner.owner).iter().try_for_each(|slot| {
                // A domain that is gone needs no buffer.
                slot.with(open).unwrap_or(Ok(()))
            });
            (buffer, opened.err())
        };
        let Some(error) = refused else { return Ok(buffer) };
        // Nobody was told of the buffer, so nobody has mapped it.
        self.let_go(owner.owner, buffer).await;
        let _freed = owner.memory.write().free(&self.kernel, buffer.base());
        Err(allocate_error(error))
    }

    /// Frees a buffer. Domains let go of what they keep of it first; what is in use keeps it from being freed.
    pub async fn free_buffer(
        &self,
        owner: &OwnerState,
        gpa: Gpa,
        by: RequestId,
    ) -> Result<GpaRange, FreeError> {
        let buffer = owner.memory.read().buffers().into_iter().find(|buffer| buffer.base() == gpa);
        if let Some(buffer) = buffer {
            let uses = |slot: &Arc<DomainSlot>| {
                slot.with(|domain| domain.is_passthrough() && domain.uses(&self.kernel, buffer))
                    .unwrap_or(false)
            };
            // Asked before anything is closed, so that a refusal leaves a direct map as it is.
            if self.domains.list(|slot| slot.owner == owner.owner).iter().any(uses) {
                self.released_while_mapped(owner.owner, buffer, by);
                return Err(StillMapped { gpa }.into());
            }
            self.let_go(owner.owner, buffer).await;
        }
        let freed = owner.memory.write().free(&self.kernel, gpa);
        if let (Err(FreeError::StillMapped(_)), Some(buffer)) = (&freed, buffer) {
            self.released_while_mapped(owner.owner, buffer, by);
            self.open_again(owner, buffer);
        }
        freed
    }

    /// Closes a buffer in every domain of its owner that keeps something of it, and waits until it is quiet.
    async fn let_go(&self, owner: Owner, buffer: GpaRange) {
        for slot in self.domains.list(|slot| slot.owner == owner) {
            let let_go = |domain: &mut Domain| ((), Some(domain.let_go(&self.kernel, buffer)));
            if let Ok(((), Some(unsettled))) = slot.unmap_with(&self.kernel, let_go) {
                unsettled.settle().await;
            }
        }
    }

    /// A buffer that was not freed after all is open again where all memory is.
    fn open_again(&self, owner: &OwnerState, buffer: GpaRange) {
        let memory = owner.memory.read();
        for slot in self.passthrough_domains(owner.owner) {
            let opened = slot.with(|domain| domain.open_direct(&self.kernel, &memory, buffer));
            if let Ok(Err(reason)) = opened {
                tracing::error!(owner = %owner.owner, domain_id = %slot.id, %reason, "buffer not open again");
            }
        }
    }

    /// Tells the sanitizers of the owner's domains, each of which knows what it maps.
    fn released_while_mapped(&self, owner: Owner, buffer: GpaRange, by: RequestId) {
        for slot in self.domains.list(|slot| slot.owner == owner && slot.watched.is_some()) {
            let _gone = slot.with(|domain| domain.released_while_mapped(buffer, telemetry::now(), by));
        }
    }
}

/// A direct map is refused for want of something, or because an address does not fit the domain.
fn limit_of(error: MapError) -> LimitReached {
    match error {
        MapError::LimitReached(limit) => limit,
        MapError::BeyondWidth(beyond) => {
            LimitReached { limit: "domain_width_bits".to_owned(), allowed: beyond.width_bits.into() }
        }
        other => LimitReached { limit: other.to_string(), allowed: 0 },
    }
}

fn create_error(error: MapError) -> CreateDomainError {
    match error {
        MapError::OutOfMemory(error) => error.into(),
        other => limit_of(other).into(),
    }
}

fn allocate_error(error: MapError) -> AllocateError {
    match error {
        MapError::OutOfMemory(error) => error.into(),
        other => limit_of(other).into(),
    }
}
