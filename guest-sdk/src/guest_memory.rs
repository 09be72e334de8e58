//! Which pages of a virtual machine's own memory are taken: a first-fit allocator on the guest's side of the wire.
//!
//! It owns nothing: the memory is the machine's, and what is taken here is only promised to one buffer. Regions come and go as the hypervisor gives and
//! takes; what is taken stays taken until it is given back, whether its region is still there or not.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use iommu_proto::pb;
use iommu_types::{Gpa, GpaRange, PAGE_SIZE_BYTES};

use crate::TransportError;
use crate::convert::bad_answer;
use crate::page_runs::PageRuns;

/// The pages of one virtual machine.
#[derive(Debug, Default)]
pub(crate) struct GuestMemory {
    state: Mutex<State>,
}

/// All in pages: first page to page count.
#[derive(Debug, Default)]
struct State {
    regions: PageRuns,
    free: PageRuns,
    taken: BTreeMap<u64, u64>,
}

/// The regions as the server lists them.
pub(crate) fn regions(listed: pb::ListMemoryResponse) -> Result<Vec<GpaRange>, TransportError> {
    let pb::ListMemoryResponse { gpa, size_bytes } = listed;
    if gpa.len() != size_bytes.len() {
        let why = format!("size_bytes: {} sizes for {} addresses", size_bytes.len(), gpa.len());
        return Err(bad_answer(why));
    }
    let region = |(gpa, size_bytes)| {
        let range = GpaRange::new(Gpa::new(gpa), size_bytes).map_err(bad_answer)?;
        if !range.is_aligned(PAGE_SIZE_BYTES) {
            return Err(bad_answer(format!("gpa: {range} is not whole pages")));
        }
        Ok(range)
    };
    gpa.into_iter().zip(size_bytes).map(region).collect()
}

impl GuestMemory {
    /// These are the regions from now on.
    pub(crate) fn learn(&self, regions: &[GpaRange]) {
        let known = PageRuns::of(regions);
        let mut state = self.lock();
        let mut free = known.clone();
        for (&first, &count) in &state.taken {
            free.remove(first, count);
        }
        (state.regions, state.free) = (known, free);
    }

    /// Takes the first free run of pages that holds `size_bytes`, at least 1; `None` when there is none.
    pub(crate) fn take(&self, size_bytes: u64) -> Option<GpaRange> {
        let count = size_bytes.div_ceil(PAGE_SIZE_BYTES);
        let mut state = self.lock();
        let (first, _) = state.free.iter().find(|(_, pages)| *pages >= count)?;
        state.free.remove(first, count);
        state.taken.insert(first, count);
        let range = GpaRange::new(Gpa::new(first * PAGE_SIZE_BYTES), count * PAGE_SIZE_BYTES);
        Some(range.expect("pages of a region are a range"))
    }

    /// Gives back what was taken; the part that the hypervisor has not taken away meanwhile is free again.
    pub(crate) fn give_back(&self, range: GpaRange) {
        let (first, count) = (range.base().page_number(), range.pages_touched());
        let mut state = self.lock();
        if state.taken.remove(&first).is_none() {
            return;
        }
        for (run, pages) in state.regions.overlapping(first, count) {
            let (from, to) = (run.max(first), (run + pages).min(first + count));
            state.free.add(from, to - from);
        }
    }

    /// A panic while the lock was held leaves a state that is still whole.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(page: u64, count: u64) -> GpaRange {
        GpaRange::new(Gpa::new(page * PAGE_SIZE_BYTES), count * PAGE_SIZE_BYTES).expect("a range")
    }

    fn memory(regions: &[(u64, u64)]) -> GuestMemory {
        let memory = GuestMemory::default();
        memory.learn(&regions.iter().map(|&(page, count)| range(page, count)).collect::<Vec<_>>());
        memory
    }

    fn free(memory: &GuestMemory) -> Vec<(u64, u64)> {
        memory.lock().free.iter().collect()
    }

    #[test]
    fn the_first_run_that_is_large_enough_is_taken() {
        let memory = memory(&[(0x10, 2), (0x20, 4)]);
        assert_eq!(memory.take(2 * 4096 + 1), Some(range(0x20, 3)));
        assert_eq!(memory.take(1), Some(range(0x10, 1)));
        assert_eq!(memory.take(4096), Some(range(0x11, 1)));
        assert_eq!(memory.take(2 * 4096), None);
        assert_eq!(free(&memory), [(0x23, 1)]);
        assert_eq!(memory.take(u64::MAX), None);
    }

    #[test]
    fn what_is_given_back_joins_its_neighbours_across_regions_that_touch() {
        let memory = memory(&[(0x10, 2), (0x12, 2)]);
        let taken: Vec<GpaRange> = (0..4).map(|_| memory.take(4096).expect("a page")).collect();
        for index in [1, 3, 2, 0] {
            memory.give_back(taken[index]);
            // Twice is nothing.
            memory.give_back(taken[index]);
        }
        assert_eq!(free(&memory), [(0x10, 4)]);
        assert_eq!(memory.take(4 * 4096), Some(range(0x10, 4)));
    }

    #[test]
    fn memory_that_the_hypervisor_took_is_not_handed_out_again_and_new_memory_is() {
        let memory = memory(&[(0x10, 4)]);
        let (first, second) = (memory.take(4096).expect("a page"), memory.take(2 * 4096).expect("two"));
        memory.learn(&[range(0x12, 2), range(0x40, 1)]);
        assert_eq!(free(&memory), [(0x13, 1), (0x40, 1)], "what is taken stays taken");
        memory.give_back(first);
        assert_eq!(free(&memory), [(0x13, 1), (0x40, 1)], "its region is gone");
        memory.give_back(second);
        assert_eq!(free(&memory), [(0x12, 2), (0x40, 1)], "half of it is still there");
        // It comes back with the region.
        memory.learn(&[range(0x10, 4)]);
        assert_eq!(free(&memory), [(0x10, 4)]);
    }

    #[test]
    fn the_last_page_of_the_address_space_is_memory_like_any_other() {
        let last = u64::MAX / PAGE_SIZE_BYTES;
        let memory = memory(&[(last, 1)]);
        let taken = memory.take(1).expect("a page");
        assert_eq!(taken, range(last, 1));
        memory.give_back(taken);
        assert_eq!(free(&memory), [(last, 1)]);
    }

    #[test]
    fn lists_that_make_no_regions_are_not_believed() {
        for (gpa, size_bytes) in
            [(vec![0], vec![]), (vec![1], vec![4096]), (vec![0], vec![100]), (vec![!0xfff], vec![8192])]
        {
            let listed = pb::ListMemoryResponse { gpa: gpa.clone(), size_bytes: size_bytes.clone() };
            assert!(regions(listed).is_err(), "{gpa:?} {size_bytes:?}");
        }
        // Pages that are listed twice are there once.
        assert_eq!(free(&memory(&[(0x10, 3), (0x11, 1), (0x12, 4)])), [(0x10, 6)]);
    }
}
