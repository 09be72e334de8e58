//! `device.proto`: the stream of a device. Batches and completions are in [`crate::dma`].

use iommu_types::errors::InvalidField;
use iommu_types::{AccessWidth, DeviceAddress, Generation};

use super::session::check_name;
use super::{Field, absent, message_field, messages, parse, within, wrong_at};
use crate::dma::BatchLimits;
use crate::limits::{MMIO_CREDITS_MAX, MMIO_REFUSED_BYTES_MAX};
use crate::pb;

fn check_hello(hello: &Hello) -> Result<(), InvalidField> {
    check_name(&hello.name)?;
    if (1..=MMIO_CREDITS_MAX).contains(&hello.mmio_credits) {
        return Ok(());
    }
    Err(wrong_at("mmio_credits", format!("{} is not between 1 and {MMIO_CREDITS_MAX}", hello.mmio_credits)))
}

messages! {
    /// Who a device is, and what it takes.
    Hello as Hello {
        /// Major version of the schema that the agent speaks.
        schema_version: u32,
        /// Name in the configuration.
        name: String,
        /// The address that it claims.
        address: DeviceAddress,
        /// How many unanswered MMIO requests it takes.
        mmio_credits: u32,
    } check check_hello;
    /// What the session of a device is.
    Welcome as Welcome {
        /// Major version of the schema that the server speaks.
        schema_version: u32,
        /// Counts the sessions of this device address.
        generation: Generation,
        /// How many unanswered batches the server takes.
        dma_credits: u32,
        /// Most operations in one batch.
        batch_operations_max: u32,
        /// Most bytes of one batch.
        batch_bytes_max: u32,
        /// The device's generation: raised with every change of hand and every reset.
        assignment_generation: Generation,
    };
}

impl Welcome {
    /// What the session allows one batch.
    pub const fn batch_limits(&self) -> BatchLimits {
        BatchLimits { operations_max: self.batch_operations_max, bytes_max: self.batch_bytes_max }
    }
}

/// An access to a register of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MmioAccess {
    /// Base address register, 0 to 5.
    pub bar: u8,
    /// Offset in the BAR in bytes, a multiple of the width.
    pub offset: u64,
    /// How many bytes.
    pub width: AccessWidth,
    /// The value to write, which fits the width; `None` for a read.
    pub write_value: Option<u64>,
}

/// Base address registers of a PCI function of type 0.
const BAR_MAX: u8 = 5;

impl MmioAccess {
    /// Parses the fields of an access; `value_field` is what the message calls the value.
    pub(super) fn parse(
        bar: u32,
        offset: u64,
        width_bytes: u32,
        write_value: Option<u64>,
        value_field: &str,
    ) -> Result<Self, InvalidField> {
        let bar: u8 = parse("bar", bar)?;
        let width: AccessWidth = parse("width_bytes", width_bytes)?;
        if bar > BAR_MAX {
            return Err(wrong_at("bar", format!("{bar} is more than {BAR_MAX}")));
        }
        if !offset.is_multiple_of(u64::from(width.bytes())) {
            let why = format!("{offset:#x} is not a multiple of the width, {width_bytes}");
            return Err(wrong_at("offset", why));
        }
        if let Some(value) = write_value
            && value & !width.mask() != 0
        {
            return Err(wrong_at(value_field, format!("{value:#x} does not fit {width_bytes} bytes")));
        }
        Ok(Self { bar, offset, width, write_value })
    }
}

/// A register access on its way to the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MmioRequest {
    /// Chosen by the server.
    pub tag: u64,
    /// The access.
    pub access: MmioAccess,
}

impl TryFrom<pb::MmioRequest> for MmioRequest {
    type Error = InvalidField;
    fn try_from(wire: pb::MmioRequest) -> Result<Self, InvalidField> {
        let pb::MmioRequest { tag, bar, offset, width_bytes, write_value } = wire;
        Ok(Self { tag, access: MmioAccess::parse(bar, offset, width_bytes, write_value, "write_value")? })
    }
}
impl From<MmioRequest> for pb::MmioRequest {
    fn from(MmioRequest { tag, access }: MmioRequest) -> Self {
        Self {
            tag,
            bar: access.bar.write(),
            offset: access.offset,
            width_bytes: access.width.write(),
            write_value: access.write_value,
        }
    }
}
message_field!(MmioRequest, pb::MmioRequest);

/// The answer of a device to a register access.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MmioCompletion {
    /// From the request.
    pub tag: u64,
    /// The value read (0 for a write), or why the device refused, in at most 256 bytes.
    pub outcome: Result<u64, String>,
}

impl TryFrom<pb::MmioCompletion> for MmioCompletion {
    type Error = InvalidField;
    fn try_from(wire: pb::MmioCompletion) -> Result<Self, InvalidField> {
        let outcome = match wire.outcome.ok_or_else(|| within("outcome", absent()))? {
            pb::mmio_completion::Outcome::Value(value) => Ok(value),
            pb::mmio_completion::Outcome::Refused(why) if why.len() <= MMIO_REFUSED_BYTES_MAX => Err(why),
            pb::mmio_completion::Outcome::Refused(why) => {
                let why = format!("has {} bytes; at most {MMIO_REFUSED_BYTES_MAX}", why.len());
                return Err(wrong_at("refused", why));
            }
        };
        Ok(Self { tag: wire.tag, outcome })
    }
}
impl From<MmioCompletion> for pb::MmioCompletion {
    fn from(MmioCompletion { tag, outcome }: MmioCompletion) -> Self {
        let outcome = match outcome {
            Ok(value) => pb::mmio_completion::Outcome::Value(value),
            Err(why) => pb::mmio_completion::Outcome::Refused(why),
        };
        Self { tag, outcome: Some(outcome) }
    }
}
message_field!(MmioCompletion, pb::MmioCompletion);

/// What a device sends.
#[derive(Clone, Debug, PartialEq)]
pub enum FromDevice {
    /// First message of the stream.
    Hello(Hello),
    /// DMA; parse it with [`BatchView`](crate::dma::BatchView).
    Dma(pb::DmaBatch),
    /// Answer to a register access.
    Mmio(MmioCompletion),
    /// The reset with this tag is done.
    ResetDone {
        /// From the request.
        tag: u64,
    },
}

impl TryFrom<pb::DeviceToServer> for FromDevice {
    type Error = InvalidField;
    fn try_from(wire: pb::DeviceToServer) -> Result<Self, InvalidField> {
        use pb::device_to_server::Message;
        match wire.message.ok_or_else(|| within("message", absent()))? {
            Message::Dma(batch) => Ok(Self::Dma(batch)),
            Message::Hello(hello) => parse("hello", hello).map(Self::Hello),
            Message::Mmio(completion) => parse("mmio", completion).map(Self::Mmio),
            Message::ResetDone(done) => Ok(Self::ResetDone { tag: done.tag }),
        }
    }
}
impl From<FromDevice> for pb::DeviceToServer {
    fn from(message: FromDevice) -> Self {
        use pb::device_to_server::Message;
        let message = match message {
            FromDevice::Hello(hello) => Message::Hello(hello.into()),
            FromDevice::Dma(batch) => Message::Dma(batch),
            FromDevice::Mmio(completion) => Message::Mmio(completion.into()),
            FromDevice::ResetDone { tag } => Message::ResetDone(pb::ResetDone { tag }),
        };
        Self { message: Some(message) }
    }
}

/// What a device receives.
#[derive(Clone, Debug, PartialEq)]
pub enum ToDevice {
    /// First message of the stream.
    Welcome(Welcome),
    /// Answer to a batch; read it with [`BatchShape::complete`](crate::dma::BatchShape::complete).
    Dma(pb::DmaCompletions),
    /// A register access by the driver.
    Mmio(MmioRequest),
    /// Function-level reset.
    Reset {
        /// To be echoed.
        tag: u64,
        /// The device's generation from then on.
        assignment_generation: Generation,
    },
}

impl TryFrom<pb::ServerToDevice> for ToDevice {
    type Error = InvalidField;
    fn try_from(wire: pb::ServerToDevice) -> Result<Self, InvalidField> {
        use pb::server_to_device::Message;
        match wire.message.ok_or_else(|| within("message", absent()))? {
            Message::Dma(completions) => Ok(Self::Dma(completions)),
            Message::Welcome(welcome) => parse("welcome", welcome).map(Self::Welcome),
            Message::Mmio(request) => parse("mmio", request).map(Self::Mmio),
            Message::Reset(reset) => Ok(Self::Reset {
                tag: reset.tag,
                assignment_generation: Generation(reset.assignment_generation),
            }),
        }
    }
}
impl From<ToDevice> for pb::ServerToDevice {
    fn from(message: ToDevice) -> Self {
        use pb::server_to_device::Message;
        let message = match message {
            ToDevice::Welcome(welcome) => Message::Welcome(welcome.into()),
            ToDevice::Dma(completions) => Message::Dma(completions),
            ToDevice::Mmio(request) => Message::Mmio(request.into()),
            ToDevice::Reset { tag, assignment_generation } => {
                Message::Reset(pb::Reset { tag, assignment_generation: assignment_generation.0 })
            }
        };
        Self { message: Some(message) }
    }
}
