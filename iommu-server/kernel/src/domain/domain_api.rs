//! The domain API: fixed addresses, whole pages, the contract of virtio-iommu (VIRTIO 1.3 §5.13.6).
//!
//! A map that overlaps a mapping is refused whole. An unmap removes every fixed mapping inside its range, skips holes, and never
//! splits: when the range covers a part of a mapping, nothing changes. Each of the two APIs removes only what it mapped.
//!
//! Superpages are used wherever address, frame and length allow. Since mappings are removed whole, none is ever split.

use iommu_hardware::memory::MappingRecord;
use iommu_types::errors::{
    BeyondWidth, InvalidField, MapError, ModeRefuses, RangeOverlaps, ReservedRange, SplitsMapping, Unaligned,
    UnmapError,
};
use iommu_types::{
    Capabilities, Gpa, GpaRange, Iova, IovaRange, PAGE_SIZE_BYTES, PageSize, Permissions, Protection,
    RequestId,
};

use super::request::Tick;
use super::table::Extent;
use super::undone::{IovaUse, PendingUnmap, Revoked};
use super::{Domain, Mode, RangeMapping};
use crate::boot::Kernel;
use crate::frames::{FrameRun, frame_at};
use crate::iova::INTERRUPT_PAGES;
use crate::owner_memory::OwnerMemory;

/// Memory to map at an address of the caller's choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapFixed {
    /// Where the device is to find it. Whole pages.
    pub iova: IovaRange,
    /// Where the owner has it. A multiple of 4 KiB.
    pub gpa: Gpa,
    /// What the device may do.
    pub permissions: Permissions,
    /// The client's number for the request.
    pub request_id: RequestId,
}

/// A mapping as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MappingState {
    /// The device's addresses.
    pub range: IovaRange,
    /// The owner's first address.
    pub gpa: Gpa,
    /// What the device may do.
    pub permissions: Permissions,
    /// The number of the request that mapped it.
    pub request_id: RequestId,
}

impl Domain {
    /// Maps memory at a fixed address. All or nothing.
    pub fn map(
        &mut self,
        kernel: &Kernel,
        memory: &OwnerMemory,
        request: MapFixed,
        now: Tick,
    ) -> Result<(), MapError> {
        self.check_mode()?;
        let record = self.map_as(kernel, memory, request, MappingRecord::KIND_DOMAIN_API)?;
        self.tell_fixed(&record, now, true);
        Ok(())
    }
    /// Opens a buffer in a direct map.
    pub(super) fn map_direct(
        &mut self,
        kernel: &Kernel,
        memory: &OwnerMemory,
        request: MapFixed,
    ) -> Result<(), MapError> {
        self.map_as(kernel, memory, request, MappingRecord::KIND_DIRECT).map(|_| ())
    }
    /// Which modes have addresses to choose.
    fn check_mode(&self) -> Result<(), ModeRefuses> {
        let why = match self.mode {
            Mode::Strict | Mode::Deferred(_) => return Ok(()),
            Mode::Passthrough => "has all memory of its owner mapped already",
            Mode::Identity(_) => "has the memory's own addresses and none to choose; use the DMA API",
            Mode::Bounce(_) => "shows devices shadow buffers only; use the DMA API",
            Mode::Ring(_) => "has slots and no addresses to choose; use the DMA API",
        };
        Err(ModeRefuses { mode: self.protection().name().to_owned(), why: why.to_owned() })
    }
    fn map_as(
        &mut self,
        kernel: &Kernel,
        memory: &OwnerMemory,
        request: MapFixed,
        kind: u8,
    ) -> Result<MappingRecord, MapError> {
        assert!(memory.owner() == self.owner(), "a domain maps memory of its owner");
        self.check_map(&request)?;
        let first = request.iova.base().page_number();
        let pages = request.iova.size_bytes() / PAGE_SIZE_BYTES;
        let gpa = GpaRange::new(request.gpa, request.iova.size_bytes())?;
        self.plan(kernel, memory, gpa, request.iova.base())?;
        if let Some(iova) = self.overlapped(kernel, request.iova) {
            return Err(RangeOverlaps { iova }.into());
        }
        // The addresses of a direct map are the memory's own, and nobody hands them out.
        let is_chosen = kind != MappingRecord::KIND_DIRECT;
        if is_chosen && !self.iovas.take_exact(first, pages) {
            // Nothing is mapped there, so an unmap of it is not finished.
            return Err(RangeOverlaps { iova: request.iova.base() }.into());
        }
        let record = MappingRecord {
            permissions: request.permissions.bits(),
            protection: self.protection_code(),
            kind,
            domain_id: self.id.get(),
            owner: self.account.tag(),
            iova: request.iova.base().get(),
            size_bytes: request.iova.size_bytes(),
            gpa: request.gpa.get(),
            request_id: request.request_id.0,
        };
        let index = self.grant(kernel, &record).inspect_err(|_| {
            if is_chosen {
                self.iovas.free_exact(first, pages);
            }
        })?;
        self.ranges.insert(first, RangeMapping { pages, record: index, is_fixed: true });
        Ok(record)
    }
    fn check_map(&self, request: &MapFixed) -> Result<(), MapError> {
        let iova = request.iova;
        check_aligned("iova", iova.base().get())?;
        check_aligned("size_bytes", iova.size_bytes())?;
        check_aligned("gpa", request.gpa.get())?;
        if request.permissions.is_empty() {
            let why = "must allow reading, writing or both".to_owned();
            return Err(InvalidField { field: "permissions".to_owned(), why }.into());
        }
        if iova.last().get() >> self.options.width_bits != 0 {
            return Err(BeyondWidth { iova: iova.last(), width_bits: self.options.width_bits }.into());
        }
        let interrupts = Iova::new(INTERRUPT_PAGES.0 * PAGE_SIZE_BYTES);
        let after_interrupts = Iova::new(INTERRUPT_PAGES.1 * PAGE_SIZE_BYTES);
        // A direct map has page 0 where the owner has memory there.
        if iova.base() == Iova::new(0) && !self.is_passthrough() {
            return Err(ReservedRange { iova: iova.base() }.into());
        }
        if iova.base() < after_interrupts && iova.last() >= interrupts {
            return Err(ReservedRange { iova: iova.base().max(interrupts) }.into());
        }
        Ok(())
    }
    /// Works out `self.extents`: pages as large as address, frame and length allow.
    fn plan(
        &mut self,
        kernel: &Kernel,
        memory: &OwnerMemory,
        gpa: GpaRange,
        iova: Iova,
    ) -> Result<(), MapError> {
        self.extents.clear();
        let capabilities = *kernel.unit().capabilities();
        let (tables, extents) = (&self.tables, &mut self.extents);
        let mut at = iova.get();
        memory.resolve_to_map(gpa, |run| {
            let mut done = 0;
            while done < run.frames {
                let rest = FrameRun { base: frame_at(run.base, done), frames: run.frames - done };
                let is_free = |iova, size| !tables.has_table_under(iova, size);
                let extent = next_extent(&capabilities, Iova::new(at), rest, is_free);
                let frames = extent.pages * (extent.size.bytes() / PAGE_SIZE_BYTES);
                extents.push(extent);
                done += frames;
                at += frames * PAGE_SIZE_BYTES;
            }
        })?;
        Ok(())
    }
    /// The first mapping in the way of a range.
    fn overlapped(&self, kernel: &Kernel, range: IovaRange) -> Option<Iova> {
        let (first, last) = (range.base().page_number(), range.last().page_number());
        let below = self.ranges.range(..first).next_back();
        let below = below.filter(|(page, mapping)| **page + mapping.pages > first);
        let in_tree = below.or_else(|| self.ranges.range(first..=last).next());
        let in_tree = in_tree.map(|(page, mapping)| (*page, mapping.record));
        let in_slots = self.tables.slot_overlapping(first, last, |index| {
            let (_, record) = kernel.records.records().get(index);
            Iova::new(record.iova + (record.size_bytes - 1)).page_number()
        });
        let (_, index) = in_tree.into_iter().chain(in_slots).min_by_key(|(page, _)| *page)?;
        Some(Iova::new(kernel.records.records().get(index).1.iova))
    }
    /// Removes every fixed mapping inside `range`. When it covers a part of one only, nothing changes.
    pub fn unmap(
        &mut self,
        kernel: &Kernel,
        range: IovaRange,
        now: Tick,
    ) -> Result<PendingUnmap, UnmapError> {
        check_aligned("iova", range.base().get())?;
        check_aligned("size_bytes", range.size_bytes())?;
        let (first, last) = (range.base().page_number(), range.last().page_number());
        let splits = |page: u64| SplitsMapping { iova: Iova::new(page * PAGE_SIZE_BYTES) };
        // A direct map is not the client's to take away.
        let is_passthrough = self.is_passthrough();
        let below = self.ranges.range(..first).next_back();
        if let Some((page, mapping)) = below.filter(|(_, mapping)| mapping.is_fixed && !is_passthrough)
            && page + mapping.pages > first
        {
            return Err(splits(*page).into());
        }
        let inside =
            self.ranges.range(first..=last).filter(|(_, mapping)| mapping.is_fixed && !is_passthrough);
        if let Some((page, _)) = inside.clone().find(|(page, mapping)| *page + mapping.pages - 1 > last) {
            return Err(splits(*page).into());
        }
        let inside: Vec<_> = inside.map(|(page, mapping)| (*page, *mapping)).collect();
        let mut remains = self.unfinished.fresh();
        let records: Vec<_> = match self.sanitizer() {
            Some(_) => {
                inside.iter().map(|(_, mapping)| kernel.records.records().get(mapping.record).1).collect()
            }
            None => Vec::new(),
        };
        for (first, RangeMapping { pages, record, .. }) in inside {
            self.ranges.remove(&first);
            let size_bytes = pages * PAGE_SIZE_BYTES;
            let iova = IovaUse::Fixed;
            self.revoke(kernel, Revoked { first, pages, record, size_bytes, iova }, &mut remains);
        }
        // Never deferred: virtio-iommu lets a client map the same addresses again as soon as it is answered.
        let pending = self.invalidate_now(kernel, remains);
        records.iter().for_each(|record| self.tell_fixed(record, now, false));
        Ok(pending)
    }
    /// The protection as records keep it.
    pub(super) fn protection_code(&self) -> u8 {
        match self.options.protection {
            Protection::Strict => 1,
            Protection::Passthrough => 2,
            Protection::Deferred(_) => 3,
            Protection::Shared => 4,
            Protection::Persistent(_) => 5,
            Protection::Bounce(_) => 6,
            Protection::Ring(_) => 7,
        }
    }
}

/// The largest pages that fit at the start of `run`, as many as there are. `is_free` says whether a page of a size can stand
/// at an address: not where a table is (a table stays when it is empty, and a page must not replace it without a drain).
fn next_extent(
    capabilities: &Capabilities,
    iova: Iova,
    run: FrameRun,
    is_free: impl Fn(Iova, PageSize) -> bool,
) -> Extent {
    let frames_of = |size: PageSize| size.bytes() / PAGE_SIZE_BYTES;
    let exists = |size: PageSize| match size {
        PageSize::Size4K => true,
        PageSize::Size2M => capabilities.pages_2m,
        PageSize::Size1G => capabilities.pages_1g,
    };
    // The largest page that fits `done` frames further on.
    let largest = |done: u64| {
        let at = Iova::new(iova.get() + done * PAGE_SIZE_BYTES);
        let frame = frame_at(run.base, done);
        let fits = |size: &PageSize| {
            let is_aligned = at.is_aligned(size.bytes()) && frame.is_aligned(size.bytes());
            let is_long_enough = run.frames - done >= frames_of(*size);
            exists(*size) && is_aligned && is_long_enough && (*size == PageSize::Size4K || is_free(at, *size))
        };
        PageSize::ALL.into_iter().rev().find(fits)
    };
    let size = largest(0).expect("a frame is left, and frames are 4 KiB");
    let mut pages = 1;
    while pages * frames_of(size) < run.frames && largest(pages * frames_of(size)) == Some(size) {
        pages += 1;
    }
    Extent { iova, hpa: run.base, size, pages }
}

fn check_aligned(field: &str, value: u64) -> Result<(), Unaligned> {
    if value.is_multiple_of(PAGE_SIZE_BYTES) {
        return Ok(());
    }
    Err(Unaligned { field: field.to_owned(), value, alignment: PAGE_SIZE_BYTES })
}
