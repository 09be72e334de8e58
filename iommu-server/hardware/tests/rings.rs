//! Translation through rings: refusals, the one cached entry of a ring, and the bytes that really move.

mod machine;
mod ring_world;

use iommu_hardware::dma::{Done, Run, Transfer};
use iommu_hardware::riommu::RingEntryState;
use iommu_hardware::riommu::spec::{Ring, RingDevice, RingPte, RingRoot, SLOT_BYTES_MAX, SLOTS_MAX};
use iommu_hardware::vtd::{Request, RingCounters};
use iommu_types::{
    Access, AddressType, AtomicOperation, DmaFault, Fault, FaultReason, Hpa, Iova, Pasid, Permissions,
    Refusal, TranslationFault,
};
use machine::DEVICE;
use ring_world::{RW, RingWorld, iova, reach, read, request, translate};

/// One access to slot 3 of ring 1, which is valid but for what `spoil` does, is refused with that reason.
fn check_refused(expected: FaultReason, request: Request, spoil: impl FnOnce(&RingWorld)) {
    let world = RingWorld::new(&[4, 8]);
    world.map_new(1, 3, RW);
    let mut port = world.port();
    spoil(&world);
    let fault = translate(&mut port, request).expect_err("refused");
    assert_eq!(fault.reason, expected, "{request:?}");
    assert_eq!((fault.source_id, fault.iova, fault.access), (DEVICE, request.iova, request.access));
    // I6: recorded once. A record has the page of the address.
    let fault = TranslationFault { iova: fault.iova.page_base(), ..fault };
    let recorded: Vec<Fault> = world.unit().take_faults().into_iter().map(|record| record.fault).collect();
    assert_eq!(recorded, [Fault::Dma(fault)]);
    assert_eq!((world.unit().counters().faults, world.unit().counters().faults_suppressed), (1, 0));
    assert_eq!(world.unit().ring_entries(DEVICE), [], "a refused access fills nothing");
}

const NOWHERE: Hpa = Hpa::new(0x4000_0000);
const ACCESS: Request = Request {
    iova: Iova::new(1 << 48 | 3 << 30),
    size_bytes: 8,
    access: Access::Read,
    pasid: None,
    address_type: AddressType::Untranslated,
};

#[test]
fn i6_a_device_without_rings_is_refused_and_recorded() {
    let absent = FaultReason::RING_DEVICE_ABSENT;
    let root_at = |world: &RingWorld, entry| world.store(world.root_entry_at(), entry);
    let device_at =
        |world: &RingWorld, entry: RingDevice| world.store(world.device_entry_at(), entry.into_bits());
    check_refused(absent, ACCESS, |world| root_at(world, 0));
    check_refused(absent, ACCESS, |world| root_at(world, RingRoot::present(world.devices).into_bits() & !1));
    check_refused(absent, ACCESS, |world| root_at(world, RingRoot::present(NOWHERE).into_bits()));
    check_refused(absent, ACCESS, |world| root_at(world, u128::MAX));
    check_refused(absent, ACCESS, |world| device_at(world, RingDevice::with_rings_at(world.rings, 0)));
    check_refused(absent, ACCESS, |world| world.unit().set_ring_root(NOWHERE));
    check_refused(absent, ACCESS, |world| world.unit().set_ring_root(Hpa::new(!0xfff)));
}

#[test]
fn i6_a_ring_or_slot_that_is_not_there_is_refused_and_recorded() {
    let beyond_device = FaultReason::RING_BEYOND_DEVICE;
    check_refused(beyond_device, read(2, 0), |_| ());
    check_refused(beyond_device, read(u16::MAX, 3), |_| ());
    check_refused(beyond_device, ACCESS, |world| {
        world.store(world.device_entry_at(), RingDevice::with_rings_at(world.rings, 1).into_bits());
    });
    let beyond_size = FaultReason::RING_BEYOND_SIZE;
    check_refused(beyond_size, read(1, 8), |_| ());
    check_refused(beyond_size, read(1, SLOTS_MAX - 1), |_| ());
    check_refused(beyond_size, ACCESS, |world| {
        world.store(world.ring_at(1), Ring::with_slots_at(world.slot_at(1, 0), 3).into_bits());
    });
    let invalid = FaultReason::RING_SLOT_INVALID;
    check_refused(invalid, read(1, 2), |_| ());
    check_refused(invalid, ACCESS, |world| world.unmap(1, 3));
    check_refused(invalid, ACCESS, |world| world.map(1, 3, RingPte::from_bits(!(1 << 96))));
}

#[test]
fn i6_an_access_that_the_slot_does_not_allow_is_refused_and_recorded() {
    let beyond = FaultReason::RING_BEYOND_SLOT;
    let only = |permissions| {
        move |world: &RingWorld| {
            world.map_new(1, 3, permissions);
        }
    };
    check_refused(beyond, request(1, 3, 4096, 1, Access::Read), |_| ());
    check_refused(beyond, request(1, 3, SLOT_BYTES_MAX, 1, Access::Write), |_| ());
    check_refused(beyond, request(1, 3, 0, 5, Access::Write), |world| {
        world.map(1, 3, RingPte::valid(world.root, 4, RW));
    });
    check_refused(
        FaultReason::RING_WRITE_DENIED,
        Request { access: Access::Write, ..ACCESS },
        only(Permissions::READ),
    );
    check_refused(
        FaultReason::RING_WRITE_DENIED,
        Request { access: Access::Atomic, ..ACCESS },
        only(Permissions::READ),
    );
    check_refused(FaultReason::RING_READ_DENIED, ACCESS, only(Permissions::WRITE));
    check_refused(
        FaultReason::RING_READ_DENIED,
        Request { access: Access::Atomic, ..ACCESS },
        only(Permissions::WRITE),
    );
    check_refused(FaultReason::RESULT_IN_INTERRUPT_RANGE, ACCESS, |world| {
        world.map(1, 3, RingPte::valid(Hpa::new(0xfedf_fffc), 4096, RW));
    });
}

#[test]
fn i6_tables_that_cannot_be_read_are_refused_and_recorded() {
    let unreadable = FaultReason::RING_TABLE_ACCESS;
    for rings in [NOWHERE, Hpa::new(0x1008), Hpa::new(u64::MAX), Hpa::new(u64::MAX - 31)] {
        check_refused(unreadable, ACCESS, |world| {
            world.store(world.device_entry_at(), RingDevice::with_rings_at(rings, 4).into_bits());
        });
    }
    for slots in [NOWHERE, Hpa::new(0x1004), Hpa::new(u64::MAX), Hpa::new(u64::MAX - 15)] {
        check_refused(unreadable, ACCESS, |world| {
            world.store(world.ring_at(1), Ring::with_slots_at(slots, 8).into_bits());
        });
    }
}

#[test]
fn requests_that_only_other_modes_know_are_refused_before_the_tables() {
    check_refused(
        FaultReason::PASID_IN_LEGACY_MODE,
        Request { pasid: Pasid::new(7), address_type: AddressType::Translated, ..ACCESS },
        |_| (),
    );
    for address_type in [AddressType::Translated, AddressType::TranslationRequest] {
        check_refused(FaultReason::TRANSLATED_BLOCKED, Request { address_type, ..ACCESS }, |_| ());
    }
}

#[test]
fn the_interrupt_range_is_looked_at_before_rings() {
    let message = Iova::new(0xfee0_0000);
    let world = RingWorld::new(&[4]);
    // The range is a part of slot 3 of ring 0, which opens all of it.
    world.map(0, 3, RingPte::valid(Hpa::new(0x1000), SLOT_BYTES_MAX, RW));
    let word = world.execute(message, Transfer::Write(&[0x31, 0, 0, 0])).expect("remapping is off");
    assert!(matches!(word, Done::Interrupt(delivered) if delivered.vector == 0x31), "{word:?}");
    let refused = world.execute(message, Transfer::Read(&mut [0; 8])).expect_err("no interrupt");
    assert_eq!(refused.reason, Ok(FaultReason::IR_INVALID_ACCESS));
    assert_eq!(world.execute(message, Transfer::Read(&mut [])), Ok(Done::Moved));
    assert_eq!(world.ring_counters(), RingCounters::default());
}

#[test]
fn sequential_dma_reads_no_table_on_the_demand_path_after_the_first() {
    let world = RingWorld::new(&[8]);
    let frames = world.map_all(0);
    let mut port = world.port();
    for round in 0..3 {
        for slot in 0..8 {
            for _packet_part in 0..2 {
                assert_eq!(reach(&mut port, read(0, slot)), Ok(frames[slot as usize]), "round {round}");
            }
        }
    }
    // Each prefetch but the first one finds its ring again: root, rDEVICE, rRING and the slot.
    let expected = RingCounters {
        hits: 24,
        promotions: 23,
        walks: 1,
        walk_reads: 4,
        prefetch_reads: 1 + 23 * 4,
        invalidations: 0,
    };
    assert_eq!(world.ring_counters(), expected);
}

#[test]
fn a_prefetched_slot_is_not_served_for_another() {
    let world = RingWorld::new(&[8]);
    let frames = world.map_all(0);
    let mut port = world.port();
    for slot in [0, 2, 1, 0, 3, 3, 2, 7, 0, 1] {
        assert_eq!(reach(&mut port, read(0, slot)), Ok(frames[slot as usize]), "slot {slot}");
    }
    let counters = world.ring_counters();
    assert_eq!((counters.hits, counters.promotions, counters.walks), (1, 2, 7));
}

/// The slots that the entry of ring 0 holds.
fn cached(world: &RingWorld) -> Vec<(u32, Option<u32>)> {
    let slots = |state: RingEntryState| (state.current.slot, state.next.map(|next| next.slot));
    world.unit().ring_entries(DEVICE).into_iter().map(slots).collect()
}

#[test]
fn next_is_none_when_the_slot_after_is_not_valid() {
    let world = RingWorld::new(&[4]);
    let mut port = world.port();
    let first = world.map_new(0, 0, RW);
    assert_eq!(reach(&mut port, read(0, 0)), Ok(first));
    assert_eq!(cached(&world), [(0, None)]);
    // I3: what was not valid is not cached as such.
    let second = world.map_new(0, 1, RW);
    assert_eq!(reach(&mut port, read(0, 1)), Ok(second));
    world.map_new(0, 3, RW);
    assert_eq!(cached(&world), [(1, None)]);
    let third = world.map_new(0, 2, RW);
    assert_eq!(reach(&mut port, read(0, 2)), Ok(third));
    assert_eq!(cached(&world), [(2, Some(3))]);
    // Promoted, and the prefetch finds nothing: the old next is gone too.
    world.unmap(0, 0);
    assert!(reach(&mut port, read(0, 3)).is_ok());
    assert_eq!(cached(&world), [(3, None)]);
    assert_eq!(reach(&mut port, read(0, 0)), Err(FaultReason::RING_SLOT_INVALID));
    assert_eq!(cached(&world), [(3, None)], "a refused walk drops nothing");
    assert_eq!(world.ring_counters().promotions, 1);
}

#[test]
fn a_ring_of_one_slot_has_no_next() {
    let world = RingWorld::new(&[1]);
    let frame = world.map_new(0, 0, RW);
    let mut port = world.port();
    assert_eq!(reach(&mut port, read(0, 0)), Ok(frame));
    assert_eq!(cached(&world), [(0, None)]);
}

#[test]
fn an_entry_that_does_not_suffice_decides_nothing() {
    let world = RingWorld::new(&[4]);
    let write = |slot, size_bytes| request(0, slot, 0, size_bytes, Access::Write);
    let mut port = world.port();
    let map = |slot: u32, size_bytes, permissions| {
        world.map(0, slot, RingPte::valid(Hpa::new(0x10_0000 + u64::from(slot)), size_bytes, permissions));
    };
    (0..2).for_each(|slot| map(slot, 100, Permissions::READ));
    assert!(reach(&mut port, read(0, 0)).is_ok());
    // Software widens both without an invalidation, as it may.
    (0..2).for_each(|slot| map(slot, 200, RW));
    assert_eq!(reach(&mut port, write(0, 200)), Ok(Hpa::new(0x10_0000)));
    (0..2).for_each(|slot| map(slot, 100, Permissions::READ));
    assert!(reach(&mut port, write(0, 200)).is_ok(), "stale until the ring is invalidated");
    assert!(reach(&mut port, write(1, 200)).is_ok(), "as is the prefetched one");
    assert_eq!(reach(&mut port, write(1, 201)), Err(FaultReason::RING_BEYOND_SLOT));
    world.end_burst(0);
    for (slot, size_bytes, expected) in
        [(0, 200, FaultReason::RING_BEYOND_SLOT), (1, 100, FaultReason::RING_WRITE_DENIED)]
    {
        assert_eq!(reach(&mut port, write(slot, size_bytes)), Err(expected));
    }
}

#[test]
fn stale_translations_per_ring_are_at_most_2_and_0_after_the_end_of_the_burst() {
    for used in 0..8 {
        let world = RingWorld::new(&[8, 8]);
        world.map_all(0);
        let other = world.map_new(1, 0, RW);
        let mut port = world.port();
        assert!(reach(&mut port, read(0, used)).is_ok());
        assert_eq!(reach(&mut port, read(1, 0)), Ok(other));
        (0..8).for_each(|slot| world.unmap(0, slot));
        let served = |port: &mut _| -> Vec<u32> {
            // The slot in use is asked before the one whose use displaces it.
            let order = (0..8).map(|step| (used + step) % 8);
            order.filter(|&slot| reach(port, read(0, slot)).is_ok()).collect()
        };
        assert_eq!(served(&mut port), [used, (used + 1) % 8]);
        assert_eq!(served(&mut port), [(used + 1) % 8], "what was promoted is the only one left");
        world.end_burst(0);
        assert_eq!(served(&mut port), [0u32; 0]);
        world.unmap(1, 0);
        assert_eq!(reach(&mut port, read(1, 0)), Ok(other), "another ring is as it was");
    }
}

#[test]
fn a_ring_beyond_the_entries_works_and_is_not_cached() {
    let world = RingWorld::new(&[4, 4]);
    let _drained = world.unit().set_behind_rings(DEVICE, Some(1)).wait_blocking();
    let frame = world.map_new(1, 0, RW);
    let mut port = world.port();
    assert_eq!(reach(&mut port, read(1, 0)), Ok(frame));
    world.unmap(1, 0);
    assert_eq!(reach(&mut port, read(1, 0)), Err(FaultReason::RING_SLOT_INVALID));
    assert_eq!(world.ring_counters().prefetch_reads, 0);
}

#[test]
fn an_operation_moves_exactly_the_bytes_of_its_slot() {
    let world = RingWorld::new(&[4]);
    let memory = world.machine.bare.memory();
    // 10,001 bytes from an odd address, over three frames in memory and three pages of the address.
    let base = [(); 4].map(|()| world.machine.frame())[0];
    let (first, size_bytes) = (Hpa::new(base.get() + 0x777), 10_001u32);
    world.map(0, 2, RingPte::valid(first, size_bytes, RW));
    let bytes: Vec<u8> = (0..size_bytes).map(|index| (index % 251) as u8).collect();
    assert_eq!(world.execute(iova(0, 2, 0), Transfer::Write(&bytes)), Ok(Done::Moved));
    let mut around = vec![0xff; size_bytes as usize + 2];
    memory.read(Hpa::new(first.get() - 1), &mut around).expect("inside memory");
    assert_eq!(around[1..=size_bytes as usize], bytes);
    assert_eq!((around[0], around[size_bytes as usize + 1]), (0, 0), "the neighbours are untouched");
    let mut back = Vec::new();
    let append = Transfer::Append { into: &mut back, size_bytes: 5000 };
    assert_eq!(world.execute(iova(0, 2, 5001), append), Ok(Done::Moved));
    assert_eq!(back, bytes[5001..]);
    // The page in which the bytes end is refused whole: 12,288 is the next multiple of 4,096.
    let beyond = world.execute(iova(0, 2, 1), Transfer::Write(&bytes)).expect_err("one byte too many");
    let expected =
        DmaFault { done_bytes: 8191, iova: iova(0, 2, 8192), reason: Ok(FaultReason::RING_BEYOND_SLOT) };
    assert_eq!(beyond, expected);
}

#[test]
fn a_slot_that_leads_to_no_memory_is_answered_so() {
    let world = RingWorld::new(&[4]);
    let end = machine::MEMORY_BYTES;
    let no_memory = |at, done_bytes| DmaFault { done_bytes, iova: at, reason: Err(Refusal::NoMemory) };
    world.map(0, 0, RingPte::valid(Hpa::new(end - 3), 100, RW));
    assert_eq!(world.execute(iova(0, 0, 0), Transfer::Write(&[1; 3])), Ok(Done::Moved));
    assert_eq!(world.execute(iova(0, 0, 0), Transfer::Write(&[1; 4])), Err(no_memory(iova(0, 0, 0), 0)));
    world.map(0, 1, RingPte::valid(Hpa::new(u64::MAX - 50), 100, RW));
    let wraps = world.execute(iova(0, 1, 0), Transfer::Write(&[1; 60])).expect_err("wraps");
    assert_eq!(wraps.reason, Ok(FaultReason::RING_BEYOND_SLOT));
    let nowhere = world.execute(iova(0, 1, 0), Transfer::Write(&[1; 8])).expect_err("no memory");
    assert_eq!(nowhere, no_memory(iova(0, 1, 0), 0));
}

/// A slot may begin anywhere, so that an aligned address may lead to a misaligned one; that is the device's mistake, not ours.
#[test]
fn an_atomic_that_is_misaligned_in_memory_is_malformed() {
    let world = RingWorld::new(&[4]);
    let frame = world.machine.frame();
    let add = AtomicOperation::FetchAdd64(5);
    world.map(0, 0, RingPte::valid(Hpa::new(frame.get() + 8), 64, RW));
    world.map(0, 1, RingPte::valid(Hpa::new(frame.get() + 4), 64, RW));
    assert_eq!(world.execute(iova(0, 0, 8), Transfer::Atomic(add)), Ok(Done::Old(0)));
    assert_eq!(world.machine.load(Hpa::new(frame.get() + 16)), 5);
    let refused = world.execute(iova(0, 1, 8), Transfer::Atomic(add)).expect_err("misaligned");
    assert_eq!(refused.reason, Err(Refusal::Malformed));
    assert!(world.execute(iova(0, 1, 8), Transfer::Atomic(AtomicOperation::FetchAdd32(1))).is_ok());
}

/// A run stays in its epoch, and the entry serves it there.
#[test]
fn a_run_of_operations_is_one_burst() {
    let world = RingWorld::new(&[8]);
    world.map_all(0);
    let mut port = world.port();
    let mut run = Run::new(&mut port);
    for slot in 0..8 {
        assert_eq!(run.execute(iova(0, slot, 0), None, Transfer::Write(&[1; 64])), Ok(Done::Moved));
    }
    let pending = world.unit().invalidate_ring(DEVICE, 0).try_complete();
    assert!(pending.is_err(), "the run is in its epoch");
    drop(run);
    assert!(pending.expect_err("it was pending").try_complete().is_ok());
    assert_eq!((world.unit().counters().drains_waited, world.ring_counters().invalidations), (1, 1));
}
