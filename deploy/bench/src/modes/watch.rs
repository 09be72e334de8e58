//! What a watched replay checks at every step: the promises of the mode, from outside.
//!
//! - Until an unmap is invalidated, none of its pages is handed out again, and each of its frames has exactly the pins of the mappings that
//!   are live or wait (I9).
//! - Between an unmap and the end of the burst at most two unmapped slots of a ring can be served; after it none.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use iommu_hardware::memory::FrameArray;
use iommu_hardware::riommu::RingIova;
use iommu_hardware::vtd::Request;
use iommu_types::{Access, AddressType, Direction, Hpa, Iova, PAGE_SIZE_BYTES, Protection};

use super::stage::{Buffer, HostStage};

/// The state of the checks.
pub(crate) struct Watch {
    frames: FrameArray,
    /// Pages that are unmapped and not yet invalidated.
    waiting_pages: BTreeSet<u64>,
    /// Frames of those.
    waiting_frames: Vec<Hpa>,
    /// Pins by frame, as they must be.
    pins: BTreeMap<Hpa, u32>,
    /// Frames of the buffer that is about to be unmapped.
    leaving: Vec<Hpa>,
    /// Slots that were unmapped in the burst at hand, by ring.
    leaving_slots: BTreeSet<(u16, u32)>,
    /// The most stale slots of one ring that were cached at once within a burst.
    pub(crate) stale_max: usize,
    /// The most after the end of one.
    pub(crate) stale_after_burst_max: usize,
    /// The most unmaps that waited.
    pub(crate) waiting_max: usize,
    /// Unmaps seen.
    pub(crate) unmaps: u64,
}

impl Watch {
    /// Before anything is mapped.
    pub(crate) fn of(stage: &HostStage) -> Self {
        Self {
            // The kernel floor puts it at the beginning of memory.
            frames: FrameArray::new(Arc::clone(stage.host.kernel.memory()), Hpa::new(0)),
            waiting_pages: BTreeSet::new(),
            waiting_frames: Vec::new(),
            pins: BTreeMap::new(),
            leaving: Vec::new(),
            leaving_slots: BTreeSet::new(),
            stale_max: 0,
            stale_after_burst_max: 0,
            waiting_max: 0,
            unmaps: 0,
        }
    }
    /// A buffer was mapped.
    pub(crate) fn after_map(&mut self, stage: &mut HostStage, buffer: &Buffer) {
        if is_ring(stage) {
            return;
        }
        for page in pages(buffer) {
            assert!(
                !self.waiting_pages.contains(&page),
                "I9: page {page:#x} was handed out before its flush"
            );
        }
        for frame in frames(stage, buffer) {
            *self.pins.entry(frame).or_default() += 1;
        }
    }
    /// A buffer will be unmapped.
    pub(crate) fn before_unmap(&mut self, stage: &mut HostStage, buffer: &Buffer) {
        if !is_ring(stage) {
            self.leaving = frames(stage, buffer);
        }
    }
    /// It was unmapped, and that was answered.
    pub(crate) fn after_unmap(&mut self, stage: &mut HostStage, buffer: &Buffer, end_of_burst: bool) {
        self.unmaps += 1;
        if is_ring(stage) {
            return self.after_ring_unmap(stage, buffer, end_of_burst);
        }
        self.waiting_pages.extend(pages(buffer));
        let leaving = std::mem::take(&mut self.leaving);
        self.waiting_frames.extend(&leaving);
        let waiting = stage.domain.waiting().map_or(0, |waiting| waiting.unmaps as usize);
        self.waiting_max = self.waiting_max.max(waiting);
        self.time_passed(stage);
        leaving.iter().for_each(|frame| self.check_pins(*frame));
    }
    /// A timer may have flushed.
    pub(crate) fn time_passed(&mut self, stage: &mut HostStage) {
        if is_ring(stage) || stage.domain.waiting().is_some() {
            return;
        }
        self.waiting_pages.clear();
        let released = std::mem::take(&mut self.waiting_frames);
        for frame in &released {
            *self.pins.get_mut(frame).expect("it was pinned by a map") -= 1;
        }
        released.iter().for_each(|frame| self.check_pins(*frame));
    }
    /// Each mapping that is live or waits has one pin on each of its frames.
    fn check_pins(&self, frame: Hpa) {
        let pins = self.frames.state(frame).map(|state| state.pins);
        assert_eq!(pins, Some(self.pins[&frame]), "I9: pins of the frame at {frame}");
    }
    fn after_ring_unmap(&mut self, stage: &HostStage, buffer: &Buffer, end_of_burst: bool) {
        let RingIova { ring, slot, .. } = RingIova::unpack(buffer.iova);
        self.leaving_slots.insert((ring, slot));
        let mut stale = 0;
        for entry in stage.host.kernel.unit().ring_entries(stage.source) {
            let cached = [Some(entry.current), entry.next].into_iter().flatten();
            let stale_here = cached.filter(|cached| self.leaving_slots.contains(&(entry.ring, cached.slot)));
            stale = stale.max(stale_here.count());
        }
        if end_of_burst {
            self.stale_after_burst_max = self.stale_after_burst_max.max(stale);
            self.leaving_slots.retain(|(known, _)| *known != ring);
        } else {
            self.stale_max = self.stale_max.max(stale);
        }
    }
}

fn is_ring(stage: &HostStage) -> bool {
    matches!(stage.domain.protection(), Protection::Ring(_))
}

fn pages(buffer: &Buffer) -> std::ops::RangeInclusive<u64> {
    let range = buffer.range();
    range.base().page_number()..=range.last().page_number()
}

/// The frames behind a mapped buffer, as its device reaches them.
fn frames(stage: &mut HostStage, buffer: &Buffer) -> Vec<Hpa> {
    let access = if buffer.direction == Direction::ToDevice { Access::Read } else { Access::Write };
    let mut frames = Vec::new();
    for page in pages(buffer) {
        let iova = Iova::new(page * PAGE_SIZE_BYTES);
        let address_type = AddressType::Untranslated;
        let request = Request { iova, size_bytes: 1, access, pasid: None, address_type };
        let lent = stage.port.burst().translate(request, |lent| lent.hpa);
        frames.push(lent.expect("the buffer is mapped"));
    }
    frames
}
