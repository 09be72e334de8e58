//! From an address to the mapping that begins there, or covers it, whatever the mode.

use iommu_hardware::memory::{MappingRecord, RecordIndex};
use iommu_types::errors::{DirectionMismatch, DmaUnmapError, NotMapped, SizeMismatch, WrongFunction};
use iommu_types::{Direction, Gpa, Iova};

use super::request::{DmaFunction, DmaUnmap};
use super::{DmaSync, Domain, Mode};
use crate::boot::Kernel;

/// A mapping of the DMA API.
#[derive(Clone, Copy, Debug)]
pub(super) struct Found {
    pub(super) record: RecordIndex,
    pub(super) facts: MappingRecord,
    pub(super) place: Place,
}

/// Where it was found.
#[derive(Clone, Copy, Debug)]
pub(super) enum Place {
    /// In the slot of its first page.
    Slot,
    /// In the tree.
    Range,
    /// In the ledger.
    Ledger,
    /// In a ring.
    Ring,
}

impl Domain {
    /// The mapping that an unmap names: exactly what was mapped.
    pub(super) fn find_exact(&self, kernel: &Kernel, request: &DmaUnmap) -> Result<Found, DmaUnmapError> {
        let iova = request.range.base();
        let mut error = NotMapped { iova }.into();
        // Several may begin at one address. What is told, when none fits, is what is wrong with the last.
        for found in self.beginning_at(kernel, iova) {
            match check_exact(&found.facts, request) {
                Ok(()) => return Ok(found),
                Err(why) => error = why,
            }
        }
        Err(error)
    }
    /// Every mapping of the DMA API that begins at an address.
    fn beginning_at(&self, kernel: &Kernel, iova: Iova) -> impl Iterator<Item = Found> {
        let first = iova.page_number();
        let in_ring = match &self.mode {
            Mode::Ring(rings) => rings.live_at(iova).map(|(_, record)| (record, Place::Ring)),
            _ => None,
        };
        let in_slot = self.tables.slot(first).map(|record| (record, Place::Slot));
        let in_tree = self.ranges.get(&first).filter(|mapping| !mapping.is_fixed);
        let in_tree = in_tree.map(|mapping| (mapping.record, Place::Range));
        let in_ledger = self.ledger.at(iova).map(|record| (record, Place::Ledger));
        let all = in_ring.into_iter().chain(in_slot).chain(in_tree).chain(in_ledger);
        let with_facts =
            |(record, place)| Found { record, facts: kernel.records.records().get(record).1, place };
        all.map(with_facts).filter(move |found| found.facts.iova == iova.get())
    }
    /// By which function one of them was made that is no element of scatter-gather.
    pub(super) fn made_whole_at(&self, kernel: &Kernel, iova: Iova) -> Option<DmaFunction> {
        let mut made = self.beginning_at(kernel, iova).filter_map(|found| function_of(found.facts.kind));
        made.find(|made| *made != DmaFunction::ScatterGather)
    }
    /// The one of them with this record.
    pub(super) fn found_at(&self, kernel: &Kernel, iova: Iova, record: RecordIndex) -> Option<Found> {
        self.beginning_at(kernel, iova).find(|found| found.record == record)
    }
    /// The mappings of the DMA API that cover an address: several where addresses are the memory's own.
    pub(super) fn covering(&self, kernel: &Kernel, iova: Iova) -> impl Iterator<Item = Found> {
        let page = iova.page_number();
        let in_ring = match &self.mode {
            Mode::Ring(rings) => rings.live_covering(iova).map(|(_, record)| (record, Place::Ring)),
            _ => None,
        };
        let in_slot = self.tables.slot_up_to(page).map(|record| (record, Place::Slot));
        let below = self.ranges.range(..=page).next_back();
        let in_tree = below.filter(|(_, mapping)| !mapping.is_fixed);
        let in_tree = in_tree.map(|(_, mapping)| (mapping.record, Place::Range));
        let in_ledger = self.ledger.up_to(iova).map(|record| (record, Place::Ledger));
        let all = in_ring.into_iter().chain(in_slot).chain(in_tree).chain(in_ledger);
        let with_facts =
            |(record, place)| Found { record, facts: kernel.records.records().get(record).1, place };
        let covers = move |found: &Found| {
            let record = &found.facts;
            (record.iova..=record.iova + (record.size_bytes - 1)).contains(&iova.get())
        };
        all.map(with_facts).filter(covers)
    }
}

/// Whether an unmap names this mapping exactly. An element of scatter-gather goes with the others only, whatever the unmap says.
pub(super) fn check_exact(record: &MappingRecord, request: &DmaUnmap) -> Result<(), DmaUnmapError> {
    let iova = request.range.base();
    let made = function_of(record.kind);
    if made != Some(request.function) || made == Some(DmaFunction::ScatterGather) {
        let made_as = made.map_or("fixed", DmaFunction::name).to_owned();
        return Err(WrongFunction { iova, made_as, asked_as: request.function.name().to_owned() }.into());
    }
    let (mapped_bytes, asked_bytes) = (record.size_bytes, request.range.size_bytes());
    if mapped_bytes != asked_bytes {
        return Err(SizeMismatch { iova, mapped_bytes, asked_bytes }.into());
    }
    let mapped = direction_of(record.permissions);
    if mapped != request.direction {
        return Err(DirectionMismatch { iova, mapped, asked: request.direction }.into());
    }
    Ok(())
}

/// The function that makes mappings of a kind.
pub(super) fn function_of(kind: u8) -> Option<DmaFunction> {
    match kind {
        MappingRecord::KIND_DMA_API => Some(DmaFunction::Single),
        MappingRecord::KIND_COHERENT => Some(DmaFunction::Coherent),
        MappingRecord::KIND_SCATTER_GATHER => Some(DmaFunction::ScatterGather),
        _ => None,
    }
}

pub(super) fn kind_of(function: DmaFunction) -> u8 {
    match function {
        DmaFunction::Single => MappingRecord::KIND_DMA_API,
        DmaFunction::Coherent => MappingRecord::KIND_COHERENT,
        DmaFunction::ScatterGather => MappingRecord::KIND_SCATTER_GATHER,
    }
}

/// The direction that grants these permissions. Directions and their permissions are one to one.
pub(super) fn direction_of(permissions: u8) -> Direction {
    let all = [Direction::Bidirectional, Direction::ToDevice, Direction::FromDevice];
    let found = all.into_iter().find(|direction| direction.permissions().bits() == permissions);
    found.expect("a record of the DMA API has a direction")
}

/// What a domain has where an unmap or a sync looks, for whoever has several domains to ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Held {
    /// Nothing.
    Nothing,
    /// A mapping that covers the address, and is not what was asked for.
    Other,
    /// What was asked for.
    Exactly,
}

impl Domain {
    fn held(&self, kernel: &Kernel, iova: Iova, is_exact: impl FnOnce() -> bool) -> Held {
        match self.covering(kernel, iova).next() {
            _ if is_exact() => Held::Exactly,
            Some(_) => Held::Other,
            None => Held::Nothing,
        }
    }
    /// What is here of what an unmap names. Changes nothing and tells nobody.
    pub fn holds(&self, kernel: &Kernel, request: &DmaUnmap) -> Held {
        self.held(kernel, request.range.base(), || self.find_exact(kernel, request).is_ok())
    }
    /// Whether what an unmap names is here and shows the memory at `gpa`.
    pub fn shows(&self, kernel: &Kernel, request: &DmaUnmap, gpa: Gpa) -> bool {
        self.beginning_at(kernel, request.range.base())
            .any(|found| found.facts.gpa == gpa.get() && check_exact(&found.facts, request).is_ok())
    }
    /// What is here of a scatter-gather mapping that begins at an address.
    pub fn holds_sg(&self, kernel: &Kernel, iova: Iova) -> Held {
        let is_sg = |found: Found| function_of(found.facts.kind) == Some(DmaFunction::ScatterGather);
        self.held(kernel, iova, || self.beginning_at(kernel, iova).any(is_sg))
    }
    /// What is here of what a sync names.
    pub fn holds_part(&self, kernel: &Kernel, request: &DmaSync) -> Held {
        let iova = request.range.base();
        let fits = |found: Found| self.check_sync(&found, request).is_ok();
        self.held(kernel, iova, || self.covering(kernel, iova).any(fits))
    }
}
