//! Event counts of a stretch of work, from the counters of the shipping code. Deterministic: the same in every run, on every machine.

use std::collections::BTreeMap;

use iommu_hardware::vtd::Counters;
use iommu_kernel::{DomainCounters, IovaCounters};

/// The counters of one moment.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Reading {
    pub(crate) domain: DomainCounters,
    pub(crate) iovas: IovaCounters,
    pub(crate) unit: Counters,
}

/// What happened between two readings, per packet or in whole.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Counts {
    /// Mappings made.
    pub(crate) maps: f64,
    /// Mappings removed.
    pub(crate) unmaps: f64,
    /// Invalidations carried out.
    pub(crate) invalidations: f64,
    /// Of them flushes of a deferred queue.
    pub(crate) flushes: f64,
    /// Table entries written or cleared.
    pub(crate) entry_writes: f64,
    /// Page tables put in place.
    pub(crate) tables_built: f64,
    /// Nodes that the allocator of addresses looked at.
    pub(crate) allocator_visits: f64,
    /// Entries of translation tables that the device waited for.
    pub(crate) table_reads: f64,
    /// Lookups that the IOTLB could not answer.
    pub(crate) iotlb_misses: f64,
    /// Bytes copied from and to shadow buffers.
    pub(crate) copied_bytes: f64,
    /// Walks of ring tables.
    pub(crate) ring_walks: f64,
    /// Requests that a prefetched slot answered.
    pub(crate) ring_promotions: f64,
}

impl Counts {
    /// What happened from one reading to the next.
    pub(crate) fn between(before: &Reading, after: &Reading) -> Self {
        let since = |read: &dyn Fn(&Reading) -> u64| (read(after) - read(before)) as f64;
        Self {
            maps: since(&|reading| reading.domain.maps),
            unmaps: since(&|reading| reading.domain.unmaps),
            invalidations: since(&|reading| reading.unit.invalidations),
            flushes: since(&|reading| reading.domain.flushes),
            entry_writes: since(&|reading| reading.domain.entry_writes),
            tables_built: since(&|reading| reading.domain.tables_built),
            allocator_visits: since(&|reading| reading.iovas.visits),
            table_reads: since(&|reading| {
                reading.unit.table_reads.iter().sum::<u64>() + reading.unit.ring.walk_reads
            }),
            iotlb_misses: since(&|reading| reading.unit.iotlb.misses),
            copied_bytes: since(&|reading| reading.domain.copied_bytes),
            ring_walks: since(&|reading| reading.unit.ring.walks),
            ring_promotions: since(&|reading| reading.unit.ring.promotions),
        }
    }
    /// The same for one of so many.
    pub(crate) fn per(self, many: f64) -> Self {
        Self {
            maps: self.maps / many,
            unmaps: self.unmaps / many,
            invalidations: self.invalidations / many,
            flushes: self.flushes / many,
            entry_writes: self.entry_writes / many,
            tables_built: self.tables_built / many,
            allocator_visits: self.allocator_visits / many,
            table_reads: self.table_reads / many,
            iotlb_misses: self.iotlb_misses / many,
            copied_bytes: self.copied_bytes / many,
            ring_walks: self.ring_walks / many,
            ring_promotions: self.ring_promotions / many,
        }
    }
    /// Each with its name and its heading in a table.
    pub(crate) fn named(self) -> [(&'static str, &'static str, f64); 12] {
        [
            ("maps", "maps", self.maps),
            ("unmaps", "unmaps", self.unmaps),
            ("invalidations", "inval.", self.invalidations),
            ("flushes", "flushes", self.flushes),
            ("entry_writes", "entries", self.entry_writes),
            ("tables_built", "tables", self.tables_built),
            ("allocator_visits", "visits", self.allocator_visits),
            ("table_reads", "reads", self.table_reads),
            ("iotlb_misses", "misses", self.iotlb_misses),
            ("copied_bytes", "copied B", self.copied_bytes),
            ("ring_walks", "ring walks", self.ring_walks),
            ("ring_promotions", "promotions", self.ring_promotions),
        ]
    }
    /// By name, for `report.json`.
    pub(crate) fn by_name(self) -> BTreeMap<&'static str, f64> {
        self.named().into_iter().map(|(name, _, value)| (name, value)).collect()
    }
}
