//! Sets of pages, by runs. Pages are counted by number, so that the end of the last one of an address space is a number too.

use std::collections::BTreeMap;

use iommu_types::GpaRange;

/// A set of pages: the first of each run to how many it has. Runs that touch are one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct PageRuns(BTreeMap<u64, u64>);

impl PageRuns {
    /// The pages of ranges of whole pages. One that is in two of them is there once.
    pub(crate) fn of(ranges: &[GpaRange]) -> Self {
        let mut runs = Self::default();
        for range in ranges {
            let (first, count) = (range.base().page_number(), range.pages_touched());
            runs.remove(first, count);
            runs.add(first, count);
        }
        runs
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, u64)> {
        self.0.iter().map(|(first, count)| (*first, *count))
    }

    /// Whether every page that a range touches is there.
    pub(crate) fn cover(&self, range: GpaRange) -> bool {
        let (first, count) = (range.base().page_number(), range.pages_touched());
        let run = self.0.range(..=first).next_back();
        run.is_some_and(|(run, pages)| run + pages >= first + count)
    }

    /// Adds pages that are not there yet.
    pub(crate) fn add(&mut self, mut first: u64, mut count: u64) {
        if let Some((&before, &pages)) = self.0.range(..first).next_back()
            && before + pages == first
        {
            self.0.remove(&before);
            (first, count) = (before, count + pages);
        }
        if let Some(pages) = self.0.remove(&(first + count)) {
            count += pages;
        }
        self.0.insert(first, count);
    }

    /// Without the pages from `first` on; those of them that are not there are no loss.
    pub(crate) fn remove(&mut self, first: u64, count: u64) {
        for (run, pages) in self.overlapping(first, count) {
            self.0.remove(&run);
            if run < first {
                self.0.insert(run, first - run);
            }
            if run + pages > first + count {
                self.0.insert(first + count, run + pages - (first + count));
            }
        }
    }

    /// The runs that have pages among those from `first` on.
    pub(crate) fn overlapping(&self, first: u64, count: u64) -> Vec<(u64, u64)> {
        let before = self.0.range(..first).next_back().filter(|(run, pages)| *run + *pages > first);
        before
            .into_iter()
            .chain(self.0.range(first..first + count))
            .map(|(run, pages)| (*run, *pages))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use iommu_types::Gpa;

    use super::*;

    #[test]
    fn a_range_is_covered_when_all_its_pages_are_there() {
        let range = |gpa, size_bytes| GpaRange::new(Gpa::new(gpa), size_bytes).expect("a range");
        let runs = PageRuns::of(&[range(0x1000, 0x1000), range(0x2000, 0x1000), range(0x8000, 0x1000)]);
        for (gpa, size_bytes, covered) in [
            (0x1000, 0x2000, true),
            (0x1fff, 2, true),
            (0x2fff, 1, true),
            (0x2fff, 2, false),
            (0xfff, 1, false),
            (0xfff, 2, false),
            (0x8800, 0x800, true),
            (0x2000, 0x7000, false),
            (u64::MAX, 1, false),
        ] {
            assert_eq!(runs.cover(range(gpa, size_bytes)), covered, "{gpa:#x} {size_bytes:#x}");
        }
    }
}
