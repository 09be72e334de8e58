//! The tables of a source, entry by entry, as they lie in memory.

use std::ops::ControlFlow;

use iommu_types::{Hpa, Iova, Permissions, SourceId, Step};

use super::second_stage::reserved_checks;
use super::steps::{add_extent, table_step};
use super::{RootTable, StepCollector, TableMemory, TableRules, walk_context};
use crate::cache::ContextTranslation;
use crate::vtd::spec::extent::extent_address;
use crate::vtd::spec::pte::{ENTRIES_PER_TABLE, ENTRY_BYTES, SecondStageEntry, level_shift};

/// Gives every present entry of `source` to `visit`, depth first: the root and context entries (present or not) without an
/// address, then the second-stage entries, each with the first address that it serves. `Break` ends the dump.
///
/// The tables may hold nonsense. An entry that the walk would refuse is given but not followed, a table that cannot be read
/// is given as one unreadable entry, and depth is bounded by the levels, so a pointer that leads back to its own table ends too.
/// How many entries come in all is bounded only by `visit`.
pub fn dump(
    memory: &impl TableMemory,
    rules: TableRules<'_>,
    root: RootTable,
    source: SourceId,
    without_page_tables: bool,
    visit: &mut impl FnMut(Step, Option<Iova>) -> ControlFlow<()>,
) -> ControlFlow<()> {
    let mut collector = StepCollector::new(rules);
    let context = walk_context(memory, rules.capabilities, root, source, &mut collector);
    for step in collector.into_steps() {
        visit(step, None)?;
    }
    match context.map(|context| context.translation) {
        Ok(ContextTranslation::SecondStage { table, levels }) if !without_page_tables => {
            let mut tables = Tables { memory, rules, visit };
            tables.dump(table, levels, 0, Permissions::READ_WRITE)
        }
        _ => ControlFlow::Continue(()),
    }
}

struct Tables<'a, M, V> {
    memory: &'a M,
    rules: TableRules<'a>,
    visit: &'a mut V,
}

impl<M: TableMemory, V: FnMut(Step, Option<Iova>) -> ControlFlow<()>> Tables<'_, M, V> {
    fn dump(&mut self, table: Hpa, level: u8, base: u64, above: Permissions) -> ControlFlow<()> {
        let checks = reserved_checks(self.rules.capabilities);
        for index in 0..ENTRIES_PER_TABLE {
            let Some(at) = table.checked_add(index * ENTRY_BYTES) else { break };
            let iova = base | index << level_shift(level);
            let raw = self.memory.load_u64(at).ok();
            let entry = raw.map(SecondStageEntry::from_bits);
            if entry.is_some_and(|entry| !entry.is_present()) {
                continue;
            }
            let permissions = entry.map_or(above, |entry| above.intersection(entry.permissions()));
            let sound =
                entry.is_some_and(|entry| entry.into_bits() & entry.reserved_bits(level, checks) == 0);
            let mut step = table_step(self.rules, level, at, raw, permissions);
            if sound && self.is_partial(level, entry) {
                let extent_at = extent_address(table, Iova::new(iova));
                add_extent(&mut step, extent_at.and_then(|at| self.memory.load_u64(at).ok()));
            }
            (self.visit)(step, Some(Iova::new(iova)))?;
            // Nothing of a table without memory can be read.
            let Some(entry) = entry else { break };
            if sound && !entry.is_leaf_at(level) {
                self.dump(entry.address(), level - 1, iova, permissions)?;
            }
        }
        ControlFlow::Continue(())
    }
    fn is_partial(&self, level: u8, entry: Option<SecondStageEntry>) -> bool {
        self.rules.byte_extents && level == 1 && entry.is_some_and(|entry| entry.partial_page())
    }
}
