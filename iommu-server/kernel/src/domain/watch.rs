//! What a domain tells its sanitizer: births and deaths of mappings, and what was refused.
//!
//! Without a sanitizer it is one test of an option for each call. With one, a death is told when the entries are gone and before the unmap
//! is answered, so that a DMA which takes its place in the order afterwards is known to have begun after it.

use std::sync::{Arc, Mutex, MutexGuard};

use iommu_hardware::memory::MappingRecord;
use iommu_types::errors::{DmaMapError, DmaSyncError, DmaUnmapError};
use iommu_types::{Direction, Gpa, GpaRange, Iova, IovaRange, RequestId, SanitizerReport};

use super::find::direction_of;
use super::request::{DmaMap, DmaUnmap, Segment, Tick};
use super::{DmaSync, Domain};
use crate::sanitizer::{DriverCall, EventClock, MappingKind, Moment, NewMapping, Sanitizer, SanitizerBounds};

/// The sanitizer of a domain, shared with whoever carries out the DMA of its devices. Its lock is a leaf: nothing else is locked
/// while it is held.
#[derive(Clone, Debug)]
pub struct SanitizerHandle {
    clock: EventClock,
    sanitizer: Arc<Mutex<Sanitizer>>,
}

impl SanitizerHandle {
    pub(super) fn new(sanitizer: Sanitizer) -> Self {
        Self { clock: EventClock::default(), sanitizer: Arc::new(Mutex::new(sanitizer)) }
    }
    /// What orders the events of the domain.
    pub fn clock(&self) -> &EventClock {
        &self.clock
    }
    /// Runs `operation` on the sanitizer, alone.
    pub fn with<R>(&self, operation: impl FnOnce(&mut Sanitizer) -> R) -> R {
        operation(&mut self.lock())
    }
    /// Takes out the reports that nobody has taken. The next report is a new one, even when it equals the last of these.
    pub fn drain_reports(&self) -> Vec<SanitizerReport> {
        self.lock().drain_reports()
    }
    /// How many reports there were, repeats included.
    pub fn total(&self) -> u64 {
        self.lock().counts().values().fold(0, |sum, count| sum.saturating_add(*count))
    }
    fn lock(&self) -> MutexGuard<'_, Sanitizer> {
        self.sanitizer.lock().expect("the sanitizer does not panic")
    }
}

/// A range of ours, told to the sanitizer.
fn range(iova: Iova, size_bytes: u64) -> IovaRange {
    IovaRange::new(iova, size_bytes).expect("a mapping is a range")
}

/// What a direction of the DMA API would be called that allows these permissions.
fn direction_or_both(permissions: u8) -> Direction {
    if permissions == 0 { Direction::Bidirectional } else { direction_of(permissions) }
}

impl Domain {
    /// The domain's sanitizer, if it has one.
    pub fn sanitizer(&self) -> Option<&SanitizerHandle> {
        self.sanitizer.as_ref()
    }
    pub(super) fn make_sanitizer(&mut self) {
        let sanitizer = Sanitizer::new(self.owner(), self.id, SanitizerBounds::USUAL);
        self.sanitizer = Some(SanitizerHandle::new(sanitizer));
    }
    fn tell(&self, now: Tick, request_id: RequestId, event: impl FnOnce(&mut Sanitizer, DriverCall)) {
        let Some(handle) = &self.sanitizer else { return };
        // Under the lock, so that the order of events is that in which they are told.
        let mut sanitizer = handle.lock();
        let at = Moment { at_us: now.0, order: handle.clock.tick() };
        event(&mut sanitizer, DriverCall { at, device: None, request_id });
    }
    pub(super) fn tell_mapped(&self, request: &DmaMap, outcome: &Result<Iova, DmaMapError>, now: Tick) {
        self.tell(now, request.request_id, |sanitizer, call| match outcome {
            Err(error) => sanitizer.refused_map(call, error),
            Ok(iova) => sanitizer.mapped(
                call,
                NewMapping {
                    range: range(*iova, request.range.size_bytes()),
                    gpa: request.range.base(),
                    direction: request.direction,
                    kind: request.function.into(),
                },
            ),
        });
    }
    pub(super) fn tell_mapped_sg(
        &self,
        request: &DmaMap,
        ranges: &[GpaRange],
        outcome: &Result<Vec<Segment>, DmaMapError>,
        now: Tick,
    ) {
        self.tell(now, request.request_id, |sanitizer, call| match outcome {
            Err(error) => sanitizer.refused_map(call, error),
            Ok(segments) => {
                let mut rest = ranges;
                for segment in segments {
                    let mut bytes = 0;
                    let goes_on = |element: &&GpaRange| {
                        let is_inside = bytes < segment.size_bytes;
                        bytes += element.size_bytes();
                        is_inside
                    };
                    let (pieces, after) = rest.split_at(rest.iter().take_while(goes_on).count());
                    rest = after;
                    let Some(first) = pieces.first() else { return };
                    let mapping = NewMapping {
                        range: range(segment.iova, segment.size_bytes),
                        gpa: first.base(),
                        direction: request.direction,
                        kind: MappingKind::ScatterGather,
                    };
                    sanitizer.mapped_in_pieces(call, mapping, pieces);
                }
            }
        });
    }
    pub(super) fn tell_unmapped(&self, request: &DmaUnmap, outcome: Result<(), &DmaUnmapError>, now: Tick) {
        self.tell(now, request.request_id, |sanitizer, call| match outcome {
            Ok(()) => {
                sanitizer.unmapped(call, request.range, request.direction, request.function.into());
            }
            Err(error) => sanitizer.refused_unmap(call, request.range.base(), error),
        });
    }
    pub(super) fn tell_unmapped_sg(
        &self,
        iova: Iova,
        outcome: Result<(&[Segment], Direction), &DmaUnmapError>,
        request_id: RequestId,
        now: Tick,
    ) {
        self.tell(now, request_id, |sanitizer, call| match outcome {
            Err(error) => sanitizer.refused_unmap(call, iova, error),
            Ok((segments, direction)) => {
                for segment in segments {
                    let range = range(segment.iova, segment.size_bytes);
                    sanitizer.unmapped(call, range, direction, MappingKind::ScatterGather);
                }
            }
        });
    }
    pub(super) fn tell_synced(&self, request: &DmaSync, outcome: &Result<(), DmaSyncError>, now: Tick) {
        let DmaSync { range, target, request_id, .. } = *request;
        self.tell(now, request_id, |sanitizer, call| match outcome {
            Ok(()) => sanitizer.synced(call, range, target),
            Err(error) => sanitizer.refused_sync(call, range.base(), error),
        });
    }
    /// A mapping at a fixed address was made, or removed.
    pub(super) fn tell_fixed(&self, record: &MappingRecord, now: Tick, is_mapped: bool) {
        let addresses = range(Iova::new(record.iova), record.size_bytes);
        let direction = direction_or_both(record.permissions);
        self.tell(now, RequestId(record.request_id), |sanitizer, call| {
            let kind = MappingKind::Fixed;
            if is_mapped {
                let mapping = NewMapping { range: addresses, gpa: Gpa::new(record.gpa), direction, kind };
                sanitizer.mapped(call, mapping);
            } else {
                sanitizer.unmapped(call, addresses, direction, kind);
            }
        });
    }
    /// Mappings were revoked, because their memory was taken back.
    pub(super) fn tell_revoked(&self, revoked: &[(IovaRange, Direction, MappingKind)], now: Tick) {
        let Some(handle) = &self.sanitizer else { return };
        let mut sanitizer = handle.lock();
        for (range, direction, kind) in revoked {
            let at = Moment { at_us: now.0, order: handle.clock.tick() };
            sanitizer.revoked(at, *range, *direction, *kind);
        }
    }
    /// Everything was unmapped at once.
    pub(super) fn tell_all_unmapped(&self, now: Tick) {
        let Some(handle) = &self.sanitizer else { return };
        let mut sanitizer = handle.lock();
        sanitizer.unmapped_all(Moment { at_us: now.0, order: handle.clock.tick() });
    }
    /// A device or a driver lets go: what is mapped now was leaked.
    pub fn leaked(&mut self, now: Tick, request_id: RequestId) {
        self.tell(now, request_id, |sanitizer, call| sanitizer.leaked(call));
    }
    /// Memory was to be freed, and is mapped. Whether this domain maps some of it.
    pub fn released_while_mapped(&mut self, buffer: GpaRange, now: Tick, request_id: RequestId) -> bool {
        let mut is_mine = false;
        self.tell(now, request_id, |sanitizer, call| is_mine = sanitizer.released_while_mapped(call, buffer));
        is_mine
    }
}
