//! Slots, lists, generations and drains on the atomics that ship, one thread at a time.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use iommu_types::DomainId;

use super::{Drains, NEVER, PendingDrain, Scope, SlotIndex};

const RED: DomainId = DomainId::new(1);
const BLUE: DomainId = DomainId::new(2);

#[derive(Default)]
struct Wakes(AtomicU32);

impl Wake for Wakes {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

fn poll(pending: &mut PendingDrain, wakes: &Arc<Wakes>) -> bool {
    let waker = Waker::from(Arc::clone(wakes));
    Pin::new(pending).poll(&mut Context::from_waker(&waker)).is_ready()
}

/// A unit with one device in each domain, both in an epoch.
fn two_devices() -> (Drains, SlotIndex, SlotIndex) {
    let drains = Drains::new(4);
    let [red, blue] = [RED, BLUE].map(|domain| {
        let slot = drains.claim_slot().expect("a free slot");
        drains.enter(slot);
        drains.register(slot, domain);
        slot
    });
    (drains, red, blue)
}

/// Whether a drain of `scope` is complete at once after `arrange`.
fn check_at_once(scope: Scope, quiet: bool, arrange: impl Fn(&Drains, SlotIndex, SlotIndex)) {
    let (drains, red, blue) = two_devices();
    arrange(&drains, red, blue);
    assert_eq!(drains.drain(scope).try_complete().is_ok(), quiet, "{scope:?}");
}

#[test]
fn a_drain_waits_for_exactly_the_devices_of_its_scope() {
    let all_in = |_: &Drains, _, _| ();
    let red_left = |drains: &Drains, red, _| drains.leave(red);
    let both_left = |drains: &Drains, red, blue| [red, blue].into_iter().for_each(|slot| drains.leave(slot));
    let red_moved = |drains: &Drains, red, _| drains.register(red, BLUE);
    let red_moved_and_blue_left = |drains: &Drains, red, blue| {
        drains.register(red, BLUE);
        drains.leave(blue);
    };
    let red_gone = |drains: &Drains, red, _| drains.release_slot(red);
    let red_back = |drains: &Drains, red, _| {
        drains.leave(red);
        drains.enter(red);
    };
    check_at_once(Scope::Everything, false, all_in);
    check_at_once(Scope::Everything, false, red_left);
    check_at_once(Scope::Everything, true, both_left);
    check_at_once(Scope::Domain(RED), false, all_in);
    check_at_once(Scope::Domain(RED), true, red_left);
    check_at_once(Scope::Domain(BLUE), false, red_left);
    check_at_once(Scope::Domain(RED), true, red_moved);
    check_at_once(Scope::Domain(BLUE), false, red_moved_and_blue_left);
    check_at_once(Scope::Domain(RED), true, red_gone);
    check_at_once(Scope::Domain(RED), false, red_back);
    check_at_once(Scope::Domain(DomainId::new(65)), true, all_in);
    check_at_once(Scope::Slot(SlotIndex(0)), false, all_in);
    check_at_once(Scope::Slot(SlotIndex(0)), true, red_left);
    check_at_once(Scope::Slot(SlotIndex(3)), true, all_in);
}

#[test]
fn i1_a_drain_stays_pending_until_the_device_leaves_and_wakes_its_waiter_then() {
    let (drains, red, _) = two_devices();
    let wakes = Arc::new(Wakes::default());
    let mut pending = drains.drain(Scope::Domain(RED));
    assert!(!poll(&mut pending, &wakes));
    assert!(!poll(&mut pending, &wakes), "a second poll registers no second time");
    assert_eq!(wakes.0.load(Ordering::Relaxed), 0);
    drains.leave(red);
    assert_eq!(wakes.0.load(Ordering::Relaxed), 1);
    assert!(poll(&mut pending, &wakes));
}

#[test]
fn a_device_that_entered_after_a_drain_is_not_waited_for() {
    let (drains, red, _) = two_devices();
    let pending = drains.drain(Scope::Domain(RED));
    drains.leave(red);
    drains.enter(red);
    assert!(pending.try_complete().is_ok());
}

#[test]
fn two_drains_together_wait_for_the_devices_of_both() {
    let (drains, red, blue) = two_devices();
    let (other, other_red, _) = two_devices();
    let domains = drains.drain(Scope::Domain(RED)).and(drains.drain(Scope::Domain(BLUE)));
    let mut pending = PendingDrain::none().and(domains).and(other.drain(Scope::Domain(RED)));
    let wakes = Arc::new(Wakes::default());
    for (drains, slot) in [(&drains, red), (&other, other_red), (&drains, blue)] {
        assert!(!poll(&mut pending, &wakes));
        drains.leave(slot);
    }
    assert!(poll(&mut pending, &wakes));
}

#[test]
fn of_two_drains_of_one_slot_the_later_counts() {
    let (drains, red, _) = two_devices();
    let earlier = drains.drain(Scope::Slot(red));
    drains.leave(red);
    drains.enter(red);
    let later = drains.drain(Scope::Slot(red));
    let pending =
        earlier.and(later).try_complete().expect_err("the device is in the epoch before the later one");
    drains.leave(red);
    assert!(pending.try_complete().is_ok());
}

#[test]
fn a_dropped_drain_is_forgotten() {
    let (drains, red, _) = two_devices();
    let wakes = Arc::new(Wakes::default());
    let mut pending = drains.drain(Scope::Slot(red));
    assert!(!poll(&mut pending, &wakes));
    assert_eq!(Arc::strong_count(&wakes), 2);
    drop(pending);
    assert_eq!(Arc::strong_count(&wakes), 1);
    drains.leave(red);
    assert_eq!(wakes.0.load(Ordering::Relaxed), 0);
}

/// A waker may be the last owner of a task, and of the drains that the task waits for.
#[test]
fn a_waker_is_dropped_outside_the_lock_of_its_slot() {
    struct Task {
        drains: Arc<Drains>,
        slot: SlotIndex,
        owned: Wakes,
    }
    impl Wake for Task {
        fn wake(self: Arc<Self>) {
            self.owned.0.fetch_add(1, Ordering::Relaxed);
        }
    }
    impl Drop for Task {
        fn drop(&mut self) {
            let mut pending = self.drains.drain(Scope::Slot(self.slot));
            assert!(!poll(&mut pending, &Arc::new(Wakes::default())), "this takes the lock of the slot");
        }
    }
    let (drains, red, _) = two_devices();
    let drains = Arc::new(drains);
    let task =
        || Waker::from(Arc::new(Task { drains: Arc::clone(&drains), slot: red, owned: Wakes::default() }));
    let mut pending = drains.drain(Scope::Slot(red));
    for waker in [task(), task()] {
        // The second takes the place of the first.
        assert!(Pin::new(&mut pending).poll(&mut Context::from_waker(&waker)).is_pending());
    }
    drop(pending);
}

#[test]
fn a_blocked_thread_goes_on_when_the_device_leaves() {
    let (drains, red, _) = two_devices();
    let pending = drains.drain(Scope::Domain(RED));
    std::thread::scope(|threads| {
        let waiter = threads.spawn(|| pending.wait_blocking());
        drains.leave(red);
        let _drained = waiter.join().expect("the waiter ends");
    });
}

#[test]
fn i7_slots_are_limited_and_come_back() {
    let drains = Drains::new(2);
    let (first, second) = (drains.claim_slot(), drains.claim_slot());
    assert_eq!((first, second, drains.claim_slot()), (Some(SlotIndex(0)), Some(SlotIndex(1)), None));
    drains.release_slot(SlotIndex(0));
    assert_eq!(drains.claim_slot(), Some(SlotIndex(0)));
    assert_eq!(drains.registered(SlotIndex(0)), None);
}

#[test]
fn a_slot_that_is_released_inside_an_epoch_wakes_its_waiters() {
    let (drains, red, _) = two_devices();
    let wakes = Arc::new(Wakes::default());
    let mut pending = drains.drain(Scope::Domain(RED));
    assert!(!poll(&mut pending, &wakes));
    drains.release_slot(red);
    assert_eq!(wakes.0.load(Ordering::Relaxed), 1);
    assert!(poll(&mut pending, &wakes));
}

/// What a walk of `RED` that began before, within and after an invalidation may still fill.
fn check_generation(scope: Scope, outdates: bool) {
    let drains = Drains::new(1);
    let generation = || drains.generation(RED, drains.context_generation());
    let before = generation();
    assert!(drains.is_current(RED, before));
    let invalidating = drains.move_generation(scope);
    assert_eq!(generation() == NEVER, outdates, "within {scope:?}");
    assert_eq!(drains.is_current(RED, before), !outdates, "{scope:?}");
    assert!(!drains.is_current(RED, NEVER));
    assert!(invalidating.drain().try_complete().is_ok());
    assert_eq!(drains.is_current(RED, before), !outdates, "{scope:?}");
    assert!(drains.is_current(RED, generation()));
}

#[test]
fn i4_an_invalidation_outdates_the_walks_of_its_scope() {
    check_generation(Scope::Everything, true);
    check_generation(Scope::Domain(RED), true);
    check_generation(Scope::Slot(SlotIndex(0)), true);
    check_generation(Scope::Domain(BLUE), false);
}

#[test]
fn i4_a_walk_through_a_context_that_was_invalidated_since_fills_nothing() {
    let drains = Drains::new(1);
    let context = drains.context_generation();
    let invalidating = drains.move_context_generation(Scope::Everything);
    assert_eq!(drains.context_generation(), NEVER);
    assert_eq!(drains.generation(RED, context), NEVER);
    drop(invalidating);
    assert_eq!(drains.generation(RED, context), NEVER);
    assert_ne!(drains.generation(RED, drains.context_generation()), NEVER);
    assert!(!drains.is_current_context(context));
}

/// The burst looks its context up while that is being forgotten, so it may hold what is about to be cleared.
#[test]
fn i4_a_walk_through_a_context_that_was_looked_up_during_an_invalidation_fills_nothing() {
    let drains = Drains::new(1);
    let of_its_context = drains.move_context_generation(Scope::Everything);
    let context = drains.context_generation();
    assert_eq!(drains.generation(RED, context), NEVER, "during the same invalidation");
    drop(of_its_context);
    assert_eq!(drains.generation(RED, context), NEVER, "after it");
    drop(drains.move_generation(Scope::Domain(RED)));
    let of_another_context = drains.move_context_generation(Scope::Everything);
    assert_eq!(drains.generation(RED, context), NEVER, "during the next, of some other source");
    drop(of_another_context);
}

#[test]
fn a_drain_of_a_quiet_unit_is_ready_at_the_first_poll() {
    let wakes = Arc::new(Wakes::default());
    let waker = Waker::from(Arc::clone(&wakes));
    let mut pending = Drains::new(8).drain(Scope::Everything);
    let polled = Pin::new(&mut pending).poll(&mut Context::from_waker(&waker));
    assert!(matches!(polled, Poll::Ready(_)));
}
