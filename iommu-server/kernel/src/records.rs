//! Which mapping records are free.
//!
//! The records themselves lie in physical memory (see `iommu_hardware::memory::MappingRecords`); this is the list of those
//! not in use. Domains take them in handfuls, so that the lock here is not on the path of a map.

use std::sync::{Mutex, MutexGuard};

use iommu_hardware::memory::{MappingRecords, RecordIndex};
use iommu_types::errors::LimitReached;

/// Records that a domain takes at once when it has none left.
const HANDFUL: usize = 32;
/// Free records that a domain keeps at most: bounds what one owner can hoard.
const KEPT_MAX: usize = 64;

/// The records and the list of those that are free.
pub(crate) struct RecordPool {
    records: MappingRecords,
    free: Mutex<FreeRecords>,
}

#[derive(Default)]
struct FreeRecords {
    returned: Vec<RecordIndex>,
    /// Records from here on were never used, so that nothing is touched at boot.
    untouched: u32,
}

impl RecordPool {
    pub(crate) fn new(records: MappingRecords) -> Self {
        Self { records, free: Mutex::default() }
    }
    pub(crate) fn records(&self) -> &MappingRecords {
        &self.records
    }
    /// Records that nobody holds.
    pub(crate) fn free_count(&self) -> u64 {
        let free = self.lock();
        free.returned.len() as u64 + u64::from(self.records.capacity() - free.untouched)
    }
    /// One record out of `kept`, which is filled up first when it is empty.
    pub(crate) fn take(&self, kept: &mut Vec<RecordIndex>) -> Result<RecordIndex, LimitReached> {
        if let Some(index) = kept.pop() {
            return Ok(index);
        }
        let mut free = self.lock();
        let at = free.returned.len().saturating_sub(HANDFUL);
        kept.extend(free.returned.drain(at..));
        let fresh = (HANDFUL - kept.len()) as u32;
        let fresh = fresh.min(self.records.capacity() - free.untouched);
        // Reversed, so that neighbours in time are neighbours in memory.
        kept.extend((free.untouched..free.untouched + fresh).rev().map(RecordIndex));
        free.untouched += fresh;
        kept.pop().ok_or_else(|| LimitReached {
            limit: "mapping_records".to_owned(),
            allowed: self.records.capacity().into(),
        })
    }
    /// Takes records back into `kept`, and from there what is too many.
    pub(crate) fn put(&self, kept: &mut Vec<RecordIndex>, index: RecordIndex) {
        kept.push(index);
        if kept.len() > KEPT_MAX {
            self.lock().returned.extend(kept.drain(..HANDFUL));
        }
    }
    /// Takes back all of `kept`.
    pub(crate) fn put_all(&self, kept: &mut Vec<RecordIndex>) {
        self.lock().returned.append(kept);
    }
    fn lock(&self) -> MutexGuard<'_, FreeRecords> {
        self.free.lock().expect("nothing panics while it holds the list of free records")
    }
}
