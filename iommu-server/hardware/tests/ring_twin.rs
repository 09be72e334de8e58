//! Random use of rings against two stupid twins: one that models the cached entry of a ring to the letter, and one that knows
//! nothing of caches and only says what may never happen (I2).

mod machine;
mod ring_world;

use iommu_hardware::riommu::spec::RingPte;
use iommu_types::{Access, FaultReason, Hpa, Permissions};
use machine::DEVICE;
use proptest::prelude::*;
use ring_world::{RW, RingWorld, reach, request};

const SIZES: [u32; 2] = [3, 5];

/// What a slot opens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Opens {
    at: u64,
    size_bytes: u32,
    permissions: Permissions,
}

#[derive(Clone, Copy, Debug)]
struct Ask {
    ring: u16,
    slot: u32,
    offset: u32,
    size_bytes: u32,
    access: Access,
}

#[derive(Clone, Debug)]
enum Step {
    Map(u16, u32, Opens),
    Unmap(u16, u32),
    EndBurst(u16),
    ForgetDevice,
    Ask(Ask),
}

/// Where an access to a slot ends.
fn end(opens: Opens, ask: Ask) -> Result<u64, FaultReason> {
    let may = |permission| opens.permissions.contains(permission);
    if ask.offset + ask.size_bytes > opens.size_bytes {
        return Err(FaultReason::RING_BEYOND_SLOT);
    }
    if ask.access != Access::Read && !may(Permissions::WRITE) {
        return Err(FaultReason::RING_WRITE_DENIED);
    }
    if ask.access != Access::Write && !may(Permissions::READ) {
        return Err(FaultReason::RING_READ_DENIED);
    }
    Ok(opens.at + u64::from(ask.offset))
}

/// The slot in use, and the prefetched one.
type Entry = ((u32, Opens), Option<(u32, Opens)>);

#[derive(Default)]
struct Twin {
    tables: [[Option<Opens>; 5]; 2],
    entries: [Option<Entry>; 2],
    /// By ring and slot, what the slot has opened at or after the last answered end of a burst.
    opened: [[Vec<Opens>; 5]; 2],
}

impl Twin {
    fn map(&mut self, ring: u16, slot: u32, opens: Option<Opens>) {
        self.tables[ring as usize][slot as usize] = opens;
        self.opened[ring as usize][slot as usize].extend(opens);
    }
    fn forget(&mut self, ring: u16) {
        let ring = ring as usize;
        self.entries[ring] = None;
        for slot in 0..5 {
            self.opened[ring][slot] = self.tables[ring][slot].into_iter().collect();
        }
    }
    fn after(&self, ring: usize, slot: u32) -> Option<(u32, Opens)> {
        let next = (slot + 1) % SIZES[ring];
        Some((next, self.tables[ring][next as usize]?))
    }
    fn ask(&mut self, ask: Ask) -> Result<u64, FaultReason> {
        let ring = ask.ring as usize;
        match self.entries[ring] {
            Some(((slot, opens), _)) if slot == ask.slot && end(opens, ask).is_ok() => end(opens, ask),
            Some(((used, _), Some((next, opens))))
                if used != ask.slot && next == ask.slot && end(opens, ask).is_ok() =>
            {
                self.entries[ring] = Some(((next, opens), self.after(ring, next)));
                end(opens, ask)
            }
            _ => {
                if ask.slot >= SIZES[ring] {
                    return Err(FaultReason::RING_BEYOND_SIZE);
                }
                let opens = self.tables[ring][ask.slot as usize].ok_or(FaultReason::RING_SLOT_INVALID)?;
                let end = end(opens, ask)?;
                self.entries[ring] = Some(((ask.slot, opens), self.after(ring, ask.slot)));
                Ok(end)
            }
        }
    }
    /// I2: what an access reaches was opened by its slot at or after the last answered end of a burst.
    fn may_reach(&self, ask: Ask, hpa: u64) -> bool {
        let opened = &self.opened[ask.ring as usize];
        let of_slot = opened.get(ask.slot as usize).map_or(&[][..], Vec::as_slice);
        of_slot.iter().any(|&opens| end(opens, ask) == Ok(hpa))
    }
}

fn opens() -> impl Strategy<Value = Opens> {
    let permissions = prop_oneof![3 => Just(RW), 1 => Just(Permissions::READ), 1 => Just(Permissions::WRITE)];
    let size = prop_oneof![1 => Just(0u32), 3 => Just(64), 3 => Just(100)];
    (0x10_0000u64..0x20_0000, size, permissions).prop_map(|(at, size_bytes, permissions)| Opens {
        at,
        size_bytes,
        permissions,
    })
}

fn ask() -> impl Strategy<Value = Ask> {
    let access = prop_oneof![4 => Just(Access::Read), 2 => Just(Access::Write), 1 => Just(Access::Atomic)];
    let offset = prop_oneof![4 => Just(0u32), 2 => Just(60), 1 => Just(96), 1 => Just(1 << 20)];
    (0..2u16, 0..6u32, offset, prop_oneof![Just(4u32), Just(8)], access)
        .prop_map(|(ring, slot, offset, size_bytes, access)| Ask { ring, slot, offset, size_bytes, access })
}

fn step() -> impl Strategy<Value = Step> {
    let slot = || (0..2u16, 0..5u32).prop_map(|(ring, slot)| (ring, slot % SIZES[ring as usize]));
    prop_oneof![
        8 => (slot(), opens()).prop_map(|((ring, slot), opens)| Step::Map(ring, slot, opens)),
        4 => slot().prop_map(|(ring, slot)| Step::Unmap(ring, slot)),
        2 => (0..2u16).prop_map(Step::EndBurst),
        1 => Just(Step::ForgetDevice),
        24 => ask().prop_map(Step::Ask),
    ]
}

fn check_entries(world: &RingWorld, twin: &Twin) -> Result<(), TestCaseError> {
    let pte = |opens: Opens| RingPte::valid(Hpa::new(opens.at), opens.size_bytes, opens.permissions);
    let states = world.unit().ring_entries(DEVICE);
    let held = states.iter().map(|state| {
        let next = state.next.map(|next| (next.slot, next.pte));
        (state.ring, (state.current.slot, state.current.pte), next)
    });
    let expected = (0..2u16).zip(&twin.entries).filter_map(|(ring, entry)| {
        let ((slot, opens), next) = (*entry)?;
        Some((ring, (slot, pte(opens)), next.map(|(slot, opens)| (slot, pte(opens)))))
    });
    prop_assert_eq!(held.collect::<Vec<_>>(), expected.collect::<Vec<_>>());
    Ok(())
}

proptest! {
    #![proptest_config(machine::cases(128))]
    #[test]
    fn i2_i3_rings_do_what_their_twins_say(steps in proptest::collection::vec(step(), 1..200)) {
        let world = RingWorld::new(&SIZES);
        let mut port = world.port();
        let mut twin = Twin::default();
        for step in steps {
            match step {
                Step::Map(ring, slot, opens) => {
                    world.map(ring, slot, RingPte::valid(Hpa::new(opens.at), opens.size_bytes, opens.permissions));
                    twin.map(ring, slot, Some(opens));
                }
                Step::Unmap(ring, slot) => {
                    world.unmap(ring, slot);
                    twin.map(ring, slot, None);
                }
                Step::EndBurst(ring) => {
                    world.end_burst(ring);
                    twin.forget(ring);
                }
                Step::ForgetDevice => {
                    let _drained = world.unit().invalidate_ring_device(DEVICE).wait_blocking();
                    (0..2).for_each(|ring| twin.forget(ring));
                }
                Step::Ask(ask) => {
                    let Ask { ring, slot, offset, size_bytes, access } = ask;
                    let result = reach(&mut port, request(ring, slot, offset, size_bytes, access));
                    let result = result.map(Hpa::get);
                    prop_assert_eq!(result, twin.ask(ask), "{:?}", ask);
                    if let Ok(hpa) = result {
                        prop_assert!(twin.may_reach(ask, hpa), "{:?} reached {:#x}", ask, hpa);
                    }
                }
            }
            check_entries(&world, &twin)?;
        }
    }
}
