//! The second-stage tables of a domain (VT-d 5.10 §9.8), and what software knows about them.
//!
//! Entries stand in physical memory and nowhere else; the walk of the hardware is the truth. Kept beside is one node per table: where
//! it is, how many entries are present, and for leaf tables which mapping begins at which page. Nodes are found by
//! (level, address above the table), so no operation walks.
//!
//! **A table is reused only after a drain.** A table whose last entry goes stays in place for the next map (a ring that maps and
//! unmaps one page would otherwise build and tear down tables all the time). When more than [`EMPTY_TABLES_MAX`] are
//! empty, all of them are unhooked, the whole domain is invalidated, paging structures included, and the frames wait for
//! that drain before they are tables again or anybody's memory.

mod frames;
mod slots;
mod split;

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use iommu_hardware::memory::PhysicalMemory;
use iommu_hardware::vtd::spec::extent::{self, ByteExtent};
use iommu_hardware::vtd::spec::pte::{self, ENTRIES_PER_TABLE, SecondStageEntry};
use iommu_types::{Hpa, Iova, IovaRange, PAGE_SIZE_BYTES, PageSize, Permissions};

use super::Shortage;
use crate::account::OwnerAccount;
use crate::boot::Kernel;
pub(super) use crate::frames::append;
use crate::frames::{FrameRun, frame_at};

/// Empty tables that stay in place.
const EMPTY_TABLES_MAX: usize = 16;
/// Unused frames that a domain keeps for tables.
const SPARE_TABLES_MAX: usize = 8;
/// The deepest tables have 5 levels.
const LEVELS_MAX: usize = 5;

/// Neighbouring pages of one size, and where they go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) iova: Iova,
    pub(super) hpa: Hpa,
    pub(super) size: PageSize,
    /// In units of `size`.
    pub(super) pages: u64,
}

/// A table: its level, and the addresses above it.
type Key = u64;

fn key(level: u8, iova: Iova) -> Key {
    (iova.get() >> pte::level_shift(level + 1)) << 3 | Key::from(level)
}

fn level_of(key: Key) -> u8 {
    (key & 7) as u8
}

fn first_address(key: Key) -> Iova {
    Iova::new((key >> 3) << pte::level_shift(level_of(key) + 1))
}

/// A multiplication, folded. Keys are few per domain and bounded, and a tenant who makes its own collide slows only itself.
#[derive(Default)]
struct KeyHasher(u64);

impl Hasher for KeyHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, _bytes: &[u8]) {
        unreachable!("keys are u64");
    }
    fn write_u64(&mut self, key: u64) {
        let product = u128::from(key) * 0x9e37_79b9_7f4a_7c15;
        self.0 = (product >> 64) as u64 ^ product as u64;
    }
}

type Nodes = HashMap<Key, Node, BuildHasherDefault<KeyHasher>>;

/// What software knows about a table.
#[derive(Debug)]
struct Node {
    table: Hpa,
    /// Present entries.
    live: u16,
    /// Whether the table is in the list of empty ones (it may have filled up since).
    is_listed: bool,
    /// Leaf tables with DMA-API mappings: per page, the record of the mapping that begins there, plus one.
    slots: Option<Box<[u32; ENTRIES_PER_TABLE as usize]>>,
}

/// The tables of one domain.
#[derive(Debug)]
pub(super) struct Tables {
    top: Hpa,
    levels: u8,
    nodes: Nodes,
    empty: Vec<Key>,
    /// Zeroed frames for tables.
    spare: Spares,
    /// Byte granularity: each leaf table is followed by its extent table.
    has_extents: bool,
    counters: TableCounters,
}

/// What the tables of a domain have cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct TableCounters {
    /// Entries written or cleared.
    pub(super) entry_writes: u64,
    /// Tables put in place.
    pub(super) tables_built: u64,
    /// Tables taken out of the way.
    pub(super) tables_reclaimed: u64,
}

/// Unused frames, zeroed.
#[derive(Debug, Default)]
struct Spares {
    single: Vec<Hpa>,
    /// Two neighbouring frames each: a leaf table and its extent table. Only with byte granularity.
    pairs: Vec<Hpa>,
}

impl Spares {
    fn frames(&self) -> u64 {
        (self.single.len() + 2 * self.pairs.len()) as u64
    }
}

/// How many tables are needed.
#[derive(Clone, Copy, Debug, Default)]
struct Missing {
    single: usize,
    pairs: usize,
}

/// The frames of a table that is out of the way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Unhooked {
    base: Hpa,
    is_pair: bool,
}

impl Tables {
    /// An empty top-level table.
    pub(super) fn new(
        kernel: &Kernel,
        account: &OwnerAccount,
        levels: u8,
        has_extents: bool,
    ) -> Result<Self, Shortage> {
        let mut tables = Self { levels, has_extents, ..Self::none() };
        tables.stock_up(kernel, account, Missing { single: 1, pairs: 0 })?;
        tables.top = tables.spare.single.pop().expect("one was stocked");
        tables.nodes.insert(key(levels, Iova::new(0)), Node::new(tables.top));
        Ok(tables)
    }
    /// No tables at all: those of a ring domain are elsewhere.
    pub(super) fn none() -> Self {
        Self {
            top: Hpa::new(0),
            levels: 0,
            nodes: Nodes::default(),
            empty: Vec::new(),
            spare: Spares::default(),
            has_extents: false,
            counters: TableCounters::default(),
        }
    }
    pub(super) fn counters(&self) -> TableCounters {
        self.counters
    }
    pub(super) fn top(&self) -> (Hpa, u8) {
        (self.top, self.levels)
    }
    pub(super) fn bytes(&self) -> u64 {
        let leaves =
            if self.has_extents { self.nodes.keys().filter(|key| level_of(**key) == 1).count() } else { 0 };
        ((self.nodes.len() + leaves) as u64 + self.spare.frames()) * PAGE_SIZE_BYTES
    }
    /// Whether a table stands below the entry that a page of `size` at `iova` would take.
    pub(super) fn has_table_under(&self, iova: Iova, size: PageSize) -> bool {
        self.nodes.contains_key(&key(size.leaf_level() - 1, iova))
    }
    /// Gets every frame that mapping `extents` can need, or changes nothing. `map` then cannot fail.
    pub(super) fn reserve(
        &mut self,
        kernel: &Kernel,
        account: &OwnerAccount,
        extents: &[Extent],
    ) -> Result<(), Shortage> {
        let missing = self.missing(extents);
        let is_stocked = missing.single <= self.spare.single.len() && missing.pairs <= self.spare.pairs.len();
        if is_stocked { Ok(()) } else { self.stock_up(kernel, account, missing) }
    }
    /// Tables that do not exist yet. Extents ascend, so a table is counted once by looking at the one before.
    fn missing(&self, extents: &[Extent]) -> Missing {
        let mut counted: [Option<Key>; LEVELS_MAX + 1] = [None; LEVELS_MAX + 1];
        let mut missing = Missing::default();
        for table in extents.iter().flat_map(|extent| extent.tables()) {
            for level in table.level..self.levels {
                let key = key(level, table.iova);
                if counted[usize::from(level)] == Some(key) || self.nodes.contains_key(&key) {
                    break;
                }
                counted[usize::from(level)] = Some(key);
                if self.is_pair(level) {
                    missing.pairs += 1;
                } else {
                    missing.single += 1;
                }
            }
        }
        missing
    }
    fn is_pair(&self, level: u8) -> bool {
        self.has_extents && level == 1
    }
    /// Writes the entries. `reserve` succeeded for these extents, and nothing is mapped there. With byte granularity `bytes` says which
    /// are open: the first page and the last may be open in part.
    pub(super) fn map(
        &mut self,
        memory: &PhysicalMemory,
        extents: &[Extent],
        permissions: Permissions,
        bytes: IovaRange,
    ) {
        let has_extents = self.has_extents;
        for extent in extents {
            let mut page = 0;
            for part in extent.tables() {
                let node = self.install(memory, part.level, part.iova);
                let at = entry_at(node.table, part.iova, part.level);
                for entry in 0..part.entries {
                    let hpa = frame_at(extent.hpa, page * (extent.size.bytes() / PAGE_SIZE_BYTES));
                    let mut leaf = SecondStageEntry::leaf(hpa, extent.size, permissions);
                    if has_extents && part.level == 1 {
                        let iova = Iova::new(part.iova.get() + entry * PAGE_SIZE_BYTES);
                        let open = ByteExtent::of_page(bytes, iova.page_number());
                        leaf = write_extent(memory, node.table, iova, open, leaf);
                    }
                    store(memory, at, entry, leaf);
                    page += 1;
                }
                node.live += part.entries as u16;
                self.counters.entry_writes += part.entries;
            }
        }
    }
    /// Writes the entry of a 4 KiB page that is mapped again, so that it allows more than before.
    pub(super) fn reopen(
        &mut self,
        memory: &PhysicalMemory,
        iova: Iova,
        extent: ByteExtent,
        permissions: Permissions,
    ) {
        let node = &self.nodes[&key(1, iova)];
        let at = entry_at(node.table, iova, 1);
        let leaf = SecondStageEntry::leaf(load(memory, at, 0).address(), PageSize::Size4K, permissions);
        let leaf = if self.has_extents { write_extent(memory, node.table, iova, extent, leaf) } else { leaf };
        store(memory, at, 0, leaf);
        self.counters.entry_writes += 1;
    }
    /// The node of the table of `level` over `iova`, which is made of a spare frame when it does not exist.
    fn install(&mut self, memory: &PhysicalMemory, level: u8, iova: Iova) -> &mut Node {
        let key = key(level, iova);
        if !self.nodes.contains_key(&key) {
            let spare = if self.is_pair(level) { &mut self.spare.pairs } else { &mut self.spare.single };
            let table = spare.pop().expect("reserve got a frame for every table");
            self.counters.tables_built += 1;
            self.counters.entry_writes += 1;
            let parent = self.install(memory, level + 1, iova);
            store(memory, entry_at(parent.table, iova, level + 1), 0, SecondStageEntry::table(table));
            parent.live += 1;
            self.nodes.insert(key, Node::new(table));
        }
        self.nodes.get_mut(&key).expect("it exists or was made")
    }
    /// Clears the entries of a mapping of `pages` 4 KiB pages and appends the frames that they pointed at.
    pub(super) fn unmap(
        &mut self,
        memory: &PhysicalMemory,
        first_page: u64,
        pages: u64,
        frames: &mut Vec<FrameRun>,
    ) {
        let end = first_page + pages;
        let mut page = first_page;
        while page < end {
            let iova = Iova::new(page * PAGE_SIZE_BYTES);
            let size = self.leaf_size(iova);
            let level = size.leaf_level();
            let key = key(level, iova);
            let node = self.nodes.get_mut(&key).expect("a mapping has tables");
            let frames_per_entry = size.bytes() / PAGE_SIZE_BYTES;
            let index = pte::table_index(iova, level);
            let most = ((end - page) / frames_per_entry).min(ENTRIES_PER_TABLE - index);
            let at = entry_at(node.table, iova, level);
            let mut entries = 0;
            while entries < most {
                let leaf = load(memory, at, entries);
                // Where a table stands, pages of the mapping are smaller: another turn finds them.
                if !leaf.is_leaf_at(level) && leaf.is_present() {
                    break;
                }
                assert!(leaf.is_present(), "a mapping has an entry for each of its pages");
                store(memory, at, entries, SecondStageEntry::new());
                if leaf.partial_page() && self.has_extents {
                    let page = Iova::new(iova.get() + entries * PAGE_SIZE_BYTES);
                    store_extent(memory, node.table, page, 0);
                }
                append(frames, FrameRun { base: leaf.address(), frames: frames_per_entry });
                entries += 1;
            }
            assert!(entries > 0, "a mapping has a page at each of its addresses");
            node.live -= entries as u16;
            self.counters.entry_writes += entries;
            if node.live == 0 && !node.is_listed && level != self.levels {
                node.is_listed = true;
                self.empty.push(key);
            }
            page += entries * frames_per_entry;
        }
    }
    /// The size of the page that is mapped at `iova`: a leaf stands in the deepest table that exists.
    fn leaf_size(&self, iova: Iova) -> PageSize {
        let has_table = |size: &PageSize| self.nodes.contains_key(&key(size.leaf_level(), iova));
        PageSize::ALL.into_iter().find(has_table).expect("a mapping has tables")
    }
    /// Unhooks all empty tables when there are too many. Their frames may be reused only after a drain that invalidated the paging
    /// structures of the whole domain; returns whether there are any.
    pub(super) fn unhook_empty(&mut self, memory: &PhysicalMemory, unhooked: &mut Vec<Unhooked>) -> bool {
        if self.empty.len() <= EMPTY_TABLES_MAX {
            return false;
        }
        let before = unhooked.len();
        while let Some(empty) = self.empty.pop() {
            let node = self.nodes.get_mut(&empty).expect("listed tables exist");
            node.is_listed = false;
            if node.live > 0 {
                continue;
            }
            let is_pair = self.has_extents && level_of(empty) == 1;
            unhooked.push(Unhooked { base: node.table, is_pair });
            self.nodes.remove(&empty);
            self.counters.tables_reclaimed += 1;
            self.counters.entry_writes += 1;
            let (level, iova) = (level_of(empty) + 1, first_address(empty));
            let above = key(level, iova);
            let parent = self.nodes.get_mut(&above).expect("a table is reached through another");
            store(memory, entry_at(parent.table, iova, level), 0, SecondStageEntry::new());
            parent.live -= 1;
            if parent.live == 0 && !parent.is_listed && level != self.levels {
                parent.is_listed = true;
                self.empty.push(above);
            }
        }
        unhooked.len() > before
    }
}

impl Node {
    fn new(table: Hpa) -> Self {
        Self { table, live: 0, is_listed: false, slots: None }
    }
}

/// The part of an extent that lies in one table.
struct Part {
    level: u8,
    iova: Iova,
    entries: u64,
}

impl Extent {
    fn tables(&self) -> impl Iterator<Item = Part> {
        let (level, size_bytes) = (self.size.leaf_level(), self.size.bytes());
        let (mut iova, mut left) = (self.iova.get(), self.pages);
        std::iter::from_fn(move || {
            if left == 0 {
                return None;
            }
            let at = Iova::new(iova);
            let entries = left.min(ENTRIES_PER_TABLE - pte::table_index(at, level));
            left -= entries;
            iova = iova.wrapping_add(entries * size_bytes);
            Some(Part { level, iova: at, entries })
        })
    }
}

fn leaf_key(page: u64) -> Key {
    key(1, Iova::new(page * PAGE_SIZE_BYTES))
}

fn slot_index(page: u64) -> usize {
    (page % ENTRIES_PER_TABLE) as usize
}

/// Says which bytes of a page are open, before the entry that points to it is written: all of a page is no extent.
fn write_extent(
    memory: &PhysicalMemory,
    leaf_table: Hpa,
    iova: Iova,
    open: ByteExtent,
    leaf: SecondStageEntry,
) -> SecondStageEntry {
    if open == ByteExtent::WHOLE {
        store_extent(memory, leaf_table, iova, 0);
        return leaf;
    }
    store_extent(memory, leaf_table, iova, open.into_word());
    leaf.with_partial_page(true)
}

fn store_extent(memory: &PhysicalMemory, leaf_table: Hpa, iova: Iova, word: u64) {
    let at = extent::extent_address(leaf_table, iova).expect("tables of ours lie in memory");
    memory.store_u64(at, word).expect("tables of ours lie in memory");
}

fn entry_at(table: Hpa, iova: Iova, level: u8) -> Hpa {
    pte::entry_address(table, iova, level).expect("tables of ours lie in memory")
}

fn load(memory: &PhysicalMemory, first: Hpa, entry: u64) -> SecondStageEntry {
    let at = first.checked_add(entry * pte::ENTRY_BYTES).expect("tables of ours lie in memory");
    SecondStageEntry::from_bits(memory.load_u64(at).expect("tables of ours lie in memory"))
}

fn store(memory: &PhysicalMemory, first: Hpa, entry: u64, value: SecondStageEntry) {
    let at = first.checked_add(entry * pte::ENTRY_BYTES).expect("tables of ours lie in memory");
    memory.store_u64(at, value.into_bits()).expect("tables of ours lie in memory");
}
