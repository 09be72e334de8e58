//! Buffers of owners, and the domains that keep something of them.
//!
//! Most modes know of a buffer only while it is mapped. A passthrough domain has every buffer of its owner open, so each is opened when
//! it comes and closed before it goes; persistent and deferred domains keep pages that nobody uses any more, and let go of them when the
//! owner takes the memory back. A buffer is freed only when nothing of it is pinned (I9).

use std::sync::Arc;

use iommu_kernel::Domain;
use iommu_types::errors::{
    AllocateError, CreateDomainError, FreeError, LimitReached, MapError, NotAHostDriver, NotAllocated,
    StillMapped,
};
use iommu_types::{DomainOptions, Gpa, GpaRange, Owner, RequestId};

use super::Host;
use super::domains::DomainSlot;
use super::owners::OwnerState;
use crate::telemetry;

impl Host {
    pub(super) fn passthrough_domains(&self, owner: Owner) -> Vec<Arc<DomainSlot>> {
        // Listed first: a domain's lock is not waited for inside of the registry.
        let mut found = self.domains.list(|slot| slot.owner == owner);
        found.retain(|slot| slot.with(|domain| domain.is_passthrough()).unwrap_or(false));
        found
    }

    /// Creates a domain of an owner. A passthrough one has all memory of its owner open from the start.
    pub async fn create_domain(
        &self,
        owner: &OwnerState,
        options: DomainOptions,
    ) -> Result<Arc<DomainSlot>, CreateDomainError> {
        let _steady = owner.direct_maps.lock().await;
        let (domain, error) = {
            // Nobody allocates meanwhile, so that no buffer is missed.
            let memory = owner.memory.read();
            let mut domain = self.kernel.create_domain(&owner.account, options)?;
            let opened = match domain.is_passthrough() {
                true => domain.open_missing(&self.kernel, &memory),
                false => Ok(()),
            };
            match opened {
                Ok(()) => return Ok(self.domains.insert(domain, None)),
                Err(error) => (domain, error),
            }
        };
        // Nothing was attached to it, but a device that had its identifier before may be in the middle of something still.
        self.destroy_now(domain).await;
        Err(create_error(error))
    }

    /// Allocates a buffer, and opens it where all memory of the owner is open.
    pub async fn allocate_buffer(
        &self,
        owner: &OwnerState,
        size_bytes: u64,
    ) -> Result<GpaRange, AllocateError> {
        if owner.is_vm() {
            return Err(NotAHostDriver { owner: owner.owner }.into());
        }
        let _steady = owner.direct_maps.lock().await;
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
        for slot in self.domains.list(|slot| slot.owner == owner.owner) {
            self.let_go(&slot, buffer).await;
        }
        let taken = owner.memory.write().take(&self.kernel, buffer.base());
        if let Ok(left) = taken {
            self.wiped(buffer.size_bytes(), move || left.free()).await;
        }
        Err(allocate_error(error))
    }

    /// Frees a buffer. Domains let go of what they keep of it first; what is in use keeps it from being freed, and then every direct map
    /// stays as it is.
    pub async fn free_buffer(
        &self,
        owner: &OwnerState,
        gpa: Gpa,
        by: RequestId,
    ) -> Result<GpaRange, FreeError> {
        if owner.is_vm() {
            // What a virtual machine has is its hypervisor's to take back.
            return Err(NotAllocated { gpa }.into());
        }
        let _steady = owner.direct_maps.lock().await;
        let buffer = owner.memory.read().buffers().into_iter().find(|buffer| buffer.base() == gpa);
        let Some(buffer) = buffer else { return Err(NotAllocated { gpa }.into()) };
        let freed = self.free_unused(owner, buffer).await;
        if let Err(FreeError::StillMapped(_)) = &freed {
            self.released_while_mapped(owner.owner, buffer, by);
        }
        freed
    }

    async fn free_unused(&self, owner: &OwnerState, buffer: GpaRange) -> Result<GpaRange, FreeError> {
        let direct_maps = self.passthrough_domains(owner.owner);
        let is_direct = |slot: &DomainSlot| direct_maps.iter().any(|direct| direct.id == slot.id);
        for slot in self.domains.list(|slot| slot.owner == owner.owner && !is_direct(slot)) {
            self.let_go(&slot, buffer).await;
        }
        // A mapping in a direct map neither pins nor opens anything, so it has to be asked for.
        let still_mapped = StillMapped { gpa: buffer.base() };
        let is_used = || {
            let uses = |domain: &mut Domain| domain.uses(&self.kernel, buffer);
            direct_maps.iter().any(|slot| slot.with(uses).unwrap_or(false))
        };
        // Asked before anything is closed. Each direct map pins each page once; another pin is a mapping's.
        let has_other_pins = || {
            let pins = owner.memory.read().pins_of(&self.kernel, buffer.base());
            u64::from(pins) > direct_maps.len() as u64
        };
        if is_used() || has_other_pins() {
            return Err(still_mapped.into());
        }
        for slot in &direct_maps {
            self.let_go(slot, buffer).await;
        }
        let taken = {
            // Nobody maps while this lock is held, and what was mapped since the first question is seen by the second.
            let mut memory = owner.memory.write();
            if is_used() { Err(still_mapped.into()) } else { memory.take(&self.kernel, buffer.base()) }
        };
        match taken {
            Ok(left) => {
                owner.unmapped_coherent.lock().remove(&buffer.base());
                Ok(self.wiped(buffer.size_bytes(), move || left.free()).await)
            }
            Err(refused) => {
                self.open_again(owner, &direct_maps, buffer);
                Err(refused)
            }
        }
    }

    /// Closes a buffer in a domain that keeps something of it, and waits until it is quiet.
    pub(super) async fn let_go(&self, slot: &Arc<DomainSlot>, buffer: GpaRange) {
        let let_go = |domain: &mut Domain| ((), Some(domain.let_go(&self.kernel, buffer)));
        if let Ok(((), Some(unsettled))) = slot.unmap_with(&self.kernel, let_go) {
            unsettled.settle().await;
        }
    }

    /// A buffer that was not freed after all is open again where all memory is.
    fn open_again(&self, owner: &OwnerState, direct_maps: &[Arc<DomainSlot>], buffer: GpaRange) {
        let memory = owner.memory.read();
        for slot in direct_maps {
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
pub(super) fn limit_of(error: MapError) -> LimitReached {
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
