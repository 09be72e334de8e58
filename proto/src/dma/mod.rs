//! DMA on the wire: batches in columns, answered in columns.
//!
//! A batch is parsed once ([`BatchView`]): its columns are checked to add up, without an allocation, and its operations
//! are then read where they lie. What cannot be parsed is the peer's violation of the protocol; an operation that is
//! nonsense by itself is refused in the answer ([`Refusal::Malformed`]), and the operations around it run.
//!
//! | side   | sends                  | receives                          |
//! | ------ | ---------------------- | --------------------------------- |
//! | device | [`Batch`]              | [`BatchShape::complete`]          |
//! | server | [`CompletionsBuilder`] | [`BatchView::operations`]         |

mod batch;
mod builder;
mod completed;
mod completions;

use iommu_types::{FaultReason, Refusal};

pub use batch::{Action, BatchError, BatchView, Operation, Operations};
pub use builder::{AtomicValue, Batch};
pub use completed::{BatchShape, Completed, OperationResult};
pub use completions::{CompletionsBuilder, refuse_whole};

use crate::limits;

/// Kinds of operations, as `DmaBatch.kind` has them.
pub mod kind {
    /// Memory read.
    pub const READ: u8 = 0;
    /// Memory write.
    pub const WRITE: u8 = 1;
    /// Memory write that the device does not wait for.
    pub const POSTED_WRITE: u8 = 2;
    /// FetchAdd AtomicOp.
    pub const FETCH_ADD: u8 = 3;
    /// Unconditional Swap AtomicOp.
    pub const SWAP: u8 = 4;
    /// Compare and Swap AtomicOp.
    pub const COMPARE_AND_SWAP: u8 = 5;
}

/// What a session allows one batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchLimits {
    /// Most operations.
    pub operations_max: u32,
    /// Most bytes written, read and given as operands, together.
    pub bytes_max: u32,
}

impl BatchLimits {
    /// The most that the wire contract lets a server allow.
    pub const CONTRACT: Self =
        Self { operations_max: limits::BATCH_OPERATIONS_MAX, bytes_max: limits::BATCH_BYTES_MAX };
}

/// Where the codes of refusals begin in `DmaCompletions.fault_reason`; below are VT-d's own.
const REFUSALS_FROM: u32 = 0x1000;

/// A reason as `DmaCompletions.fault_reason` has it.
pub const fn reason_code(reason: Result<FaultReason, Refusal>) -> u32 {
    match reason {
        Ok(fault) => fault.0 as u32,
        Err(Refusal::Fenced) => REFUSALS_FROM,
        Err(Refusal::StaleGeneration) => REFUSALS_FROM + 1,
        Err(Refusal::OverLimit) => REFUSALS_FROM + 2,
        Err(Refusal::Malformed) => REFUSALS_FROM + 3,
        Err(Refusal::NoMemory) => REFUSALS_FROM + 4,
        Err(Refusal::OverOperationRate) => REFUSALS_FROM + 5,
        Err(Refusal::OverByteRate) => REFUSALS_FROM + 6,
        Err(Refusal::Unknown(code)) => code,
    }
}

/// The reason with this code. VT-d's codes are open, and so are refusals: a server of a later version may have more of
/// them, which a device takes as refused and nothing else.
pub const fn reason_from_code(code: u32) -> Result<FaultReason, Refusal> {
    match code {
        0..=0xff => Ok(FaultReason(code as u8)),
        0x1000 => Err(Refusal::Fenced),
        0x1001 => Err(Refusal::StaleGeneration),
        0x1002 => Err(Refusal::OverLimit),
        0x1003 => Err(Refusal::Malformed),
        0x1004 => Err(Refusal::NoMemory),
        0x1005 => Err(Refusal::OverOperationRate),
        0x1006 => Err(Refusal::OverByteRate),
        _ => Err(Refusal::Unknown(code)),
    }
}
