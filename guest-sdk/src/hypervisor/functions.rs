//! PCI functions: described, and handed out by isolation group.

use std::time::Duration;

use iommu_proto::model::{self, RequestHeader};
use iommu_proto::pb;
use iommu_types::errors::{AssignError, DeclareError, ReleaseError, RemoveDeviceError};
use iommu_types::{DeviceAddress, PciFunction};

use super::{Client, FunctionState, Hypervisor, HypervisorCore, client};
use crate::convert::bad_answer;
use crate::{Never, SdkError};

pub(super) async fn assign(
    hypervisor: &HypervisorCore,
    device: DeviceAddress,
    vm: u32,
) -> Result<Vec<DeviceAddress>, SdkError<AssignError>> {
    let message = |header: RequestHeader| -> pb::AssignGroupRequest {
        model::AssignGroup { header, device, vm }.into()
    };
    let call = |mut client: Client, request| async move { client.assign_group(request).await };
    let answer = hypervisor.mutate(Duration::ZERO, message, call).await?;
    Ok(model::AssignedGroup::try_from(answer).map_err(bad_answer)?.functions)
}

impl Hypervisor {
    /// Describes a PCI function of the host, in segment 0, so that it can be assigned and its agent may connect as `name`.
    ///
    /// ```no_run
    /// use guest_sdk::{FunctionKind, PciFunction};
    ///
    /// # async fn run(hypervisor: guest_sdk::Hypervisor, vm: guest_sdk::Vm) -> Result<(), Box<dyn std::error::Error>> {
    /// let physical = "00:08.0".parse()?;
    /// let function = PciFunction { kind: FunctionKind::VirtualFunction { physical }, acs: true };
    /// hypervisor.declare_function("00:08.1".parse()?, "net-vf1", function).await?;
    /// let group = vm.assign("00:08.1".parse()?).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn declare_function(
        &self,
        device: DeviceAddress,
        name: impl Into<String>,
        function: PciFunction,
    ) -> Result<(), SdkError<DeclareError>> {
        let name = name.into();
        let message = |header: RequestHeader| -> pb::DeclareFunctionRequest {
            model::DeclareFunction { header, device, name: name.clone(), function }.into()
        };
        let call = |mut client: Client, request| async move { client.declare_function(request).await };
        self.inner.mutate(Duration::ZERO, message, call).await.map(drop)
    }

    /// Forgets a function that this hypervisor declared and that is assigned to nobody.
    pub async fn remove_function(&self, device: DeviceAddress) -> Result<(), SdkError<RemoveDeviceError>> {
        let message = |header: RequestHeader| -> pb::RemoveFunctionRequest {
            model::RemoveFunction { header, device }.into()
        };
        let call = |mut client: Client, request| async move { client.remove_function(request).await };
        self.inner.mutate(Duration::ZERO, message, call).await.map(drop)
    }

    /// The functions that this hypervisor may assign or has assigned, by address, with their isolation groups.
    pub async fn functions(&self) -> Result<Vec<FunctionState>, SdkError<Never>> {
        let answer = self
            .inner
            .core
            .unary(pb::ListFunctionsRequest {}, |channel, request| async move {
                client(channel).list_functions(request).await
            })
            .await?;
        Ok(model::Functions::try_from(answer).map_err(bad_answer)?.functions)
    }

    /// Assigns the isolation group of a function to virtual machine `vm`; see [`Vm::assign`](crate::Vm::assign).
    pub async fn assign(
        &self,
        device: DeviceAddress,
        vm: u32,
    ) -> Result<Vec<DeviceAddress>, SdkError<AssignError>> {
        assign(&self.inner, device, vm).await
    }

    /// Releases the isolation group of a function, and gives its functions: they are detached, drained and reset, and nothing that the
    /// virtual machine had queued in them is carried out later.
    pub async fn release(&self, device: DeviceAddress) -> Result<Vec<DeviceAddress>, SdkError<ReleaseError>> {
        let message = |header: RequestHeader| -> pb::ReleaseGroupRequest {
            model::ReleaseGroup { header, device }.into()
        };
        let call = |mut client: Client, request| async move { client.release_group(request).await };
        let answer = self.inner.mutate(Duration::ZERO, message, call).await?;
        Ok(model::ReleasedGroup::try_from(answer).map_err(bad_answer)?.functions)
    }
}
