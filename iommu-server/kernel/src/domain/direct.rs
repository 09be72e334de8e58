//! The direct map of a passthrough domain: every buffer of the owner, at its guest-physical address, for reading and writing.
//!
//! The service opens each buffer that is there when the domain is created and each that comes, and closes one before its memory leaves the
//! owner. A buffer's entries are superpages where they fit. Table frames are never in it: only what the owner's memory map names.

use iommu_types::errors::MapError;
use iommu_types::{GpaRange, Iova, IovaRange, PAGE_SIZE_BYTES, Permissions, RequestId};

use super::domain_api::MapFixed;
use super::undone::{IovaUse, PendingUnmap, Remains, Revoked};
use super::{Domain, Mode, RangeMapping};
use crate::boot::Kernel;
use crate::owner_memory::OwnerMemory;

impl Domain {
    /// Whether all memory of the owner is open in it, so that each buffer has to be opened and closed.
    pub fn is_passthrough(&self) -> bool {
        matches!(self.mode, Mode::Passthrough)
    }
    /// Opens a buffer of the owner in a passthrough domain.
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
        let touches = |index| {
            let (_, record) = kernel.records.records().get(index);
            record.gpa <= last && record.gpa + (record.size_bytes - 1) >= buffer.base().get()
        };
        // Addresses are those of the memory, and a mapping lies in one buffer: the nearest below its end is in it, or none is.
        self.ledger.up_to(Iova::new(last)).next().is_some_and(touches)
    }
    /// Lets go of memory that its owner takes back: closes it in a direct map, evicts pages that nobody uses, flushes what waits, and waits for
    /// what other calls have begun to flush. What is in use stays, so that the memory is still pinned afterwards.
    pub fn let_go(&mut self, kernel: &Kernel, buffer: GpaRange) -> PendingUnmap {
        match &self.mode {
            Mode::Passthrough => self.close_direct(kernel, buffer),
            Mode::Identity(_) => {
                self.give_up(kernel, |domain, remains| domain.evict_within(kernel, buffer, remains))
            }
            Mode::Deferred(_) | Mode::Ring(_) | Mode::Bounce(_) => self.give_up(kernel, |_, _| {}),
            // An unmap that is not answered is in use.
            Mode::Strict => PendingUnmap::nothing(self.id),
        }
    }
    /// Stub.
    pub fn revoke_memory(&mut self, kernel: &Kernel, range: GpaRange) -> PendingUnmap {
        self.let_go(kernel, range)
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
    fn close_direct(&mut self, kernel: &Kernel, buffer: GpaRange) -> PendingUnmap {
        let first = buffer.base().page_number();
        let mut remains = self.unfinished.fresh();
        if let Some(RangeMapping { pages, record, .. }) = self.ranges.remove(&first) {
            let size_bytes = pages * PAGE_SIZE_BYTES;
            let iova = IovaUse::Fixed;
            self.revoke(kernel, Revoked { first, pages, record, size_bytes, iova }, &mut remains);
        }
        self.invalidate_now(kernel, remains)
    }
}
