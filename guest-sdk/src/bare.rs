//! Bare machines: a PCI segment, memory from address 0, one VT-d unit, and devices behind it. The client
//! plays the operating system: it writes the tables into the machine's memory and programs the unit's
//! registers.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use iommu_proto::model;
pub use iommu_proto::model::{EventMessage, Machine, MachineDevice, MachineInterrupt};
use iommu_proto::pb;
use iommu_proto::pb::bare_machine_service_client::BareMachineServiceClient;
use iommu_types::errors::{CreateMachineError, MemoryError, MmioError, RegisterError, UnknownMachine};
use iommu_types::{AccessWidth, Capabilities, DeviceAddress, InvalidRange, SourceId};
use tonic::Streaming;
use tonic::transport::Channel;

use crate::connection::{Core, MESSAGE_BYTES_MAX};
use crate::convert::bad_answer;
use crate::subscription::{Feed, subscribe};
use crate::{Inspect, Never, SdkError, Subscription};

/// A client of bare machines; it owns those that it creates.
#[derive(Clone, Debug)]
pub struct BareClient {
    core: Arc<Core>,
}

/// A bare machine. It stays until it is destroyed or the session is reclaimed; dropping the value destroys
/// nothing.
#[derive(Clone, Debug)]
pub struct BareMachine {
    core: Arc<Core>,
    segment: u16,
    capabilities: Capabilities,
}

fn client(channel: Channel) -> BareMachineServiceClient<Channel> {
    BareMachineServiceClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX)
}

impl BareClient {
    pub(crate) fn new(core: Arc<Core>) -> Self {
        Self { core }
    }

    /// Creates a machine of `memory_bytes` (a multiple of 4096) with the devices named; `None` gives its unit
    /// everything that is built. Creating has no request ID and is not retried: after an error without an
    /// answer, [`list`](Self::list) tells whether it is there.
    pub async fn create(
        &self,
        memory_bytes: u64,
        capabilities: Option<Capabilities>,
        devices: Vec<MachineDevice>,
    ) -> Result<BareMachine, SdkError<CreateMachineError>> {
        let message: pb::CreateMachineRequest =
            model::CreateMachine { memory_bytes, capabilities, devices }.into();
        let answer = self
            .core
            .call_once(|channel| {
                let request = self.core.request(message.clone());
                async move { client(channel).create(request).await }
            })
            .await?;
        let model::CreatedMachine { segment, capabilities } = answer.try_into().map_err(bad_answer)?;
        Ok(BareMachine { core: Arc::clone(&self.core), segment, capabilities })
    }

    /// The machines of this client.
    pub async fn list(&self) -> Result<Vec<Machine>, SdkError<Never>> {
        let answer = self
            .core
            .call(|channel| {
                let request = self.core.request(pb::ListMachinesRequest {});
                async move { client(channel).list(request).await }
            })
            .await?;
        Ok(model::Machines::try_from(answer).map_err(bad_answer)?.machines)
    }

    /// The inspection service, for the counters and tables of this client's machines.
    pub fn inspect(&self) -> Inspect {
        Inspect::new(Arc::clone(&self.core))
    }
}

impl BareMachine {
    /// Its segment, which names it and is the segment of its devices.
    pub fn segment(&self) -> u16 {
        self.segment
    }

    /// What its unit can do.
    pub fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    /// The address of its device with this requester ID.
    pub fn device(&self, source_id: SourceId) -> DeviceAddress {
        DeviceAddress::new(self.segment, source_id)
    }

    /// Reads a 4-byte register of the unit at `offset` (VT-d 5.10 §11.4).
    pub async fn read32(&self, offset: u32) -> Result<u32, SdkError<RegisterError>> {
        let value = self.read_register(offset, AccessWidth::Bytes4).await?;
        Ok(u32::try_from(value).map_err(bad_answer)?)
    }

    /// Reads an 8-byte register of the unit.
    pub async fn read64(&self, offset: u32) -> Result<u64, SdkError<RegisterError>> {
        self.read_register(offset, AccessWidth::Bytes8).await
    }

    /// Writes a 4-byte register of the unit. Writing the queue tail starts the queue, which goes on after the
    /// answer. Not retried: some registers act by being written.
    pub async fn write32(&self, offset: u32, value: u32) -> Result<(), SdkError<RegisterError>> {
        self.write_register(offset, AccessWidth::Bytes4, value.into()).await
    }

    /// Writes an 8-byte register of the unit. Not retried.
    pub async fn write64(&self, offset: u32, value: u64) -> Result<(), SdkError<RegisterError>> {
        self.write_register(offset, AccessWidth::Bytes8, value).await
    }

    async fn read_register(&self, offset: u32, width: AccessWidth) -> Result<u64, SdkError<RegisterError>> {
        let message: pb::ReadRegisterRequest =
            model::ReadRegister { segment: self.segment, offset, width_bytes: width }.into();
        let answer = self
            .core
            .call(|channel| {
                let request = self.core.request(message);
                async move { client(channel).read_register(request).await }
            })
            .await?;
        Ok(answer.value)
    }

    async fn write_register(
        &self,
        offset: u32,
        width: AccessWidth,
        value: u64,
    ) -> Result<(), SdkError<RegisterError>> {
        let message: pb::WriteRegisterRequest =
            model::WriteRegister { segment: self.segment, offset, width_bytes: width, value }.into();
        self.core
            .call_once(|channel| {
                let request = self.core.request(message);
                async move { client(channel).write_register(request).await }
            })
            .await
            .map(drop)
    }

    /// Reads `size_bytes` of the machine's memory at physical address `address`; any amount, message by
    /// message.
    pub async fn read_memory(&self, address: u64, size_bytes: u64) -> Result<Bytes, SdkError<MemoryError>> {
        check_range(address, size_bytes)?;
        let most = u64::from(self.core.limits().batch_bytes_max);
        let mut data = BytesMut::new();
        while (data.len() as u64) < size_bytes {
            let done = data.len() as u64;
            let piece_bytes = (size_bytes - done).min(most);
            let message = pb::ReadMachineMemoryRequest {
                segment: self.segment.into(),
                address: address + done,
                size_bytes: u32::try_from(piece_bytes).map_err(bad_answer)?,
            };
            let answer = self
                .core
                .call(|channel| {
                    let request = self.core.request(message);
                    async move { client(channel).read_memory(request).await }
                })
                .await?;
            if answer.data.len() as u64 != piece_bytes {
                let why = format!("data: {} bytes where {piece_bytes} were asked for", answer.data.len());
                return Err(bad_answer(why).into());
            }
            if piece_bytes == size_bytes {
                return Ok(answer.data);
            }
            data.extend_from_slice(&answer.data);
        }
        Ok(data.freeze())
    }

    /// Writes `data` into the machine's memory; any amount, message by message. Aligned 8-byte units are
    /// written atomically. Writing the same bytes again is harmless, so lost messages are repeated.
    pub async fn write_memory(
        &self,
        address: u64,
        data: impl Into<Bytes>,
    ) -> Result<(), SdkError<MemoryError>> {
        let mut rest: Bytes = data.into();
        check_range(address, rest.len() as u64)?;
        let most = self.core.limits().batch_bytes_max as usize;
        let mut at = address;
        while !rest.is_empty() {
            let piece = rest.split_to(rest.len().min(most));
            let piece_bytes = piece.len() as u64;
            let message =
                pb::WriteMachineMemoryRequest { segment: self.segment.into(), address: at, data: piece };
            self.core
                .call(|channel| {
                    let request = self.core.request(message.clone());
                    async move { client(channel).write_memory(request).await }
                })
                .await?;
            at = at.wrapping_add(piece_bytes);
        }
        Ok(())
    }

    /// Interrupts of the machine's devices and event messages of its unit, from now on. Returns once the
    /// subscription stands; after a lost connection it goes on with what comes then.
    pub async fn watch_interrupts(
        &self,
    ) -> Result<Subscription<MachineInterrupt, UnknownMachine>, SdkError<UnknownMachine>> {
        subscribe(MachineFeed { core: Arc::clone(&self.core), segment: self.segment }).await
    }

    /// Reads a register of a device of the machine, in BAR 0.
    pub async fn mmio_read(
        &self,
        source_id: SourceId,
        offset: u64,
        width: AccessWidth,
    ) -> Result<u64, SdkError<MmioError>> {
        let message = pb::MmioReadRequest {
            device: Some(self.device(source_id).into()),
            bar: 0,
            offset,
            width_bytes: width.bytes(),
        };
        let answer = self
            .core
            .call(|channel| {
                let request = self.core.request(message);
                async move { client(channel).mmio_read(request).await }
            })
            .await?;
        Ok(answer.value)
    }

    /// Writes a register of a device of the machine, in BAR 0. Not retried.
    pub async fn mmio_write(
        &self,
        source_id: SourceId,
        offset: u64,
        width: AccessWidth,
        value: u64,
    ) -> Result<(), SdkError<MmioError>> {
        let message = pb::MmioWriteRequest {
            device: Some(self.device(source_id).into()),
            bar: 0,
            offset,
            width_bytes: width.bytes(),
            value,
        };
        self.core
            .call_once(|channel| {
                let request = self.core.request(message);
                async move { client(channel).mmio_write(request).await }
            })
            .await
            .map(drop)
    }

    /// Ends the sessions of its devices and forgets everything.
    pub async fn destroy(self) -> Result<(), SdkError<UnknownMachine>> {
        let message: pb::DestroyMachineRequest = model::DestroyMachine { segment: self.segment }.into();
        self.core
            .call_once(|channel| {
                let request = self.core.request(message);
                async move { client(channel).destroy(request).await }
            })
            .await
            .map(drop)
    }
}

fn check_range(address: u64, size_bytes: u64) -> Result<(), SdkError<MemoryError>> {
    let empty = InvalidRange::Empty { space: "hpa", base: address };
    let wraps = InvalidRange::Wraps { space: "hpa", base: address, size_bytes };
    let last = size_bytes.checked_sub(1).ok_or(SdkError::Refused(empty.into()))?;
    address.checked_add(last).map(drop).ok_or(SdkError::Refused(wraps.into()))
}

struct MachineFeed {
    core: Arc<Core>,
    segment: u16,
}

impl Feed for MachineFeed {
    type Message = pb::WatchMachineInterruptsResponse;
    type Item = MachineInterrupt;
    type Error = UnknownMachine;

    async fn open(&mut self) -> Result<Streaming<Self::Message>, SdkError<UnknownMachine>> {
        let message: pb::WatchMachineInterruptsRequest =
            model::WatchMachineInterrupts { segment: self.segment }.into();
        self.core.call(|channel| async move { client(channel).watch_interrupts(message).await }).await
    }

    fn items(&mut self, message: Self::Message) -> Result<Vec<MachineInterrupt>, String> {
        let parsed = model::MachineInterrupts::try_from(message).map_err(|error| error.to_string())?;
        Ok(parsed.interrupts)
    }

    fn resumed(&mut self) -> Option<MachineInterrupt> {
        None
    }
}
