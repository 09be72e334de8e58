//! Tables in a map: what the walk's tests build and break.
#![allow(dead_code, reason = "each test binary uses a part of it")]
#![allow(unreachable_pub, reason = "a module that several test binaries include")]

use std::collections::BTreeMap;

use iommu_hardware::memory::NoMemoryAt;
use iommu_hardware::vtd::spec::extent::{ByteExtent, extent_address};
use iommu_hardware::vtd::spec::pte::{self, SecondStageEntry};
use iommu_hardware::vtd::spec::root_context::{self, ContextEntry, RootEntry};
use iommu_hardware::vtd::walk::{
    Leaf, NoTrace, RootMode, RootTable, StepCollector, TableMemory, TableRules, Trace, WalkFault,
    walk_context, walk_second_stage,
};
use iommu_types::{
    Access, Capabilities, DomainId, Hpa, Iova, PAGE_SIZE_BYTES, PageSize, Permissions, SourceId, Step,
};

pub const ROOT: Hpa = Hpa::new(0x1000);
pub const CONTEXT: Hpa = Hpa::new(0x2000);
pub const DOMAIN: DomainId = DomainId::new(7);

/// Memory with holes: frames of 512 words.
#[derive(Clone, Debug, Default)]
pub struct MapMemory {
    pub frames: BTreeMap<u64, Vec<u64>>,
}

impl MapMemory {
    pub fn add_frame(&mut self, at: Hpa) {
        self.frames.entry(at.page_number()).or_insert_with(|| vec![0; 512]);
    }
    pub fn remove_frame(&mut self, at: Hpa) {
        self.frames.remove(&at.page_number());
    }
    /// Writes a word, and brings the frame into being.
    pub fn store(&mut self, at: Hpa, word: u64) {
        self.add_frame(at);
        let frame = self.frames.get_mut(&at.page_number()).expect("just added");
        frame[(at.page_offset() / 8) as usize] = word;
    }
    pub fn store_wide(&mut self, at: Hpa, value: u128) {
        self.store(at, value as u64);
        self.store(Hpa::new(at.get() + 8), (value >> 64) as u64);
    }
    pub fn word(&self, at: Hpa) -> Option<u64> {
        self.frames.get(&at.page_number()).map(|frame| frame[(at.page_offset() / 8) as usize])
    }
}

impl TableMemory for MapMemory {
    fn load_u64(&self, at: Hpa) -> Result<u64, NoMemoryAt> {
        assert!(at.is_aligned(8), "entries are loaded at multiples of their size");
        self.word(at).ok_or(NoMemoryAt { at, size_bytes: 8 })
    }
    fn load_u128(&self, at: Hpa) -> Result<u128, NoMemoryAt> {
        assert!(at.is_aligned(16), "entries are loaded at multiples of their size");
        let word = |at| self.word(at).ok_or(NoMemoryAt { at, size_bytes: 16 });
        Ok(u128::from(word(at)?) | u128::from(word(Hpa::new(at.get() + 8))?) << 64)
    }
}

/// A unit's tables and one request.
#[derive(Clone, Debug)]
pub struct World {
    pub memory: MapMemory,
    pub capabilities: Capabilities,
    /// Whether the unit knows partial pages. Tables always have room for extents behind them.
    pub byte_extents: bool,
    pub root: RootTable,
    pub source: SourceId,
    pub levels: u8,
    pub iova: Iova,
    pub access: Access,
    pub size_bytes: u32,
    next_table: u64,
}

impl World {
    /// A source with a context entry and an empty top-level table.
    pub fn new(levels: u8) -> Self {
        let mut world = Self {
            memory: MapMemory::default(),
            capabilities: Capabilities::FULL,
            byte_extents: false,
            root: RootTable { base: ROOT, mode: RootMode::Legacy },
            source: SourceId::at(1, 2, 3).expect("within bounds"),
            levels,
            iova: Iova::new(0x12_3456_7000),
            access: Access::Read,
            size_bytes: 8,
            next_table: 0x10_0000,
        };
        world.memory.store_wide(world.root_at(), RootEntry::present(CONTEXT).into_bits());
        let top = world.new_table();
        world.set_context(ContextEntry::second_stage(top, levels, DOMAIN));
        world
    }
    /// A world in which the request is mapped by a 4 KiB page with both permissions.
    pub fn mapped(levels: u8) -> Self {
        let mut world = Self::new(levels);
        world.map(world.iova, Hpa::new(0x5000_0000), PageSize::Size4K, Permissions::READ_WRITE);
        world
    }
    pub fn rules(&self) -> TableRules<'_> {
        TableRules { capabilities: &self.capabilities, byte_extents: self.byte_extents }
    }
    /// Makes the (mapped) page of an address partial: its extent word is `word`.
    pub fn set_extent_word(&mut self, iova: Iova, word: u64) {
        let at = self.entry_at(iova, 1).expect("mapped in 4 KiB");
        let raw = self.memory.word(at).expect("a table");
        self.memory.store(at, raw | 1 << 52);
        self.memory.store(extent_address(at.page_base(), iova).expect("fits"), word);
    }
    pub fn set_extent(&mut self, iova: Iova, first: u16, last: u16) {
        let extent = ByteExtent::new(first, last).expect("in order");
        self.set_extent_word(iova, extent.into_word());
    }
    pub fn new_table(&mut self) -> Hpa {
        let table = Hpa::new(self.next_table);
        self.next_table += 2 * PAGE_SIZE_BYTES;
        self.memory.add_frame(table);
        table
    }
    pub fn root_at(&self) -> Hpa {
        root_context::entry_address(self.root.base, self.source.bus()).expect("fits")
    }
    pub fn context_at(&self) -> Hpa {
        root_context::entry_address(CONTEXT, self.source.devfn()).expect("fits")
    }
    pub fn context(&self) -> ContextEntry {
        ContextEntry::from_bits(self.memory.load_u128(self.context_at()).expect("the context table is there"))
    }
    pub fn set_context(&mut self, entry: ContextEntry) {
        self.memory.store_wide(self.context_at(), entry.into_bits());
    }
    /// Sets bits of the root entry.
    pub fn damage_root(&mut self, bits: u128) {
        let raw = self.memory.load_u128(self.root_at()).expect("the root table is there");
        self.memory.store_wide(self.root_at(), raw ^ bits);
    }
    /// Flips bits of the context entry.
    pub fn damage_context(&mut self, bits: u128) {
        let raw = self.context().into_bits();
        self.set_context(ContextEntry::from_bits(raw ^ bits));
    }
    /// Flips bits of the second-stage entry of the request's address at a level.
    pub fn damage(&mut self, level: u8, bits: u64) {
        let at = self.entry_at(self.iova, level).expect("the tables reach down to the level");
        let raw = self.memory.word(at).expect("a table");
        self.memory.store(at, raw ^ bits);
    }
    /// Where the entry of an address stands at a level; `None` when no table leads there.
    pub fn entry_at(&self, iova: Iova, level: u8) -> Option<Hpa> {
        let mut table = self.context().second_stage_table();
        for above in (level + 1..=self.levels).rev() {
            let raw = self.memory.word(pte::entry_address(table, iova, above)?)?;
            let entry = SecondStageEntry::from_bits(raw);
            if !entry.is_present() || entry.is_leaf_at(above) {
                return None;
            }
            table = entry.address();
        }
        pte::entry_address(table, iova, level)
    }
    /// Maps a page; tables on the way come into being. Says whether there was room.
    pub fn map(&mut self, iova: Iova, hpa: Hpa, size: PageSize, permissions: Permissions) -> bool {
        for level in (size.leaf_level() + 1..=self.levels).rev() {
            let Some(at) = self.entry_at(iova, level) else { return false };
            let entry = SecondStageEntry::from_bits(self.memory.word(at).expect("a table"));
            if !entry.is_present() {
                let table = self.new_table();
                self.memory.store(at, SecondStageEntry::table(table).into_bits());
            }
        }
        let Some(at) = self.entry_at(iova, size.leaf_level()) else { return false };
        if self.memory.word(at) != Some(0) {
            return false;
        }
        self.memory.store(at, SecondStageEntry::leaf(hpa, size, permissions).into_bits());
        true
    }
    /// The walk of the request, from the top, with what a trace sees.
    pub fn walk_with(&self, trace: &mut impl Trace) -> Result<Leaf, WalkFault> {
        let context = walk_context(&self.memory, &self.capabilities, self.root, self.source, trace)?;
        walk_second_stage(
            &self.memory,
            self.rules(),
            &context,
            None,
            self.iova,
            self.access,
            self.size_bytes,
            trace,
            |_| {},
        )
    }
    /// The walk of the request. Explain's walk must end the same way.
    pub fn walk(&self) -> Result<Leaf, WalkFault> {
        let (explained, _) = self.explain();
        let walked = self.walk_with(&mut NoTrace);
        assert_eq!(walked, explained, "Explain is the shipping walk");
        walked
    }
    pub fn explain(&self) -> (Result<Leaf, WalkFault>, Vec<Step>) {
        let mut collector = StepCollector::new(self.rules());
        let outcome = self.walk_with(&mut collector);
        (outcome, collector.into_steps())
    }
}

/// A generator of numbers from a seed (SplitMix64).
#[derive(Clone, Debug)]
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
}
