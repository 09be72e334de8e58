//! What is unmapped and not yet quiet.
//!
//! Between clearing the entries and the end of the drain, a DMA in flight may still use the frames, a cache fill may
//! still name the address, a walk may still stand in an unhooked table. What waits for the drain is kept here, in the
//! domain; the caller holds a ticket ([`Undone`]). A caller that is cancelled loses the ticket only: the next
//! [`Domain::unmap_all`] takes over whatever is left, under a drain that began later.

use iommu_hardware::drain::{Drained, PendingDrain};
use iommu_hardware::memory::{RecordIndex, RecordState};
use iommu_types::{DomainId, Hpa, Invalidation, Iova, IovaRange, PAGE_SIZE_BYTES};

use super::Domain;
use crate::boot::Kernel;
use crate::frames::FrameRun;

/// Entries are gone from the tables; DMA in flight may still use them until the drain completes.
#[must_use = "memory stays pinned until finish_unmap"]
#[derive(Debug)]
pub struct PendingUnmap {
    /// What [`Domain::finish_unmap`] releases.
    pub undone: Undone,
    /// What has to be quiet first.
    pub drain: PendingDrain,
}

impl PendingUnmap {
    /// The drain, to be awaited without a lock, and what is to be finished then.
    pub fn split(self) -> (PendingDrain, Undone) {
        (self.drain, self.undone)
    }
}

/// What `finish_unmap` releases: a ticket for what waits in the domain.
#[must_use = "memory stays pinned until finish_unmap"]
#[derive(Debug, PartialEq, Eq)]
pub struct Undone {
    domain_id: DomainId,
    /// `None` when nothing was unmapped.
    place: Option<Place>,
    mappings: u64,
    bytes: u64,
}

impl Undone {
    /// Bytes of the mappings removed.
    pub fn unmapped_bytes(&self) -> u64 {
        self.bytes
    }
    /// Mappings removed.
    pub fn unmapped_mappings(&self) -> u64 {
        self.mappings
    }
    /// Whether no mapping was removed.
    pub fn is_empty(&self) -> bool {
        self.mappings == 0
    }
}

/// Where the rest waits. The serial tells a place from its next use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    index: usize,
    serial: u64,
}

/// What one unmap leaves to release. Its vectors are used again and again: no allocation in the steady state.
#[derive(Debug, Default)]
pub(super) struct Remains {
    pub(super) records: Vec<RecordIndex>,
    pub(super) iovas: Vec<FreedIova>,
    pub(super) frames: Vec<FrameRun>,
    pub(super) tables: Vec<Hpa>,
    pub(super) bytes: u64,
}

/// Addresses that are free again after the drain.
#[derive(Clone, Copy, Debug)]
pub(super) struct FreedIova {
    pub(super) first: u64,
    pub(super) pages: u64,
    pub(super) is_fixed: bool,
}

impl Remains {
    fn append(&mut self, other: &mut Self) {
        self.records.append(&mut other.records);
        self.iovas.append(&mut other.iovas);
        self.frames.append(&mut other.frames);
        self.tables.append(&mut other.tables);
        self.bytes += std::mem::take(&mut other.bytes);
    }
}

/// All that waits in one domain.
#[derive(Debug, Default)]
pub(super) struct Unfinished {
    places: Vec<(u64, Option<Remains>)>,
    vacant: Vec<usize>,
    /// Remains without content, for their memory.
    reusable: Vec<Remains>,
}

impl Unfinished {
    /// Remains without content.
    pub(super) fn fresh(&mut self) -> Remains {
        self.reusable.pop().unwrap_or_default()
    }
    fn put(&mut self, remains: Remains) -> Place {
        let index = self.vacant.pop().unwrap_or_else(|| {
            self.places.push((0, None));
            self.places.len() - 1
        });
        let place = &mut self.places[index];
        place.1 = Some(remains);
        Place { index, serial: place.0 }
    }
    fn take(&mut self, place: Place) -> Option<Remains> {
        let (serial, remains) = &mut self.places[place.index];
        if *serial != place.serial {
            return None;
        }
        *serial += 1;
        self.vacant.push(place.index);
        remains.take()
    }
    /// Takes over what other callers have not finished.
    pub(super) fn take_all(&mut self, into: &mut Remains) {
        for index in 0..self.places.len() {
            let (serial, remains) = &self.places[index];
            if remains.is_some() {
                let place = Place { index, serial: *serial };
                let mut remains = self.take(place).expect("the place is taken");
                into.append(&mut remains);
                self.reuse(remains);
            }
        }
    }
    fn reuse(&mut self, remains: Remains) {
        /// More than this are never under way in a well-behaved domain.
        const REUSABLE_MAX: usize = 16;
        /// Vectors that a large unmap has grown are not kept.
        const FRAMES_KEPT_MAX: usize = 4096;
        if self.reusable.len() < REUSABLE_MAX && remains.frames.capacity() <= FRAMES_KEPT_MAX {
            self.reusable.push(remains);
        }
    }
}

impl Domain {
    /// Takes one mapping out of the tables and notes what is left to release: record *revoking* → entries cleared.
    pub(super) fn revoke(&mut self, kernel: &Kernel, mapping: Revoked, remains: &mut Remains) {
        let Revoked { first, pages, record, size_bytes, is_fixed } = mapping;
        kernel.records.records().set_state(record, RecordState::Revoking);
        self.tables.unmap(kernel.memory(), first, pages, &mut remains.frames);
        remains.records.push(record);
        remains.iovas.push(FreedIova { first, pages, is_fixed });
        remains.bytes += size_bytes;
        self.counters.mappings -= 1;
        self.counters.mapped_bytes -= size_bytes;
        self.counters.unmaps += 1;
        note_range(&mut self.invalidated, first, pages);
    }
    /// Begins the one invalidation of everything revoked, and keeps what is to be released after its drain.
    pub(super) fn settle(&mut self, kernel: &Kernel, remains: Remains) -> PendingUnmap {
        self.settle_with(kernel, remains, false)
    }
    /// As `settle`, with one invalidation of the whole domain.
    pub(super) fn settle_all(&mut self, kernel: &Kernel, remains: Remains) -> PendingUnmap {
        self.settle_with(kernel, remains, true)
    }
    fn settle_with(&mut self, kernel: &Kernel, mut remains: Remains, whole_domain: bool) -> PendingUnmap {
        let mappings = remains.records.len() as u64;
        let bytes = remains.bytes;
        if mappings == 0 {
            self.unfinished.reuse(remains);
            let undone = Undone { domain_id: self.id, place: None, mappings: 0, bytes: 0 };
            return PendingUnmap { undone, drain: PendingDrain::none() };
        }
        // An unhooked table may be cached by any walk of the domain, so then all of the domain is invalidated.
        let unhooked = self.tables.unhook_empty(kernel.memory(), &mut remains.tables);
        let drain = if unhooked || whole_domain {
            kernel.unit().invalidate(Invalidation::IotlbDomain(self.id))
        } else {
            kernel.unit().invalidate_pages(self.id, &self.invalidated, true)
        };
        self.invalidated.clear();
        let place = Some(self.unfinished.put(remains));
        PendingUnmap { undone: Undone { domain_id: self.id, place, mappings, bytes }, drain }
    }
    /// Releases what an unmap left, after its drain: records, addresses, pins, tables (I9).
    pub fn finish_unmap(&mut self, kernel: &Kernel, undone: Undone, drained: Drained) {
        let _proof = drained;
        assert!(undone.domain_id == self.id, "an unmap is finished in the domain where it began");
        if let Some(remains) = undone.place.and_then(|place| self.unfinished.take(place)) {
            self.release(kernel, remains);
        }
    }
    fn release(&mut self, kernel: &Kernel, mut remains: Remains) {
        let mappings = remains.records.len() as u64;
        for record in remains.records.drain(..) {
            kernel.records.records().set_state(record, RecordState::Free);
            kernel.records.put(&mut self.kept_records, record);
        }
        for FreedIova { first, pages, is_fixed } in remains.iovas.drain(..) {
            if is_fixed { self.iovas.free_exact(first, pages) } else { self.iovas.free(first, pages, 0) }
        }
        for frame in remains.frames.drain(..).flat_map(FrameRun::iter) {
            kernel.frames.array().unpin(frame);
        }
        self.tables.recycle(kernel, &self.account, &mut remains.tables);
        self.account.mappings.refund(mappings);
        self.account.mapped.refund(std::mem::take(&mut remains.bytes));
        self.unfinished.reuse(remains);
    }
}

/// A mapping that is to go.
pub(super) struct Revoked {
    pub(super) first: u64,
    pub(super) pages: u64,
    pub(super) record: RecordIndex,
    pub(super) size_bytes: u64,
    pub(super) is_fixed: bool,
}

/// Notes a range to invalidate, merged with the one before when it follows it.
fn note_range(ranges: &mut Vec<IovaRange>, first: u64, pages: u64) {
    let range = |base: Iova, bytes| IovaRange::new(base, bytes).expect("a mapping's range is one");
    let (base, bytes) = (Iova::new(first * PAGE_SIZE_BYTES), pages * PAGE_SIZE_BYTES);
    match ranges.last_mut() {
        Some(last) if last.last().checked_add(1) == Some(base) => {
            *last = range(last.base(), last.size_bytes() + bytes);
        }
        _ => ranges.push(range(base, bytes)),
    }
}
