//! Ring invalidations and changes of sides against DMA in flight (I1): what is answered when.

mod machine;
mod ring_world;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};

use iommu_hardware::drain::PendingDrain;
use iommu_hardware::riommu::spec::RingPte;
use iommu_hardware::vtd::spec::registers::Gcmd;
use iommu_hardware::vtd::{Port, Request};
use iommu_types::{Access, AddressType, FaultReason, Hpa, Invalidation, Iova, Permissions, SourceId};
use machine::{DEVICE, DOMAIN, ROOT};
use ring_world::{RW, RingWorld, reach, read, request};

const OTHER: SourceId = SourceId::new(0x0408);

/// Runs `act` while a DMA of `port` has its address and is held inside its copy.
fn while_held(port: Port, request: Request, act: impl FnOnce()) -> Port {
    let (release, released) = channel();
    let (entered, inside): (Sender<()>, _) = channel();
    std::thread::scope(|scope| {
        let held = scope.spawn(move || {
            let mut port = port;
            let held = port.burst().translate(request, |_lent| {
                entered.send(()).expect("the test waits for it");
                released.recv().expect("the test releases it");
            });
            held.expect("it is mapped");
            port
        });
        inside.recv().expect("the DMA reaches its copy");
        // In here, so that a failed claim of `act` lets the DMA go.
        let release = release;
        act();
        release.send(()).expect("the DMA waits for it");
        held.join().expect("the DMA ends well")
    })
}

/// What begins while a DMA through a ring is inside its copy stays pending until that ends, or does not.
fn check_pending(act: impl FnOnce(&RingWorld) -> PendingDrain, stays_pending: bool) {
    let world = RingWorld::new(&[4, 4]);
    world.map_new(1, 0, RW);
    let mut pending = None;
    let _port = while_held(world.port(), read(1, 0), || {
        world.unmap(1, 0);
        pending = act(&world).try_complete().err();
        assert_eq!(pending.is_some(), stays_pending);
    });
    assert!(pending.is_none_or(|pending| pending.try_complete().is_ok()), "the copy is over");
}

#[test]
fn i1_an_end_of_burst_stays_unanswered_while_a_dma_is_inside_its_copy() {
    check_pending(|world| world.unit().invalidate_ring(DEVICE, 1), true);
    check_pending(|world| world.unit().invalidate_ring_device(DEVICE), true);
    check_pending(|world| world.unit().set_behind_rings(DEVICE, Some(2)), true);
    check_pending(|world| world.unit().set_behind_rings(DEVICE, None), true);
    // Only the source's own DMA is waited for.
    check_pending(|world| world.unit().invalidate_ring(OTHER, 1), false);
    check_pending(|world| world.unit().invalidate_ring_device(OTHER), false);
    check_pending(|world| world.unit().set_behind_rings(OTHER, Some(1)), false);
    check_pending(|world| world.unit().invalidate(Invalidation::IotlbDomain(DOMAIN)), false);
    check_pending(|world| world.unit().invalidate(Invalidation::IotlbGlobal), true);
}

fn plain(iova: u64) -> Request {
    Request {
        iova: Iova::new(iova),
        size_bytes: 8,
        access: Access::Read,
        pasid: None,
        address_type: AddressType::Untranslated,
    }
}

#[test]
fn a_source_changes_sides_with_the_next_burst() {
    let world = RingWorld::new(&[4]);
    let machine = &world.machine;
    // Behind VT-d, address 0 is a page of the domain; behind rings it is slot 0 of ring 0.
    let table = machine.table(4);
    machine.set_root(ROOT.get());
    machine.attach(DEVICE, DOMAIN, table);
    let page = machine.map_new(table, 0, RW);
    let slot = world.map_new(0, 0, RW);
    let mut port = world.port();
    assert_eq!(reach(&mut port, plain(0)), Ok(slot), "rings translate while TES=0");
    machine.command(Gcmd::new().with_translation(true));
    assert_eq!(reach(&mut port, plain(0)), Ok(slot));
    assert_eq!(world.unit().counters().context_cache.misses, 0, "VT-d is not asked");
    for _ in 0..2 {
        let _drained = world.unit().set_behind_rings(DEVICE, None).wait_blocking();
        assert_eq!(world.unit().ring_entries(DEVICE), []);
        assert_eq!(reach(&mut port, plain(0)), Ok(page));
        let _drained = world.unit().set_behind_rings(DEVICE, Some(1)).wait_blocking();
        assert_eq!(reach(&mut port, plain(0)), Ok(slot));
        assert_eq!(world.unit().ring_entries(DEVICE).len(), 1);
    }
    // A port that comes later finds its source where it is.
    assert_eq!(reach(&mut world.port(), plain(0)), Ok(slot));
}

#[test]
fn entries_of_an_earlier_stay_behind_rings_are_gone() {
    let world = RingWorld::new(&[4]);
    world.map_new(0, 0, RW);
    let mut port = world.port();
    assert!(reach(&mut port, read(0, 0)).is_ok());
    world.unmap(0, 0);
    assert!(reach(&mut port, read(0, 0)).is_ok(), "stale");
    let _drained = world.unit().set_behind_rings(DEVICE, Some(1)).wait_blocking();
    assert_eq!(reach(&mut port, read(0, 0)), Err(FaultReason::RING_SLOT_INVALID));
}

#[test]
fn a_domain_does_not_wait_for_a_device_that_has_gone_behind_rings() {
    let world = RingWorld::new(&[4]);
    let machine = &world.machine;
    let table = machine.table(4);
    machine.set_root(ROOT.get());
    machine.attach(DEVICE, DOMAIN, table);
    machine.map_new(table, 0x5000, RW);
    machine.command(Gcmd::new().with_translation(true));
    world.map_new(0, 0, RW);
    let _drained = world.unit().set_behind_rings(DEVICE, None).wait_blocking();
    let domain = || world.unit().invalidate(Invalidation::IotlbDomain(DOMAIN)).try_complete();
    let port = while_held(world.port(), plain(0x5000), || assert!(domain().is_err(), "it is of the domain"));
    let _drained = world.unit().set_behind_rings(DEVICE, Some(1)).wait_blocking();
    let port = while_held(port, read(0, 0), || assert!(domain().is_ok(), "it has left the domain"));
    let _drained = world.unit().set_behind_rings(DEVICE, None).wait_blocking();
    while_held(port, plain(0x5000), || assert!(domain().is_err(), "it is of the domain again"));
}

/// Devices read a slot as fast as they can while it is moved from frame to frame. After each answered end of a burst, nobody may see
/// what the slot held before.
#[test]
fn i4_a_fill_that_an_invalidation_overtook_is_not_served() {
    const ROUNDS: u64 = 300;
    let world = RingWorld::new(&[2]);
    let frames = [world.machine.frame(), world.machine.frame()];
    // Both slots move, so that half of the accesses are promotions.
    let map = |round: u64| {
        let frame = frames[(round % 2) as usize];
        world.machine.store(frame, round);
        (0..2).for_each(|slot| world.map(0, slot, RingPte::valid(frame, 8, Permissions::READ)));
    };
    let read_at = |port: &mut Port, slot| {
        let seen = port.burst().translate(read(0, slot), |lent| world.machine.load(lent.hpa));
        seen.expect("always mapped")
    };
    map(0);
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            let mut port = world.port();
            let (over, read_at) = (&over, &read_at);
            scope.spawn(move || {
                let mut newest = [0; 2];
                while !over.load(Ordering::Relaxed) {
                    for (slot, newest) in (0..).zip(&mut newest) {
                        let seen = read_at(&mut port, slot);
                        assert!(seen >= *newest, "a slot never goes back: {seen} after {newest}");
                        *newest = seen;
                    }
                }
            });
        }
        let mut port = world.port();
        for round in 1..=ROUNDS {
            map(round);
            world.end_burst(0);
            assert_eq!([0, 1].map(|slot| read_at(&mut port, slot)), [round; 2], "the burst was answered");
        }
        over.store(true, Ordering::Relaxed);
    });
}

#[test]
fn two_ports_of_one_source_share_its_entries() {
    let world = RingWorld::new(&[4]);
    let frames = world.map_all(0);
    let (mut first, mut second) = (world.port(), world.port());
    let expected = |slot: u32| -> Result<Hpa, FaultReason> { Ok(frames[slot as usize]) };
    assert_eq!(reach(&mut first, read(0, 0)), expected(0));
    assert_eq!(reach(&mut second, request(0, 1, 0, 1, Access::Write)), expected(1));
    assert_eq!(reach(&mut first, read(0, 2)), expected(2));
    let counters = world.ring_counters();
    assert_eq!((counters.walks, counters.promotions), (1, 2));
}
