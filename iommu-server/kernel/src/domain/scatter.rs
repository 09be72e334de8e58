//! Scatter-gather: many buffers, as few segments as the device has to be told of.
//!
//! Where addresses are allocated, all elements lie in one block, page after page. Two that meet at a page boundary are one segment, as
//! long as the segment is no longer than the device takes and does not cross its boundary; an element that would cross the boundary begins behind
//! it. Elsewhere each element is mapped as the mode maps a buffer, and segments are merged where the addresses happen to meet.
//!
//! Every element has its record. They are unmapped together, or not at all.

use std::collections::HashMap;

use iommu_hardware::memory::RecordIndex;
use iommu_types::errors::{
    DmaMapError, DmaUnmapError, InvalidField, IovaExhausted, NotMapped, SegmentOverLimit, WrongFunction,
};
use iommu_types::{
    Direction, DmaAttributes, DmaLimits, GpaRange, Iova, IovaRange, PAGE_SIZE_BYTES, RequestId,
};

use super::find::Found;
use super::request::{DmaFunction, DmaMap, Segment, Tick};
use super::undone::{FreedIova, IovaUse, PendingUnmap, Remains};
use super::{Domain, Mode, RangeMapping};
use crate::boot::Kernel;
use crate::iova;
use crate::owner_memory::OwnerMemory;

/// Scatter-gather mappings by their first address. Where addresses are the memory's own, several may begin at one.
pub(super) type Groups = HashMap<u64, Vec<Group>>;

/// The elements of one scatter-gather mapping.
#[derive(Clone, Debug)]
pub(super) struct Group {
    elements: Vec<(Iova, RecordIndex)>,
    direction: Direction,
    /// As the caller knows them.
    segments: Vec<Segment>,
    /// First page and pages of the block that they lie in.
    block: Option<(u64, u64)>,
}

impl Group {
    pub(super) fn elements(&self) -> &[(Iova, RecordIndex)] {
        &self.elements
    }
    /// First address and size of each segment, and the direction.
    pub(super) fn as_told(&self) -> (impl Iterator<Item = (Iova, u64)>, Direction) {
        (self.segments.iter().map(|segment| (segment.iova, segment.size_bytes)), self.direction)
    }
}

/// A scatter-gather mapping to remove.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaUnmapSg {
    /// The address of its first segment.
    pub iova: Iova,
    /// How many elements were mapped (not how many segments came of them).
    pub elements: u32,
    /// As it was mapped.
    pub direction: Direction,
    /// The client's number for the request.
    pub request_id: RequestId,
    /// What is special about it.
    pub attributes: DmaAttributes,
    /// Ring domains: whether the ring is invalidated now.
    pub end_of_burst: bool,
    /// Which of the client's threads asks.
    pub client: u8,
}

/// Whether bytes at an address lie on one side of the device's boundary.
fn is_within_boundary(limits: &DmaLimits, first: u64, size_bytes: u64) -> bool {
    let boundary = !limits.segment_boundary_mask;
    first & boundary == first.wrapping_add(size_bytes - 1) & boundary
}

/// Adds an element to the segments: to the last one where it goes on, else as a new one.
fn add_segment(segments: &mut Vec<Segment>, limits: &DmaLimits, element: Segment) {
    if let Some(last) = segments.last_mut() {
        let meets = last.iova.checked_add(last.size_bytes) == Some(element.iova);
        let merged = last.size_bytes.saturating_add(element.size_bytes);
        if meets && merged <= limits.segment_bytes_max && is_within_boundary(limits, last.iova.get(), merged)
        {
            last.size_bytes = merged;
            return;
        }
    }
    segments.push(element);
}

/// Where the elements stand in a block, in pages from its beginning, and how many pages it has. The block begins at a multiple of the
/// boundary.
fn lay_out(limits: &DmaLimits, ranges: &[GpaRange]) -> Result<(Vec<u64>, u64), DmaMapError> {
    let mut at = 0u64;
    let mut places = Vec::with_capacity(ranges.len());
    for range in ranges {
        let (offset, size_bytes) = (range.base().page_offset(), range.size_bytes());
        if !is_within_boundary(limits, at * PAGE_SIZE_BYTES + offset, size_bytes) {
            let step = (limits.segment_boundary_mask / PAGE_SIZE_BYTES).saturating_add(1);
            at = at.next_multiple_of(step);
            if !is_within_boundary(limits, at * PAGE_SIZE_BYTES + offset, size_bytes) {
                let allowed_bytes = limits.segment_boundary_mask.saturating_add(1);
                return Err(SegmentOverLimit { size_bytes, allowed_bytes }.into());
            }
        }
        places.push(at);
        at = at.saturating_add(range.pages_touched());
    }
    Ok((places, at))
}

impl Domain {
    /// Maps many buffers for one DMA (Linux `dma_map_sg`). `request` says everything but the ranges. All or nothing; returns the segments.
    ///
    /// What a map had to evict or take back is in [`take_evicted`](Self::take_evicted) afterwards.
    pub fn dma_map_sg(
        &mut self,
        kernel: &Kernel,
        memory: &OwnerMemory,
        ranges: &[GpaRange],
        request: DmaMap,
        now: Tick,
    ) -> Result<Vec<Segment>, DmaMapError> {
        let outcome = self.map_sg_untold(kernel, memory, ranges, request);
        self.tell_mapped_sg(&request, ranges, &outcome, now);
        outcome
    }
    fn map_sg_untold(
        &mut self,
        kernel: &Kernel,
        memory: &OwnerMemory,
        ranges: &[GpaRange],
        request: DmaMap,
    ) -> Result<Vec<Segment>, DmaMapError> {
        assert!(memory.owner() == self.owner(), "a domain maps memory of its owner");
        if ranges.is_empty() {
            let why = "must have at least one element".to_owned();
            return Err(InvalidField { field: "elements".to_owned(), why }.into());
        }
        let request = DmaMap { function: DmaFunction::ScatterGather, ..request };
        let allowed_bytes = self.limits.segment_bytes_max;
        if let Some(range) = ranges.iter().find(|range| range.size_bytes() > allowed_bytes) {
            return Err(SegmentOverLimit { size_bytes: range.size_bytes(), allowed_bytes }.into());
        }
        // Before anything is laid out, so that what is added up is bounded by the owner's memory.
        ranges.iter().try_for_each(|range| memory.resolve_to_map(*range, |_| {}))?;
        let mut group = if matches!(self.mode, Mode::Strict | Mode::Deferred(_)) {
            self.map_block(kernel, memory, ranges, &request)?
        } else {
            self.map_elements(kernel, memory, ranges, &request)?
        };
        let mut segments = Vec::new();
        for ((iova, _), range) in group.elements.iter().zip(ranges) {
            let element = Segment { iova: *iova, size_bytes: range.size_bytes() };
            add_segment(&mut segments, &self.limits, element);
        }
        group.segments.clone_from(&segments);
        self.groups.entry(group.elements[0].0.get()).or_default().push(group);
        Ok(segments)
    }
    /// All elements in one block of addresses.
    fn map_block(
        &mut self,
        kernel: &Kernel,
        memory: &OwnerMemory,
        ranges: &[GpaRange],
        request: &DmaMap,
    ) -> Result<Group, DmaMapError> {
        let (places, pages) = lay_out(&self.limits, ranges)?;
        if !iova::is_small(pages) && self.limits.segment_boundary_mask != u64::MAX {
            // Blocks as large as that do not begin at a multiple of every boundary.
            return self.map_elements(kernel, memory, ranges, request);
        }
        let limit = self.limit_page();
        let first = self.iovas.allocate(pages, limit, request.client);
        let first = first.ok_or(IovaExhausted { size_bytes: pages.saturating_mul(PAGE_SIZE_BYTES) })?;
        let block = Some((first, pages));
        let mut group =
            Group { elements: Vec::new(), direction: request.direction, segments: Vec::new(), block };
        for (range, place) in ranges.iter().zip(&places) {
            let element = DmaMap { range: *range, ..*request };
            match self.map_element(kernel, memory, &element, first + place, pages) {
                Ok(mapped) => group.elements.push(mapped),
                Err(error) => {
                    self.take_back(kernel, group);
                    return Err(error);
                }
            }
        }
        Ok(group)
    }
    fn map_element(
        &mut self,
        kernel: &Kernel,
        memory: &OwnerMemory,
        element: &DmaMap,
        first: u64,
        block_pages: u64,
    ) -> Result<(Iova, RecordIndex), DmaMapError> {
        self.resolve(memory, element.range)?;
        self.place_extents(first);
        let iova = Iova::new(first * PAGE_SIZE_BYTES + element.range.base().page_offset());
        let record = self.record_of(element, iova);
        let index = self.grant(kernel, &record)?;
        if iova::is_small(block_pages) {
            self.tables.set_slot(first, index);
        } else {
            let pages = element.range.pages_touched();
            self.ranges.insert(first, RangeMapping { pages, record: index, is_fixed: false });
        }
        Ok((iova, index))
    }
    /// Each element by itself.
    fn map_elements(
        &mut self,
        kernel: &Kernel,
        memory: &OwnerMemory,
        ranges: &[GpaRange],
        request: &DmaMap,
    ) -> Result<Group, DmaMapError> {
        let mut group =
            Group { elements: Vec::new(), direction: request.direction, segments: Vec::new(), block: None };
        for range in ranges {
            let element = DmaMap { range: *range, ..*request };
            let mapped = self.map_one(kernel, memory, &element).and_then(|(iova, record)| {
                group.elements.push((iova, record));
                if is_within_boundary(&self.limits, iova.get(), range.size_bytes()) {
                    return Ok(());
                }
                let allowed_bytes = self.limits.segment_boundary_mask.saturating_add(1);
                Err(SegmentOverLimit { size_bytes: range.size_bytes(), allowed_bytes }.into())
            });
            if let Err(error) = mapped {
                self.take_back(kernel, group);
                return Err(error);
            }
        }
        Ok(group)
    }
    /// Removes what a map that failed had mapped; the rest of it is for the caller to settle.
    fn take_back(&mut self, kernel: &Kernel, group: Group) {
        // No device was told of it, so nothing came from one that could be copied out.
        let pending = if let Mode::Ring(_) = self.mode {
            self.take_back_slots(kernel, &group.elements)
        } else {
            let mut remains = self.unfinished.fresh();
            self.revoke_elements(kernel, &group, false, 0, &mut remains);
            self.invalidate_now(kernel, remains)
        };
        self.evicted.push(pending);
    }
    /// Unmaps all elements of a scatter-gather mapping (Linux `dma_unmap_sg`). On an error nothing changes.
    pub fn dma_unmap_sg(
        &mut self,
        kernel: &Kernel,
        request: DmaUnmapSg,
        now: Tick,
    ) -> Result<PendingUnmap, DmaUnmapError> {
        let group = self.take_group(kernel, &request).inspect_err(|error| {
            self.tell_unmapped_sg(request.iova, Err(error), request.request_id, now);
        })?;
        let (copies, client) = (!request.attributes.skip_cpu_sync, request.client);
        let pending = if let Mode::Ring(_) = self.mode {
            self.unmap_elements(kernel, &group.elements, request.end_of_burst, now)
        } else {
            let mut remains = self.unfinished.fresh();
            self.revoke_elements(kernel, &group, copies, client, &mut remains);
            self.settle(kernel, remains, now)
        };
        let gone = Ok((group.segments.as_slice(), group.direction));
        self.tell_unmapped_sg(request.iova, gone, request.request_id, now);
        Ok(pending)
    }
    fn take_group(&mut self, kernel: &Kernel, request: &DmaUnmapSg) -> Result<Group, DmaUnmapError> {
        let iova = request.iova;
        if !self.groups.contains_key(&iova.get()) {
            return Err(self.no_group_at(kernel, iova));
        }
        let groups = self.groups.get_mut(&iova.get()).expect("just seen");
        let wanted = |group: &Group| {
            group.elements.len() == request.elements as usize && group.direction == request.direction
        };
        let Some(index) = groups.iter().position(wanted) else {
            let group = groups.last().expect("no empty list is kept");
            if group.elements.len() != request.elements as usize {
                let why = format!("is {}, and the mapping has {}", request.elements, group.elements.len());
                return Err(InvalidField { field: "elements".to_owned(), why }.into());
            }
            let (mapped, asked) = (group.direction, request.direction);
            return Err(iommu_types::errors::DirectionMismatch { iova, mapped, asked }.into());
        };
        let group = groups.swap_remove(index);
        if groups.is_empty() {
            self.groups.remove(&iova.get());
        }
        Ok(group)
    }
    /// Why nothing is unmapped where no scatter-gather mapping begins: another mapping does, or an element, or nothing.
    fn no_group_at(&self, kernel: &Kernel, iova: Iova) -> DmaUnmapError {
        match self.made_whole_at(kernel, iova) {
            Some(made) => {
                let (made_as, asked_as) =
                    (made.name().to_owned(), DmaFunction::ScatterGather.name().to_owned());
                WrongFunction { iova, made_as, asked_as }.into()
            }
            None => NotMapped { iova }.into(),
        }
    }
    pub(super) fn revoke_elements(
        &mut self,
        kernel: &Kernel,
        group: &Group,
        copies: bool,
        client: u8,
        remains: &mut Remains,
    ) {
        let iova_use = if group.block.is_some() { IovaUse::Kept } else { IovaUse::Allocated(client) };
        for (iova, record) in &group.elements {
            let found: Found =
                self.found_at(kernel, *iova, *record).expect("the elements of a group are mapped");
            self.revoke_found(kernel, &found, iova_use, copies, remains);
        }
        if let Some((first, pages)) = group.block {
            remains.iovas.push(FreedIova { first, pages, iova: IovaUse::Allocated(client) });
        }
    }
    /// The elements of the scatter-gather mapping to which an element belongs, if the range lies in one of its segments.
    pub(super) fn elements_in_segment(
        &self,
        element: (Iova, RecordIndex),
        range: IovaRange,
    ) -> Option<&[(Iova, RecordIndex)]> {
        let mut groups = self.groups.values().flatten();
        let group = groups.find(|group| group.elements.contains(&element))?;
        let holds = |segment: &Segment| {
            let last = segment.iova.get() + (segment.size_bytes - 1);
            segment.iova <= range.base() && range.last().get() <= last
        };
        group.segments.iter().any(holds).then_some(&*group.elements)
    }
    /// Takes out every group of which an element is meant, by address.
    pub(super) fn take_groups_with(&mut self, is_meant: impl Fn(RecordIndex) -> bool) -> Vec<Group> {
        let is_meant = |group: &Group| group.elements.iter().any(|(_, record)| is_meant(*record));
        let mut meant = Vec::new();
        self.groups.retain(|_, groups| {
            meant.extend(groups.extract_if(.., |group| is_meant(group)));
            !groups.is_empty()
        });
        meant.sort_by_key(|group: &Group| group.elements[0].0);
        meant
    }
    /// Revokes every group whose elements lie in a block; those of the others are found by what they are made of.
    pub(super) fn revoke_groups(&mut self, kernel: &Kernel, remains: &mut Remains) {
        for group in std::mem::take(&mut self.groups).into_values().flatten() {
            if group.block.is_some() {
                self.revoke_elements(kernel, &group, false, 0, remains);
            }
        }
    }
}
