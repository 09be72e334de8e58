//! The latest entries of something, numbered: what a reader has seen it does not get again, and it is told how much it missed.

use std::collections::VecDeque;

/// A bounded log. The first entry has sequence number 1.
#[derive(Clone, Debug)]
pub struct SequenceLog<T> {
    capacity: usize,
    entries: VecDeque<T>,
    /// Sequence number before the first entry.
    began_after: u64,
    latest: u64,
    overwritten: u64,
}

impl<T: Clone> SequenceLog<T> {
    /// An empty log of so many entries, of one at least.
    pub fn new(capacity: usize) -> Self {
        Self::after_another(capacity, 0)
    }
    /// The same, with numbers after those of a log whose place it takes: who has read that one misses nothing of this.
    pub fn after_another(capacity: usize, latest: u64) -> Self {
        let (capacity, entries) = (capacity.max(1), VecDeque::new());
        Self { capacity, entries, began_after: latest, latest, overwritten: 0 }
    }
    /// Adds the entry that `entry` makes of its sequence number. When the log is full, the oldest goes.
    pub fn append(&mut self, entry: impl FnOnce(u64) -> T) {
        if self.entries.len() >= self.capacity {
            self.entries.pop_front();
            self.overwritten += 1;
        }
        self.latest += 1;
        self.entries.push_back(entry(self.latest));
    }
    /// The latest entry, unless it was taken out.
    pub fn last_mut(&mut self) -> Option<&mut T> {
        self.entries.back_mut()
    }
    /// Entries with a sequence number after `after`, oldest first and `limit` at most, with how many between are gone.
    pub fn after(&self, after: u64, limit: usize) -> (Vec<T>, u64) {
        let before_oldest = self.latest - self.entries.len() as u64;
        let skip = usize::try_from(after.saturating_sub(before_oldest)).unwrap_or(usize::MAX);
        let missed = before_oldest.saturating_sub(after.max(self.began_after));
        (self.entries.iter().skip(skip).take(limit).cloned().collect(), missed)
    }
    /// Takes out what is there.
    pub fn drain(&mut self) -> Vec<T> {
        self.entries.drain(..).collect()
    }
    /// Sequence number of the latest entry; 0 when there was none.
    pub fn latest(&self) -> u64 {
        self.latest
    }
    /// How many entries were overwritten by later ones.
    pub fn overwritten(&self) -> u64 {
        self.overwritten
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_gets_what_it_has_not_seen_and_hears_what_it_missed() {
        let mut log = SequenceLog::new(3);
        assert_eq!(log.after(0, 10), (vec![], 0));
        for _ in 0..10 {
            log.append(|sequence| sequence);
        }
        for (after, limit, entries, missed) in [
            (0, 10, vec![8, 9, 10], 7),
            (6, 10, vec![8, 9, 10], 1),
            (7, 2, vec![8, 9], 0),
            (9, 10, vec![10], 0),
            (10, 10, vec![], 0),
            (u64::MAX, 10, vec![], 0),
        ] {
            assert_eq!(log.after(after, limit), (entries, missed), "after {after}");
        }
        assert_eq!((log.drain(), log.after(0, 10)), (vec![8, 9, 10], (vec![], 10)));
        log.append(|sequence| sequence);
        assert_eq!((log.after(10, 10), log.latest(), log.overwritten()), ((vec![11], 0), 11, 7));
    }
}
