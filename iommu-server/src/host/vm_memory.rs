//! The memory of virtual machines: given, taken back, and moved, also while it is mapped.
//!
//! What is taken back is first *leaving*: nothing new is mapped there, and what is mapped still works. Then, as asked, it is seen whether anything leads
//! there, or waited until nothing does, or revoked: unmapped by force in every domain, invalidated and drained. Only without a pin does it leave its owner's memory
//! map; then it is wiped, and only then does it change owner (I9).

use std::sync::Arc;
use std::time::Duration;

use iommu_kernel::{Domain, Leaving};
use iommu_proto::model::{MoveMemory, Revocation};
use iommu_types::errors::{
    AddMemoryError, InvalidField, LimitReached, MapError, StillMapped, TakeMemoryError,
};
use iommu_types::{GpaRange, Owner};
use tokio::time::Instant;

use super::Host;
use super::domains::DomainSlot;
use super::hypervisors::HypervisorState;
use super::memory::limit_of;
use super::owners::OwnerState;
use crate::bounds;
use crate::telemetry;

impl Host {
    /// Gives a virtual machine memory, open at once in its direct maps.
    pub async fn add_memory(
        &self,
        hypervisor: &HypervisorState,
        vm: u32,
        range: GpaRange,
    ) -> Result<(), AddMemoryError> {
        let owner = self.vm_of(hypervisor, vm)?;
        let _steady = owner.direct_maps.lock().await;
        owner.still_there()?;
        {
            let _in_turn = hypervisor.adding.lock();
            self.check_share(hypervisor, range.size_bytes())?;
            owner.memory.write().add_at(&self.kernel, range)?;
        }
        if let Err(error) = self.open_in_direct_maps(&owner) {
            // Nobody was told of it, but its driver may have looked and mapped it.
            let leaving = owner.memory.write().begin_leaving(&self.kernel, range);
            if let Ok(leaving) = leaving {
                self.revoke(&owner, range).await;
                self.wait_for_pins(&owner, &leaving).await;
                if let Err(reason) = self.finish(&owner, leaving) {
                    tracing::error!(owner = %owner.owner, %range, %reason, "memory not taken back");
                }
            }
            return Err(error);
        }
        Ok(())
    }

    /// All virtual machines of a hypervisor together leave something for the others (I7).
    fn check_share(&self, hypervisor: &HypervisorState, more_bytes: u64) -> Result<(), LimitReached> {
        let allowed = self.kernel.memory().size_bytes() / 4 * 3;
        let own = hypervisor.vms().into_iter().filter_map(|number| self.owners.get(Owner::Vm(number)).ok());
        let has: u64 = own.map(|owner| owner.account.memory_bytes()).sum();
        if has.saturating_add(more_bytes) > allowed {
            return Err(LimitReached { limit: "memory_bytes_per_hypervisor".to_owned(), allowed });
        }
        Ok(())
    }

    /// Opens what is not open where all memory of the owner is.
    fn open_in_direct_maps(&self, owner: &OwnerState) -> Result<(), AddMemoryError> {
        let memory = owner.memory.read();
        let open = |domain: &mut Domain| domain.open_missing(&self.kernel, &memory);
        let opened = self.passthrough_domains(owner.owner).iter().try_for_each(|slot| {
            // A domain that is gone needs no memory.
            slot.with(open).unwrap_or(Ok(()))
        });
        opened.map_err(|error| match error {
            MapError::OutOfMemory(error) => error.into(),
            other => limit_of(other).into(),
        })
    }

    /// The same for memory that its owner has in any case: a device that finds it closed meets a fault, which is recorded.
    fn open_again_in_direct_maps(&self, owner: &OwnerState) {
        if let Err(reason) = self.open_in_direct_maps(owner) {
            tracing::error!(owner = %owner.owner, %reason, "memory not open in a direct map");
        }
    }

    /// Takes memory back from a virtual machine, wiped; returns how many mappings were revoked.
    pub async fn remove_memory(
        &self,
        hypervisor: &HypervisorState,
        vm: u32,
        range: GpaRange,
        how: Revocation,
    ) -> Result<u64, TakeMemoryError> {
        let owner = self.vm_of(hypervisor, vm)?;
        let _steady = owner.direct_maps.lock().await;
        owner.still_there()?;
        let leaving = owner.memory.write().begin_leaving(&self.kernel, range)?;
        let (left, revoked) = self.leave(&owner, leaving, how).await?;
        self.wiped(range.size_bytes(), move || left.free()).await;
        Ok(revoked)
    }

    /// Moves memory from one virtual machine to another, wiped; returns how many mappings were revoked. When it is refused nothing has changed.
    pub async fn move_memory(
        &self,
        hypervisor: &HypervisorState,
        ask: MoveMemory,
    ) -> Result<u64, TakeMemoryError> {
        let (from, to) = (self.vm_of(hypervisor, ask.from_vm)?, self.vm_of(hypervisor, ask.to_vm)?);
        if ask.from_vm == ask.to_vm {
            let why = "is the same virtual machine; remap the memory in its guest instead".to_owned();
            return Err(InvalidField { field: "to_vm".to_owned(), why }.into());
        }
        // In one order, so that two that cross do not wait for each other.
        let (first, second) = if ask.from_vm < ask.to_vm { (&from, &to) } else { (&to, &from) };
        let _steady = first.direct_maps.lock().await;
        let _too = second.direct_maps.lock().await;
        from.still_there()?;
        to.still_there()?;
        let room = to.memory.write().make_room(ask.to).map_err(no_room)?;
        let leaving = from.memory.write().begin_leaving(&self.kernel, ask.from)?;
        let (left, revoked) = self.leave(&from, leaving, ask.how).await?;
        let arrived = self.wiped(ask.from.size_bytes(), move || left.transfer(room)).await;
        to.memory.write().receive(arrived);
        self.open_again_in_direct_maps(&to);
        Ok(revoked)
    }

    /// Brings memory out of its owner's map, as asked. On a refusal it stays, mapped as it was.
    async fn leave(
        &self,
        owner: &Arc<OwnerState>,
        leaving: Leaving,
        how: Revocation,
    ) -> Result<(iommu_kernel::Left, u64), TakeMemoryError> {
        let range = leaving.range();
        let emptied = match how {
            Revocation::Revoke => Ok(()),
            Revocation::Refuse => self.wait_until_unused(owner, &leaving, Duration::ZERO).await,
            Revocation::Wait { wait_ms } => {
                self.wait_until_unused(owner, &leaving, Duration::from_millis(wait_ms.into())).await
            }
        };
        if let Err(refused) = emptied {
            owner.memory.write().abort_leaving(&self.kernel, leaving);
            return Err(refused.into());
        }
        // Where nothing is in use, what is left to revoke are direct maps.
        let revoked = self.revoke(owner, range).await;
        self.wait_for_pins(owner, &leaving).await;
        let left = self.finish(owner, leaving);
        // A piece of a direct map that could not be cut was closed whole.
        self.open_again_in_direct_maps(owner);
        Ok((left?, revoked))
    }

    fn finish(&self, owner: &OwnerState, leaving: Leaving) -> Result<iommu_kernel::Left, TakeMemoryError> {
        let mut memory = owner.memory.write();
        memory.finish_leaving(&self.kernel, leaving).map_err(|not_left| {
            let iommu_kernel::NotLeft { leaving, error } = not_left;
            memory.abort_leaving(&self.kernel, leaving);
            error
        })
    }

    /// Waits until nothing of the owner leads to the memory but direct maps.
    async fn wait_until_unused(
        &self,
        owner: &Arc<OwnerState>,
        leaving: &Leaving,
        patience: Duration,
    ) -> Result<(), StillMapped> {
        let deadline = Instant::now() + patience;
        let range = leaving.range();
        loop {
            let direct_maps = self.passthrough_domains(owner.owner);
            let is_direct = |slot: &DomainSlot| direct_maps.iter().any(|direct| direct.id == slot.id);
            for slot in self.domains.list(|slot| slot.owner == owner.owner && !is_direct(slot)) {
                // Flushes what waits, and evicts what nobody uses.
                self.let_go(&slot, range).await;
            }
            let uses = |domain: &mut Domain| domain.uses(&self.kernel, range);
            let is_used = direct_maps.iter().any(|slot| slot.with(uses).unwrap_or(false));
            let pins = owner.memory.read().pins(&self.kernel, leaving);
            if !is_used && u64::from(pins) <= direct_maps.len() as u64 {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(StillMapped { gpa: range.base() });
            }
            tokio::time::sleep(bounds::RECLAIM_TICK).await;
        }
    }

    /// Waits for what others are about to give up: a domain that is being destroyed has pins until its drain, and is in no list any more.
    async fn wait_for_pins(&self, owner: &OwnerState, leaving: &Leaving) {
        while owner.memory.read().pins(&self.kernel, leaving) > 0 {
            tokio::time::sleep(bounds::RECLAIM_TICK).await;
        }
    }

    /// Revokes whatever leads to the memory in every domain of the owner, and waits until it is quiet. Returns how many mappings went.
    async fn revoke(&self, owner: &OwnerState, range: GpaRange) -> u64 {
        let mut revoked = 0;
        for slot in self.domains.list(|slot| slot.owner == owner.owner) {
            let revoke = |domain: &mut Domain| {
                let before = domain.counters().unmaps;
                let pending = domain.revoke_memory(&self.kernel, range, telemetry::now());
                (domain.counters().unmaps - before, Some(pending))
            };
            if let Ok((count, pending)) = slot.unmap_with(&self.kernel, revoke) {
                revoked += count;
                if let Some(unsettled) = pending {
                    unsettled.settle().await;
                }
            }
        }
        revoked
    }
}

fn no_room(error: AddMemoryError) -> TakeMemoryError {
    match error {
        AddMemoryError::InvalidRange(error) => error.into(),
        AddMemoryError::InvalidField(error) => error.into(),
        AddMemoryError::Unaligned(error) => error.into(),
        AddMemoryError::UnknownOwner(error) => error.into(),
        AddMemoryError::NotYours(error) => error.into(),
        AddMemoryError::MemoryOverlaps(error) => error.into(),
        AddMemoryError::OutOfMemory(error) => error.into(),
        AddMemoryError::LimitReached(error) => error.into(),
    }
}
