//! Memory that comes at an address of the caller's choice: fresh, or from another owner.
//!
//! Memory from another owner comes in two steps. First the receiver [makes room](OwnerMemory::make_room): the address is checked and
//! taken, and the bytes are charged, while nothing has left the giver yet; so a refusal changes nothing. When the memory has
//! [left](super::Left) the giver, it is [received](OwnerMemory::receive), which cannot fail. The two owners are never locked together.

use std::sync::{Arc, Weak};

use iommu_types::errors::{AddMemoryError, InvalidField, MemoryOverlaps, Unaligned};
use iommu_types::{GpaRange, PAGE_SIZE_BYTES};

use super::loose::LooseFrames;
use super::region::Region;
use super::{OwnerMemory, gpa_of_page};
use crate::account::OwnerAccount;
use crate::boot::Kernel;
use crate::iova::INTERRUPT_PAGES;

/// What tables of four levels translate, so that every owner's memory fits a domain of the usual width.
const ADDRESS_BITS: u32 = 48;

/// Addresses that wait for memory from another owner.
#[derive(Debug)]
pub(super) struct Arriving {
    pub(super) first: u64,
    pub(super) pages: u64,
    /// Dead when the room was given up.
    room: Weak<()>,
}

impl Arriving {
    pub(super) fn is_awaited(&self) -> bool {
        self.room.strong_count() > 0
    }
}

/// Room in the memory map of an owner, paid for. Dropping it gives it up.
#[must_use = "room that is dropped is given up"]
#[derive(Debug)]
pub struct Room {
    account: Arc<OwnerAccount>,
    range: GpaRange,
    /// What is charged and not yet behind frames.
    charged_bytes: u64,
    token: Arc<()>,
}

impl Room {
    /// Where the memory will be.
    pub fn range(&self) -> GpaRange {
        self.range
    }
    /// Takes the frames in, wiped.
    pub(super) fn fill(mut self, frames: LooseFrames) -> Arrived {
        let bytes = frames.pages() * PAGE_SIZE_BYTES;
        assert!(bytes == self.range.size_bytes(), "room is made for as much as comes");
        self.charged_bytes = 0;
        let frames = frames.give_to(&self.account);
        Arrived { frames, range: self.range, token: Arc::clone(&self.token) }
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.account.memory.refund(self.charged_bytes);
    }
}

/// Memory that is the receiver's and not yet in its memory map. Dropping it frees it.
#[must_use = "memory that is not received is freed"]
#[derive(Debug)]
pub struct Arrived {
    frames: LooseFrames,
    range: GpaRange,
    token: Arc<()>,
}

impl OwnerMemory {
    /// Adds memory at an address, zeroed. Whole pages, below 48 bits, not where devices mean interrupts, and not where memory is. On
    /// an error nothing changes.
    pub fn add_at(&mut self, kernel: &Kernel, range: GpaRange) -> Result<(), AddMemoryError> {
        let (first, pages) = self.check_vacant(range)?;
        self.account.memory.charge(range.size_bytes())?;
        let runs = kernel.frames.allocate_behind(first, pages, self.account.tag());
        let runs = runs.inspect_err(|_| self.account.memory.refund(range.size_bytes()))?;
        self.regions.insert(first, Region::new(runs));
        Ok(())
    }
    /// Makes room for memory of another owner: nothing else comes to these addresses, and the bytes are charged.
    pub fn make_room(&mut self, range: GpaRange) -> Result<Room, AddMemoryError> {
        let (first, pages) = self.check_vacant(range)?;
        self.account.memory.charge(range.size_bytes())?;
        let token = Arc::new(());
        self.arriving.push(Arriving { first, pages, room: Arc::downgrade(&token) });
        let charged_bytes = range.size_bytes();
        Ok(Room { account: Arc::clone(&self.account), range, charged_bytes, token })
    }
    /// Puts memory from another owner where room was made for it.
    pub fn receive(&mut self, arrived: Arrived) -> GpaRange {
        let Arrived { frames, range, token } = arrived;
        let token = Arc::downgrade(&token);
        let awaited = self.arriving.iter().position(|arriving| arriving.room.ptr_eq(&token));
        let Arriving { first, .. } =
            self.arriving.swap_remove(awaited.expect("memory is received by who made room for it"));
        self.regions.insert(first, Region::new(frames.settle()));
        range
    }
    /// First page and pages of a range where memory may come.
    fn check_vacant(&mut self, range: GpaRange) -> Result<(u64, u64), AddMemoryError> {
        check_whole_pages(range)?;
        let refuse = |why: &str| Err(InvalidField { field: "gpa".to_owned(), why: why.to_owned() }.into());
        let (first, last) = (range.base().page_number(), range.last().page_number());
        let (interrupts, after) = INTERRUPT_PAGES;
        if range.last().get() >> ADDRESS_BITS != 0 {
            return refuse("must be within 48 bits, the last byte included");
        }
        if first < after && last >= interrupts {
            return refuse("must not touch FEE0_0000 to FEEF_FFFF, where devices mean interrupts");
        }
        if let Some((at, _)) = self.taken_in(first, last) {
            return Err(MemoryOverlaps { gpa: gpa_of_page(at.max(first)) }.into());
        }
        Ok((first, last - first + 1))
    }
    /// The first piece of what is memory, or waits for some, that reaches into `first..=last`: first page and end.
    pub(super) fn taken_in(&mut self, first: u64, last: u64) -> Option<(u64, u64)> {
        self.arriving.retain(Arriving::is_awaited);
        let before = self.regions.range(..first).next_back();
        let before = before.filter(|(at, region)| **at + region.pages() > first);
        let region = before.or_else(|| self.regions.range(first..=last).next());
        let region = region.map(|(at, region)| (*at, at + region.pages()));
        let awaited = self.arriving.iter().map(|arriving| (arriving.first, arriving.first + arriving.pages));
        awaited.filter(|(at, end)| *at <= last && *end > first).chain(region).min()
    }
}

/// Whether a range is of whole pages.
pub(super) fn check_whole_pages(range: GpaRange) -> Result<(), Unaligned> {
    let alignment = PAGE_SIZE_BYTES;
    for (field, value) in [("gpa", range.base().get()), ("size_bytes", range.size_bytes())] {
        if !value.is_multiple_of(alignment) {
            return Err(Unaligned { field: field.to_owned(), value, alignment });
        }
    }
    Ok(())
}
