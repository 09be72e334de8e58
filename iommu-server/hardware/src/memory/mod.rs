//! Physical memory: one host-physical space made of regions, with the frame array and the mapping records inside it.
// CONTRACT (helper A owns memory/ and mapped-atomics/)

use iommu_types::{Hpa, HpaRange};

pub struct PhysicalMemory {}

/// There is no RAM at FEE0_0000..=FEEF_FFFF; RAM is [0, min(size, 3 GiB)) and the rest from 4 GiB on, both on a memfd or a file.
#[derive(Clone, Debug)]
pub struct MemoryConfig {
    pub size_bytes: u64,
    pub backing: Backing,
}
#[derive(Clone, Debug)]
pub enum Backing { Memfd, File(std::path::PathBuf) }

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no memory at {at} for {size_bytes} bytes")]
pub struct NoMemoryAt { pub at: Hpa, pub size_bytes: u64 }

#[derive(Debug, thiserror::Error)]
pub enum MemoryError { #[error("placeholder")] Placeholder }

impl PhysicalMemory {
    pub fn new(config: &MemoryConfig) -> Result<Self, MemoryError> { todo!() }
    pub fn size_bytes(&self) -> u64 { todo!() }
    /// The RAM ranges, ascending.
    pub fn ranges(&self) -> Vec<HpaRange> { todo!() }
    pub fn contains(&self, range: HpaRange) -> bool { todo!() }
    // bulk byte access (hot path of DMA; small copies must be cheap; never crosses a region silently wrong: all or nothing)
    pub fn read(&self, at: Hpa, into: &mut [u8]) -> Result<(), NoMemoryAt> { todo!() }
    pub fn write(&self, at: Hpa, from: &[u8]) -> Result<(), NoMemoryAt> { todo!() }
    /// As `read`/`write`, but every aligned 8-byte unit inside moves in one atomic access (the CPU's view).
    pub fn read_units(&self, at: Hpa, into: &mut [u8]) -> Result<(), NoMemoryAt> { todo!() }
    pub fn write_units(&self, at: Hpa, from: &[u8]) -> Result<(), NoMemoryAt> { todo!() }
    pub fn zero(&self, range: HpaRange) -> Result<(), NoMemoryAt> { todo!() }
    // table entries: naturally aligned atomics. Loads are Acquire, stores Release, read-modify-writes AcqRel.
    pub fn load_u64(&self, at: Hpa) -> Result<u64, NoMemoryAt> { todo!() }
    pub fn store_u64(&self, at: Hpa, value: u64) -> Result<(), NoMemoryAt> { todo!() }
    pub fn compare_exchange_u64(&self, at: Hpa, current: u64, new: u64) -> Result<Result<u64, u64>, NoMemoryAt> { todo!() }
    pub fn load_u128(&self, at: Hpa) -> Result<u128, NoMemoryAt> { todo!() }
    pub fn store_u128(&self, at: Hpa, value: u128) -> Result<(), NoMemoryAt> { todo!() }
    pub fn store_u32(&self, at: Hpa, value: u32) -> Result<(), NoMemoryAt> { todo!() }
    /// PCIe AtomicOps, naturally aligned; returns the old value.
    pub fn atomic(&self, at: Hpa, operation: AtomicOperation) -> Result<u128, NoMemoryAt> { todo!() }
}

/// PCIe AtomicOps: FetchAdd and Swap of 4 and 8 bytes, CAS of 4, 8 and 16. Naturally aligned, checked by the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AtomicOperation {
    FetchAdd32(u32), FetchAdd64(u64), Swap32(u32), Swap64(u64),
    Cas32 { compare: u32, new: u32 }, Cas64 { compare: u64, new: u64 }, Cas128 { compare: u128, new: u128 },
}
impl AtomicOperation { pub fn size_bytes(self) -> u32 { todo!() } }

// ---- frame array (memory/frames.rs): one u64 per 4 KiB frame, kept in physical memory itself at a given Hpa.
// Word: owner 31:0 (0 = free, 1 = server itself: tables, records; other values are the kernel's), leaving bit 32, pins 63:33.
pub struct FrameArray { /* memory: Arc<PhysicalMemory>, base: Hpa */ }
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameState { pub owner: u32, pub leaving: bool, pub pins: u32 }
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PinError { #[error("not the owner")] NotOwner, #[error("frame is leaving")] Leaving, #[error("too many pins")] Saturated }
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TransferError { #[error("frame has pins")] Pinned(u32), #[error("not the owner")] NotOwner }
impl FrameArray {
    pub fn bytes_needed(memory: &PhysicalMemory) -> u64 { todo!() }
    pub fn new(memory: std::sync::Arc<PhysicalMemory>, base: Hpa) -> Self { todo!() }
    pub fn state(&self, frame: Hpa) -> Option<FrameState> { todo!() }
    pub fn pin(&self, frame: Hpa, owner: u32) -> Result<(), PinError> { todo!() }
    pub fn unpin(&self, frame: Hpa) { todo!() } // asserts pins > 0 (our own invariant)
    /// CAS from `from` with 0 pins to `to`. (I9)
    pub fn transfer(&self, frame: Hpa, from: u32, to: u32) -> Result<(), TransferError> { todo!() }
    pub fn set_leaving(&self, frame: Hpa, leaving: bool) { todo!() }
}

// ---- mapping records (memory/records.rs): one 64-byte record per mapping, in physical memory. Layout fixed with the first release.
// word 0: state 7:0 (0 free, 1 granting, 2 live, 3 revoking), direction/permissions 15:8, protection 23:16, kind 31:24 (1 DMA API, 2 domain API, 3 coherent), domain id 47:32
// word 1: owner 31:0; word 2: iova; word 3: size_bytes; word 4: gpa; word 5: request id; word 6: mode state (0 for strict); word 7: zero
pub struct MappingRecords { }
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordIndex(pub u32);
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecordState { Free, Granting, Live, Revoking }
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MappingRecord {
    pub permissions: u8, pub protection: u8, pub kind: u8, pub domain_id: u16, pub owner: u32,
    pub iova: u64, pub size_bytes: u64, pub gpa: u64, pub request_id: u64,
}
impl MappingRecords {
    pub const RECORD_BYTES: u64 = 64;
    pub fn new(memory: std::sync::Arc<PhysicalMemory>, base: Hpa, capacity: u32) -> Self { todo!() }
    pub fn capacity(&self) -> u32 { todo!() }
    /// Writes the record as *granting* (state word last). The free list of indexes is the kernel's.
    pub fn begin(&self, index: RecordIndex, record: &MappingRecord) { todo!() }
    pub fn set_state(&self, index: RecordIndex, state: RecordState) { todo!() }
    pub fn get(&self, index: RecordIndex) -> (RecordState, MappingRecord) { todo!() }
}
