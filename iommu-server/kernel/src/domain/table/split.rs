//! A superpage becomes a table of smaller pages, in place, so that a part of what it maps can go.
//!
//! The table says what the superpage said and takes its place in one store, so a device that walks meanwhile finds the same translation either
//! way and is never refused. What is cached of the superpage is invalidated with the part that goes: an invalidation of a page forgets pages
//! of any size over it.

use iommu_hardware::memory::PhysicalMemory;
use iommu_hardware::vtd::spec::pte::{ENTRIES_PER_TABLE, SecondStageEntry};
use iommu_types::{Iova, PAGE_SIZE_BYTES, PageSize};

use super::super::Shortage;
use super::{Missing, Node, Tables, entry_at, key, load, store};
use crate::account::OwnerAccount;
use crate::boot::Kernel;
use crate::frames::frame_at;

/// Cutting a mapping at one page turns a page of 1 GiB into 2 MiB, and one of those into 4 KiB.
const TABLES_PER_CUT: usize = 2;

impl Tables {
    /// Gets the frames for so many cuts, or changes nothing.
    pub(in super::super) fn reserve_cuts(
        &mut self,
        kernel: &Kernel,
        account: &OwnerAccount,
        cuts: usize,
    ) -> Result<(), Shortage> {
        self.stock_up(kernel, account, Missing { single: cuts * TABLES_PER_CUT, pairs: 0 })
    }
    /// Makes the pages of a mapping so small that none reaches from before `page` over it. `reserve_cuts` succeeded.
    pub(in super::super) fn cut_before(&mut self, memory: &PhysicalMemory, page: u64) {
        assert!(!self.has_extents, "superpages are open whole");
        let iova = Iova::new(page * PAGE_SIZE_BYTES);
        let mut size = self.leaf_size(iova);
        while !iova.is_aligned(size.bytes()) {
            size = self.split_leaf(memory, iova, size);
        }
    }
    /// Splits the leaf over an address; returns the size of the leaves that take its place.
    fn split_leaf(&mut self, memory: &PhysicalMemory, iova: Iova, size: PageSize) -> PageSize {
        let level = size.leaf_level();
        let smaller = PageSize::at_level(level - 1).expect("4 KiB pages lie at each of their addresses");
        let parent = self.nodes[&key(level, iova)].table;
        let at = entry_at(parent, iova, level);
        let leaf = load(memory, at, 0);
        assert!(leaf.is_present() && leaf.is_leaf_at(level), "a mapping has a page at each of its addresses");
        let table = self.spare.single.pop().expect("frames were reserved for each cut");
        for entry in 0..ENTRIES_PER_TABLE {
            let hpa = frame_at(leaf.address(), entry * (smaller.bytes() / PAGE_SIZE_BYTES));
            store(memory, table, entry, SecondStageEntry::leaf(hpa, smaller, leaf.permissions()));
        }
        store(memory, at, 0, SecondStageEntry::table(table));
        let live = ENTRIES_PER_TABLE as u16;
        self.nodes.insert(key(level - 1, iova), Node { live, ..Node::new(table) });
        self.counters.tables_built += 1;
        self.counters.entry_writes += ENTRIES_PER_TABLE + 1;
        smaller
    }
}
