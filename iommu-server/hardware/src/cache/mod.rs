//! The caches of a unit: IOTLB, context cache, paging-structure cache. Real: an entry that is not invalidated is served for ever.
// CONTRACT (helper B)
//
// Set-associative, lock-free readers (a sequence lock per set, entry = two words: tag and data), writers under the set's lock. Geometry configurable: sets (power of two) x 4 ways.
// A hit writes nothing shared. Counters (hits, misses, fills, evictions, outdated fills): hits/misses are counted in the port (per slot, its own cache line)
// and summed at inspection; fills/evictions per cache.
// Tag word of the IOTLB: valid | domain id 16 | page size 2 | page number 45. Data word: frame address, permissions, room for a partial-page flag.
// A fill carries the Generation under which its walk BEGAN and checks it under the set's writer lock (I4). Invalidate page range: clears by computing sets per page size for small
// ranges, scans for large ones. Optional partitioning per domain (domain -> range of ways or sets) may come later; leave room.
// Generic over Atomics like drain/.

use crate::drain::{Atomics, Drains, Std};
use iommu_types::{
    DomainId, FunctionMask, Generation, Hpa, Iova, IovaRange, PageSize, Permissions, SourceId,
};

#[derive(Clone, Copy, Debug)]
pub struct CacheGeometry {
    pub sets: u32, /* power of two */
    pub ways: u8,  /* 4 */
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
    }
}

/// Paging-structure cache: (domain, address bits above a level-1, -2 or -3 table) -> that table and the AND of permissions so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
}
