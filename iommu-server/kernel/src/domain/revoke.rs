//! Memory that is taken back from the owner while it is mapped: whatever of a domain leads there goes, in every mode.
//!
//! Mappings go whole, never in part: one that lies across the edge of the range takes what lies outside with it, and a scatter-gather mapping
//! goes with all of its elements. Only a direct map is cut, because nobody mapped it piece by piece ([`direct`](super::direct)).
//!
//! **What the driver sees.** Its mapping is unknown from then on: an unmap or a sync of it is answered with `NotMapped`, as of any address
//! where nothing is mapped. The sanitizer knows better and calls neither that nor a DMA to it misuse. The address is free again after the
//! drain, so a driver whose memory is taken back must not go on with mappings of it. A bounced mapping is not copied back: what it would be
//! copied to is no longer the owner's.
//!
//! **What a concurrent map does.** The memory is [leaving](crate::OwnerMemory::begin_leaving) before any domain revokes, and a map reads the memory
//! map under the same lock that this was said under: it is complete, and then revoked here, or it is refused with `MemoryLeaving`. The
//! frames themselves take no new pin.

use iommu_hardware::memory::{MappingRecord, RecordIndex};
use iommu_types::{Direction, GpaRange, Iova, IovaRange};

use super::find::{Found, Place, direction_of, function_of};
use super::request::Tick;
use super::undone::{IovaUse, PendingUnmap, Remains};
use super::{Domain, Mode};
use crate::boot::Kernel;
use crate::sanitizer::MappingKind;

/// Mappings that are revoked, as their sanitizer knows them.
type Told = Vec<(IovaRange, Direction, MappingKind)>;

impl Domain {
    /// Revokes by force whatever of this domain leads to the memory, and takes over what others have unmapped and not finished. After
    /// [`finish_unmap`](Self::finish_unmap) with its drain, no pin of this domain is left there.
    pub fn revoke_memory(&mut self, kernel: &Kernel, memory: GpaRange, now: Tick) -> PendingUnmap {
        let mut remains = self.unfinished.fresh();
        let mut told = Told::new();
        self.revoke_groups_of(kernel, memory, &mut remains, &mut told);
        for found in self.leading_to(kernel, memory) {
            told.push((range_of(&found.facts), direction_of(found.facts.permissions), kind_of(&found.facts)));
            self.revoke_forced(kernel, &found, &mut remains);
        }
        match &self.mode {
            Mode::Passthrough => self.close_direct(kernel, memory, &mut remains),
            Mode::Identity(_) => self.evict_within(kernel, memory, &mut remains),
            Mode::Strict | Mode::Deferred(_) | Mode::Bounce(_) | Mode::Ring(_) => {}
        }
        let pending = self.settle_with_all_others(kernel, remains);
        self.tell_revoked(&told, now);
        pending
    }
    /// Puts what was revoked under one drain with what waits for a flush and what others have not finished.
    fn settle_with_all_others(&mut self, kernel: &Kernel, mut remains: Remains) -> PendingUnmap {
        let mut others = self.unfinished.fresh();
        match &mut self.mode {
            Mode::Deferred(queue) => others.append(&mut queue.take()),
            Mode::Ring(rings) => rings.take_waiting(&mut others),
            Mode::Strict | Mode::Passthrough | Mode::Identity(_) | Mode::Bounce(_) => {}
        }
        self.unfinished.take_all(&mut others);
        let is_alone = others.is_empty();
        remains.append(&mut others);
        self.unfinished.reuse(others);
        match self.mode {
            Mode::Ring(_) if remains.is_empty() => PendingUnmap::nothing(self.id),
            Mode::Ring(_) => self.invalidate_rings(kernel, remains),
            _ if is_alone => self.invalidate_now(kernel, remains),
            // Where the others lay is not known any more.
            _ => self.invalidate_domain(kernel, remains),
        }
    }
    /// Scatter-gather mappings of which an element leads there.
    fn revoke_groups_of(
        &mut self,
        kernel: &Kernel,
        memory: GpaRange,
        remains: &mut Remains,
        told: &mut Told,
    ) {
        let leads = |record| leads_to(&kernel.records.records().get(record).1, memory);
        for group in self.take_groups_with(leads) {
            let (segments, direction) = group.as_told();
            let tell = |(iova, bytes)| {
                (
                    IovaRange::new(iova, bytes).expect("a segment of ours"),
                    direction,
                    MappingKind::ScatterGather,
                )
            };
            told.extend(segments.map(tell));
            if let Mode::Ring(_) = self.mode {
                // What waits for the end of its burst is taken over with the rest.
                let _waiting = self.unmap_elements(kernel, group.elements(), false, Tick::default());
            } else {
                self.revoke_elements(kernel, &group, false, 0, remains);
            }
        }
    }
    /// Every mapping but those of scatter-gather, of a direct map and of shadow buffers that leads there. All mappings are looked at: they are
    /// found by their addresses, and memory is taken back rarely.
    fn leading_to(&self, kernel: &Kernel, memory: GpaRange) -> Vec<Found> {
        let in_slots =
            self.tables.slots_from(0, usize::MAX).into_iter().map(|(_, record)| (record, Place::Slot));
        let in_tree = self.ranges.values().map(|mapping| (mapping.record, Place::Range));
        let in_ledger = self.ledger.from(Iova::new(0)).map(|(_, record)| (record, Place::Ledger));
        let mut all: Vec<(RecordIndex, Place)> = in_slots.chain(in_tree).chain(in_ledger).collect();
        if let Mode::Ring(rings) = &self.mode {
            all.extend(rings.live_from(Iova::new(0)).map(|(_, record)| (record, Place::Ring)));
        }
        let with_facts =
            |(record, place)| Found { record, facts: kernel.records.records().get(record).1, place };
        let mut found: Vec<Found> = all.into_iter().map(with_facts).collect();
        found.retain(|found| leads_to(&found.facts, memory));
        found
    }
    fn revoke_forced(&mut self, kernel: &Kernel, found: &Found, remains: &mut Remains) {
        if let Place::Ring = found.place {
            let element = (Iova::new(found.facts.iova), found.record);
            let _waiting = self.unmap_elements(kernel, &[element], false, Tick::default());
            return;
        }
        let is_fixed = found.facts.kind == MappingRecord::KIND_DOMAIN_API;
        let iova = if is_fixed { IovaUse::Fixed } else { IovaUse::Allocated(0) };
        self.revoke_found(kernel, found, iova, false, remains);
    }
}

/// Whether a mapping of a driver leads to a page of the memory.
fn leads_to(record: &MappingRecord, memory: GpaRange) -> bool {
    let is_drivers = !matches!(record.kind, MappingRecord::KIND_DIRECT | MappingRecord::KIND_SHADOW);
    is_drivers
        && record.gpa <= memory.last().get()
        && record.gpa + (record.size_bytes - 1) >= memory.base().get()
}

fn range_of(record: &MappingRecord) -> IovaRange {
    IovaRange::new(Iova::new(record.iova), record.size_bytes).expect("a record of ours")
}

fn kind_of(record: &MappingRecord) -> MappingKind {
    function_of(record.kind).map_or(MappingKind::Fixed, MappingKind::from)
}
