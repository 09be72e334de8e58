//! Sync: who may use a mapping's memory next, the CPU or the device.
//!
//! Memory is coherent here, so for most mappings nothing has to be done; it is checked all the same, because a driver that forgets or
//! mistakes a sync fails on other machines. A bounced mapping is copied.

use iommu_types::errors::{DirectionMismatch, DmaSyncError, NotMapped, OutsideMapping, WrongFunction};
use iommu_types::{Direction, IovaRange, RequestId, SyncFor};

use super::Domain;
use super::find::{direction_of, function_of};
use super::request::{DmaFunction, Tick};
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
        let DmaSync { range, direction, target, .. } = request;
        let (iova, size_bytes) = (range.base(), range.size_bytes());
        let found = self.find_covering(kernel, iova).ok_or(NotMapped { iova })?;
        let facts = found.facts;
        if function_of(facts.kind) == Some(DmaFunction::Coherent) {
            let (made_as, asked_as) = ("coherent".to_owned(), "single".to_owned());
            return Err(WrongFunction { iova, made_as, asked_as }.into());
        }
        let skip = iova.get() - facts.iova;
        if size_bytes > facts.size_bytes - skip {
            return Err(OutsideMapping { iova, size_bytes }.into());
        }
        let mapped = direction_of(facts.permissions);
        if mapped != direction {
            return Err(DirectionMismatch { iova, mapped, asked: direction }.into());
        }
        // What only the device writes is not copied to it, and what it cannot write is not copied back.
        let copies = match target {
            SyncFor::Cpu => direction != Direction::ToDevice,
            SyncFor::Device => direction != Direction::FromDevice,
        };
        if copies {
            self.copy_shadow(kernel, found.record, &facts, skip, size_bytes, target == SyncFor::Device);
        }
        Ok(())
    }
}
