//! The DMA API as Linux defines it: any offset and size; the server allocates the address and returns it; unmap is
//! exact.

use iommu_hardware::memory::{MappingRecord, RecordIndex};
use iommu_types::errors::{
    DirectionMismatch, DmaMapError, DmaUnmapError, IovaExhausted, NotMapped, SizeMismatch,
};
use iommu_types::{Direction, GpaRange, Iova, IovaRange, PAGE_SIZE_BYTES, PageSize, RequestId};

use super::table::Extent;
use super::undone::{PendingUnmap, Remains, Revoked};
use super::{Domain, RangeMapping};
use crate::boot::Kernel;
use crate::iova;
use crate::owner_memory::OwnerMemory;

/// A buffer to map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaMap {
    /// The buffer, at any offset.
    pub range: GpaRange,
    /// Which way data flows.
    pub direction: Direction,
    /// The client's number for the request.
    pub request_id: RequestId,
    /// Whether the buffer is shared with the device for long (`dma_alloc_coherent`).
    pub coherent: bool,
}

/// A mapping to remove: exactly what was mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaUnmap {
    /// As `dma_map` returned it, with the size that was mapped.
    pub range: IovaRange,
    /// As it was mapped.
    pub direction: Direction,
}

impl Domain {
    /// Maps a buffer and returns the address that the device is to use; it keeps the offset in the page. All or nothing.
    pub fn dma_map(
        &mut self,
        kernel: &Kernel,
        memory: &OwnerMemory,
        request: DmaMap,
    ) -> Result<Iova, DmaMapError> {
        assert!(memory.owner() == self.owner(), "a domain maps memory of its owner");
        let size_bytes = request.range.size_bytes();
        let pages = request.range.pages_touched();
        self.extents.clear();
        memory.resolve(request.range, |run| {
            self.extents.push(Extent {
                iova: Iova::new(0),
                hpa: run.base,
                size: PageSize::Size4K,
                pages: run.frames,
            });
        })?;
        let first = self.iovas.allocate(pages, u64::MAX, 0).ok_or(IovaExhausted { size_bytes })?;
        let mut at = first;
        for extent in &mut self.extents {
            extent.iova = Iova::new(at * PAGE_SIZE_BYTES);
            at += extent.pages;
        }
        let iova = Iova::new(first * PAGE_SIZE_BYTES + request.range.base().page_offset());
        let record = MappingRecord {
            permissions: request.direction.permissions().bits(),
            protection: self.protection_code(),
            kind: kind_of(&request),
            domain_id: self.id.get(),
            owner: self.account.tag(),
            iova: iova.get(),
            size_bytes,
            gpa: request.range.base().get(),
            request_id: request.request_id.0,
        };
        let index = self.grant(kernel, &record).inspect_err(|_| self.iovas.free(first, pages, 0))?;
        if iova::is_small(pages) {
            self.tables.set_slot(first, index);
        } else {
            self.ranges.insert(first, RangeMapping { pages, record: index, is_fixed: false });
        }
        Ok(iova)
    }
    /// Unmaps one buffer. On an error nothing changes.
    pub fn dma_unmap(&mut self, kernel: &Kernel, request: DmaUnmap) -> Result<PendingUnmap, DmaUnmapError> {
        let mut remains = self.unfinished.fresh();
        let result = self.revoke_dma(kernel, request, &mut remains);
        let pending = self.settle(kernel, remains);
        result.map(|()| pending)
    }
    /// Unmaps many buffers with one invalidation and one drain. Results are per operation, in order; one that fails
    /// changes nothing and stops none of the others.
    pub fn dma_unmap_batch(
        &mut self,
        kernel: &Kernel,
        requests: &[DmaUnmap],
    ) -> (Vec<Result<(), DmaUnmapError>>, PendingUnmap) {
        let mut remains = self.unfinished.fresh();
        let revoke = |request: &DmaUnmap| self.revoke_dma(kernel, *request, &mut remains);
        let results = requests.iter().map(revoke).collect();
        (results, self.settle(kernel, remains))
    }
    fn revoke_dma(
        &mut self,
        kernel: &Kernel,
        request: DmaUnmap,
        remains: &mut Remains,
    ) -> Result<(), DmaUnmapError> {
        let iova = request.range.base();
        let first = iova.page_number();
        let (record_index, is_small) = self.dma_mapping_at(first).ok_or(NotMapped { iova })?;
        let (_, record) = kernel.records.records().get(record_index);
        if record.iova != iova.get() {
            return Err(NotMapped { iova }.into());
        }
        let (mapped_bytes, asked_bytes) = (record.size_bytes, request.range.size_bytes());
        if mapped_bytes != asked_bytes {
            return Err(SizeMismatch { iova, mapped_bytes, asked_bytes }.into());
        }
        let mapped = direction_of(record.permissions);
        if mapped != request.direction {
            return Err(DirectionMismatch { iova, mapped, asked: request.direction }.into());
        }
        if is_small {
            self.tables.clear_slot(first);
        } else {
            self.ranges.remove(&first);
        }
        let pages = request.range.pages_touched();
        let revoked =
            Revoked { first, pages, record: record_index, size_bytes: mapped_bytes, is_fixed: false };
        self.revoke(kernel, revoked, remains);
        Ok(())
    }
    /// The DMA-API mapping that begins at a page, and whether it has a slot.
    fn dma_mapping_at(&self, first: u64) -> Option<(RecordIndex, bool)> {
        if let Some(record) = self.tables.slot(first) {
            return Some((record, true));
        }
        let mapping = self.ranges.get(&first).filter(|mapping| !mapping.is_fixed)?;
        Some((mapping.record, false))
    }
}

fn kind_of(request: &DmaMap) -> u8 {
    if request.coherent { MappingRecord::KIND_COHERENT } else { MappingRecord::KIND_DMA_API }
}

/// The direction that grants these permissions. Directions and their permissions are one to one.
fn direction_of(permissions: u8) -> Direction {
    let all = [Direction::Bidirectional, Direction::ToDevice, Direction::FromDevice];
    let found = all.into_iter().find(|direction| direction.permissions().bits() == permissions);
    found.expect("a record of the DMA API has a direction")
}
