//! Fills, lookups and invalidations under every interleaving of two or three threads.

#![expect(
    clippy::arc_with_non_send_sync,
    reason = "loom's cell is the race detector; loom runs its threads one at a time"
)]

use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use iommu_types::{DomainId, Hpa, Iova, IovaRange, PageSize, Permissions};
use loom::cell::UnsafeCell;
use loom::sync::atomic::AtomicU64;
use loom::thread;

use super::set::Sets;
use super::{CacheGeometry, Iotlb, IotlbEntry, PagingEntry, PagingStructureCache};
use crate::drain::loom_atomics::{Loom, drains, explore, wait};
use crate::drain::{Drains, NEVER, Scope, SlotIndex};

const DOMAIN: DomainId = DomainId::new(7);
const PAGE: Iova = Iova::new(0x5000);
const FRAME: Hpa = Hpa::new(0x9000);
const TABLE: Hpa = Hpa::new(0x3000);
const SMALLEST: CacheGeometry = CacheGeometry { sets: 1, ways: 1 };

/// A unit with one page of one domain, whose table entry is one word.
struct Machine {
    drains: Drains<Loom>,
    iotlb: Iotlb<Loom>,
    paging: PagingStructureCache<Loom>,
    /// 1 while the leaf entry maps the page.
    leaf: AtomicU64,
    /// 1 while the directory names the table. The table itself keeps its content when it is taken out.
    directory: AtomicU64,
    /// Loom fails the model if a device's access and the reuse are not ordered.
    frame: UnsafeCell<u64>,
}

impl Machine {
    fn new(slots: u16) -> Arc<Self> {
        let machine = Self {
            drains: drains(slots),
            iotlb: Iotlb::new(SMALLEST),
            paging: PagingStructureCache::new(SMALLEST),
            leaf: AtomicU64::new(1),
            directory: AtomicU64::new(1),
            frame: UnsafeCell::new(0),
        };
        (0..slots).for_each(|slot| machine.drains.register(SlotIndex(slot), DOMAIN));
        Arc::new(machine)
    }

    /// A walk of the leaf alone, and its fill.
    fn fill(&self) {
        let walked_under = self.drains.generation(DOMAIN, self.drains.context_generation());
        if self.leaf.load(Acquire) == 1 {
            let _filled = self.iotlb.fill(&self.drains, walked_under, translation());
        }
    }

    /// Hit or walk, and use what was found: one burst.
    fn burst(&self, slot: SlotIndex) {
        self.drains.enter(slot);
        let hit = self.iotlb.lookup(DOMAIN, PAGE).is_some();
        if hit || self.leaf.load(Acquire) == 1 {
            if !hit {
                self.fill();
            }
            self.frame.with(|_in_flight| ());
        }
        self.drains.leave(slot);
    }

    fn unmap(&self) {
        self.leaf.store(0, Release);
        let invalidating = self.drains.move_generation(Scope::Domain(DOMAIN));
        self.iotlb.invalidate_range(DOMAIN, page());
        let _drained = wait(invalidating.drain());
    }
}

/// The page of the machine, as its tables have it.
fn translation() -> IotlbEntry {
    IotlbEntry {
        domain_id: DOMAIN,
        iova: PAGE,
        size: PageSize::Size4K,
        hpa: FRAME,
        permissions: Permissions::READ,
        extent: None,
    }
}

fn page() -> IovaRange {
    IovaRange::new(PAGE, 4096).expect("one page")
}

#[test]
fn i4_a_fill_that_an_invalidation_overtook_is_dropped() {
    explore(3, || {
        let machine = Machine::new(0);
        let walker = Arc::clone(&machine);
        let walker = thread::spawn(move || walker.fill());
        machine.unmap();
        walker.join().expect("the walker ends");
        assert_eq!(machine.iotlb.lookup(DOMAIN, PAGE), None);
    });
}

#[test]
fn i4_two_fills_of_one_page_are_both_dropped_or_cleared() {
    explore(2, || {
        let machine = Machine::new(0);
        let walkers = [(); 2].map(|()| {
            let machine = Arc::clone(&machine);
            thread::spawn(move || machine.fill())
        });
        machine.unmap();
        for walker in walkers {
            walker.join().expect("the walker ends");
        }
        assert_eq!(machine.iotlb.lookup(DOMAIN, PAGE), None);
    });
}

#[test]
fn i4_a_walk_through_a_table_that_is_being_invalidated_fills_nothing_that_stays() {
    explore(3, || {
        let machine = Machine::new(0);
        let now = || machine.drains.generation(DOMAIN, machine.drains.context_generation());
        let table = PagingEntry {
            domain_id: DOMAIN,
            iova: Iova::new(0),
            level: 1,
            table: TABLE,
            permissions: Permissions::READ,
        };
        let _filled = machine.paging.fill(&machine.drains, now(), table);
        let walker = Arc::clone(&machine);
        let walker = thread::spawn(move || {
            let walked_under = walker.drains.generation(DOMAIN, walker.drains.context_generation());
            let known = walker.paging.lookup(DOMAIN, PAGE).is_some();
            if known || walker.directory.load(Acquire) == 1 {
                // The leaf stands in the removed table still.
                let _filled = walker.iotlb.fill(&walker.drains, walked_under, translation());
            }
        });
        machine.directory.store(0, Release);
        let invalidating = machine.drains.move_generation(Scope::Domain(DOMAIN));
        // The order of the caches does not matter; this is the harder one.
        machine.iotlb.invalidate_range(DOMAIN, page());
        machine.paging.invalidate_range(DOMAIN, page());
        let _drained = wait(invalidating.drain());
        walker.join().expect("the walker ends");
        assert_eq!(machine.iotlb.lookup(DOMAIN, PAGE), None);
        assert_eq!(machine.paging.lookup(DOMAIN, PAGE), None);
    });
}

#[test]
fn i4_a_walk_through_a_forgotten_context_fills_nothing_that_stays() {
    explore(3, || {
        let machine = Machine::new(0);
        // The leaf stands for tables that only the context leads to.
        let walker = Arc::clone(&machine);
        let walker = thread::spawn(move || {
            let context = walker.drains.context_generation();
            if walker.directory.load(Acquire) == 0 {
                return;
            }
            let walked_under = walker.drains.generation(DOMAIN, context);
            let _filled = walker.iotlb.fill(&walker.drains, walked_under, translation());
        });
        machine.directory.store(0, Release);
        let of_the_context = machine.drains.move_context_generation(Scope::Everything).drain();
        let invalidating = machine.drains.move_generation(Scope::Domain(DOMAIN));
        machine.iotlb.invalidate_domain(DOMAIN);
        let _drained = wait(of_the_context.and(invalidating.drain()));
        walker.join().expect("the walker ends");
        assert_eq!(machine.iotlb.lookup(DOMAIN, PAGE), None);
    });
}

#[test]
fn i1_i2_no_device_of_a_domain_uses_a_translation_whose_unmap_was_answered() {
    explore(2, || {
        let machine = Machine::new(2);
        let devices = [SlotIndex(0), SlotIndex(1)].map(|slot| {
            let machine = Arc::clone(&machine);
            thread::spawn(move || machine.burst(slot))
        });
        machine.unmap();
        machine.frame.with_mut(|_reused| ());
        for device in devices {
            device.join().expect("the device ends");
        }
        assert_eq!(machine.iotlb.lookup(DOMAIN, PAGE), None);
    });
}

#[test]
fn i1_i2_no_device_hits_what_was_cached_before_an_answered_unmap() {
    explore(3, || {
        let machine = Machine::new(1);
        machine.fill();
        let device = Arc::clone(&machine);
        let device = thread::spawn(move || device.burst(SlotIndex(0)));
        machine.unmap();
        machine.frame.with_mut(|_reused| ());
        device.join().expect("the device ends");
    });
}

#[test]
fn i1_two_invalidations_of_one_page_both_mean_what_they_say() {
    explore(2, || {
        let machine = Machine::new(1);
        machine.fill();
        machine.leaf.store(0, Relaxed);
        let device = Arc::clone(&machine);
        let device = thread::spawn(move || device.burst(SlotIndex(0)));
        let other = Arc::clone(&machine);
        let other = thread::spawn(move || {
            let invalidating = other.drains.move_generation(Scope::Domain(DOMAIN));
            other.iotlb.invalidate_range(DOMAIN, page());
            let _pending = invalidating.drain();
        });
        machine.unmap();
        machine.frame.with_mut(|_reused| ());
        device.join().expect("the device ends");
        other.join().expect("the other invalidation ends");
    });
}

#[test]
fn a_reader_never_sees_one_half_of_an_entry() {
    explore(3, || {
        let sets = Arc::new(Sets::<Loom>::new(SMALLEST));
        let _filled = sets.insert(0, 1, 10, || true);
        let writer = Arc::clone(&sets);
        let writer = thread::spawn(move || writer.insert(0, 2, 20, || true));
        assert!(matches!(sets.find(0, 1), None | Some(10)));
        assert!(matches!(sets.find(0, 2), None | Some(20)));
        let _filled = writer.join().expect("the writer ends");
    });
}

#[test]
fn a_snapshot_never_holds_one_half_of_an_entry() {
    explore(3, || {
        let sets = Arc::new(Sets::<Loom>::new(SMALLEST));
        let _filled = sets.insert(0, 1, 10, || true);
        let writer = Arc::clone(&sets);
        let writer = thread::spawn(move || writer.insert(0, 2, 20, || true));
        let entries = sets.entries();
        assert!(entries == [(1, 10)] || entries == [(2, 20)], "{entries:?}");
        let _filled = writer.join().expect("the writer ends");
    });
}

#[test]
fn two_writers_of_one_set_leave_one_whole_entry() {
    explore(2, || {
        let sets = Arc::new(Sets::<Loom>::new(SMALLEST));
        let writers = [(1, 10), (2, 20)].map(|(tag, data)| {
            let sets = Arc::clone(&sets);
            thread::spawn(move || sets.insert(0, tag, data, || true))
        });
        for writer in writers {
            let _filled = writer.join().expect("the writer ends");
        }
        let entries = sets.entries();
        assert!(entries == [(1, 10)] || entries == [(2, 20)], "{entries:?}");
    });
}

#[test]
fn i4_no_generation_is_never() {
    explore(1, || assert_ne!(drains(0).generation(DOMAIN, drains(0).context_generation()), NEVER));
}
