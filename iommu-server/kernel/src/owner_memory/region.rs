//! One piece of an owner's memory: neighbouring pages, and the frames behind them.

use iommu_types::Hpa;

use crate::frames::{FrameRun, append, frame_at};

/// Neighbouring pages of an owner.
#[derive(Debug)]
pub(super) struct Region {
    pages: u64,
    /// By the page of the region that each begins at.
    runs: Vec<(u64, FrameRun)>,
}

impl Region {
    /// A region with these frames behind it. They are merged where they are neighbours.
    pub(super) fn new(frames: impl IntoIterator<Item = FrameRun>) -> Self {
        let mut merged = Vec::new();
        frames.into_iter().for_each(|run| append(&mut merged, run));
        let mut pages = 0;
        let numbered = |run: FrameRun| {
            let first = pages;
            pages += run.frames;
            (first, run)
        };
        let runs = merged.into_iter().map(numbered).collect();
        Self { pages, runs }
    }
    pub(super) fn pages(&self) -> u64 {
        self.pages
    }
    /// Calls `each` with the runs of frames behind `pages` pages from the `first`th.
    pub(super) fn runs_behind(&self, first: u64, pages: u64, mut each: impl FnMut(FrameRun)) {
        assert!(first + pages <= self.pages, "a region has a frame for each of its pages");
        let from = self.runs.partition_point(|(begins, run)| begins + run.frames <= first);
        let (mut at, end) = (first, first + pages);
        for (begins, run) in &self.runs[from..] {
            if at == end {
                return;
            }
            let frames = (begins + run.frames).min(end) - at;
            each(FrameRun { base: frame_at(run.base, at - begins), frames });
            at += frames;
        }
    }
    /// The runs of frames behind `pages` pages from the `first`th.
    pub(super) fn part(&self, first: u64, pages: u64) -> Vec<FrameRun> {
        let mut runs = Vec::new();
        self.runs_behind(first, pages, |run| runs.push(run));
        runs
    }
    pub(super) fn runs(&self) -> impl Iterator<Item = FrameRun> {
        self.runs.iter().map(|(_, run)| *run)
    }
    pub(super) fn frames(&self) -> impl Iterator<Item = Hpa> {
        self.runs().flat_map(FrameRun::iter)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(number: u64, frames: u64) -> FrameRun {
        FrameRun { base: Hpa::new(number << 12), frames }
    }

    #[test]
    fn the_frames_behind_a_part_are_those_of_its_pages() {
        let region = Region::new([run(10, 2), run(12, 1), run(5, 4), run(20, 1)]);
        let all = [10, 11, 12, 5, 6, 7, 8, 20];
        assert_eq!((region.pages(), region.runs.len()), (8, 3));
        for first in 0..8 {
            for pages in 1..=8 - first {
                let part = region.part(first, pages);
                let frames: Vec<_> =
                    part.into_iter().flat_map(FrameRun::iter).map(|frame| frame.page_number()).collect();
                let (from, to) = (first as usize, (first + pages) as usize);
                assert_eq!(frames, all[from..to], "{pages} from {first}");
            }
        }
    }
}
