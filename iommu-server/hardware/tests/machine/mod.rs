//! A bare machine under test: an operating system in miniature that writes tables and programs registers.
#![allow(dead_code, reason = "each test binary uses a part of it")]
#![allow(unreachable_pub, reason = "a module that several test binaries include")]

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use iommu_hardware::bare::BareMachine;
use iommu_hardware::dma::{Done, Run, Transfer};
use iommu_hardware::vtd::spec::invalidation::Descriptor;
use iommu_hardware::vtd::spec::pte::{SecondStageEntry, entry_address, level_shift};
use iommu_hardware::vtd::spec::registers::{FaultRecord, Gcmd, fault_records_offset, offset};
use iommu_hardware::vtd::spec::root_context::{self, ContextEntry, RootEntry};
use iommu_hardware::vtd::{EventMessage, EventSink, Port, QueueProgress, WriteEffect};
use iommu_types::{
    AccessWidth, Capabilities, DmaFault, DomainId, Hpa, Invalidation, Iova, PageSize, Permissions, SourceId,
};
use proptest::test_runner::{Config as ProptestConfig, RngSeed};

pub const MEMORY_BYTES: u64 = 8 << 20;
pub const ROOT: Hpa = Hpa::new(0x1000);
pub const QUEUE: Hpa = Hpa::new(0x2000);
pub const STATUS: Hpa = Hpa::new(0x3000);
pub const INTERRUPTS: Hpa = Hpa::new(0x4000);
/// Frames from here on are handed out by [`Machine::frame`].
pub const FRAMES: u64 = 0x10_0000;
pub const DEVICE: SourceId = SourceId::new(0x0310);
pub const DOMAIN: DomainId = DomainId::new(7);
pub const RW: Permissions = Permissions::READ_WRITE;

/// Property tests of that many cases, the same ones on every run. `PROPTEST_RNG_SEED` chooses others.
pub fn cases(cases: u32) -> ProptestConfig {
    let chosen = ProptestConfig::default();
    let rng_seed = match chosen.rng_seed {
        RngSeed::Random => RngSeed::Fixed(0x10_44),
        fixed => fixed,
    };
    ProptestConfig { cases, rng_seed, failure_persistence: None, ..chosen }
}

/// Keeps event messages.
#[derive(Default)]
pub struct Events(Mutex<Vec<EventMessage>>);

impl Events {
    pub fn take(&self) -> Vec<EventMessage> {
        std::mem::take(&mut self.0.lock().expect("no panic while it is held"))
    }
}

impl EventSink for Events {
    fn deliver(&self, message: EventMessage) {
        self.0.lock().expect("no panic while it is held").push(message);
    }
}

pub struct Machine {
    pub bare: BareMachine,
    pub events: Arc<Events>,
    next_frame: AtomicU64,
    queue_tail: AtomicU64,
    wait_count: AtomicU64,
}

impl Machine {
    pub fn new(capabilities: Capabilities) -> Self {
        let events = Arc::new(Events::default());
        let sink: Arc<dyn EventSink> = Arc::clone(&events) as _;
        let bare = BareMachine::new(MEMORY_BYTES, capabilities, 8, sink).expect("the capabilities are sound");
        Self {
            bare,
            events,
            next_frame: AtomicU64::new(FRAMES),
            queue_tail: AtomicU64::new(0),
            wait_count: AtomicU64::new(0),
        }
    }
    /// Root table latched, queue on, translation on; no context entry yet.
    pub fn translating(capabilities: Capabilities) -> Self {
        let machine = Self::new(capabilities);
        machine.set_root(ROOT.get());
        if capabilities.queued_invalidation {
            machine.queue_on();
        }
        machine.command(Gcmd::new().with_translation(true));
        machine
    }
    /// Translating, and [`DEVICE`] in [`DOMAIN`] with an empty table of 4 levels.
    pub fn with_domain(capabilities: Capabilities) -> (Self, Table) {
        let machine = Self::translating(capabilities);
        let table = machine.table(4);
        machine.attach(DEVICE, DOMAIN, table);
        (machine, table)
    }

    // === memory ===

    pub fn frame(&self) -> Hpa {
        let at = self.next_frame.fetch_add(4096, Ordering::Relaxed);
        assert!(at + 4096 <= MEMORY_BYTES, "the machine has frames left");
        Hpa::new(at)
    }
    pub fn store(&self, at: Hpa, value: u64) {
        self.bare.memory().store_u64(at, value).expect("inside memory");
    }
    pub fn store_wide(&self, at: Hpa, value: u128) {
        self.bare.memory().store_u128(at, value).expect("inside memory");
    }
    pub fn load(&self, at: Hpa) -> u64 {
        self.bare.memory().load_u64(at).expect("inside memory")
    }
    pub fn fill(&self, at: Hpa, byte: u8) {
        self.bare.memory().write(at, &[byte; 4096]).expect("inside memory");
    }

    // === tables ===

    pub fn table(&self, levels: u8) -> Table {
        Table { top: self.frame(), levels }
    }
    /// Where the root and the context entry of a source lie. Makes the context table.
    pub fn context_entry_at(&self, source: SourceId) -> Hpa {
        let root_at = root_context::entry_address(ROOT, source.bus()).expect("inside memory");
        let mut root = RootEntry::from_bits(self.bare.memory().load_u128(root_at).expect("inside memory"));
        if !root.is_present() {
            root = RootEntry::present(self.frame());
            self.store_wide(root_at, root.into_bits());
        }
        root_context::entry_address(root.context_table(), source.devfn()).expect("inside memory")
    }
    pub fn set_context(&self, source: SourceId, entry: ContextEntry) {
        self.store_wide(self.context_entry_at(source), entry.into_bits());
    }
    pub fn attach(&self, source: SourceId, domain: DomainId, table: Table) {
        self.set_context(source, ContextEntry::second_stage(table.top, table.levels, domain));
    }
    /// Where the entry of an address at a level lies. Makes the tables above it.
    pub fn entry_at(&self, table: Table, iova: u64, level: u8) -> Hpa {
        let mut at = table.top;
        for upper in (level + 1..=table.levels).rev() {
            let entry_at = entry_address(at, Iova::new(iova), upper).expect("inside memory");
            let mut entry = SecondStageEntry::from_bits(self.load(entry_at));
            if !entry.is_present() {
                entry = SecondStageEntry::table(self.frame());
                self.store(entry_at, entry.into_bits());
            }
            at = entry.address();
        }
        entry_address(at, Iova::new(iova), level).expect("inside memory")
    }
    pub fn map_size(&self, table: Table, iova: u64, hpa: Hpa, size: PageSize, permissions: Permissions) {
        let at = self.entry_at(table, iova, size.leaf_level());
        self.store(at, SecondStageEntry::leaf(hpa, size, permissions).into_bits());
    }
    pub fn map(&self, table: Table, iova: u64, hpa: Hpa, permissions: Permissions) {
        self.map_size(table, iova, hpa, PageSize::Size4K, permissions);
    }
    /// Maps a fresh frame.
    pub fn map_new(&self, table: Table, iova: u64, permissions: Permissions) -> Hpa {
        let hpa = self.frame();
        self.map(table, iova, hpa, permissions);
        hpa
    }
    pub fn unmap(&self, table: Table, iova: u64) {
        self.store(self.entry_at(table, iova, 1), 0);
    }

    // === registers ===

    pub fn read(&self, offset: u32) -> u32 {
        self.bare.registers().read(offset.into(), AccessWidth::Bytes4).expect("aligned") as u32
    }
    pub fn read_wide(&self, offset: u32) -> u64 {
        self.bare.registers().read(offset.into(), AccessWidth::Bytes8).expect("aligned")
    }
    pub fn write(&self, offset: u32, value: u32) -> WriteEffect {
        let registers = self.bare.registers();
        registers.write(offset.into(), AccessWidth::Bytes4, value.into()).expect("aligned")
    }
    pub fn write_wide(&self, offset: u32, value: u64) -> WriteEffect {
        self.bare.registers().write(offset.into(), AccessWidth::Bytes8, value).expect("aligned")
    }
    /// Runs the queue until nothing is left, as the service does.
    pub fn settle(&self) {
        loop {
            match self.bare.registers().run_queue() {
                QueueProgress::Idle => return,
                QueueProgress::More => {}
                QueueProgress::Draining(drain) => drain.wait_blocking(),
            }
        }
    }
    /// Writes GCMD with further bits set, and waits.
    pub fn command(&self, more: Gcmd) {
        self.write(offset::GCMD, self.kept_status() | more.into_bits());
        self.settle();
    }
    /// Writes GCMD with bits cleared, and waits.
    pub fn command_off(&self, less: Gcmd) {
        self.write(offset::GCMD, self.kept_status() & !less.into_bits());
        self.settle();
    }
    pub fn kept_status(&self) -> u32 {
        self.read(offset::GSTS) & iommu_hardware::vtd::spec::registers::GSTS_KEPT
    }
    pub fn set_root(&self, register: u64) {
        self.write_wide(offset::RTADDR, register);
        self.command(Gcmd::new().with_set_root_table(true));
    }
    pub fn queue_on(&self) {
        self.write_wide(offset::IQT, 0);
        self.queue_tail.store(0, Ordering::Relaxed);
        self.write_wide(offset::IQA, QUEUE.get());
        self.command(Gcmd::new().with_queued_invalidation(true));
    }
    /// Puts descriptors into the queue and moves the tail; does not wait.
    pub fn submit_raw(&self, descriptors: &[u128]) -> WriteEffect {
        let mut tail = self.queue_tail.load(Ordering::Relaxed);
        for descriptor in descriptors {
            self.store_wide(Hpa::new(QUEUE.get() + tail), *descriptor);
            tail = (tail + 16) % 4096;
        }
        self.queue_tail.store(tail, Ordering::Relaxed);
        self.write_wide(offset::IQT, tail)
    }
    pub fn submit(&self, descriptors: &[Descriptor]) -> WriteEffect {
        let raw: Vec<u128> = descriptors.iter().map(Descriptor::encode).collect();
        self.submit_raw(&raw)
    }
    /// A wait descriptor that writes a number nobody has written before to [`STATUS`], and that number.
    pub fn wait_descriptor(&self) -> (Descriptor, u64) {
        let number = self.wait_count.fetch_add(1, Ordering::Relaxed) + 1;
        let status = iommu_hardware::vtd::spec::invalidation::StatusWrite { at: STATUS, data: number as u32 };
        (Descriptor::Wait { interrupt: false, status_write: Some(status), fence: false }, number)
    }
    /// Invalidates through the queue and waits for the status.
    pub fn invalidate(&self, what: Invalidation) {
        let (wait, number) = self.wait_descriptor();
        self.submit(&[Descriptor::Invalidate(what), wait]);
        self.settle();
        assert_eq!(self.load(STATUS), number, "the wait descriptor has completed");
    }
    /// The fault recording register at an index, raw.
    pub fn fault_record(&self, index: u32) -> FaultRecord {
        let count = self.bare.unit().capabilities().fault_records;
        let at = fault_records_offset(count) + 16 * index;
        let (low, high) = (self.read_wide(at), self.read_wide(at + 8));
        FaultRecord::from_bits(u128::from(high) << 64 | u128::from(low))
    }
    /// Clears F of a record.
    pub fn clear_fault(&self, index: u32) {
        let at = fault_records_offset(self.bare.unit().capabilities().fault_records) + 16 * index;
        self.write(at + 12, 1 << 31);
    }

    // === devices ===

    pub fn port(&self, source: SourceId) -> Port {
        self.bare.port(source).expect("a port is free")
    }
    pub fn read_byte(&self, iova: u64) -> Result<u8, DmaFault> {
        self.read_byte_of(DEVICE, iova)
    }
    pub fn read_byte_of(&self, source: SourceId, iova: u64) -> Result<u8, DmaFault> {
        let mut byte = [0];
        let mut port = self.port(source);
        Run::new(&mut port).execute(Iova::new(iova), None, Transfer::Read(&mut byte))?;
        Ok(byte[0])
    }
    pub fn write_bytes(&self, iova: u64, bytes: &[u8]) -> Result<Done, DmaFault> {
        let mut port = self.port(DEVICE);
        Run::new(&mut port).execute(Iova::new(iova), None, Transfer::Write(bytes))
    }
}

/// A second-stage table.
#[derive(Clone, Copy, Debug)]
pub struct Table {
    pub top: Hpa,
    pub levels: u8,
}

impl Table {
    /// Bytes that an entry of a level covers.
    pub fn covered_bytes(level: u8) -> u64 {
        1 << level_shift(level)
    }
}
