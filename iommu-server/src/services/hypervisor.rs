//! `HypervisorService`: virtual machines, their memory, the devices given to them, and what they ask.

use std::sync::Arc;

use iommu_proto::errors::WireError;
use iommu_proto::framing::typed_framing_status;
use iommu_proto::model;
use iommu_proto::pb::{self, hypervisor_service_server::HypervisorService};
use iommu_types::Owner;
use iommu_types::errors::{ProtocolViolation, UnknownOwner};
use tonic::{Request, Response, Status, Streaming};

use super::feed::{Feed, feed};
use super::once::once;
use super::{Caller, parse};
use crate::host::Host;
use crate::host::hypercalls::Serving;
use crate::host::hypervisors::HypervisorState;

/// The service.
#[derive(Clone, Debug)]
pub struct HypervisorCalls {
    /// The host.
    pub host: Arc<Host>,
}

fn status(error: impl WireError) -> Status {
    error.into_status()
}

impl HypervisorCalls {
    fn vm_state(&self, number: u32) -> Result<model::VmState, UnknownOwner> {
        let owner = self.host.owners.get(Owner::Vm(number))?;
        let memory = owner.memory.read().buffers();
        let memory = memory
            .into_iter()
            .map(|range| model::MemoryRegion { gpa: range.base(), size_bytes: range.size_bytes() });
        Ok(model::VmState {
            number,
            name: owner.name.clone(),
            connected: owner.seat.connected().is_some(),
            memory: memory.collect(),
            functions: self.host.topology.read().devices_of(owner.owner),
        })
    }
}

#[tonic::async_trait]
impl HypervisorService for HypervisorCalls {
    async fn create_vm(
        &self,
        request: Request<pb::CreateVmRequest>,
    ) -> Result<Response<pb::CreateVmResponse>, Status> {
        once!(self, request, hypervisor, model::CreateVm, |host, hypervisor, ask| {
            let number = host.create_vm(&hypervisor, ask.name, ask.number, ask.limits.unwrap_or_default());
            Ok(pb::CreateVmResponse { number: number.await.map_err(status)? })
        })
    }

    async fn destroy_vm(
        &self,
        request: Request<pb::DestroyVmRequest>,
    ) -> Result<Response<pb::DestroyVmResponse>, Status> {
        once!(self, request, hypervisor, model::DestroyVm, |host, hypervisor, ask| {
            host.destroy_vm(&hypervisor, ask.vm, "destroyed by its hypervisor").await.map_err(status)?;
            Ok(pb::DestroyVmResponse {})
        })
    }

    async fn list_vms(
        &self,
        request: Request<pb::ListVmsRequest>,
    ) -> Result<Response<pb::ListVmsResponse>, Status> {
        let caller = Caller::of(&request)?;
        let vms = caller.hypervisor()?.vms();
        // One that is destroyed meanwhile is in the list no more.
        let vms = vms.into_iter().filter_map(|number| self.vm_state(number).ok()).collect();
        Ok(Response::new(model::Vms { vms }.into()))
    }

    async fn add_memory(
        &self,
        request: Request<pb::AddMemoryRequest>,
    ) -> Result<Response<pb::AddMemoryResponse>, Status> {
        once!(self, request, hypervisor, model::AddMemory, |host, hypervisor, ask| {
            host.add_memory(&hypervisor, ask.vm, ask.range).await.map_err(status)?;
            Ok(pb::AddMemoryResponse {})
        })
    }

    async fn remove_memory(
        &self,
        request: Request<pb::RemoveMemoryRequest>,
    ) -> Result<Response<pb::RemoveMemoryResponse>, Status> {
        once!(self, request, hypervisor, model::RemoveMemory, |host, hypervisor, ask| {
            let revoked = host.remove_memory(&hypervisor, ask.vm, ask.range, ask.how).await;
            Ok(pb::RemoveMemoryResponse { revoked_mappings: revoked.map_err(status)? })
        })
    }

    async fn move_memory(
        &self,
        request: Request<pb::MoveMemoryRequest>,
    ) -> Result<Response<pb::MoveMemoryResponse>, Status> {
        once!(self, request, hypervisor, model::MoveMemory, |host, hypervisor, ask| {
            let revoked = host.move_memory(&hypervisor, ask).await;
            Ok(pb::MoveMemoryResponse { revoked_mappings: revoked.map_err(status)? })
        })
    }

    async fn declare_function(
        &self,
        request: Request<pb::DeclareFunctionRequest>,
    ) -> Result<Response<pb::DeclareFunctionResponse>, Status> {
        once!(self, request, hypervisor, model::DeclareFunction, |host, hypervisor, ask| {
            let (device, function) = (ask.device, ask.function);
            host.declare_function(&hypervisor, device, ask.name, function).await.map_err(status)?;
            Ok(pb::DeclareFunctionResponse {})
        })
    }

    async fn remove_function(
        &self,
        request: Request<pb::RemoveFunctionRequest>,
    ) -> Result<Response<pb::RemoveFunctionResponse>, Status> {
        once!(self, request, hypervisor, model::RemoveFunction, |host, hypervisor, ask| {
            host.remove_function(&hypervisor, ask.device).await.map_err(status)?;
            Ok(pb::RemoveFunctionResponse {})
        })
    }

    async fn list_functions(
        &self,
        request: Request<pb::ListFunctionsRequest>,
    ) -> Result<Response<pb::ListFunctionsResponse>, Status> {
        let caller = Caller::of(&request)?;
        let functions = self.host.functions_of(caller.hypervisor()?);
        Ok(Response::new(model::Functions { functions }.into()))
    }

    async fn assign_group(
        &self,
        request: Request<pb::AssignGroupRequest>,
    ) -> Result<Response<pb::AssignGroupResponse>, Status> {
        once!(self, request, hypervisor, model::AssignGroup, |host, hypervisor, ask| {
            let by = ask.header.request_id;
            let functions = host.assign_group(&hypervisor, ask.device, ask.vm, by).await.map_err(status)?;
            Ok(model::AssignedGroup { functions }.into())
        })
    }

    async fn release_group(
        &self,
        request: Request<pb::ReleaseGroupRequest>,
    ) -> Result<Response<pb::ReleaseGroupResponse>, Status> {
        once!(self, request, hypervisor, model::ReleaseGroup, |host, hypervisor, ask| {
            let by = ask.header.request_id;
            let functions = host.release_group(&hypervisor, ask.device, by).await.map_err(status)?;
            Ok(model::ReleasedGroup { functions }.into())
        })
    }

    type ServeHypercallsStream = Feed<pb::ServeHypercallsResponse>;

    async fn serve_hypercalls(
        &self,
        request: Request<Streaming<pb::ServeHypercallsRequest>>,
    ) -> Result<Response<Self::ServeHypercallsStream>, Status> {
        let caller = Caller::of(&request)?;
        let hypervisor = Arc::clone(caller.hypervisor()?);
        let mut answers = request.into_inner();
        let serving = Serving::begin(&hypervisor);
        let stream = feed(&self.host, &caller, None, |sender| async move {
            sender.send(Ok(pb::ServeHypercallsResponse::default())).await?;
            loop {
                let refused = tokio::select! {
                    ending = serving.end.wait() => ending.into_status(),
                    answer = answers.message() => match answer.map_err(typed_framing_status) {
                        Ok(Some(answer)) => match take_answer(&hypervisor, answer) {
                            Ok(()) => continue,
                            Err(status) => status,
                        },
                        Ok(None) => return Ok(()),
                        Err(status) => status,
                    },
                    calling = hypervisor.hypercalls.next(&serving) => {
                        let (tag, vm, payload) = (calling.tag, calling.vm, calling.payload);
                        sender.send(Ok(pb::ServeHypercallsResponse { tag, vm, payload })).await?;
                        continue;
                    }
                };
                return sender.send(Err(refused)).await;
            }
        });
        Ok(Response::new(stream))
    }
}

/// An answer to a hypercall. One that comes after its caller is gone is dropped; one to a call that never was breaks the protocol.
fn take_answer(hypervisor: &HypervisorState, answer: pb::ServeHypercallsRequest) -> Result<(), Status> {
    let answer: model::HypercallAnswer = parse(answer)?;
    if !hypervisor.hypercalls.knows(answer.tag) {
        let why = format!("tag: there was no hypercall {}", answer.tag);
        return Err(status(ProtocolViolation { why }));
    }
    let _caller_gone = hypervisor.hypercalls.answer(answer.tag, answer.answer);
    Ok(())
}
