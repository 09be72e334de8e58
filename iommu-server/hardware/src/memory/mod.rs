//! Physical memory: one host-physical space made of regions, with the frame array and the mapping records inside it.
//!
//! Page tables, buffers, the array that says who owns a frame and the records that say what is mapped all live in this one
//! space, as they do on a real host, so that what an operator dumps is what the hardware uses.
//!
//! - [`PhysicalMemory`] is the space: where RAM is, what backs it, byte access and atomic access.
//! - [`FrameArray`] holds an owner and a pin count per frame (I9).
//! - [`MappingRecords`] holds one record per mapping, because tables alone do not say where a mapping begins or whose it is.

mod access;
mod frames;
mod physical;
mod records;

pub use access::NoMemoryAt;
pub use frames::{FrameArray, FrameState, OWNER_NONE, OWNER_SERVER, PinError, TransferError};
pub use physical::{
    Backing, HIGH_RAM_BASE, LOW_RAM_BYTES_MAX, MEMORY_BYTES_MAX, MEMORY_BYTES_MIN, MemoryConfig, MemoryError,
    PhysicalMemory,
};
pub use records::{MappingRecord, MappingRecords, RecordIndex, RecordState};

#[cfg(test)]
mod tests;
