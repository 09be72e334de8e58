//! Root and context entries of a source (VT-d 5.10 §3.4.2, §3.4.3).

use iommu_types::{Capabilities, FaultReason, Pasid, SourceId};

use super::{RootMode, RootTable, TableMemory, Trace, WalkFault};
use crate::cache::{CachedContext, ContextTranslation};
use crate::vtd::spec::root_context::{ContextEntry, RootEntry, TranslationType, entry_address};

/// Whether requests can be looked up at all: only legacy mode is built (30), and it knows no PASID (31). Neither fault is
/// qualified by FPD, because no context entry has been read.
#[inline]
pub fn check_table_mode(root: RootTable, pasid: Option<Pasid>) -> Result<(), WalkFault> {
    match (root.mode, pasid) {
        (RootMode::Legacy, None) => Ok(()),
        (RootMode::Legacy, Some(_)) => Err(WalkFault::unqualified(FaultReason::PASID_IN_LEGACY_MODE)),
        (RootMode::Scalable | RootMode::Reserved | RootMode::AbortDma, _) => {
            Err(WalkFault::unqualified(FaultReason::TABLE_MODE_INVALID))
        }
    }
}

/// Reads the root and context entries of `source`, with every check up to the width and type of the context entry. Whether
/// the top-level page table can be read shows when the second-stage walk reads it.
pub fn walk_context(
    memory: &impl TableMemory,
    capabilities: &Capabilities,
    root: RootTable,
    source: SourceId,
    trace: &mut impl Trace,
) -> Result<CachedContext, WalkFault> {
    check_table_mode(root, None)?;
    let root_entry = read_root(memory, capabilities, root, source, trace)?;
    let entry = read_context(memory, root_entry, source, trace)?;
    decode_context(capabilities, entry)
}

fn read_root(
    memory: &impl TableMemory,
    capabilities: &Capabilities,
    root: RootTable,
    source: SourceId,
    trace: &mut impl Trace,
) -> Result<RootEntry, WalkFault> {
    let unreadable = WalkFault::unqualified(FaultReason::ROOT_ACCESS);
    let at = entry_address(root.base, source.bus()).ok_or(unreadable)?;
    let raw = memory.load_u128(at).ok();
    trace.read_root(at, raw);
    let raw = raw.ok_or(unreadable)?;
    let entry = RootEntry::from_bits(raw);
    if !entry.is_present() {
        return Err(WalkFault::unqualified(FaultReason::ROOT_NOT_PRESENT));
    }
    if raw & RootEntry::reserved_bits(capabilities.host_width_bits) != 0 {
        return Err(WalkFault::unqualified(FaultReason::ROOT_RESERVED));
    }
    Ok(entry)
}

fn read_context(
    memory: &impl TableMemory,
    root_entry: RootEntry,
    source: SourceId,
    trace: &mut impl Trace,
) -> Result<ContextEntry, WalkFault> {
    let unreadable = WalkFault::unqualified(FaultReason::CONTEXT_ACCESS);
    let at = entry_address(root_entry.context_table(), source.devfn()).ok_or(unreadable)?;
    let raw = memory.load_u128(at).ok();
    trace.read_context(at, raw);
    raw.map(ContextEntry::from_bits).ok_or(unreadable)
}

fn decode_context(capabilities: &Capabilities, entry: ContextEntry) -> Result<CachedContext, WalkFault> {
    // FPD counts even in an entry that is not present.
    let fault_processing_disable = entry.fault_processing_disable();
    let fault = |reason| WalkFault::qualified(reason, fault_processing_disable);
    if !entry.is_present() {
        return Err(fault(FaultReason::CONTEXT_NOT_PRESENT));
    }
    if entry.into_bits() & entry.reserved_bits(capabilities.host_width_bits) != 0 {
        return Err(fault(FaultReason::CONTEXT_RESERVED));
    }
    let translation = decode_translation(capabilities, entry).ok_or(fault(FaultReason::CONTEXT_INVALID))?;
    Ok(CachedContext { domain_id: entry.domain_id(), translation, fault_processing_disable })
}

/// `None` is LCT.4: a width or type that the unit does not have.
fn decode_translation(capabilities: &Capabilities, entry: ContextEntry) -> Option<ContextTranslation> {
    let known_width = entry.width().is_some_and(|width| capabilities.widths.contains(width));
    if !known_width || is_reserved_domain(capabilities, entry) {
        return None;
    }
    match entry.translation_type() {
        TranslationType::SECOND_STAGE => Some(ContextTranslation::SecondStage {
            table: entry.second_stage_table(),
            levels: entry.levels(),
        }),
        TranslationType::PASS_THROUGH if capabilities.pass_through && is_widest(capabilities, entry) => {
            Some(ContextTranslation::PassThrough)
        }
        _ => None,
    }
}

/// Whether AW is the widest width that the unit supports, which pass-through needs.
pub(super) fn is_widest(capabilities: &Capabilities, entry: ContextEntry) -> bool {
    entry.width().is_some_and(|width| capabilities.widths.bits() >> 1 < width.bits())
}

/// With caching mode, domain 0 tags what is not present. An entry that claims it has a reserved *value*, as a reserved type
/// or width is, and not a reserved bit.
pub(super) fn is_reserved_domain(capabilities: &Capabilities, entry: ContextEntry) -> bool {
    capabilities.caching_mode && entry.domain_id().get() == 0
}
