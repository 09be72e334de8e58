//! Claims about one entry and one walk, which need to look inside.

use iommu_types::{Access, Capabilities, FaultReason, Hpa, Permissions, SourceId};
use std::sync::Arc;

use super::cache::{Cached, CachedSlot, RingCache, RingEntryState};
use super::spec::{Ring, RingDevice, RingIova, RingPte, RingRoot};
use super::walk::{Asked, admit};
use crate::bare::BareMachine;
use crate::cache::Filled;
use crate::vtd::{EventMessage, EventSink, RingTally, Unit};

const SOURCE: SourceId = SourceId::new(0x0108);

fn slot(slot: u32) -> CachedSlot {
    let address = Hpa::new(0x1_0001 * u64::from(slot));
    CachedSlot { slot, pte: RingPte::valid(address, 1000 + slot, Permissions::READ) }
}

fn at(ring: u16, slot: u32) -> RingIova {
    RingIova { ring, slot, offset: 0 }
}

fn filled(next: Option<CachedSlot>) -> RingCache {
    let cache: RingCache = RingCache::new(2);
    let now = cache.generation(1).expect("there is such a ring");
    assert_eq!(cache.fill(1, now, slot(4), next), Filled::Inserted { evicted: false });
    cache
}

#[test]
fn an_entry_answers_for_its_two_slots_and_for_no_other() {
    let cache = filled(Some(slot(5)));
    for (at, expected) in [
        (at(1, 4), Cached::Current(slot(4).pte)),
        (at(1, 5), Cached::Next(slot(5).pte)),
        (at(1, 3), Cached::Absent),
        (at(1, 6), Cached::Absent),
        (at(1, 0), Cached::Absent),
        (at(0, 4), Cached::Absent),
        (at(2, 4), Cached::Absent),
        (at(u16::MAX, 5), Cached::Absent),
    ] {
        assert_eq!(cache.lookup(at), expected, "{at:?}");
    }
    assert_eq!(filled(None).lookup(at(1, 5)), Cached::Absent);
    // Slot 0 is not "the next of nothing".
    assert_eq!(filled(None).lookup(at(1, 0)), Cached::Absent);
}

#[test]
fn next_is_cleared_when_it_is_promoted() {
    let cache = filled(Some(slot(5)));
    let now = cache.generation(1).expect("there is such a ring");
    assert_eq!(cache.promote(at(1, 5), now, None), Some(slot(5).pte));
    assert_eq!(cache.states(), [RingEntryState { ring: 1, current: slot(5), next: None }]);
    assert_eq!(cache.lookup(at(1, 4)), Cached::Absent);
    // What was promoted is not promoted again, nor is anything else.
    for other in [4, 5, 6] {
        assert_eq!(cache.promote(at(1, other), now, Some(slot(7))), None, "slot {other}");
    }
}

#[test]
fn i4_what_an_invalidation_overtook_changes_nothing() {
    let cache = filled(Some(slot(5)));
    let before = cache.generation(1).expect("there is such a ring");
    cache.invalidate(1);
    assert_eq!(cache.states(), []);
    assert_eq!(cache.fill(1, before, slot(4), Some(slot(5))), Filled::Outdated);
    assert_eq!(cache.states(), []);
    let now = cache.generation(1).expect("there is such a ring");
    assert_eq!(cache.fill(1, now, slot(4), Some(slot(5))), Filled::Inserted { evicted: false });
    assert_eq!(cache.promote(at(1, 5), before, None), None);
    assert_eq!(cache.fill(1, now, slot(6), None), Filled::Inserted { evicted: true });
    cache.invalidate_all();
    assert_eq!(cache.states(), []);
}

#[test]
fn bounds_hold_for_the_whole_access_and_do_not_wrap() {
    let pte = |address, size_bytes| RingPte::valid(Hpa::new(address), size_bytes, Permissions::READ_WRITE);
    let beyond = Err(FaultReason::RING_BEYOND_SLOT);
    let interrupts = Err(FaultReason::RESULT_IN_INTERRUPT_RANGE);
    for (pte, offset, size_bytes, expected) in [
        (pte(0x1001, 100), 0, 100, Ok(0x1001)),
        (pte(0x1001, 100), 99, 1, Ok(0x1001 + 99)),
        (pte(0x1001, 100), 100, 0, Ok(0x1001 + 100)),
        (pte(0x1001, 100), 0, 101, beyond),
        (pte(0x1001, 100), 99, 2, beyond),
        (pte(0x1001, 100), 100, 1, beyond),
        (pte(0x1001, 100), 101, 0, beyond),
        (pte(0x1001, 0), 0, 1, beyond),
        (pte(0x1001, 100), 1, u32::MAX, beyond),
        (pte(0x1001, 100), 100, u32::MAX - 50, beyond),
        (pte(u64::MAX - 9, 100), 0, 10, Ok(u64::MAX - 9)),
        (pte(u64::MAX - 9, 100), 0, 11, beyond),
        (pte(u64::MAX - 9, 100), 10, 1, beyond),
        (pte(0xfedf_ffff, 100), 0, 1, Ok(0xfedf_ffff)),
        (pte(0xfedf_ffff, 100), 0, 2, interrupts),
        (pte(0xfeef_ffff, 100), 0, 2, interrupts),
        (pte(0xfef0_0000, 100), 0, 2, Ok(0xfef0_0000)),
    ] {
        for access in [Access::Read, Access::Write] {
            let asked = Asked { offset, size_bytes, access, zero_length_read: false };
            assert_eq!(admit(pte, asked), expected.map(Hpa::new), "{asked:?} of {pte:?}");
        }
    }
}

#[test]
fn every_direction_is_what_the_slot_says() {
    use FaultReason as Reason;
    let (read, write) = (Permissions::READ, Permissions::WRITE);
    for (permissions, access, size_bytes, expected) in [
        (read, Access::Read, 4, None),
        (read, Access::Write, 4, Some(Reason::RING_WRITE_DENIED)),
        (read, Access::Atomic, 4, Some(Reason::RING_WRITE_DENIED)),
        (write, Access::Read, 4, Some(Reason::RING_READ_DENIED)),
        (write, Access::Write, 4, None),
        (write, Access::Atomic, 4, Some(Reason::RING_READ_DENIED)),
        (read | write, Access::Atomic, 4, None),
        (Permissions::empty(), Access::Read, 4, Some(Reason::RING_READ_DENIED)),
        (Permissions::empty(), Access::Atomic, 4, Some(Reason::RING_WRITE_DENIED)),
        (write, Access::Read, 0, None), // a zero-length read, with ZLR
        (Permissions::empty(), Access::Read, 0, Some(Reason::RING_READ_DENIED)),
    ] {
        let pte = RingPte::valid(Hpa::new(0x1000), 64, permissions);
        let asked = Asked { offset: 8, size_bytes, access, zero_length_read: true };
        assert_eq!(admit(pte, asked).err(), expected, "{asked:?} of {permissions}");
        let without = Asked { zero_length_read: false, ..asked };
        assert_eq!(admit(pte, without).is_ok(), permissions.allow(access), "{without:?} of {permissions}");
    }
}

struct NoEvents;
impl EventSink for NoEvents {
    fn deliver(&self, _message: EventMessage) {}
}

/// Root at 0x1000, devices at 0x2000, two rings of four slots described at 0x3000, all slots valid.
fn unit() -> Arc<Unit> {
    let machine = BareMachine::new(1 << 20, Capabilities::FULL, 1, Arc::new(NoEvents)).expect("sound");
    let store = |at: u64, entry: u128| machine.memory().store_u128(Hpa::new(at), entry).expect("memory");
    store(0x1010, RingRoot::present(Hpa::new(0x2000)).into_bits());
    store(0x2080, RingDevice::with_rings_at(Hpa::new(0x3000), 2).into_bits());
    for ring in 0..2u64 {
        let slots = 0x4000 + ring * 0x1000;
        store(0x3000 + ring * 32, Ring::with_slots_at(Hpa::new(slots), 4).into_bits());
        (0..4u32).for_each(|index| store(slots + 16 * u64::from(index), slot(index).pte.into_bits()));
    }
    machine.unit().set_ring_root(Hpa::new(0x1000));
    let _pending = machine.unit().set_behind_rings(SOURCE, Some(2));
    Arc::clone(machine.unit())
}

/// What is cached of ring 1 after a walk that something overtook.
fn check_overtaken(overtaking: impl FnOnce(&Unit), is_cached: bool) {
    let unit = unit();
    let cache = unit.rings.cache_of(SOURCE).expect("it is behind rings");
    let rings = unit.rings_of(SOURCE, &cache);
    let asked = Asked { offset: 0, size_bytes: 8, access: Access::Read, zero_length_read: true };
    let walked = rings.walk_and_fill(&RingTally::default(), at(1, 1), asked, || overtaking(&unit));
    assert_eq!(walked, Ok(slot(1).pte.address()), "what was overtaken is used inside its epoch");
    let entry = RingEntryState { ring: 1, current: slot(1), next: Some(slot(2)) };
    assert_eq!(unit.ring_entries(SOURCE), if is_cached { vec![entry] } else { vec![] });
}

#[test]
fn i4_a_walk_that_an_invalidation_overtook_fills_nothing() {
    check_overtaken(|_| (), true);
    check_overtaken(|unit| drop(unit.invalidate_ring(SOURCE, 1)), false);
    check_overtaken(|unit| drop(unit.invalidate_ring_device(SOURCE)), false);
    check_overtaken(|unit| drop(unit.set_behind_rings(SOURCE, Some(2))), false);
    check_overtaken(|unit| drop(unit.set_behind_rings(SOURCE, None)), false);
    check_overtaken(|unit| drop(unit.invalidate_ring(SOURCE, 0)), true);
    check_overtaken(|unit| drop(unit.invalidate_ring(SourceId::new(0x0109), 1)), true);
    check_overtaken(|unit| drop(unit.invalidate(iommu_types::Invalidation::IotlbGlobal)), true);
}
