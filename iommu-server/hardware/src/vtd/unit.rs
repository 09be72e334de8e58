//! The unit: typed operations, ports for devices, and what can be looked at.
// CONTRACT (helper D)
use super::interrupt::{DeliveredInterrupt, InterruptTable};
use super::walk::RootTable;
use crate::cache::{CacheGeometry, IotlbEntry};
use crate::drain::PendingDrain;
use crate::memory::PhysicalMemory;
use iommu_types::*;
use std::sync::Arc;

#[derive(Clone, Debug)]
pub struct UnitConfig {
    pub capabilities: Capabilities,
    pub iotlb: CacheGeometry,
    pub context_cache: CacheGeometry,
    pub paging_structure_cache: CacheGeometry,
    pub ports_max: u16,
}

/// An event message: a write of data to an address, never remapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EventMessage {
    pub address: u64,
    pub data: u32,
}
/// Where event messages go. Called synchronously, must not block.
pub trait EventSink: Send + Sync {
    fn deliver(&self, message: EventMessage);
}

pub struct Unit {}
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("all ports of the unit are taken")]
pub struct PortsExhausted;

/// A recorded fault, decoded from a fault recording register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordedFault {
    pub fault: Fault, /* iova is the page address here: FI has no low 12 bits */
    pub collapsed_count: u32,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheCounters {
    pub hits: u64,
    pub misses: u64,
    pub fills: u64,
    pub evictions: u64,
    pub outdated_fills: u64,
}
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    pub iotlb: CacheCounters,
    pub context_cache: CacheCounters,
    pub paging_structure_cache: CacheCounters,
    pub walks: u64,
    pub walk_reads: u64,
    pub invalidations: u64,
    pub drains_waited: u64,
    pub faults: u64,
    pub faults_recorded: u64,
    pub faults_collapsed: u64,
    pub faults_overflowed: u64,
    pub faults_suppressed: u64,
    pub interrupts: u64,
}

impl Unit {
    /// Starts with translation and remapping off, caches empty (as after a reset).
    pub fn new(
        config: UnitConfig,
        memory: Arc<PhysicalMemory>,
        events: Arc<dyn EventSink>,
    ) -> Result<Arc<Self>, InvalidCapabilities> {
        todo!()
    }
    pub fn memory(&self) -> &Arc<PhysicalMemory> {
        todo!()
    }
    pub fn capabilities(&self) -> &Capabilities {
        todo!()
    }
    // ---- typed operations: the one implementation behind both front ends
    pub fn set_root_table(&self, root: RootTable) {
        todo!()
    }
    pub fn set_translation(&self, enabled: bool) -> PendingDrain {
        todo!()
    }
    pub fn set_interrupt_table(&self, table: InterruptTable) {
        todo!()
    }
    pub fn set_interrupt_remapping(&self, enabled: bool) -> PendingDrain {
        todo!()
    }
    pub fn set_compatibility_interrupts(&self, allowed: bool) {
        todo!()
    }
    /// Invalidate exactly as DESIGN.md §4 orders it. The PendingDrain's scope is the invalidation's granule.
    pub fn invalidate(&self, what: Invalidation) -> PendingDrain {
        todo!()
    }
    /// Many page-selective invalidations of one domain with ONE generation move, ONE epoch and ONE drain (batched strict unmaps).
    pub fn invalidate_pages(&self, domain: DomainId, ranges: &[IovaRange], leaf_only: bool) -> PendingDrain {
        todo!()
    }
    // ---- devices
    pub fn port(self: &Arc<Self>, source: SourceId) -> Result<Port, PortsExhausted> {
        todo!()
    }
    // ---- faults: hands out (and clears) the recording registers, oldest first. For a managed unit the kernel floor calls this.
    pub fn take_faults(&self) -> Vec<RecordedFault> {
        todo!()
    }
    /// Cheap: whether take_faults would give something.
    pub fn faults_pending(&self) -> bool {
        todo!()
    }
    // ---- looking
    pub fn explain(
        &self,
        source: SourceId,
        pasid: Option<Pasid>,
        iova: Iova,
        access: Access,
        size_bytes: u32,
    ) -> Explanation {
        todo!()
    }
    pub fn iotlb_entries(&self) -> Vec<IotlbEntry> {
        todo!()
    }
    pub fn iotlb_capacity(&self) -> usize {
        todo!()
    }
    pub fn counters(&self) -> Counters {
        todo!()
    }
}

/// A device's way in. One per device session; &mut, so one thread at a time. Owns a drain slot (released on Drop).
pub struct Port {}
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    pub iova: Iova,
    pub size_bytes: u32, /* 0 = zero-length read; never crosses a 4 KiB page */
    pub access: Access,
    pub pasid: Option<Pasid>,
}
/// Where a request may go: lent to the closure, inside the epoch.
#[derive(Clone, Copy, Debug)]
pub struct Lent {
    pub hpa: Hpa,
}

impl Port {
    pub fn source_id(&self) -> SourceId {
        todo!()
    }
    /// Enters an epoch: context looked up once, held to the end of the burst. Dropping the burst leaves the epoch.
    /// **Bound:** a burst covers at most BURST_OPERATIONS_MAX (128) operations or BURST_BYTES_MAX (64 KiB); the caller keeps it (see dma.rs).
    pub fn burst(&mut self) -> Burst<'_> {
        todo!()
    }
    /// An interrupt request: a 4-byte write without PASID to FEEx_xxxx.
    pub fn interrupt(&mut self, address: u64, data: u32) -> Result<DeliveredInterrupt, InterruptFault> {
        todo!()
    }
}
pub const BURST_OPERATIONS_MAX: u32 = 128;
pub const BURST_BYTES_MAX: u32 = 64 << 10;
pub struct Burst<'p> {
    _p: std::marker::PhantomData<&'p mut Port>,
}
impl Burst<'_> {
    /// Hit -> permission -> op, with no allocation, no lock, no shared write. FEEx_xxxx is checked first. Faults are recorded (I6) before this returns.
    pub fn translate<R>(
        &mut self,
        request: Request,
        op: impl FnOnce(Lent) -> R,
    ) -> Result<R, TranslationFault> {
        todo!()
    }
}
