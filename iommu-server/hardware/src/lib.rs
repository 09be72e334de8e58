//! What silicon does: physical memory, the VT-d remapping unit with its tables and caches, the ring unit beside it, fault
//! recording, invalidation, interrupt remapping.
//!
//! This floor has no I/O, no clock and no runtime: it is a function of its arguments and of the memory it is given. State is
//! shared through atomics, so any number of devices translate at once. The unit has two front ends over the same typed operations: direct
//! calls ([`vtd::Unit`], a *managed* unit) and the register page with its invalidation queue ([`vtd::RegisterFile`], a *bare* unit).
//!
//! **Architecture invariant (I2):** nothing outside an epoch ([`drain`]) holds a host-physical address that a device may use.

pub mod bare;
pub mod cache;
pub mod dma;
pub mod drain;
pub mod memory;
pub mod riommu;
pub mod vtd;
