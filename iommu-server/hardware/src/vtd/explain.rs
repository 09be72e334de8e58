//! Explain: what would happen to one access, and why.
//!
//! The tables are asked by the walk that ships, with a tracer, and with the caches left aside; the caches are asked
//! separately, by the lookups that ship. Where the two disagree a cached entry is stale, and both ends are told. Nothing is
//! filled, counted or recorded.

use iommu_types::{
    Access, AddressType, CacheState, Explanation, FaultReason, Hpa, Iova, Outcome, PAGE_SIZE_BYTES, Pasid,
    Permissions, SourceId, Step, Structure, Translation,
};

use super::miss::{known_absent, walk_tables, within_page};
use super::port::{Request, refusal};
use super::spec::extent::ByteExtent;
use super::spec::pte::SecondStageEntry;
use super::unit::Unit;
use super::walk::{Leaf, NoTrace, StepCollector, WalkFault, check_table_mode, reading, walk_context};
use crate::cache::{CachedContext, ContextTranslation, IotlbEntry, PagingEntry};
use crate::riommu;

/// How an access ends, before it is put into words.
enum End {
    Translated(Translation),
    Untranslated(Hpa),
    Interrupt,
    Refused(WalkFault),
}

impl Unit {
    /// What would happen to an access of `source` now, and why. Changes nothing.
    ///
    /// An access that crosses a 4 KiB page is explained for its first page.
    pub fn explain(
        &self,
        source: SourceId,
        pasid: Option<Pasid>,
        iova: Iova,
        access: Access,
        size_bytes: u32,
    ) -> Explanation {
        let in_page_bytes = size_bytes.min((PAGE_SIZE_BYTES - iova.page_offset()) as u32);
        let address_type = AddressType::Untranslated;
        let request = Request { iova, size_bytes: in_page_bytes, access, pasid, address_type };
        if let Some(cache) = self.rings.cache_of(source)
            && !request.is_in_interrupt_range()
        {
            return riommu::explain(&self.rings_of(source, &cache), &request);
        }
        let mut steps = StepCollector::new(self.table_rules());
        let (end, context) = self.end_by_tables(source, &request, &mut steps);
        let asks_caches = self.is_translating() && !request.is_in_interrupt_range() && pasid.is_none();
        let caches =
            if asks_caches { self.look_at_caches(source, &request, context) } else { Caches::NOT_ASKED };
        let stale = match (&end, &caches.end) {
            (End::Translated(tables), Some(End::Translated(cached))) if !leads_alike(tables, cached) => {
                Some(*cached)
            }
            (End::Refused(_) | End::Untranslated(_), Some(End::Translated(cached))) => Some(*cached),
            _ => None,
        };
        let steps = steps.into_steps();
        let conclusion = conclude(source, &request, &end, &caches, stale, detail(&end, &steps));
        let (outcome, fault_suppressed) = match end {
            End::Translated(translation) => (Outcome::Translated(translation), false),
            End::Untranslated(hpa) => (Outcome::Untranslated(hpa), false),
            End::Interrupt => (Outcome::Interrupt, false),
            End::Refused(fault) => {
                (Outcome::Refused(refusal(source, &request, fault.reason)), fault.suppressed)
            }
        };
        Explanation {
            source_id: source,
            pasid,
            iova,
            access,
            size_bytes,
            context_cache: caches.context,
            iotlb: caches.iotlb,
            paging_structure_cache: caches.paging,
            steps,
            outcome,
            fault_suppressed,
            stale,
            conclusion,
        }
    }

    /// As the tables have it. Also the context that they give, when they give one.
    fn end_by_tables(
        &self,
        source: SourceId,
        request: &Request,
        steps: &mut StepCollector<'_>,
    ) -> (End, Option<CachedContext>) {
        if request.is_interrupt() {
            return (End::Interrupt, None);
        }
        if request.is_in_interrupt_range() {
            if request.is_zero_length_read() {
                return (End::Untranslated(Hpa::new(request.iova.get())), None);
            }
            let reason = FaultReason::IR_INVALID_ACCESS;
            return (End::Refused(WalkFault { reason, suppressed: false }), None);
        }
        if !self.is_translating() {
            return (End::Untranslated(Hpa::new(request.iova.get())), None);
        }
        let root = self.root_table();
        let context = check_table_mode(root, request.pasid)
            .and_then(|()| walk_context(&**self.memory(), self.capabilities(), root, source, steps));
        let context = match context {
            Ok(context) => context,
            Err(fault) => return (End::Refused(fault), None),
        };
        let leaf = walk_tables(self, &context, None, request, steps, |_| {});
        (end_of_walk(&context, request, leaf), Some(context))
    }

    /// As the caches stand, with the context of the tables where the context cache has none.
    fn look_at_caches(
        &self,
        source: SourceId,
        request: &Request,
        by_tables: Option<CachedContext>,
    ) -> Caches {
        let cached = self.contexts.lookup(source);
        let context = match cached {
            Some(context) => CacheState::Hit { entry: context_in_words(&context) },
            None => CacheState::Miss,
        };
        let Some(used) = cached.or(by_tables) else {
            // Without a context there is no domain to look anything up for.
            return Caches { context, ..Caches::NOT_ASKED };
        };
        if used.translation == ContextTranslation::PassThrough {
            let end = cached.map(|_| {
                let leaf = walk_tables(self, &used, None, request, &mut NoTrace, |_| {});
                end_of_walk(&used, request, leaf)
            });
            return Caches { context, end, ..Caches::NOT_ASKED };
        }
        let entry = self.iotlb.lookup(used.domain_id, request.iova);
        let (iotlb, hit) = match entry {
            None => (CacheState::Miss, None),
            Some(entry) if entry.allows(request.iova, request.access, request.size_bytes) => {
                (CacheState::Hit { entry: translation_in_words(&entry) }, Some(entry))
            }
            Some(entry) => (CacheState::Insufficient { entry: translation_in_words(&entry) }, None),
        };
        if let Some(entry) = entry
            && let Some(fault) = known_absent(self, &entry, &used, request)
        {
            let iotlb = CacheState::Hit { entry: translation_in_words(&entry) };
            return Caches { context, iotlb, end: Some(End::Refused(fault)), ..Caches::NOT_ASKED };
        }
        let table = self.paging.lookup(used.domain_id, request.iova);
        let paging = match (&hit, &table) {
            (Some(_), _) => CacheState::NotAsked,
            (None, Some(table)) => CacheState::Hit { entry: table_in_words(table) },
            (None, None) => CacheState::Miss,
        };
        let end = match hit {
            Some(entry) => End::Translated(Translation {
                hpa: within_page(entry.hpa, entry.size.bytes(), request.iova),
                page_size: entry.size,
                permissions: entry.permissions,
                domain_id: entry.domain_id,
            }),
            // As a miss does it: a fault never comes from a cached table alone.
            None => {
                let walk = |start| walk_tables(self, &used, start, request, &mut NoTrace, |_| {});
                let leaf = if table.is_some() { walk(table).or_else(|_| walk(None)) } else { walk(None) };
                end_of_walk(&used, request, leaf)
            }
        };
        Caches { context, iotlb, paging, end: Some(end) }
    }
}

/// What the caches hold for an access, and how it ends with them.
struct Caches {
    context: CacheState,
    iotlb: CacheState,
    paging: CacheState,
    end: Option<End>,
}

impl Caches {
    const NOT_ASKED: Self = Self {
        context: CacheState::NotAsked,
        iotlb: CacheState::NotAsked,
        paging: CacheState::NotAsked,
        end: None,
    };
}

fn end_of_walk(context: &CachedContext, request: &Request, leaf: Result<Leaf, WalkFault>) -> End {
    match (leaf, context.translation) {
        (Err(fault), _) => End::Refused(fault),
        (Ok(_), ContextTranslation::PassThrough) => End::Untranslated(Hpa::new(request.iova.get())),
        (Ok(leaf), ContextTranslation::SecondStage { .. }) => End::Translated(Translation {
            hpa: within_page(leaf.hpa, leaf.size.bytes(), request.iova),
            page_size: leaf.size,
            permissions: leaf.permissions,
            domain_id: context.domain_id,
        }),
    }
}

/// Whether two translations are the same as far as they concern the device: a large page that the interrupt range touches
/// is cached in pieces, and both say the same.
fn leads_alike(tables: &Translation, cached: &Translation) -> bool {
    tables.hpa == cached.hpa
        && tables.permissions == cached.permissions
        && tables.domain_id == cached.domain_id
}

fn context_in_words(context: &CachedContext) -> String {
    let recording = if context.fault_processing_disable { ", faults not recorded (FPD)" } else { "" };
    match context.translation {
        ContextTranslation::PassThrough => {
            format!("domain {}, pass-through{recording}", context.domain_id)
        }
        ContextTranslation::SecondStage { table, levels } => {
            format!("domain {}, {levels} levels, table {table}{recording}", context.domain_id)
        }
    }
}

fn translation_in_words(entry: &IotlbEntry) -> String {
    let IotlbEntry { domain_id, iova, size, hpa, permissions, extent } = entry;
    if permissions.is_empty() {
        return format!("domain {domain_id}, {size} page {iova} is not present (CM)");
    }
    let part = extent.map_or_else(String::new, |extent| format!(", granted in part: {extent}"));
    format!("domain {domain_id}, {size} page {iova} -> {hpa} {permissions}{part}")
}

fn table_in_words(entry: &PagingEntry) -> String {
    let PagingEntry { domain_id, iova, level, table, permissions } = entry;
    format!("domain {domain_id}, level {level} table of {iova} at {table} {permissions}")
}

/// What else the tables say about an end, in words.
fn detail(end: &End, steps: &[Step]) -> String {
    match (end, steps.last()) {
        (End::Refused(fault), Some(last)) => decided_by(*fault, steps, last),
        (End::Translated(_), Some(Step { high: Some(word), .. })) => ByteExtent::from_word(*word)
            .map_or_else(String::new, |extent| format!(", of which {extent} are open")),
        _ => String::new(),
    }
}

/// Where in the tables a refusal was decided: most people ask because they do not know that nothing is mapped there.
fn decided_by(fault: WalkFault, steps: &[Step], last: &Step) -> String {
    let Structure::SecondStage { level } = last.structure else { return String::new() };
    let denied = matches!(fault.reason, FaultReason::WRITE_DENIED | FaultReason::READ_DENIED);
    let absent = denied && last.low.is_some_and(|low| !SecondStageEntry::from_bits(low).is_present());
    if absent {
        return format!(
            " (nothing is mapped there: entry {} of the level-{level} table is not present)",
            last.index
        );
    }
    if fault.reason == FaultReason::BYTES_DENIED {
        let open = reading::extent(last.high);
        return format!(" (entry {} of the level-{level} table opens {open})", last.index);
    }
    let missing = |permission: Permissions| {
        steps.iter().find(|step| step.permissions.is_some_and(|left| !left.contains(permission)))
    };
    let first = match fault.reason {
        FaultReason::WRITE_DENIED => missing(Permissions::WRITE),
        FaultReason::READ_DENIED => missing(Permissions::READ),
        _ => Some(last),
    };
    match first.map(|step| (step.structure, step.index)) {
        Some((Structure::SecondStage { level }, index)) => {
            format!(" (entry {index} of the level-{level} table decides)")
        }
        _ => String::new(),
    }
}

/// The end in one sentence.
fn conclude(
    source: SourceId,
    request: &Request,
    end: &End,
    caches: &Caches,
    stale: Option<Translation>,
    detail: String,
) -> String {
    let Request { iova, access, .. } = request;
    let by_tables = match end {
        End::Interrupt => {
            return format!(
                "The write at {iova} by {source} is an interrupt and goes to interrupt remapping."
            );
        }
        End::Untranslated(_) if request.is_in_interrupt_range() => {
            return format!("The zero-length read at {iova} by {source} moves nothing and passes.");
        }
        End::Untranslated(hpa) => format!("The {access} at {iova} by {source} passes untranslated to {hpa}"),
        End::Translated(Translation { hpa, permissions, page_size, domain_id }) => format!(
            "The {access} at {iova} by {source} reaches {hpa} through a {page_size} page of domain {domain_id} ({permissions}){detail}"
        ),
        End::Refused(fault) => {
            let record = if fault.suppressed { ", without a record (FPD)" } else { "" };
            format!("The {access} at {iova} by {source} is refused: {}{detail}{record}", fault.reason)
        }
    };
    match (stale, end, &caches.end) {
        (Some(cached), ..) => {
            format!("{by_tables} by the tables, but a stale cached entry still leads it to {}.", cached.hpa)
        }
        (None, End::Refused(tables), Some(End::Refused(cached))) if tables.reason != cached.reason => {
            format!("{by_tables}; with the stale cached entry it is refused too: {}.", cached.reason)
        }
        (None, End::Translated(_) | End::Untranslated(_), Some(End::Refused(cached))) => {
            format!("{by_tables} by the tables, but a stale cached entry refuses it: {}.", cached.reason)
        }
        (None, End::Translated(_) | End::Refused(_), Some(End::Untranslated(hpa))) => {
            format!("{by_tables} by the tables, but a stale cached entry passes it untranslated to {hpa}.")
        }
        _ => format!("{by_tables}."),
    }
}
