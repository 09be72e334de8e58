//! The reference on the wire: what any server of these messages has to do, and nothing else.
//!
//! It decodes the same messages with the same codec behind the same listener and HTTP/2 settings, on the same runtime, and for
//! each batch allocates and fills an answer of the size that the server's answer has. Like the server it answers from the
//! stream itself, without a task or a channel between.

use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;

use anyhow::Context;
use iommu_proto::pb::device_service_server::{DeviceService, DeviceServiceServer};
use iommu_proto::pb::device_to_server::Message as Up;
use iommu_proto::pb::server_to_device::Message as Down;
use iommu_proto::{limits, pb};
use iommu_server::bounds;
use iommu_server::cli::ServeArgs;
use iommu_server::config::Config;
use iommu_server::ending::EndSignal;
use iommu_server::listen::{Entrance, Listeners};
use iommu_server::server::transport;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};

/// What an answer is filled with.
const FILLING: u8 = 0x5a;

struct Echo;

type Answers = Pin<Box<dyn Stream<Item = Result<pb::ServerToDevice, Status>> + Send>>;

#[tonic::async_trait]
impl DeviceService for Echo {
    type AttachStream = Answers;

    async fn attach(
        &self,
        request: Request<Streaming<pb::DeviceToServer>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let answers = request.into_inner().map(|message| answer(message?));
        Ok(Response::new(Box::pin(answers)))
    }
}

fn answer(message: pb::DeviceToServer) -> Result<pb::ServerToDevice, Status> {
    let message = match message.message {
        Some(Up::Hello(_)) => Down::Welcome(pb::Welcome {
            schema_version: limits::SCHEMA_VERSION,
            generation: 1,
            dma_credits: bounds::DMA_CREDITS,
            batch_operations_max: bounds::BATCH.operations_max,
            batch_bytes_max: bounds::BATCH.bytes_max,
            assignment_generation: 1,
        }),
        Some(Up::Dma(batch)) => Down::Dma(completions(&batch)),
        _ => return Err(Status::unimplemented("the echo answers Hello and DMA")),
    };
    Ok(pb::ServerToDevice { message: Some(message) })
}

/// An answer as long as the server's: the bytes of the reads.
fn completions(batch: &pb::DmaBatch) -> pb::DmaCompletions {
    let sizes = batch.size_bytes.iter().map(|&size| size as usize);
    let all_alike = |sizes: usize| if batch.size_bytes.len() == 1 { sizes * batch.iova.len() } else { sizes };
    let bytes = match batch.kind.as_ref() {
        [] | [0] => all_alike(sizes.sum()),
        [_] => 0,
        kinds => {
            let size = |index: usize| batch.size_bytes.get(index).or(batch.size_bytes.first());
            let reads = kinds.iter().enumerate().filter(|(_, kind)| **kind == 0);
            reads.filter_map(|(index, _)| size(index)).map(|&size| size as usize).sum()
        }
    };
    pb::DmaCompletions {
        first_tag: batch.first_tag,
        payload: vec![FILLING; bytes].into(),
        ..pb::DmaCompletions::default()
    }
}

/// Serves until it is killed. Prints a line of JSON when it is ready, as the server does.
pub(crate) async fn serve(listen: SocketAddr, listen_unix: &Path) -> anyhow::Result<()> {
    let config = Config::from_args(ServeArgs {
        insecure_plaintext: true,
        listen: vec![listen],
        listen_unix: vec![listen_unix.to_owned()],
        admin: Some("off".to_owned()),
        ..ServeArgs::default()
    })?;
    let listeners = Listeners::bind(&config).await?;
    let addresses: Vec<String> = listeners.tcp_addresses().iter().map(SocketAddr::to_string).collect();
    let ready = serde_json::json!({ "event": "ready", "listen": addresses });
    crate::print(&format!("{ready}\n"))?;
    let connections = listeners.accept(&Arc::default(), &EndSignal::new(), &Entrance::plaintext())?;
    let service = DeviceServiceServer::new(Echo)
        .max_decoding_message_size(limits::MESSAGE_BYTES_MAX)
        .max_encoding_message_size(limits::MESSAGE_BYTES_MAX);
    transport(config.keepalive)
        .add_service(service)
        .serve_with_incoming(connections)
        .await
        .context("serve the echo")
}
