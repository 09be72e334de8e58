//! Ring domains: mappings are slots of flat tables (rIOMMU: Malka, Amit, Ben-Yehuda, Tsafrir, ASPLOS'15).
//!
//! A map takes the slot at the tail of its ring and writes one entry; no address is allocated, no table is built. An unmap clears the
//! entry. The ring is invalidated at the end of a burst, once for all its unmaps; until then its IOTLB entry may hold at most two
//! slots that are unmapped. So until then a slot that was unmapped is not used again, and its frames stay pinned (I9).
//!
//! Coherent memory lies in a ring of its own, behind the others, whose slots are taken wherever they are free: it stays, and the tail of
//! a streaming ring does not run into it.
//!
//! **Never overwritten:** a slot that is mapped, or waits for its invalidation. A tail that meets one is an overflow, also when slots
//! further on are free (out-of-order unmaps leave holes).

use iommu_hardware::drain::{Drained, PendingDrain};
use iommu_hardware::memory::{PhysicalMemory, RecordIndex};
use iommu_hardware::riommu::spec::{self, Ring as RingEntry, RingIova, RingPte, SLOT_BYTES_MAX};
use iommu_types::errors::{
    DmaMapError, DmaUnmapError, InvalidField, NotContiguous, NotMapped, RingOverflow, SegmentOverLimit,
};
use iommu_types::{Gpa, Hpa, Iova, PAGE_SIZE_BYTES, Rings, SourceId};

use super::find::check_exact;
use super::flush::Waiting;
use super::request::{DmaFunction, DmaMap, DmaUnmap, Tick};
use super::table::append;
use super::undone::{PendingUnmap, Remains, Undone};
use super::{Domain, Mode, Shortage};
use crate::account::OwnerAccount;
use crate::boot::Kernel;
use crate::frames::{FrameRun, frame_at};
use crate::iova::INTERRUPT_PAGES;
use crate::owner_memory::OwnerMemory;

/// Slots of the ring for coherent memory: descriptor rings and the like, of which a device has few.
const COHERENT_SLOTS: u32 = 256;

/// Which slot of which ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SlotPlace {
    ring: u16,
    slot: u32,
}

impl SlotPlace {
    fn iova(self) -> Iova {
        RingIova { ring: self.ring, slot: self.slot, offset: 0 }.pack()
    }
}

/// What software knows of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Slot {
    Free,
    /// By which record, and from which address.
    Mapped(RecordIndex, Hpa),
    /// Unmapped, and not yet invalidated and drained.
    Leaving,
}

#[derive(Debug)]
struct Ring {
    /// Where it is described.
    entry: Hpa,
    /// The table of its slots.
    table: FrameRun,
    slots: Vec<Slot>,
    tail: u32,
    mapped: u32,
    /// What was unmapped since the end of the last burst.
    waiting: Remains,
    waiting_since: Tick,
}

/// The rings of a domain.
#[derive(Debug)]
pub(super) struct RingTables {
    /// The array of ring entries that a device's entry points to.
    array: FrameRun,
    rings: Vec<Ring>,
}

impl RingTables {
    pub(super) fn new(kernel: &Kernel, account: &OwnerAccount, rings: Rings) -> Result<Self, Shortage> {
        let sizes = std::iter::repeat_n(rings.slots, rings.count.into()).chain([COHERENT_SLOTS]);
        let array_bytes = (u64::from(rings.count) + 1) * spec::RING_BYTES;
        let array = take_run(kernel, account, array_bytes)?;
        let mut tables = Self { array, rings: Vec::new() };
        for slots in sizes {
            match take_run(kernel, account, u64::from(slots) * spec::ENTRY_BYTES) {
                Ok(table) => tables.rings.push(Ring::new(table, slots)),
                Err(shortage) => {
                    tables.destroy(kernel, account);
                    return Err(shortage);
                }
            }
        }
        for number in 0..tables.rings.len() {
            tables.rings[number].entry = tables.entry_at(number);
            tables.rings[number].publish(kernel.memory());
        }
        Ok(tables)
    }
    /// Returns every frame. Nothing may be cached any more.
    pub(super) fn destroy(&mut self, kernel: &Kernel, account: &OwnerAccount) {
        for run in self.rings.drain(..).map(|ring| ring.table).chain([self.array]) {
            kernel.frames.free_table_run(run);
            account.tables.refund(run.frames * PAGE_SIZE_BYTES);
        }
    }
    pub(super) fn table_bytes(&self) -> u64 {
        let tables: u64 = self.rings.iter().map(|ring| ring.table.frames).sum();
        (tables + self.array.frames) * PAGE_SIZE_BYTES
    }
    /// Takes over what waits for the end of bursts.
    pub(super) fn take_waiting(&mut self, remains: &mut Remains) {
        for ring in &mut self.rings {
            remains.append(&mut ring.waiting);
        }
    }
    /// Where the ring entries are, and how many.
    pub(super) fn array(&self) -> (Hpa, u16) {
        (self.array.base, self.rings.len() as u16)
    }
    pub(super) fn waiting(&self) -> Option<Waiting> {
        let waiting = self.rings.iter().filter(|ring| !ring.waiting.records.is_empty());
        let since = waiting.clone().map(|ring| ring.waiting_since).min()?;
        Some(Waiting { unmaps: waiting.map(|ring| ring.waiting.records.len() as u64).sum(), since })
    }
    /// The mapping whose slot an address names with offset 0.
    pub(super) fn live_at(&self, iova: Iova) -> Option<(SlotPlace, RecordIndex)> {
        self.live_covering(iova).filter(|_| RingIova::unpack(iova).offset == 0)
    }
    /// The mapping whose slot an address names.
    pub(super) fn live_covering(&self, iova: Iova) -> Option<(SlotPlace, RecordIndex)> {
        let RingIova { ring, slot, .. } = RingIova::unpack(iova);
        match *self.rings.get(usize::from(ring))?.slots.get(slot as usize)? {
            Slot::Mapped(record, _) => Some((SlotPlace { ring, slot }, record)),
            Slot::Free | Slot::Leaving => None,
        }
    }
    /// The mappings at an address or after it, as (page, record), by address.
    pub(super) fn live_from(&self, from: Iova) -> impl Iterator<Item = (u64, RecordIndex)> {
        self.live()
            .filter(move |(place, _)| place.iova() >= from)
            .map(|(place, record)| (place.iova().page_number(), record))
    }
    fn live(&self) -> impl Iterator<Item = (SlotPlace, RecordIndex)> {
        (0u16..).zip(&self.rings).flat_map(|(number, ring)| {
            (0u32..).zip(&ring.slots).filter_map(move |(slot, state)| match state {
                Slot::Mapped(record, _) => Some((SlotPlace { ring: number, slot }, *record)),
                Slot::Free | Slot::Leaving => None,
            })
        })
    }
    fn entry_at(&self, number: usize) -> Hpa {
        spec::ring_address(self.array.base, number as u16).expect("ring tables lie in memory")
    }
    fn pte_address(&self, place: SlotPlace) -> Hpa {
        let base = self.rings[usize::from(place.ring)].table.base;
        spec::entry_address(base, place.slot).expect("ring tables lie in memory")
    }
    /// A slot for a mapping: at the tail, or for coherent memory the first free one from there.
    fn find_slot(&self, number: u16, anywhere: bool) -> Result<u32, RingOverflow> {
        let ring = &self.rings[usize::from(number)];
        let slots = ring.slots.len() as u32;
        let tries = if anywhere { slots } else { 1 };
        let free = |slot: &u32| ring.slots[*slot as usize] == Slot::Free;
        let found = (0..tries).map(|n| (ring.tail + n) % slots).find(free);
        found.ok_or(RingOverflow { ring: number, slots })
    }
}

impl Ring {
    fn new(table: FrameRun, slots: u32) -> Self {
        Self {
            entry: Hpa::new(0),
            table,
            slots: vec![Slot::Free; slots as usize],
            tail: 0,
            mapped: 0,
            waiting: Remains::default(),
            waiting_since: Tick::default(),
        }
    }
    /// Writes its entry: where its table is and how large.
    fn publish(&self, memory: &PhysicalMemory) {
        let entry = RingEntry::with_slots_at(self.table.base, self.slots.len() as u32);
        memory.store_u128(self.entry, entry.into_bits()).expect("ring tables lie in memory");
    }
    /// Writes what is software's of its entry: tail and count.
    fn publish_use(&self, memory: &PhysicalMemory) {
        let of_entry = |offset| self.entry.checked_add(offset).expect("ring tables lie in memory");
        let write = |offset, value| memory.store_u32(of_entry(offset), value);
        write(spec::RING_TAIL_OFFSET_BYTES, self.tail).expect("ring tables lie in memory");
        write(spec::RING_MAPPED_OFFSET_BYTES, self.mapped).expect("ring tables lie in memory");
    }
}

fn take_run(kernel: &Kernel, account: &OwnerAccount, bytes: u64) -> Result<FrameRun, Shortage> {
    let frames = bytes.div_ceil(PAGE_SIZE_BYTES);
    account.tables.charge(frames * PAGE_SIZE_BYTES)?;
    let run = kernel.frames.allocate_table_run(frames);
    Ok(run.inspect_err(|_| account.tables.refund(frames * PAGE_SIZE_BYTES))?)
}

fn rings_of(mode: &mut Mode) -> &mut RingTables {
    match mode {
        Mode::Ring(rings) => rings,
        _ => unreachable!("only ring domains have rings"),
    }
}

impl Domain {
    /// Where the ring entries of a ring domain are, and how many.
    pub(crate) fn ring_array(&self) -> Option<(Hpa, u16)> {
        match &self.mode {
            Mode::Ring(rings) => Some(rings.array()),
            _ => None,
        }
    }
    /// Notes who uses the rings, so that their entries are invalidated.
    pub(crate) fn add_ring_source(&mut self, source: SourceId) {
        if !self.ring_sources.contains(&source) {
            self.ring_sources.push(source);
        }
    }
    /// A source that was [detached](Kernel::detach) is quiet, as `drained` proves, and uses the domain no more. A domain of rings waits for it
    /// until this is said: a source behind the ring unit is on no list of the VT-d unit.
    pub fn forget_source(&mut self, source: SourceId, drained: Drained) {
        let _proof = drained;
        self.ring_sources.retain(|known| *known != source);
    }
    /// Maps a buffer into a slot.
    pub(super) fn map_slot(
        &mut self,
        kernel: &Kernel,
        memory: &OwnerMemory,
        request: &DmaMap,
    ) -> Result<(Iova, RecordIndex), DmaMapError> {
        let size_bytes = request.range.size_bytes();
        if size_bytes > SLOT_BYTES_MAX.into() {
            return Err(SegmentOverLimit { size_bytes, allowed_bytes: SLOT_BYTES_MAX.into() }.into());
        }
        let is_coherent = request.function == DmaFunction::Coherent;
        let rings = rings_of(&mut self.mode);
        let coherent_ring = rings.rings.len() as u16 - 1;
        let number = if is_coherent { coherent_ring } else { request.ring };
        if number >= coherent_ring && !is_coherent {
            let why = format!("is {number}; the domain has rings 0 to {}", coherent_ring - 1);
            return Err(InvalidField { field: "ring".to_owned(), why }.into());
        }
        let slot = rings.find_slot(number, is_coherent)?;
        let place = SlotPlace { ring: number, slot };
        check_interrupts(place, size_bytes)?;
        self.resolve(memory, request.range)?;
        let frame = self.one_run(request)?;
        let address = frame.checked_add(request.range.base().page_offset()).expect("frames lie in memory");
        let record = self.record_of(request, place.iova());
        self.pin_frames(kernel)?;
        let permissions = request.direction.permissions();
        let pte = RingPte::valid(address, size_bytes as u32, permissions);
        let noted = self.note(kernel, &record, |domain| {
            let at = rings_of(&mut domain.mode).pte_address(place);
            write_pte(kernel.memory(), at, pte);
        });
        let index = noted.inspect_err(|_| self.unpin_frames(kernel))?;
        self.counters.entry_writes += 1;
        let rings = rings_of(&mut self.mode);
        let ring = &mut rings.rings[usize::from(number)];
        ring.slots[slot as usize] = Slot::Mapped(index, address);
        ring.tail = (slot + 1) % ring.slots.len() as u32;
        ring.mapped += 1;
        ring.publish_use(kernel.memory());
        Ok((place.iova(), index))
    }
    /// The first frame of `self.extents`, which must be one run.
    fn one_run(&self, request: &DmaMap) -> Result<Hpa, NotContiguous> {
        let first = self.extents.first().expect("a range touches a page").hpa;
        let mut pages = 0;
        for extent in &self.extents {
            if extent.hpa != frame_at(first, pages) {
                let gpa = request.range.base().page_base().get() + pages * PAGE_SIZE_BYTES;
                return Err(NotContiguous { gpa: Gpa::new(gpa) });
            }
            pages += extent.pages;
        }
        Ok(first)
    }
    /// Unmaps one slot. At the end of a burst its ring is invalidated.
    pub(super) fn unmap_slot(
        &mut self,
        kernel: &Kernel,
        request: &DmaUnmap,
        now: Tick,
    ) -> Result<PendingUnmap, DmaUnmapError> {
        let revoked = self.revoke_asked(kernel, request, now);
        if !request.end_of_burst {
            return revoked.map(PendingUnmap::answered);
        }
        // A burst ends where its driver says so, whatever becomes of its last unmap.
        let named = RingIova::unpack(request.range.base()).ring;
        let pending = self.end_bursts_of(kernel, &[named]);
        match revoked {
            Ok(told) => Ok(pending.telling(&told)),
            Err(error) => {
                self.evicted.push(pending);
                Err(error)
            }
        }
    }
    /// Unmaps slots. At the end of a burst the rings that were touched are invalidated, each once.
    pub(super) fn unmap_slots(
        &mut self,
        kernel: &Kernel,
        requests: &[DmaUnmap],
        now: Tick,
    ) -> (Vec<Result<(), DmaUnmapError>>, PendingUnmap) {
        let mut told = Undone::nothing(self.id);
        let mut named: Vec<u16> = Vec::new();
        let mut revoke = |request: &DmaUnmap| {
            let ring = RingIova::unpack(request.range.base()).ring;
            // Neighbours are of one ring nearly always.
            if named.last() != Some(&ring) {
                named.push(ring);
            }
            let revoked = self.revoke_asked(kernel, request, now)?;
            told.add(revoked.unmapped_bytes());
            Ok(())
        };
        let results = requests.iter().map(&mut revoke).collect();
        if !requests.last().is_some_and(|last| last.end_of_burst) {
            return (results, PendingUnmap::answered(told));
        }
        // A burst ends where its driver says so, whatever becomes of its unmaps; a ring that has nothing waiting is left alone.
        let pending = self.end_bursts_of(kernel, &named);
        (results, pending.telling(&told))
    }
    /// Unmaps the slots of a scatter-gather mapping.
    pub(super) fn unmap_elements(
        &mut self,
        kernel: &Kernel,
        elements: &[(Iova, RecordIndex)],
        end_of_burst: bool,
        now: Tick,
    ) -> PendingUnmap {
        let mut told = Undone::nothing(self.id);
        let mut touched: Vec<u16> = Vec::new();
        for (iova, record) in elements {
            let (place, _) =
                rings_of(&mut self.mode).live_at(*iova).expect("the elements of a group are mapped");
            let size_bytes = kernel.records.records().get(*record).1.size_bytes;
            self.revoke_slot(kernel, place, *record, size_bytes, now);
            told.add(size_bytes);
            if !touched.contains(&place.ring) {
                touched.push(place.ring);
            }
        }
        if !end_of_burst {
            return PendingUnmap::answered(told);
        }
        self.end_bursts_of(kernel, &touched).telling(&told)
    }
    /// Unmaps what a scatter-gather map had mapped when it failed. The tail goes back, so that the next map finds what this one found.
    pub(super) fn take_back_slots(
        &mut self,
        kernel: &Kernel,
        elements: &[(Iova, RecordIndex)],
    ) -> PendingUnmap {
        let first = elements.first().and_then(|(iova, _)| rings_of(&mut self.mode).live_at(*iova));
        let pending = self.unmap_elements(kernel, elements, true, Tick::default());
        if let Some((SlotPlace { ring, slot }, _)) = first {
            let ring = &mut rings_of(&mut self.mode).rings[usize::from(ring)];
            ring.tail = slot;
            ring.publish_use(kernel.memory());
        }
        pending
    }
    fn revoke_asked(
        &mut self,
        kernel: &Kernel,
        request: &DmaUnmap,
        now: Tick,
    ) -> Result<Undone, DmaUnmapError> {
        let iova = request.range.base();
        let (place, record) = rings_of(&mut self.mode).live_at(iova).ok_or(NotMapped { iova })?;
        check_exact(&kernel.records.records().get(record).1, request)?;
        self.revoke_slot(kernel, place, record, request.range.size_bytes(), now);
        let mut told = Undone::nothing(self.id);
        told.add(request.range.size_bytes());
        Ok(told)
    }
    /// Clears an entry; the rest waits for the end of the burst.
    fn revoke_slot(
        &mut self,
        kernel: &Kernel,
        place: SlotPlace,
        record: RecordIndex,
        size_bytes: u64,
        now: Tick,
    ) {
        let rings = rings_of(&mut self.mode);
        clear_pte(kernel.memory(), rings.pte_address(place));
        let ring = &mut rings.rings[usize::from(place.ring)];
        ring.mapped -= 1;
        let before = std::mem::replace(&mut ring.slots[place.slot as usize], Slot::Leaving);
        let Slot::Mapped(_, address) = before else { unreachable!("only a mapped slot is revoked") };
        if ring.waiting.records.is_empty() {
            ring.waiting_since = now;
        }
        self.counters.revoked(size_bytes);
        self.counters.entry_writes += 1;
        let waiting = &mut ring.waiting;
        waiting.take_record(kernel, record, size_bytes);
        append(&mut waiting.frames, frames_of(address, size_bytes));
        waiting.slots.push(place);
        ring.publish_use(kernel.memory());
    }
    /// Ends the bursts of all rings.
    pub(super) fn end_bursts(&mut self, kernel: &Kernel) -> PendingUnmap {
        let all: Vec<u16> = (0..rings_of(&mut self.mode).rings.len() as u16).collect();
        self.end_bursts_of(kernel, &all)
    }
    /// Invalidates each of these rings that has unmapped slots, and releases them after the drain.
    fn end_bursts_of(&mut self, kernel: &Kernel, numbers: &[u16]) -> PendingUnmap {
        let mut remains = self.unfinished.fresh();
        let mut drain = PendingDrain::none();
        for &number in numbers {
            let ring = rings_of(&mut self.mode).rings.get_mut(usize::from(number));
            let Some(ring) = ring.filter(|ring| !ring.waiting.records.is_empty()) else { continue };
            remains.append(&mut ring.waiting);
            for source in &self.ring_sources {
                drain = drain.and(kernel.unit().invalidate_ring(*source, number));
                self.counters.invalidations += 1;
            }
        }
        self.release_later(remains, drain)
    }
    /// Invalidates everything, and releases it after the drain.
    pub(super) fn invalidate_rings(&mut self, kernel: &Kernel, remains: Remains) -> PendingUnmap {
        let mut drain = PendingDrain::none();
        for source in &self.ring_sources {
            drain = drain.and(kernel.unit().invalidate_ring_device(*source));
            self.counters.invalidations += 1;
        }
        self.release_later(remains, drain)
    }
    /// Revokes every slot, and takes over what waits.
    pub(super) fn revoke_slots(&mut self, kernel: &Kernel, remains: &mut Remains) {
        let live: Vec<_> = rings_of(&mut self.mode).live().collect();
        for (place, record) in live {
            let size_bytes = kernel.records.records().get(record).1.size_bytes;
            self.revoke_slot(kernel, place, record, size_bytes, Tick::default());
        }
        rings_of(&mut self.mode).take_waiting(remains);
    }
    /// A slot may be used again.
    pub(super) fn vacate(&mut self, place: SlotPlace) {
        let rings = rings_of(&mut self.mode);
        let slot = &mut rings.rings[usize::from(place.ring)].slots[place.slot as usize];
        assert!(*slot == Slot::Leaving, "a slot is vacated once");
        *slot = Slot::Free;
    }
}

/// No address of a slot may mean an interrupt: FEEx_xxxx lies in slot 3 of ring 0, near its end.
fn check_interrupts(place: SlotPlace, size_bytes: u64) -> Result<(), SegmentOverLimit> {
    let first = place.iova().get();
    let interrupts = INTERRUPT_PAGES.0 * PAGE_SIZE_BYTES;
    let room = interrupts.saturating_sub(first);
    if first < interrupts && size_bytes > room {
        return Err(SegmentOverLimit { size_bytes, allowed_bytes: room });
    }
    Ok(())
}

/// The frames behind a slot.
fn frames_of(address: Hpa, size_bytes: u64) -> FrameRun {
    let pages = (address.page_offset() + size_bytes).div_ceil(PAGE_SIZE_BYTES);
    FrameRun { base: address.page_base(), frames: pages }
}

/// Writes an entry of a slot that is not valid: where it leads first, and that it is valid last.
fn write_pte(memory: &PhysicalMemory, at: Hpa, pte: RingPte) {
    let bits = pte.into_bits();
    memory.store_u64(at, bits as u64).expect("ring tables lie in memory");
    memory.store_u64(high_word(at), (bits >> 64) as u64).expect("ring tables lie in memory");
}

/// Makes an entry invalid. Where it led stays until the slot is used again.
fn clear_pte(memory: &PhysicalMemory, at: Hpa) {
    memory.store_u64(high_word(at), 0).expect("ring tables lie in memory");
}

fn high_word(at: Hpa) -> Hpa {
    at.checked_add(8).expect("ring tables lie in memory")
}
