//! The walk: root table, context table, second-stage tables (VT-d 5.10 chapter 3). Free functions over memory, without
//! caches and without state.
//!
//! ```text
//! RTADDR ─► root[bus] ─► context[devfn] ─► level 5 ─► level 4 ─► level 3 ─► level 2 ─► level 1 ─► page
//!              8 1 A          9 2 B 3        (3 at the top-level table, 7 below it, C)   5 6 (7 E8) E
//! ```
//!
//! The digits are the fault reasons, in the order in which they are looked for. What the tables say is believed only as far
//! as it was checked, so nonsense in them ends in a fault and never in a panic or in more than five table reads. Those in brackets
//! are met by partial pages only, whose extent is one read more.
//!
//! **Architecture invariant (I2):** the permissions of a [`Leaf`] are the AND over every entry that led to it.
//!
//! Explain ([`StepCollector`]) is this very walk with another [`Trace`]; there is no second walker.

mod context;
mod dump;
pub mod reading;
mod second_stage;
mod steps;

pub use context::{check_table_mode, walk_context};
pub use dump::dump;
pub use second_stage::walk_second_stage;
pub use steps::StepCollector;

use iommu_types::{Capabilities, FaultReason, Hpa, PageSize, Permissions};

use super::spec::extent::ByteExtent;
use crate::memory::{NoMemoryAt, PhysicalMemory};

/// Where table entries come from: physical memory in production, a map in tests.
pub trait TableMemory {
    /// A naturally aligned 8-byte entry, in one atomic load.
    fn load_u64(&self, at: Hpa) -> Result<u64, NoMemoryAt>;
    /// A naturally aligned 16-byte entry, in one atomic load.
    fn load_u128(&self, at: Hpa) -> Result<u128, NoMemoryAt>;
}

impl TableMemory for PhysicalMemory {
    #[inline]
    fn load_u64(&self, at: Hpa) -> Result<u64, NoMemoryAt> {
        Self::load_u64(self, at)
    }
    #[inline]
    fn load_u128(&self, at: Hpa) -> Result<u128, NoMemoryAt> {
        Self::load_u128(self, at)
    }
}

/// How a unit reads second-stage tables.
#[derive(Clone, Copy, Debug)]
pub struct TableRules<'a> {
    /// What its capabilities say.
    pub capabilities: &'a Capabilities,
    /// Whether bit 52 of a leaf means that its page is partial ([`extent`](super::spec::extent)). Without it the bit is ignored.
    pub byte_extents: bool,
}

/// Sees every entry that a walk reads; `None` stands for an entry that could not be read. [`NoTrace`] compiles to nothing.
pub trait Trace {
    /// A root entry.
    #[inline]
    fn read_root(&mut self, at: Hpa, raw: Option<u128>) {
        let _ = (at, raw);
    }
    /// A context entry.
    #[inline]
    fn read_context(&mut self, at: Hpa, raw: Option<u128>) {
        let _ = (at, raw);
    }
    /// An entry of a second-stage table; `permissions` are those left after it.
    #[inline]
    fn read_table(&mut self, level: u8, at: Hpa, raw: Option<u64>, permissions: Permissions) {
        let _ = (level, at, raw, permissions);
    }
    /// The extent of the partial page whose entry was read last.
    #[inline]
    fn read_extent(&mut self, at: Hpa, raw: Option<u64>) {
        let _ = (at, raw);
    }
}

/// Nobody looks on.
#[derive(Clone, Copy, Debug)]
pub struct NoTrace;
impl Trace for NoTrace {}

/// Why a walk ended without a result. The caller adds the facts of the request and builds the `TranslationFault`, in one
/// place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WalkFault {
    /// Why.
    pub reason: FaultReason,
    /// Whether FPD keeps the fault out of the fault log.
    pub suppressed: bool,
}

impl WalkFault {
    /// A fault met where FPD was not yet read, or does not count.
    pub(crate) const fn unqualified(reason: FaultReason) -> Self {
        Self { reason, suppressed: false }
    }
    /// A fault met where FPD is known and counts.
    pub(crate) const fn qualified(reason: FaultReason, fault_processing_disable: bool) -> Self {
        Self { reason, suppressed: fault_processing_disable }
    }
}

/// TTM of the root table address register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RootMode {
    /// 00: the mode that is built.
    Legacy,
    /// 01: scalable mode.
    Scalable,
    /// 10: no mode.
    Reserved,
    /// 11: abort-DMA mode.
    AbortDma,
}

impl RootMode {
    /// The mode of a TTM field (two bits).
    pub const fn from_ttm(ttm: u8) -> Self {
        match ttm & 0b11 {
            0b00 => Self::Legacy,
            0b01 => Self::Scalable,
            0b10 => Self::Reserved,
            _ => Self::AbortDma,
        }
    }
}

/// What SRTP latched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RootTable {
    /// Where the root table begins.
    pub base: Hpa,
    /// How it is to be read.
    pub mode: RootMode,
}

/// The page that a walk found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// Where the page begins.
    pub hpa: Hpa,
    /// How large it is. A large page of which a part lies in the interrupt range comes in pieces of 4 KiB, so that no cached
    /// entry ever leads there.
    pub size: PageSize,
    /// The AND over all levels.
    pub permissions: Permissions,
    /// The part that is open; `None` when all of the page is.
    pub extent: Option<ByteExtent>,
}

/// Where writes are interrupts: FEE0_0000 to FEEF_FFFF (VT-d 5.10 §3.14). No translation may end there.
pub(crate) const fn is_interrupt_range(address: u64) -> bool {
    address >> 20 == 0xfee
}
