//! Which frames are free, and whose the others are.
//!
//! A bitmap over the physical address space, one bit a frame. Buffers come from the bottom, in one run when there is one
//! (aligned to 2 MiB or 1 GiB when they are that large, so that superpages can map them) and in pieces otherwise; page
//! tables come from the top, so that they do not break up the runs.
//!
//! **Promises:** a free frame holds zeros (frames are wiped when they are freed, before anybody else can get them), and the
//! frame array says at every moment who owns a frame: a frame changes owner only with zero pins (I9).

use std::sync::{Arc, Mutex, MutexGuard};

use iommu_hardware::memory::{FrameArray, OWNER_NONE, OWNER_SERVER, PhysicalMemory};
use iommu_types::errors::OutOfMemory;
use iommu_types::{Hpa, HpaRange, PAGE_SIZE_BYTES};

/// Frames in a 2 MiB page.
const FRAMES_2M: u64 = 512;
/// Frames in a 1 GiB page.
const FRAMES_1G: u64 = 512 * 512;

/// Neighbouring frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FrameRun {
    pub(crate) base: Hpa,
    pub(crate) frames: u64,
}

impl FrameRun {
    /// The frames one by one.
    pub(crate) fn iter(self) -> impl Iterator<Item = Hpa> {
        (0..self.frames).map(move |frame| frame_at(self.base, frame))
    }
    fn range(self) -> HpaRange {
        HpaRange::new(self.base, self.frames * PAGE_SIZE_BYTES).expect("a run has frames and lies in memory")
    }
}

/// The address of the `frame`th frame from `base`. Frames of ours lie in memory, so the sum fits.
pub(crate) fn frame_at(base: Hpa, frame: u64) -> Hpa {
    base.checked_add(frame * PAGE_SIZE_BYTES).expect("frames lie within physical memory")
}

/// Appends a run, merged with the one before when they touch.
pub(crate) fn append(frames: &mut Vec<FrameRun>, run: FrameRun) {
    match frames.last_mut() {
        Some(last) if last.base.checked_add(last.frames * PAGE_SIZE_BYTES) == Some(run.base) => {
            last.frames += run.frames;
        }
        _ => frames.push(run),
    }
}

/// The allocator over all of physical memory.
pub(crate) struct FrameAllocator {
    memory: Arc<PhysicalMemory>,
    array: FrameArray,
    free: Mutex<FreeFrames>,
}

impl FrameAllocator {
    /// Everything is free but `reserved`, which becomes the server's.
    pub(crate) fn new(memory: Arc<PhysicalMemory>, array: FrameArray, reserved: FrameRun) -> Self {
        let mut free = FreeFrames::default();
        for range in memory.ranges() {
            free.give(range.base().page_number(), range.size_bytes() / PAGE_SIZE_BYTES);
        }
        free.take(reserved.base.page_number(), reserved.frames);
        let allocator = Self { memory, array, free: Mutex::new(free) };
        allocator.hand_over(reserved, OWNER_NONE, OWNER_SERVER);
        allocator
    }
    pub(crate) fn array(&self) -> &FrameArray {
        &self.array
    }
    pub(crate) fn free_bytes(&self) -> u64 {
        self.lock().count * PAGE_SIZE_BYTES
    }
    /// Frames for `tag`, in as few runs as there are; zeroed.
    pub(crate) fn allocate(&self, frames: u64, tag: u32) -> Result<Vec<FrameRun>, OutOfMemory> {
        let runs = self.lock().take_runs(frames);
        let runs = runs.ok_or(OutOfMemory { size_bytes: frames.saturating_mul(PAGE_SIZE_BYTES) })?;
        for run in &runs {
            self.hand_over(*run, OWNER_NONE, tag);
        }
        Ok(runs)
    }
    /// Frames for `tag` behind pages from `first_page` on, zeroed: where addresses allow superpages, so do the frames, as far as there
    /// are such frames.
    pub(crate) fn allocate_behind(
        &self,
        first_page: u64,
        frames: u64,
        tag: u32,
    ) -> Result<Vec<FrameRun>, OutOfMemory> {
        let runs = self.lock().take_behind(first_page, frames);
        let runs = runs.ok_or(OutOfMemory { size_bytes: frames.saturating_mul(PAGE_SIZE_BYTES) })?;
        for run in &runs {
            self.hand_over(*run, OWNER_NONE, tag);
        }
        Ok(runs)
    }
    /// Wipes the frames and gives them from one owner to another. They must have no pins (I9).
    pub(crate) fn transfer(&self, run: FrameRun, from: u32, to: u32) {
        self.memory.zero(run.range()).expect("frames of ours lie in memory");
        self.hand_over(run, from, to);
    }
    /// One frame for a table of the server; zeroed.
    pub(crate) fn allocate_table(&self) -> Result<Hpa, OutOfMemory> {
        let number = self.lock().take_highest().ok_or(OutOfMemory { size_bytes: PAGE_SIZE_BYTES })?;
        let base = Hpa::new(number * PAGE_SIZE_BYTES);
        self.hand_over(FrameRun { base, frames: 1 }, OWNER_NONE, OWNER_SERVER);
        Ok(base)
    }
    /// Two neighbouring frames for tables of the server; zeroed.
    pub(crate) fn allocate_table_pair(&self) -> Result<Hpa, OutOfMemory> {
        let size_bytes = 2 * PAGE_SIZE_BYTES;
        let number = self.lock().take_highest_pair().ok_or(OutOfMemory { size_bytes })?;
        let base = Hpa::new(number * PAGE_SIZE_BYTES);
        self.hand_over(FrameRun { base, frames: 2 }, OWNER_NONE, OWNER_SERVER);
        Ok(base)
    }
    /// Neighbouring frames for a table of the server; zeroed.
    pub(crate) fn allocate_table_run(&self, frames: u64) -> Result<FrameRun, OutOfMemory> {
        self.allocate_run(frames, OWNER_SERVER)
    }
    /// Neighbouring frames for `tag`; zeroed.
    pub(crate) fn allocate_run(&self, frames: u64, tag: u32) -> Result<FrameRun, OutOfMemory> {
        let first = self.lock().take_run(frames);
        let first = first.ok_or(OutOfMemory { size_bytes: frames.saturating_mul(PAGE_SIZE_BYTES) })?;
        let run = FrameRun { base: Hpa::new(first * PAGE_SIZE_BYTES), frames };
        self.hand_over(run, OWNER_NONE, tag);
        Ok(run)
    }
    /// Wipes the frames and makes them free. They must have no pins (I9).
    pub(crate) fn free(&self, run: FrameRun, tag: u32) {
        self.memory.zero(run.range()).expect("frames of ours lie in memory");
        self.hand_over(run, tag, OWNER_NONE);
        self.lock().give(run.base.page_number(), run.frames);
    }
    pub(crate) fn free_table_run(&self, run: FrameRun) {
        self.free(run, OWNER_SERVER);
    }
    pub(crate) fn free_table(&self, table: Hpa) {
        self.free(FrameRun { base: table, frames: 1 }, OWNER_SERVER);
    }
    fn hand_over(&self, run: FrameRun, from: u32, to: u32) {
        for frame in run.iter() {
            self.array
                .transfer(frame, from, to)
                .expect("I9: a frame changes owner without pins, from its owner");
        }
    }
    fn lock(&self) -> MutexGuard<'_, FreeFrames> {
        self.free.lock().expect("nothing panics while it holds the map of free frames")
    }
}

/// One bit per frame number, set when the frame is free. Frames that do not exist are never free.
#[derive(Default)]
struct FreeFrames {
    words: Vec<u64>,
    count: u64,
    /// No word below has a free frame.
    lowest_word: usize,
    /// No word from here on has a free frame.
    words_end: usize,
}

impl FreeFrames {
    fn give(&mut self, first: u64, frames: u64) {
        let end = first + frames;
        let words = end.div_ceil(64) as usize;
        if self.words.len() < words {
            self.words.resize(words, 0);
        }
        for frame in first..end {
            let word = &mut self.words[(frame / 64) as usize];
            assert!(*word & 1 << (frame % 64) == 0, "a frame is freed once");
            *word |= 1 << (frame % 64);
        }
        self.count += frames;
        self.lowest_word = self.lowest_word.min((first / 64) as usize);
        self.words_end = self.words_end.max(words);
    }
    fn take(&mut self, first: u64, frames: u64) {
        for frame in first..first + frames {
            let word = &mut self.words[(frame / 64) as usize];
            assert!(*word & 1 << (frame % 64) != 0, "only a free frame is taken");
            *word &= !(1 << (frame % 64));
        }
        self.count -= frames;
    }
    fn take_highest(&mut self) -> Option<u64> {
        let word = (self.lowest_word..self.words_end).rev().find(|word| self.words[*word] != 0);
        self.words_end = word.map_or(self.lowest_word, |word| word + 1);
        let word = word?;
        let frame = word as u64 * 64 + u64::from(63 - self.words[word].leading_zeros());
        self.take(frame, 1);
        Some(frame)
    }
    /// The highest two free frames of which the first is even: then a pair lies in one word.
    fn take_highest_pair(&mut self) -> Option<u64> {
        const EVEN: u64 = 0x5555_5555_5555_5555;
        let pairs = |word: u64| word & word >> 1 & EVEN;
        let word = (self.lowest_word..self.words_end).rev().find(|word| pairs(self.words[*word]) != 0)?;
        let frame = word as u64 * 64 + u64::from(63 - pairs(self.words[word]).leading_zeros());
        self.take(frame, 2);
        Some(frame)
    }
    /// One run of so many frames, the lowest that there is.
    fn take_run(&mut self, frames: u64) -> Option<u64> {
        if frames > self.count {
            return None;
        }
        let first = self.first_run(frames, 1)?;
        self.take(first, frames);
        Some(first)
    }
    fn take_runs(&mut self, frames: u64) -> Option<Vec<FrameRun>> {
        if frames > self.count {
            return None;
        }
        self.lowest_word = self
            .next_free(self.lowest_word as u64 * 64)
            .map_or(self.words_end, |frame| (frame / 64) as usize);
        for alignment in [FRAMES_1G, FRAMES_2M, 1] {
            if alignment > frames {
                continue;
            }
            if let Some(first) = self.first_run(frames, alignment) {
                self.take(first, frames);
                return Some(vec![FrameRun { base: Hpa::new(first * PAGE_SIZE_BYTES), frames }]);
            }
        }
        Some(self.take_pieces(frames))
    }
    /// Frames behind pages from `first_page` on: those of whole 2 MiB in one run, or at least each 2 MiB in one.
    fn take_behind(&mut self, first_page: u64, frames: u64) -> Option<Vec<FrameRun>> {
        if frames > self.count {
            return None;
        }
        let head = (first_page.next_multiple_of(FRAMES_2M) - first_page).min(frames);
        let (mut runs, mut left) = (self.take_pieces(head), frames - head);
        let run = |first: u64, frames| FrameRun { base: Hpa::new(first * PAGE_SIZE_BYTES), frames };
        let is_1g = (first_page + head).is_multiple_of(FRAMES_1G) && left >= FRAMES_1G;
        let aligned = is_1g.then(|| self.first_run(left, FRAMES_1G)).flatten();
        let aligned =
            aligned.or_else(|| (left >= FRAMES_2M).then(|| self.first_run(left, FRAMES_2M)).flatten());
        if let Some(first) = aligned {
            self.take(first, left);
            append(&mut runs, run(first, left));
            return Some(runs);
        }
        while left >= FRAMES_2M
            && let Some(first) = self.first_run(FRAMES_2M, FRAMES_2M)
        {
            self.take(first, FRAMES_2M);
            append(&mut runs, run(first, FRAMES_2M));
            left -= FRAMES_2M;
        }
        runs.extend(self.take_pieces(left));
        Some(runs)
    }
    /// The lowest frames that are free, whatever their neighbours; there must be enough.
    fn take_pieces(&mut self, frames: u64) -> Vec<FrameRun> {
        let mut runs = Vec::new();
        let mut left = frames;
        let mut at = self.lowest_word as u64 * 64;
        while left > 0 {
            let first = self.next_free(at).expect("the count of free frames is right");
            at = self.next_taken(first, first + left);
            self.take(first, at - first);
            left -= at - first;
            runs.push(FrameRun { base: Hpa::new(first * PAGE_SIZE_BYTES), frames: at - first });
        }
        runs
    }
    fn first_run(&self, frames: u64, alignment: u64) -> Option<u64> {
        let mut at = self.next_free(self.lowest_word as u64 * 64)?;
        loop {
            let first = at.next_multiple_of(alignment);
            let end = first + frames;
            if end > self.words.len() as u64 * 64 {
                return None;
            }
            let taken = self.next_taken(first, end);
            if taken == end {
                return Some(first);
            }
            at = self.next_free(taken)?;
        }
    }
    fn next_free(&self, from: u64) -> Option<u64> {
        let mut word = (from / 64) as usize;
        let mut bits = self.words.get(word)? & (u64::MAX << (from % 64));
        while bits == 0 {
            word += 1;
            bits = *self.words.get(word)?;
        }
        Some(word as u64 * 64 + u64::from(bits.trailing_zeros()))
    }
    /// The first frame in `from..end` that is taken, or `end`.
    fn next_taken(&self, from: u64, end: u64) -> u64 {
        let mut at = from;
        while at < end {
            let taken = !self.words[(at / 64) as usize] & (u64::MAX << (at % 64));
            if taken != 0 {
                return (at / 64 * 64 + u64::from(taken.trailing_zeros())).min(end);
            }
            at = (at / 64 + 1) * 64;
        }
        end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn free_frames(ranges: &[(u64, u64)]) -> FreeFrames {
        let mut free = FreeFrames::default();
        for (first, frames) in ranges {
            free.give(*first, *frames);
        }
        free
    }

    fn check(ranges: &[(u64, u64)], frames: u64, expected: Option<&[(u64, u64)]>) {
        let mut free = free_frames(ranges);
        let before = free.count;
        let runs = free
            .take_runs(frames)
            .map(|runs| runs.iter().map(|run| (run.base.page_number(), run.frames)).collect::<Vec<_>>());
        assert_eq!(runs.as_deref(), expected, "{ranges:?} {frames}");
        for (first, frames) in runs.unwrap_or_default() {
            free.give(first, frames);
        }
        assert_eq!(free.count, before);
    }

    #[test]
    fn a_buffer_is_one_run_when_there_is_one() {
        check(&[(1, 3), (10, 100)], 4, Some(&[(10, 4)]));
        check(&[(60, 10)], 10, Some(&[(60, 10)]));
        check(&[(1, 3), (10, 2)], 4, Some(&[(1, 3), (10, 1)]));
        check(&[(1, 3)], 4, None);
    }

    #[test]
    fn a_large_buffer_is_aligned_for_superpages_when_it_can_be() {
        check(&[(1, 2000)], 600, Some(&[(512, 600)]));
        check(&[(1, 1100)], 600, Some(&[(1, 600)]));
        check(&[(3, 1 << 19)], 1 << 18, Some(&[(1 << 18, 1 << 18)]));
    }

    fn check_behind(free: &[(u64, u64)], first_page: u64, frames: u64, expected: &[(u64, u64)]) {
        let mut free = free_frames(free);
        let runs = free.take_behind(first_page, frames).expect("there are enough");
        let runs: Vec<_> = runs.iter().map(|run| (run.base.page_number(), run.frames)).collect();
        assert_eq!(runs, expected, "{frames} behind {first_page}");
    }

    #[test]
    fn frames_behind_addresses_allow_superpages_where_the_addresses_do() {
        check_behind(&[(1, 2000)], 512, 600, &[(512, 600)]);
        check_behind(&[(1, 2000)], 510, 514, &[(1, 2), (512, 512)]);
        check_behind(&[(1, 2000)], 510, 2, &[(1, 2)]);
        check_behind(&[(3, 1 << 19)], 1 << 18, 1 << 18, &[(1 << 18, 1 << 18)]);
        // In pieces, and each 2 MiB is one where it can be.
        check_behind(&[(1, 1), (512, 512), (2048, 600)], 0, 1025, &[(512, 512), (2048, 512), (1, 1)]);
        check_behind(&[(1, 500), (600, 400), (1536, 512)], 0, 1024, &[(1536, 512), (1, 500), (600, 12)]);
        assert_eq!(free_frames(&[(1, 5)]).take_behind(0, 6), None);
    }

    #[test]
    fn a_pair_is_two_neighbours_from_the_top() {
        let mut free = free_frames(&[(5, 5), (126, 3)]);
        let pairs: Vec<_> = std::iter::from_fn(|| free.take_highest_pair()).collect();
        assert_eq!(pairs, [126, 8, 6], "128 and 5 have no even neighbour");
        assert_eq!(free.count, 2);
    }

    #[test]
    fn tables_come_from_the_top_until_nothing_is_left() {
        let mut free = free_frames(&[(5, 2), (700, 1)]);
        assert_eq!(std::iter::from_fn(|| free.take_highest()).collect::<Vec<_>>(), [700, 6, 5]);
        free.give(5, 1);
        assert_eq!(free.take_highest(), Some(5));
        assert_eq!(free.count, 0);
    }
}
