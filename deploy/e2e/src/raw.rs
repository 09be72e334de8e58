//! Peers that say what no well-behaved client says: bytes chosen by hand, under any method.

use std::path::PathBuf;

use bytes::{Buf, BufMut, Bytes};
use iommu_launch::Server;
use iommu_proto::channel::Dial;
use iommu_proto::credentials::Credentials;
use iommu_proto::errors::reason_of;
use iommu_proto::pb;
use iommu_types::Identity;
use prost::Message;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::client::Grpc;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status, Streaming};

/// Bytes as they are.
#[derive(Clone, Copy, Debug, Default)]
pub struct BytesCodec;

impl Codec for BytesCodec {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;
    fn encoder(&mut self) -> Self {
        Self
    }
    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for BytesCodec {
    type Item = Bytes;
    type Error = Status;
    fn encode(&mut self, bytes: Bytes, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put(bytes);
        Ok(())
    }
}

impl Decoder for BytesCodec {
    type Item = Bytes;
    type Error = Status;
    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        let length = buffer.remaining();
        Ok(Some(buffer.copy_to_bytes(length)))
    }
}

/// A connection without a session.
pub async fn connect(endpoint: &str) -> Channel {
    configured(endpoint).connect().await.expect("the server accepts connections")
}

/// Where a server listens over TLS, and where certificates lie.
#[derive(Clone, Debug)]
pub struct Door {
    endpoint: String,
    pki: PathBuf,
}

impl Door {
    /// Of a server, open to this identity, which gets a certificate if it has none.
    pub fn to(server: &Server, identity: &Identity) -> Self {
        server.admit(identity).expect("certificates can be issued");
        Self { endpoint: server.endpoint().to_owned(), pki: server.pki() }
    }

    /// A connection of its own, with the certificate of this identity. Without a session.
    pub async fn connect(&self, identity: &Identity) -> Channel {
        let credentials = Credentials::from_directory(&self.pki);
        let dial = Dial::to(&self.endpoint, &credentials, identity).expect("an endpoint");
        dial.connect().await.expect("the server accepts connections").channel
    }
}

/// A connection of its own over mutual TLS, with the certificate of this identity. Without a session.
pub async fn connect_as(server: &Server, identity: &Identity) -> Channel {
    Door::to(server, identity).connect(identity).await
}

fn configured(endpoint: &str) -> Endpoint {
    Endpoint::from_shared(endpoint.to_owned()).expect("an endpoint")
}

/// Calls a unary method with these bytes as its message.
pub async fn call(channel: &Channel, method: &str, message: impl Into<Bytes>) -> Result<Bytes, Status> {
    let mut grpc = Grpc::new(channel.clone());
    grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
    let path = PathAndQuery::try_from(method).expect("a method is a path");
    grpc.unary(Request::new(message.into()), path, BytesCodec).await.map(tonic::Response::into_inner)
}

/// Calls a method of any kind with an empty message; `Err` when it is refused before there is an answer.
pub async fn knock(channel: &Channel, service: &str, method: &str) -> Result<(), Status> {
    let mut grpc = Grpc::new(channel.clone());
    grpc.ready().await.map_err(|error| Status::from_error(Box::new(error)))?;
    let path = PathAndQuery::try_from(format!("/{service}/{method}")).expect("a method is a path");
    grpc.server_streaming(Request::new(Bytes::new()), path, BytesCodec).await.map(drop)
}

/// Calls a unary method and reads its answer.
pub async fn ask<A: Message + Default>(
    channel: &Channel,
    method: &str,
    message: &impl Message,
) -> Result<A, Status> {
    let answer = call(channel, method, message.encode_to_vec()).await?;
    Ok(A::decode(answer).expect("the server's answers decode"))
}

/// The typed reason of a refusal; the transport's own words where there is none.
pub fn reason(status: &Status) -> String {
    reason_of(status).unwrap_or_else(|| format!("untyped {:?}: {}", status.code(), status.message()))
}

/// An OpenRequest of this version.
pub fn open_request(name: &str, role: pb::open_request::Role) -> pb::OpenRequest {
    pb::OpenRequest { schema_version: 1, name: name.to_owned(), role: Some(role), resume_token: Bytes::new() }
}

/// A connection with a driver's session.
pub async fn driver(endpoint: &str, number: u32) -> Channel {
    let channel = connect(endpoint).await;
    let role = pb::DriverRole { owner: Some(iommu_types::Owner::Driver(number).into()) };
    let open = open_request(&format!("driver{number}"), pb::open_request::Role::Driver(role));
    let _: pb::OpenResponse =
        ask(&channel, "/iommu.v1.SessionService/Open", &open).await.expect("the driver is admitted");
    channel
}

/// A Hello of this version.
pub fn hello(number: u32) -> pb::Hello {
    pb::Hello {
        schema_version: 1,
        name: format!("engine{number}"),
        address: Some(crate::stage::address(number).into()),
        mmio_credits: 16,
    }
}

/// The same as the content of an envelope.
pub fn hello_message(number: u32) -> pb::device_to_server::Message {
    pb::device_to_server::Message::Hello(hello(number))
}

/// An envelope of a device.
pub fn envelope(message: pb::device_to_server::Message) -> Bytes {
    pb::DeviceToServer { message: Some(message) }.encode_to_vec().into()
}

/// A device's stream, by hand.
#[derive(Debug)]
pub struct RawStream {
    up: mpsc::Sender<Bytes>,
    down: Streaming<Bytes>,
}

/// The method of a device's stream.
pub const ATTACH: &str = "/iommu.v1.DeviceService/Attach";

/// Receive window of a raw stream, in bytes: so little that a peer that does not read is noticed soon.
const WINDOW_BYTES: u32 = 65_535;

impl RawStream {
    /// Opens a bidirectional stream on a connection and says `first` at once.
    pub async fn open(channel: &Channel, method: &str, first: Bytes) -> Result<Self, Status> {
        let (up, outbound) = mpsc::channel(64);
        up.send(first).await.expect("the channel is open");
        let mut grpc = Grpc::new(channel.clone());
        grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
        let path = PathAndQuery::try_from(method).expect("a method is a path");
        let down =
            grpc.streaming(Request::new(ReceiverStream::new(outbound)), path, BytesCodec).await?.into_inner();
        Ok(Self { up, down })
    }

    /// A device's stream on a connection of its own, whose first message is these bytes.
    pub async fn attach(endpoint: &str, first: Bytes) -> Result<Self, Status> {
        let endpoint = configured(endpoint)
            .initial_stream_window_size(WINDOW_BYTES)
            .initial_connection_window_size(WINDOW_BYTES);
        let channel = endpoint.connect().await.expect("the server accepts connections");
        Self::open(&channel, ATTACH, first).await
    }

    /// Says this. `false` when the stream is over.
    pub async fn say(&self, message: Bytes) -> bool {
        self.up.send(message).await.is_ok()
    }

    /// Takes the next message.
    pub async fn hear(&mut self) -> Result<Bytes, Status> {
        let next = tokio::time::timeout(crate::stage::SOON, self.down.message()).await;
        next.expect("the server says something soon")?.ok_or_else(|| Status::ok("the stream ended"))
    }

    /// Takes the next message of a device's stream.
    pub async fn hear_device(&mut self) -> Result<pb::server_to_device::Message, Status> {
        let message = pb::ServerToDevice::decode(self.hear().await?).expect("the server's messages decode");
        Ok(message.message.expect("the server's envelopes have a content"))
    }

    /// Takes the answer to a batch.
    pub async fn hear_dma(&mut self) -> Result<pb::DmaCompletions, Status> {
        match self.hear_device().await? {
            pb::server_to_device::Message::Dma(completions) => Ok(completions),
            other => panic!("the answer to a batch was expected, not {other:?}"),
        }
    }

    /// Takes everything until the stream ends, and says how it ended.
    pub async fn end(&mut self) -> Status {
        loop {
            if let Err(status) = self.hear().await {
                return status;
            }
        }
    }
}
