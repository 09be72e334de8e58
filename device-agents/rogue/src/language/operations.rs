//! Commands to do DMA: one operation, a batch as it is, and many.

use serde::{Deserialize, Serialize};

use crate::text::{Address, Hex};

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
