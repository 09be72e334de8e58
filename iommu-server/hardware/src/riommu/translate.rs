//! Translation behind rings: hit, promotion or walk.
//!
//! ```text
//!  same slot ─────────────► hit        nothing is read but the entry
//!  the prefetched slot ───► promotion  next becomes current; the slot after it is prefetched
//!  any other ─────────────► walk       root, rDEVICE, rRING, rPTE; the slot after it is prefetched
//! ```
//!
//! An entry that does not suffice (other bounds, other direction) decides nothing: the tables are walked, and a fault always comes
//! from them. A refused access fills nothing, and what the entry holds for other slots stays.
//!
//! **Architecture invariant (I4):** the generation of the ring is read before anything of the tables is, for a walk and for
//! a prefetch alike, and the fill or promotion carries it. What an invalidation overtakes is used inside its epoch, which
//! the drain waits for, and is not cached. **(I3):** a slot that is not valid is never cached.

use std::sync::atomic::{AtomicU64, Ordering};

use iommu_types::{AddressType, FaultReason, Hpa, SourceId, Structure};

use super::cache::{Cached, CachedSlot, RingCache};
use super::spec::{Ring, RingIova, RingPte};
use super::walk::{Asked, RingTrace, admit, walk_ring, walk_slot};
use crate::drain::{Atomics, Std};
use crate::vtd::walk::{TableMemory, WalkFault};
use crate::vtd::{Request, RingTally};

/// Where the root lies. Read by every walk, written by software.
#[derive(Debug, Default)]
pub(crate) struct RootLatch(AtomicU64);

impl RootLatch {
    const LATCHED: u64 = 1;

    pub(crate) fn set(&self, root: Hpa) {
        assert!(root.page_offset() == 0, "the root is one page: {root}");
        self.0.store(root.get() | Self::LATCHED, Ordering::SeqCst);
    }
    fn get(&self) -> Option<Hpa> {
        let word = self.0.load(Ordering::Acquire);
        (word & Self::LATCHED != 0).then_some(Hpa::new(word & !Self::LATCHED))
    }
}

/// The rings of one source: its tables and its entries.
pub(crate) struct Rings<'a, M, A: Atomics = Std> {
    pub(crate) memory: &'a M,
    pub(crate) root: &'a RootLatch,
    pub(crate) cache: &'a RingCache<A>,
    pub(crate) source: SourceId,
    pub(crate) zero_length_read: bool,
}

impl<M: TableMemory, A: Atomics> Rings<'_, M, A> {
    /// Where a request goes.
    #[inline]
    pub(crate) fn translate(&self, tally: &RingTally, request: &Request) -> Result<Hpa, WalkFault> {
        check_kind(request)?;
        let (at, asked) = self.asked(request);
        match self.cache.lookup(at) {
            Cached::Current(pte) => {
                if let Ok(hpa) = admit(pte, asked) {
                    tally.hits.add(1);
                    return Ok(hpa);
                }
            }
            Cached::Next(pte) => {
                if admit(pte, asked).is_ok()
                    && let Some(hpa) = self.promote(tally, at, asked)
                {
                    return Ok(hpa);
                }
            }
            Cached::Absent => {}
        }
        self.walk_and_fill(tally, at, asked, || ()).map_err(WalkFault::unqualified)
    }

    /// The slot that a request names, and what it asks there.
    #[inline]
    pub(super) fn asked(&self, request: &Request) -> (RingIova, Asked) {
        let at = RingIova::unpack(request.iova);
        (at, Asked::of(at, request.size_bytes, request.access, self.zero_length_read))
    }

    /// As the tables have it.
    pub(super) fn walk(
        &self,
        at: RingIova,
        trace: &mut impl RingTrace,
    ) -> Result<(Ring, RingPte), FaultReason> {
        let ring = walk_ring(self.memory, self.root.get(), self.source, at.ring, trace)?;
        walk_slot(self.memory, ring, at.slot, trace).map(|pte| (ring, pte))
    }

    /// Entry sync: no read of the tables stands between the request and its answer, but the prefetch, of which the answer does
    /// not depend.
    fn promote(&self, tally: &RingTally, at: RingIova, asked: Asked) -> Option<Hpa> {
        let walked_under = self.cache.generation(at.ring)?;
        let mut reads = CountReads(0);
        let ring = walk_ring(self.memory, self.root.get(), self.source, at.ring, &mut reads).ok();
        let next = ring.and_then(|ring| self.read_after(ring, at.slot, &mut reads));
        tally.prefetch_reads.add(reads.0);
        let hpa = admit(self.cache.promote(at, walked_under, next)?, asked).ok()?;
        tally.promotions.add(1);
        Some(hpa)
    }

    /// `between` runs when everything is read and nothing is filled yet; tests let an invalidation overtake the walk there.
    #[inline(never)]
    pub(super) fn walk_and_fill(
        &self,
        tally: &RingTally,
        at: RingIova,
        asked: Asked,
        between: impl FnOnce(),
    ) -> Result<Hpa, FaultReason> {
        tally.walks.add(1);
        let walked_under = self.cache.generation(at.ring);
        let mut reads = CountReads(0);
        let walked = self.walk(at, &mut reads);
        tally.walk_reads.add(reads.0);
        let (ring, pte) = walked?;
        let hpa = admit(pte, asked)?;
        if let Some(walked_under) = walked_under {
            let mut reads = CountReads(0);
            let next = self.read_after(ring, at.slot, &mut reads);
            tally.prefetch_reads.add(reads.0);
            between();
            self.cache.fill(at.ring, walked_under, CachedSlot { slot: at.slot, pte }, next);
        }
        Ok(hpa)
    }

    /// The slot after `slot`, when it is valid.
    fn read_after(&self, ring: Ring, slot: u32, reads: &mut CountReads) -> Option<CachedSlot> {
        let slot = ring.slot_after(slot)?;
        walk_slot(self.memory, ring, slot, reads).ok().map(|pte| CachedSlot { slot, pte })
    }
}

/// Only untranslated requests without PASID are translated, as in VT-d's legacy mode.
#[inline]
pub(super) fn check_kind(request: &Request) -> Result<(), WalkFault> {
    if request.pasid.is_some() {
        return Err(WalkFault::unqualified(FaultReason::PASID_IN_LEGACY_MODE));
    }
    if request.address_type != AddressType::Untranslated {
        return Err(WalkFault::unqualified(FaultReason::TRANSLATED_BLOCKED));
    }
    Ok(())
}

/// Counts the entries that are read.
struct CountReads(u64);

impl RingTrace for CountReads {
    fn read(&mut self, _structure: Structure, _index: u32, _at: Hpa, _raw: Option<u128>) {
        self.0 += 1;
    }
}
