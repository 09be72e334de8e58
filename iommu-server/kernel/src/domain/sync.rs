//! Sync: who may use a mapping's memory next, the CPU or the device.
//!
//! Memory is coherent here, so for most mappings nothing has to be done; it is checked all the same, because a driver that forgets or
//! mistakes a sync fails on other machines. A bounced mapping is copied.

use iommu_hardware::memory::{MappingRecord, RecordIndex};
use iommu_types::errors::{DirectionMismatch, DmaSyncError, NotMapped, OutsideMapping, WrongFunction};
use iommu_types::{Direction, Iova, IovaRange, RequestId, SyncFor};

use super::find::{Found, direction_of, function_of};
use super::request::{DmaFunction, Tick};
use super::{Domain, Mode};
use crate::boot::Kernel;

/// A part of a mapping to sync.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaSync {
    /// Which part: anywhere in the mapping.
    pub range: IovaRange,
    /// As it was mapped.
    pub direction: Direction,
    /// Who uses it next.
    pub target: SyncFor,
    /// The client's number for the request.
    pub request_id: RequestId,
}

impl Domain {
    /// Syncs a part of a mapping (Linux `dma_sync_single_range_for_cpu`, `…_for_device`). On an error nothing changes.
    pub fn dma_sync(&mut self, kernel: &Kernel, request: DmaSync, now: Tick) -> Result<(), DmaSyncError> {
        let outcome = self.sync_untold(kernel, request);
        self.tell_synced(&request, &outcome, now);
        outcome
    }
    fn sync_untold(&mut self, kernel: &Kernel, request: DmaSync) -> Result<(), DmaSyncError> {
        let mut refused = None;
        // Several may cover the address, and any of them may be meant. What is told, when none fits, is what is wrong with the nearest.
        let found = self.covering(kernel, request.range.base()).find(|found| {
            let checked = self.check_sync(found, &request);
            let fits = checked.is_ok();
            refused = refused.take().or(checked.err());
            fits
        });
        let Some(found) = found else {
            return Err(refused.unwrap_or_else(|| NotMapped { iova: request.range.base() }.into()));
        };
        // What only the device writes is not copied to it, and what it cannot write is not copied back.
        let copies = match request.target {
            SyncFor::Cpu => request.direction != Direction::ToDevice,
            SyncFor::Device => request.direction != Direction::FromDevice,
        };
        if copies && matches!(self.mode, Mode::Bounce(_)) {
            self.sync_shadows(kernel, &found, &request);
        }
        Ok(())
    }
    /// Whether a sync names a part of this mapping. Of scatter-gather the caller knows segments, which may hold several elements.
    pub(super) fn check_sync(&self, found: &Found, request: &DmaSync) -> Result<(), DmaSyncError> {
        let DmaSync { range, direction, .. } = *request;
        let (iova, size_bytes, facts) = (range.base(), range.size_bytes(), &found.facts);
        let made = function_of(facts.kind);
        if made == Some(DmaFunction::Coherent) {
            let (made_as, asked_as) = ("coherent".to_owned(), "single".to_owned());
            return Err(WrongFunction { iova, made_as, asked_as }.into());
        }
        let is_inside = range.last() <= last_of(facts)
            || made == Some(DmaFunction::ScatterGather)
                && self.elements_in_segment(element(found), range).is_some();
        if !is_inside {
            return Err(OutsideMapping { iova, size_bytes }.into());
        }
        let mapped = direction_of(facts.permissions);
        if mapped != direction {
            return Err(DirectionMismatch { iova, mapped, asked: direction }.into());
        }
        Ok(())
    }
    /// Copies the part of each element that lies in the range.
    fn sync_shadows(&mut self, kernel: &Kernel, found: &Found, request: &DmaSync) {
        let range = request.range;
        let all = if range.last() <= last_of(&found.facts) {
            vec![element(found)]
        } else {
            let elements = self.elements_in_segment(element(found), range);
            elements.expect("the sync was checked").to_vec()
        };
        for (iova, record) in all {
            let (_, facts) = kernel.records.records().get(record);
            let (first, last) = (range.base().max(iova), range.last().min(last_of(&facts)));
            if first <= last {
                let (skip, size_bytes) = (first.get() - iova.get(), last.get() - first.get() + 1);
                let to_device = request.target == SyncFor::Device;
                self.copy_shadow(kernel, record, &facts, skip, size_bytes, to_device);
            }
        }
    }
}

/// A mapping, as scatter-gather knows its elements.
fn element(found: &Found) -> (Iova, RecordIndex) {
    (Iova::new(found.facts.iova), found.record)
}

fn last_of(facts: &MappingRecord) -> Iova {
    Iova::new(facts.iova + (facts.size_bytes - 1))
}
