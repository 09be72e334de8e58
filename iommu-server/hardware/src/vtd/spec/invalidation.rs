//! Invalidation descriptors, types 1 to 5 (VT-d 5.10 §6.5.2): bytes in memory to what they mean, and back.
//!
//! ```text
//! bits           127                     76 75 71 70 69 64 63    50 49 48 47   32 31   16 15 12 11 9 8 7  6  5 4 3 0
//! 1 context     |                  reserved              | rsvd    | FM  | SID   | DID   | rsvd|type|rsvd  | G  | 1 |
//! 2 IOTLB       | address                  | rsvd|IH| AM |        reserved        | DID   | rsvd|type|r|DR|DW| G | 2 |
//! 3 device TLB  | refused while ECAP.DT=0
//! 4 interrupt   |                  reserved              | rsvd 63:48 | IIDX 47:32 | IM 31:27 | … |type|rsvd |r|G | 4 |
//! 5 wait        | status address 127:66, rsvd 65:64      | status data    63:32   |  reserved   |type|r|PD|FN|SW|IF| 5 |
//! ```
//!
//! The type is bits 11:9 above bits 3:0. Fields that a granularity does not use are ignored; reserved bits and reserved
//! values of used fields are refused.

use iommu_types::{
    Capabilities, DomainId, FunctionMask, Hpa, Invalidation, Iova, IovaRange, PAGE_SIZE_BYTES, SourceId,
};

/// Why the queue stopped: IQERCD.IQEI (VT-d 5.10 §11.4.9.9). An open code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueError(pub u8);

impl QueueError {
    /// The tail points beyond the queue.
    pub const TAIL_BEYOND_QUEUE: Self = Self(1);
    /// A descriptor could not be read.
    pub const FETCH: Self = Self(2);
    /// A type that does not exist, or not in this mode.
    pub const TYPE: Self = Self(3);
    /// A reserved bit is set or a field has a reserved value.
    pub const RESERVED: Self = Self(4);
    /// The descriptor width does not fit the table mode.
    pub const WIDTH: Self = Self(5);
    /// The tail is not at a 256-bit descriptor although DW=1.
    pub const TAIL_MISALIGNED: Self = Self(6);
    /// The table mode is not valid.
    pub const TABLE_MODE: Self = Self(7);
}

/// What a wait descriptor writes when everything before it is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusWrite {
    /// Where: a multiple of 4.
    pub at: Hpa,
    /// What.
    pub data: u32,
}

/// A descriptor, decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Descriptor {
    /// Types 1, 2 and 4: forget something.
    Invalidate(Invalidation),
    /// Type 5: completes when everything before it is done.
    Wait {
        /// IF: set ICS.IWC and raise the completion event.
        interrupt: bool,
        /// SW: what to write to memory.
        status_write: Option<StatusWrite>,
        /// FN: what follows must not begin before this one is complete.
        fence: bool,
    },
}

type Decode = fn(u128, &Capabilities) -> Result<Descriptor, QueueError>;

const TYPE_CONTEXT: u128 = 1;
const TYPE_IOTLB: u128 = 2;
const TYPE_INTERRUPT: u128 = 4;
const TYPE_WAIT: u128 = 5;

const CONTEXT_RESERVED: u128 = (u64::MAX as u128) << 64 | 0xfffc_0000_0000_f1c0;
const IOTLB_RESERVED: u128 = 0xf80u128 << 64 | 0xffff_ffff_0000_f100;
const INTERRUPT_RESERVED: u128 = (u64::MAX as u128) << 64 | 0xffff_0000_07ff_f1e0;
// PD (bit 7) drains page requests, which do not exist here (ECAP.PDS=0).
const WAIT_RESERVED: u128 = 0x3u128 << 64 | 0xffff_f180;

/// The largest index mask of an interrupt-entry invalidation (ECAP.MHMV).
pub const INTERRUPT_INDEX_MASK_MAX: u8 = 15;

impl Descriptor {
    /// Decodes bits 127:0. In a queue of 256-bit descriptors the caller passes the upper half, which must be zero for
    /// these types.
    pub fn decode(low: u128, high: Option<u128>, capabilities: &Capabilities) -> Result<Self, QueueError> {
        let refuse_if = |bits: u128| if bits == 0 { Ok(()) } else { Err(QueueError::RESERVED) };
        let descriptor_type = (low >> 9 & 0x7) << 4 | low & 0xf;
        let (reserved, decode): (u128, Decode) = match descriptor_type {
            TYPE_CONTEXT => (CONTEXT_RESERVED, decode_context),
            TYPE_IOTLB => (IOTLB_RESERVED, decode_iotlb),
            TYPE_INTERRUPT if capabilities.interrupt_remapping => (INTERRUPT_RESERVED, decode_interrupt),
            TYPE_WAIT => (WAIT_RESERVED, decode_wait),
            _ => return Err(QueueError::TYPE),
        };
        refuse_if(low & reserved)?;
        refuse_if(high.unwrap_or(0))?;
        decode(low, capabilities)
    }

    /// Encodes as bits 127:0. A page range must be 2^n pages, aligned to its size.
    pub fn encode(&self) -> u128 {
        match *self {
            Self::Invalidate(invalidation) => encode_invalidation(invalidation),
            Self::Wait { interrupt, status_write, fence } => {
                let status = status_write.map_or(0, |write| {
                    1 << 5 | u128::from(write.data) << 32 | u128::from(write.at.get() & !3) << 64
                });
                TYPE_WAIT | u128::from(interrupt) << 4 | u128::from(fence) << 6 | status
            }
        }
    }
}

fn granularity(low: u128) -> u8 {
    (low >> 4 & 3) as u8
}

fn domain(low: u128) -> DomainId {
    DomainId::new((low >> 16) as u16)
}

fn decode_context(low: u128, _: &Capabilities) -> Result<Descriptor, QueueError> {
    Ok(Descriptor::Invalidate(match granularity(low) {
        1 => Invalidation::ContextGlobal,
        2 => Invalidation::ContextDomain(domain(low)),
        3 => Invalidation::ContextDevice {
            domain_id: domain(low),
            source_id: SourceId::new((low >> 32) as u16),
            function_mask: decode_function_mask((low >> 48) as u8),
        },
        _ => return Err(QueueError::RESERVED),
    }))
}

fn decode_iotlb(low: u128, capabilities: &Capabilities) -> Result<Descriptor, QueueError> {
    Ok(Descriptor::Invalidate(match granularity(low) {
        1 => Invalidation::IotlbGlobal,
        2 => Invalidation::IotlbDomain(domain(low)),
        // Without page-selective invalidation the whole domain goes: more than asked is allowed, less is not.
        3 if !capabilities.page_selective => Invalidation::IotlbDomain(domain(low)),
        3 => {
            let mask = (low >> 64 & 0x3f) as u8;
            if mask > capabilities.max_address_mask {
                return Err(QueueError::RESERVED);
            }
            Invalidation::IotlbPages {
                domain_id: domain(low),
                range: masked_range((low >> 64) as u64, mask).ok_or(QueueError::RESERVED)?,
                leaf_only: low >> 70 & 1 != 0,
            }
        }
        _ => return Err(QueueError::RESERVED),
    }))
}

fn decode_interrupt(low: u128, _: &Capabilities) -> Result<Descriptor, QueueError> {
    if low >> 4 & 1 == 0 {
        return Ok(Descriptor::Invalidate(Invalidation::InterruptGlobal));
    }
    let mask = (low >> 27 & 0x1f) as u8;
    if mask > INTERRUPT_INDEX_MASK_MAX {
        return Err(QueueError::RESERVED);
    }
    Ok(Descriptor::Invalidate(Invalidation::InterruptIndex { index: (low >> 32) as u16, mask }))
}

fn decode_wait(low: u128, _: &Capabilities) -> Result<Descriptor, QueueError> {
    let status_write = (low >> 5 & 1 != 0)
        .then(|| StatusWrite { at: Hpa::new((low >> 64) as u64 & !3), data: (low >> 32) as u32 });
    Ok(Descriptor::Wait { interrupt: low >> 4 & 1 != 0, status_write, fence: low >> 6 & 1 != 0 })
}

/// FM (two bits) as a mask.
pub const fn decode_function_mask(bits: u8) -> FunctionMask {
    match bits & 3 {
        0 => FunctionMask::Exact,
        1 => FunctionMask::IgnoreBit2,
        2 => FunctionMask::IgnoreBits2To1,
        _ => FunctionMask::IgnoreAll,
    }
}

/// A mask as FM.
pub const fn encode_function_mask(mask: FunctionMask) -> u8 {
    match mask {
        FunctionMask::Exact => 0,
        FunctionMask::IgnoreBit2 => 1,
        FunctionMask::IgnoreBits2To1 => 2,
        FunctionMask::IgnoreAll => 3,
    }
}

/// The pages that an address and an address mask (AM) mean: 2^AM pages around the address. `None` for a mask beyond 51.
pub fn masked_range(address: u64, mask: u8) -> Option<IovaRange> {
    let size_bytes = PAGE_SIZE_BYTES.checked_shl(u32::from(mask))?;
    let base = address & !size_bytes.checked_sub(1)?;
    IovaRange::new(Iova::new(base), size_bytes).ok()
}

fn encode_invalidation(invalidation: Invalidation) -> u128 {
    let domain_bits = |domain: DomainId| u128::from(domain.get()) << 16;
    match invalidation {
        Invalidation::ContextGlobal => TYPE_CONTEXT | 1 << 4,
        Invalidation::ContextDomain(domain) => TYPE_CONTEXT | 2 << 4 | domain_bits(domain),
        Invalidation::ContextDevice { domain_id, source_id, function_mask } => {
            TYPE_CONTEXT
                | 3 << 4
                | domain_bits(domain_id)
                | u128::from(source_id.get()) << 32
                | u128::from(encode_function_mask(function_mask)) << 48
        }
        Invalidation::IotlbGlobal => TYPE_IOTLB | 1 << 4,
        Invalidation::IotlbDomain(domain) => TYPE_IOTLB | 2 << 4 | domain_bits(domain),
        Invalidation::IotlbPages { domain_id, range, leaf_only } => {
            let pages = range.size_bytes() / PAGE_SIZE_BYTES;
            assert!(
                pages.is_power_of_two() && range.base().is_aligned(range.size_bytes()),
                "a descriptor covers 2^n pages at a multiple of their size"
            );
            TYPE_IOTLB
                | 3 << 4
                | domain_bits(domain_id)
                | u128::from(pages.trailing_zeros()) << 64
                | u128::from(leaf_only) << 70
                | u128::from(range.base().get()) << 64
        }
        Invalidation::InterruptGlobal => TYPE_INTERRUPT,
        Invalidation::InterruptIndex { index, mask } => {
            TYPE_INTERRUPT | 1 << 4 | u128::from(mask) << 27 | u128::from(index) << 32
        }
    }
}
