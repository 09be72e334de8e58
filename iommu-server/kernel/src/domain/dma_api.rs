//! The DMA API as Linux defines it: any offset and size; the server allocates the address and returns it; unmap is
//! exact.
//!
//! What is checked and found is the same in every mode; what a mapping opens, and when its memory is free again, is the mode's.

use iommu_hardware::memory::{MappingRecord, RecordIndex};
use iommu_types::errors::{
    BeyondMask, DmaMapError, DmaUnmapError, InvalidField, IovaExhausted, SegmentOverLimit,
};
use iommu_types::{GpaRange, Iova, PAGE_SIZE_BYTES, PageSize};

use super::find::{Found, Place, kind_of};
use super::request::{DmaFunction, DmaMap, DmaUnmap, Tick};
use super::table::Extent;
use super::undone::{IovaUse, PendingUnmap, Remains, Revoked};
use super::{Domain, Mode, RangeMapping};
use crate::boot::Kernel;
use crate::iova;
use crate::owner_memory::OwnerMemory;

impl Domain {
    /// Maps a buffer and returns the address that the device is to use; but for rings, it keeps the offset in the page. All or nothing.
    ///
    /// What a map had to evict is in [`take_evicted`](Self::take_evicted) afterwards.
    pub fn dma_map(
        &mut self,
        kernel: &Kernel,
        memory: &OwnerMemory,
        request: DmaMap,
        now: Tick,
    ) -> Result<Iova, DmaMapError> {
        assert!(memory.owner() == self.owner(), "a domain maps memory of its owner");
        let outcome = check_function(&request).and_then(|()| self.map_one(kernel, memory, &request));
        let outcome = outcome.map(|(iova, _)| iova);
        self.tell_mapped(&request, &outcome, now);
        outcome
    }
    /// Maps one buffer as the mode does. Returns its address and its record: several mappings may begin at one address.
    pub(super) fn map_one(
        &mut self,
        kernel: &Kernel,
        memory: &OwnerMemory,
        request: &DmaMap,
    ) -> Result<(Iova, RecordIndex), DmaMapError> {
        let (size_bytes, allowed_bytes) = (request.range.size_bytes(), self.limits.segment_bytes_max);
        // What is allocated for the device is no segment of a transfer.
        if size_bytes > allowed_bytes && request.function != DmaFunction::Coherent {
            return Err(SegmentOverLimit { size_bytes, allowed_bytes }.into());
        }
        // Memory of another device is not copied, and coherent memory cannot be.
        let is_direct = request.attributes.resource || request.function == DmaFunction::Coherent;
        match self.mode {
            Mode::Strict | Mode::Deferred(_) => self.map_allocated(kernel, memory, request),
            Mode::Bounce(_) if is_direct => self.map_allocated(kernel, memory, request),
            Mode::Bounce(_) => self.map_bounced(kernel, memory, request),
            Mode::Passthrough | Mode::Identity(_) => self.map_identity(kernel, memory, request),
            Mode::Ring(_) => self.map_slot(kernel, memory, request),
        }
    }
    /// Maps at an allocated address.
    fn map_allocated(
        &mut self,
        kernel: &Kernel,
        memory: &OwnerMemory,
        request: &DmaMap,
    ) -> Result<(Iova, RecordIndex), DmaMapError> {
        let pages = request.range.pages_touched();
        self.resolve(memory, request.range)?;
        let limit = self.limit_page();
        let first = self.iovas.allocate(pages, limit, request.client);
        let first = first.ok_or(IovaExhausted { size_bytes: request.range.size_bytes() })?;
        self.place_extents(first);
        let iova = Iova::new(first * PAGE_SIZE_BYTES + request.range.base().page_offset());
        let record = self.record_of(request, iova);
        let granted = self.grant(kernel, &record);
        let index = granted.inspect_err(|_| self.iovas.free(first, pages, request.client))?;
        if iova::is_small(pages) {
            self.tables.set_slot(first, index);
        } else {
            self.ranges.insert(first, RangeMapping { pages, record: index, is_fixed: false });
        }
        Ok((iova, index))
    }
    /// Puts the frames behind a range into `self.extents`, without addresses.
    pub(super) fn resolve(&mut self, memory: &OwnerMemory, range: GpaRange) -> Result<(), DmaMapError> {
        let extents = &mut self.extents;
        extents.clear();
        memory.resolve_to_map(range, |run| {
            let (iova, size) = (Iova::new(0), PageSize::Size4K);
            extents.push(Extent { iova, hpa: run.base, size, pages: run.frames });
        })?;
        Ok(())
    }
    /// Gives `self.extents` addresses from a page on.
    pub(super) fn place_extents(&mut self, first: u64) {
        let mut at = first;
        for extent in &mut self.extents {
            extent.iova = Iova::new(at * PAGE_SIZE_BYTES);
            at += extent.pages;
        }
    }
    /// The last page that the device can address.
    pub(super) fn limit_page(&self) -> u64 {
        self.limits.last_address() / PAGE_SIZE_BYTES
    }
    /// Whether the device can address all of a mapping at addresses that are not chosen for it.
    pub(super) fn check_mask(&self, last: u64) -> Result<(), BeyondMask> {
        let mask_bits = self.limits.mask_bits;
        if last <= self.limits.last_address() {
            Ok(())
        } else {
            Err(BeyondMask { iova: Iova::new(last), mask_bits })
        }
    }
    /// The record of a mapping.
    pub(super) fn record_of(&self, request: &DmaMap, iova: Iova) -> MappingRecord {
        MappingRecord {
            permissions: request.direction.permissions().bits(),
            protection: self.protection_code(),
            kind: kind_of(request.function),
            domain_id: self.id.get(),
            owner: self.account.tag(),
            iova: iova.get(),
            size_bytes: request.range.size_bytes(),
            gpa: request.range.base().get(),
            request_id: request.request_id.0,
        }
    }
    /// Unmaps one buffer. On an error nothing changes.
    pub fn dma_unmap(
        &mut self,
        kernel: &Kernel,
        request: DmaUnmap,
        now: Tick,
    ) -> Result<PendingUnmap, DmaUnmapError> {
        let outcome = self.unmap_one(kernel, &request, now);
        if self.sanitizer.is_some() {
            self.tell_unmapped(&request, outcome.as_ref().map(|_| ()), now);
        }
        outcome
    }
    fn unmap_one(
        &mut self,
        kernel: &Kernel,
        request: &DmaUnmap,
        now: Tick,
    ) -> Result<PendingUnmap, DmaUnmapError> {
        if let Mode::Ring(_) = self.mode {
            return self.unmap_slot(kernel, request, now);
        }
        let mut remains = self.unfinished.fresh();
        if let Err(error) = self.revoke_dma(kernel, request, &mut remains) {
            self.unfinished.reuse(remains);
            return Err(error);
        }
        Ok(self.settle_for(kernel, remains, request.function == DmaFunction::Coherent, now))
    }
    /// Unmaps many buffers with one invalidation and one drain. Results are per operation, in order; one that fails
    /// changes nothing and stops none of the others.
    pub fn dma_unmap_batch(
        &mut self,
        kernel: &Kernel,
        requests: &[DmaUnmap],
        now: Tick,
    ) -> (Vec<Result<(), DmaUnmapError>>, PendingUnmap) {
        let (results, pending) = self.unmap_untold(kernel, requests, now);
        if self.sanitizer.is_some() {
            std::iter::zip(requests, &results).for_each(|(request, result)| {
                self.tell_unmapped(request, result.as_ref().copied(), now);
            });
        }
        (results, pending)
    }
    fn unmap_untold(
        &mut self,
        kernel: &Kernel,
        requests: &[DmaUnmap],
        now: Tick,
    ) -> (Vec<Result<(), DmaUnmapError>>, PendingUnmap) {
        if let Mode::Ring(_) = self.mode {
            return self.unmap_slots(kernel, requests, now);
        }
        let mut remains = self.unfinished.fresh();
        let revoke = |request: &DmaUnmap| self.revoke_dma(kernel, request, &mut remains);
        let results = requests.iter().map(revoke).collect();
        let is_coherent = requests.iter().any(|request| request.function == DmaFunction::Coherent);
        (results, self.settle_for(kernel, remains, is_coherent, now))
    }
    /// Settles what was revoked. Coherent memory is freed right after its unmap, so its invalidation is not deferred.
    fn settle_for(
        &mut self,
        kernel: &Kernel,
        remains: Remains,
        is_coherent: bool,
        now: Tick,
    ) -> PendingUnmap {
        if is_coherent { self.invalidate_now(kernel, remains) } else { self.settle(kernel, remains, now) }
    }
    fn revoke_dma(
        &mut self,
        kernel: &Kernel,
        request: &DmaUnmap,
        remains: &mut Remains,
    ) -> Result<(), DmaUnmapError> {
        let found = self.find_exact(kernel, request)?;
        let iova = IovaUse::Allocated(request.client);
        self.revoke_found(kernel, &found, iova, !request.attributes.skip_cpu_sync, remains);
        Ok(())
    }
    /// Revokes one mapping, wherever it was found. `copies` says whether a bounced one is copied back.
    pub(super) fn revoke_found(
        &mut self,
        kernel: &Kernel,
        found: &Found,
        iova: IovaUse,
        copies: bool,
        remains: &mut Remains,
    ) {
        let Found { record, facts, place } = *found;
        let base = Iova::new(facts.iova);
        let first = base.page_number();
        match place {
            Place::Slot => self.tables.clear_slot(first),
            Place::Range => {
                self.ranges.remove(&first);
            }
            Place::Ledger => {
                self.ledger.remove(base, record);
                return self.revoke_noted(kernel, found, copies, remains);
            }
            Place::Ring => unreachable!("slots are unmapped by themselves"),
        }
        let pages = pages_of(&facts);
        let size_bytes = facts.size_bytes;
        self.revoke(kernel, Revoked { first, pages, record, size_bytes, iova }, remains);
    }
    /// Revokes a mapping that opened nothing of its own.
    fn revoke_noted(&mut self, kernel: &Kernel, found: &Found, copies: bool, remains: &mut Remains) {
        self.revoke_record(kernel, found.record, found.facts.size_bytes, remains);
        match self.mode {
            Mode::Identity(_) => self.leave_pages(kernel, &found.facts, remains),
            Mode::Bounce(_) => self.return_shadow(kernel, found, copies),
            _ => {}
        }
    }
}

/// Elements of scatter-gather are unmapped together, so they are mapped together.
fn check_function(request: &DmaMap) -> Result<(), DmaMapError> {
    if request.function != DmaFunction::ScatterGather {
        return Ok(());
    }
    let why = "is scatter-gather, which is mapped as a whole".to_owned();
    Err(InvalidField { field: "function".to_owned(), why }.into())
}

/// The 4 KiB pages that a mapping touches.
pub(super) fn pages_of(record: &MappingRecord) -> u64 {
    let last = record.iova + (record.size_bytes - 1);
    last / PAGE_SIZE_BYTES - record.iova / PAGE_SIZE_BYTES + 1
}
