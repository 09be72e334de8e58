//! DMA through tables, walk and caches against a flat twin: a list of bytes and a list of pages.

mod machine;

use std::collections::BTreeMap;

use iommu_hardware::dma::{Done, Run, Transfer};
use iommu_hardware::memory::AtomicOperation;
use iommu_hardware::vtd::Request;
use iommu_types::{
    Access, AddressType, Capabilities, DmaFault, FaultReason, Hpa, Invalidation, Iova, IovaRange,
    Permissions, Refusal,
};
use machine::{DEVICE, DOMAIN, Machine, Table};
use proptest::prelude::*;

const PAGES: u64 = 6;
const FRAMES: usize = 4;
/// The pages lie on both sides of a boundary of 2 MiB, so that two level-1 tables are in play.
const BASE: u64 = 0x20_0000 - 3 * 4096;

fn page_at(page: u64) -> u64 {
    BASE + page * 4096
}

fn permissions() -> impl Strategy<Value = Permissions> {
    prop_oneof![Just(Permissions::READ), Just(Permissions::WRITE), Just(Permissions::READ_WRITE)]
}

fn access() -> impl Strategy<Value = Access> {
    prop_oneof![Just(Access::Read), Just(Access::Write), Just(Access::Atomic)]
}

fn range(page: u64, pages: u64) -> IovaRange {
    IovaRange::new(Iova::new(page_at(page)), pages * 4096).expect("a range")
}

#[derive(Clone, Debug)]
enum Step {
    Map(u64, usize, Permissions),
    Unmap(u64),
    InvalidatePages(u64, u64),
    InvalidateDomain,
    InvalidateGlobal,
    Access(u64, Access),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (0..PAGES, 0..FRAMES, permissions()).prop_map(|(page, frame, may)| Step::Map(page, frame, may)),
        2 => (0..PAGES).prop_map(Step::Unmap),
        1 => (0..PAGES, 1..3u64).prop_map(|(page, pages)| Step::InvalidatePages(page, pages)),
        1 => Just(Step::InvalidateDomain),
        1 => Just(Step::InvalidateGlobal),
        8 => (0..PAGES, access()).prop_map(|(page, access)| Step::Access(page, access)),
    ]
}

type Held = Option<(Hpa, Permissions)>;

/// For each page, what its entry held since the last invalidation that covered it; the present one is last.
struct Twin {
    pages: BTreeMap<u64, Vec<Held>>,
}

impl Twin {
    fn set(&mut self, page: u64, held: Held) {
        self.pages.entry(page).or_insert_with(|| vec![None]).push(held);
    }
    fn forget(&mut self, pages: impl Fn(u64) -> bool) {
        for (page, held) in &mut self.pages {
            if pages(*page) {
                held.drain(..held.len() - 1);
            }
        }
    }
    fn of(&self, page: u64) -> &[Held] {
        self.pages.get(&page).map_or(&[None], Vec::as_slice)
    }
}

fn allows(held: &Held, access: Access) -> bool {
    held.is_some_and(|(_, permissions)| permissions.allow(access))
}

proptest! {
    #![proptest_config(machine::cases(48))]

    /// A DMA is served by a translation that the tables held at or after the last invalidation covering it, with its permissions;
    /// and it is refused only when the tables refuse it now.
    #[test]
    fn i2_every_translation_was_held_since_the_last_invalidation(steps in proptest::collection::vec(step(), 1..80)) {
        let (machine, table) = Machine::with_domain(Capabilities::FULL);
        let frames: Vec<Hpa> = (0..FRAMES).map(|_| machine.frame()).collect();
        let mut twin = Twin { pages: BTreeMap::new() };
        let mut port = machine.port(DEVICE);
        for step in steps {
            match step {
                Step::Map(page, frame, may) => {
                    machine.map(table, page_at(page), frames[frame], may);
                    twin.set(page, Some((frames[frame], may)));
                }
                Step::Unmap(page) => {
                    machine.unmap(table, page_at(page));
                    twin.set(page, None);
                }
                Step::InvalidatePages(page, pages) => {
                    let pending = machine.bare.unit().invalidate_pages(DOMAIN, &[range(page, pages)], true);
                    let _drained = pending.wait_blocking();
                    twin.forget(|known| (page..page + pages).contains(&known));
                }
                Step::InvalidateDomain => {
                    machine.invalidate(Invalidation::IotlbDomain(DOMAIN));
                    twin.forget(|_| true);
                }
                Step::InvalidateGlobal => {
                    machine.invalidate(Invalidation::IotlbGlobal);
                    twin.forget(|_| true);
                }
                Step::Access(page, access) => {
                    let iova = Iova::new(page_at(page) + 16);
                    let request = Request { iova, size_bytes: 8, access, pasid: None, address_type: AddressType::Untranslated };
                    let held = twin.of(page);
                    match port.burst().translate(request, |lent| lent.hpa) {
                        Ok(hpa) => {
                            let from = held.iter().any(|held| {
                                allows(held, access) && held.is_some_and(|(frame, _)| frame == hpa.page_base())
                            });
                            prop_assert!(from, "{access} of page {page} came to {hpa}; held: {held:?}");
                        }
                        Err(fault) => {
                            let now = held.last().expect("never empty");
                            prop_assert!(!allows(now, access), "{fault}, but the tables hold {now:?}");
                        }
                    }
                }
            }
        }
    }
}

#[derive(Clone, Debug)]
enum Operation {
    Map(u64, usize, Permissions),
    Unmap(u64),
    Read(u64, usize),
    Write(u64, Vec<u8>),
    Add(u64, u64),
}

fn operation() -> impl Strategy<Value = Operation> {
    let offset = || 0..PAGES * 4096;
    prop_oneof![
        3 => (0..PAGES, 0..FRAMES, permissions()).prop_map(|(page, frame, may)| Operation::Map(page, frame, may)),
        1 => (0..PAGES).prop_map(Operation::Unmap),
        4 => (offset(), 1..10_000usize).prop_map(|(at, size)| Operation::Read(at, size)),
        4 => (offset(), proptest::collection::vec(any::<u8>(), 1..600)).prop_map(|(at, bytes)| Operation::Write(at, bytes)),
        1 => (0..PAGES * 512, any::<u64>()).prop_map(|(unit, more)| Operation::Add(unit * 8, more)),
    ]
}

/// Frames as bytes, pages as frames. Every change is followed by an invalidation, so what is mapped is what is served.
struct Flat {
    frames: Vec<Vec<u8>>,
    pages: BTreeMap<u64, (usize, Permissions)>,
}

impl Flat {
    /// Byte by byte until one is refused: how many were done, and why it ended.
    fn run(
        &mut self,
        at: u64,
        size: usize,
        access: Access,
        mut each: impl FnMut(usize, &mut u8),
    ) -> Result<(), DmaFault> {
        for done in 0..size {
            let offset = at + done as u64;
            let page = self.pages.get(&(offset / 4096)).filter(|(_, may)| may.allow(access));
            let Some((frame, _)) = page else {
                let reason =
                    if access == Access::Read { FaultReason::READ_DENIED } else { FaultReason::WRITE_DENIED };
                return Err(DmaFault {
                    done_bytes: done as u32,
                    iova: Iova::new(BASE + offset),
                    reason: Ok(reason),
                });
            };
            each(done, &mut self.frames[*frame][(offset % 4096) as usize]);
        }
        Ok(())
    }
}

fn change(machine: &Machine, page: u64) {
    let pending = machine.bare.unit().invalidate_pages(DOMAIN, &[range(page, 1)], true);
    let _drained = pending.wait_blocking();
}

fn check_flat(machine: &Machine, table: Table, operations: Vec<Operation>) -> Result<(), TestCaseError> {
    let frames: Vec<Hpa> = (0..FRAMES).map(|_| machine.frame()).collect();
    let mut flat = Flat { frames: vec![vec![0; 4096]; FRAMES], pages: BTreeMap::new() };
    let mut port = machine.port(DEVICE);
    for operation in operations {
        let mut run = Run::new(&mut port);
        match operation {
            Operation::Map(page, frame, may) => {
                machine.map(table, page_at(page), frames[frame], may);
                change(machine, page);
                flat.pages.insert(page, (frame, may));
            }
            Operation::Unmap(page) => {
                machine.unmap(table, page_at(page));
                change(machine, page);
                flat.pages.remove(&page);
            }
            Operation::Read(at, size) => {
                let (mut seen, mut expected) = (vec![0; size], vec![0; size]);
                let done = run.execute(Iova::new(BASE + at), None, Transfer::Read(&mut seen));
                let twin = flat.run(at, size, Access::Read, |index, byte| expected[index] = *byte);
                prop_assert_eq!(done.map(|_| ()), twin);
                prop_assert_eq!(seen, expected);
            }
            Operation::Write(at, bytes) => {
                let done = run.execute(Iova::new(BASE + at), None, Transfer::Write(&bytes));
                let twin = flat.run(at, bytes.len(), Access::Write, |index, byte| *byte = bytes[index]);
                prop_assert_eq!(done.map(|_| ()), twin);
            }
            Operation::Add(at, more) => {
                let add = Transfer::Atomic(AtomicOperation::FetchAdd64(more));
                let done = run.execute(Iova::new(BASE + at), None, add);
                let mut old = [0; 8];
                let may = flat.pages.get(&(at / 4096)).is_some_and(|(_, may)| may.allow(Access::Atomic));
                prop_assert_eq!(done.is_ok(), may);
                if let Ok(done) = done {
                    flat.run(at, 8, Access::Atomic, |index, byte| old[index] = *byte).expect("allowed");
                    let old = u64::from_le_bytes(old);
                    prop_assert_eq!(done, Done::Old(old.into()));
                    let new = old.wrapping_add(more).to_le_bytes();
                    flat.run(at, 8, Access::Atomic, |index, byte| *byte = new[index]).expect("allowed");
                }
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(machine::cases(48))]
    #[test]
    fn dma_moves_the_bytes_that_the_flat_twin_moves(operations in proptest::collection::vec(operation(), 1..60)) {
        let (machine, table) = Machine::with_domain(Capabilities::FULL);
        check_flat(&machine, table, operations)?;
    }
}

/// What one operation ends with.
fn check_operation(iova: u64, transfer: Transfer<'_>, expected: Result<Done, DmaFault>) {
    let (machine, table) = Machine::with_domain(Capabilities::FULL);
    machine.map(table, 0, machine.frame(), Permissions::READ_WRITE);
    machine.map(table, 0x1000, Hpa::new(machine::MEMORY_BYTES), Permissions::READ_WRITE);
    let mut port = machine.port(DEVICE);
    assert_eq!(Run::new(&mut port).execute(Iova::new(iova), None, transfer), expected);
}

#[test]
fn malformed_operations_and_missing_memory_are_refusals_without_a_code() {
    let refused =
        |done_bytes, iova, refusal| Err(DmaFault { done_bytes, iova: Iova::new(iova), reason: Err(refusal) });
    let wraps = u64::MAX - 2;
    check_operation(wraps, Transfer::Write(&[0; 4]), refused(0, wraps, Refusal::Malformed));
    check_operation(wraps, Transfer::Read(&mut [0; 4]), refused(0, wraps, Refusal::Malformed));
    check_operation(0, Transfer::Write(&[]), refused(0, 0, Refusal::Malformed));
    check_operation(4, Transfer::Atomic(AtomicOperation::FetchAdd64(1)), refused(0, 4, Refusal::Malformed));
    let wide = AtomicOperation::Cas128 { compare: 0, new: 1 };
    check_operation(8, Transfer::Atomic(wide), refused(0, 8, Refusal::Malformed));
    check_operation(16, Transfer::Atomic(wide), Ok(Done::Old(0)));
    check_operation(0x1000, Transfer::Read(&mut [0; 4]), refused(0, 0x1000, Refusal::NoMemory));
    check_operation(0xff0, Transfer::Write(&[0; 64]), refused(16, 0x1000, Refusal::NoMemory));
    let beyond = FaultReason::ADDRESS_BEYOND_WIDTH;
    let fault = DmaFault { done_bytes: 0, iova: Iova::new(u64::MAX), reason: Ok(beyond) };
    check_operation(u64::MAX, Transfer::Write(&[1]), Err(fault));
}

#[test]
fn an_operation_that_stops_says_how_much_is_done_and_where_it_ended() {
    let (machine, table) = Machine::with_domain(Capabilities::FULL);
    let first = machine.map_new(table, 0x5000, Permissions::READ_WRITE);
    machine.map_new(table, 0x6000, Permissions::READ_WRITE);
    let fault = machine.write_bytes(0x5ff0, &[7; 0x2000]).expect_err("0x7000 is not mapped");
    assert_eq!((fault.done_bytes, fault.iova.get()), (0x1010, 0x7000));
    assert_eq!(fault.reason, Ok(FaultReason::WRITE_DENIED));
    assert_eq!(machine.load(Hpa::new(first.get() + 0xff8)), u64::from_le_bytes([7; 8]));
}

#[test]
fn a_long_run_leaves_its_epoch_again_and_again() {
    use iommu_hardware::vtd::{BURST_BYTES_MAX, BURST_OPERATIONS_MAX};
    let (machine, table) = Machine::with_domain(Capabilities::FULL);
    for page in 0..64 {
        machine.map_new(table, page * 4096, Permissions::READ_WRITE);
    }
    let lookups = || {
        let counters = machine.bare.unit().counters().context_cache;
        counters.hits + counters.misses
    };
    assert!(machine.read_byte(0).is_ok());
    let mut port = machine.port(DEVICE);
    let touch = |port: &mut iommu_hardware::vtd::Port| {
        Run::new(port).execute(Iova::new(0), None, Transfer::Read(&mut [0])).expect("mapped");
    };
    touch(&mut port);
    // One burst looks its context up once.
    let before = lookups();
    Run::new(&mut port).execute(Iova::new(0), None, Transfer::Write(&[1; 64 * 4096])).expect("mapped");
    assert_eq!(lookups() - before, u64::from(64 * 4096 / BURST_BYTES_MAX));
    let before = lookups();
    let mut run = Run::new(&mut port);
    for _ in 0..2 * BURST_OPERATIONS_MAX {
        run.execute(Iova::new(8), None, Transfer::Read(&mut [0; 8])).expect("mapped");
    }
    drop(run);
    assert_eq!(lookups() - before, 2);
}

#[test]
fn interrupts_and_dma_go_their_ways_in_one_run() {
    let (machine, table) = Machine::with_domain(Capabilities::FULL);
    machine.map_new(table, 0x1000, Permissions::READ_WRITE);
    let mut port = machine.port(DEVICE);
    let mut run = Run::new(&mut port);
    assert_eq!(run.execute(Iova::new(0x1000), None, Transfer::Write(&[1; 4])), Ok(Done::Moved));
    let message = run.execute(Iova::new(0xfee0_5000), None, Transfer::Write(&0x4031u32.to_le_bytes()));
    let Ok(Done::Interrupt(delivered)) = message else { panic!("{message:?}") };
    assert_eq!((delivered.vector, delivered.destination), (0x31, 5));
}
