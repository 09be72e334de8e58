//! Ranges that may overlap, found by the addresses they cover.
//!
//! One ordered map per power of two of the size: a range of class `k` that covers an address begins less than `2^(k+1)` bytes
//! below it, so a look at one short stretch of each class in use finds them all. A mapping of a gigabyte is one entry, as one of a byte is.

use std::collections::BTreeMap;

/// One class per bit of a size.
const CLASSES: usize = 64;

/// Ranges with something attached to each, named by base, size and a number of their own.
#[derive(Debug)]
pub(super) struct RangeIndex<T> {
    /// (base, number) → (last address, what is attached).
    classes: [BTreeMap<(u64, u64), (u64, T)>; CLASSES],
    /// Bit `k` is set when class `k` holds something.
    in_use: u64,
}

fn class_of(first: u64, last: u64) -> usize {
    // The whole address space has 2^64 bytes; it counts as one less.
    last.saturating_sub(first).saturating_add(1).ilog2() as usize
}

impl<T> RangeIndex<T> {
    /// Nothing.
    pub(super) fn new() -> Self {
        Self { classes: std::array::from_fn(|_| BTreeMap::new()), in_use: 0 }
    }
    /// Adds the range from `first` to `last`; the number makes it different from others of the same base.
    pub(super) fn insert(&mut self, first: u64, last: u64, number: u64, attached: T) {
        let class = class_of(first, last);
        self.classes[class].insert((first, number), (last, attached));
        self.in_use |= 1 << class;
    }
    /// Removes it.
    pub(super) fn remove(&mut self, first: u64, last: u64, number: u64) -> Option<T> {
        let class = class_of(first, last);
        self.get(first, last, number)?;
        let (_, attached) = self.classes[class].remove(&(first, number))?;
        if self.classes[class].is_empty() {
            self.in_use &= !(1 << class);
        }
        Some(attached)
    }
    /// The range of these ends with this number.
    pub(super) fn get(&self, first: u64, last: u64, number: u64) -> Option<&T> {
        let (end, attached) = self.classes[class_of(first, last)].get(&(first, number))?;
        (*end == last).then_some(attached)
    }
    /// Everything that shares an address with `first..=last`, in no promised order.
    pub(super) fn touching(&self, first: u64, last: u64) -> impl Iterator<Item = &T> {
        let classes = self.classes.iter().enumerate().filter(|(class, _)| self.in_use & (1 << class) != 0);
        classes.flat_map(move |(class, ranges)| {
            let longest = u64::MAX >> (CLASSES - 1 - class);
            let low = first.saturating_sub(longest);
            ranges
                .range((low, 0)..=(last.max(low), u64::MAX))
                .filter(move |(_, (end, _))| *end >= first)
                .map(|(_, (_, attached))| attached)
        })
    }
    /// Everything, in no promised order.
    pub(super) fn iter(&self) -> impl Iterator<Item = &T> {
        self.classes.iter().flat_map(|ranges| ranges.values().map(|(_, attached)| attached))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_touches_is_found_at_every_size_and_at_both_ends_of_the_space() {
        let ranges: Vec<(u64, u64)> = vec![
            (0, 0),
            (0, u64::MAX),
            (1, 2),
            (0x1000, 0x1fff),
            (0x1000, 0x1fff),
            (0x1800, 0x27ff),
            (0x1fff, 0x2000),
            (u64::MAX - 1, u64::MAX),
            (u64::MAX, u64::MAX),
            (1 << 40, (1 << 41) - 1),
        ];
        let mut index = RangeIndex::new();
        for (number, &(first, last)) in ranges.iter().enumerate() {
            index.insert(first, last, number as u64, number);
        }
        let edges: Vec<u64> =
            ranges.iter().flat_map(|&(a, b)| [a.saturating_sub(1), a, b, b.saturating_add(1)]).collect();
        for &first in &edges {
            for &last in edges.iter().filter(|last| **last >= first) {
                let mut found: Vec<_> = index.touching(first, last).copied().collect();
                found.sort_unstable();
                let expected: Vec<_> =
                    (0..ranges.len()).filter(|&n| ranges[n].0 <= last && ranges[n].1 >= first).collect();
                assert_eq!(found, expected, "{first:#x}..={last:#x}");
            }
        }
    }

    #[test]
    fn what_is_removed_is_gone_and_its_twin_is_not() {
        let mut index = RangeIndex::new();
        index.insert(10, 20, 1, 'a');
        index.insert(10, 20, 2, 'b');
        assert_eq!(index.remove(10, 21, 1), None);
        assert_eq!(index.remove(10, 20, 1), Some('a'));
        assert_eq!(index.remove(10, 20, 1), None);
        assert_eq!((index.get(10, 20, 2), index.get(10, 20, 1)), (Some(&'b'), None));
        assert_eq!(index.touching(20, 20).collect::<Vec<_>>(), [&'b']);
        assert_eq!(index.remove(10, 20, 2), Some('b'));
        assert_eq!(index.in_use, 0);
        assert_eq!(index.iter().count(), 0);
    }
}
