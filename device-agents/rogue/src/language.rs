//! What the hostile device can be told, and what it answers: one line of JSON each.
//!
//! A command names itself in `do`, an answer in `is`. Addresses are written `"0x1000"` or as numbers, bytes as hexadecimal digits.

use std::collections::BTreeMap;

use iommu_types::{DeviceAddress, Identity, Role};
use serde::{Deserialize, Serialize};

use crate::text::{Address, Hex};

/// What it is told.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case", deny_unknown_fields)]
pub enum Command {
    /// Says Hello on a new stream, as anybody. A stream that stands is dropped first.
    Connect(Connect),
    /// Drops the stream without a word.
    Disconnect,
    /// One operation.
    Dma(Dma),
    /// A batch as it is, column by column, however wrong.
    Raw(Raw),
    /// Sends what was queued with `later`, under the generation that each was queued with.
    Release,
    /// Sends the last write once more, byte for byte as it was, its generation included.
    Replay,
    /// Reads (or writes) at one address after the other.
    Scan(Scan),
    /// A write to an interrupt address.
    Msi(Msi),
    /// Remappable interrupts with one index after the other.
    GuessInterrupts(GuessInterrupts),
    /// Writes to addresses again and again in the background, until `hammer_stop`.
    Hammer(Hammer),
    /// Ends the hammer, and tells what came of it.
    HammerStop,
    /// Batches as fast as they go.
    Flood(Flood),
    /// Batches one behind the other for a while, with rates and latencies.
    Steady(Steady),
    /// Whether it reads its stream.
    Reading(Reading),
    /// How it answers resets and registers.
    Behave(Behave),
    /// Says that a reset is done: one that was asked for, or none.
    ResetDone(Tag),
    /// Answers a register access: one that was made, or none.
    MmioAnswer(MmioAnswer),
    /// Says Hello once more in the middle of the stream.
    Hello(Connect),
    /// What it knows of itself.
    Status,
    /// Ends the program.
    Quit,
}

/// Whose name it takes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Connect {
    /// Where; absent for the server of the command line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server: Option<String>,
    /// The name that it claims.
    pub name: String,
    /// The address that it claims.
    #[serde(with = "printed")]
    pub address: DeviceAddress,
    /// Whose certificate it shows; absent for the name that it claims. Of no account where there is no TLS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shown_name: Option<String>,
    /// Of the device at which address; absent for the one that it claims.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "printed_option")]
    pub shown_address: Option<DeviceAddress>,
    /// The schema that it claims to speak.
    #[serde(default = "one")]
    pub schema_version: u32,
    /// Register accesses that it takes at once.
    #[serde(default = "sixteen")]
    pub mmio_credits: u32,
}

fn one() -> u32 {
    1
}
fn sixteen() -> u32 {
    16
}

impl Connect {
    /// As the device of this name and address.
    pub fn new(name: &str, address: DeviceAddress) -> Self {
        Self {
            server: None,
            name: name.to_owned(),
            address,
            shown_name: None,
            shown_address: None,
            schema_version: 1,
            mmio_credits: 16,
        }
    }

    /// The same with the certificate of another device.
    pub fn shown_as(&self, other: &Self) -> Self {
        let (shown_name, shown_address) = (Some(other.name.clone()), Some(other.address));
        Self { shown_name, shown_address, ..self.clone() }
    }

    /// Whose certificate is shown.
    pub fn shown(&self) -> Identity {
        Identity {
            name: self.shown_name.clone().unwrap_or_else(|| self.name.clone()),
            role: Role::Device(self.shown_address.unwrap_or(self.address)),
        }
    }
}

mod printed {
    use serde::de::Error as _;
    use serde::{Deserialize as _, Deserializer, Serializer};

    pub(super) fn serialize<T: ToString, S: Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&value.to_string())
    }
    pub(super) fn deserialize<'de, T, D>(deserializer: D) -> Result<T, D::Error>
    where
        T: std::str::FromStr<Err: std::fmt::Display>,
        D: Deserializer<'de>,
    {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

mod printed_option {
    use serde::{Deserialize as _, Deserializer, Serializer};

    pub(super) fn serialize<T: ToString, S: Serializer>(
        value: &Option<T>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match value {
            Some(value) => serializer.serialize_some(&value.to_string()),
            None => serializer.serialize_none(),
        }
    }
    pub(super) fn deserialize<'de, T, D>(deserializer: D) -> Result<Option<T>, D::Error>
    where
        T: std::str::FromStr<Err: std::fmt::Display>,
        D: Deserializer<'de>,
    {
        let text = Option::<String>::deserialize(deserializer)?;
        text.map(|text| text.parse().map_err(serde::de::Error::custom)).transpose()
    }
}

/// What an operation does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Reads.
    #[default]
    Read,
    /// Writes.
    Write,
    /// Writes, and claims not to wait.
    PostedWrite,
    /// AtomicOp: adds.
    FetchAdd,
    /// AtomicOp: exchanges.
    Swap,
    /// AtomicOp: compares and exchanges; data is the value to compare, then the new one.
    Cas,
}

impl Kind {
    /// Its byte on the wire.
    pub const fn code(self) -> u8 {
        self as u8
    }
}

/// Under which generation of the device an operation is sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Claim {
    /// Of Welcome, or of the last reset that was answered: the truth.
    #[default]
    Current,
    /// None is told.
    Absent,
    /// Of Welcome, whatever came after.
    Welcome,
    /// Of the last reset that was told, answered or not.
    Told,
    /// A number.
    Number(u64),
    /// So many beyond the truth; negative for before it.
    Ahead(i64),
}

/// One operation.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Dma {
    /// What it does.
    #[serde(default)]
    pub kind: Kind,
    /// Where.
    pub iova: Address,
    /// How many bytes; absent for as many as there are in `data` (half as many for `cas`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u32>,
    /// What a write writes; absent for `fill`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<Hex>,
    /// The byte that a write without data repeats.
    #[serde(default)]
    pub fill: u8,
    /// PASID, also such as do not exist.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pasid: Option<u32>,
    /// 0 untranslated, 1 translation request, 2 "already translated"; and what does not exist.
    #[serde(default)]
    pub address_type: u32,
    /// Under which generation.
    #[serde(default)]
    pub generation: Claim,
    /// Whether it is only queued now, under the generation of now, and sent with `release`.
    #[serde(default)]
    pub later: bool,
}

impl Dma {
    /// A read.
    pub fn read(iova: u64, size: u32) -> Self {
        Self { iova: Address(iova), size: Some(size), ..Self::default() }
    }
    /// A write.
    pub fn write(iova: u64, data: Vec<u8>) -> Self {
        Self { kind: Kind::Write, iova: Address(iova), data: Some(Hex(data)), ..Self::default() }
    }
}

/// A batch, column by column.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Raw {
    /// Tag of the first operation.
    #[serde(default)]
    pub first_tag: u64,
    /// Addresses.
    pub iova: Vec<Address>,
    /// Sizes.
    #[serde(default)]
    pub size: Vec<u32>,
    /// Kinds, a byte each.
    #[serde(default)]
    pub kind: Hex,
    /// Payload.
    #[serde(default)]
    pub payload: Hex,
    /// So many zeros more at the end of the payload.
    #[serde(default)]
    pub zeros: u32,
    /// How often the address and kind columns are repeated; 0 and 1 are once.
    #[serde(default)]
    pub repeat: u32,
    /// PASID.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pasid: Option<u32>,
    /// AT field.
    #[serde(default)]
    pub address_type: u32,
    /// Under which generation.
    #[serde(default)]
    pub generation: Claim,
}

/// Addresses, one after the other.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scan {
    /// First.
    pub from: Address,
    /// Last that may be tried.
    pub to: Address,
    /// Distance.
    pub stride: Address,
    /// Bytes at each.
    pub size: u32,
    /// What is looked for in what is read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub canary: Option<Hex>,
    /// The byte that is written at each instead of reading.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub write: Option<u8>,
}

/// An interrupt, forged or not.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Msi {
    /// FEEx_xxxx.
    pub address: Address,
    /// The data word, as bytes in the order of memory; 4 of them are an interrupt, more or fewer are none.
    pub data: Hex,
}

/// Interrupt indices to guess.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuessInterrupts {
    /// First index.
    pub from: u16,
    /// Last index.
    pub to: u16,
}

/// Addresses to write to again and again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hammer {
    /// Where.
    pub iova: Vec<Address>,
    /// Bytes at each.
    pub size: u32,
    /// The byte that is written.
    pub fill: u8,
    /// Batches in flight.
    #[serde(default = "two")]
    pub in_flight: usize,
}

fn two() -> usize {
    2
}

/// Batches as fast as they go.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Flood {
    /// What each operation does.
    #[serde(default)]
    pub kind: Kind,
    /// First address.
    pub iova: Address,
    /// Distance of one operation's address from the last one's.
    #[serde(default)]
    pub stride: Address,
    /// After so many addresses it begins again; 0 for never.
    #[serde(default)]
    pub span: u64,
    /// Bytes of each.
    pub size: u32,
    /// Operations of a batch.
    pub operations: u32,
    /// Batches in all.
    pub batches: u64,
    /// Batches in flight at once; absent for as many as there are credits. More is beyond them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub in_flight: Option<usize>,
}

/// A closed loop for a while.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Steady {
    /// What each operation does.
    #[serde(default)]
    pub kind: Kind,
    /// First address.
    pub iova: Address,
    /// Bytes of addresses that are gone through, operation by operation.
    pub span: u64,
    /// Bytes of each operation.
    pub size: u32,
    /// Operations of a batch.
    pub operations: u32,
    /// Batches in flight.
    #[serde(default = "two")]
    pub in_flight: usize,
    /// How long.
    pub milliseconds: u64,
}

/// Whether the stream is read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reading {
    /// Yes or no.
    pub on: bool,
}

/// What is done about something that the server asks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Obedience {
    /// It is answered at once.
    #[default]
    Answer,
    /// It is remembered, and answered when it is told so; or never.
    Hold,
}

/// How it answers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Behave {
    /// Resets.
    #[serde(default)]
    pub resets: Obedience,
    /// Register accesses. Answered, a register reads as the last value written to it.
    #[serde(default)]
    pub registers: Obedience,
}

/// A tag.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tag {
    /// Absent for the oldest that is held.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag: Option<u64>,
}

/// An answer to a register access.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MmioAnswer {
    /// Absent for the oldest that is held.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag: Option<u64>,
    /// The value.
    #[serde(default)]
    pub value: u64,
}

/// What it answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "snake_case")]
pub enum Answer {
    /// The session stands.
    Connected {
        /// Of the session.
        generation: u64,
        /// Of the device.
        assignment_generation: u64,
        /// Batches in flight that are allowed.
        dma_credits: u32,
        /// Operations of a batch that are allowed.
        batch_operations_max: u32,
        /// Bytes of a batch that are allowed.
        batch_bytes_max: u32,
    },
    /// There is no session, or none any more: it was refused, or ended.
    Ended(End),
    /// The operation was done.
    Done {
        /// What it brought back.
        data: Hex,
    },
    /// The operation was refused.
    Fault(Fault),
    /// A batch was answered.
    Batch {
        /// Operations that were done.
        succeeded: u64,
        /// The first of those that were not.
        faults: Vec<Fault>,
        /// How many were refused, by reason.
        refused: BTreeMap<String, u64>,
        /// Bytes that came back.
        payload_bytes: u64,
    },
    /// Operations wait to be sent.
    Queued {
        /// How many.
        waiting: u64,
    },
    /// What a scan found.
    Scanned {
        /// Addresses that were tried.
        tried: u64,
        /// Those that answered.
        answered: u64,
        /// The first of them.
        answered_at: Vec<Address>,
        /// Where the canary was found.
        canary_at: Vec<Address>,
        /// How many were refused, by reason.
        refused: BTreeMap<String, u64>,
    },
    /// What many operations came to.
    Counted(Counted),
    /// Rates and latencies.
    Measured {
        /// Operations that were done.
        operations: u64,
        /// Operations that were refused.
        refused: u64,
        /// How long it took.
        elapsed_us: u64,
        /// Operations in a second.
        operations_per_second: f64,
        /// Bytes in a second.
        bytes_per_second: f64,
        /// Time from a batch to its answer: 50th, 90th, 99th and 99.9th percentile, and the longest.
        latency_us: [u64; 5],
    },
    /// What it knows of itself.
    Status(Status),
    /// It was done; there is nothing to say.
    Well,
    /// The command makes no sense, or not now.
    Wrong {
        /// Why, and what would.
        why: String,
    },
}

/// How a session ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// Stable reason, such as `IDENTITY_REFUSED`; `CONNECTION` when the transport failed, `CLOSED` when the stream just ended.
    pub reason: String,
    /// In words.
    pub message: String,
}

/// An operation that was refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// Its index in the batch.
    pub index: u32,
    /// As on the wire: a VT-d reason, or a refusal from 0x1000 on.
    pub reason: Address,
    /// First address that was not served.
    pub iova: Address,
    /// Bytes done before.
    pub done_bytes: u32,
}

/// What many operations came to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counted {
    /// Operations that were done.
    pub succeeded: u64,
    /// Operations that were refused, by reason.
    pub refused: BTreeMap<String, u64>,
    /// How long it took.
    pub elapsed_us: u64,
    /// When the last answer with a success in it came: microseconds since the UNIX epoch; 0 for never.
    pub last_success_unix_us: u64,
    /// When the first refusal came; 0 for never.
    pub first_refusal_unix_us: u64,
    /// How the session ended, when it did.
    pub ended: Option<End>,
}

impl Counted {
    /// Operations that were answered.
    pub fn answered(&self) -> u64 {
        self.succeeded + self.refused.values().sum::<u64>()
    }
}

/// What it knows of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Whether a session stands.
    pub connected: bool,
    /// How the last one ended.
    pub ended: Option<End>,
    /// The generation that is true for it: of Welcome, or of the last reset answered.
    pub assignment_generation: u64,
    /// Of the last reset told.
    pub told_generation: u64,
    /// Resets told.
    pub resets_told: u64,
    /// Tags of resets that are held.
    pub resets_held: Vec<u64>,
    /// Register accesses told.
    pub registers_told: u64,
    /// Tags of register accesses that are held.
    pub registers_held: Vec<u64>,
    /// Batches that wait to be sent.
    pub queued: u64,
    /// What hammering came to so far.
    pub hammered: Option<Counted>,
}
