use iommu_hardware::drain::{Drained, PendingDrain};
use iommu_hardware::memory::PhysicalMemory;
use iommu_hardware::vtd::Unit;
use iommu_types::errors::*;
use iommu_types::*;
use std::sync::Arc;

/// Bounds, each with its reason at the constant that the service passes.
#[derive(Clone, Debug)]
pub struct KernelConfig {
    /// The managed unit's caches and ports.
    pub unit: iommu_hardware::vtd::UnitConfig,
    pub domains_max: u16,
    pub owner: OwnerLimits,
    pub fault_records_per_owner: u32,
}
/// Limits of one owner (names as LimitReached reports them: domains_per_owner, mappings_per_owner, mapped_bytes_per_owner, memory_bytes_per_owner, interrupts_per_owner).
#[derive(Clone, Copy, Debug)]
pub struct OwnerLimits {
    pub domains: u32,
    pub mappings: u64,
    pub mapped_bytes: u64,
    pub memory_bytes: u64,
    pub interrupts: u32,
}

/// What all share: memory, managed unit, frame allocator, frame array, mapping records, root and context tables, interrupt remapping table, identifiers.
/// boot(): carves frame array, records (memory/1024 of them), root table, interrupt table out of memory; turns translation and remapping on (a managed unit never runs with TES=0).
pub struct Kernel {}
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    #[error("memory too small")]
    MemoryTooSmall,
    #[error(transparent)]
    Capabilities(#[from] InvalidCapabilities),
}

impl Kernel {
    pub fn boot(memory: Arc<PhysicalMemory>, config: KernelConfig) -> Result<Arc<Self>, BootError> {
        todo!()
    }
    pub fn unit(&self) -> &Arc<Unit> {
        todo!()
    }
    pub fn memory(&self) -> &Arc<PhysicalMemory> {
        todo!()
    }
    pub fn free_bytes(&self) -> u64 {
        todo!()
    }
    /// Per-owner accounting (atomics): made once per declared owner, shared by its memory and domains. `tag` of the frame array: a number per owner (2 and up).
    pub fn account(&self, owner: Owner) -> Arc<OwnerAccount> {
        todo!()
    }
    pub fn create_domain(
        &self,
        account: &Arc<OwnerAccount>,
        protection: Protection,
        width_bits: u8,
    ) -> Result<Domain, CreateDomainError> {
        todo!()
    }
    /// The domain must have no attached source (the service checks topology). Everything unmapped, drained; then `finish` frees tables and only then the identifier is reusable (flushed).
    pub fn destroy_domain(&self, domain: Domain) -> PendingDestroy {
        todo!()
    }
    /// Writes the context entry (I5: topology guarantees at most one domain). A source that is attached elsewhere must be detached first.
    pub fn attach(&self, source: SourceId, domain: &Domain) -> Result<(), OutOfMemory> {
        todo!()
    }
    /// Clears the context entry, invalidates context device-selective and IOTLB domain-selective.
    pub fn detach(&self, source: SourceId, domain_id: DomainId) -> PendingDrain {
        todo!()
    }
    /// Allocates an interrupt remapping entry for the source (SVT=1, SID=source): address and data to program, and the vector.
    pub fn allocate_interrupt(
        &self,
        account: &OwnerAccount,
        source: SourceId,
    ) -> Result<MsiMessage, LimitReached> {
        todo!()
    }
    /// Frees all entries of a source; invalidates the interrupt entry cache.
    pub fn free_interrupts(&self, source: SourceId) -> PendingDrain {
        todo!()
    }
}
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsiMessage {
    pub address: u64,
    pub data: u32,
    pub vector: u8,
}

/// Counters of one owner, compared with its limits.
pub struct OwnerAccount {}
impl OwnerAccount {
    pub fn owner(&self) -> Owner {
        todo!()
    }
    pub fn memory_bytes(&self) -> u64 {
        todo!()
    }
    pub fn mappings(&self) -> u64 {
        todo!()
    }
    pub fn mapped_bytes(&self) -> u64 {
        todo!()
    }
}

/// The memory map of an owner: its guest-physical addresses and the frames behind them. Allocates from gpa 0x1000 up... (choose; page 0 is never used).
pub struct OwnerMemory {}
impl OwnerMemory {
    pub fn new(kernel: &Kernel, account: Arc<OwnerAccount>) -> Self {
        todo!()
    }
    /// Whole pages, zeroed.
    pub fn allocate(&mut self, kernel: &Kernel, size_bytes: u64) -> Result<GpaRange, AllocateError> {
        todo!()
    }
    pub fn free(&mut self, kernel: &Kernel, gpa: Gpa) -> Result<GpaRange, FreeError> {
        todo!()
    }
    /// Everything at once (reclaim). Nothing may be mapped any more.
    pub fn free_all(&mut self, kernel: &Kernel) -> u64 {
        todo!()
    }
    pub fn read(&self, kernel: &Kernel, gpa: Gpa, into: &mut [u8]) -> Result<(), MemoryError> {
        todo!()
    }
    pub fn write(&self, kernel: &Kernel, gpa: Gpa, from: &[u8]) -> Result<(), MemoryError> {
        todo!()
    }
    pub fn buffers(&self) -> Vec<GpaRange> {
        todo!()
    }
}

/// An address space: tables in physical memory, an IOVA allocator, its mappings (records + an ordered index).
pub struct Domain {}
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaMap {
    pub range: GpaRange,
    pub direction: Direction,
    pub request_id: RequestId,
    pub coherent: bool,
}
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaUnmap {
    pub range: IovaRange,
    pub direction: Direction,
}
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapFixed {
    pub iova: IovaRange,
    pub gpa: Gpa,
    pub permissions: Permissions,
    pub request_id: RequestId,
}
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MappingState {
    pub range: IovaRange,
    pub gpa: Gpa,
    pub permissions: Permissions,
    pub request_id: RequestId,
}
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DomainCounters {
    pub mappings: u64,
    pub mapped_bytes: u64,
    pub table_bytes: u64,
    pub maps: u64,
    pub unmaps: u64,
}

impl Domain {
    pub fn id(&self) -> DomainId {
        todo!()
    }
    pub fn owner(&self) -> Owner {
        todo!()
    }
    pub fn protection(&self) -> Protection {
        todo!()
    }
    pub fn width_bits(&self) -> u8 {
        todo!()
    }
    pub fn counters(&self) -> DomainCounters {
        todo!()
    }
    /// DMA API. Grant order: pin frames -> record granting -> entries -> record live. All or nothing.
    pub fn dma_map(
        &mut self,
        kernel: &Kernel,
        memory: &OwnerMemory,
        request: DmaMap,
    ) -> Result<Iova, DmaMapError> {
        todo!()
    }
    /// Revoke order: record revoking -> entries cleared -> invalidation begun -> (drain) -> finish: record free, IOVA free, frames unpinned.
    /// One pending for a whole batch: one invalidation, one drain. Results are per operation, in order.
    pub fn dma_unmap_batch(
        &mut self,
        kernel: &Kernel,
        requests: &[DmaUnmap],
    ) -> (Vec<Result<(), DmaUnmapError>>, PendingUnmap) {
        todo!()
    }
    pub fn dma_unmap(&mut self, kernel: &Kernel, request: DmaUnmap) -> Result<PendingUnmap, DmaUnmapError> {
        todo!()
    }
    /// Domain API, virtio-iommu's contract.
    pub fn map(&mut self, kernel: &Kernel, memory: &OwnerMemory, request: MapFixed) -> Result<(), MapError> {
        todo!()
    }
    pub fn unmap(&mut self, kernel: &Kernel, range: IovaRange) -> Result<PendingUnmap, UnmapError> {
        todo!()
    }
    /// Reclaim: everything.
    pub fn unmap_all(&mut self, kernel: &Kernel) -> PendingUnmap {
        todo!()
    }
    /// After the drain. `pending.split()` gives the drain; the rest comes here with the proof.
    pub fn finish_unmap(&mut self, kernel: &Kernel, undone: Undone, drained: Drained) {
        todo!()
    }
    pub fn mappings(&self, kernel: &Kernel, from: Iova, limit: usize) -> Vec<MappingState> {
        todo!()
    }
}
/// Entries are gone from the tables; DMA in flight may still use them until the drain completes.
#[must_use = "memory stays pinned until finish_unmap"]
pub struct PendingUnmap {
    pub undone: Undone,
    pub drain: PendingDrain,
}
/// What finish_unmap releases.
pub struct Undone {}
impl Undone {
    pub fn unmapped_bytes(&self) -> u64 {
        todo!()
    }
    pub fn is_empty(&self) -> bool {
        todo!()
    }
}
#[must_use]
pub struct PendingDestroy {
    pub drain: PendingDrain, /* tables, id */
}
impl PendingDestroy {
    pub fn finish(self, kernel: &Kernel, drained: Drained) {
        todo!()
    }
}

/// Devices, owners, assignments. Plain data: no hardware is touched here; the service calls Kernel::attach/detach around it.
pub struct Topology {}
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceEntry {
    pub address: DeviceAddress,
    pub name: String,
    pub owner: Option<Owner>,
    pub domain_id: Option<DomainId>,
}
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnerEntry {
    pub owner: Owner,
    pub name: String,
}
impl Topology {
    pub fn new(devices_max: u32, owners_max: u32) -> Self {
        todo!()
    }
    pub fn declare_owner(&mut self, entry: OwnerEntry) -> Result<(), DeclareError> {
        todo!()
    }
    pub fn declare_device(&mut self, entry: DeviceEntry) -> Result<(), DeclareError> {
        todo!()
    }
    pub fn remove_device(&mut self, address: DeviceAddress) -> Result<DeviceEntry, UnknownDevice> {
        todo!()
    }
    pub fn device(&self, address: DeviceAddress) -> Result<&DeviceEntry, UnknownDevice> {
        todo!()
    }
    pub fn owner(&self, owner: Owner) -> Result<&OwnerEntry, UnknownOwner> {
        todo!()
    }
    pub fn owner_by_name(&self, name: &str) -> Option<&OwnerEntry> {
        todo!()
    }
    pub fn devices(&self) -> impl Iterator<Item = &DeviceEntry> {
        std::iter::empty()
    }
    pub fn owners(&self) -> impl Iterator<Item = &OwnerEntry> {
        std::iter::empty()
    }
    pub fn devices_of(&self, owner: Owner) -> Vec<DeviceAddress> {
        todo!()
    }
    pub fn attached_to(&self, domain: DomainId) -> Vec<DeviceAddress> {
        todo!()
    }
    /// I5: refuses (assert) a second domain without a detach between.
    pub fn set_attached(
        &mut self,
        address: DeviceAddress,
        owner: Owner,
        domain: DomainId,
    ) -> Result<(), UnknownDevice> {
        todo!()
    }
    pub fn set_detached(&mut self, address: DeviceAddress) -> Result<DomainId, DetachError> {
        todo!()
    }
}

/// Bounded fault logs, one per owner (and one for devices of nobody), each with its own overflow count (I7: one tenant cannot hide another's evidence).
pub struct FaultLogs {}
impl FaultLogs {
    pub fn new(records_per_owner: u32) -> Self {
        todo!()
    }
    /// Takes what the unit has recorded and files it by the device's owner. Returns the owners that got records.
    pub fn collect(&mut self, kernel: &Kernel, topology: &Topology, now_unix_ms: u64) -> Vec<Option<Owner>> {
        todo!()
    }
    /// Records after `after` (sequence numbers of that owner's log), oldest first, with how many between were overwritten.
    pub fn after(&self, owner: Option<Owner>, after: u64, limit: usize) -> (Vec<FaultRecord>, u64) {
        todo!()
    }
    pub fn latest(&self, owner: Option<Owner>) -> u64 {
        todo!()
    }
    pub fn overwritten(&self, owner: Option<Owner>) -> u64 {
        todo!()
    }
    pub fn owners(&self) -> Vec<Option<Owner>> {
        todo!()
    }
}
