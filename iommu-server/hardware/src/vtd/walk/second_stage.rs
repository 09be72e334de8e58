//! Second-stage tables of 3, 4 and 5 levels (VT-d 5.10 §3.7).

use iommu_types::{Access, Capabilities, FaultReason, Hpa, Iova, PageSize, Permissions};

use super::{Leaf, TableMemory, TableRules, Trace, WalkFault, is_interrupt_range};
use crate::cache::{CachedContext, ContextTranslation, PagingEntry};
use crate::vtd::spec::beyond_host_width;
use crate::vtd::spec::extent::{ByteExtent, extent_address};
use crate::vtd::spec::pte::{ReservedChecks, SecondStageEntry, entry_address, level_shift};

/// The highest level of a table that the paging-structure cache keeps.
const CACHED_TABLE_LEVEL_MAX: u8 = 3;

/// How often a walk begins again because software changed a partial page under it. Software writes such a page a few times in its life, so
/// a second time is rare and an eighth is somebody's purpose.
const WALKS_MAX: u32 = 8;

/// Walks for one access of `size_bytes` (0 is a zero-length read) that lies in one 4 KiB page.
///
/// `start` is a table that the paging-structure cache knows, for this domain and address; without it the walk begins at the
/// top. `on_table` is called for every entry that leads to a table of level 3, 2 or 1, with the AND of the permissions so
/// far; each has passed every check, so it may be cached, whatever the walk meets below.
///
/// A pass-through context gives the page itself, in 4 KiB and with both permissions.
#[expect(
    clippy::too_many_arguments,
    reason = "the contract of the walk: a request, its context and two ways to look on"
)]
pub fn walk_second_stage(
    memory: &impl TableMemory,
    rules: TableRules<'_>,
    context: &CachedContext,
    start: Option<PagingEntry>,
    iova: Iova,
    access: Access,
    size_bytes: u32,
    trace: &mut impl Trace,
    mut on_table: impl FnMut(PagingEntry),
) -> Result<Leaf, WalkFault> {
    for _ in 0..WALKS_MAX {
        let walked =
            walk_once(memory, rules, context, start, iova, access, size_bytes, trace, &mut on_table)?;
        if let Some(leaf) = walked {
            return Ok(leaf);
        }
    }
    Err(WalkFault::qualified(FaultReason::BYTES_DENIED, context.fault_processing_disable))
}

/// One walk; `None` when software changed a partial page under it.
#[expect(clippy::too_many_arguments, reason = "as the walk")]
#[inline]
fn walk_once(
    memory: &impl TableMemory,
    rules: TableRules<'_>,
    context: &CachedContext,
    start: Option<PagingEntry>,
    iova: Iova,
    access: Access,
    size_bytes: u32,
    trace: &mut impl Trace,
    mut on_table: impl FnMut(PagingEntry),
) -> Result<Option<Leaf>, WalkFault> {
    let capabilities = rules.capabilities;
    let fault = |reason| WalkFault::qualified(reason, context.fault_processing_disable);
    let (top, levels) = match context.translation {
        ContextTranslation::SecondStage { table, levels } => (table, levels),
        ContextTranslation::PassThrough => return pass_through(capabilities, iova).map(Some).map_err(fault),
    };
    // CAP.MGAW and the width of the context bound the address.
    let width_bits = u32::from(capabilities.max_guest_width_bits).min(12 + 9 * u32::from(levels));
    if iova.get() >> width_bits != 0 {
        return Err(fault(FaultReason::ADDRESS_BEYOND_WIDTH));
    }
    let (mut table, mut level, mut permissions) = match start {
        Some(known) => (known.table, known.level, known.permissions),
        None => (top, levels, Permissions::READ_WRITE),
    };
    assert!((1..=5).contains(&level), "our caches hold tables of levels 1 to 3, contexts those of 3 to 5");
    let top_level = if start.is_none() { levels } else { 0 };
    let checks = reserved_checks(capabilities);
    let leaf = loop {
        // The top-level table belongs to the context entry (LCT.4.3), those below to the page tables (LSS.1).
        let unreadable =
            if level == top_level { FaultReason::CONTEXT_INVALID } else { FaultReason::TABLE_ACCESS };
        let Some(at) = entry_address(table, iova, level) else { return Err(fault(unreadable)) };
        let Ok(raw) = memory.load_u64(at) else {
            trace.read_table(level, at, None, permissions);
            return Err(fault(unreadable));
        };
        let entry = SecondStageEntry::from_bits(raw);
        permissions = permissions.intersection(entry.permissions());
        trace.read_table(level, at, Some(raw), permissions);
        // R=W=0 is not present: nothing else in the entry is looked at.
        if !entry.is_present() {
            return Err(fault(denied(access)));
        }
        if raw & entry.reserved_bits(level, checks) != 0 {
            return Err(fault(FaultReason::TABLE_RESERVED));
        }
        if entry.is_leaf_at(level) {
            break entry;
        }
        table = entry.address();
        level -= 1;
        if level <= CACHED_TABLE_LEVEL_MAX {
            // What the table covers begins at a multiple of what an entry one level up covers.
            let covered = Iova::new(iova.get() & (u64::MAX << level_shift(level + 1)));
            on_table(PagingEntry { domain_id: context.domain_id, iova: covered, level, table, permissions });
        }
    };
    let size = PageSize::at_level(level).expect("the checks let a page stand only at levels 1 to 3");
    check_permissions(capabilities, permissions, access, size_bytes).map_err(fault)?;
    let extent = if rules.byte_extents && level == 1 && leaf.partial_page() {
        let extent = open_bytes(memory, table, iova, size_bytes, trace).map_err(fault)?;
        // Where addresses are the memory's own, a page may be closed and opened again, or opened further, while a walk stands between its
        // two words. The extent belongs to the leaf only if the leaf is still the same; else the walk begins again from the table.
        let leaf_is = |raw: u64| raw == leaf.into_bits();
        if !entry_address(table, iova, 1).is_some_and(|at| memory.load_u64(at).is_ok_and(leaf_is)) {
            return Ok(None);
        }
        Some(extent)
    } else {
        None
    };
    let page = outside_interrupt_range(leaf.address(), size, permissions, iova).map_err(fault)?;
    Ok(Some(Leaf { extent, ..page }))
}

/// The extent of a partial page, which must admit the access.
fn open_bytes(
    memory: &impl TableMemory,
    table: Hpa,
    iova: Iova,
    size_bytes: u32,
    trace: &mut impl Trace,
) -> Result<ByteExtent, FaultReason> {
    let at = extent_address(table, iova).ok_or(FaultReason::TABLE_ACCESS)?;
    let raw = memory.load_u64(at).ok();
    trace.read_extent(at, raw);
    let raw = raw.ok_or(FaultReason::TABLE_ACCESS)?;
    let admitting = |extent: &ByteExtent| extent.admits(iova.page_offset(), size_bytes);
    ByteExtent::from_word(raw).filter(admitting).ok_or(FaultReason::BYTES_DENIED)
}

/// What the unit's capabilities make reserved.
#[inline]
pub(crate) const fn reserved_checks(capabilities: &Capabilities) -> ReservedChecks {
    ReservedChecks {
        host_width_bits: capabilities.host_width_bits,
        pages_2m: capabilities.pages_2m,
        pages_1g: capabilities.pages_1g,
        snoop_control: capabilities.snoop_control,
    }
}

fn pass_through(capabilities: &Capabilities, iova: Iova) -> Result<Leaf, FaultReason> {
    if iova.get() & beyond_host_width(capabilities.host_width_bits) != 0 {
        return Err(FaultReason::ADDRESS_BEYOND_WIDTH);
    }
    let page = Hpa::new(iova.page_base().get());
    outside_interrupt_range(page, PageSize::Size4K, Permissions::READ_WRITE, iova)
}

/// The reason that the first missing permission has. An atomic misses W first.
#[inline]
const fn denied(access: Access) -> FaultReason {
    match access {
        Access::Read => FaultReason::READ_DENIED,
        Access::Write | Access::Atomic => FaultReason::WRITE_DENIED,
    }
}

#[inline]
fn check_permissions(
    capabilities: &Capabilities,
    permissions: Permissions,
    access: Access,
    size_bytes: u32,
) -> Result<(), FaultReason> {
    if permissions.allow(access) {
        return Ok(());
    }
    let zero_length_read =
        access == Access::Read && size_bytes == 0 && capabilities.zero_length_read && !permissions.is_empty();
    if zero_length_read {
        return Ok(());
    }
    // An atomic that may write misses the read permission only.
    let only_read_missing = access == Access::Atomic && permissions.contains(Permissions::WRITE);
    Err(if only_read_missing { FaultReason::READ_DENIED } else { denied(access) })
}

/// A request may not end in FEEx_xxxx (LGN.4). The range is smaller than a large page, so the rest of one that touches it is
/// handed out in small pieces.
#[inline]
fn outside_interrupt_range(
    page: Hpa,
    size: PageSize,
    permissions: Permissions,
    iova: Iova,
) -> Result<Leaf, FaultReason> {
    let offset = iova.get() & (size.bytes() - 1);
    if is_interrupt_range(page.get() | offset) {
        return Err(FaultReason::RESULT_IN_INTERRUPT_RANGE);
    }
    let touches =
        size != PageSize::Size4K && page.get() & !(size.bytes() - 1) == 0xfee0_0000 & !(size.bytes() - 1);
    if touches {
        let piece = Hpa::new(page.get() | offset).page_base();
        return Ok(Leaf { hpa: piece, size: PageSize::Size4K, permissions, extent: None });
    }
    Ok(Leaf { hpa: page, size, permissions, extent: None })
}
