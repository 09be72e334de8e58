//! The fault table of VT-d 5.10 §7.1 for legacy mode, row by row at the level of the walk: bytes in memory, one request, and
//! the reason with its qualification by FPD. Every row is run with FPD clear and set, and by Explain's tracer too.

mod table_world;

use iommu_hardware::vtd::spec::pte::SecondStageEntry;
use iommu_hardware::vtd::spec::root_context::{ContextEntry, RootEntry, TranslationType};
use iommu_hardware::vtd::walk::{RootMode, WalkFault, check_table_mode, walk_context, walk_second_stage};
use iommu_types::{Access, AddressWidths, FaultReason, Hpa, Iova, PageSize, Pasid, Permissions};
use table_world::{CONTEXT, DOMAIN, ROOT, World};

const NOT_QUALIFIED: bool = false;
const QUALIFIED: bool = true;

const R: u64 = 1;
const W: u64 = 2;
const PS: u64 = 1 << 7;
const SNP: u64 = 1 << 11;

type Change = fn(&mut World);
type Row = (&'static str, Change, u8, bool);

fn run(world: &World, fault_processing_disable: bool) -> Result<Hpa, WalkFault> {
    let mut world = world.clone();
    if fault_processing_disable && let Some(raw) = world.memory.word(world.context_at()) {
        let at = world.context_at();
        world.memory.store(at, raw | 0b10);
    }
    world.walk().map(|leaf| leaf.hpa)
}

fn check(levels: u8, rows: &[Row]) {
    assert!(run(&World::mapped(levels), false).is_ok(), "an undamaged world translates");
    for (name, change, reason, qualified) in rows {
        let mut world = World::mapped(levels);
        change(&mut world);
        for fpd in [false, true] {
            let expected = WalkFault { reason: FaultReason(*reason), suppressed: fpd && *qualified };
            assert_eq!(run(&world, fpd), Err(expected), "{name}, FPD={fpd}");
        }
        assert_eq!(
            FaultReason(*reason).is_qualified(),
            *qualified,
            "{name}: the vocabulary knows the same qualification"
        );
    }
}

fn check_passes(levels: u8, rows: &[(&'static str, Change)]) {
    for (name, change) in rows {
        let mut world = World::mapped(levels);
        change(&mut world);
        assert!(run(&world, false).is_ok(), "{name}: {:?}", run(&world, false));
    }
}

/// The request's page becomes a leaf of a larger size.
fn make_large(world: &mut World, size: PageSize, hpa: u64, permissions: Permissions) {
    let at = world.entry_at(world.iova, size.leaf_level()).expect("mapped");
    world.memory.store(at, SecondStageEntry::leaf(Hpa::new(hpa), size, permissions).into_bits());
}

fn permit(world: &mut World, level: u8, permissions: u64) {
    let at = world.entry_at(world.iova, level).expect("mapped");
    let raw = world.memory.word(at).expect("a table");
    world.memory.store(at, raw & !3 | permissions);
}

fn ask(world: &mut World, access: Access, size_bytes: u32) {
    world.access = access;
    world.size_bytes = size_bytes;
}

#[test]
fn table_modes_other_than_legacy_are_refused_before_anything_is_read() {
    check(
        4,
        &[
            ("scalable mode", |w| w.root.mode = RootMode::Scalable, 0x30, NOT_QUALIFIED),
            ("reserved mode", |w| w.root.mode = RootMode::Reserved, 0x30, NOT_QUALIFIED),
            ("abort-DMA mode without ADMS", |w| w.root.mode = RootMode::AbortDma, 0x30, NOT_QUALIFIED),
        ],
    );
    let world = World::mapped(4);
    let pasid = Pasid::new(5);
    let fault = |reason| Err(WalkFault { reason: FaultReason(reason), suppressed: false });
    assert_eq!(check_table_mode(world.root, pasid), fault(0x31));
    assert_eq!(check_table_mode(world.root, None), Ok(()));
    let mut scalable = world.root;
    scalable.mode = RootMode::Scalable;
    assert_eq!(check_table_mode(scalable, pasid), fault(0x30));
}

#[test]
fn root_entry_rows() {
    check(
        4,
        &[
            ("root table where no memory is", |w| w.root.base = Hpa::new(0x7f00_0000), 0x8, NOT_QUALIFIED),
            ("root table at the end of 64 bits", |w| w.root.base = Hpa::new(!0xfff), 0x8, NOT_QUALIFIED),
            ("root entry not present", |w| w.damage_root(1), 0x1, NOT_QUALIFIED),
            ("not present, reserved bits set: not looked at", |w| w.damage_root(1 | 2), 0x1, NOT_QUALIFIED),
            ("table pointer beyond HAW", |w| w.damage_root(1 << 46), 0xa, NOT_QUALIFIED),
        ],
    );
    for bit in (1..12).chain(46..128) {
        let mut world = World::mapped(4);
        world.damage_root(1 << bit);
        let expected = WalkFault { reason: FaultReason::ROOT_RESERVED, suppressed: false };
        assert_eq!(run(&world, true), Err(expected), "root bit {bit} is reserved");
    }
}

#[test]
fn context_entry_rows() {
    check(
        4,
        &[
            ("context table where no memory is", |w| w.memory.remove_frame(CONTEXT), 0x9, NOT_QUALIFIED),
            ("context entry not present", |w| w.damage_context(1), 0x2, QUALIFIED),
            ("not present, all else zero", |w| w.set_context(ContextEntry::new()), 0x2, QUALIFIED),
            ("not present, reserved bits set", |w| w.damage_context(1 | 0xff0), 0x2, QUALIFIED),
            ("a reserved bit", |w| w.damage_context(1 << 4), 0xb, QUALIFIED),
            (
                "reserved bit and bad type: the bit first",
                |w| w.damage_context(1 << 127 | 0b1100),
                0xb,
                QUALIFIED,
            ),
            ("AW 0", |w| w.set_context(w.context().with_address_width(0)), 0x3, QUALIFIED),
            ("AW 4", |w| w.set_context(w.context().with_address_width(4)), 0x3, QUALIFIED),
            ("AW 7", |w| w.set_context(w.context().with_address_width(7)), 0x3, QUALIFIED),
            (
                "a width that the unit lacks",
                |w| w.capabilities.widths = AddressWidths::BITS_39 | AddressWidths::BITS_57,
                0x3,
                QUALIFIED,
            ),
            ("TT 01 without device TLBs", |w| w.damage_context(0b0100), 0x3, QUALIFIED),
            ("TT 11", |w| w.damage_context(0b1100), 0x3, QUALIFIED),
            (
                "pass-through that the unit lacks",
                |w| {
                    w.capabilities.pass_through = false;
                    w.set_context(ContextEntry::pass_through(5, DOMAIN));
                },
                0x3,
                QUALIFIED,
            ),
            (
                "pass-through with a width that is not the widest",
                |w| w.set_context(ContextEntry::pass_through(4, DOMAIN)),
                0x3,
                QUALIFIED,
            ),
            (
                "domain 0 in caching mode",
                |w| {
                    w.capabilities.caching_mode = true;
                    w.set_context(w.context().with_domain_id(iommu_types::DomainId::new(0)));
                },
                0x3,
                QUALIFIED,
            ),
            (
                "top-level table where no memory is",
                |w| w.set_context(ContextEntry::second_stage(Hpa::new(0x7f00_0000), 4, DOMAIN)),
                0x3,
                QUALIFIED,
            ),
        ],
    );
    for bit in (4..12).chain(46..64).chain([71]).chain(88..128) {
        let mut world = World::mapped(4);
        world.damage_context(1 << bit);
        let expected = WalkFault { reason: FaultReason::CONTEXT_RESERVED, suppressed: true };
        assert_eq!(run(&world, true), Err(expected), "context bit {bit} is reserved");
    }
}

#[test]
fn context_bits_without_a_meaning_do_not_matter() {
    check_passes(
        4,
        &[
            ("bits 70:67", |w| w.damage_context(0b1111 << 67)),
            ("domain 0 without caching mode", |w| {
                w.set_context(w.context().with_domain_id(iommu_types::DomainId::new(0)));
            }),
            ("caching mode with another domain", |w| w.capabilities.caching_mode = true),
            ("the pointer of a pass-through entry, beyond HAW", |w| {
                let entry = ContextEntry::pass_through(5, DOMAIN).with_second_stage_frame((1 << 52) - 1);
                w.set_context(entry);
            }),
            ("widest is relative to the unit", |w| {
                w.capabilities.widths = AddressWidths::BITS_39 | AddressWidths::BITS_48;
                w.set_context(ContextEntry::pass_through(4, DOMAIN));
            }),
        ],
    );
}

#[test]
fn page_table_access_rows() {
    fn cut(world: &mut World, level: u8) {
        let at = world.entry_at(world.iova, level).expect("mapped");
        world.memory.remove_frame(at);
    }
    check(
        5,
        &[
            ("level 5, the top", |w| cut(w, 5), 0x3, QUALIFIED),
            ("level 4", |w| cut(w, 4), 0x7, QUALIFIED),
            ("level 3", |w| cut(w, 3), 0x7, QUALIFIED),
            ("level 2", |w| cut(w, 2), 0x7, QUALIFIED),
            ("level 1", |w| cut(w, 1), 0x7, QUALIFIED),
        ],
    );
    check(3, &[("level 3 at the top", |w| cut(w, 3), 0x3, QUALIFIED)]);
}

#[test]
fn page_table_reserved_rows() {
    check(
        5,
        &[
            ("PS at level 5", |w| w.damage(5, PS), 0xc, QUALIFIED),
            ("PS at level 4", |w| w.damage(4, PS), 0xc, QUALIFIED),
            (
                "1 GiB page that the unit lacks",
                |w| {
                    w.capabilities.pages_1g = false;
                    make_large(w, PageSize::Size1G, 0x4000_0000, Permissions::READ_WRITE);
                },
                0xc,
                QUALIFIED,
            ),
            (
                "2 MiB page that the unit lacks",
                |w| {
                    (w.capabilities.pages_1g, w.capabilities.pages_2m) = (false, false);
                    make_large(w, PageSize::Size2M, 0x4000_0000, Permissions::READ_WRITE);
                },
                0xc,
                QUALIFIED,
            ),
            ("SNP in an entry that points to a table, level 5", |w| w.damage(5, SNP), 0xc, QUALIFIED),
            ("SNP in an entry that points to a table, level 2", |w| w.damage(2, SNP), 0xc, QUALIFIED),
            (
                "SNP in a leaf without snoop control",
                |w| {
                    w.capabilities.snoop_control = false;
                    w.damage(1, SNP);
                },
                0xc,
                QUALIFIED,
            ),
            ("address beyond HAW in a leaf", |w| w.damage(1, 1 << 46), 0xc, QUALIFIED),
            ("address beyond HAW in a table", |w| w.damage(3, 1 << 51), 0xc, QUALIFIED),
            ("bit 62 in a leaf", |w| w.damage(1, 1 << 62), 0xc, QUALIFIED),
            ("bit 62 in a table", |w| w.damage(5, 1 << 62), 0xc, QUALIFIED),
            (
                "reserved bit in an entry without the permission asked: reserved first",
                |w| {
                    permit(w, 1, R);
                    w.damage(1, 1 << 62);
                    ask(w, Access::Write, 4);
                },
                0xc,
                QUALIFIED,
            ),
        ],
    );
    for (size, bits) in [(PageSize::Size2M, 12..21), (PageSize::Size1G, 12..30)] {
        for bit in bits {
            let mut world = World::mapped(4);
            make_large(&mut world, size, 0x4000_0000, Permissions::READ_WRITE);
            assert!(run(&world, false).is_ok());
            world.damage(size.leaf_level(), 1 << bit);
            let expected = WalkFault { reason: FaultReason::TABLE_RESERVED, suppressed: false };
            assert_eq!(run(&world, false), Err(expected), "bit {bit} of a {size} page is reserved");
        }
    }
}

#[test]
fn page_table_bits_without_a_meaning_do_not_matter() {
    check_passes(
        4,
        &[
            ("bit 2", |w| w.damage(4, 1 << 2)),
            ("memory type and IPAT", |w| w.damage(1, 0b1111 << 3)),
            ("PS at level 1", |w| w.damage(1, PS)),
            ("accessed and dirty", |w| w.damage(1, 0b11 << 8)),
            ("bit 10", |w| w.damage(2, 1 << 10)),
            ("SNP in a leaf", |w| w.damage(1, SNP)),
            ("software bits 60:52", |w| w.damage(1, 0x1ff << 52)),
            ("software bits 60:52 in a table", |w| w.damage(3, 0x1ff << 52)),
            ("bit 61", |w| w.damage(1, 1 << 61)),
            ("bit 63", |w| w.damage(4, 1 << 63)),
        ],
    );
}

#[test]
fn address_limit_rows() {
    check(
        3,
        &[
            ("first address beyond 39 bits", |w| w.iova = Iova::new(1 << 39), 0x4, QUALIFIED),
            ("the last address of all", |w| w.iova = Iova::new(u64::MAX), 0x4, QUALIFIED),
        ],
    );
    check(
        4,
        &[
            ("first address beyond 48 bits", |w| w.iova = Iova::new(1 << 48), 0x4, QUALIFIED),
            (
                "MGAW below the width of the context",
                |w| {
                    w.capabilities.max_guest_width_bits = 40;
                    w.iova = Iova::new(1 << 40);
                },
                0x4,
                QUALIFIED,
            ),
            (
                "pass-through beyond HAW",
                |w| {
                    w.set_context(ContextEntry::pass_through(5, DOMAIN));
                    w.iova = Iova::new(1 << 46);
                },
                0x4,
                QUALIFIED,
            ),
        ],
    );
    // The last page within is translated.
    for (levels, bits) in [(3, 39), (4, 48), (5, 57)] {
        let mut world = World::new(levels);
        world.iova = Iova::new((1u64 << bits) - 4096);
        assert!(world.map(world.iova, Hpa::new(0x9000), PageSize::Size4K, Permissions::READ));
        assert_eq!(run(&world, false), Ok(Hpa::new(0x9000)));
    }
}

/// Sets permissions at levels, then asks.
fn grant(world: &mut World, levels: &[(u8, u64)], access: Access, size_bytes: u32) {
    for (level, permissions) in levels {
        permit(world, *level, *permissions);
    }
    ask(world, access, size_bytes);
}

#[test]
fn permission_rows() {
    use Access::{Atomic, Read, Write};
    const Q: bool = QUALIFIED;
    check(
        4,
        &[
            ("write, page read-only", |w| grant(w, &[(1, R)], Write, 4), 0x5, Q),
            ("write, read-only at the top", |w| grant(w, &[(4, R)], Write, 4), 0x5, Q),
            ("zero-length write, read-only", |w| grant(w, &[(1, R)], Write, 0), 0x5, Q),
            ("read, page write-only", |w| grant(w, &[(1, W)], Read, 4), 0x6, Q),
            ("read, write-only at level 2", |w| grant(w, &[(2, W)], Read, 4), 0x6, Q),
            ("read, R and W at different levels", |w| grant(w, &[(3, W), (1, R)], Read, 4), 0x6, Q),
            ("atomic, read-only", |w| grant(w, &[(1, R)], Atomic, 8), 0x5, Q),
            ("atomic, write-only", |w| grant(w, &[(1, W)], Atomic, 8), 0x6, Q),
            ("atomic, neither left", |w| grant(w, &[(2, W), (1, R)], Atomic, 8), 0x5, Q),
        ],
    );
}

#[test]
fn not_present_rows() {
    use Access::{Atomic, Read, Write};
    const Q: bool = QUALIFIED;
    fn all_but_permissions(world: &mut World, level: u8) {
        let at = world.entry_at(world.iova, level).expect("mapped");
        world.memory.store(at, !(R | W));
    }
    check(
        4,
        &[
            ("write", |w| grant(w, &[(1, 0)], Write, 4), 0x5, Q),
            ("read, at the top", |w| grant(w, &[(4, 0)], Read, 4), 0x6, Q),
            ("atomic", |w| grant(w, &[(2, 0)], Atomic, 4), 0x5, Q),
            ("read, all other bits set: not looked at", |w| all_but_permissions(w, 3), 0x6, Q),
            ("a reserved bit below a missing permission shows", bit_62_below_read_only, 0xc, Q),
        ],
    );
    fn bit_62_below_read_only(world: &mut World) {
        grant(world, &[(4, R)], Write, 4);
        world.damage(1, 1 << 62);
    }
}

#[test]
fn zero_length_read_rows() {
    use Access::Read;
    const Q: bool = QUALIFIED;
    fn without_zlr(world: &mut World) {
        world.capabilities.zero_length_read = false;
        grant(world, &[(1, W)], Read, 0);
    }
    check(
        4,
        &[
            ("nothing left", |w| grant(w, &[(2, W), (1, R)], Read, 0), 0x6, Q),
            ("not present", |w| grant(w, &[(1, 0)], Read, 0), 0x6, Q),
            ("write-only page, without ZLR", without_zlr, 0x6, Q),
        ],
    );
    check_passes(4, &[("write-only page", |w| grant(w, &[(1, W)], Read, 0))]);
}

#[test]
fn result_in_the_interrupt_range_rows() {
    check(
        4,
        &[
            (
                "4 KiB page",
                |w| make_large(w, PageSize::Size4K, 0xfee0_0000, Permissions::READ_WRITE),
                0xe,
                QUALIFIED,
            ),
            (
                "the last page of the range",
                |w| make_large(w, PageSize::Size4K, 0xfeef_f000, Permissions::READ_WRITE),
                0xe,
                QUALIFIED,
            ),
            (
                "2 MiB page",
                |w| {
                    w.iova = Iova::new(0x12_3460_0000);
                    assert!(w.map(w.iova, Hpa::new(0xfee0_0000), PageSize::Size2M, Permissions::READ_WRITE));
                },
                0xe,
                QUALIFIED,
            ),
            (
                "1 GiB page",
                |w| {
                    w.iova = Iova::new(0x80_0000_0000 + 0x3ee0_0000);
                    let base = Iova::new(0x80_0000_0000);
                    assert!(w.map(base, Hpa::new(0xc000_0000), PageSize::Size1G, Permissions::READ_WRITE));
                },
                0xe,
                QUALIFIED,
            ),
            (
                "pass-through",
                |w| {
                    w.set_context(ContextEntry::pass_through(5, DOMAIN));
                    w.iova = Iova::new(0xfee0_1000);
                },
                0xe,
                QUALIFIED,
            ),
            (
                "without permission: that comes first",
                |w| {
                    make_large(w, PageSize::Size4K, 0xfee0_0000, Permissions::READ);
                    ask(w, Access::Write, 4);
                },
                0x5,
                QUALIFIED,
            ),
        ],
    );
}

/// A cached large page that covers FEEx_xxxx would lead there on a hit; so it is never handed out whole.
#[test]
fn a_large_page_around_the_interrupt_range_comes_in_small_pieces() {
    let mut world = World::new(4);
    let base = Iova::new(0x80_0000_0000);
    assert!(world.map(base, Hpa::new(0xc000_0000), PageSize::Size1G, Permissions::READ_WRITE));
    for offset in [0u64, 0x3edf_f000, 0x3ef0_0000, 0x3fff_f000] {
        world.iova = Iova::new(base.get() + offset);
        let leaf = world.walk().expect("outside the range");
        assert_eq!((leaf.hpa, leaf.size), (Hpa::new(0xc000_0000 + offset), PageSize::Size4K));
    }
}

#[test]
fn pass_through_gives_the_address_itself_and_reads_no_page_table() {
    let mut world = World::mapped(4);
    world.set_context(ContextEntry::pass_through(5, DOMAIN));
    for access in [Access::Read, Access::Write, Access::Atomic] {
        world.access = access;
        let (outcome, steps) = world.explain();
        assert_eq!(outcome.map(|leaf| leaf.hpa), Ok(Hpa::new(world.iova.get())));
        assert_eq!(steps.len(), 2, "root and context");
    }
}

/// Every width, page size and pair of permissions along the way.
#[test]
fn i2_permissions_are_the_and_over_all_levels() {
    let accesses = [Access::Read, Access::Write, Access::Atomic];
    for (levels, size) in [3u8, 4, 5].into_iter().flat_map(|l| PageSize::ALL.map(|size| (l, size))) {
        let pairs = (1..=3u64).flat_map(|above| (0..=3u64).map(move |leaf| (above, leaf)));
        for ((above, leaf), access) in pairs.flat_map(|pair| accesses.map(|access| (pair, access))) {
            for level_above in size.leaf_level() + 1..=levels {
                let mut world = World::new(levels);
                let base = Iova::new(0x11_4000_0000);
                assert!(world.map(base, Hpa::new(0x8000_0000), size, Permissions::READ_WRITE));
                world.iova = Iova::new(base.get() + size.bytes() - 8);
                world.access = access;
                permit(&mut world, size.leaf_level(), leaf);
                permit(&mut world, level_above, above);
                let left = Permissions::from_bits_truncate((above & leaf) as u8);
                let context =
                    format!("{levels} levels, {size}, {above:b} above, {leaf:b} in the leaf, {access}");
                match world.walk() {
                    Ok(found) => {
                        assert!(left.allow(access), "{context}");
                        assert_eq!(found.permissions, left, "{context}");
                        assert_eq!((found.size, found.hpa), (size, Hpa::new(0x8000_0000)), "{context}");
                    }
                    Err(fault) => {
                        assert!(!left.allow(access), "{context}");
                        let write_missing = access != Access::Read && !left.contains(Permissions::WRITE);
                        assert_eq!(fault.reason.0, if write_missing { 5 } else { 6 }, "{context}");
                    }
                }
            }
        }
    }
}

#[test]
fn tables_passed_are_reported_with_the_permissions_so_far() {
    let mut world = World::mapped(5);
    permit(&mut world, 4, R);
    permit(&mut world, 2, R | W);
    let context = walk_context(
        &world.memory,
        &world.capabilities,
        world.root,
        world.source,
        &mut iommu_hardware::vtd::walk::NoTrace,
    )
    .expect("present");
    let mut seen = Vec::new();
    let leaf = walk_second_stage(
        &world.memory,
        world.rules(),
        &context,
        None,
        world.iova,
        Access::Read,
        4,
        &mut iommu_hardware::vtd::walk::NoTrace,
        |entry| seen.push(entry),
    )
    .expect("mapped");
    assert_eq!(seen.iter().map(|entry| entry.level).collect::<Vec<_>>(), [3, 2, 1]);
    assert!(seen.iter().all(|entry| entry.permissions == Permissions::READ && entry.domain_id == DOMAIN));
    for start in seen {
        let again = walk_second_stage(
            &world.memory,
            world.rules(),
            &context,
            Some(start),
            world.iova,
            Access::Read,
            4,
            &mut iommu_hardware::vtd::walk::NoTrace,
            |_| {},
        );
        assert_eq!(again, Ok(leaf), "from level {}", start.level);
    }
}

#[test]
fn the_root_entry_is_that_of_the_bus_and_the_context_entry_that_of_device_and_function() {
    let world = World::mapped(4);
    let (_, steps) = world.explain();
    assert_eq!((steps[0].at, steps[0].index), (Hpa::new(ROOT.get() + 16), 1));
    assert_eq!((steps[1].at, steps[1].index), (Hpa::new(CONTEXT.get() + 16 * 0x13), 0x13));
    assert_eq!(steps.len(), 6);
    assert_eq!(RootEntry::from_bits(u128::from(steps[0].low.unwrap())).context_table(), CONTEXT);
    assert_eq!(world.context().translation_type(), TranslationType::SECOND_STAGE);
}

/// The request is eight bytes from offset 0x40 on, of a page that is open from 0x40 to 0x4f.
fn in_part(world: &mut World) {
    world.byte_extents = true;
    world.set_extent(world.iova, 0x40, 0x4f);
    world.iova = world.iova.checked_add(0x40).expect("inside");
}

#[test]
fn the_bytes_of_a_partial_page_are_checked_after_its_permissions() {
    let rows: [Row; 9] = [
        (
            "a byte before",
            |w| {
                in_part(w);
                w.iova = Iova::new(w.iova.get() - 1);
            },
            0xe8,
            QUALIFIED,
        ),
        (
            "a byte after",
            |w| {
                in_part(w);
                ask(w, Access::Read, 17);
            },
            0xe8,
            QUALIFIED,
        ),
        (
            "an atomic over the end",
            |w| {
                in_part(w);
                w.iova = Iova::new(w.iova.get() + 16);
                ask(w, Access::Atomic, 8);
            },
            0xe8,
            QUALIFIED,
        ),
        (
            "nothing, read outside",
            |w| {
                in_part(w);
                w.iova = Iova::new(w.iova.get() + 16);
                ask(w, Access::Read, 0);
            },
            0xe8,
            QUALIFIED,
        ),
        (
            "outside, and no permission",
            |w| {
                in_part(w);
                permit(w, 1, R);
                ask(w, Access::Write, 64);
            },
            5,
            QUALIFIED,
        ),
        (
            "outside, and no permission to read",
            |w| {
                in_part(w);
                permit(w, 2, W);
                ask(w, Access::Read, 64);
            },
            6,
            QUALIFIED,
        ),
        (
            "the extent is not valid",
            |w| {
                in_part(w);
                w.set_extent_word(w.iova, 0xfff << 12);
            },
            0xe8,
            QUALIFIED,
        ),
        (
            "the extent has a bit that means nothing",
            |w| {
                in_part(w);
                w.set_extent_word(w.iova, 1 << 63 | 1 << 24 | 0xfff << 12);
            },
            0xe8,
            QUALIFIED,
        ),
        (
            "the extent has no memory",
            |w| {
                in_part(w);
                let extents = w.entry_at(w.iova, 1).expect("mapped").get() + 4096;
                w.memory.remove_frame(Hpa::new(extents));
            },
            7,
            QUALIFIED,
        ),
    ];
    check(4, &rows);
    check(
        4,
        &[(
            "a result in the interrupt range comes last",
            |w| {
                in_part(w);
                let at = w.entry_at(w.iova, 1).expect("mapped");
                w.memory.store(at, 1 << 52 | 0xfee0_0003);
            },
            0xe,
            QUALIFIED,
        )],
    );
}

#[test]
fn what_lies_inside_an_extent_passes_and_bit_52_means_nothing_elsewhere() {
    check_passes(
        4,
        &[
            ("the first bytes", in_part),
            ("all of it", |w| {
                in_part(w);
                ask(w, Access::Write, 16);
            }),
            ("the last byte", |w| {
                in_part(w);
                w.iova = Iova::new(w.iova.get() + 15);
                ask(w, Access::Write, 1);
            }),
            ("nothing, read at the last byte", |w| {
                in_part(w);
                w.iova = Iova::new(w.iova.get() + 15);
                ask(w, Access::Read, 0);
            }),
            ("an atomic up to the end", |w| {
                in_part(w);
                w.iova = Iova::new(w.iova.get() + 8);
                ask(w, Access::Atomic, 8);
            }),
            ("a unit without extents", |w| {
                in_part(w);
                w.byte_extents = false;
                ask(w, Access::Write, 64);
            }),
            ("an extent without the mark", |w| {
                in_part(w);
                w.damage(1, 1 << 52);
                ask(w, Access::Write, 64);
            }),
            ("the mark in a 2 MiB page", |w| {
                in_part(w);
                make_large(w, PageSize::Size2M, 0x4000_0000, Permissions::READ_WRITE);
                w.damage(2, 1 << 52);
                ask(w, Access::Write, 64);
            }),
            ("the mark in an entry that names a table", |w| {
                w.byte_extents = true;
                w.damage(2, 1 << 52);
                ask(w, Access::Write, 64);
            }),
        ],
    );
}
