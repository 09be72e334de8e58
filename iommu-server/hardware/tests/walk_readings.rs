//! Entries in words, as Explain prints them.

mod table_world;

use std::ops::ControlFlow;

use expect_test::{Expect, expect};
use iommu_hardware::vtd::spec::pte::SecondStageEntry;
use iommu_hardware::vtd::spec::root_context::ContextEntry;
use iommu_hardware::vtd::walk::dump;
use iommu_types::{Access, Hpa, Iova, PageSize, Permissions};
use table_world::{DOMAIN, World};

fn check(change: impl FnOnce(&mut World), expected: Expect) {
    let mut world = World::mapped(4);
    change(&mut world);
    let (outcome, steps) = world.explain();
    let mut text = String::new();
    for step in steps {
        let permissions = step.permissions.map_or_else(|| "  ".to_owned(), |left| left.to_string());
        text += &format!("{:?}[{}] {permissions} {}\n", step.structure, step.index, step.reading);
    }
    text += &match outcome {
        Ok(leaf) => format!("{} {} {}\n", leaf.hpa, leaf.size, leaf.permissions),
        Err(fault) => format!("{} suppressed={}\n", fault.reason, fault.suppressed),
    };
    expected.assert_eq(&text);
}

#[test]
fn a_translated_access_is_read_step_by_step() {
    check(
        |_| {},
        expect![[r#"
            Root[1]    present, context table hpa:0x2000
            Context[19]    present, 48-bit, domain 7, table hpa:0x100000
            SecondStage { level: 4 }[0] rw present, rw, table hpa:0x102000
            SecondStage { level: 3 }[72] rw present, rw, table hpa:0x104000
            SecondStage { level: 2 }[418] rw present, rw, table hpa:0x106000
            SecondStage { level: 1 }[359] rw present, rw, 4 KiB page hpa:0x50000000
            hpa:0x50000000 4 KiB rw
        "#]],
    );
}

#[test]
fn a_refused_access_says_where_it_ended() {
    check(
        |world| {
            world.access = Access::Write;
            world.byte_extents = true;
            world.damage(2, 0b10);
            world.damage(1, 1 << 52);
        },
        expect![[r#"
            Root[1]    present, context table hpa:0x2000
            Context[19]    present, 48-bit, domain 7, table hpa:0x100000
            SecondStage { level: 4 }[0] rw present, rw, table hpa:0x102000
            SecondStage { level: 3 }[72] rw present, rw, table hpa:0x104000
            SecondStage { level: 2 }[418] r- present, r-, table hpa:0x106000
            SecondStage { level: 1 }[359] r- present, rw, 4 KiB page hpa:0x50000000, granted in part
            0x05 the tables give no write permission suppressed=false
        "#]],
    );
    check(
        |world| world.damage(3, 1 << 62 | 1 << 46),
        expect![[r#"
            Root[1]    present, context table hpa:0x2000
            Context[19]    present, 48-bit, domain 7, table hpa:0x100000
            SecondStage { level: 4 }[0] rw present, rw, table hpa:0x102000
            SecondStage { level: 3 }[72] rw present, rw, table hpa:0x400000104000, reserved bits 0x4000400000000000 set
            0x0c a reserved bit is set in a page-table entry suppressed=false
        "#]],
    );
    check(
        |world| world.set_context(ContextEntry::new().with_fault_processing_disable(true)),
        expect![[r#"
            Root[1]    present, context table hpa:0x2000
            Context[19]    not present, faults not recorded (FPD)
            0x02 the context entry of the device is not present suppressed=true
        "#]],
    );
    check(
        |world| world.damage_context(0b1100 | 0b101 << 64),
        expect![[r#"
            Root[1]    present, context table hpa:0x2000
            Context[19]    present, unsupported width (AW=7), domain 7, unsupported type (TT=3)
            0x03 the context entry has an unsupported width or type, or its top-level table cannot be read suppressed=false
        "#]],
    );
    check(
        |world| world.damage_root(1),
        expect![[r#"
            Root[1]    not present
            0x01 the root entry of the bus is not present suppressed=false
        "#]],
    );
    check(
        |world| world.root.base = Hpa::new(0x7000_0000),
        expect![[r#"
            Root[1]    no memory here
            0x08 the root entry could not be read suppressed=false
        "#]],
    );
}

/// The last entry of the walk of eight bytes at offset 0, in words.
fn check_leaf(change: impl FnOnce(&mut World), expected: Expect) {
    let mut world = World::mapped(4);
    world.byte_extents = true;
    change(&mut world);
    let mut dumped = None;
    let _ = dump(&world.memory, world.rules(), world.root, world.source, false, &mut |step, _| {
        dumped = Some(step);
        ControlFlow::Continue(())
    });
    let (_, mut steps) = world.explain();
    let step = steps.pop().expect("a walk reads something");
    assert_eq!(dumped.as_ref(), Some(&step), "a dump says what a walk says");
    expected.assert_eq(&format!("{:x?} {}", step.high, step.reading));
}

#[test]
fn a_partial_page_is_read_with_its_extent() {
    let at = World::mapped(4).iova;
    check_leaf(
        |world| world.set_extent(at, 0, 0x1ff),
        expect![
            "Some(80000000001ff000) present, rw, 4 KiB page hpa:0x50000000, granted in part: bytes 0x000 to 0x1ff"
        ],
    );
    check_leaf(
        |world| world.set_extent_word(at, 0x1ff000),
        expect![
            "Some(1ff000) present, rw, 4 KiB page hpa:0x50000000, granted in part: no byte (extent 0x1ff000 is not valid)"
        ],
    );
    check_leaf(
        |world| {
            world.set_extent(at, 0, 0x1ff);
            let extents = world.entry_at(at, 1).expect("mapped").get() + 4096;
            world.memory.remove_frame(Hpa::new(extents));
        },
        expect![
            "None present, rw, 4 KiB page hpa:0x50000000, granted in part: but no memory here for its extent"
        ],
    );
    // To a unit without extents, the bit says nothing.
    check_leaf(
        |world| {
            world.set_extent(at, 0, 0x1ff);
            world.byte_extents = false;
        },
        expect!["None present, rw, 4 KiB page hpa:0x50000000"],
    );
}

#[test]
fn large_pages_and_pass_through_are_named() {
    check(
        |world| {
            world.iova = Iova::new(0x4020_0000);
            assert!(world.map(world.iova, Hpa::new(0x60_0000), PageSize::Size2M, Permissions::READ));
        },
        expect![[r#"
            Root[1]    present, context table hpa:0x2000
            Context[19]    present, 48-bit, domain 7, table hpa:0x100000
            SecondStage { level: 4 }[0] rw present, rw, table hpa:0x102000
            SecondStage { level: 3 }[1] rw present, rw, table hpa:0x108000
            SecondStage { level: 2 }[1] r- present, r-, 2 MiB page hpa:0x600000
            hpa:0x600000 2 MiB r-
        "#]],
    );
    check(
        |world| world.set_context(ContextEntry::pass_through(5, DOMAIN)),
        expect![[r#"
            Root[1]    present, context table hpa:0x2000
            Context[19]    present, 57-bit, domain 7, pass-through
            hpa:0x1234567000 4 KiB rw
        "#]],
    );
    check(
        |world| {
            let at = world.entry_at(world.iova, 4).expect("the top");
            let entry = SecondStageEntry::leaf(Hpa::new(0), PageSize::Size1G, Permissions::READ);
            world.memory.store(at, entry.into_bits());
        },
        expect![[r#"
            Root[1]    present, context table hpa:0x2000
            Context[19]    present, 48-bit, domain 7, table hpa:0x100000
            SecondStage { level: 4 }[0] r- present, r-, table hpa:0x0, reserved bits 0x80 set
            0x0c a reserved bit is set in a page-table entry suppressed=false
        "#]],
    );
    check(
        |world| {
            world.capabilities.caching_mode = true;
            world.set_context(ContextEntry::pass_through(4, iommu_types::DomainId::new(0)));
        },
        expect![[r#"
            Root[1]    present, context table hpa:0x2000
            Context[19]    present, 48-bit, domain 0, pass-through, but pass-through needs the widest width, but domain 0 is reserved in caching mode
            0x03 the context entry has an unsupported width or type, or its top-level table cannot be read suppressed=false
        "#]],
    );
}
