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

<<<<<<< HEAD
use crate::drain::{Atomics, Drains, Std};
use iommu_types::{
    DomainId, FunctionMask, Generation, Hpa, Iova, IovaRange, PageSize, Permissions, SourceId,
};

#[derive(Clone, Copy, Debug)]
pub struct CacheGeometry {
    pub sets: u32, /* power of two */
    pub ways: u8,  /* 4 */
}
=======
mod context;
mod iotlb;
mod paging;
mod set;
mod spans;

#[cfg(test)]
mod loom_tests;
#[cfg(test)]
mod tests;
>>>>>>> hw-cache

pub use context::{CachedContext, ContextCache, ContextTranslation};
pub use iotlb::{Iotlb, IotlbEntry};
pub use paging::{PagingEntry, PagingStructureCache};

/// How many entries a cache holds, and how they are arranged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
<<<<<<< HEAD
pub struct IotlbEntry {
    pub domain_id: DomainId,
    pub iova: Iova, /* page base */
    pub size: PageSize,
    pub hpa: Hpa, /* page base */
    pub permissions: Permissions,
}
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filled {
    Inserted { evicted: bool },
    Outdated,
}

pub struct Iotlb<A: Atomics = Std> {
    _a: std::marker::PhantomData<A>,
}
impl<A: Atomics> Iotlb<A> {
    pub fn new(geometry: CacheGeometry) -> Self {
        todo!()
    }
    /// The entry that covers the address, whatever its permissions. Looks for 4K, then 2M and 1G (only sizes that were ever filled for cheapness).
    pub fn lookup(&self, domain: DomainId, iova: Iova) -> Option<IotlbEntry> {
        todo!()
    }
    pub fn fill(&self, drains: &Drains<A>, walked_under: Generation, entry: IotlbEntry) -> Filled {
        todo!()
    }
    pub fn invalidate_all(&self) {
        todo!()
    }
    pub fn invalidate_domain(&self, domain: DomainId) {
        todo!()
    }
    pub fn invalidate_range(&self, domain: DomainId, range: IovaRange) {
        todo!()
    }
    pub fn entries(&self) -> Vec<IotlbEntry> {
        todo!()
    } // sorted; for inspection
    pub fn capacity(&self) -> usize {
        todo!()
    }
}

/// What the context cache holds for a source: a decoded context entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CachedContext {
    pub domain_id: DomainId,
    pub translation: ContextTranslation,
    pub fault_processing_disable: bool,
}
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ContextTranslation {
    SecondStage { table: Hpa, levels: u8 /* 3, 4, 5 */ },
    PassThrough,
}

/// Direct-mapped or set-associative by SID; exact size at most 65,536 sources.
pub struct ContextCache<A: Atomics = Std> {
    _a: std::marker::PhantomData<A>,
}
impl<A: Atomics> ContextCache<A> {
    pub fn new(geometry: CacheGeometry) -> Self {
        todo!()
    }
    pub fn lookup(&self, source: SourceId) -> Option<CachedContext> {
        todo!()
    }
    /// The generation is the *context* generation (one counter for all context-cache invalidations).
    pub fn fill(
        &self,
        drains: &Drains<A>,
        walked_under: Generation,
        source: SourceId,
        context: CachedContext,
    ) -> Filled {
        todo!()
    }
    pub fn invalidate_all(&self) {
        todo!()
    }
    pub fn invalidate_domain(&self, domain: DomainId) {
        todo!()
    }
    pub fn invalidate_device(&self, source: SourceId, mask: FunctionMask) {
        todo!()
    }
    pub fn entries(&self) -> Vec<(SourceId, CachedContext)> {
        todo!()
=======
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
>>>>>>> hw-cache
    }
}

/// What became of a fill.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
<<<<<<< HEAD
pub struct PagingEntry {
    pub domain_id: DomainId,
    pub iova: Iova,
    pub level: u8, /* of the table: 1, 2, 3 */
    pub table: Hpa,
    pub permissions: Permissions,
}
pub struct PagingStructureCache<A: Atomics = Std> {
    _a: std::marker::PhantomData<A>,
}
impl<A: Atomics> PagingStructureCache<A> {
    pub fn new(geometry: CacheGeometry) -> Self {
        todo!()
    }
    /// The deepest table known for the address (level 1 first).
    pub fn lookup(&self, domain: DomainId, iova: Iova) -> Option<PagingEntry> {
        todo!()
    }
    pub fn fill(&self, drains: &Drains<A>, walked_under: Generation, entry: PagingEntry) -> Filled {
        todo!()
    }
    pub fn invalidate_all(&self) {
        todo!()
    }
    pub fn invalidate_domain(&self, domain: DomainId) {
        todo!()
    }
    pub fn invalidate_range(&self, domain: DomainId, range: IovaRange) {
        todo!()
    }
    pub fn entries(&self) -> Vec<PagingEntry> {
        todo!()
    }
=======
pub enum Filled {
    /// It is cached.
    Inserted {
        /// An entry of something else had to go.
        evicted: bool,
    },
    /// An invalidation overtook it (I4): it is not cached.
    Outdated,
>>>>>>> hw-cache
}
