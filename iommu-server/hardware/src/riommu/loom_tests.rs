//! Translation through rings and invalidations, under every interleaving of two or three threads.

#![expect(
    clippy::arc_with_non_send_sync,
    reason = "loom's cell is the race detector; loom runs its threads one at a time"
)]

use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Release};

use iommu_types::{Access, AddressType, Hpa, Permissions, SourceId};
use loom::cell::UnsafeCell;
use loom::sync::atomic::AtomicU64;
use loom::thread;

use super::cache::{Cached, CachedSlot, RingCache};
use super::spec::{Ring, RingDevice, RingIova, RingPte, RingRoot};
use super::translate::{Rings, RootLatch};
use crate::drain::loom_atomics::{Loom, drains, explore, wait};
use crate::drain::{Drains, Scope, SlotIndex};
use crate::memory::NoMemoryAt;
use crate::vtd::walk::TableMemory;
use crate::vtd::{Request, RingTally};

const ROOT: u64 = 0x1000;
const DEVICES: u64 = 0x2000;
const RING: u64 = 0x3000;
const SLOTS: u64 = 0x4000;
const SIZE: usize = 4;

/// The tables of source 00:00.0 with one ring, of which only the valid bits change.
struct Tables {
    valid: [AtomicU64; SIZE],
}

impl TableMemory for Tables {
    fn load_u64(&self, _at: Hpa) -> Result<u64, NoMemoryAt> {
        unreachable!("ring tables are read in 16 bytes")
    }
    fn load_u128(&self, at: Hpa) -> Result<u128, NoMemoryAt> {
        Ok(match at.get() {
            ROOT => RingRoot::present(Hpa::new(DEVICES)).into_bits(),
            DEVICES => RingDevice::with_rings_at(Hpa::new(RING), 1).into_bits(),
            RING => Ring::with_slots_at(Hpa::new(SLOTS), SIZE as u32).into_bits(),
            at => {
                let slot = ((at - SLOTS) / 16) as usize;
                let is_valid = self.valid[slot].load(Acquire) == 1;
                pte(slot as u32).with_is_valid(is_valid).into_bits()
            }
        })
    }
}

fn pte(slot: u32) -> RingPte {
    RingPte::valid(Hpa::new(0x10_0000 + u64::from(slot) * 0x1001), 100 + slot, Permissions::READ)
}

fn cached(slot: u32) -> CachedSlot {
    CachedSlot { slot, pte: pte(slot) }
}

fn at(slot: u32) -> RingIova {
    RingIova { ring: 0, slot, offset: 0 }
}

/// A unit with one ring, whose slots 0, 1 and 2 are valid.
struct Machine {
    drains: Drains<Loom>,
    tables: Tables,
    root: RootLatch,
    cache: RingCache<Loom>,
    /// What the slots open. Loom fails the model if a device's access and the reuse are not ordered.
    buffers: [UnsafeCell<u64>; SIZE],
}

impl Machine {
    fn new(slots: u16) -> Arc<Self> {
        let root = RootLatch::default();
        root.set(Hpa::new(ROOT));
        Arc::new(Self {
            drains: drains(slots),
            tables: Tables { valid: std::array::from_fn(|slot| AtomicU64::new(u64::from(slot < 3))) },
            root,
            cache: RingCache::new(1),
            buffers: std::array::from_fn(|_| UnsafeCell::new(0)),
        })
    }
    /// The same with slot 0 in use and slot 1 prefetched.
    fn in_use(slots: u16) -> Arc<Self> {
        let machine = Self::new(slots);
        assert!(machine.translate(0));
        assert_eq!(machine.cache.lookup(at(1)), Cached::Next(pte(1)));
        machine
    }

    /// Whether an access through a slot is translated.
    fn translate(&self, slot: u32) -> bool {
        let rings = Rings {
            memory: &self.tables,
            root: &self.root,
            cache: &self.cache,
            source: SourceId::new(0),
            zero_length_read: false,
        };
        let request = Request {
            iova: at(slot).pack(),
            size_bytes: 8,
            access: Access::Read,
            pasid: None,
            address_type: AddressType::Untranslated,
        };
        match rings.translate(&RingTally::default(), &request) {
            Ok(hpa) => {
                assert_eq!(hpa, pte(slot).address(), "never the bytes of another slot");
                true
            }
            Err(_) => false,
        }
    }

    /// One burst with one access.
    fn burst(&self, port: SlotIndex, slot: u32) {
        self.drains.enter(port);
        if self.translate(slot) {
            self.buffers[slot as usize].with(|_in_flight| ());
        }
        self.drains.leave(port);
    }

    /// Closes slots, and ends the burst of unmaps.
    fn unmap(&self, slots: &[u32], ports: u16) {
        for &slot in slots {
            self.tables.valid[slot as usize].store(0, Release);
        }
        self.cache.invalidate(0);
        for port in 0..ports {
            let _drained = wait(self.drains.drain(Scope::Slot(SlotIndex(port))));
        }
    }
}

fn spawn<R: 'static>(
    machine: &Arc<Machine>,
    act: impl FnOnce(&Machine) -> R + 'static,
) -> thread::JoinHandle<R> {
    let machine = Arc::clone(machine);
    thread::spawn(move || act(&machine))
}

#[test]
fn i4_a_fill_that_an_invalidation_overtook_is_dropped() {
    explore(3, || {
        let machine = Machine::new(0);
        // The slot after the one in use is filled with it, and closed as well.
        let walker = spawn(&machine, |machine| machine.translate(0));
        machine.unmap(&[0, 1], 0);
        walker.join().expect("the walker ends");
        assert_eq!(machine.cache.states(), []);
    });
}

#[test]
fn i4_a_promotion_that_an_invalidation_overtook_is_dropped() {
    explore(3, || {
        let machine = Machine::in_use(0);
        let walker = spawn(&machine, |machine| machine.translate(1));
        machine.unmap(&[0, 1, 2], 0);
        walker.join().expect("the walker ends");
        assert_eq!(machine.cache.states(), []);
    });
}

#[test]
fn i4_a_prefetch_that_an_invalidation_overtook_is_not_promoted_into_a_later_entry() {
    explore(2, || {
        let machine = Machine::in_use(0);
        let walker = spawn(&machine, |machine| machine.translate(1));
        machine.unmap(&[2], 0);
        // Slot 1 is the next one again, and what the walker has prefetched is gone.
        assert!(machine.translate(0));
        walker.join().expect("the walker ends");
        let states = machine.cache.states();
        let [state] = states[..] else { panic!("one entry: {states:?}") };
        assert!(state.current.slot != 2 && state.next.is_none_or(|next| next.slot != 2), "{state:?}");
    });
}

#[test]
fn i4_two_walks_of_one_ring_are_both_dropped_or_cleared() {
    // With more preemptions, loom lets the two wait for the lock in turns without end.
    explore(1, || {
        let machine = Machine::in_use(0);
        let walkers = [1, 2].map(|slot| spawn(&machine, move |machine| machine.translate(slot)));
        machine.unmap(&[0, 1, 2], 0);
        for walker in walkers {
            walker.join().expect("the walker ends");
        }
        assert_eq!(machine.cache.states(), []);
    });
}

#[test]
fn i1_i2_no_device_uses_a_slot_whose_burst_of_unmaps_was_answered() {
    // Slot 0 is served by the entry, slot 1 by its prefetched half, slot 2 by a walk.
    for slot in 0..3u32 {
        explore(3, move || {
            let machine = Machine::in_use(1);
            let device = spawn(&machine, move |machine| machine.burst(SlotIndex(0), slot));
            machine.unmap(&[slot], 1);
            machine.buffers[slot as usize].with_mut(|_reused| ());
            device.join().expect("the device ends");
        });
    }
}

#[test]
fn i1_two_ports_of_one_source_are_both_waited_for() {
    explore(2, || {
        let machine = Machine::in_use(2);
        let devices = [0, 1].map(|port| spawn(&machine, move |machine| machine.burst(SlotIndex(port), 1)));
        machine.unmap(&[1], 2);
        machine.buffers[1].with_mut(|_reused| ());
        for device in devices {
            device.join().expect("the device ends");
        }
    });
}

#[test]
fn a_reader_never_sees_one_half_of_an_entry() {
    explore(3, || {
        let machine = Machine::new(0);
        let now = || machine.cache.generation(0).expect("there is a ring");
        let _filled = machine.cache.fill(0, now(), cached(0), Some(cached(1)));
        let writer = spawn(&machine, |machine| {
            let now = machine.cache.generation(0).expect("there is a ring");
            let _filled = machine.cache.fill(0, now, cached(1), Some(cached(2)));
        });
        let found = machine.cache.lookup(at(1));
        assert!(
            [Cached::Absent, Cached::Current(pte(1)), Cached::Next(pte(1))].contains(&found),
            "{found:?}"
        );
        let states = machine.cache.states();
        let halves = |state: &super::RingEntryState| (state.current, state.next);
        let states: Vec<_> = states.iter().map(halves).collect();
        let (before, after) = ((cached(0), Some(cached(1))), (cached(1), Some(cached(2))));
        assert!(states == [before] || states == [after], "{states:?}");
        writer.join().expect("the writer ends");
    });
}
