//! The walk: root, context, second-stage tables. Free functions over memory; no caches, no state.
// CONTRACT (helper C)
use crate::memory::{NoMemoryAt, PhysicalMemory};
use crate::cache::{CachedContext, PagingEntry};
use iommu_types::*;

/// Where table entries come from. PhysicalMemory in production; tests use a map.
pub trait TableMemory { fn load_u64(&self, at: Hpa) -> Result<u64, NoMemoryAt>; fn load_u128(&self, at: Hpa) -> Result<u128, NoMemoryAt>; }

/// Sees every step. `NoTrace` compiles to nothing; Explain's tracer collects `iommu_types::Step`s. So Explain is the shipping walk (never a second walker).
pub trait Trace { fn read_root(&mut self, at: Hpa, raw: Option<u128>) {} fn read_context(&mut self, at: Hpa, raw: Option<u128>) {} fn read_table(&mut self, level: u8, at: Hpa, raw: Option<u64>, permissions: Permissions) {} }
pub struct NoTrace; impl Trace for NoTrace {}

/// The reason, and whether FPD suppresses the record. The caller builds the TranslationFault (one place).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WalkFault { pub reason: FaultReason, pub suppressed: bool }

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RootMode { Legacy, /* 01 */ Scalable, /* 10 */ Reserved, /* 11 */ AbortDma }
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RootTable { pub base: Hpa, pub mode: RootMode }

/// Root and context entries of `source`: every check of vtd.md §1.5 up to LCT.4 (the width/type), in order.
pub fn walk_context(memory: &impl TableMemory, capabilities: &Capabilities, root: RootTable, source: SourceId, trace: &mut impl Trace) -> Result<CachedContext, WalkFault> { todo!() }

/// The leaf found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaf { pub hpa: Hpa /* page base */, pub size: PageSize, pub permissions: Permissions /* AND over all levels */ }

/// Where to begin: the top, or a table that the paging-structure cache knows.
/// `on_table` is called for every non-leaf entry passed (fills of the paging-structure cache).
pub fn walk_second_stage(memory: &impl TableMemory, capabilities: &Capabilities, context: &CachedContext, start: Option<PagingEntry>,
    iova: Iova, access: Access, size_bytes: u32, trace: &mut impl Trace, on_table: impl FnMut(PagingEntry)) -> Result<Leaf, WalkFault> { todo!() }
