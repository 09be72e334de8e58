//! Mappings that are there, found by device address and by memory.
//!
//! Several may cover the same addresses: in modes where device addresses are guest-physical ones, buffers share pages and
//! may be mapped more than once. Memory is indexed by whole cache lines, because that is how overlaps are judged.

use std::collections::BTreeMap;

use iommu_types::GpaRange;

use super::index::RangeIndex;
use super::mapping::Mapping;

/// Bytes of a cache line. Two buffers in one line are not apart for a device that does not snoop (dma-debug, "overlapping cacheline").
const CACHE_LINE_BYTES: u64 = 64;

/// Names a live mapping: first and last address, number.
type Key = (u64, u64, u64);

#[derive(Debug)]
pub(super) struct Live {
    mappings: RangeIndex<Mapping>,
    by_memory: RangeIndex<Key>,
    /// The memory behind the first piece, of mappings that have several, by number.
    further: BTreeMap<u64, Box<[GpaRange]>>,
    count: usize,
    coherent_count: usize,
}

fn lines(first: u64, last: u64) -> (u64, u64) {
    (first & !(CACHE_LINE_BYTES - 1), last | (CACHE_LINE_BYTES - 1))
}

/// First and last byte of each piece of memory behind a mapping.
pub(super) fn pieces(mapping: &Mapping, further: &[GpaRange]) -> impl Iterator<Item = (u64, u64)> {
    let further = further.iter().map(|piece| (piece.base().get(), piece.last().get()));
    std::iter::once(mapping.memory(mapping.first(), mapping.last())).chain(further)
}

/// The cache lines of all pieces, disjoint.
fn all_lines(mapping: &Mapping, further: &[GpaRange]) -> Vec<(u64, u64)> {
    let mut all: Vec<_> = pieces(mapping, further).map(|(first, last)| lines(first, last)).collect();
    all.sort_unstable();
    all.dedup_by(|next, before| {
        let meets = next.0 <= before.1;
        before.1 = if meets { before.1.max(next.1) } else { before.1 };
        meets
    });
    all
}

impl Live {
    pub(super) fn new() -> Self {
        let (mappings, by_memory) = (RangeIndex::new(), RangeIndex::new());
        Self { mappings, by_memory, further: BTreeMap::new(), count: 0, coherent_count: 0 }
    }
    /// Adds a mapping, with the memory behind its first piece, if it has several.
    pub(super) fn insert(&mut self, mapping: Mapping, further: &[GpaRange]) {
        let (first, last, number) = (mapping.first(), mapping.last(), mapping.number);
        for (low, high) in all_lines(&mapping, further) {
            self.by_memory.insert(low, high, number, (first, last, number));
        }
        if !further.is_empty() {
            self.further.insert(number, further.into());
        }
        self.mappings.insert(first, last, number, mapping);
        self.count += 1;
        self.coherent_count += usize::from(mapping.life.coherent);
    }
    pub(super) fn remove(&mut self, mapping: &Mapping) {
        let (first, last, number) = (mapping.first(), mapping.last(), mapping.number);
        let further = self.further.remove(&number).unwrap_or_default();
        for (low, high) in all_lines(mapping, &further) {
            self.by_memory.remove(low, high, number);
        }
        if self.mappings.remove(first, last, number).is_some() {
            self.count -= 1;
            self.coherent_count -= usize::from(mapping.life.coherent);
        }
    }
    pub(super) fn count(&self) -> usize {
        self.count
    }
    /// Entries by address and by memory.
    #[cfg(test)]
    pub(super) fn sizes(&self) -> (usize, usize) {
        (self.mappings.iter().count(), self.by_memory.iter().count())
    }
    pub(super) fn holds_coherent(&self) -> bool {
        self.coherent_count != 0
    }
    pub(super) fn iter(&self) -> impl Iterator<Item = &Mapping> {
        self.mappings.iter()
    }
    /// Mappings that share an address with `first..=last`.
    pub(super) fn touching(&self, first: u64, last: u64) -> impl Iterator<Item = &Mapping> {
        self.mappings.touching(first, last)
    }
    /// The newest mapping that begins at the address.
    pub(super) fn at_base(&self, base: u64) -> Option<&Mapping> {
        self.touching(base, base)
            .filter(|mapping| mapping.first() == base)
            .max_by_key(|mapping| mapping.number)
    }
    /// The newest mapping that covers the address.
    pub(super) fn covering(&self, address: u64) -> Option<&Mapping> {
        self.touching(address, address).max_by_key(|mapping| mapping.number)
    }
    /// Mappings of exactly these addresses.
    pub(super) fn exactly(&self, first: u64, last: u64) -> impl Iterator<Item = &Mapping> {
        self.touching(first, first).filter(move |mapping| mapping.first() == first && mapping.last() == last)
    }
    /// Mappings of memory in the cache lines of `first..=last`; one in several pieces may come several times.
    pub(super) fn in_lines(&self, first: u64, last: u64) -> impl Iterator<Item = &Mapping> {
        let (low, high) = lines(first, last);
        self.by_memory
            .touching(low, high)
            .filter_map(|&(first, last, number)| self.mappings.get(first, last, number))
    }
    /// Mappings of memory in `first..=last`, to the byte.
    pub(super) fn of_memory(&self, first: u64, last: u64) -> impl Iterator<Item = &Mapping> {
        self.in_lines(first, last).filter(move |mapping| {
            let further = self.further.get(&mapping.number).map_or(&[][..], |further| further);
            pieces(mapping, further).any(|(low, high)| low <= last && high >= first)
        })
    }
}
