//! The ring unit: an IOMMU whose tables are flat rings (rIOMMU: Malka, Amit, Ben-Yehuda and Tsafrir, ASPLOS'15).
//!
//! A device that takes its buffers from rings, in order, needs no radix tree: a mapping is one slot of a ring, opened by one store
//! and closed by another, and one cached entry for each ring is enough. The unit is of its own kind and has its own root; a source
//! is behind it or behind the VT-d unit. Ports, epochs, drains, fault log and interrupt remapping are shared with that unit
//! ([`vtd::Unit`](crate::vtd::Unit)), and FEEx_xxxx is looked at before rings are. It translates whether VT-d translation is on
//! (TES) or not.
//!
//! [`spec`] holds bits, [`walk`] is free functions over tables in memory; the ring IOTLB and the translation are generic over
//! their atomics and their memory, so that loom runs the code that ships.
//!
//! **Architecture invariant (I1, I2):** after a slot is made invalid and before its ring is invalidated, at most two stale
//! slots of the ring can be served at any moment: the one in use and the prefetched one. After the invalidation and its drain, none.
//! An access is judged page by page of its address, as everywhere; a slot's bounds hold for each page.

mod cache;
mod explain;
pub mod spec;
mod translate;
mod unit;
pub mod walk;

#[cfg(test)]
mod loom_tests;
#[cfg(test)]
mod tests;

pub(crate) use cache::RingCache;
pub use cache::{CachedSlot, RingEntryState};
pub(crate) use explain::explain;
pub use spec::RingIova;
pub(crate) use translate::Rings;
pub(crate) use unit::{PortRings, RingUnit};
