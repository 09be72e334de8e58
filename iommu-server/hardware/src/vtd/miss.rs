//! A miss: walk the tables, then fill the caches.
//!
//! **Architecture invariant (I4):** the generation is taken before anything is read that the walk depends on, and the fills
//! carry it. What an invalidation overtakes is used inside its epoch, which the drain waits for, and is not cached.
//!
//! **Architecture invariant (I3):** with CM=0 only what is present is filled. With CM=1 a page without any permission is filled as such,
//! so that software which forgets to invalidate after mapping sees what such hardware does; root, context and table entries
//! that are not present are not cached even then, which CM=1 allows.

use iommu_types::{Access, FaultReason, Generation, Hpa, Iova, PageSize, Permissions, SourceId};

use super::counters::SlotTally;
use super::port::Request;
use super::unit::Unit;
use super::walk::{Leaf, NoTrace, Trace, WalkFault, walk_context, walk_second_stage};
use crate::cache::{CachedContext, IotlbEntry, PagingEntry};

/// The context of a source, from the cache or the tables. `generation` was taken before.
pub(super) fn look_up_context(
    unit: &Unit,
    tally: &SlotTally,
    source: SourceId,
    generation: Generation,
) -> Result<CachedContext, WalkFault> {
    if let Some(context) = unit.contexts.lookup(source) {
        tally.context_cache.hits.add(1);
        return Ok(context);
    }
    tally.context_cache.misses.add(1);
    let mut reads = CountReads::default();
    let walked = walk_context(&**unit.memory(), unit.capabilities(), unit.root_table(), source, &mut reads);
    reads.add_to(tally);
    let context = walked?;
    tally.context_cache.filled(unit.contexts.fill(&unit.drains, generation, source, context));
    Ok(context)
}

/// Where a request goes that the IOTLB does not answer. `between` runs when the walk is over and nothing is filled yet;
/// tests let an invalidation overtake the walk there.
pub(super) fn walk_and_fill(
    unit: &Unit,
    tally: &SlotTally,
    context: &CachedContext,
    context_generation: Generation,
    request: &Request,
    between: impl FnOnce(),
) -> Result<Hpa, WalkFault> {
    if let Some(end) = cached_end(unit, context, request) {
        tally.iotlb.hits.add(1);
        return end;
    }
    tally.iotlb.misses.add(1);
    tally.walks.add(1);
    let domain = context.domain_id;
    let generation = unit.drains.generation(domain, context_generation);
    let start = unit.paging.lookup(domain, request.iova);
    let paging = &tally.paging_structure_cache;
    let found = if start.is_some() { &paging.hits } else { &paging.misses };
    found.add(1);
    let mut reads = CountReads::default();
    let mut deepest = None;
    let mut walk = |start, deepest: &mut Option<PagingEntry>| {
        walk_tables(unit, context, start, request, &mut reads, |table| *deepest = Some(table))
    };
    let walked = match walk(start, &mut deepest) {
        // A cached table may be stale; neither a fault nor a fill comes from it alone.
        Err(_) if start.is_some() => {
            deepest = None;
            walk(None, &mut deepest)
        }
        walked => walked,
    };
    reads.add_to(tally);
    between();
    let fill = |entry| tally.iotlb.filled(unit.iotlb.fill(&unit.drains, generation, entry));
    let leaf = match walked {
        Ok(leaf) => leaf,
        Err(fault) => {
            if unit.capabilities().caching_mode && is_without_permissions(unit, context, request, fault) {
                fill(absent_page(context, request));
            }
            return Err(fault);
        }
    };
    // Of the tables passed only the deepest is kept: reading the entries above it again costs less than filling them.
    if let Some(table) = deepest {
        paging.filled(unit.paging.fill(&unit.drains, generation, table));
    }
    fill(IotlbEntry {
        domain_id: domain,
        iova: Iova::new(request.iova.get() & !(leaf.size.bytes() - 1)),
        size: leaf.size,
        hpa: leaf.hpa,
        permissions: leaf.permissions,
        extent: leaf.extent,
    });
    Ok(within_page(leaf.hpa, leaf.size.bytes(), request.iova))
}

/// What the IOTLB answers to a request that its hot path does not: a partial page lets it pass, or, with CM=1, an absent one refuses it.
fn cached_end(unit: &Unit, context: &CachedContext, request: &Request) -> Option<Result<Hpa, WalkFault>> {
    if !unit.iotlb.may_hold_partial() && !unit.capabilities().caching_mode {
        return None;
    }
    let entry = unit.iotlb.lookup(context.domain_id, request.iova)?;
    if entry.allows(request.iova, request.access, request.size_bytes) {
        return Some(Ok(within_page(entry.hpa, entry.size.bytes(), request.iova)));
    }
    known_absent(unit, &entry, context, request).map(Err)
}

/// CM=1: the fault of a page that is cached as one without permissions.
pub(super) fn known_absent(
    unit: &Unit,
    entry: &IotlbEntry,
    context: &CachedContext,
    request: &Request,
) -> Option<WalkFault> {
    let reason = match request.access {
        Access::Read => FaultReason::READ_DENIED,
        Access::Write | Access::Atomic => FaultReason::WRITE_DENIED,
    };
    let is_absent = unit.capabilities().caching_mode && entry.permissions.is_empty();
    is_absent.then(|| WalkFault::qualified(reason, context.fault_processing_disable))
}

/// CM=1: whether the page that refused the request would refuse any.
fn is_without_permissions(unit: &Unit, context: &CachedContext, request: &Request, fault: WalkFault) -> bool {
    let is_denial =
        |fault: WalkFault| matches!(fault.reason, FaultReason::READ_DENIED | FaultReason::WRITE_DENIED);
    let refuses = |access| {
        let asked = Request { access, size_bytes: 1, ..*request };
        walk_tables(unit, context, None, &asked, &mut NoTrace, |_| {}).is_err_and(is_denial)
    };
    is_denial(fault) && refuses(Access::Read) && refuses(Access::Write)
}

fn absent_page(context: &CachedContext, request: &Request) -> IotlbEntry {
    IotlbEntry {
        domain_id: context.domain_id,
        iova: request.iova.page_base(),
        size: PageSize::Size4K,
        hpa: Hpa::new(0),
        permissions: Permissions::empty(),
        extent: None,
    }
}

/// The second-stage walk of a request, for the shipping path and for Explain alike.
pub(super) fn walk_tables(
    unit: &Unit,
    context: &CachedContext,
    start: Option<PagingEntry>,
    request: &Request,
    trace: &mut impl Trace,
    on_table: impl FnMut(PagingEntry),
) -> Result<Leaf, WalkFault> {
    walk_second_stage(
        &**unit.memory(),
        unit.table_rules(),
        context,
        start,
        request.iova,
        request.access,
        request.size_bytes,
        trace,
        on_table,
    )
}

/// The address of `iova` in a page that starts at `base`.
#[inline]
pub(super) fn within_page(base: Hpa, page_bytes: u64, iova: Iova) -> Hpa {
    Hpa::new(base.get() | (iova.get() & (page_bytes - 1)))
}

/// Counts the entries that a walk reads.
#[derive(Default)]
struct CountReads {
    /// Root and context entries.
    contexts: u64,
    tables: [u64; 5],
    extents: u64,
}

impl CountReads {
    fn add_to(&self, tally: &SlotTally) {
        tally.walk_reads.add(self.contexts + self.tables.iter().sum::<u64>() + self.extents);
        tally.table_reads.iter().zip(self.tables).for_each(|(count, more)| count.add(more));
        tally.extent_reads.add(self.extents);
    }
}

impl Trace for CountReads {
    fn read_root(&mut self, _at: Hpa, _raw: Option<u128>) {
        self.contexts += 1;
    }
    fn read_context(&mut self, _at: Hpa, _raw: Option<u128>) {
        self.contexts += 1;
    }
    fn read_table(&mut self, level: u8, _at: Hpa, _raw: Option<u64>, _permissions: Permissions) {
        self.tables[usize::from(level - 1)] += 1;
    }
    fn read_extent(&mut self, _at: Hpa, _raw: Option<u64>) {
        self.extents += 1;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use iommu_types::{Capabilities, DomainId, FunctionMask, Invalidation, IovaRange};

    use iommu_types::AddressType;

    use super::*;
    use crate::bare::BareMachine;
    use crate::cache::ContextTranslation;
    use crate::vtd::spec::pte::SecondStageEntry;
    use crate::vtd::spec::root_context::{ContextEntry, RootEntry};
    use crate::vtd::walk::{RootMode, RootTable};
    use crate::vtd::{EventMessage, EventSink};

    const DOMAIN: DomainId = DomainId::new(4);
    const PAGE: Iova = Iova::new(0x3000);
    const SOURCE: SourceId = SourceId::new(0);
    const TOP: Hpa = Hpa::new(0x3000);

    struct NoEvents;
    impl EventSink for NoEvents {
        fn deliver(&self, _message: EventMessage) {}
    }

    /// Root at 0x1000, contexts at 0x2000, three levels from 0x3000, PAGE at the frame 0x8000.
    fn unit() -> Arc<Unit> {
        let machine = BareMachine::new(1 << 20, Capabilities::FULL, 1, Arc::new(NoEvents)).expect("sound");
        let memory = machine.memory();
        let context = ContextEntry::second_stage(TOP, 3, DOMAIN);
        memory
            .store_u128(Hpa::new(0x1000), RootEntry::present(Hpa::new(0x2000)).into_bits())
            .expect("memory");
        memory.store_u128(Hpa::new(0x2000), context.into_bits()).expect("memory");
        let leaf = SecondStageEntry::leaf(Hpa::new(0x8000), PageSize::Size4K, Permissions::READ);
        for (at, entry) in [
            (0x3000, SecondStageEntry::table(Hpa::new(0x4000))),
            (0x4000, SecondStageEntry::table(Hpa::new(0x5000))),
            (0x5018, leaf),
        ] {
            memory.store_u64(Hpa::new(at), entry.into_bits()).expect("memory");
        }
        machine.unit().set_root_table(RootTable { base: Hpa::new(0x1000), mode: RootMode::Legacy });
        Arc::clone(machine.unit())
    }

    fn context() -> CachedContext {
        let translation = ContextTranslation::SecondStage { table: TOP, levels: 3 };
        CachedContext { domain_id: DOMAIN, translation, fault_processing_disable: false }
    }

    /// What is cached after a walk that `overtaking` overtook.
    fn check(overtaking: Option<Invalidation>, cached: bool) {
        let (unit, tally) = (unit(), SlotTally::default());
        let generation = unit.drains.context_generation();
        let request = Request {
            iova: PAGE,
            size_bytes: 8,
            access: Access::Read,
            pasid: None,
            address_type: AddressType::Untranslated,
        };
        let walked = walk_and_fill(&unit, &tally, &context(), generation, &request, || {
            if let Some(invalidation) = overtaking {
                let _drained = unit.invalidate(invalidation).wait_blocking();
            }
        });
        assert_eq!(walked, Ok(Hpa::new(0x8000)));
        assert_eq!(unit.iotlb.lookup(DOMAIN, PAGE).is_some(), cached, "{overtaking:?}");
        assert_eq!(unit.paging.lookup(DOMAIN, PAGE).is_some(), cached, "{overtaking:?}");
    }

    #[test]
    fn i4_a_fill_that_an_invalidation_overtook_is_dropped() {
        let pages = |domain_id| Invalidation::IotlbPages {
            domain_id,
            range: IovaRange::new(PAGE, 4096).expect("a page"),
            leaf_only: true,
        };
        check(None, true);
        check(Some(pages(DOMAIN)), false);
        check(Some(Invalidation::IotlbDomain(DOMAIN)), false);
        check(Some(Invalidation::IotlbGlobal), false);
        check(Some(pages(DomainId::new(5))), true);
        check(Some(Invalidation::InterruptGlobal), true);
    }

    #[test]
    fn i4_a_context_that_an_invalidation_overtook_is_not_cached() {
        let device = Invalidation::ContextDevice {
            domain_id: DOMAIN,
            source_id: SOURCE,
            function_mask: FunctionMask::Exact,
        };
        for overtaking in [device, Invalidation::ContextDomain(DOMAIN), Invalidation::ContextGlobal] {
            let (unit, tally) = (unit(), SlotTally::default());
            let generation = unit.drains.context_generation();
            let _drained = unit.invalidate(overtaking).wait_blocking();
            assert_eq!(look_up_context(&unit, &tally, SOURCE, generation), Ok(context()));
            assert_eq!(unit.contexts.lookup(SOURCE), None, "{overtaking:?}");
            let generation = unit.drains.context_generation();
            assert_eq!(look_up_context(&unit, &tally, SOURCE, generation), Ok(context()));
            assert_eq!(unit.contexts.lookup(SOURCE), Some(context()));
        }
    }
}
