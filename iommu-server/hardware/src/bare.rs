//! A bare machine: memory from address 0, one unit and its register page, for a client that plays the operating system.
//!
//! It shares nothing with the host or with other machines. What its tables say reaches only its own memory, so nonsense in
//! them reaches nobody else. While TES=0 its DMA passes unremapped.

use std::sync::Arc;

use iommu_types::{Capabilities, InvalidCapabilities, SourceId};

use crate::cache::CacheGeometry;
use crate::memory::{MemoryError, PhysicalMemory};
use crate::vtd::{EventSink, Port, PortsExhausted, RegisterFile, Unit, UnitConfig};

/// IOTLB of a machine: 1,024 entries, 16 KiB.
const IOTLB: CacheGeometry = CacheGeometry { sets: 256, ways: 4 };
/// Contexts of 64 devices, more than a machine has ports.
const CONTEXT_CACHE: CacheGeometry = CacheGeometry { sets: 16, ways: 4 };
/// 256 tables.
const PAGING_STRUCTURE_CACHE: CacheGeometry = CacheGeometry { sets: 64, ways: 4 };

/// Memory, unit and registers in one.
pub struct BareMachine {
    registers: RegisterFile,
    unit: Arc<Unit>,
}

/// Why a machine was not made.
#[derive(Debug, thiserror::Error)]
pub enum BareMachineError {
    /// The capabilities make no sense.
    #[error(transparent)]
    Capabilities(#[from] InvalidCapabilities),
    /// The memory cannot be had.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

impl BareMachine {
    /// A machine as after a reset: memory zero, translation off. At most `ports_max` devices are attached at one time.
    pub fn new(
        memory_bytes: u64,
        capabilities: Capabilities,
        ports_max: u16,
        events: Arc<dyn EventSink>,
    ) -> Result<Self, BareMachineError> {
        capabilities.validate()?;
        let memory = Arc::new(PhysicalMemory::bare(memory_bytes)?);
        let beyond = |last: u64| last >> capabilities.host_width_bits != 0;
        if memory.ranges().iter().any(|range| beyond(range.last().get())) {
            let why = "must cover the memory of the machine";
            return Err(InvalidCapabilities { field: "host_width_bits", why }.into());
        }
        let config = UnitConfig {
            capabilities,
            iotlb: IOTLB,
            context_cache: CONTEXT_CACHE,
            paging_structure_cache: PAGING_STRUCTURE_CACHE,
            iotlb_partitions: 1,
            ports_max,
            // Bit 52 is ignored here, as the specification demands.
            byte_extents: false,
        };
        let unit = Unit::new(config, memory, events)?;
        Ok(Self { registers: RegisterFile::new(Arc::clone(&unit)), unit })
    }
    /// The machine's memory.
    pub fn memory(&self) -> &Arc<PhysicalMemory> {
        self.unit.memory()
    }
    /// The unit, to look at. Its typed operations are for managed units: here the registers call them.
    pub fn unit(&self) -> &Arc<Unit> {
        &self.unit
    }
    /// The registers of the unit.
    pub fn registers(&self) -> &RegisterFile {
        &self.registers
    }
    /// A port for a device of the machine.
    pub fn port(&self, source: SourceId) -> Result<Port, PortsExhausted> {
        self.unit.port(source)
    }
}
