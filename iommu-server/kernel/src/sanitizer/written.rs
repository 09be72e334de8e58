//! Coherent memory that devices wrote themselves.
//!
//! A word that a device reads from there need not be the driver's: a device that plants an address and reads it back must not
//! get the driver blamed. Nobody sees when the driver writes over it, so what is written once stays so; words from there prove nothing
//! either way. When the room is used up, neighbouring ranges become one: the set only ever says *written* too often.

use std::collections::BTreeMap;

/// Ranges that are kept apart. A ring with a status word in each of its descriptors has as many.
const RANGES_MAX: usize = 4096;

/// Ranges of guest-physical addresses, disjoint.
#[derive(Debug, Default)]
pub(super) struct Written(BTreeMap<u64, u64>);

impl Written {
    pub(super) fn note(&mut self, first: u64, last: u64) {
        let (mut low, mut high) = (first, last);
        while let Some((&at, &end)) = self.0.range(..=high.saturating_add(1)).next_back()
            && end.saturating_add(1) >= low
        {
            (low, high) = (low.min(at), high.max(end));
            self.0.remove(&at);
        }
        if self.0.len() >= RANGES_MAX {
            if let Some((&at, _)) = self.0.range(..low).next_back() {
                self.0.remove(&at);
                low = at;
            } else if let Some((&at, &end)) = self.0.range(high..).next() {
                self.0.remove(&at);
                high = end;
            }
        }
        self.0.insert(low, high);
    }
    pub(super) fn touches(&self, first: u64, last: u64) -> bool {
        self.0.range(..=last).next_back().is_some_and(|(_, &end)| end >= first)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_grow_together_and_gaps_stay_apart() {
        let mut written = Written::default();
        for (first, last) in [(10, 19), (30, 39), (20, 20), (5, 7), (38, 50), (0, 0), (u64::MAX, u64::MAX)] {
            written.note(first, last);
        }
        assert_eq!(written.0, BTreeMap::from([(0, 0), (5, 7), (10, 20), (30, 50), (u64::MAX, u64::MAX)]));
        for (first, last, touches) in [(8, 9, false), (8, 10, true), (21, 29, false), (0, 100, true)] {
            assert_eq!(written.touches(first, last), touches, "{first}..={last}");
        }
        written.note(0, u64::MAX);
        assert_eq!(written.0, BTreeMap::from([(0, u64::MAX)]));
    }

    #[test]
    fn i7_a_full_set_stays_bounded_and_forgets_nothing() {
        let mut written = Written::default();
        let at = |n: u64| (n * 7919) % 1_000_003 * 16;
        for n in 0..3 * RANGES_MAX as u64 {
            written.note(at(n), at(n) + 7);
        }
        assert!(written.0.len() <= RANGES_MAX);
        assert!((0..3 * RANGES_MAX as u64).all(|n| written.touches(at(n), at(n) + 7)));
    }
}
