//! What is unmapped and not yet quiet.
//!
//! Between clearing the entries and the end of the drain, a DMA in flight may still use the frames, a cache fill may
//! still name the address, a walk may still stand in an unhooked table. What waits for the drain is kept here, in the
//! domain; the caller holds a ticket ([`Undone`]). A caller that is cancelled loses the ticket only: the next
//! [`Domain::unmap_all`] takes over whatever is left, under a drain that began later.

use iommu_hardware::drain::{Drained, PendingDrain};
use iommu_hardware::memory::{RecordIndex, RecordState};
use iommu_types::{DomainId, Invalidation, Iova, IovaRange, PAGE_SIZE_BYTES, WalkCachePolicy};

use super::request::Tick;
use super::ring::SlotPlace;
use super::table::Unhooked;
use super::{Domain, Mode};
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
    /// Nothing was unmapped.
    pub(super) fn nothing(domain_id: DomainId) -> Self {
        Self::answered(Undone::nothing(domain_id))
    }
    /// What was unmapped needs no drain before it is answered.
    pub(super) fn answered(undone: Undone) -> Self {
        Self { undone, drain: PendingDrain::none() }
    }
    /// The same drain and release, told as what `undone` tells.
    pub(super) fn telling(mut self, undone: &Undone) -> Self {
        (self.undone.mappings, self.undone.bytes) = (undone.mappings, undone.bytes);
        self
    }
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
    /// Nothing is told and nothing released.
    pub(super) fn nothing(domain_id: DomainId) -> Self {
        Self { domain_id, place: None, mappings: 0, bytes: 0 }
    }
    /// What is told of these remains, without a place to release them from.
    pub(super) fn told(domain_id: DomainId, remains: &Remains) -> Self {
        Self { domain_id, place: None, mappings: remains.records.len() as u64, bytes: remains.bytes }
    }
    /// One mapping more is told.
    pub(super) fn add(&mut self, size_bytes: u64) {
        self.mappings += 1;
        self.bytes += size_bytes;
    }
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
    pub(super) tables: Vec<Unhooked>,
    /// Shadow buffers whose memory is given back: they are unpinned as `frames` are, and then freed.
    pub(super) shadows: Vec<FrameRun>,
    /// Slots of rings that may be used again.
    pub(super) slots: Vec<SlotPlace>,
    pub(super) bytes: u64,
}

/// Addresses that are free again after the drain.
#[derive(Clone, Copy, Debug)]
pub(super) struct FreedIova {
    pub(super) first: u64,
    pub(super) pages: u64,
    pub(super) iova: IovaUse,
}

/// Where the addresses of a mapping come from, and where they go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum IovaUse {
    /// The allocator handed them out; they go back to the free addresses of this client.
    Allocated(u8),
    /// The client chose them.
    Fixed,
    /// They are the memory's own, and nobody hands them out.
    Own,
    /// They are freed with something else: an element of a scatter-gather mapping.
    Kept,
}

impl Remains {
    /// A mapping is going: its record is freed with the rest.
    pub(super) fn take_record(&mut self, kernel: &Kernel, record: RecordIndex, size_bytes: u64) {
        kernel.records.records().set_state(record, RecordState::Revoking);
        self.records.push(record);
        self.bytes += size_bytes;
    }
    pub(super) fn is_empty(&self) -> bool {
        let Self { records, iovas, frames, tables, shadows, slots, bytes: _ } = self;
        records.is_empty()
            && iovas.is_empty()
            && frames.is_empty()
            && tables.is_empty()
            && shadows.is_empty()
            && slots.is_empty()
    }
    pub(super) fn append(&mut self, other: &mut Self) {
        self.records.append(&mut other.records);
        self.iovas.append(&mut other.iovas);
        self.frames.append(&mut other.frames);
        self.tables.append(&mut other.tables);
        self.shadows.append(&mut other.shadows);
        self.slots.append(&mut other.slots);
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
    pub(super) fn reuse(&mut self, remains: Remains) {
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
        let Revoked { first, pages, record, size_bytes, iova } = mapping;
        self.revoke_record(kernel, record, size_bytes, remains);
        self.tables.unmap(kernel.memory(), first, pages, &mut remains.frames);
        if !matches!(iova, IovaUse::Kept | IovaUse::Own) {
            remains.iovas.push(FreedIova { first, pages, iova });
        }
        note_range(&mut self.invalidated, first, pages);
    }
    /// Notes that a mapping's record is to be freed. What it opened is the caller's to close.
    pub(super) fn revoke_record(
        &mut self,
        kernel: &Kernel,
        record: RecordIndex,
        size_bytes: u64,
        remains: &mut Remains,
    ) {
        remains.take_record(kernel, record, size_bytes);
        self.counters.revoked(size_bytes);
    }
    /// Closes a page that belongs to no one mapping.
    pub(super) fn close_page(&mut self, kernel: &Kernel, page: u64, remains: &mut Remains) {
        self.tables.unmap(kernel.memory(), page, 1, &mut remains.frames);
        note_range(&mut self.invalidated, page, 1);
    }
    /// Begins what the mode does about everything revoked, and keeps what is to be released after its drain.
    pub(super) fn settle(&mut self, kernel: &Kernel, remains: Remains, now: Tick) -> PendingUnmap {
        match self.mode {
            Mode::Deferred(_) if !remains.records.is_empty() => self.defer(kernel, remains, now),
            _ => self.invalidate_now(kernel, remains),
        }
    }
    /// Begins the one invalidation of everything revoked.
    pub(super) fn invalidate_now(&mut self, kernel: &Kernel, mut remains: Remains) -> PendingUnmap {
        // An unhooked table may be cached by any walk of the domain, so then all of the domain is invalidated.
        if self.tables.unhook_empty(kernel.memory(), &mut remains.tables) {
            return self.invalidate_domain(kernel, remains);
        }
        if self.invalidated.is_empty() {
            return self.release_later(remains, PendingDrain::none());
        }
        let leaf_only = self.options.walk_cache == WalkCachePolicy::OnReclaim;
        let drain = kernel.unit().invalidate_pages(self.id, &self.invalidated, leaf_only);
        self.counters.invalidations += 1;
        self.invalidated.clear();
        self.release_later(remains, drain)
    }
    /// Begins one invalidation of the whole domain.
    pub(super) fn invalidate_domain(&mut self, kernel: &Kernel, mut remains: Remains) -> PendingUnmap {
        self.tables.unhook_empty(kernel.memory(), &mut remains.tables);
        let drain = kernel.unit().invalidate(Invalidation::IotlbDomain(self.id));
        self.counters.invalidations += 1;
        self.invalidated.clear();
        self.release_later(remains, drain)
    }
    /// Keeps what is to be released after a drain.
    pub(super) fn release_later(&mut self, remains: Remains, drain: PendingDrain) -> PendingUnmap {
        let told = Undone::told(self.id, &remains);
        if remains.is_empty() {
            self.unfinished.reuse(remains);
            return PendingUnmap { undone: told, drain };
        }
        let place = Some(self.unfinished.put(remains));
        PendingUnmap { undone: Undone { place, ..told }, drain }
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
        for FreedIova { first, pages, iova } in remains.iovas.drain(..) {
            match iova {
                IovaUse::Allocated(client) => self.iovas.free(first, pages, client),
                IovaUse::Fixed => self.iovas.free_exact(first, pages),
                IovaUse::Own | IovaUse::Kept => unreachable!("these addresses are not noted"),
            }
        }
        for frame in remains.frames.drain(..).flat_map(FrameRun::iter) {
            kernel.frames.array().unpin(frame);
        }
        for shadow in remains.shadows.drain(..) {
            kernel.frames.free(shadow, self.account.tag());
            self.account.tables.refund(shadow.frames * PAGE_SIZE_BYTES);
        }
        for slot in remains.slots.drain(..) {
            self.vacate(slot);
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
    pub(super) iova: IovaUse,
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
