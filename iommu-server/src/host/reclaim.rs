//! What is left behind is taken back: mappings, domains, interrupts, memory. In this order, because a frame changes owner only when no
//! translation to it exists and no DMA through one is in flight (I9).

use std::sync::Arc;

use iommu_types::DeviceAddress;

use super::Host;
use super::owners::OwnerState;
use super::placement::OPERATOR;
use crate::bounds;
use crate::telemetry;

/// What a reclaim found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reclaimed {
    /// Mappings removed.
    pub mappings: u64,
    /// Explicit domains destroyed.
    pub domains: u64,
    /// Bytes of memory freed.
    pub memory_bytes: u64,
}

impl Host {
    /// Takes back everything that an owner holds but its devices, which go back to their default domains, and the memory of a virtual
    /// machine.
    pub async fn reclaim_owner(self: &Arc<Self>, owner: &Arc<OwnerState>, why: &str) {
        let mut reclaimed = Reclaimed { mappings: owner.account.mappings(), ..Reclaimed::default() };
        let devices = self.topology.read().devices_of(owner.owner);
        self.reset_all(&devices).await;
        for slot in self.domains.list(|slot| slot.owner == owner.owner) {
            slot.leaked_at_last(OPERATOR);
            let unmapped = slot.unmap_with(&self.kernel, |domain| {
                ((), Some(domain.unmap_all(&self.kernel, telemetry::now())))
            });
            if let Ok(((), Some(unsettled))) = unmapped {
                unsettled.settle().await;
            }
        }
        for address in &devices {
            let drain = self.kernel.free_interrupts(address.source_id);
            let _drained = drain.await;
            if owner.still_there().is_ok() {
                self.restore(owner, *address).await;
            }
        }
        for slot in self.domains.list(|slot| slot.owner == owner.owner && slot.default_of.is_none()) {
            match self.destroy_domain(owner.owner, slot.id, OPERATOR).await {
                Ok(()) => reclaimed.domains += 1,
                Err(reason) => {
                    tracing::error!(owner = %owner.owner, domain_id = %slot.id, %reason, "domain not reclaimed")
                }
            }
        }
        self.wait_for_mappings(owner).await;
        if !owner.is_vm() {
            // The memory of a virtual machine is its hypervisor's to take back.
            reclaimed.memory_bytes = self.wipe_all_of(owner).await;
        }
        owner.unmapped_coherent.lock().clear();
        self.metrics.reclaimed(reclaimed);
        tracing::info!(
            owner = %owner.owner, reason = why, mappings = reclaimed.mappings, domains = reclaimed.domains,
            memory_bytes = reclaimed.memory_bytes, "owner reclaimed"
        );
    }

    /// Resolves when nothing of an owner is mapped. A domain that another call is dissolving, because its device was given away, is in no list any
    /// more and has frames until its drain.
    pub(super) async fn wait_for_mappings(&self, owner: &OwnerState) {
        while owner.account.mappings() > 0 {
            tokio::time::sleep(bounds::RECLAIM_TICK).await;
        }
    }

    /// Resets devices, all at once. The next driver finds them as after a power cycle.
    async fn reset_all(&self, devices: &[DeviceAddress]) {
        let mut resets = tokio::task::JoinSet::new();
        for address in devices {
            if let Ok(device) = self.devices.get(*address) {
                resets.spawn(async move { device.reset().await });
            }
        }
        resets.join_all().await;
    }
}
