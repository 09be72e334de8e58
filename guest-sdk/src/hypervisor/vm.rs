//! One virtual machine: its memory comes and goes, and so do its devices.

use std::sync::Arc;
use std::time::Duration;

use iommu_proto::model::{self, RequestHeader};
use iommu_proto::pb;
use iommu_types::errors::{AddMemoryError, AssignError, DestroyVmError, TakeMemoryError};
use iommu_types::{DeviceAddress, Gpa, GpaRange, InvalidRange, Owner};

use super::{Client, HypervisorCore, Revocation};
use crate::{Memory, SdkError};

/// A virtual machine. It stays until it is destroyed or the session is reclaimed; dropping the value destroys nothing.
#[derive(Clone, Debug)]
pub struct Vm {
    hypervisor: Arc<HypervisorCore>,
    number: u32,
}

/// How much longer than another call a call takes that waits for a driver.
fn waits(how: Revocation) -> Duration {
    match how {
        Revocation::Wait { wait_ms } => Duration::from_millis(wait_ms.into()),
        Revocation::Refuse | Revocation::Revoke => Duration::ZERO,
    }
}

impl Vm {
    pub(super) fn new(hypervisor: Arc<HypervisorCore>, number: u32) -> Self {
        Self { hypervisor, number }
    }

    /// Its number.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// The owner that it is.
    pub fn owner(&self) -> Owner {
        Owner::Vm(self.number)
    }

    /// Its memory, as its processor sees it.
    pub fn memory(&self) -> Memory {
        Memory::new(Arc::clone(&self.hypervisor.core), Some(self.owner()))
    }

    /// Gives it zeroed memory: whole pages, at an address where it has none.
    pub async fn add_memory(&self, range: GpaRange) -> Result<(), SdkError<AddMemoryError>> {
        let message = |header: RequestHeader| -> pb::AddMemoryRequest {
            model::AddMemory { header, vm: self.number, range }.into()
        };
        let call = |mut client: Client, request| async move { client.add_memory(request).await };
        self.hypervisor.mutate(Duration::ZERO, message, call).await.map(drop)
    }

    /// Takes memory back, whole pages, and wipes it. Answered when no translation to it is left, not one in a cache nor one that waits for a
    /// flush, and no DMA through one is in flight (I9). Gives the number of mappings that were revoked.
    pub async fn remove_memory(
        &self,
        range: GpaRange,
        how: Revocation,
    ) -> Result<u64, SdkError<TakeMemoryError>> {
        let message = |header: RequestHeader| -> pb::RemoveMemoryRequest {
            model::RemoveMemory { header, vm: self.number, range, how }.into()
        };
        let call = |mut client: Client, request| async move { client.remove_memory(request).await };
        Ok(self.hypervisor.mutate(waits(how), message, call).await?.revoked_mappings)
    }

    /// Moves the very frames behind `from` to `to_gpa` of another virtual machine, wiped on the way. When it is refused nothing has changed.
    /// Gives the number of mappings that were revoked.
    pub async fn move_memory(
        &self,
        from: GpaRange,
        to: &Vm,
        to_gpa: Gpa,
        how: Revocation,
    ) -> Result<u64, SdkError<TakeMemoryError>> {
        let place = GpaRange::new(to_gpa, from.size_bytes());
        let place = place.map_err(|invalid: InvalidRange| SdkError::Refused(invalid.into()))?;
        let message = |header: RequestHeader| -> pb::MoveMemoryRequest {
            let (from_vm, to_vm) = (self.number, to.number);
            model::MoveMemory { header, from_vm, from, to_vm, to: place, how }.into()
        };
        let call = |mut client: Client, request| async move { client.move_memory(request).await };
        Ok(self.hypervisor.mutate(waits(how), message, call).await?.revoked_mappings)
    }

    /// Assigns the isolation group of a function to it: all functions of the group, which are returned. Each is attached to a default domain
    /// (strict). A group that another virtual machine of this hypervisor has is released first.
    pub async fn assign(&self, device: DeviceAddress) -> Result<Vec<DeviceAddress>, SdkError<AssignError>> {
        super::functions::assign(&self.hypervisor, device, self.number).await
    }

    /// Destroys it: ends its driver's session, releases its devices, removes its mappings, and takes back and wipes its memory.
    pub async fn destroy(self) -> Result<(), SdkError<DestroyVmError>> {
        let message = |header: RequestHeader| -> pb::DestroyVmRequest {
            model::DestroyVm { header, vm: self.number }.into()
        };
        let call = |mut client: Client, request| async move { client.destroy_vm(request).await };
        self.hypervisor.mutate(Duration::ZERO, message, call).await.map(drop)
    }
}
