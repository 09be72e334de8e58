//! Dumps tables: every present entry of a device, deepest first below each, bounded in entries per message and in all.
//!
//! The entries are read where the walk reads them, by the very layouts that it uses; root and context entries come from Explain, so there is no
//! second way to find them.
//!
//! **Promise:** a table of the host that is gone is not read, because its frame may be another's memory by now. Whoever dumps keeps tables in
//! place while entries are taken, and calls [`Dump::resume`] each time before.

use std::sync::Arc;

use iommu_hardware::vtd::Unit;
use iommu_hardware::vtd::spec::extent::extent_address;
use iommu_hardware::vtd::walk::reading;
use iommu_proto::model::WalkStep;
use iommu_types::{
    Access, DomainId, Hpa, Iova, PAGE_SIZE_BYTES, PageSize, Permissions, SourceId, Step, Structure,
};

use super::ring_tables::RingDump;

/// Entries in a table.
const ENTRIES: u64 = 512;
/// Bits of the address of a table or page.
const ADDRESS_MASK: u64 = 0x000f_ffff_ffff_f000;
/// The page is granted in part, if the unit knows such pages.
const PARTIAL: u64 = 1 << 52;
/// PS: the entry is a leaf.
const LARGE: u64 = 1 << 7;

fn permissions_of(entry: u64) -> Permissions {
    Permissions::from_bits_truncate(entry as u8 & 3)
}

/// Which page tables may be looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scope {
    /// Whatever the context entry names: a machine's memory is all its creator's.
    Machine,
    /// Those of the domain whose tables are kept in place, if there is one.
    Domain(Option<DomainId>),
    /// The rings of the device, which belong to the domain that is kept in place.
    Rings,
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
pub(super) struct Dump {
    unit: Arc<Unit>,
    source: SourceId,
    first: std::vec::IntoIter<Step>,
    frames: Vec<Frame>,
    /// The rings of the device, as long as it has some that stay.
    rings: Option<RingDump>,
    /// Whether the top-level table is still to be begun.
    is_fresh: bool,
}

/// The top-level table that a context entry names, and its level; `None` where the walk goes no further.
fn top(context: &Step, scope: Scope) -> Option<(Hpa, u8)> {
    let (low, high) = (context.low?, context.high?);
    let domain = DomainId::new((high >> 8) as u16);
    if scope != Scope::Machine && scope != Scope::Domain(Some(domain)) {
        return None;
    }
    let second_stage = matches!((low >> 2) & 3, 0 | 1);
    let level = match high & 7 {
        1 => 3,
        2 => 4,
        3 => 5,
        _ => return None,
    };
    (low & 1 != 0 && second_stage).then_some((Hpa::new(low & ADDRESS_MASK), level))
}

/// The root and the context entry of a source, or what stands for them in the ring unit.
fn root_and_context(unit: &Unit, source: SourceId) -> Vec<Step> {
    let explanation = unit.explain(source, None, Iova::new(PAGE_SIZE_BYTES), Access::Read, 1);
    let is_meant = |step: &Step| {
        use Structure::{Context, RingDevice, RingRoot, Root};
        matches!(step.structure, Root | Context | RingRoot | RingDevice)
    };
    explanation.steps.into_iter().filter(is_meant).collect()
}

impl Dump {
    /// The dump of a source's tables.
    pub(super) fn new(unit: Arc<Unit>, source: SourceId, without_page_tables: bool) -> Self {
        let first = root_and_context(&unit, source).into_iter();
        Self { unit, source, first, frames: Vec::new(), rings: None, is_fresh: !without_page_tables }
    }
    /// Goes on after a pause: leaves every table that is no longer where it was.
    pub(super) fn resume(&mut self, scope: Scope) {
        let steps = root_and_context(&self.unit, self.source);
        let context = steps.iter().find(|step| step.structure == Structure::Context);
        let mut table = context.and_then(|context| top(context, scope));
        let is_fresh = std::mem::take(&mut self.is_fresh);
        self.rings = match scope {
            Scope::Rings if is_fresh => Some(RingDump::default()),
            Scope::Rings => self.rings.take(),
            Scope::Machine | Scope::Domain(_) => None,
        };
        if is_fresh && let Some((table, level)) = table {
            let permissions = Permissions::READ_WRITE;
            self.frames.push(Frame { table, level, index: 0, base: 0, permissions });
        }
        let still = self.frames.iter().take_while(|frame| {
            let is_there = table == Some((frame.table, frame.level));
            table = frame.entered(&self.unit);
            is_there
        });
        let still = still.count();
        self.frames.truncate(still);
    }
}

impl Frame {
    /// The table below that was entered last, as the entry has it now.
    fn entered(&self, unit: &Unit) -> Option<(Hpa, u8)> {
        let at = self.table.checked_add(self.index.checked_sub(1)? * 8)?;
        let entry = unit.memory().load_u64(at).ok()?;
        let is_table = entry & 3 != 0 && !is_leaf(entry, self.level);
        is_table.then(|| (Hpa::new(entry & ADDRESS_MASK), self.level - 1))
    }
}

fn is_leaf(entry: u64, level: u8) -> bool {
    level == 1 || (entry & LARGE != 0 && level <= 3)
}

fn in_words(entry: u64, level: u8, leaf: bool) -> String {
    let permissions = permissions_of(entry);
    let target = Hpa::new(entry & ADDRESS_MASK);
    match PageSize::at_level(level).filter(|_| leaf) {
        Some(size) => format!("{permissions}, {size} page {target}"),
        None => format!("{permissions}, table {target}"),
    }
}

impl Iterator for Dump {
    type Item = WalkStep;

    fn next(&mut self) -> Option<WalkStep> {
        if let Some(step) = self.first.next() {
            return Some(WalkStep { step, iova: None });
        }
        if let Some(rings) = &mut self.rings {
            return rings.next(&self.unit, self.source);
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
            let Ok(entry) = self.unit.memory().load_u64(at) else {
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
            let table = frame.table;
            let leaf = is_leaf(entry, level);
            if !leaf {
                let table = Hpa::new(entry & ADDRESS_MASK);
                self.frames.push(Frame { table, level: level - 1, index: 0, base, permissions });
            }
            let mut shown = step(level, index, at, Some((entry, leaf)), base, Some(permissions));
            if level == 1 && entry & PARTIAL != 0 && self.unit.has_byte_extents() {
                let extent_at = extent_address(table, Iova::new(base));
                let extent = extent_at.and_then(|at| self.unit.memory().load_u64(at).ok());
                shown.step.high = extent;
                shown.step.reading.push_str(&format!(", granted in part: {}", reading::extent(extent)));
            }
            return Some(shown);
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
        Some((entry, leaf)) => in_words(entry, level, leaf),
        None => "there is no memory".to_owned(),
    };
    let structure = Structure::SecondStage { level };
    let low = entry.map(|(entry, _)| entry);
    let step = Step { structure, index: index as u16, at, low, high: None, permissions, reading };
    WalkStep { step, iova: Some(Iova::new(base)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::ServeArgs;
    use crate::config::Config;
    use crate::host::Host;
    use iommu_kernel::DmaMap;
    use iommu_types::{DeviceAddress, Direction, Owner, RequestId};

    const PAGES: u64 = 4;

    async fn map(host: &Host, owner: Owner, device: DeviceAddress) -> Option<DomainId> {
        let state = host.owners.get(owner).unwrap();
        let range = state.memory.write().allocate(&host.kernel, PAGES * PAGE_SIZE_BYTES).unwrap();
        let (direction, request_id) = (Direction::Bidirectional, RequestId(1));
        host.dma_map(&state, device, DmaMap::single(range, direction, request_id)).await.unwrap();
        host.device_of(owner, device).unwrap().domain_id
    }

    #[tokio::test]
    async fn a_page_that_is_granted_in_part_is_dumped_with_its_extent() {
        let memory = Some("16MiB".to_owned());
        let args = ServeArgs { insecure_plaintext: true, memory, ..ServeArgs::default() };
        let host = Host::start(Config::from_args(args).unwrap()).await.unwrap();
        let device = DeviceAddress::new(0, SourceId::new(8));
        let scope = Scope::Domain(map(&host, Owner::Driver(0), device).await);
        let pages = || {
            let mut dump = Dump::new(Arc::clone(host.kernel.unit()), device.source_id, false);
            dump.resume(scope);
            let is_page = |step: &Step| step.structure == Structure::SecondStage { level: 1 };
            dump.map(|entry| entry.step).filter(is_page).collect::<Vec<_>>()
        };
        let whole = pages();
        assert!(whole.iter().all(|page| page.high.is_none() && !page.reading.contains("part")), "{whole:?}");
        let memory = host.kernel.memory();
        memory.store_u64(whole[1].at, whole[1].low.unwrap() | PARTIAL).unwrap();
        let extent = memory.load_u64(whole[1].at.checked_add(PAGE_SIZE_BYTES).unwrap()).unwrap();
        let now = pages();
        assert_eq!(now[1].high, Some(extent));
        let words = format!("{}, granted in part: {}", whole[1].reading, reading::extent(Some(extent)));
        assert_eq!(now[1].reading, words);
        assert!((now[0] == whole[0]) && (now[2] == whole[2]), "{now:?}");
    }

    #[tokio::test]
    async fn i2_a_dump_goes_no_further_in_tables_that_are_gone() {
        let memory = Some("16MiB".to_owned());
        let args = ServeArgs { insecure_plaintext: true, memory, ..ServeArgs::default() };
        let host = Host::start(Config::from_args(args).unwrap()).await.unwrap();
        let device = DeviceAddress::new(0, SourceId::new(8));
        let scope = Scope::Domain(map(&host, Owner::Driver(0), device).await);
        let begun = || {
            let mut dump = Dump::new(Arc::clone(host.kernel.unit()), device.source_id, false);
            dump.resume(scope);
            dump
        };
        assert_eq!(begun().count(), 2 + 3 + 4, "root and context, the way down, and four pages");
        let mut dump = begun();
        assert_eq!(dump.by_ref().take(6).count(), 6);
        dump.resume(scope);
        let page = dump.next().expect("it goes on where it was");
        assert_eq!(page.step.structure, Structure::SecondStage { level: 1 });
        // The device changes hands, and the frames of the old tables become tables of its new owner.
        let state = host.devices.get(device).unwrap();
        let owner = host.owners.get(Owner::Driver(1)).unwrap();
        host.give(&state, &owner, None, RequestId(2)).await.unwrap();
        let now = map(&host, Owner::Driver(1), device).await;
        dump.resume(Scope::Domain(now));
        assert_eq!(dump.count(), 0);
    }
}
