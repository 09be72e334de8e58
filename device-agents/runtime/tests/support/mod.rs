//! A scripted server of device streams: the test plays the server, message by message.

#![allow(dead_code, reason = "each test file uses its part")]

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Mutex;
use std::time::Duration;

use iommu_proto::errors::WireError;
use iommu_proto::model::{FromDevice, Hello, MmioAccess, MmioCompletion, MmioRequest, ToDevice, Welcome};
use iommu_proto::pb;
use iommu_proto::pb::device_service_server::{DeviceService, DeviceServiceServer};
use iommu_types::{AccessWidth, DeviceAddress, Generation};
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status, Streaming};

/// How long a test waits for what must come. Long, because it only passes when something is broken.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) fn address() -> DeviceAddress {
    "0000:00:05.0".parse().expect("a valid address")
}

pub(crate) async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("{what} did not come"))
}

pub(crate) struct FakeServer {
    address: SocketAddr,
    attached: tokio::sync::Mutex<mpsc::UnboundedReceiver<Attached>>,
}

/// A device stream, seen from the server.
pub(crate) struct Attached {
    pub(crate) hello: Hello,
    up: Streaming<pb::DeviceToServer>,
    pub(crate) down: mpsc::UnboundedSender<Result<pb::ServerToDevice, Status>>,
}

struct Service {
    attached: Mutex<mpsc::UnboundedSender<Attached>>,
}

#[tonic::async_trait]
impl DeviceService for Service {
    type AttachStream = Pin<Box<dyn Stream<Item = Result<pb::ServerToDevice, Status>> + Send>>;

    async fn attach(
        &self,
        request: Request<Streaming<pb::DeviceToServer>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let mut up = request.into_inner();
        let first = up.message().await?.ok_or_else(|| Status::cancelled("no Hello"))?;
        let Ok(FromDevice::Hello(hello)) = FromDevice::try_from(first) else {
            return Err(Status::invalid_argument("the first message is not Hello"));
        };
        let (down, messages) = mpsc::unbounded_channel();
        let attached = Attached { hello, up, down };
        let told = self.attached.lock().expect("not poisoned").send(attached);
        assert!(told.is_ok(), "the test still listens");
        Ok(Response::new(Box::pin(UnboundedReceiverStream::new(messages))))
    }
}

impl FakeServer {
    pub(crate) async fn start() -> Self {
        let incoming = TcpIncoming::bind("127.0.0.1:0".parse().expect("a valid address"))
            .expect("a free port")
            .with_nodelay(Some(true));
        let address = incoming.local_addr().expect("bound");
        let (sender, attached) = mpsc::unbounded_channel();
        let service = DeviceServiceServer::new(Service { attached: Mutex::new(sender) })
            .max_decoding_message_size(8 << 20);
        tokio::spawn(tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming));
        Self { address, attached: tokio::sync::Mutex::new(attached) }
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The next stream of an agent, before Welcome.
    pub(crate) async fn attached(&self) -> Attached {
        soon("an agent", async { self.attached.lock().await.recv().await.expect("serving") }).await
    }

    /// The next stream, welcomed with these credits.
    pub(crate) async fn welcomed(&self, generation: u64, dma_credits: u32) -> Attached {
        let attached = self.attached().await;
        attached.welcome(generation, dma_credits);
        attached
    }
}

impl Attached {
    pub(crate) fn welcome(&self, generation: u64, dma_credits: u32) {
        self.send(ToDevice::Welcome(Welcome {
            schema_version: 1,
            generation: Generation(generation),
            dma_credits,
            batch_operations_max: 256,
            batch_bytes_max: 1 << 20,
            assignment_generation: Generation(1),
        }));
    }

    pub(crate) fn send(&self, message: ToDevice) {
        // A device that is gone does not listen any more.
        let _ = self.down.send(Ok(message.into()));
    }

    pub(crate) fn end(&self, error: impl WireError) {
        let _ = self.down.send(Err(error.into_status()));
    }

    /// The next message of the device; `None` at the end of its stream.
    pub(crate) async fn next(&mut self) -> Option<FromDevice> {
        let message = soon("a message of the device", self.up.next()).await?;
        Some(FromDevice::try_from(message.ok()?).expect("the device speaks the schema"))
    }

    pub(crate) async fn batch(&mut self) -> pb::DmaBatch {
        match self.next().await {
            Some(FromDevice::Dma(batch)) => batch,
            other => panic!("a batch was due, not {other:?}"),
        }
    }

    pub(crate) async fn mmio_answer(&mut self) -> MmioCompletion {
        match self.next().await {
            Some(FromDevice::Mmio(completion)) => completion,
            other => panic!("an answer to a register access was due, not {other:?}"),
        }
    }

    /// Whether nothing comes for a moment.
    pub(crate) async fn is_silent(&mut self) -> bool {
        tokio::time::timeout(Duration::from_millis(50), self.up.next()).await.is_err()
    }

    pub(crate) fn mmio_write(&self, tag: u64, offset: u64, value: u64) {
        let access = MmioAccess { bar: 0, offset, width: AccessWidth::Bytes8, write_value: Some(value) };
        self.send(ToDevice::Mmio(MmioRequest { tag, access }));
    }

    pub(crate) fn mmio_read(&self, tag: u64, offset: u64) {
        let access = MmioAccess { bar: 0, offset, width: AccessWidth::Bytes8, write_value: None };
        self.send(ToDevice::Mmio(MmioRequest { tag, access }));
    }

    /// Answers a batch with success and this payload.
    pub(crate) fn complete(&self, batch: &pb::DmaBatch, payload: impl Into<bytes::Bytes>) {
        self.send(ToDevice::Dma(pb::DmaCompletions {
            first_tag: batch.first_tag,
            payload: payload.into(),
            ..Default::default()
        }));
    }
}
