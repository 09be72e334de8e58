//! The walk against a stupid twin (a list of mappings searched from end to end), and against nonsense. Deterministic by seed;
//! a failure prints the seed.

mod table_world;

use std::ops::ControlFlow;

use iommu_hardware::cache::PagingEntry;
use iommu_hardware::vtd::spec::extent::ByteExtent;
use iommu_hardware::vtd::spec::pte::{SecondStageEntry, level_shift};
use iommu_hardware::vtd::walk::{Leaf, NoTrace, RootMode, WalkFault, dump, walk_context, walk_second_stage};
use iommu_types::{
    Access, AddressWidths, FaultReason, Hpa, HpaRange, Iova, IovaRange, PAGE_SIZE_BYTES, PageSize,
    Permissions, Structure,
};
use table_world::{MapMemory, Random, World};

const SEEDS: u64 = 300;
const ACCESSES: [Access; 3] = [Access::Read, Access::Write, Access::Atomic];

/// What the tables mean, without tables.
#[derive(Debug, Default)]
struct FlatTwin {
    mappings: Vec<(IovaRange, Hpa, Permissions)>,
    /// Partial pages, and what is open of them.
    extents: Vec<(Iova, Option<ByteExtent>)>,
    /// Permissions taken from whatever lies in a range, by an entry above it.
    restrictions: Vec<(IovaRange, Permissions)>,
}

impl FlatTwin {
    fn translate(&self, world: &World) -> Result<(Hpa, Permissions), FaultReason> {
        let (iova, access) = (world.iova, world.access);
        let width_bits =
            u32::from(world.capabilities.max_guest_width_bits).min(12 + 9 * u32::from(world.levels));
        if iova.get() >= 1 << width_bits {
            return Err(FaultReason::ADDRESS_BEYOND_WIDTH);
        }
        let mapped = self.mappings.iter().find(|(range, ..)| range.contains(iova));
        let mut permissions = mapped.map_or(Permissions::empty(), |(.., permissions)| *permissions);
        for (_, left) in self.restrictions.iter().filter(|(range, _)| range.contains(iova)) {
            permissions &= *left;
        }
        let readable = permissions.contains(Permissions::READ);
        let writable = permissions.contains(Permissions::WRITE);
        let zero_length = world.size_bytes == 0 && world.capabilities.zero_length_read && writable;
        match access {
            Access::Read if !readable && !zero_length => return Err(FaultReason::READ_DENIED),
            Access::Write | Access::Atomic if !writable => return Err(FaultReason::WRITE_DENIED),
            Access::Atomic if !readable => return Err(FaultReason::READ_DENIED),
            _ => {}
        }
        if let Some((_, extent)) = self.extents.iter().find(|(page, _)| *page == iova.page_base()) {
            // Byte by byte, with the byte of a read of nothing.
            let touched = iova.page_offset()..iova.page_offset() + u64::from(world.size_bytes.max(1));
            let is_open = |byte: u64| {
                extent.is_some_and(|open| (u64::from(open.first())..=u64::from(open.last())).contains(&byte))
            };
            if !touched.clone().all(is_open) {
                return Err(FaultReason::BYTES_DENIED);
            }
        }
        let (range, hpa, _) = mapped.expect("permissions come from a mapping");
        let result = hpa.get() + (iova.get() - range.base().get());
        if (0xfee0_0000..=0xfeef_ffff).contains(&result) {
            return Err(FaultReason::RESULT_IN_INTERRUPT_RANGE);
        }
        Ok((Hpa::new(result), permissions))
    }
}

fn random_permissions(random: &mut Random) -> Permissions {
    Permissions::from_bits_truncate(random.pick(&[1u8, 2, 3, 3, 3]))
}

/// Few regions, so that pages meet in the same tables; now and then the interrupt range as a target.
fn random_page(random: &mut Random, world: &World) -> (Iova, Hpa, PageSize) {
    let size = random.pick(&[PageSize::Size4K, PageSize::Size4K, PageSize::Size2M, PageSize::Size1G]);
    let limit = 1u64 << (12 + 9 * u32::from(world.levels));
    let region = random.pick(&[0, 1 << 30, 1 << 38, limit - (2 << 30)]);
    let iova = region + (random.below(2) << 30) + (random.below(3) << 21) + (random.below(4) << 12);
    let hpa = if random.one_in(6) { 0xfee0_0000 + (random.below(512) << 12) } else { random.next() >> 18 };
    let align = !(size.bytes() - 1);
    (Iova::new((iova % limit) & align), Hpa::new(hpa & align), size)
}

fn build(random: &mut Random) -> (World, FlatTwin) {
    let mut world = World::new(random.pick(&[3, 4, 5]));
    world.capabilities.max_guest_width_bits = random.pick(&[39, 48, 57, 57, 57]);
    world.capabilities.zero_length_read = random.one_in(2);
    let mut twin = FlatTwin::default();
    for _ in 0..40 {
        let (iova, hpa, size) = random_page(random, &world);
        let permissions = random_permissions(random);
        let range = IovaRange::new(iova, size.bytes()).expect("within 57 bits");
        if twin.mappings.iter().any(|(other, ..)| other.overlaps(range)) {
            continue;
        }
        // A table may already stand where a large page would go, with smaller pages under other addresses.
        if world.map(iova, hpa, size, permissions) {
            twin.mappings.push((range, hpa, permissions));
        }
    }
    // The marks are there in every world; only half of the units know them.
    world.byte_extents = random.one_in(2);
    let small = |range: &IovaRange| range.size_bytes() == PAGE_SIZE_BYTES;
    for page in twin.mappings.iter().map(|(range, ..)| range).filter(|range| small(range)) {
        if random.one_in(2) {
            let word = random_extent_word(random);
            world.set_extent_word(page.base(), word);
            if world.byte_extents {
                twin.extents.push((page.base(), ByteExtent::from_word(word)));
            }
        }
    }
    for _ in 0..random.below(8) {
        restrict(random, &mut world, &mut twin);
    }
    (world, twin)
}

fn random_extent_word(random: &mut Random) -> u64 {
    let (one, other) = (random.below(4096) as u16, random.below(4096) as u16);
    let sound = ByteExtent::new(one.min(other), one.max(other)).expect("in order").into_word();
    match random.below(6) {
        0 => 0,
        1 => random.next(),
        2 => ByteExtent::new(0, 4095).expect("in order").into_word(),
        _ => sound,
    }
}

fn restrict(random: &mut Random, world: &mut World, twin: &mut FlatTwin) {
    let (iova, ..) = random_page(random, world);
    let level = 1 + random.below(u64::from(world.levels)) as u8;
    let left = Permissions::from_bits_truncate(random.below(4) as u8);
    let Some(at) = world.entry_at(iova, level) else { return };
    let raw = world.memory.word(at).expect("a table");
    world.memory.store(at, raw & (!3 | u64::from(left.bits())));
    let size_bytes = 1u64 << level_shift(level);
    let range =
        IovaRange::new(Iova::new(iova.get() & !(size_bytes - 1)), size_bytes).expect("within 57 bits");
    twin.restrictions.push((range, left));
}

fn random_request(random: &mut Random, world: &mut World, twin: &FlatTwin) {
    world.access = random.pick(&ACCESSES);
    world.size_bytes = random.pick(&[0, 1, 4, 64]);
    world.iova = if twin.mappings.is_empty() || random.one_in(5) {
        Iova::new(random.next() >> random.below(40))
    } else {
        let (range, ..) = twin.mappings[random.below(twin.mappings.len() as u64) as usize];
        let inside = random.below(range.size_bytes());
        let open = twin.extents.iter().find(|(page, _)| *page == range.base()).and_then(|(_, open)| *open);
        let first = open.map_or(inside, |open| u64::from(open.first()));
        let last = open.map_or(inside, |open| u64::from(open.last()));
        let edge =
            random.pick(&[0, range.size_bytes() - 1, range.size_bytes(), inside, first, last, last + 1]);
        Iova::new(range.base().get() + edge)
    };
}

/// Walks from the top, then from every table that the walk reported: all end alike, whatever the paging-structure cache holds.
fn walk_from_everywhere(world: &World) -> Result<Leaf, WalkFault> {
    let outcome = world.walk();
    let Ok(context) =
        walk_context(&world.memory, &world.capabilities, world.root, world.source, &mut NoTrace)
    else {
        return outcome;
    };
    let walk = |start: Option<PagingEntry>, seen: &mut Vec<PagingEntry>| {
        walk_second_stage(
            &world.memory,
            world.rules(),
            &context,
            start,
            world.iova,
            world.access,
            world.size_bytes,
            &mut NoTrace,
            |entry| seen.push(entry),
        )
    };
    let mut tables = Vec::new();
    assert_eq!(walk(None, &mut tables), outcome);
    for (position, start) in tables.iter().enumerate() {
        let mut below = Vec::new();
        assert_eq!(walk(Some(*start), &mut below), outcome, "from {start:?}");
        assert_eq!(below, tables[position + 1..], "the same tables come after {start:?}");
    }
    outcome
}

#[test]
fn i2_the_walk_agrees_with_the_flat_twin() {
    let (mut translated, mut refused, mut partial, mut outside) = (0, 0, 0, 0);
    for seed in 0..SEEDS {
        let mut random = Random(seed);
        let (mut world, twin) = build(&mut random);
        for _ in 0..100 {
            random_request(&mut random, &mut world, &twin);
            let walked = walk_from_everywhere(&world)
                .map(|leaf| {
                    partial += u32::from(leaf.extent.is_some());
                    let offset = world.iova.get() & (leaf.size.bytes() - 1);
                    (Hpa::new(leaf.hpa.get() + offset), leaf.permissions)
                })
                .map_err(|fault| fault.reason);
            let expected = twin.translate(&world);
            assert_eq!(
                walked, expected,
                "seed {seed}: {} at {}, {} bytes",
                world.access, world.iova, world.size_bytes
            );
            if walked.is_ok() {
                translated += 1
            } else {
                refused += 1
            }
            outside += u32::from(walked == Err(FaultReason::BYTES_DENIED));
        }
    }
    assert!(translated > 2_000 && refused > 2_000, "both outcomes are met: {translated} and {refused}");
    assert!(partial > 400 && outside > 400, "on partial pages too: {partial} and {outside}");
}

/// The page handed out is right as a whole: a cache serves the rest of it from this one walk.
#[test]
fn i2_every_address_of_a_leaf_translates_as_the_leaf_says() {
    for seed in 0..SEEDS {
        let mut random = Random(seed ^ 0xabcd);
        let (mut world, twin) = build(&mut random);
        for _ in 0..30 {
            random_request(&mut random, &mut world, &twin);
            let Ok(leaf) = world.walk() else { continue };
            let page = world.iova.get() & !(leaf.size.bytes() - 1);
            let offset = match leaf.extent {
                None => random.below(leaf.size.bytes()),
                Some(open) => {
                    world.size_bytes = world.size_bytes.min(1);
                    u64::from(open.first()) + random.below(u64::from(open.last() - open.first()) + 1)
                }
            };
            world.iova = Iova::new(page + offset);
            let expected = Ok((Hpa::new(leaf.hpa.get() + offset), leaf.permissions));
            assert_eq!(twin.translate(&world), expected, "seed {seed}: {leaf:?} + {offset:#x}");
        }
    }
}

/// Tables of random bits: some frames that refer to each other, themselves and nothing.
fn nonsense(random: &mut Random) -> World {
    let mut world = World::new(random.pick(&[3, 4, 5]));
    let frames = 1 + random.below(24);
    world.memory = MapMemory::default();
    for frame in 0..frames {
        for word in 0..512 {
            // Mostly plausible: a pointer into the frames, present. Sometimes anything, or damaged.
            let plausible = (random.below(frames + 1) << 12)
                | random.pick(&[0, 1, 2, 3, 3, 3, 3, 3])
                | (u64::from(random.one_in(12)) << 7);
            let raw = match random.below(8) {
                0 => random.next(),
                1 => 0,
                2 => plausible ^ 1 << random.below(64),
                _ => plausible,
            };
            // Upper halves of context entries: a width and a domain.
            let raw = if word % 2 == 1 && random.one_in(4) { random.below(5) | 7 << 8 } else { raw };
            world.memory.store(Hpa::new(frame * PAGE_SIZE_BYTES + word * 8), raw);
        }
    }
    world.root.base = Hpa::new(random.below(frames + 1) << 12);
    if random.one_in(2) {
        // A sound way to a top-level table of nonsense, so that the page tables are met often.
        let way = World::new(world.levels);
        let (root, context) = (way.root_at(), way.context_at());
        for at in [root, context] {
            for half in [at, Hpa::new(at.get() + 8)] {
                world.memory.store(half, way.memory.word(half).expect("built"));
            }
        }
        world.root = way.root;
        world.set_context(way.context().with_second_stage_frame(random.below(frames)));
    }
    if random.one_in(20) {
        world.root.mode = random.pick(&[RootMode::Scalable, RootMode::Reserved, RootMode::AbortDma]);
    }
    world.capabilities.widths = AddressWidths::from_bits_truncate(random.pick(&[2, 4, 8, 14, 14, 14]));
    world.capabilities.host_width_bits = random.pick(&[32, 46, 46, 52]);
    world.capabilities.snoop_control = random.one_in(2);
    world.capabilities.pages_1g = random.one_in(2);
    world.byte_extents = random.one_in(2);
    world
}

#[test]
fn nonsense_in_tables_ends_every_walk_and_explain_agrees() {
    let (mut translated, mut reasons) = (0, std::collections::BTreeSet::new());
    for seed in 0..SEEDS {
        let mut random = Random(seed ^ 0x5eed_0000);
        let mut world = nonsense(&mut random);
        for _ in 0..60 {
            world.source =
                iommu_types::SourceId::new(if random.one_in(2) { 0x0113 } else { random.next() as u16 });
            world.access = random.pick(&ACCESSES);
            world.size_bytes = random.pick(&[0, 4]);
            world.iova = Iova::new(random.next() >> random.pick(&[0, 7, 16, 25, 25, 40]));
            let outcome = walk_from_everywhere(&world);
            let (_, steps) = world.explain();
            assert!(steps.len() <= 7, "seed {seed}: {} steps", steps.len());
            match outcome {
                Ok(leaf) => {
                    translated += 1;
                    let pass_through = steps.len() == 2;
                    let left = steps.last().and_then(|step| step.permissions);
                    assert!(pass_through || left == Some(leaf.permissions), "seed {seed}: {leaf:?}");
                    let page = HpaRange::new(leaf.hpa, leaf.size.bytes()).expect("below HAW");
                    let interrupts = HpaRange::new(Hpa::new(0xfee0_0000), 1 << 20).expect("a range");
                    assert!(!page.overlaps(interrupts), "seed {seed}: {leaf:?}");
                    assert_eq!(page.last().get() >> world.capabilities.host_width_bits, 0, "seed {seed}");
                }
                Err(fault) => {
                    assert!(!fault.suppressed || fault.reason.is_qualified(), "seed {seed}: {fault:?}");
                    reasons.insert(fault.reason.0);
                }
            }
        }
    }
    assert!(translated > 50, "some nonsense makes sense: {translated}");
    let reasons: Vec<u8> = reasons.into_iter().collect();
    assert_eq!(reasons, [1, 2, 3, 4, 5, 6, 7, 8, 9, 0xa, 0xb, 0xc, 0x30, 0xe8], "every reason is met");
}

#[test]
fn a_dump_gives_every_present_entry_in_order_and_the_pages_that_are_mapped() {
    for seed in 0..60 {
        let mut random = Random(seed ^ 0xd0_0d);
        let (world, twin) = build(&mut random);
        let mut pages = Vec::new();
        let mut last = None;
        let flow = dump(&world.memory, world.rules(), world.root, world.source, false, &mut |step, iova| {
            let Structure::SecondStage { level } = step.structure else {
                assert_eq!(iova, None, "root and context entries have no address");
                return ControlFlow::Continue(());
            };
            let iova = iova.expect("page-table entries have an address");
            assert!(last <= Some(iova), "seed {seed}: {iova} after {last:?}");
            last = Some(iova);
            let entry = SecondStageEntry::from_bits(step.low.expect("in memory"));
            if entry.is_leaf_at(level) {
                pages.push((iova, entry.address()));
            }
            ControlFlow::Continue(())
        });
        assert_eq!(flow, ControlFlow::Continue(()));
        let mut expected: Vec<_> = twin
            .mappings
            .iter()
            .map(|(range, hpa, _)| (range.base(), *hpa))
            .filter(|(iova, _)| is_reached(&world, *iova))
            .collect();
        expected.sort();
        assert_eq!(pages, expected, "seed {seed}");
    }
}

/// Whether a present leaf serves an address: a restriction takes an entry away when it leaves it nothing.
fn is_reached(world: &World, iova: Iova) -> bool {
    PageSize::ALL.iter().any(|size| {
        let at = world.entry_at(iova, size.leaf_level());
        let entry = at.and_then(|at| world.memory.word(at)).map(SecondStageEntry::from_bits);
        entry.is_some_and(|entry| entry.is_present() && entry.is_leaf_at(size.leaf_level()))
    })
}

#[test]
fn a_dump_of_nonsense_goes_as_far_as_its_reader_wants() {
    for seed in 0..SEEDS {
        let mut random = Random(seed ^ 0xdead);
        let mut world = nonsense(&mut random);
        world.source = iommu_types::SourceId::new(0x0113);
        let mut count = 0;
        let _ = dump(&world.memory, world.rules(), world.root, world.source, false, &mut |step, _| {
            assert!(!step.reading.is_empty());
            count += 1;
            if count == 500 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        assert!(count <= 500);
    }
}

#[test]
fn a_table_that_leads_to_itself_is_dumped_as_deep_as_there_are_levels() {
    let mut world = World::new(4);
    let top = world.context().second_stage_table();
    world.memory.store(top, SecondStageEntry::table(top).into_bits());
    let mut levels = Vec::new();
    let flow = dump(&world.memory, world.rules(), world.root, world.source, false, &mut |step, _| {
        levels.push(step.structure);
        ControlFlow::Continue(())
    });
    assert_eq!(flow, ControlFlow::Continue(()));
    let expected: Vec<_> = [Structure::Root, Structure::Context]
        .into_iter()
        .chain((1..=4).rev().map(|level| Structure::SecondStage { level }))
        .collect();
    assert_eq!(levels, expected);
    let mut steps = 0;
    let _ = dump(&world.memory, world.rules(), world.root, world.source, true, &mut |_, _| {
        steps += 1;
        ControlFlow::Continue(())
    });
    assert_eq!(steps, 2, "without page tables only root and context");
}

/// What a dump shows below an entry is what a walk could meet there.
#[test]
fn an_entry_that_the_walk_refuses_is_dumped_but_not_followed() {
    let mut world = World::mapped(4);
    world.damage(3, 1 << 62);
    let mut readings = Vec::new();
    let _ = dump(&world.memory, world.rules(), world.root, world.source, false, &mut |step, _| {
        readings.push(step.reading);
        ControlFlow::Continue(())
    });
    assert_eq!(readings.len(), 4, "root, context, level 4, level 3: {readings:#?}");
    assert!(readings[3].ends_with("reserved bits 0x4000000000000000 set"), "{}", readings[3]);
}

#[test]
fn a_table_without_memory_is_dumped_as_one_unreadable_entry() {
    let mut world = World::mapped(4);
    let level_1 = world.entry_at(world.iova, 1).expect("mapped");
    world.memory.remove_frame(level_1);
    let mut readings = Vec::new();
    let _ = dump(&world.memory, world.rules(), world.root, world.source, false, &mut |step, _| {
        readings.push(step.reading);
        ControlFlow::Continue(())
    });
    assert_eq!(readings.len(), 6);
    assert_eq!(readings.last().map(String::as_str), Some("no memory here"));
}
