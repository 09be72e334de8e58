//! Dumps tables: every present entry of a device, deepest first below each, bounded in entries per message and in all.
//!
//! The entries are read where the walk reads them, by the very layouts that it uses; root and context entries come from Explain, so there is no
//! second way to find them.

use iommu_hardware::memory::PhysicalMemory;
use iommu_hardware::vtd::Unit;
use iommu_proto::model::WalkStep;
use iommu_types::{Access, Hpa, Iova, PAGE_SIZE_BYTES, PageSize, Permissions, SourceId, Step, Structure};

/// Entries in a table.
const ENTRIES: u64 = 512;
/// Bits of the address of a table or page.
const ADDRESS_MASK: u64 = 0x000f_ffff_ffff_f000;
/// PS: the entry is a leaf.
const LARGE: u64 = 1 << 7;

fn permissions_of(entry: u64) -> Permissions {
    Permissions::from_bits_truncate(entry as u8 & 3)
}

/// Where a walk over a table stands.
struct Frame {
    table: Hpa,
    level: u8,
    index: u64,
    /// First address that the table translates.
    base: u64,
    permissions: Permissions,
}

/// An iterator over the entries, so that only what is being sent is in memory.
pub(super) struct Dump<'m> {
    memory: &'m PhysicalMemory,
    first: std::vec::IntoIter<Step>,
    frames: Vec<Frame>,
}

/// The top-level table that a context entry names, and its level; `None` where the walk goes no further.
fn top(context: &Step) -> Option<(Hpa, u8)> {
    let (low, high) = (context.low?, context.high?);
    let second_stage = matches!((low >> 2) & 3, 0 | 1);
    let level = match high & 7 {
        1 => 3,
        2 => 4,
        3 => 5,
        _ => return None,
    };
    (low & 1 != 0 && second_stage).then_some((Hpa::new(low & ADDRESS_MASK), level))
}

impl<'m> Dump<'m> {
    /// The dump of a source's tables.
    pub(super) fn new(
        memory: &'m PhysicalMemory,
        unit: &Unit,
        source: SourceId,
        without_page_tables: bool,
    ) -> Self {
        let explanation = unit.explain(source, None, Iova::new(PAGE_SIZE_BYTES), Access::Read, 1);
        let first: Vec<Step> = explanation
            .steps
            .into_iter()
            .filter(|step| matches!(step.structure, Structure::Root | Structure::Context))
            .collect();
        let context = first.iter().find(|step| step.structure == Structure::Context);
        let mut frames = Vec::new();
        if let Some((table, level)) = context.and_then(top)
            && !without_page_tables
        {
            frames.push(Frame { table, level, index: 0, base: 0, permissions: Permissions::READ_WRITE });
        }
        Self { memory, first: first.into_iter(), frames }
    }
}

fn reading(entry: u64, level: u8, leaf: bool) -> String {
    let permissions = permissions_of(entry);
    let target = Hpa::new(entry & ADDRESS_MASK);
    match PageSize::at_level(level).filter(|_| leaf) {
        Some(size) => format!("{permissions}, {size} page {target}"),
        None => format!("{permissions}, table {target}"),
    }
}

impl Iterator for Dump<'_> {
    type Item = WalkStep;

    fn next(&mut self) -> Option<WalkStep> {
        if let Some(step) = self.first.next() {
            return Some(WalkStep { step, iova: None });
        }
        loop {
            let frame = self.frames.last_mut()?;
            if frame.index == ENTRIES {
                self.frames.pop();
                continue;
            }
            let index = frame.index;
            frame.index += 1;
            let Some(at) = frame.table.checked_add(index * 8) else { continue };
            // A table without memory behind it is shown once, by its first entry, and left.
            let Ok(entry) = self.memory.load_u64(at) else {
                frame.index = ENTRIES;
                let (level, base) = (frame.level, frame.base);
                return Some(step(level, index, at, None, base, None));
            };
            if entry & 3 == 0 {
                continue;
            }
            let shift = 12 + 9 * u32::from(frame.level - 1);
            let base = frame.base | index << shift;
            let level = frame.level;
            let permissions = frame.permissions & permissions_of(entry);
            let leaf = level == 1 || (entry & LARGE != 0 && level <= 3);
            if !leaf {
                let table = Hpa::new(entry & ADDRESS_MASK);
                self.frames.push(Frame { table, level: level - 1, index: 0, base, permissions });
            }
            return Some(step(level, index, at, Some((entry, leaf)), base, Some(permissions)));
        }
    }
}

fn step(
    level: u8,
    index: u64,
    at: Hpa,
    entry: Option<(u64, bool)>,
    base: u64,
    permissions: Option<Permissions>,
) -> WalkStep {
    let reading = match entry {
        Some((entry, leaf)) => reading(entry, level, leaf),
        None => "there is no memory".to_owned(),
    };
    let structure = Structure::SecondStage { level };
    let low = entry.map(|(entry, _)| entry);
    let step = Step { structure, index: index as u16, at, low, high: None, permissions, reading };
    WalkStep { step, iova: Some(Iova::new(base)) }
}
