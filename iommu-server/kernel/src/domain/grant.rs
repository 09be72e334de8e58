//! Granting: what both APIs do once they know where a mapping goes.
//!
//! Everything that can run out is got first, so that a map either happens whole or leaves nothing behind.

use iommu_hardware::memory::{MappingRecord, PinError, RecordIndex, RecordState};
use iommu_types::errors::LimitReached;
use iommu_types::{Hpa, Iova, IovaRange, PAGE_SIZE_BYTES, Permissions};

use super::table::Extent;
use super::{Domain, Shortage};
use crate::boot::Kernel;
use crate::frames::frame_at;

/// Pins that one frame can have (31 bits of the frame array's word).
const PINS_PER_FRAME_MAX: u64 = (1 << 31) - 1;

impl Domain {
    /// Maps `self.extents` as `record` says: frames pinned → record *granting* → entries → record *live*.
    pub(super) fn grant(&mut self, kernel: &Kernel, record: &MappingRecord) -> Result<RecordIndex, Shortage> {
        self.charged(record.size_bytes, |domain| {
            let index = domain.claim(kernel)?;
            domain.begin_and_end(kernel, index, record, |domain| {
                let permissions = Permissions::from_bits_truncate(record.permissions);
                let bytes = IovaRange::new(Iova::new(record.iova), record.size_bytes);
                let bytes = bytes.expect("a mapping is a range");
                domain.tables.map(kernel.memory(), &domain.extents, permissions, bytes);
            });
            Ok(index)
        })
    }
    /// Makes the record of a mapping whose memory is opened otherwise, by `open`, between *granting* and *live*.
    pub(super) fn note(
        &mut self,
        kernel: &Kernel,
        record: &MappingRecord,
        open: impl FnOnce(&mut Self),
    ) -> Result<RecordIndex, Shortage> {
        self.charged(record.size_bytes, |domain| {
            let index = kernel.records.take(&mut domain.kept_records)?;
            domain.begin_and_end(kernel, index, record, open);
            Ok(index)
        })
    }
    fn begin_and_end(
        &mut self,
        kernel: &Kernel,
        index: RecordIndex,
        record: &MappingRecord,
        open: impl FnOnce(&mut Self),
    ) {
        let records = kernel.records.records();
        records.begin(index, record);
        open(self);
        records.set_state(index, RecordState::Live);
    }
    /// Charges the owner for a mapping that `grant` makes, or for nothing.
    fn charged(
        &mut self,
        size_bytes: u64,
        grant: impl FnOnce(&mut Self) -> Result<RecordIndex, Shortage>,
    ) -> Result<RecordIndex, Shortage> {
        self.account.mappings.charge(1)?;
        self.account.mapped.charge(size_bytes).inspect_err(|_| self.account.mappings.refund(1))?;
        let index = grant(self).inspect_err(|_| {
            self.account.mappings.refund(1);
            self.account.mapped.refund(size_bytes);
        })?;
        self.counters.mappings += 1;
        self.counters.mapped_bytes += size_bytes;
        self.counters.maps += 1;
        Ok(index)
    }
    /// Gets tables, a record and pins, or nothing.
    fn claim(&mut self, kernel: &Kernel) -> Result<RecordIndex, Shortage> {
        self.tables.reserve(kernel, &self.account, &self.extents)?;
        let index = kernel.records.take(&mut self.kept_records);
        let index = index.inspect_err(|_| self.tables.trim(kernel, &self.account))?;
        if let Err(limit) = self.pin_frames(kernel) {
            kernel.records.put(&mut self.kept_records, index);
            self.tables.trim(kernel, &self.account);
            return Err(limit.into());
        }
        Ok(index)
    }
    /// Takes back the pins of `self.extents`.
    pub(super) fn unpin_frames(&self, kernel: &Kernel) {
        frames_of(&self.extents).for_each(|frame| kernel.frames.array().unpin(frame));
    }
    /// Pins every frame of `self.extents`, or none (I9).
    pub(super) fn pin_frames(&self, kernel: &Kernel) -> Result<(), LimitReached> {
        let array = kernel.frames.array();
        for (done, frame) in frames_of(&self.extents).enumerate() {
            let error = match array.pin(frame, self.account.tag()) {
                Ok(()) => continue,
                Err(error) => error,
            };
            for pinned in frames_of(&self.extents).take(done) {
                array.unpin(pinned);
            }
            // Memory and domain are locked by the caller, so nobody else moves frames of this owner.
            assert!(error == PinError::Saturated, "I9: {frame} is memory of {}: {error}", self.owner());
            return Err(LimitReached { limit: "pins_per_frame".to_owned(), allowed: PINS_PER_FRAME_MAX });
        }
        Ok(())
    }
}

fn frames_of(extents: &[Extent]) -> impl Iterator<Item = Hpa> {
    extents.iter().flat_map(|extent| {
        let frames = extent.pages * (extent.size.bytes() / PAGE_SIZE_BYTES);
        (0..frames).map(|frame| frame_at(extent.hpa, frame))
    })
}
