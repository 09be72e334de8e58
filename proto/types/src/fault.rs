//! Faults: DMA and interrupts that translation refused, with the reason VT-d gives; and refusals outside translation.
//!
//! A fault is common facts plus a reason, built in one place. Reasons are open codes (others define them); a code that
//! this version does not know survives every round trip.

use std::fmt;

use crate::{Access, AddressType, DeviceAddress, DomainId, Iova, Owner, Pasid, SourceId};

/// A VT-d fault reason (VT-d 5.10 §7.1, table of fault reason encodings).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FaultReason(pub u8);

macro_rules! reasons {
    ($($name:ident = $code:literal, $label:literal, $meaning:literal;)*) => {
        impl FaultReason {
            $(#[doc = concat!($label, ": ", $meaning, ".")] pub const $name: Self = Self($code);)*

            /// Every reason that this version can produce.
            pub const KNOWN: &'static [Self] = &[$(Self::$name),*];

            /// The specification's label (such as `LRT.2`), or `unknown`.
            pub const fn label(self) -> &'static str {
                match self { $(Self::$name => $label,)* _ => "unknown" }
            }
            /// What the reason means, in words.
            pub const fn meaning(self) -> &'static str {
                match self { $(Self::$name => $meaning,)* _ => "a reason that this version does not know" }
            }
        }
    };
}

reasons! {
    ROOT_NOT_PRESENT = 0x1, "LRT.2", "the root entry of the bus is not present";
    CONTEXT_NOT_PRESENT = 0x2, "LCT.2", "the context entry of the device is not present";
    CONTEXT_INVALID = 0x3, "LCT.4", "the context entry has an unsupported width or type, or its top-level table cannot be read";
    ADDRESS_BEYOND_WIDTH = 0x4, "LGN.1", "the address is beyond the width of the domain or of the unit";
    WRITE_DENIED = 0x5, "LGN.2", "the tables give no write permission";
    READ_DENIED = 0x6, "LGN.3", "the tables give no read permission";
    TABLE_ACCESS = 0x7, "LSS.1", "a page-table entry could not be read";
    ROOT_ACCESS = 0x8, "LRT.1", "the root entry could not be read";
    CONTEXT_ACCESS = 0x9, "LCT.1", "the context entry could not be read";
    ROOT_RESERVED = 0xa, "LRT.3", "a reserved bit is set in the root entry";
    CONTEXT_RESERVED = 0xb, "LCT.3", "a reserved bit is set in the context entry";
    TABLE_RESERVED = 0xc, "LSS.2", "a reserved bit is set in a page-table entry";
    TRANSLATED_BLOCKED = 0xd, "LCT.5", "the context entry blocks translation requests and translated requests";
    RESULT_IN_INTERRUPT_RANGE = 0xe, "LGN.4", "the translation ends in the interrupt range FEEx_xxxx";
    IR_REQUEST_RESERVED = 0x20, "IR.1", "reserved bits are set in the remappable interrupt request";
    IR_INDEX_BEYOND_TABLE = 0x21, "IR.2", "the interrupt index is beyond the remapping table";
    IR_NOT_PRESENT = 0x22, "IR.3", "the interrupt remapping entry is not present";
    IR_ACCESS = 0x23, "IR.4", "the interrupt remapping entry could not be read";
    IR_RESERVED = 0x24, "IR.5", "a reserved bit is set in the interrupt remapping entry";
    IR_COMPATIBILITY_BLOCKED = 0x25, "IR.6", "compatibility-format interrupts are blocked";
    IR_SOURCE_DENIED = 0x26, "IR.7", "the interrupt remapping entry does not admit this source";
    IR_INVALID_ACCESS = 0x29, "IR.10", "an access to FEEx_xxxx that is not an interrupt";
    TABLE_MODE_INVALID = 0x30, "RTA.1", "the root table address register selects a mode that is not supported";
    PASID_IN_LEGACY_MODE = 0x31, "RTA.2", "a request with PASID while the unit is in legacy mode";
    // Ours, where VT-d has no code: byte granularity and rIOMMU (Malka et al., ASPLOS'15). VT-d 5.10 leaves 0xe0 and up free.
    RING_DEVICE_ABSENT = 0xe0, "RIO.1", "the rDEVICE of the source is not present, or could not be read";
    RING_BEYOND_DEVICE = 0xe1, "RIO.2", "the device has no ring of this number";
    RING_BEYOND_SIZE = 0xe2, "RIO.3", "the ring has no slot of this number";
    RING_SLOT_INVALID = 0xe3, "RIO.4", "the slot is not valid";
    RING_BEYOND_SLOT = 0xe4, "RIO.5", "the access leaves the bytes of the slot";
    RING_WRITE_DENIED = 0xe5, "RIO.6", "the slot gives no write permission";
    RING_READ_DENIED = 0xe6, "RIO.7", "the slot gives no read permission";
    RING_TABLE_ACCESS = 0xe7, "RIO.8", "a ring table could not be read";
    BYTES_DENIED = 0xe8, "BYT.1", "the access leaves the bytes that are mapped in the page";
}

impl FaultReason {
    /// Whether FPD in the context entry (or IRTE) suppresses the recording of this fault ("qualified").
    pub const fn is_qualified(self) -> bool {
        matches!(self.0, 0x2..=0x7 | 0xb..=0xe | 0x22 | 0x24 | 0x26 | 0xe8)
    }
}

impl fmt::Display for FaultReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#04x} {}", self.0, self.meaning())
    }
}

impl fmt::Debug for FaultReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FaultReason({:#04x} {})", self.0, self.label())
    }
}

/// A DMA that translation refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[error("{access} at {iova} by {source_id} refused: {reason}")]
pub struct TranslationFault {
    /// The requester, as it stood in the request.
    pub source_id: SourceId,
    /// The PASID of the request, when it had one.
    pub pasid: Option<Pasid>,
    /// The address of the request.
    pub iova: Iova,
    /// What was asked.
    pub access: Access,
    /// Whether the device claimed that the address was translated.
    pub address_type: AddressType,
    /// Why it was refused.
    pub reason: FaultReason,
}

/// An interrupt request that remapping refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[error("interrupt{} by {source_id} refused: {reason}", index.map_or_else(String::new, |index| format!(" index {index}")))]
pub struct InterruptFault {
    /// The requester.
    pub source_id: SourceId,
    /// Interrupt index; `None` where the reason leaves it undefined (0x20, 0x25, 0x29).
    pub index: Option<u16>,
    /// Why it was refused.
    pub reason: FaultReason,
}

/// Whatever a unit can record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fault {
    /// A refused DMA.
    Dma(TranslationFault),
    /// A refused interrupt.
    Interrupt(InterruptFault),
}

impl Fault {
    /// The requester.
    pub const fn source_id(&self) -> SourceId {
        match self {
            Self::Dma(fault) => fault.source_id,
            Self::Interrupt(fault) => fault.source_id,
        }
    }
    /// Why it was refused.
    pub const fn reason(&self) -> FaultReason {
        match self {
            Self::Dma(fault) => fault.reason,
            Self::Interrupt(fault) => fault.reason,
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dma(fault) => fault.fmt(f),
            Self::Interrupt(fault) => fault.fmt(f),
        }
    }
}

/// A fault as it is kept in the log of the device's owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FaultRecord {
    /// Place in the log of `owner`; starts at 1 and has no holes but those that overflow left. Also the resume token.
    pub sequence: u64,
    /// Milliseconds since the UNIX epoch at which the record was taken from the unit.
    pub at_unix_ms: u64,
    /// Whose log it stands in: the owner of the device, or `None` for a device that nobody owns.
    pub owner: Option<Owner>,
    /// The device.
    pub device: DeviceAddress,
    /// The domain that the device was attached to, when it was.
    pub domain_id: Option<DomainId>,
    /// The fault.
    pub fault: Fault,
    /// Further faults of the same source that were collapsed into this record while it was pending in the unit.
    pub collapsed_count: u32,
}

/// How a DMA operation on the wire ended when it did not succeed. A fault is VT-d's; a refusal is ours, without a code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DmaFault {
    /// Bytes of the operation done before it ended.
    pub done_bytes: u32,
    /// Where it ended: the first address that was not served.
    pub iova: Iova,
    /// Why.
    pub reason: Result<FaultReason, Refusal>,
}

/// Why a DMA was refused outside translation. These have no VT-d code and are not recorded by the unit, only counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Refusal {
    /// A newer session of the same device has fenced the one that asked.
    #[error("the session was fenced by a newer one of the same device")]
    Fenced,
    /// The operation belongs to an assignment of the device that has ended.
    #[error("the operation belongs to an earlier assignment of the device")]
    StaleGeneration,
    /// The operation is over a limit of the session.
    #[error("the operation is over a limit of the session")]
    OverLimit,
    /// Malformed: zero size where there is none, a misaligned atomic, an address that wraps, an operand of the wrong size.
    #[error("the operation is malformed")]
    Malformed,
    /// The translation ends at an address behind which there is no memory (PCIe: Unsupported Request).
    #[error("the address leads to no memory")]
    NoMemory,
    /// The owner of the device has used up its operations for now.
    #[error("the operation is over the limit dma_operations_per_second of its owner")]
    OverOperationRate,
    /// The owner of the device has used up its bytes for now.
    #[error("the operation is over the limit dma_bytes_per_second of its owner")]
    OverByteRate,
    /// A refusal that this version does not know, by its code on the wire: the server is newer.
    #[error("the operation was refused for a reason that this version does not know ({0:#x})")]
    Unknown(u32),
}
