//! A scripted server of device streams that takes whatever comes: the test plays the server, message by message.

#![allow(dead_code, reason = "each test file uses its part")]

use std::pin::Pin;
use std::sync::Mutex;
use std::time::Duration;

use iommu_proto::credentials::Credentials;
use iommu_proto::pb;
use iommu_proto::pb::device_service_server::{DeviceService, DeviceServiceServer};
use iommu_proto::pb::device_to_server::Message as Up;
use iommu_proto::pb::server_to_device::Message as Down;
use rogue::device::Device;
use rogue::language::{Answer, Command};
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status, Streaming};

const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("{what} did not come"))
}

struct Service(Mutex<mpsc::UnboundedSender<Script>>);

/// A stream, seen from the server.
pub(crate) struct Script {
    up: Streaming<pb::DeviceToServer>,
    down: mpsc::UnboundedSender<Result<pb::ServerToDevice, Status>>,
}

#[tonic::async_trait]
impl DeviceService for Service {
    type AttachStream = Pin<Box<dyn Stream<Item = Result<pb::ServerToDevice, Status>> + Send>>;

    async fn attach(
        &self,
        request: Request<Streaming<pb::DeviceToServer>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let (down, messages) = mpsc::unbounded_channel();
        let told = self.0.lock().expect("not poisoned").send(Script { up: request.into_inner(), down });
        assert!(told.is_ok(), "the test still listens");
        Ok(Response::new(Box::pin(UnboundedReceiverStream::new(messages))))
    }
}

/// A server, and a hostile device that knows where it listens.
pub(crate) struct Bench {
    pub(crate) device: Device,
    scripts: mpsc::UnboundedReceiver<Script>,
}

impl Bench {
    pub(crate) async fn start() -> Self {
        let incoming = TcpIncoming::bind("127.0.0.1:0".parse().expect("an address")).expect("a free port");
        let endpoint = format!("http://{}", incoming.local_addr().expect("bound"));
        let (sender, scripts) = mpsc::unbounded_channel();
        let service =
            DeviceServiceServer::new(Service(Mutex::new(sender))).max_decoding_message_size(16 << 20);
        tokio::spawn(tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming));
        Self { device: Device::new(&endpoint, Credentials::from_directory("/nonexistent")), scripts }
    }

    /// Tells the device something while the server follows a script.
    pub(crate) async fn play<T>(&mut self, line: &str, script: impl Future<Output = T>) -> (Answer, T) {
        let command: Command = serde_json::from_str(line).unwrap_or_else(|error| panic!("{line}: {error}"));
        let both = async { tokio::join!(self.device.obey(command), script) };
        let (answer, scripted) = soon(line, both).await;
        (answer.expect("not told to quit"), scripted)
    }

    /// Tells it something that the server has no part in.
    pub(crate) async fn tell(&mut self, line: &str) -> Answer {
        self.play(line, async {}).await.0
    }

    /// Connects, with these credits, under assignment generation 5.
    pub(crate) async fn connected(&mut self, line: &str, dma_credits: u32) -> (Answer, Script, pb::Hello) {
        let command: Command = serde_json::from_str(line).expect("a command");
        let scripts = &mut self.scripts;
        let script = async {
            let mut script = scripts.recv().await.expect("a stream");
            let hello = match script.next().await {
                Up::Hello(hello) => hello,
                other => panic!("Hello was due, not {other:?}"),
            };
            script.say(Down::Welcome(pb::Welcome {
                schema_version: 1,
                generation: 3,
                dma_credits,
                batch_operations_max: 16,
                batch_bytes_max: 4096,
                assignment_generation: 5,
            }));
            (script, hello)
        };
        let both = async { tokio::join!(self.device.obey(command), script) };
        let (answer, (script, hello)) = soon("a session", both).await;
        (answer.expect("not told to quit"), script, hello)
    }

    /// Connects as the usual device.
    pub(crate) async fn usual(&mut self) -> Script {
        self.connected(CONNECT, 2).await.1
    }
}

pub(crate) const CONNECT: &str = r#"{"do":"connect","name":"engine0","address":"00:01.0"}"#;

impl Script {
    pub(crate) fn say(&self, message: Down) {
        let _ = self.down.send(Ok(pb::ServerToDevice { message: Some(message) }));
    }

    pub(crate) fn end(&self, status: Status) {
        let _ = self.down.send(Err(status));
    }

    pub(crate) async fn next(&mut self) -> Up {
        let message = soon("a message", self.up.next()).await.expect("the stream goes on").expect("readable");
        message.message.expect("a known message")
    }

    pub(crate) async fn batch(&mut self) -> pb::DmaBatch {
        match self.next().await {
            Up::Dma(batch) => batch,
            other => panic!("a batch was due, not {other:?}"),
        }
    }

    /// Takes a batch and answers with this payload and these faults.
    pub(crate) async fn answer(&mut self, payload: &[u8], faults: &[(u32, u32)]) -> pb::DmaBatch {
        let batch = self.batch().await;
        self.complete(&batch, payload, faults);
        batch
    }

    pub(crate) fn complete(&self, batch: &pb::DmaBatch, payload: &[u8], faults: &[(u32, u32)]) {
        self.say(Down::Dma(pb::DmaCompletions {
            first_tag: batch.first_tag,
            payload: payload.to_vec().into(),
            fault_index: faults.iter().map(|fault| fault.0).collect(),
            fault_reason: faults.iter().map(|fault| fault.1).collect(),
            fault_iova: faults.iter().map(|fault| batch.iova[fault.0 as usize]).collect(),
            fault_done_bytes: vec![0; faults.len()],
        }));
    }
}
