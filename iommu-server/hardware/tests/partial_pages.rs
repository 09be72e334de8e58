//! Pages that are granted in part: what their extents let pass, on a miss and on a hit, fresh and stale.

mod machine;
mod managed;

use expect_test::expect;
use iommu_hardware::dma::{Run, Transfer};
use iommu_hardware::vtd::spec::extent::ByteExtent;
use iommu_hardware::vtd::{Unit, UnitConfig};
use iommu_types::{Access, CacheState, Capabilities, DmaFault, FaultReason, Iova, Outcome, Permissions};
use managed::{Device, FRAMES, Host, config};
use proptest::prelude::*;

const PAGE: u64 = 0x5000;
const RW: Permissions = Permissions::READ_WRITE;
const BYTES_DENIED: FaultReason = FaultReason::BYTES_DENIED;

/// [`PAGE`] is open from byte 0x40 to byte 0x4f.
fn in_part(permissions: Permissions) -> (Host, Device) {
    let host = Host::new(config());
    let device = host.device(3);
    host.map(&device, PAGE, FRAMES, permissions, Some((0x40, 0x4f)));
    (host, device)
}

/// One access, which misses, and the same again, which hits if it was let pass.
fn check(permissions: Permissions, offset: u64, access: Access, size_bytes: u32, expected: Option<u8>) {
    let (host, mut device) = in_part(permissions);
    let expected = expected.map_or(Ok(FRAMES + offset), |reason| Err(FaultReason(reason)));
    let asked = format!("{access} of {size_bytes} bytes at {offset:#x} of a page with {permissions}");
    assert_eq!(device.access(PAGE + offset, access, size_bytes), expected, "{asked}, on a miss");
    assert_eq!(host.counts(), [0, 1, 1], "{asked}");
    assert_eq!(device.access(PAGE + offset, access, size_bytes), expected, "{asked}, again");
    let is_hit = expected.is_ok() && permissions.allow(access);
    assert_eq!(host.counts(), if is_hit { [1, 1, 1] } else { [0, 2, 2] }, "{asked}");
    let counters = host.unit.counters();
    assert_eq!(counters.faults, if expected.is_ok() { 0 } else { 2 }, "{asked}");
    // On a hit that suffices for another access, the very same holds.
    if permissions == RW {
        let (host, mut device) = in_part(permissions);
        assert_eq!(device.access(PAGE + 0x40, Access::Read, 16), Ok(FRAMES + 0x40));
        assert_eq!(device.access(PAGE + offset, access, size_bytes), expected, "{asked}, on a hit");
        assert_eq!(host.counts(), if expected.is_ok() { [1, 1, 1] } else { [0, 2, 2] }, "{asked}");
    }
}

#[test]
fn i2_a_partial_page_lets_pass_what_lies_inside_its_extent_on_a_miss_and_on_a_hit() {
    use Access::{Atomic, Read, Write};
    const BYTES: Option<u8> = Some(0xe8);
    for (offset, access, size_bytes, expected) in [
        (0x40, Read, 16, None),
        (0x40, Write, 1, None),
        (0x4f, Write, 1, None),
        (0x48, Atomic, 8, None),
        (0x40, Atomic, 16, None),
        (0x40, Read, 0, None),
        (0x4f, Read, 0, None),
        (0x3f, Read, 1, BYTES),
        (0x3f, Read, 0, BYTES),
        (0x50, Read, 0, BYTES),
        (0x50, Write, 1, BYTES),
        (0x3f, Write, 2, BYTES),
        (0x4f, Read, 2, BYTES),
        (0x4c, Atomic, 8, BYTES),
        (0x38, Atomic, 16, BYTES),
        (0, Read, 4096, BYTES),
        (0xfff, Write, 1, BYTES),
    ] {
        check(RW, offset, access, size_bytes, expected);
    }
}

#[test]
fn i2_permissions_of_a_partial_page_are_asked_before_its_bytes() {
    use Access::{Atomic, Read, Write};
    check(Permissions::READ, 0x40, Read, 8, None);
    check(Permissions::READ, 0x40, Write, 8, Some(5));
    check(Permissions::READ, 0x00, Write, 8, Some(5));
    check(Permissions::READ, 0x40, Atomic, 8, Some(5));
    check(Permissions::WRITE, 0x40, Write, 8, None);
    check(Permissions::WRITE, 0x40, Read, 8, Some(6));
    check(Permissions::WRITE, 0x00, Read, 8, Some(6));
    check(Permissions::WRITE, 0x40, Atomic, 8, Some(6));
    // A zero-length read passes by either permission, but not on a hit: there permissions are those of a read.
    check(Permissions::WRITE, 0x40, Read, 0, None);
    check(Permissions::WRITE, 0x00, Read, 0, Some(0xe8));
}

#[test]
fn i4_a_narrowed_extent_is_served_until_it_is_invalidated_and_not_after() {
    let (host, mut device) = in_part(RW);
    assert!(device.access(PAGE + 0x40, Access::Write, 16).is_ok());
    host.map(&device, PAGE, FRAMES, RW, Some((0x44, 0x4b)));
    assert!(device.access(PAGE + 0x40, Access::Write, 16).is_ok(), "silicon does not look again");
    host.invalidate(&device, PAGE, 1);
    assert_eq!(device.access(PAGE + 0x40, Access::Write, 16), Err(BYTES_DENIED));
    assert_eq!(device.access(PAGE + 0x44, Access::Write, 8), Ok(FRAMES + 0x44));
    // One invalidation covers leaf and extent.
    host.unmap(&device, PAGE);
    host.invalidate(&device, PAGE, 1);
    assert_eq!(device.access(PAGE + 0x44, Access::Write, 8), Err(FaultReason::WRITE_DENIED));
    assert!(host.unit.iotlb_entries().is_empty());
}

#[test]
fn a_widened_extent_is_reached_without_an_invalidation() {
    let (host, mut device) = in_part(RW);
    assert!(device.access(PAGE + 0x40, Access::Read, 8).is_ok());
    host.map(&device, PAGE, FRAMES, RW, Some((0x40, 0xff)));
    assert_eq!(device.access(PAGE + 0x80, Access::Read, 8), Ok(FRAMES + 0x80), "the hit is insufficient");
    assert_eq!(host.counts(), [0, 2, 2]);
    assert_eq!(device.access(PAGE + 0xf8, Access::Read, 8), Ok(FRAMES + 0xf8), "and the new one replaced it");
    assert_eq!(host.counts(), [1, 2, 2]);
    // So does a page that is whole now, which the hot path serves from then on.
    host.map(&device, PAGE, FRAMES, RW, None);
    for offset in [0, 0xff8] {
        assert_eq!(device.access(PAGE + offset, Access::Read, 8), Ok(FRAMES + offset));
    }
    assert_eq!(host.counts(), [2, 3, 3]);
    assert_eq!(host.unit.iotlb_entries().len(), 1);
}

#[test]
fn the_iotlb_shows_real_permissions_and_the_extent() {
    let (host, mut device) = in_part(Permissions::WRITE);
    assert!(device.access(PAGE + 0x40, Access::Write, 8).is_ok());
    let entries = host.unit.iotlb_entries();
    let [entry] = entries[..] else { panic!("{entries:?}") };
    assert_eq!((entry.hpa.get(), entry.permissions), (FRAMES, Permissions::WRITE));
    assert_eq!(entry.extent, ByteExtent::new(0x40, 0x4f));
    let counters = host.unit.counters();
    assert_eq!(counters.table_reads, [1, 1, 1, 0, 0]);
    assert_eq!((counters.extent_reads, counters.walk_reads), (1, 6), "root and context too");
}

#[test]
fn an_operation_over_two_pages_moves_what_the_first_one_opens() {
    let (host, mut device) = in_part(RW);
    host.map(&device, PAGE, FRAMES, RW, Some((0xf00, 0xfff)));
    host.map(&device, PAGE + 0x1000, FRAMES + 0x1000, RW, Some((0, 0x0f)));
    let mut write = |at: u64, size: usize| {
        let bytes = vec![7; size];
        Run::new(&mut device.port).execute(Iova::new(at), None, Transfer::Write(&bytes)).map(|_| ())
    };
    assert_eq!(write(PAGE + 0xf00, 0x110), Ok(()), "exactly the buffer");
    let fault = DmaFault { done_bytes: 0x100, iova: Iova::new(PAGE + 0x1000), reason: Ok(BYTES_DENIED) };
    assert_eq!(write(PAGE + 0xf00, 0x111), Err(fault), "one byte more");
}

#[test]
fn a_bare_machine_ignores_bit_52() {
    let (machine, table) = machine::Machine::with_domain(Capabilities::FULL);
    machine.map_new(table, PAGE, RW);
    let at = machine.entry_at(table, PAGE, 1);
    machine.store(at, machine.load(at) | 1 << 52);
    assert!(!machine.bare.unit().has_byte_extents());
    assert!(machine.write_bytes(PAGE, &[1; 4096]).is_ok());
    assert!(machine.read_byte(PAGE + 0xfff).is_ok());
    let entries = machine.bare.unit().iotlb_entries();
    assert!(entries.iter().all(|entry| entry.extent.is_none() && entry.permissions == RW), "{entries:?}");
    assert_eq!(machine.bare.unit().counters().walks, 1);
}

#[test]
fn extents_need_host_addresses_that_leave_them_room() {
    let build = |host_width_bits, byte_extents| {
        let capabilities = Capabilities { host_width_bits, ..Capabilities::FULL };
        let memory = iommu_hardware::memory::PhysicalMemory::bare(1 << 20).expect("memory");
        let config = UnitConfig { capabilities, byte_extents, ..config() };
        let events = std::sync::Arc::new(machine::Events::default());
        Unit::new(config, memory.into(), events).map(|_| ()).map_err(|error| error.field)
    };
    assert_eq!(build(46, true), Ok(()));
    assert_eq!(build(47, true), Err("byte_extents"));
    assert_eq!(build(52, true), Err("byte_extents"));
    assert_eq!(build(52, false), Ok(()));
}

#[test]
fn in_caching_mode_a_partial_page_is_present_and_an_absent_one_is_cached() {
    let capabilities = Capabilities { caching_mode: true, ..Capabilities::FULL };
    let host = Host::new(UnitConfig { capabilities, ..config() });
    let mut device = host.device(3);
    host.map(&device, PAGE, FRAMES, Permissions::READ, Some((0x40, 0x4f)));
    assert!(device.access(PAGE + 0x40, Access::Read, 8).is_ok());
    assert!(device.access(PAGE + 0x40, Access::Read, 8).is_ok());
    assert_eq!(device.access(PAGE, Access::Read, 8), Err(BYTES_DENIED));
    assert_eq!(device.access(PAGE + 0x40, Access::Write, 8), Err(FaultReason::WRITE_DENIED));
    assert_eq!(host.counts(), [1, 3, 3], "what a partial page refuses comes from the tables");
    let entries = host.unit.iotlb_entries();
    assert!(entries.iter().all(|entry| entry.extent.is_some()), "no refusal is cached: {entries:?}");
    let absent = PAGE + 0x1000;
    for _ in 0..2 {
        assert_eq!(device.access(absent, Access::Read, 8), Err(FaultReason::READ_DENIED));
    }
    assert_eq!(host.counts(), [2, 4, 4], "absence is");
}

#[test]
fn explain_tells_what_is_open_by_the_tables_and_in_the_cache() {
    let (host, mut device) = in_part(RW);
    let explain = |offset: u64, size_bytes| {
        host.unit.explain(device.source, None, Iova::new(PAGE + offset), Access::Write, size_bytes)
    };
    let open = explain(0x40, 16);
    assert!(matches!(open.outcome, Outcome::Translated(_)), "{:?}", open.outcome);
    expect!["The write at iova:0x5040 by 00:00.3 reaches hpa:0x100040 through a 4 KiB page of domain 3 (rw), of which bytes 0x040 to 0x04f are open."]
        .assert_eq(&open.conclusion);
    expect!["The write at iova:0x5000 by 00:00.3 is refused: 0xe8 the access leaves the bytes that are mapped in the page (entry 5 of the level-1 table opens bytes 0x040 to 0x04f)."]
        .assert_eq(&explain(0, 16).conclusion);
    // Only the part of an access that is in the first page is asked about.
    host.map(&device, PAGE, FRAMES, RW, Some((0x40, 0xfff)));
    assert!(matches!(explain(0xff0, 64).outcome, Outcome::Translated(_)));
    host.map(&device, PAGE, FRAMES, RW, Some((0x40, 0x4f)));

    assert!(device.access(PAGE + 0x40, Access::Write, 16).is_ok());
    host.map(&device, PAGE, FRAMES, RW, Some((0x40, 0x43)));
    let explain = |offset: u64, size_bytes| {
        host.unit.explain(device.source, None, Iova::new(PAGE + offset), Access::Write, size_bytes)
    };
    let stale = explain(0x40, 16);
    assert_eq!(stale.stale.map(|stale| stale.hpa.get()), Some(FRAMES + 0x40));
    expect!["The write at iova:0x5040 by 00:00.3 is refused: 0xe8 the access leaves the bytes that are mapped in the page (entry 5 of the level-1 table opens bytes 0x040 to 0x043) by the tables, but a stale cached entry still leads it to hpa:0x100040."]
        .assert_eq(&stale.conclusion);
    let CacheState::Hit { entry } = stale.iotlb else { panic!("{:?}", stale.iotlb) };
    expect!["domain 3, 4 KiB page iova:0x5000 -> hpa:0x100000 rw, granted in part: bytes 0x040 to 0x04f"]
        .assert_eq(&entry);
    let CacheState::Insufficient { entry } = explain(0x50, 1).iotlb else { panic!("insufficient") };
    assert!(entry.ends_with("bytes 0x040 to 0x04f"), "{entry}");
    assert_eq!(host.counts(), [0, 1, 1], "Explain counts nothing");
}

// === against a list of what was held ===

const PAGES: u64 = 4;
const FRAME_COUNT: u64 = 3;

#[derive(Clone, Debug)]
enum Step {
    Map(u64, u64, Permissions, Option<(u16, u16)>),
    Unmap(u64),
    Invalidate(u64, u64),
    Access(u64, u64, Access, u32),
}

/// Few distinct bytes, so that edges meet.
fn byte() -> impl Strategy<Value = u16> {
    proptest::sample::select(vec![0u16, 1, 15, 16, 17, 31, 32, 2048, 4088, 4094, 4095])
}

fn step() -> impl Strategy<Value = Step> {
    let permissions = (1..=3u8).prop_map(Permissions::from_bits_truncate);
    let bytes = proptest::option::weighted(0.8, (byte(), byte()));
    let bytes = bytes.prop_map(|bytes| bytes.map(|(one, other)| (one.min(other), one.max(other))));
    let access = proptest::sample::select(vec![Access::Read, Access::Write, Access::Atomic]);
    let size = proptest::sample::select(vec![0u32, 1, 2, 8, 16, 4096]);
    prop_oneof![
        4 => (0..PAGES, 0..FRAME_COUNT, permissions, bytes)
            .prop_map(|(page, frame, may, bytes)| Step::Map(page, frame, may, bytes)),
        1 => (0..PAGES).prop_map(Step::Unmap),
        2 => (0..PAGES, 1..3u64).prop_map(|(page, pages)| Step::Invalidate(page, pages)),
        10 => (0..PAGES, byte(), access, size).prop_map(|(page, offset, access, size)| {
            let size = if access == Access::Read { size } else { size.max(1) };
            Step::Access(page, offset.into(), access, size.min(4096 - u32::from(offset)))
        }),
    ]
}

/// What an entry holds: frame, permissions, and the bytes that are open.
type Held = Option<(u64, Permissions, (u16, u16))>;

/// What a held entry says to an access, byte by byte.
fn says(held: Held, offset: u64, access: Access, size_bytes: u32) -> Result<u64, FaultReason> {
    let denied = if access == Access::Read { FaultReason::READ_DENIED } else { FaultReason::WRITE_DENIED };
    let Some((frame, permissions, (first, last))) = held else { return Err(denied) };
    let lets = permissions.allow(access) || access == Access::Read && size_bytes == 0;
    if !lets {
        let only_read = access == Access::Atomic && permissions == Permissions::WRITE;
        return Err(if only_read { FaultReason::READ_DENIED } else { denied });
    }
    let mut touched = offset..offset + u64::from(size_bytes.max(1));
    let is_open = |byte: u64| byte >= u64::from(first) && byte <= u64::from(last);
    if touched.all(is_open) { Ok(frame + offset) } else { Err(BYTES_DENIED) }
}

proptest! {
    #![proptest_config(machine::cases(96))]

    /// A DMA is served by an entry and extent that the tables held at or after the last invalidation covering it; and it is refused only
    /// when the tables refuse it now, with their reason.
    #[test]
    fn i2_every_byte_was_open_since_the_last_invalidation(steps in proptest::collection::vec(step(), 1..100)) {
        let host = Host::new(config());
        let mut device = host.device(3);
        let mut pages: Vec<Vec<Held>> = vec![vec![None]; PAGES as usize];
        for step in steps {
            match step {
                Step::Map(page, frame, may, bytes) => {
                    let frame = FRAMES + frame * 4096;
                    host.map(&device, page * 4096, frame, may, bytes);
                    pages[page as usize].push(Some((frame, may, bytes.unwrap_or((0, 4095)))));
                }
                Step::Unmap(page) => {
                    host.unmap(&device, page * 4096);
                    pages[page as usize].push(None);
                }
                Step::Invalidate(page, count) => {
                    host.invalidate(&device, page * 4096, count);
                    for held in pages.iter_mut().skip(page as usize).take(count as usize) {
                        held.drain(..held.len() - 1);
                    }
                }
                Step::Access(page, offset, access, size) => {
                    let held = &pages[page as usize];
                    let answer = |held: &Held| says(*held, offset, access, size);
                    let now = answer(held.last().expect("never empty"));
                    let reached = device.access(page * 4096 + offset, access, size);
                    match reached {
                        Ok(_) => prop_assert!(held.iter().any(|held| answer(held) == reached), "{reached:?} of {held:?}"),
                        Err(_) => prop_assert_eq!(reached, now, "{:?}", held),
                    }
                }
            }
        }
    }
}
