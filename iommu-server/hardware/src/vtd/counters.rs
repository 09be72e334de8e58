//! What a unit counts. Each port counts in a cache line of its own; the sum is made when somebody looks.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counters of one cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheCounters {
    /// Lookups that found a usable entry.
    pub hits: u64,
    /// Lookups that did not.
    pub misses: u64,
    /// Entries filled.
    pub fills: u64,
    /// Entries displaced by a fill.
    pub evictions: u64,
    /// Fills dropped because an invalidation overtook their walk (I4).
    pub outdated_fills: u64,
}

/// Counters of the ring unit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingCounters {
    /// Requests that the slot in use answered.
    pub hits: u64,
    /// Requests that the prefetched slot answered.
    pub promotions: u64,
    /// Walks of ring tables begun.
    pub walks: u64,
    /// Entries that walks read while a request waited.
    pub walk_reads: u64,
    /// Entries that were read for a slot that nobody had asked for yet.
    pub prefetch_reads: u64,
    /// Invalidations of rings and of devices; a part of the unit's.
    pub invalidations: u64,
}

/// Counters of a unit since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// IOTLB.
    pub iotlb: CacheCounters,
    /// Context cache.
    pub context_cache: CacheCounters,
    /// Paging-structure cache.
    pub paging_structure_cache: CacheCounters,
    /// Walks of second-stage tables begun.
    pub walks: u64,
    /// Entries that walks read: root and context entries, the next five and the extents.
    pub walk_reads: u64,
    /// Second-stage entries that walks read at levels 1 to 5, in this order.
    pub table_reads: [u64; 5],
    /// Extents of partial pages that walks read.
    pub extent_reads: u64,
    /// Invalidations carried out, of whatever kind.
    pub invalidations: u64,
    /// Ranges that page-selective invalidations of the IOTLB named. One invalidation may name several.
    pub invalidated_ranges: u64,
    /// Domain-selective invalidations of the IOTLB.
    pub invalidated_domains: u64,
    /// Global invalidations of the IOTLB.
    pub global_invalidations: u64,
    /// Invalidations that had to wait for DMA in flight.
    pub drains_waited: u64,
    /// Requests refused by translation or remapping; the sum of the next four (I6).
    pub faults: u64,
    /// Of them written to a recording register.
    pub faults_recorded: u64,
    /// Of them collapsed into a pending record of the same source.
    pub faults_collapsed: u64,
    /// Of them dropped because the recording registers were full.
    pub faults_overflowed: u64,
    /// Of them suppressed by FPD.
    pub faults_suppressed: u64,
    /// Interrupts delivered.
    pub interrupts: u64,
    /// Rings.
    pub ring: RingCounters,
}

/// What invalidators count: several threads at a time, and never a device.
#[derive(Debug, Default)]
pub(super) struct InvalidationTally {
    pub(super) all: AtomicU64,
    pub(super) ranges: AtomicU64,
    pub(super) domains: AtomicU64,
    pub(super) globals: AtomicU64,
    pub(super) waited: AtomicU64,
}

impl InvalidationTally {
    pub(super) fn add_to(&self, sum: &mut Counters) {
        sum.invalidations += self.all.load(Ordering::Relaxed);
        sum.invalidated_ranges += self.ranges.load(Ordering::Relaxed);
        sum.invalidated_domains += self.domains.load(Ordering::Relaxed);
        sum.global_invalidations += self.globals.load(Ordering::Relaxed);
        sum.drains_waited += self.waited.load(Ordering::Relaxed);
    }
}

/// A count that one thread moves and any thread reads: a load and a store, never a locked instruction.
#[derive(Debug, Default)]
pub(crate) struct Count(AtomicU64);

impl Count {
    #[inline]
    pub(crate) fn add(&self, more: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(more), Ordering::Relaxed);
    }
    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What a port counts about one cache.
#[derive(Debug, Default)]
pub(super) struct CacheTally {
    pub(super) hits: Count,
    pub(super) misses: Count,
    pub(super) fills: Count,
    pub(super) evictions: Count,
    pub(super) outdated_fills: Count,
}

impl CacheTally {
    pub(super) fn filled(&self, filled: crate::cache::Filled) {
        match filled {
            crate::cache::Filled::Inserted { evicted } => {
                self.fills.add(1);
                self.evictions.add(u64::from(evicted));
            }
            crate::cache::Filled::Outdated => self.outdated_fills.add(1),
        }
    }
    fn add_to(&self, sum: &mut CacheCounters) {
        sum.hits += self.hits.get();
        sum.misses += self.misses.get();
        sum.fills += self.fills.get();
        sum.evictions += self.evictions.get();
        sum.outdated_fills += self.outdated_fills.get();
    }
}

/// What a port counts behind rings.
#[derive(Debug, Default)]
pub(crate) struct RingTally {
    pub(crate) hits: Count,
    pub(crate) promotions: Count,
    pub(crate) walks: Count,
    pub(crate) walk_reads: Count,
    pub(crate) prefetch_reads: Count,
}

impl RingTally {
    pub(crate) fn add_to(&self, sum: &mut RingCounters) {
        sum.hits += self.hits.get();
        sum.promotions += self.promotions.get();
        sum.walks += self.walks.get();
        sum.walk_reads += self.walk_reads.get();
        sum.prefetch_reads += self.prefetch_reads.get();
    }
}

/// Everything that the ports of one slot have counted. A slot outlives its ports, so nothing is lost when one is dropped.
#[derive(Debug, Default)]
pub(super) struct SlotTally {
    pub(super) iotlb: CacheTally,
    pub(super) context_cache: CacheTally,
    pub(super) paging_structure_cache: CacheTally,
    pub(super) walks: Count,
    pub(super) walk_reads: Count,
    /// By level, from 1.
    pub(super) table_reads: [Count; 5],
    pub(super) extent_reads: Count,
    pub(super) interrupts: Count,
    pub(super) ring: RingTally,
}

impl SlotTally {
    pub(super) fn add_to(&self, sum: &mut Counters) {
        self.iotlb.add_to(&mut sum.iotlb);
        self.context_cache.add_to(&mut sum.context_cache);
        self.paging_structure_cache.add_to(&mut sum.paging_structure_cache);
        sum.walks += self.walks.get();
        sum.walk_reads += self.walk_reads.get();
        sum.table_reads.iter_mut().zip(&self.table_reads).for_each(|(sum, count)| *sum += count.get());
        sum.extent_reads += self.extent_reads.get();
        sum.interrupts += self.interrupts.get();
        self.ring.add_to(&mut sum.ring);
    }
}
