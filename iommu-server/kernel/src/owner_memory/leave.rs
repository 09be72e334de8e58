//! Memory that is taken back from its owner, also while it is mapped.
//!
//! In steps, so that whoever takes it back can wait in between with nothing locked:
//!
//! 1. [`begin_leaving`](OwnerMemory::begin_leaving): the memory is marked. From here on nothing new is mapped there, in any mode: a map is
//!    refused with [`MemoryLeaving`]. The CPU of the owner still reads and writes it, and what is mapped still works.
//! 2. Every domain of the owner [revokes](crate::Domain::revoke_memory) what leads there, and its drain is awaited.
//! 3. [`finish_leaving`](OwnerMemory::finish_leaving): without a pin, the pages go out of the memory map. From here on the owner's CPU does not
//!    reach them either, so nothing is written behind the wipe. What comes out is [`Left`].
//! 4. [`Left::free`] or [`Left::transfer`], with nothing locked: the frames are wiped first and change owner then (I9).
//!
//! [`abort_leaving`](OwnerMemory::abort_leaving) ends it after step 1 or 2; a ticket that is lost is taken for aborted. No memory
//! leaves twice: two revocations that overlap cannot both begin.

use std::sync::{Arc, Weak};

use iommu_types::errors::{MemoryLeaving, NotOwned, StillMapped, TakeMemoryError};
use iommu_types::{GpaRange, Hpa, Owner};

use super::arrive::{Arrived, Room, check_whole_pages};
use super::loose::LooseFrames;
use super::region::Region;
use super::{OwnerMemory, gpa_of_page};
use crate::account::OwnerAccount;
use crate::boot::Kernel;
use crate::frames::FrameRun;

/// Pages on their way out.
#[derive(Debug)]
pub(super) struct LeavingPages {
    pages: u64,
    /// Dead when the ticket was lost.
    ticket: Weak<()>,
}

/// A ticket for memory on its way out.
#[must_use = "memory that is leaving takes no map until it has left or is aborted"]
#[derive(Debug)]
pub struct Leaving {
    owner: Owner,
    range: GpaRange,
    token: Arc<()>,
}

impl Leaving {
    /// Whose memory it is.
    pub fn owner(&self) -> Owner {
        self.owner
    }
    /// Which memory.
    pub fn range(&self) -> GpaRange {
        self.range
    }
}

/// Memory that did not leave, and its ticket: it is still leaving.
#[derive(Debug)]
pub struct NotLeft {
    /// The ticket, to try again or to abort.
    pub leaving: Leaving,
    /// Why: [`StillMapped`], or [`NotOwned`] when all memory of the owner was freed meanwhile.
    pub error: TakeMemoryError,
}

/// Memory that nobody reaches any more, the owner's CPU included. Dropping it wipes and frees it.
#[derive(Debug)]
pub struct Left {
    range: GpaRange,
    frames: LooseFrames,
}

impl Left {
    /// Frames that are in no map any more, of an owner who was charged for them.
    pub(super) fn new(
        kernel: &Kernel,
        account: &Arc<OwnerAccount>,
        range: GpaRange,
        runs: Vec<FrameRun>,
    ) -> Self {
        Self { range, frames: LooseFrames::new(kernel, account, runs) }
    }
    /// Where it was.
    pub fn range(&self) -> GpaRange {
        self.range
    }
    /// Wipes the frames and frees them.
    pub fn free(self) -> GpaRange {
        self.range
    }
    /// Wipes the frames and gives them to who made room. The sizes must be equal.
    pub fn transfer(self, room: Room) -> Arrived {
        room.fill(self.frames)
    }
}

impl OwnerMemory {
    /// Says that memory is leaving: no new pin is taken there, and no map made. Whole pages, all of them the owner's, none leaving already.
    pub fn begin_leaving(&mut self, kernel: &Kernel, range: GpaRange) -> Result<Leaving, TakeMemoryError> {
        check_whole_pages(range)?;
        self.forget_lost_tickets(kernel);
        let (first, pages) = (range.base().page_number(), range.pages_touched());
        self.for_parts(range, |_, _, _| {})?;
        self.check_staying(range)?;
        self.mark(kernel, range, true);
        let token = Arc::new(());
        self.leaving.insert(first, LeavingPages { pages, ticket: Arc::downgrade(&token) });
        Ok(Leaving { owner: self.owner(), range, token })
    }
    /// The most pins that any page has which is leaving.
    pub fn pins(&self, kernel: &Kernel, leaving: &Leaving) -> u32 {
        let mut most = 0;
        if self.is_known(leaving) {
            self.for_frames(leaving.range, |_, frame| most = most.max(pins(kernel, frame)));
        }
        most
    }
    /// Memory stays after all, and may be mapped again.
    pub fn abort_leaving(&mut self, kernel: &Kernel, leaving: Leaving) {
        if self.is_known(&leaving) {
            self.leaving.remove(&leaving.range.base().page_number());
            self.mark(kernel, leaving.range, false);
        }
    }
    /// Takes memory without pins out of the map. Where a part of a region leaves, the rest stays where it is. On an error nothing changes.
    pub fn finish_leaving(&mut self, kernel: &Kernel, leaving: Leaving) -> Result<Left, NotLeft> {
        let range = leaving.range;
        if !self.is_known(&leaving) {
            let error = NotOwned { gpa: range.base() }.into();
            return Err(NotLeft { leaving, error });
        }
        let mut pinned = None;
        self.for_frames(range, |page, frame| {
            pinned = pinned.or_else(|| (pins(kernel, frame) > 0).then_some(page));
        });
        if let Some(page) = pinned {
            let error = StillMapped { gpa: gpa_of_page(page) }.into();
            return Err(NotLeft { leaving, error });
        }
        self.leaving.remove(&range.base().page_number());
        let runs = self.cut_out(range);
        Ok(Left::new(kernel, &self.account, range, runs))
    }
    /// Takes pages out of the regions that they are in; returns the frames behind them, in order.
    fn cut_out(&mut self, range: GpaRange) -> Vec<FrameRun> {
        let (first, last) = (range.base().page_number(), range.last().page_number());
        let below = self.regions.range(..=first).next_back().map(|(at, _)| *at);
        let touched: Vec<u64> =
            self.regions.range(below.unwrap_or(first)..=last).map(|(at, _)| *at).collect();
        let mut runs = Vec::new();
        for at in touched {
            let region = self.regions.remove(&at).expect("it was just listed");
            let end = at + region.pages();
            let (from, to) = (at.max(first), end.min(last + 1));
            region.runs_behind(from - at, to - from, |run| runs.push(run));
            if at < from {
                self.regions.insert(at, Region::new(region.part(0, from - at)));
            }
            if to < end {
                self.regions.insert(to, Region::new(region.part(to - at, end - to)));
            }
        }
        runs
    }
    /// Whether memory is leaving, and where first.
    pub(crate) fn check_staying(&self, range: GpaRange) -> Result<(), MemoryLeaving> {
        if self.leaving.is_empty() {
            return Ok(());
        }
        let (first, last) = (range.base().page_number(), range.last().page_number());
        match self.leaving_in(first, last) {
            Some((at, _)) => Err(MemoryLeaving { gpa: gpa_of_page(at.max(first)) }),
            None => Ok(()),
        }
    }
    /// The first leaving pages that share one with `first..=last`, as first page and end.
    fn leaving_in(&self, first: u64, last: u64) -> Option<(u64, u64)> {
        let reaches = |(at, leaving): (&u64, &LeavingPages)| {
            let end = at + leaving.pages;
            (end > first).then_some((*at, end))
        };
        let before = self.leaving.range(..=first).next_back().and_then(reaches);
        before.or_else(|| self.leaving.range(first..=last).next().and_then(reaches))
    }
    /// Every region without what is leaving: what may be mapped, and what a direct map has open.
    pub fn mappable(&self) -> Vec<GpaRange> {
        let mut pieces = Vec::new();
        for (first, region) in &self.regions {
            let (mut at, end) = (*first, first + region.pages());
            while at < end {
                let (leaves, returns) = self.leaving_in(at, end - 1).unwrap_or((end, end));
                if at < leaves {
                    pieces.push(super::pages_range(at, leaves - at));
                }
                at = returns;
            }
        }
        pieces
    }
    fn is_known(&self, leaving: &Leaving) -> bool {
        assert!(leaving.owner == self.owner(), "a ticket is for the memory of one owner");
        let known = self.leaving.get(&leaving.range.base().page_number());
        known.is_some_and(|known| known.ticket.ptr_eq(&Arc::downgrade(&leaving.token)))
    }
    /// Aborts what nobody can finish any more.
    pub(super) fn forget_lost_tickets(&mut self, kernel: &Kernel) {
        let is_lost = |(_, leaving): &(&u64, &LeavingPages)| leaving.ticket.strong_count() == 0;
        let lost = self.leaving.iter().filter(is_lost);
        let lost: Vec<GpaRange> =
            lost.map(|(first, leaving)| super::pages_range(*first, leaving.pages)).collect();
        self.leaving.retain(|_, leaving| leaving.ticket.strong_count() > 0);
        lost.into_iter().for_each(|range| self.mark(kernel, range, false));
    }
    fn mark(&self, kernel: &Kernel, range: GpaRange, leaving: bool) {
        self.for_frames(range, |_, frame| kernel.frames.array().set_leaving(frame, leaving));
    }
    /// Calls `each` with the pages of a range that is the owner's, and the frame behind each.
    fn for_frames(&self, range: GpaRange, mut each: impl FnMut(u64, Hpa)) {
        let mut page = range.base().page_number();
        let owned = self.resolve(range, |run| {
            for frame in run.iter() {
                each(page, frame);
                page += 1;
            }
        });
        owned.expect("what is leaving is in the memory map");
    }
}

fn pins(kernel: &Kernel, frame: Hpa) -> u32 {
    kernel.frames.array().state(frame).map_or(0, |state| state.pins)
}
