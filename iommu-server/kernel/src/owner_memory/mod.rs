//! The memory map of an owner: its memory by guest-physical address, and the frames behind it.
//!
//! An owner names only its own memory, and only through this map (I2). It comes in two ways:
//!
//! - *Buffers* of drivers, at addresses that the server [chooses](OwnerMemory::allocate). They begin at 0x1000 and go up; a page that is never
//!   memory lies behind each, so that running over the end of a buffer is refused instead of reaching the next one; addresses are not used
//!   again, so that a stale one names nothing (an owner that has allocated 4 GiB in all gets addresses beyond a 32-bit device's mask, in
//!   domains that use the memory's own).
//! - Memory of virtual machines, at addresses that their hypervisor chooses ([`arrive`]), and takes back ([`leave`]). Where regions meet, a
//!   range crosses from one into the next.
//!
//! No memory lies at FEEx_xxxx. Memory with pins is not freed and does not leave (I9).

mod arrive;
mod leave;
mod loose;
mod region;

use std::collections::BTreeMap;
use std::sync::Arc;

use iommu_types::errors::{
    AllocateError, DmaMapError, FreeError, InvalidField, MapError, MemoryError, MemoryLeaving, NotAllocated,
    NotOwned, OutOfMemory, StillMapped,
};
use iommu_types::{Gpa, GpaRange, Hpa, Owner, PAGE_SIZE_BYTES};

pub use arrive::{Arrived, Room};
pub use leave::{Leaving, Left, NotLeft};

use crate::account::OwnerAccount;
use crate::boot::Kernel;
use crate::frames::FrameRun;
use crate::iova::INTERRUPT_PAGES;
use arrive::Arriving;
use leave::LeavingPages;
use region::Region;

/// The first page of a buffer; page 0 is none, so that a null address names nothing.
const FIRST_PAGE: u64 = 1;
/// Buffers of at least so many pages begin at a multiple of it.
const PAGES_2M: u64 = 512;

/// The memory map of one owner.
#[derive(Debug)]
pub struct OwnerMemory {
    account: Arc<OwnerAccount>,
    /// By number of the first page.
    regions: BTreeMap<u64, Region>,
    /// By number of the first page.
    leaving: BTreeMap<u64, LeavingPages>,
    arriving: Vec<Arriving>,
    next_page: u64,
}

/// Why no device is to be led to a range.
pub(crate) enum Unmappable {
    NotOwned(NotOwned),
    Leaving(MemoryLeaving),
}

macro_rules! unmappable_into {
    ($($error:ident),*) => { $(
        impl From<Unmappable> for $error {
            fn from(why: Unmappable) -> Self {
                match why {
                    Unmappable::NotOwned(error) => error.into(),
                    Unmappable::Leaving(error) => error.into(),
                }
            }
        }
    )* };
}
unmappable_into!(DmaMapError, MapError);

impl OwnerMemory {
    /// An owner without memory.
    pub fn new(_kernel: &Kernel, account: Arc<OwnerAccount>) -> Self {
        let (regions, leaving) = (BTreeMap::new(), BTreeMap::new());
        Self { account, regions, leaving, arriving: Vec::new(), next_page: FIRST_PAGE }
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
        let first = self.vacant_page(pages, alignment).ok_or(out_of_memory.clone())?;
        let base = Gpa::new(first.checked_mul(PAGE_SIZE_BYTES).ok_or(out_of_memory.clone())?);
        let range = GpaRange::new(base, bytes).map_err(|_| out_of_memory)?;
        self.account.memory.charge(bytes)?;
        let runs = kernel.frames.allocate(pages, self.account.tag());
        let runs = runs.inspect_err(|_| self.account.memory.refund(bytes))?;
        self.regions.insert(first, Region::new(runs));
        self.next_page = first + pages + 1;
        Ok(range)
    }
    /// The first page of the next buffer.
    fn vacant_page(&mut self, pages: u64, alignment: u64) -> Option<u64> {
        let mut first = self.next_page.checked_next_multiple_of(alignment)?;
        loop {
            let last = first.checked_add(pages - 1)?;
            // Devices may be given these very addresses, so no buffer lies where they mean an interrupt.
            let (interrupts, after) = INTERRUPT_PAGES;
            // A page that is no memory is left on both sides.
            let after = match self.taken_in(first - 1, last.checked_add(1)?) {
                _ if first < after && last >= interrupts => after,
                Some((_, end)) => end + 1,
                None => return Some(first),
            };
            first = after.checked_next_multiple_of(alignment)?;
        }
    }
    /// Frees the region that begins at `gpa`: wipes it and gives its frames back. Changes nothing while any of its pages is mapped, or leaving.
    pub fn free(&mut self, kernel: &Kernel, gpa: Gpa) -> Result<GpaRange, FreeError> {
        self.take(kernel, gpa).map(Left::free)
    }
    /// The same in two steps, so that what takes long, the wiping, is done with nothing locked: takes the region out of the map.
    pub fn take(&mut self, kernel: &Kernel, gpa: Gpa) -> Result<Left, FreeError> {
        self.forget_lost_tickets(kernel);
        let first = gpa.page_number();
        let region = self.region_at(gpa).ok_or(NotAllocated { gpa })?;
        self.check_staying(pages_range(first, region.pages()))?;
        let has_pins = |frame: Hpa| kernel.frames.array().state(frame).is_some_and(|state| state.pins > 0);
        if let Some(page) = region.frames().position(has_pins) {
            return Err(StillMapped { gpa: gpa_of_page(first + page as u64) }.into());
        }
        Ok(self.take_out(kernel, first))
    }
    fn region_at(&self, gpa: Gpa) -> Option<&Region> {
        self.regions.get(&gpa.page_number()).filter(|_| gpa.is_aligned(PAGE_SIZE_BYTES))
    }
    /// The most pins that any page of the region beginning at `gpa` has; 0 when there is none.
    pub fn pins_of(&self, kernel: &Kernel, gpa: Gpa) -> u32 {
        let frames = self.region_at(gpa).into_iter().flat_map(Region::frames);
        let states = frames.filter_map(|frame| kernel.frames.array().state(frame));
        states.map(|state| state.pins).max().unwrap_or(0)
    }
    /// Frees all memory, what is leaving included; returns how many bytes. Nothing may be mapped any more. What has [left](Left) already is
    /// not the map's, and what [arrives](Room) may still arrive.
    pub fn free_all(&mut self, kernel: &Kernel) -> u64 {
        self.take_all(kernel).into_iter().map(|left| left.free().size_bytes()).sum()
    }
    /// The same in two steps: takes all memory out of the map.
    pub fn take_all(&mut self, kernel: &Kernel) -> Vec<Left> {
        self.leaving.clear();
        let regions: Vec<u64> = self.regions.keys().copied().collect();
        regions.into_iter().map(|first| self.take_out(kernel, first)).collect()
    }
    fn take_out(&mut self, kernel: &Kernel, first: u64) -> Left {
        let region = self.regions.remove(&first).expect("the region was looked up");
        Left::new(kernel, &self.account, pages_range(first, region.pages()), region.runs().collect())
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
    /// The frames behind the pages that `range` touches, in order. All of it must be memory of the owner (I2); `each` is not called otherwise.
    pub(crate) fn resolve(&self, range: GpaRange, mut each: impl FnMut(FrameRun)) -> Result<(), NotOwned> {
        let (page, pages) = (range.base().page_number(), range.pages_touched());
        // Nearly always in one region.
        if let Some((first, region)) = self.region_over(page)
            && page - first + pages <= region.pages()
        {
            region.runs_behind(page - first, pages, each);
            return Ok(());
        }
        self.for_parts(range, |_, _, _| {})?;
        self.for_parts(range, |region, first, pages| region.runs_behind(first, pages, &mut each))
    }
    /// As [`resolve`](Self::resolve), for a device: memory that is leaving is refused.
    pub(crate) fn resolve_to_map(
        &self,
        range: GpaRange,
        each: impl FnMut(FrameRun),
    ) -> Result<(), Unmappable> {
        self.check_staying(range).map_err(Unmappable::Leaving)?;
        self.resolve(range, each).map_err(Unmappable::NotOwned)
    }
    /// The region that a page lies in, with its first page.
    fn region_over(&self, page: u64) -> Option<(u64, &Region)> {
        let (first, region) = self.regions.range(..=page).next_back()?;
        (page - first < region.pages()).then_some((*first, region))
    }
    /// Calls `each` with the parts of regions that a range touches: the region, the first page in it, and pages. Stops where there is no memory.
    fn for_parts(&self, range: GpaRange, mut each: impl FnMut(&Region, u64, u64)) -> Result<(), NotOwned> {
        let (mut page, end) = (range.base().page_number(), range.last().page_number() + 1);
        while page < end {
            let missing = NotOwned { gpa: gpa_of_page(page).max(range.base()) };
            let (first, region) = self.region_over(page).ok_or(missing)?;
            let pages = (first + region.pages()).min(end) - page;
            each(region, page - first, pages);
            page += pages;
        }
        Ok(())
    }
    /// Every region, by address; of a driver, its buffers.
    pub fn buffers(&self) -> Vec<GpaRange> {
        self.regions.iter().map(|(first, region)| pages_range(*first, region.pages())).collect()
    }
}

fn gpa_of_page(page: u64) -> Gpa {
    Gpa::new(page * PAGE_SIZE_BYTES)
}

fn pages_range(first: u64, pages: u64) -> GpaRange {
    GpaRange::new(gpa_of_page(first), pages * PAGE_SIZE_BYTES).expect("memory of an owner is a range")
}
