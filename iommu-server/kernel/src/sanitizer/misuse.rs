//! Misuse of the DMA API by the driver: the classes of Linux's dma-debug that exist here.
//!
//! Most is refused by the kernel floor already; the sanitizer adds what the mapping was, and keeps the evidence. The driver is to blame,
//! whatever the violation.

use iommu_types::errors::{DmaMapError, DmaSyncError, DmaUnmapError};
use iommu_types::{Direction, GpaRange, Iova, IovaRange, ReportClass, RequestId, SyncFor, Violation};

use super::mapping::{Mapping, MappingKind};
use super::{DriverCall, Sanitizer};

impl Sanitizer {
    /// A map of the DMA API was refused, and the driver got the error value.
    pub fn refused_map(&mut self, call: DriverCall, error: &DmaMapError) {
        self.failed_map = Some(call.request_id);
        if matches!(error, DmaMapError::SegmentOverLimit(_)) {
            self.report_call(call, ReportClass::SegmentOverLimit, None, None);
        }
    }
    /// A map that was refused is tried again, and the driver will not hear of this refusal.
    pub fn retried_map(&mut self, request_id: RequestId) {
        self.failed_map.take_if(|failed| *failed == request_id);
    }
    /// An unmap of the DMA API was refused. What was asked wrongly (an unknown device, an empty range) is no matter of mappings and not reported.
    pub fn refused_unmap(&mut self, call: DriverCall, iova: Iova, error: &DmaUnmapError) {
        let here = self.mapping_at(iova);
        let (class, mapping) = match error {
            // It was taken from the driver, who does as it should.
            DmaUnmapError::NotMapped(_) if self.dead.forgive_at(iova.get()) => return,
            DmaUnmapError::NotMapped(_) => match self.dead.at_base(iova.get()).copied() {
                Some(dead) => (ReportClass::DoubleUnmap, Some(dead)),
                // An address inside a mapping, or in no mapping at all.
                None => (ReportClass::FreeOfUnmapped, here),
            },
            DmaUnmapError::SizeMismatch(_) => (ReportClass::SizeMismatch, here),
            DmaUnmapError::DirectionMismatch(_) => (ReportClass::DirectionMismatch, here),
            DmaUnmapError::WrongFunction(_) => (ReportClass::WrongFree, here),
            DmaUnmapError::InvalidRange(_)
            | DmaUnmapError::InvalidField(_)
            | DmaUnmapError::UnknownDevice(_)
            | DmaUnmapError::NotYours(_)
            | DmaUnmapError::NotAttached(_) => return,
        };
        self.report_call(call, class, None, mapping);
    }
    /// A sync succeeded. It is misuse all the same when data cannot flow so: for the CPU what only the device reads, for the device what
    /// only the device writes.
    pub fn synced(&mut self, call: DriverCall, range: IovaRange, synced_for: SyncFor) {
        let (first, last) = (range.base().get(), range.last().get());
        let against = |mapping: &Mapping| {
            matches!(
                (synced_for, mapping.life.direction),
                (SyncFor::Cpu, Direction::ToDevice) | (SyncFor::Device, Direction::FromDevice)
            )
        };
        // Where several cover the range, the driver may have meant any.
        let mut newest: Option<Mapping> = None;
        for mapping in self.live.touching(first, first).filter(|mapping| mapping.contains(last)) {
            if !against(mapping) {
                return;
            }
            newest = newest.filter(|known| known.number > mapping.number).or(Some(*mapping));
        }
        if newest.is_some() {
            self.report_call(call, ReportClass::SyncDirection, None, newest);
        }
    }
    /// A sync was refused.
    pub fn refused_sync(&mut self, call: DriverCall, iova: Iova, error: &DmaSyncError) {
        let here = self.mapping_at(iova);
        let (class, mapping) = match error {
            // To dma-debug, a mapping of another function is not there.
            DmaSyncError::NotMapped(_) | DmaSyncError::WrongFunction(_) => {
                let dead = self.dead.covering(iova.get()).max_by_key(|m| (m.died, m.number)).copied();
                if here.is_none() && dead.is_some_and(|dead| dead.is_revoked()) {
                    return;
                }
                (ReportClass::SyncOfUnmapped, here.or(dead))
            }
            DmaSyncError::OutsideMapping(_) => (ReportClass::SyncOutside, here),
            DmaSyncError::DirectionMismatch(_) => (ReportClass::SyncDirection, here),
            DmaSyncError::InvalidRange(_)
            | DmaSyncError::InvalidField(_)
            | DmaSyncError::UnknownDevice(_)
            | DmaSyncError::NotYours(_)
            | DmaSyncError::NotAttached(_) => return,
        };
        self.report_call(call, class, None, mapping);
    }
    fn mapping_at(&self, iova: Iova) -> Option<Mapping> {
        self.live.at_base(iova.get()).or_else(|| self.live.covering(iova.get())).copied()
    }
    /// Memory was to be freed (and was not, as it is pinned). Reports if this domain maps some of it, and says whether.
    pub fn released_while_mapped(&mut self, call: DriverCall, memory: GpaRange) -> bool {
        let (first, last) = (memory.base().get(), memory.last().get());
        let newest = self.live.of_memory(first, last).max_by_key(|mapping| mapping.number).copied();
        if newest.is_some() {
            self.report_call(call, ReportClass::ReleasedWhileMapped, Some(Violation::InvalidUse), newest);
        }
        newest.is_some()
    }
    /// The device or the driver lets go, and what is mapped now was leaked: a report for each mapping, oldest first, up to a bound; the last
    /// one counts the rest. Mappings live on until they are unmapped. Those at fixed addresses go with their domain and are no leak.
    pub fn leaked(&mut self, call: DriverCall) {
        let is_lasting = |mapping: &&Mapping| mapping.kind == MappingKind::Fixed;
        let mut leaked: Vec<Mapping> =
            self.live.iter().filter(|mapping| !is_lasting(mapping)).copied().collect();
        leaked.sort_unstable_by_key(|mapping| mapping.number);
        let told = leaked.len().min(self.bounds.leak_reports.max(1));
        for (n, mapping) in leaked[..told].iter().enumerate() {
            let rest = if n + 1 == told { leaked.len() - told } else { 0 };
            let rest = u32::try_from(rest).unwrap_or(u32::MAX);
            self.report_calls(call, ReportClass::Leak, None, Some(*mapping), rest);
        }
    }
}
