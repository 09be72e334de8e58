//! Explain for a source behind rings says what translate does, and changes nothing.

mod machine;
mod ring_world;

use expect_test::{Expect, expect};
use iommu_hardware::riommu::spec::{Ring, RingDevice, RingPte};
use iommu_hardware::vtd::Request;
use iommu_types::{
    Access, CacheState, Explanation, FaultReason, Hpa, Iova, Outcome, Pasid, Permissions, Structure,
};
use machine::DEVICE;
use proptest::prelude::*;
use ring_world::{RW, RingWorld, iova, read, request, translate};

fn ask(world: &RingWorld, request: Request) -> Explanation {
    let before = (world.unit().counters(), world.unit().ring_entries(DEVICE));
    let Request { iova, size_bytes, access, pasid, .. } = request;
    let explanation = world.unit().explain(DEVICE, pasid, iova, access, size_bytes);
    let after = (world.unit().counters(), world.unit().ring_entries(DEVICE));
    assert_eq!(before, after, "Explain changes nothing");
    explanation
}

fn check(world: &RingWorld, request: Request, expected: &Expect) {
    let explanation = ask(world, request);
    let mut page: Vec<String> = explanation
        .steps
        .iter()
        .map(|step| {
            let raw = step.low.zip(step.high).map(|(low, high)| format!("{high:x}:{low:x}"));
            let raw = raw.unwrap_or_else(|| "unreadable".to_owned());
            format!("{:?}[{}] at {} {raw} {}", step.structure, step.index, step.at, step.reading)
        })
        .collect();
    page.push(format!("{:?}", explanation.iotlb));
    page.push(explanation.conclusion);
    expected.assert_eq(&page.join("\n"));
}

#[test]
fn a_translated_access_is_explained_step_by_step() {
    let world = RingWorld::new(&[4, 8]);
    world.map(1, 3, RingPte::valid(Hpa::new(0x20_0777), 1500, Permissions::READ));
    check(
        &world,
        request(1, 3, 0x10, 64, Access::Read),
        &expect![[r#"
            RingRoot[3] at hpa:0x100030 0:101001 present, device table hpa:0x101000
            RingDevice[16] at hpa:0x101100 2:102000 present, rings 2, at hpa:0x102000
            Ring[1] at hpa:0x102020 8:104000 present, slots 8, at hpa:0x104000
            RingSlot[3] at hpa:0x104030 1400005dc:200777 present, slot 3, 1500 bytes at hpa:0x200777, r-
            Miss
            The read at iova:0x10000c0000010 by 03:02.0 reaches hpa:0x200787 through slot 3 of ring 1 (1500 bytes at hpa:0x200777, r-)."#]],
    );
    let explanation = ask(&world, read(1, 3));
    assert_eq!(explanation.context_cache, CacheState::NotAsked);
    assert_eq!(explanation.paging_structure_cache, CacheState::NotAsked);
    let structures: Vec<Structure> = explanation.steps.iter().map(|step| step.structure).collect();
    let walk = [Structure::RingRoot, Structure::RingDevice, Structure::Ring, Structure::RingSlot];
    assert_eq!(structures, walk);
    assert_eq!(explanation.steps[3].permissions, Some(Permissions::READ));
}

#[test]
fn a_refused_access_is_explained_by_the_step_that_decides() {
    let world = RingWorld::new(&[4, 8]);
    world.map(1, 3, RingPte::valid(Hpa::new(0x20_0777), 1500, Permissions::READ));
    check(
        &world,
        request(1, 3, 1499, 2, Access::Read),
        &expect![[r#"
            RingRoot[3] at hpa:0x100030 0:101001 present, device table hpa:0x101000
            RingDevice[16] at hpa:0x101100 2:102000 present, rings 2, at hpa:0x102000
            Ring[1] at hpa:0x102020 8:104000 present, slots 8, at hpa:0x104000
            RingSlot[3] at hpa:0x104030 1400005dc:200777 present, slot 3, 1500 bytes at hpa:0x200777, r-
            Miss
            The read at iova:0x10000c00005db by 03:02.0 is refused: 0xe4 the access leaves the bytes of the slot (slot 3 of ring 1)."#]],
    );
    check(
        &world,
        read(1, 4),
        &expect![[r#"
            RingRoot[3] at hpa:0x100030 0:101001 present, device table hpa:0x101000
            RingDevice[16] at hpa:0x101100 2:102000 present, rings 2, at hpa:0x102000
            Ring[1] at hpa:0x102020 8:104000 present, slots 8, at hpa:0x104000
            RingSlot[4] at hpa:0x104040 0:0 not present
            Miss
            The read at iova:0x1000100000000 by 03:02.0 is refused: 0xe3 the slot is not valid (slot 4 of ring 1)."#]],
    );
    world.store(world.ring_at(0), Ring::with_slots_at(Hpa::new(0x1004), 1 << 20).into_bits());
    check(
        &world,
        read(0, 70_000),
        &expect![[r#"
            RingRoot[3] at hpa:0x100030 0:101001 present, device table hpa:0x101000
            RingDevice[16] at hpa:0x101100 2:102000 present, rings 2, at hpa:0x102000
            Ring[0] at hpa:0x102000 100000:1004 present, slots 1048576, at hpa:0x1004
            RingSlot[65535] at hpa:0x112704 unreadable not a multiple of 16
            Miss
            The read at iova:0x445c00000000 by 03:02.0 is refused: 0xe7 a ring table could not be read (slot 70000 of ring 0)."#]],
    );
    world.store(world.device_entry_at(), RingDevice::new().into_bits());
    check(
        &world,
        read(1, 3),
        &expect![[r#"
        RingRoot[3] at hpa:0x100030 0:101001 present, device table hpa:0x101000
        RingDevice[16] at hpa:0x101100 0:0 not present
        Miss
        The read at iova:0x10000c0000000 by 03:02.0 is refused: 0xe0 the rDEVICE of the source is not present, or could not be read (slot 3 of ring 1)."#]],
    );
    world.unit().set_ring_root(Hpa::new(0x4000_0000));
    check(
        &world,
        read(1, 3),
        &expect![[r#"
        RingRoot[3] at hpa:0x40000030 unreadable no memory here
        Miss
        The read at iova:0x10000c0000000 by 03:02.0 is refused: 0xe0 the rDEVICE of the source is not present, or could not be read (slot 3 of ring 1)."#]],
    );
}

#[test]
fn a_stale_slot_is_told_with_both_its_ends() {
    let world = RingWorld::new(&[4]);
    world.map(0, 0, RingPte::valid(Hpa::new(0x20_0001), 100, RW));
    world.map(0, 1, RingPte::valid(Hpa::new(0x20_1001), 100, Permissions::READ));
    assert!(translate(&mut world.port(), read(0, 0)).is_ok());
    world.unmap(0, 0);
    check(
        &world,
        read(0, 0),
        &expect![[r#"
            RingRoot[3] at hpa:0x100030 0:101001 present, device table hpa:0x101000
            RingDevice[16] at hpa:0x101100 1:102000 present, rings 1, at hpa:0x102000
            Ring[0] at hpa:0x102000 4:103000 present, slots 4, at hpa:0x103000
            RingSlot[0] at hpa:0x103000 c0000064:200001 not present
            Hit { entry: "ring 0, slot 0 -> 100 bytes at hpa:0x200001, rw" }
            The read at iova:0x0 by 03:02.0 is refused: 0xe3 the slot is not valid (slot 0 of ring 0) by the tables, but a stale cached entry still leads it to hpa:0x200001."#]],
    );
    world.map(0, 1, RingPte::valid(Hpa::new(0x30_0000), 200, Permissions::READ));
    check(
        &world,
        read(0, 1),
        &expect![[r#"
            RingRoot[3] at hpa:0x100030 0:101001 present, device table hpa:0x101000
            RingDevice[16] at hpa:0x101100 1:102000 present, rings 1, at hpa:0x102000
            Ring[0] at hpa:0x102000 4:103000 present, slots 4, at hpa:0x103000
            RingSlot[1] at hpa:0x103010 1400000c8:300000 present, slot 1, 200 bytes at hpa:0x300000, r-
            Hit { entry: "ring 0, prefetched slot 1 -> 100 bytes at hpa:0x201001, r-" }
            The read at iova:0x40000000 by 03:02.0 reaches hpa:0x300000 through slot 1 of ring 0 (200 bytes at hpa:0x300000, r-) by the tables, but a stale cached entry still leads it to hpa:0x201001."#]],
    );
    check(
        &world,
        request(0, 1, 150, 8, Access::Read),
        &expect![[r#"
            RingRoot[3] at hpa:0x100030 0:101001 present, device table hpa:0x101000
            RingDevice[16] at hpa:0x101100 1:102000 present, rings 1, at hpa:0x102000
            Ring[0] at hpa:0x102000 4:103000 present, slots 4, at hpa:0x103000
            RingSlot[1] at hpa:0x103010 1400000c8:300000 present, slot 1, 200 bytes at hpa:0x300000, r-
            Insufficient { entry: "ring 0, prefetched slot 1 -> 100 bytes at hpa:0x201001, r-" }
            The read at iova:0x40000096 by 03:02.0 reaches hpa:0x300096 through slot 1 of ring 0 (200 bytes at hpa:0x300000, r-)."#]],
    );
    world.end_burst(0);
    let explanation = ask(&world, read(0, 1));
    assert_eq!((explanation.iotlb, explanation.stale), (CacheState::Miss, None));
}

#[test]
fn accesses_that_no_ring_decides_are_explained_too() {
    let world = RingWorld::new(&[4]);
    let message = |size_bytes, access| {
        let iova = Iova::new(0xfee0_0000);
        ask(&world, Request { iova, size_bytes, access, ..read(0, 0) }).outcome
    };
    assert_eq!(message(4, Access::Write), Outcome::Interrupt);
    let refused = |outcome| match outcome {
        Outcome::Refused(fault) => fault.reason,
        outcome => panic!("{outcome:?}"),
    };
    assert_eq!(refused(message(8, Access::Read)), FaultReason::IR_INVALID_ACCESS);
    let with_pasid = ask(&world, Request { pasid: Pasid::new(1), ..read(0, 0) });
    assert_eq!(refused(with_pasid.outcome), FaultReason::PASID_IN_LEGACY_MODE);
    assert_eq!((with_pasid.steps, with_pasid.iotlb), (vec![], CacheState::NotAsked));
    expect!["The read at iova:0x0 by 03:02.0 is refused: 0x31 a request with PASID while the unit is in legacy mode."]
        .assert_eq(&with_pasid.conclusion);
}

#[derive(Clone, Debug)]
enum Step {
    Slot(u32, u64, u32, u8, bool),
    Device(u16),
    Size(u32),
    EndBurst,
    Ask(u32, u32, Access),
}

fn step() -> impl Strategy<Value = Step> {
    let access = prop_oneof![3 => Just(Access::Read), 2 => Just(Access::Write), 1 => Just(Access::Atomic)];
    let address = prop_oneof![8 => 0x10_0000..0x20_0000u64, 1 => Just(0xfee0_0000), 1 => any::<u64>()];
    let size = prop_oneof![Just(8u32), Just(100)];
    prop_oneof![
        8 => (0..4u32, address, size, 0..4u8, any::<bool>())
            .prop_map(|(slot, at, size, permissions, valid)| Step::Slot(slot, at, size, permissions, valid)),
        1 => (0..2u16).prop_map(Step::Device),
        1 => (0..6u32).prop_map(Step::Size),
        1 => Just(Step::EndBurst),
        16 => (0..4u32, 0..100u32, access).prop_map(|(slot, offset, access)| Step::Ask(slot, offset, access)),
    ]
}

proptest! {
    #![proptest_config(machine::cases(96))]
    #[test]
    fn explain_agrees_with_translate_over_any_rings(steps in proptest::collection::vec(step(), 1..120)) {
        let world = RingWorld::new(&[4]);
        let mut port = world.port();
        for step in steps {
            match step {
                Step::Slot(slot, at, size_bytes, permissions, valid) => {
                    let permissions = Permissions::from_bits_truncate(permissions);
                    let pte = RingPte::valid(Hpa::new(at), size_bytes, permissions);
                    world.map(0, slot, pte.with_is_valid(valid));
                }
                Step::Device(count) => {
                    world.store(world.device_entry_at(), RingDevice::with_rings_at(world.rings, count).into_bits());
                }
                Step::Size(size) => {
                    world.store(world.ring_at(0), Ring::with_slots_at(world.slot_at(0, 0), size).into_bits());
                }
                Step::EndBurst => world.end_burst(0),
                Step::Ask(slot, offset, access) => {
                    let request = request(0, slot, offset, 8, access);
                    let explanation = ask(&world, request);
                    let expected = match (explanation.stale, explanation.outcome) {
                        (Some(stale), _) => Ok(stale.hpa),
                        (None, Outcome::Translated(translation)) => Ok(translation.hpa),
                        (None, Outcome::Refused(fault)) => Err(fault),
                        (None, other) => panic!("{other:?}"),
                    };
                    prop_assert_eq!(explanation.iova, iova(0, slot, offset));
                    prop_assert_eq!(translate(&mut port, request), expected, "{:?}", explanation);
                }
            }
        }
    }
}
