//! The part of the scripted server that a hypervisor calls.

use iommu_proto::pb;
use tokio_stream::StreamExt;
use tonic::{Request, Response, Status, Streaming};

use super::{Fake, Replies, script};

macro_rules! hypervisor_service {
    ($($method:ident: $request:ident => $response:ident;)* ; $($plain:ident: $plain_request:ident => $plain_response:ident;)*) => {
        #[tonic::async_trait]
        impl pb::hypervisor_service_server::HypervisorService for Fake {
            $(async fn $method(&self, request: Request<pb::$request>) -> Result<Response<pb::$response>, Status> {
                self.enter(stringify!($method), &request, request.get_ref().header.as_ref())?;
                self.keep(request.get_ref());
                self.scripted(stringify!($method))
            })*
            $(async fn $plain(&self, request: Request<pb::$plain_request>) -> Result<Response<pb::$plain_response>, Status> {
                self.enter(stringify!($plain), &request, None)?;
                self.held(stringify!($plain)).await;
                self.scripted(stringify!($plain))
            })*

            type ServeHypercallsStream = Replies<pb::ServeHypercallsResponse>;
            async fn serve_hypercalls(
                &self,
                request: Request<Streaming<pb::ServeHypercallsRequest>>,
            ) -> Result<Response<Self::ServeHypercallsStream>, Status> {
                self.enter("serve_hypercalls", &request, None)?;
                let (fake, mut answers) = (self.clone(), request.into_inner());
                let calls = self.state().hypercalls.pop_front().unwrap_or_default();
                let stands = std::iter::once(Ok(pb::ServeHypercallsResponse::default()));
                let mut calls = script(stands.chain(calls).collect());
                // Calls go out as they are scripted, answers are kept as they come.
                let end = std::sync::Arc::clone(&self.state().hypercalls_end);
                let (sender, replies) = tokio::sync::mpsc::channel(1);
                tokio::spawn(async move {
                    loop {
                        tokio::select! {
                            Some(call) = calls.next() => {
                                if sender.send(call).await.is_err() { return; }
                            }
                            answer = answers.message() => match answer {
                                Ok(Some(answer)) => fake.state().hypercall_answers.push(answer),
                                _ => return,
                            },
                            () = end.notified() => {
                                let _ = sender.send(Err(Status::unavailable("the server goes"))).await;
                                return;
                            }
                        }
                    }
                });
                Ok(Response::new(Box::pin(tokio_stream::wrappers::ReceiverStream::new(replies))))
            }
        }
    };
}

hypervisor_service! {
    create_vm: CreateVmRequest => CreateVmResponse;
    destroy_vm: DestroyVmRequest => DestroyVmResponse;
    add_memory: AddMemoryRequest => AddMemoryResponse;
    remove_memory: RemoveMemoryRequest => RemoveMemoryResponse;
    move_memory: MoveMemoryRequest => MoveMemoryResponse;
    declare_function: DeclareFunctionRequest => DeclareFunctionResponse;
    remove_function: RemoveFunctionRequest => RemoveFunctionResponse;
    assign_group: AssignGroupRequest => AssignGroupResponse;
    release_group: ReleaseGroupRequest => ReleaseGroupResponse;
    ;
    list_vms: ListVmsRequest => ListVmsResponse;
    list_functions: ListFunctionsRequest => ListFunctionsResponse;
}
