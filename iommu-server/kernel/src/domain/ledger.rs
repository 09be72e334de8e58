//! Mappings at addresses that are open anyway.
//!
//! Where the mode opens pages by its own rules (a direct map, shared pages, shadow buffers), a mapping of the DMA API is a note of who
//! uses what. Several may begin at one address: the same buffer mapped twice.

use std::collections::BTreeSet;

use iommu_hardware::memory::RecordIndex;
use iommu_types::Iova;

/// How many neighbours are looked at for the mapping that covers an address. Mappings that overlap are few in a well-behaved driver; one that
/// makes more overlap than this is told that nothing is mapped there when it syncs.
const NEIGHBOURS_MAX: usize = 1024;

/// Mappings that may begin at one address at once: an unmap looks at each of them. A buffer that so many transfers use at once is
/// rare, and one that more do can be mapped at another offset.
pub(super) const PER_ADDRESS_MAX: usize = 256;

/// Records by address.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    mappings: BTreeSet<(u64, u32)>,
}

impl Ledger {
    /// Whether no more mappings may begin there.
    pub(super) fn is_full_at(&self, iova: Iova) -> bool {
        self.at(iova).take(PER_ADDRESS_MAX).count() == PER_ADDRESS_MAX
    }
    pub(super) fn add(&mut self, iova: Iova, record: RecordIndex) {
        assert!(self.mappings.insert((iova.get(), record.0)), "a record is noted once");
    }
    pub(super) fn remove(&mut self, iova: Iova, record: RecordIndex) {
        assert!(self.mappings.remove(&(iova.get(), record.0)), "only what was noted is removed");
    }
    /// The mappings that begin exactly there.
    pub(super) fn at(&self, iova: Iova) -> impl Iterator<Item = RecordIndex> {
        let at = iova.get();
        self.mappings.range((at, 0)..=(at, u32::MAX)).map(|(_, record)| RecordIndex(*record))
    }
    /// The mappings that begin there or before, nearest first.
    pub(super) fn up_to(&self, iova: Iova) -> impl Iterator<Item = RecordIndex> {
        let before = self.mappings.range(..=(iova.get(), u32::MAX)).rev().take(NEIGHBOURS_MAX);
        before.map(|(_, record)| RecordIndex(*record))
    }
    /// The mappings that begin there or after, as (page, record), by address.
    pub(super) fn from(&self, iova: Iova) -> impl Iterator<Item = (u64, RecordIndex)> {
        let after = self.mappings.range((iova.get(), 0)..);
        after.map(|(iova, record)| (Iova::new(*iova).page_number(), RecordIndex(*record)))
    }
    /// Takes all of them out.
    pub(super) fn take_all(&mut self) -> impl Iterator<Item = RecordIndex> + use<> {
        std::mem::take(&mut self.mappings).into_iter().map(|(_, record)| RecordIndex(record))
    }
}
