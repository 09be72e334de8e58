//! The direct map of a passthrough domain: all memory of the owner, at its guest-physical addresses, for reading and writing.
//!
//! The service opens each region that is there when the domain is created and each that comes, and closes one before its memory leaves the
//! owner. A region's entries are superpages where they fit. Table frames are never in it: only what the owner's memory map names.
//!
//! When a part of a region leaves, the map of that region is *cut*: the part goes, the rest stays open all the time, with a record for each
//! piece that is left. Closing it whole and opening the rest after the drain would refuse, for that long, DMA to memory that stays, from
//! devices whose driver did nothing; and opening regions in small pieces from the start would cost a record for each and all superpages of
//! 1 GiB. When a cut wants for records or tables, the region is closed whole after all, because taking memory back must not fail;
//! [`open_missing`](Domain::open_missing) opens the rest again.

use iommu_hardware::memory::{MappingRecord, RecordIndex, RecordState};
use iommu_types::errors::{MapError, OutOfMemory};
use iommu_types::{Gpa, GpaRange, Iova, IovaRange, PAGE_SIZE_BYTES, PageSize, Permissions, RequestId};

use super::domain_api::MapFixed;
use super::undone::{IovaUse, PendingUnmap, Remains, Revoked};
use super::{Domain, Mode, RangeMapping, Shortage};
use crate::boot::Kernel;
use crate::owner_memory::OwnerMemory;

impl Domain {
    /// Whether all memory of the owner is open in it, so that each buffer has to be opened and closed.
    pub fn is_passthrough(&self) -> bool {
        matches!(self.mode, Mode::Passthrough)
    }
    /// Opens a region of the owner, or a part of one, in a passthrough domain.
    pub fn open_direct(
        &mut self,
        kernel: &Kernel,
        memory: &OwnerMemory,
        buffer: GpaRange,
    ) -> Result<(), MapError> {
        assert!(self.is_passthrough(), "only a passthrough domain has a direct map");
        let request = MapFixed {
            iova: IovaRange::new(Iova::new(buffer.base().get()), buffer.size_bytes())?,
            gpa: buffer.base(),
            permissions: Permissions::READ_WRITE,
            request_id: RequestId(0),
        };
        self.map_direct(kernel, memory, request)
    }
    /// Whether a mapping of the DMA API lies in the buffer.
    pub fn uses(&self, kernel: &Kernel, buffer: GpaRange) -> bool {
        let last = buffer.last().get();
        let touches = |index: RecordIndex| {
            let (_, record) = kernel.records.records().get(index);
            record.gpa <= last && record.gpa + (record.size_bytes - 1) >= buffer.base().get()
        };
        // Addresses are those of the memory. A long mapping may begin far below, so all up to the end are looked at.
        let last = Iova::new(last);
        self.ledger
            .from(Iova::new(0))
            .take_while(|(page, _)| *page <= last.page_number())
            .any(|(_, index)| touches(index))
    }
    /// Lets go of memory that its owner takes back: closes it in a direct map, evicts pages that nobody uses, flushes what waits, and waits for
    /// what other calls have begun to flush. What is in use stays, so that the memory is still pinned afterwards.
    pub fn let_go(&mut self, kernel: &Kernel, buffer: GpaRange) -> PendingUnmap {
        match &self.mode {
            Mode::Passthrough => {
                let mut remains = self.unfinished.fresh();
                self.close_direct(kernel, buffer, &mut remains);
                self.invalidate_now(kernel, remains)
            }
            Mode::Identity(_) => {
                self.give_up(kernel, |domain, remains| domain.evict_within(kernel, buffer, remains))
            }
            Mode::Deferred(_) | Mode::Ring(_) | Mode::Bounce(_) => self.give_up(kernel, |_, _| {}),
            // An unmap that is not answered is in use.
            Mode::Strict => PendingUnmap::nothing(self.id),
        }
    }
    /// Gives up everything that it keeps and does not need, when a map ran out of something: flushes, evicts, frees idle shadow buffers, and
    /// waits for what other calls have begun to give up.
    pub fn reclaim(&mut self, kernel: &Kernel) -> PendingUnmap {
        match &self.mode {
            Mode::Identity(_) => self.give_up(kernel, |domain, remains| domain.evict_idle(kernel, remains)),
            Mode::Bounce(_) => {
                self.give_up(kernel, |domain, remains| domain.revoke_idle_shadows(kernel, remains))
            }
            _ => self.give_up(kernel, |_, _| {}),
        }
    }
    /// Puts what `more` revokes, what waits for a flush and what others have not finished under one drain of the whole domain.
    fn give_up(&mut self, kernel: &Kernel, more: impl FnOnce(&mut Self, &mut Remains)) -> PendingUnmap {
        let mut remains = self.unfinished.fresh();
        more(self, &mut remains);
        match &mut self.mode {
            Mode::Deferred(queue) => remains.append(&mut queue.take()),
            Mode::Ring(rings) => rings.take_waiting(&mut remains),
            Mode::Strict | Mode::Passthrough | Mode::Identity(_) | Mode::Bounce(_) => {}
        }
        self.unfinished.take_all(&mut remains);
        if remains.is_empty() {
            self.unfinished.reuse(remains);
            return PendingUnmap::nothing(self.id);
        }
        if let Mode::Ring(_) = self.mode {
            return self.invalidate_rings(kernel, remains);
        }
        self.invalidate_domain(kernel, remains)
    }
    /// Opens all memory of the owner that is not open yet and not leaving. What was opened stays open when something runs out.
    pub fn open_missing(&mut self, kernel: &Kernel, memory: &OwnerMemory) -> Result<(), MapError> {
        for region in memory.mappable() {
            let (mut at, end) = (region.base().page_number(), region.last().page_number() + 1);
            while at < end {
                let (closed_until, open_until) = self.open_part(at, end).unwrap_or((end, end));
                if at < closed_until {
                    let bytes = (closed_until - at) * PAGE_SIZE_BYTES;
                    self.open_direct(kernel, memory, GpaRange::new(Gpa::new(at * PAGE_SIZE_BYTES), bytes)?)?;
                }
                at = open_until;
            }
        }
        Ok(())
    }
    /// The first piece of the direct map that has a page in `from..end`: first page and end.
    fn open_part(&self, from: u64, end: u64) -> Option<(u64, u64)> {
        if from >= end {
            return None;
        }
        let before = self.ranges.range(..from).next_back().filter(|(at, piece)| **at + piece.pages > from);
        let piece = before.or_else(|| self.ranges.range(from..end).next());
        piece.map(|(at, piece)| (*at, at + piece.pages))
    }
    /// Closes memory in the direct map, and leaves open what lies beside it.
    pub(super) fn close_direct(&mut self, kernel: &Kernel, memory: GpaRange, remains: &mut Remains) {
        let (first, end) = (memory.base().page_number(), memory.last().page_number() + 1);
        let mut from = first;
        while let Some((at, piece_end)) = self.open_part(from, end) {
            from = piece_end;
            let piece = self.ranges.remove(&at).expect("it was just found");
            let (cut, cut_end) = (at.max(first), piece_end.min(end));
            let mut rest = [(at, cut - at), (cut_end, piece_end - cut_end)].to_vec();
            rest.retain(|(_, pages)| *pages > 0);
            let is_cut =
                rest.is_empty() || self.cut_direct(kernel, piece.record, &rest, [cut, cut_end]).is_ok();
            let (first, end) = if is_cut { (cut, cut_end) } else { (at, piece_end) };
            let (pages, record) = (end - first, piece.record);
            let revoked =
                Revoked { first, pages, record, size_bytes: pages * PAGE_SIZE_BYTES, iova: IovaUse::Own };
            self.revoke(kernel, revoked, remains);
        }
    }
    /// Makes pieces of their own of what is to stay of a piece, or changes nothing. Its bytes are charged already.
    fn cut_direct(
        &mut self,
        kernel: &Kernel,
        piece: RecordIndex,
        rest: &[(u64, u64)],
        cuts: [u64; 2],
    ) -> Result<(), Shortage> {
        let capabilities = kernel.unit().capabilities();
        if capabilities.pages_1g && !capabilities.pages_2m {
            // A page of 1 GiB would need 512 tables.
            return Err(OutOfMemory { size_bytes: PageSize::Size1G.bytes() }.into());
        }
        self.account.mappings.charge(rest.len() as u64)?;
        let mut records = Vec::new();
        let claimed = rest.iter().try_for_each(|_| {
            records.push(kernel.records.take(&mut self.kept_records)?);
            Ok(())
        });
        let claimed = claimed.and_then(|()| self.tables.reserve_cuts(kernel, &self.account, cuts.len()));
        if let Err(shortage) = claimed {
            records.into_iter().for_each(|record| kernel.records.put(&mut self.kept_records, record));
            self.account.mappings.refund(rest.len() as u64);
            return Err(shortage);
        }
        let (_, whole) = kernel.records.records().get(piece);
        for (&(first, pages), record) in rest.iter().zip(records) {
            let (at, size_bytes) = (first * PAGE_SIZE_BYTES, pages * PAGE_SIZE_BYTES);
            let facts = MappingRecord { iova: at, gpa: at, size_bytes, ..whole };
            kernel.records.records().begin(record, &facts);
            kernel.records.records().set_state(record, RecordState::Live);
            self.ranges.insert(first, RangeMapping { pages, record, is_fixed: true });
        }
        self.counters.mappings += rest.len() as u64;
        self.counters.maps += rest.len() as u64;
        // An edge of the piece is no cut: nothing of it lies on the other side.
        let (begins, ends) =
            (whole.iova / PAGE_SIZE_BYTES, (whole.iova + whole.size_bytes) / PAGE_SIZE_BYTES);
        for cut in cuts.into_iter().filter(|cut| *cut != begins && *cut != ends) {
            self.tables.cut_before(kernel.memory(), cut);
        }
        self.tables.trim(kernel, &self.account);
        Ok(())
    }
}
