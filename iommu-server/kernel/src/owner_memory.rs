//! The memory map of an owner: its buffers by guest-physical address, and the frames behind them.
//!
//! An owner names only its own memory, and only through this map (I2). Buffers begin at 0x1000 and go up; a page that is
//! never memory lies behind each, so that running over the end of a buffer is refused instead of reaching the next one;
//! addresses are not used again, so that a stale one names nothing (an owner that has allocated 4 GiB in all gets addresses beyond a
//! 32-bit device's mask, in domains that use the memory's own). No buffer lies at FEEx_xxxx. A buffer with pins is not freed (I9).

use std::collections::BTreeMap;
use std::sync::Arc;

use iommu_types::errors::{AllocateError, FreeError, InvalidField, MemoryError, NotAllocated, NotOwned};
use iommu_types::errors::{OutOfMemory, StillMapped};
use iommu_types::{Gpa, GpaRange, Hpa, Owner, PAGE_SIZE_BYTES};

use crate::account::OwnerAccount;
use crate::boot::Kernel;
use crate::frames::{FrameRun, frame_at};
use crate::iova::INTERRUPT_PAGES;

/// The first page that is memory; page 0 is never used.
const FIRST_PAGE: u64 = 1;
/// Buffers of at least so many pages begin at a multiple of it.
const PAGES_2M: u64 = 512;

/// The memory map of one owner.
#[derive(Debug)]
pub struct OwnerMemory {
    account: Arc<OwnerAccount>,
    /// By number of the first page.
    buffers: BTreeMap<u64, Buffer>,
    next_page: u64,
}

#[derive(Debug)]
struct Buffer {
    pages: u64,
    runs: Vec<FrameRun>,
}

impl Buffer {
    /// Calls `each` with the runs of frames behind `pages` pages from the `first`th.
    fn runs_behind(&self, first: u64, pages: u64, mut each: impl FnMut(FrameRun)) {
        let (mut skip, mut left) = (first, pages);
        for run in &self.runs {
            if skip >= run.frames {
                skip -= run.frames;
                continue;
            }
            let frames = left.min(run.frames - skip);
            each(FrameRun { base: frame_at(run.base, skip), frames });
            (skip, left) = (0, left - frames);
            if left == 0 {
                return;
            }
        }
        assert!(left == 0, "a buffer has a frame for each of its pages");
    }
    fn frames(&self) -> impl Iterator<Item = Hpa> {
        self.runs.iter().flat_map(|run| run.iter())
    }
}

impl OwnerMemory {
    /// An owner without memory.
    pub fn new(_kernel: &Kernel, account: Arc<OwnerAccount>) -> Self {
        Self { account, buffers: BTreeMap::new(), next_page: FIRST_PAGE }
    }
    /// Whose memory it is.
    pub fn owner(&self) -> Owner {
        self.account.owner()
    }
    /// Allocates a buffer of whole pages (the size is rounded up), zeroed.
    pub fn allocate(&mut self, kernel: &Kernel, size_bytes: u64) -> Result<GpaRange, AllocateError> {
        if size_bytes == 0 {
            let why = "must be at least one byte".to_owned();
            return Err(InvalidField { field: "size_bytes".to_owned(), why }.into());
        }
        let pages = size_bytes.div_ceil(PAGE_SIZE_BYTES);
        let out_of_memory = OutOfMemory { size_bytes };
        let bytes = pages.checked_mul(PAGE_SIZE_BYTES).ok_or(out_of_memory.clone())?;
        let alignment = if pages >= PAGES_2M { PAGES_2M } else { 1 };
        let first = self.next_page.checked_next_multiple_of(alignment).ok_or(out_of_memory.clone())?;
        // Devices may be given these very addresses, so no buffer lies where they mean an interrupt.
        let (interrupts, after) = INTERRUPT_PAGES;
        let meets_interrupts = first < after && first.saturating_add(pages) > interrupts;
        let first = if meets_interrupts { after.next_multiple_of(alignment) } else { first };
        let base = Gpa::new(first.checked_mul(PAGE_SIZE_BYTES).ok_or(out_of_memory.clone())?);
        let range = GpaRange::new(base, bytes).map_err(|_| out_of_memory)?;
        self.account.memory.charge(bytes)?;
        let runs = kernel.frames.allocate(pages, self.account.tag());
        let runs = runs.inspect_err(|_| self.account.memory.refund(bytes))?;
        self.buffers.insert(first, Buffer { pages, runs });
        self.next_page = first + pages + 1;
        Ok(range)
    }
    /// Frees the buffer that begins at `gpa`: wipes it and gives its frames back. Changes nothing while any of its pages is mapped.
    pub fn free(&mut self, kernel: &Kernel, gpa: Gpa) -> Result<GpaRange, FreeError> {
        let first = gpa.page_number();
        let buffer = self.buffers.get(&first).filter(|_| gpa.is_aligned(PAGE_SIZE_BYTES));
        let buffer = buffer.ok_or(NotAllocated { gpa })?;
        let has_pins = |frame: Hpa| kernel.frames.array().state(frame).is_some_and(|state| state.pins > 0);
        if let Some(page) = buffer.frames().position(has_pins) {
            return Err(StillMapped { gpa: gpa_of_page(first + page as u64) }.into());
        }
        Ok(self.give_back(kernel, first))
    }
    /// The most pins that any page of the buffer beginning at `gpa` has; 0 when there is none.
    pub fn pins_of(&self, kernel: &Kernel, gpa: Gpa) -> u32 {
        let buffer = self.buffers.get(&gpa.page_number()).filter(|_| gpa.is_aligned(PAGE_SIZE_BYTES));
        let frames = buffer.into_iter().flat_map(Buffer::frames);
        frames
            .filter_map(|frame| kernel.frames.array().state(frame))
            .map(|state| state.pins)
            .max()
            .unwrap_or(0)
    }
    /// Frees every buffer; returns how many bytes. Nothing may be mapped any more.
    pub fn free_all(&mut self, kernel: &Kernel) -> u64 {
        let before = self.account.memory_bytes();
        while let Some((&first, _)) = self.buffers.first_key_value() {
            self.give_back(kernel, first);
        }
        before - self.account.memory_bytes()
    }
    fn give_back(&mut self, kernel: &Kernel, first: u64) -> GpaRange {
        let buffer = self.buffers.remove(&first).expect("the buffer was looked up");
        for run in &buffer.runs {
            kernel.frames.free(*run, self.account.tag());
        }
        let range = buffer_range(first, &buffer);
        self.account.memory.refund(range.size_bytes());
        range
    }
    /// Reads as the CPU does: aligned 8-byte units are atomic. All or nothing.
    pub fn read(&self, kernel: &Kernel, gpa: Gpa, into: &mut [u8]) -> Result<(), MemoryError> {
        self.for_pieces(gpa, into.len(), |at, piece| kernel.memory().read_units(at, &mut into[piece]))
    }
    /// Writes as the CPU does: aligned 8-byte units are atomic. All or nothing.
    pub fn write(&self, kernel: &Kernel, gpa: Gpa, from: &[u8]) -> Result<(), MemoryError> {
        self.for_pieces(gpa, from.len(), |at, piece| kernel.memory().write_units(at, &from[piece]))
    }
    fn for_pieces<E: std::fmt::Debug>(
        &self,
        gpa: Gpa,
        size_bytes: usize,
        mut copy: impl FnMut(Hpa, std::ops::Range<usize>) -> Result<(), E>,
    ) -> Result<(), MemoryError> {
        if size_bytes == 0 {
            return Ok(());
        }
        let range = GpaRange::new(gpa, size_bytes as u64)?;
        let mut offset = gpa.page_offset();
        let mut done = 0;
        self.resolve(range, |run| {
            let at = run.base.checked_add(offset).expect("frames lie within physical memory");
            let piece = (run.frames * PAGE_SIZE_BYTES - offset).min((size_bytes - done) as u64) as usize;
            copy(at, done..done + piece).expect("frames of an owner lie in memory");
            done += piece;
            offset = 0;
        })?;
        Ok(())
    }
    /// The frames behind the pages that `range` touches, in order. All of it must lie in one buffer (I2).
    pub(crate) fn resolve(&self, range: GpaRange, each: impl FnMut(FrameRun)) -> Result<(), NotOwned> {
        let page = range.base().page_number();
        let below = self.buffers.range(..=page).next_back();
        let (&first, buffer) = below.ok_or(NotOwned { gpa: range.base() })?;
        let end = first + buffer.pages;
        if page >= end {
            return Err(NotOwned { gpa: range.base() });
        }
        if range.last().page_number() >= end {
            return Err(NotOwned { gpa: gpa_of_page(end) });
        }
        buffer.runs_behind(page - first, range.pages_touched(), each);
        Ok(())
    }
    /// Every buffer, by address.
    pub fn buffers(&self) -> Vec<GpaRange> {
        self.buffers.iter().map(|(first, buffer)| buffer_range(*first, buffer)).collect()
    }
}

fn gpa_of_page(page: u64) -> Gpa {
    Gpa::new(page * PAGE_SIZE_BYTES)
}

fn buffer_range(first: u64, buffer: &Buffer) -> GpaRange {
    GpaRange::new(gpa_of_page(first), buffer.pages * PAGE_SIZE_BYTES)
        .expect("it was checked at its allocation")
}
