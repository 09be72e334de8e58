//! Deferred invalidation: what is unmapped and answered, and not yet invalidated.
//!
//! Between its unmap and the flush a mapping is gone from the tables and may still be cached: a device can use it. So nothing of it is
//! used again before: its address stays taken, its frames stay pinned, its record stays *revoking* (I9). One flush invalidates the
//! whole domain, as Linux does, and everything that waits is released after its drain.

use iommu_types::Deferral;

use super::request::Tick;
use super::undone::{PendingUnmap, Remains, Undone};
use super::{Domain, Mode};
use crate::boot::Kernel;

/// What waits for a flush.
#[derive(Debug)]
pub(super) struct FlushQueue {
    deferral: Deferral,
    waiting: Remains,
    unmaps: u32,
    /// When the first of them was unmapped.
    since: Tick,
}

/// Unmaps that were answered and are not yet invalidated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// How many.
    pub unmaps: u64,
    /// When the oldest of them was unmapped.
    pub since: Tick,
}

impl FlushQueue {
    pub(super) fn new(deferral: Deferral) -> Self {
        Self { deferral, waiting: Remains::default(), unmaps: 0, since: Tick::default() }
    }
    fn is_full(&self) -> bool {
        self.unmaps >= self.deferral.batch
    }
    /// Takes out what waits.
    pub(super) fn take(&mut self) -> Remains {
        self.unmaps = 0;
        std::mem::take(&mut self.waiting)
    }
}

impl Domain {
    /// Unmaps that were answered and wait for their invalidation: those of a deferred domain, and those of bursts that a ring domain has not
    /// ended.
    pub fn waiting(&self) -> Option<Waiting> {
        match &self.mode {
            Mode::Deferred(queue) if queue.unmaps > 0 => {
                Some(Waiting { unmaps: queue.unmaps.into(), since: queue.since })
            }
            Mode::Ring(rings) => rings.waiting(),
            _ => None,
        }
    }
    /// When the domain is to be flushed, if anything waits; ring domains wait for the end of their bursts instead.
    pub fn flush_at(&self) -> Option<Tick> {
        match &self.mode {
            Mode::Deferred(queue) if queue.unmaps > 0 => {
                Some(queue.since.after_ms(queue.deferral.interval_ms))
            }
            _ => None,
        }
    }
    /// Invalidates now what waits. What comes back is empty when nothing did.
    pub fn flush(&mut self, kernel: &Kernel) -> PendingUnmap {
        match &mut self.mode {
            Mode::Deferred(queue) if queue.unmaps > 0 => {
                let remains = queue.take();
                self.counters.flushes += 1;
                self.invalidate_domain(kernel, remains)
            }
            Mode::Ring(_) => self.end_bursts(kernel),
            _ => PendingUnmap::nothing(self.id),
        }
    }
    /// Puts what was revoked into the queue. The answer need not wait, unless the batch is full: then it waits for the flush.
    pub(super) fn defer(&mut self, kernel: &Kernel, mut remains: Remains, now: Tick) -> PendingUnmap {
        let told = Undone::told(self.id, &remains);
        self.invalidated.clear();
        let Mode::Deferred(queue) = &mut self.mode else { unreachable!("only deferred domains defer") };
        if queue.unmaps == 0 {
            queue.since = now;
        }
        queue.unmaps = queue.unmaps.saturating_add(remains.records.len() as u32);
        queue.waiting.append(&mut remains);
        let is_full = queue.is_full();
        self.unfinished.reuse(remains);
        if !is_full {
            return PendingUnmap::answered(told);
        }
        let flushed = self.flush(kernel);
        flushed.telling(&told)
    }
}
