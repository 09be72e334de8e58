//! The caches of a unit: IOTLB, context cache, paging-structure cache.
//!
//! They are real. An entry that is not invalidated is served for ever, as silicon does, and never compared
//! with the tables again: that is what makes a missing invalidation observable. They are bounded and
//! set-associative; readers take no lock and write nothing, so devices do not slow each other down; writers
//! lock one set.
//!
//! **Architecture invariant (I4):** a fill carries the generation under which its walk *began*, and is
//! dropped under its set's writer lock if an invalidation has moved the generation since. **(I3):** only what
//! is present is ever filled; that is the walk's to keep.
//!
//! Hits and misses are counted by whoever looks up, in a cache line of its own; every fill says what it did
//! ([`Filled`]).

mod context;
mod iotlb;
mod paging;
mod sequence;
mod set;
mod spans;
mod words;

#[cfg(test)]
mod loom_tests;
#[cfg(test)]
mod tests;

pub use context::{CachedContext, ContextCache, ContextTranslation};
pub use iotlb::{Iotlb, IotlbEntry};
pub use paging::{PagingEntry, PagingStructureCache};
pub(crate) use sequence::Sequence;
pub(crate) use words::EXTENT_HOST_WIDTH_BITS_MAX;

/// How many entries a cache holds, and how they are arranged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheGeometry {
    /// Number of sets: a power of two.
    pub sets: u32,
    /// Entries in a set: 1 to 4.
    pub ways: u8,
}

impl CacheGeometry {
    /// Whether a cache can be built so. Whoever takes a geometry from outside asks this first; building an
    /// impossible one panics.
    pub const fn is_possible(self) -> bool {
        self.sets.is_power_of_two() && self.ways >= 1 && self.ways as usize <= set::WAYS_MAX
    }
    /// Whether the sets can be cut into so many partitions: a power of two, of a set or more each. One is a cache that all share.
    pub const fn takes_partitions(self, partitions: u16) -> bool {
        self.is_possible() && partitions.is_power_of_two() && partitions as u32 <= self.sets
    }
}

/// What became of a fill.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filled {
    /// It is cached.
    Inserted {
        /// An entry of something else had to go.
        evicted: bool,
    },
    /// An invalidation overtook it (I4): it is not cached.
    Outdated,
}
