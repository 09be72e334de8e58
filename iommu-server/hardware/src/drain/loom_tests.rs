//! Slots, lists and waiters under every interleaving of two or three threads.
//!
//! The "memory" of these models is one word, `mapped`: the invalidator takes it away (what a table or a cache
//! would no longer say), drains, and then reuses the `frame`. A device that saw the mapping must be done with
//! the frame by then.

#![expect(
    clippy::arc_with_non_send_sync,
    reason = "loom's cell is the race detector; loom runs its threads one at a time"
)]

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use iommu_types::DomainId;
use loom::cell::UnsafeCell;
use loom::sync::atomic::AtomicU64;
use loom::thread;

use super::loom_atomics::{Loom, drains, explore, wait};
use super::{Drains, Scope, SlotIndex};

const DOMAIN: DomainId = DomainId::new(7);
const OTHER: DomainId = DomainId::new(8);

struct Machine {
    drains: Drains<Loom>,
    /// 1 while the domain maps the frame.
    mapped: AtomicU64,
    /// Loom fails the model if the device's access and the reuse are not ordered.
    frame: UnsafeCell<u64>,
    /// The domain of the device's context.
    context: AtomicU64,
}

impl Machine {
    fn new(slots: u16) -> Arc<Self> {
        Arc::new(Self {
            drains: drains(slots),
            mapped: AtomicU64::new(1),
            frame: UnsafeCell::new(0),
            context: AtomicU64::new(u64::from(DOMAIN.get())),
        })
    }

    /// A device's burst: what it finds mapped, it uses.
    fn burst(&self, slot: SlotIndex) {
        self.drains.enter(slot);
        if self.mapped.load(Relaxed) == 1 {
            self.frame.with(|_in_flight| ());
        }
        self.drains.leave(slot);
    }

    /// What a port does: the context is looked up again after the slot has been registered for the domain that
    /// it names.
    fn join_domain(&self) -> DomainId {
        loop {
            let domain = DomainId::new(self.context.load(Relaxed) as u16);
            if self.drains.registered(SlotIndex(0)) == Some(domain) {
                return domain;
            }
            self.drains.register(SlotIndex(0), domain);
        }
    }

    fn unmap(&self, scope: Scope) {
        self.mapped.store(0, Relaxed);
        let _drained = wait(self.drains.drain(scope));
        self.frame.with_mut(|_reused| ());
    }
}

#[test]
fn i1_a_drain_waits_for_a_device_that_entered_before_it_or_the_device_sees_the_removal() {
    explore(3, || {
        let machine = Machine::new(1);
        let device = Arc::clone(&machine);
        let device = thread::spawn(move || device.burst(SlotIndex(0)));
        machine.unmap(Scope::Everything);
        device.join().expect("the device ends");
    });
}

#[test]
fn i1_a_device_that_comes_back_at_once_is_not_taken_for_the_burst_that_was_waited_for() {
    explore(3, || {
        let machine = Machine::new(1);
        let device = Arc::clone(&machine);
        let device = thread::spawn(move || {
            device.burst(SlotIndex(0));
            device.burst(SlotIndex(0));
        });
        machine.unmap(Scope::Slot(SlotIndex(0)));
        device.join().expect("the device ends");
    });
}

#[test]
fn i1_two_devices_of_one_domain_are_both_waited_for() {
    explore(2, || {
        let machine = Machine::new(2);
        for slot in [SlotIndex(0), SlotIndex(1)] {
            machine.drains.register(slot, DOMAIN);
        }
        let devices = [SlotIndex(0), SlotIndex(1)].map(|slot| {
            let machine = Arc::clone(&machine);
            thread::spawn(move || machine.burst(slot))
        });
        machine.unmap(Scope::Domain(DOMAIN));
        for device in devices {
            device.join().expect("the device ends");
        }
    });
}

#[test]
fn i1_a_device_that_joins_a_domain_is_on_its_list_or_sees_the_removal() {
    explore(3, || {
        let machine = Machine::new(1);
        machine.drains.register(SlotIndex(0), OTHER);
        let device = Arc::clone(&machine);
        let device = thread::spawn(move || {
            device.drains.enter(SlotIndex(0));
            let domain = device.join_domain();
            if domain == DOMAIN && device.mapped.load(Relaxed) == 1 {
                device.frame.with(|_in_flight| ());
            }
            device.drains.leave(SlotIndex(0));
        });
        machine.unmap(Scope::Domain(DOMAIN));
        device.join().expect("the device ends");
    });
}

#[test]
fn i1_a_device_that_is_moved_out_of_a_domain_is_on_its_list_or_sees_the_move() {
    explore(3, || {
        let machine = Machine::new(1);
        let device = Arc::clone(&machine);
        let device = thread::spawn(move || {
            device.drains.enter(SlotIndex(0));
            let domain = device.join_domain();
            // The frame is mapped in the domain that the device leaves.
            if domain == DOMAIN {
                device.frame.with(|_in_flight| ());
            }
            device.drains.leave(SlotIndex(0));
        });
        machine.context.store(u64::from(OTHER.get()), Relaxed);
        let _drained = wait(machine.drains.drain(Scope::Domain(DOMAIN)));
        machine.frame.with_mut(|_reused| ());
        device.join().expect("the device ends");
    });
}

#[test]
fn a_leave_never_misses_a_waiter() {
    explore(3, || {
        let machine = Machine::new(1);
        machine.drains.enter(SlotIndex(0));
        let pending = machine.drains.drain(Scope::Everything);
        let device = Arc::clone(&machine);
        let device = thread::spawn(move || device.drains.leave(SlotIndex(0)));
        let _drained = wait(pending);
        device.join().expect("the device ends");
    });
}

#[test]
fn two_waiters_of_one_slot_are_both_woken() {
    explore(2, || {
        let machine = Machine::new(1);
        machine.drains.enter(SlotIndex(0));
        let pendings = [(); 2].map(|()| machine.drains.drain(Scope::Everything));
        let waiters = pendings.map(|pending| {
            thread::spawn(move || {
                let _drained = wait(pending);
            })
        });
        machine.drains.leave(SlotIndex(0));
        for waiter in waiters {
            waiter.join().expect("the waiter is woken");
        }
    });
}
