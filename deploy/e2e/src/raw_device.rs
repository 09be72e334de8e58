//! A device that keeps to no rule: a stream by hand, on a connection of its own with a certificate of its own.

use bytes::Bytes;
use iommu_launch::Server;
use iommu_proto::pb;
use iommu_proto::pb::device_to_server::Message as Up;
use iommu_proto::pb::server_to_device::Message as Down;
use iommu_types::{DeviceAddress, Identity, Role};
use tonic::Status;

use crate::raw::{ATTACH, Door, RawStream, envelope, hello};

/// Not present: the device is attached to nothing.
pub const NO_CONTEXT: u32 = 0x2;
/// The tables give no write permission.
pub const WRITE_DENIED: u32 = 0x5;
/// Requests that claim to be translated are blocked.
pub const TRANSLATED_BLOCKED: u32 = 0xd;
/// Queued for an earlier owner.
pub const STALE: u32 = 0x1001;
/// Makes no sense.
pub const MALFORMED: u32 = 0x1003;
/// Over dma_operations_per_second of the owner.
pub const OVER_OPERATIONS: u32 = 0x1005;
/// Over dma_bytes_per_second of the owner.
pub const OVER_BYTES: u32 = 0x1006;

/// The kind of operation that is a write with an answer.
pub const WRITE: u8 = 1;

/// The first message of a device's stream.
pub fn hello_as(name: &str, address: DeviceAddress) -> Up {
    Up::Hello(pb::Hello { name: name.to_owned(), address: Some(address.into()), ..hello(0) })
}

/// Who a device is.
pub fn identity(name: &str, address: DeviceAddress) -> Identity {
    Identity { name: name.to_owned(), role: Role::Device(address) }
}

/// Reads of `size_bytes` at these addresses.
pub fn reads(iova: &[u64], size_bytes: u32) -> pb::DmaBatch {
    pb::DmaBatch { iova: iova.to_vec(), size_bytes: vec![size_bytes], ..pb::DmaBatch::default() }
}

/// Writes of `data` at these addresses.
pub fn writes(iova: &[u64], data: &[u8]) -> pb::DmaBatch {
    pb::DmaBatch {
        iova: iova.to_vec(),
        size_bytes: vec![u32::try_from(data.len()).expect("few bytes")],
        kind: Bytes::from_static(&[WRITE]),
        payload: data.repeat(iova.len()).into(),
        ..pb::DmaBatch::default()
    }
}

/// A session of a device by hand. It answers resets and register accesses while it waits for something else.
#[derive(Debug)]
pub struct RawDevice {
    stream: RawStream,
    /// What the server said first.
    pub welcome: pb::Welcome,
    next_tag: u64,
}

impl RawDevice {
    /// Connects as who it is, and says so.
    pub async fn attach(server: &Server, name: &str, address: DeviceAddress) -> Result<Self, Status> {
        let identity = identity(name, address);
        Self::claim(&Door::to(server, &identity), &identity, (name, address)).await
    }

    /// Connects as who its certificate says, and says to be this one.
    pub async fn claim(door: &Door, own: &Identity, claimed: (&str, DeviceAddress)) -> Result<Self, Status> {
        let channel = door.connect(own).await;
        let first = envelope(hello_as(claimed.0, claimed.1));
        let mut stream = RawStream::open(&channel, ATTACH, first).await?;
        match stream.hear_device().await? {
            Down::Welcome(welcome) => Ok(Self { stream, welcome, next_tag: 1 }),
            other => panic!("a Welcome was expected, not {other:?}"),
        }
    }

    /// Says this. `false` when the session is over.
    pub async fn say(&self, message: Up) -> bool {
        self.stream.say(envelope(message)).await
    }

    /// The next message that is no register access, which it answers.
    pub async fn hear(&mut self) -> Result<Down, Status> {
        loop {
            match self.stream.hear_device().await? {
                Down::Mmio(request) => {
                    let outcome = Some(pb::mmio_completion::Outcome::Value(0));
                    self.say(Up::Mmio(pb::MmioCompletion { tag: request.tag, outcome })).await;
                }
                message => return Ok(message),
            }
        }
    }

    /// Sends a batch, without waiting for its answer. Gives its first tag.
    pub async fn send(&mut self, batch: pb::DmaBatch) -> u64 {
        let first_tag = self.next_tag;
        self.next_tag += batch.iova.len() as u64;
        self.say(Up::Dma(pb::DmaBatch { first_tag, ..batch })).await;
        first_tag
    }

    /// Sends a batch and gives its answer; does at once what it is asked meanwhile.
    pub async fn batch(&mut self, batch: pb::DmaBatch) -> Result<pb::DmaCompletions, Status> {
        self.send(batch).await;
        loop {
            match self.hear().await? {
                Down::Dma(completions) => return Ok(completions),
                Down::Reset(reset) => {
                    self.say(Up::ResetDone(pb::ResetDone { tag: reset.tag })).await;
                }
                other => panic!("an answer was expected, not {other:?}"),
            }
        }
    }
}
