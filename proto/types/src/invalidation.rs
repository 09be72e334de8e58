//! What an invalidation is to forget, in the terms of VT-d's descriptors (VT-d 5.10 §6.5).

use crate::{DomainId, IovaRange, SourceId};

/// Which function bits of a source a device-selective context-cache invalidation ignores (FM).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FunctionMask {
    /// Exactly the source.
    Exact,
    /// Bit 2 of the function is ignored.
    IgnoreBit2,
    /// Bits 2:1 are ignored.
    IgnoreBits2To1,
    /// All function bits are ignored.
    IgnoreAll,
}

impl FunctionMask {
    /// The bits of the 16-bit source that count.
    pub const fn significant_bits(self) -> u16 {
        match self {
            Self::Exact => 0xffff,
            Self::IgnoreBit2 => 0xfffb,
            Self::IgnoreBits2To1 => 0xfff9,
            Self::IgnoreAll => 0xfff8,
        }
    }
    /// Whether an entry of `entry` is meant by an invalidation of `target`.
    pub const fn matches(self, target: SourceId, entry: SourceId) -> bool {
        (target.get() ^ entry.get()) & self.significant_bits() == 0
    }
}

/// How much an invalidation covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Granularity {
    /// Everything.
    Global,
    /// One domain.
    Domain,
    /// One device.
    Device,
    /// Pages of one domain.
    Page,
}

/// One invalidation. Hardware may always forget more than asked, never less.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Invalidation {
    /// Every context entry.
    ContextGlobal,
    /// Context entries tagged with a domain.
    ContextDomain(DomainId),
    /// Context entries of a source.
    ContextDevice {
        /// The domain that the source was attached to.
        domain_id: DomainId,
        /// The source.
        source_id: SourceId,
        /// Which function bits count.
        function_mask: FunctionMask,
    },
    /// Every translation and every paging-structure entry.
    IotlbGlobal,
    /// Translations and paging-structure entries of a domain.
    IotlbDomain(DomainId),
    /// Translations that touch a range; paging-structure entries too unless `leaf_only` (IH).
    IotlbPages {
        /// The domain.
        domain_id: DomainId,
        /// The addresses.
        range: IovaRange,
        /// Only leaf entries changed (IH=1): paging-structure entries may stay.
        leaf_only: bool,
    },
    /// Every interrupt remapping entry.
    InterruptGlobal,
    /// Interrupt remapping entries from an index, 2^mask of them.
    InterruptIndex {
        /// First index.
        index: u16,
        /// Number of low index bits ignored.
        mask: u8,
    },
}
