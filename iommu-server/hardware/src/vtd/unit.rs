//! The unit: its caches, what it has latched, and the typed operations behind both front ends.
//!
//! **Architecture invariant (I1, I4):** an invalidation moves the generation, *then* clears the caches under their set locks,
//! *then* takes a new epoch and drains. A walk that began before the move cannot fill any more; a DMA that found the old
//! entry is in an older epoch and is waited for.
//!
//! ```text
//!  device:      enter epoch ─ context ─ lookup ─(generation ─ walk ─ fill)─ copy ─ leave epoch
//!  invalidator:                  move generation ─ clear ─ new epoch ─ wait for older epochs ─ answer
//! ```

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crossbeam_utils::CachePadded;
use iommu_types::SourceId;
use iommu_types::{
    Capabilities, DomainId, Fault, FunctionMask, Hpa, InvalidCapabilities, Invalidation, IovaRange,
};

use super::counters::{Counters, InvalidationTally, SlotTally};
use super::event::EventSink;
use super::fault_log::{FaultLog, RecordedFault};
use super::interrupt::{InterruptState, InterruptTable};
use super::spec::registers::{Gsts, Irta, Rtaddr};
use super::walk::{RootMode, RootTable, TableRules};
use crate::cache::{
    CacheGeometry, ContextCache, EXTENT_HOST_WIDTH_BITS_MAX, Iotlb, IotlbEntry, PagingStructureCache,
};
use crate::drain::{Drains, PendingDrain, Scope, SlotIndex};
use crate::memory::PhysicalMemory;
use crate::riommu::{RingCache, RingEntryState, RingUnit, Rings};

/// The choices of a unit.
#[derive(Clone, Debug)]
pub struct UnitConfig {
    /// What it can do, as its capability registers say it.
    pub capabilities: Capabilities,
    /// Size of the IOTLB.
    pub iotlb: CacheGeometry,
    /// Size of the context cache.
    pub context_cache: CacheGeometry,
    /// Size of the paging-structure cache.
    pub paging_structure_cache: CacheGeometry,
    /// How many shares the IOTLB is cut into: a power of two, at most the number of its sets. A domain's entries stand in the share that
    /// its number says, modulo this; with 1, all domains share all of it.
    pub iotlb_partitions: u16,
    /// How many ports it has at most at one time.
    pub ports_max: u16,
    /// Whether bit 52 of a leaf means that its page is granted in part ([`extent`](super::spec::extent)), which is an extension of ours: a
    /// bare unit ignores the bit, as the specification has it. Needs a host width of 46 bits at most.
    pub byte_extents: bool,
}

impl UnitConfig {
    /// Whether the choices make sense together.
    fn validate(&self) -> Result<(), InvalidCapabilities> {
        self.capabilities.validate()?;
        if self.byte_extents && self.capabilities.host_width_bits > EXTENT_HOST_WIDTH_BITS_MAX {
            let why = "an IOTLB entry has room for an extent only beside host addresses of at most 46 bits";
            return Err(InvalidCapabilities { field: "byte_extents", why });
        }
        Ok(())
    }
}

/// Every port of the unit is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("all ports of the unit are taken")]
pub struct PortsExhausted;

/// A remapping unit (VT-d 5.10, legacy mode). Shared by all ports and by whoever programs it.
pub struct Unit {
    config: UnitConfig,
    memory: Arc<PhysicalMemory>,
    events: Arc<dyn EventSink>,
    pub(super) drains: Drains,
    pub(super) iotlb: Iotlb,
    pub(super) contexts: ContextCache,
    pub(super) paging: PagingStructureCache,
    latches: Latches,
    pub(super) faults: FaultLog,
    /// The ring unit beside this one: other tables and another cache, the same slots, drains and fault log.
    pub(crate) rings: RingUnit,
    tallies: Box<[CachePadded<SlotTally>]>,
    /// Which source sits behind a slot; the scope of a device-selective invalidation.
    sources: Mutex<Box<[Option<SourceId>]>>,
    invalidations: CachePadded<InvalidationTally>,
}

/// What commands have latched: read by every burst, written by software.
struct Latches {
    /// As GSTS: TES, IRES, CFIS and IRTPS.
    status: AtomicU32,
    /// As RTADDR.
    root: AtomicU64,
    /// As IRTA.
    interrupt_table: AtomicU64,
}

impl Unit {
    /// Starts with translation and remapping off, caches empty (as after a reset). Panics on [impossible](CacheGeometry::is_possible)
    /// geometries and [partitions](CacheGeometry::takes_partitions).
    pub fn new(
        config: UnitConfig,
        memory: Arc<PhysicalMemory>,
        events: Arc<dyn EventSink>,
    ) -> Result<Arc<Self>, InvalidCapabilities> {
        config.validate()?;
        let slots = usize::from(config.ports_max);
        Ok(Arc::new(Self {
            drains: Drains::new(config.ports_max),
            iotlb: Iotlb::partitioned(config.iotlb, config.iotlb_partitions),
            contexts: ContextCache::new(config.context_cache),
            paging: PagingStructureCache::new(config.paging_structure_cache),
            latches: Latches {
                status: AtomicU32::new(0),
                root: AtomicU64::new(0),
                interrupt_table: AtomicU64::new(0),
            },
            faults: FaultLog::new(config.capabilities.fault_records),
            rings: RingUnit::default(),
            tallies: (0..slots).map(|_| CachePadded::default()).collect(),
            sources: Mutex::new(vec![None; slots].into_boxed_slice()),
            invalidations: CachePadded::default(),
            config,
            memory,
            events,
        }))
    }
    /// The memory that the unit's tables lie in and that DMA reaches.
    pub fn memory(&self) -> &Arc<PhysicalMemory> {
        &self.memory
    }
    /// What the unit can do.
    pub fn capabilities(&self) -> &Capabilities {
        &self.config.capabilities
    }
    /// Whether pages may be granted in part.
    #[inline]
    pub fn has_byte_extents(&self) -> bool {
        self.config.byte_extents
    }
    /// How the unit reads second-stage tables.
    #[inline]
    pub fn table_rules(&self) -> TableRules<'_> {
        TableRules { capabilities: &self.config.capabilities, byte_extents: self.config.byte_extents }
    }

    // === typed operations ===

    /// Latches the root table. Caches keep what they have: invalidate contexts, then translations, afterwards.
    pub fn set_root_table(&self, root: RootTable) {
        let mode = match root.mode {
            RootMode::Legacy => 0,
            RootMode::Scalable => 1,
            RootMode::Reserved => 2,
            RootMode::AbortDma => 3,
        };
        let register = Rtaddr::new().with_frame(root.base.page_number()).with_table_mode(mode);
        self.latches.root.store(register.into_bits(), Ordering::SeqCst);
    }
    /// Turns translation on or off. DMA admitted before is drained; what comes after is treated the new way at once.
    pub fn set_translation(&self, enabled: bool) -> PendingDrain {
        self.latch(Gsts::new().with_translation(true), enabled);
        self.drains.drain(Scope::Everything)
    }
    /// Latches the interrupt remapping table.
    pub fn set_interrupt_table(&self, table: InterruptTable) {
        assert!((1..=16).contains(&table.entries_log2), "a table has 2 to 65,536 entries");
        let register = Irta::new()
            .with_frame(table.base.page_number())
            .with_extended_mode(table.extended_mode)
            .with_size(table.entries_log2 - 1);
        self.latches.interrupt_table.store(register.into_bits(), Ordering::SeqCst);
        self.latch(Gsts::new().with_set_interrupt_table(true), true);
    }
    /// Turns interrupt remapping on or off. Interrupts accepted before are drained.
    pub fn set_interrupt_remapping(&self, enabled: bool) -> PendingDrain {
        self.latch(Gsts::new().with_interrupt_remapping(true), enabled);
        self.drains.drain(Scope::Everything)
    }
    /// Lets compatibility-format interrupts pass or blocks them.
    pub fn set_compatibility_interrupts(&self, allowed: bool) {
        self.latch(Gsts::new().with_compatibility_interrupts(true), allowed);
    }
    /// Forgets what `what` names. When the drain completes, no DMA uses what was forgotten (I1); its scope is the granule,
    /// so DMA of other domains does not hold it up.
    pub fn invalidate(&self, what: Invalidation) -> PendingDrain {
        match what {
            Invalidation::IotlbPages { domain_id, range, leaf_only } => {
                self.invalidate_pages(domain_id, &[range], leaf_only)
            }
            Invalidation::IotlbGlobal => {
                self.invalidations.globals.fetch_add(1, Ordering::Relaxed);
                self.forget(Scope::Everything, || {
                    self.iotlb.invalidate_all();
                    self.paging.invalidate_all();
                })
            }
            Invalidation::IotlbDomain(domain) => {
                self.invalidations.domains.fetch_add(1, Ordering::Relaxed);
                self.forget(Scope::Domain(domain), || {
                    self.iotlb.invalidate_domain(domain);
                    self.paging.invalidate_domain(domain);
                })
            }
            Invalidation::ContextGlobal => {
                self.forget_contexts(Scope::Everything, || self.contexts.invalidate_all())
            }
            Invalidation::ContextDomain(domain) => {
                self.forget_contexts(Scope::Domain(domain), || self.contexts.invalidate_domain(domain))
            }
            Invalidation::ContextDevice { source_id, function_mask, .. } => {
                self.forget_contexts_of(source_id, function_mask)
            }
            // Entries of the interrupt table are not cached, so there is nothing to clear; interrupts in flight are drained.
            Invalidation::InterruptGlobal | Invalidation::InterruptIndex { .. } => {
                self.counted(self.drains.drain(Scope::Everything))
            }
        }
    }
    /// Page-selective invalidations of one domain with one move of the generation, one epoch and one drain for all of them
    /// (batched strict unmaps).
    pub fn invalidate_pages(&self, domain: DomainId, ranges: &[IovaRange], leaf_only: bool) -> PendingDrain {
        self.invalidations.ranges.fetch_add(ranges.len() as u64, Ordering::Relaxed);
        self.forget(Scope::Domain(domain), || {
            for range in ranges {
                self.iotlb.invalidate_range(domain, *range);
                if !leaf_only {
                    self.paging.invalidate_range(domain, *range);
                }
            }
        })
    }

    // === rings ===

    /// Latches the root of the ring unit, a page. Entries stay: invalidate the devices afterwards.
    pub fn set_ring_root(&self, root: Hpa) {
        self.rings.root().set(root);
    }
    /// Puts a source behind the ring unit, with entries for so many rings, or back behind VT-d. When the drain completes, no DMA
    /// of the source uses what was cached for it among rings before, or is translated the other way. What VT-d's caches hold for
    /// it stays.
    pub fn set_behind_rings(&self, source: SourceId, rings: Option<u16>) -> PendingDrain {
        self.rings.put(source, rings);
        self.drain_slots_of(|known| known == source)
    }
    /// Forgets a ring. When the drain completes, no DMA uses what was forgotten (I1); only the source's own DMA is waited for.
    pub fn invalidate_ring(&self, source: SourceId, ring: u16) -> PendingDrain {
        self.rings.forget(source, Some(ring));
        self.counted(self.drain_slots_of(|known| known == source))
    }
    /// Forgets all rings of a source, as [`invalidate_ring`](Self::invalidate_ring) does one.
    pub fn invalidate_ring_device(&self, source: SourceId) -> PendingDrain {
        self.rings.forget(source, None);
        self.counted(self.drain_slots_of(|known| known == source))
    }
    /// What is cached for the rings of a source, by ring. Nothing for a source that is not behind the ring unit.
    pub fn ring_entries(&self, source: SourceId) -> Vec<RingEntryState> {
        self.rings.cache_of(source).map_or_else(Vec::new, |cache| cache.states())
    }

    // === faults ===

    /// Hands out (and clears) the recording registers, oldest first, and clears the overflow mark.
    pub fn take_faults(&self) -> Vec<RecordedFault> {
        self.faults.take()
    }
    /// Whether [`take_faults`](Self::take_faults) would give something; one load.
    pub fn faults_pending(&self) -> bool {
        self.faults.is_any_pending()
    }

    // === looking ===

    /// What the IOTLB holds, sorted.
    pub fn iotlb_entries(&self) -> Vec<IotlbEntry> {
        self.iotlb.entries()
    }
    /// How many entries the IOTLB can hold.
    pub fn iotlb_capacity(&self) -> usize {
        self.iotlb.capacity()
    }
    /// Everything counted since the start, by ports that are gone included.
    pub fn counters(&self) -> Counters {
        let mut sum = Counters::default();
        self.invalidations.add_to(&mut sum);
        self.tallies.iter().for_each(|tally| tally.add_to(&mut sum));
        sum.ring.invalidations = self.rings.invalidations();
        self.faults.add_to(&mut sum);
        sum
    }

    // === for ports, the register file and Explain ===

    pub(super) fn events(&self) -> &dyn EventSink {
        &*self.events
    }
    #[inline]
    pub(super) fn is_translating(&self) -> bool {
        self.status().translation()
    }
    /// TES, IRES, CFIS and IRTPS as they act now. GSTS may lag behind by a drain.
    #[inline]
    pub(super) fn status(&self) -> Gsts {
        Gsts::from_bits(self.latches.status.load(Ordering::Acquire))
    }
    pub(super) fn root_table(&self) -> RootTable {
        let register = Rtaddr::from_bits(self.latches.root.load(Ordering::Acquire));
        RootTable { base: Hpa::new(register.frame() << 12), mode: RootMode::from_ttm(register.table_mode()) }
    }
    pub(super) fn interrupt_state(&self) -> InterruptState {
        let status = self.status();
        let register = Irta::from_bits(self.latches.interrupt_table.load(Ordering::Acquire));
        InterruptState {
            remapping_enabled: status.interrupt_remapping(),
            compatibility_allowed: status.compatibility_interrupts(),
            table: status.set_interrupt_table().then(|| InterruptTable {
                base: Hpa::new(register.frame() << 12),
                entries_log2: register.size() + 1,
                extended_mode: register.extended_mode(),
            }),
        }
    }
    /// The ring tables of a source and its entries.
    #[inline]
    pub(crate) fn rings_of<'a>(
        &'a self,
        source: SourceId,
        cache: &'a RingCache,
    ) -> Rings<'a, PhysicalMemory> {
        Rings {
            memory: &*self.memory,
            root: self.rings.root(),
            cache,
            source,
            zero_length_read: self.config.capabilities.zero_length_read,
        }
    }
    /// Records a refusal, or counts it where FPD suppresses the record (I6).
    pub(super) fn record(&self, fault: &Fault, suppressed: bool) {
        self.faults.record(fault, suppressed, self.events());
    }
    #[inline]
    pub(super) fn tally(&self, slot: SlotIndex) -> &SlotTally {
        &self.tallies[usize::from(slot.0)]
    }
    /// A slot for a port of `source`.
    pub(super) fn claim_slot(&self, source: SourceId) -> Result<SlotIndex, PortsExhausted> {
        let slot = self.drains.claim_slot().ok_or(PortsExhausted)?;
        self.lock_sources()[usize::from(slot.0)] = Some(source);
        Ok(slot)
    }
    /// The port of the slot is gone.
    pub(super) fn release_slot(&self, slot: SlotIndex) {
        self.lock_sources()[usize::from(slot.0)] = None;
        self.drains.release_slot(slot);
    }

    fn lock_sources(&self) -> std::sync::MutexGuard<'_, Box<[Option<SourceId>]>> {
        self.sources.lock().unwrap_or_else(PoisonError::into_inner)
    }
    fn latch(&self, bit: Gsts, on: bool) {
        let bit = bit.into_bits();
        let (before, after) = if on {
            let before = self.latches.status.fetch_or(bit, Ordering::SeqCst);
            (before, before | bit)
        } else {
            let before = self.latches.status.fetch_and(!bit, Ordering::SeqCst);
            (before, before & !bit)
        };
        let is_off = |status| {
            let status = Gsts::from_bits(status);
            !status.translation() && !status.interrupt_remapping()
        };
        // Only the step to both off rewinds: other bits may change while faults are pending.
        if is_off(after) && !is_off(before) {
            self.faults.rewind();
        }
    }
    fn forget(&self, scope: Scope, clear: impl FnOnce()) -> PendingDrain {
        let invalidating = self.drains.move_generation(scope);
        clear();
        self.counted(invalidating.drain())
    }
    fn forget_contexts(&self, scope: Scope, clear: impl FnOnce()) -> PendingDrain {
        let invalidating = self.drains.move_context_generation(scope);
        clear();
        self.counted(invalidating.drain())
    }
    /// Forgets contexts of sources and drains every slot of such a source.
    fn forget_contexts_of(&self, target: SourceId, mask: FunctionMask) -> PendingDrain {
        let invalidating = self.drains.move_context_generation(Scope::Everything);
        self.contexts.invalidate_device(target, mask);
        // The drains below are narrower than the scope named above, which only the drain of `invalidating` would use.
        drop(invalidating);
        self.counted(self.drain_slots_of(|source| mask.matches(target, source)))
    }
    /// Drains every slot of the sources that are meant. A port that comes later looks everything up after what the caller
    /// cleared, because both go through the lock of the sources.
    fn drain_slots_of(&self, is_meant: impl Fn(SourceId) -> bool) -> PendingDrain {
        let meant: Vec<SlotIndex> = (0u16..)
            .zip(self.lock_sources().iter())
            .filter(|(_, source)| source.is_some_and(&is_meant))
            .map(|(slot, _)| SlotIndex(slot))
            .collect();
        meant
            .into_iter()
            .map(|slot| self.drains.drain(Scope::Slot(slot)))
            .fold(PendingDrain::none(), PendingDrain::and)
    }
    fn counted(&self, pending: PendingDrain) -> PendingDrain {
        self.invalidations.all.fetch_add(1, Ordering::Relaxed);
        match pending.try_complete() {
            Ok(_drained) => PendingDrain::none(),
            Err(pending) => {
                self.invalidations.waited.fetch_add(1, Ordering::Relaxed);
                pending
            }
        }
    }
}
