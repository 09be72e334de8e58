//! Which DMA-API mapping begins at a page: a slot per page of a leaf table, beside its node.

use iommu_hardware::memory::RecordIndex;
use iommu_hardware::vtd::spec::pte::ENTRIES_PER_TABLE;

use super::{Key, Node, Tables, first_address, leaf_key, slot_index};

impl Tables {
    /// The record of the mapping that begins at a page.
    pub(in super::super) fn slot(&self, page: u64) -> Option<RecordIndex> {
        let node = self.nodes.get(&leaf_key(page))?;
        RecordIndex(node.slots.as_ref()?[slot_index(page)].checked_sub(1)?).into()
    }
    /// The record of the nearest mapping with a slot that begins at a page or before it, under the same leaf table.
    pub(in super::super) fn slot_up_to(&self, page: u64) -> Option<RecordIndex> {
        let slots = self.nodes.get(&leaf_key(page))?.slots.as_ref()?;
        let nearest = slots[..=slot_index(page)].iter().rev().find_map(|slot| slot.checked_sub(1))?;
        Some(RecordIndex(nearest))
    }
    pub(in super::super) fn set_slot(&mut self, page: u64, record: RecordIndex) {
        let node = self.nodes.get_mut(&leaf_key(page)).expect("the mapping has a leaf table");
        let slots = node.slots.get_or_insert_with(|| Box::new([0; ENTRIES_PER_TABLE as usize]));
        slots[slot_index(page)] = record.0 + 1;
    }
    pub(in super::super) fn clear_slot(&mut self, page: u64) {
        let node = self.nodes.get_mut(&leaf_key(page)).expect("the mapping has a leaf table");
        node.slots.as_mut().expect("the mapping has a slot")[slot_index(page)] = 0;
    }
    /// The first mapping with a slot that has a page in `first..=last`; `last_page` gives a mapping's last page.
    pub(in super::super) fn slot_overlapping(
        &self,
        first: u64,
        last: u64,
        last_page: impl Fn(RecordIndex) -> u64,
    ) -> Option<(u64, RecordIndex)> {
        let in_region = |key: Key, node: &Node| {
            let base = first_address(key).page_number();
            let mapping =
                |(n, slot): (usize, &u32)| Some((base + n as u64, RecordIndex(slot.checked_sub(1)?)));
            let mut mappings =
                node.slots.iter().flat_map(|slots| slots.iter()).enumerate().filter_map(mapping);
            mappings.find(|(page, record)| *page <= last && last_page(*record) >= first)
        };
        if leaf_key(first) == leaf_key(last) {
            return in_region(leaf_key(first), self.nodes.get(&leaf_key(first))?);
        }
        // Only leaf tables have slots, so keys of other levels do no harm.
        let is_near = |(key, _): &(&Key, &Node)| (leaf_key(first)..=leaf_key(last)).contains(*key);
        let near = self.nodes.iter().filter(is_near);
        near.filter_map(|(key, node)| in_region(*key, node)).min_by_key(|(page, _)| *page)
    }
    /// Mappings that begin at `from` or after, by page, `limit` at most.
    pub(in super::super) fn slots_from(&self, from: u64, limit: usize) -> Vec<(u64, RecordIndex)> {
        let has_slots = |(key, node): &(&Key, &Node)| node.slots.is_some() && **key >= leaf_key(from);
        let mut regions: Vec<_> = self.nodes.iter().filter(has_slots).collect();
        regions.sort_unstable_by_key(|(key, _)| **key);
        let slots_of = |(key, node): (&Key, &Node)| {
            let first = first_address(*key).page_number();
            let slots: Vec<u32> = node.slots.as_ref().map(|slots| slots.to_vec()).unwrap_or_default();
            let slot =
                move |(n, slot): (usize, u32)| Some((first + n as u64, RecordIndex(slot.checked_sub(1)?)));
            slots.into_iter().enumerate().filter_map(slot)
        };
        let found = regions.into_iter().flat_map(slots_of).skip_while(|(page, _)| *page < from);
        found.take(limit).collect()
    }
}
