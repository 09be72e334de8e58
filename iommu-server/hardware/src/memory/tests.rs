//! Claims about the space as a whole: where RAM is, that accesses are all or nothing, what is refused and why.

use super::*;
use iommu_types::{AtomicOperation, Hpa, HpaRange, PAGE_SIZE_BYTES};
use proptest::prelude::*;
use std::os::unix::fs::PermissionsExt;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// A memory that is reserved only, so that 3 GiB cost nothing.
fn reserved(size_bytes: u64) -> PhysicalMemory {
    PhysicalMemory::new(&MemoryConfig { size_bytes, backing: Backing::Memfd }).expect("memory")
}

fn range(base: u64, size_bytes: u64) -> HpaRange {
    HpaRange::new(Hpa::new(base), size_bytes).expect("a range")
}

/// Every way to touch `size_bytes` bytes at `at` agrees on whether they are there.
fn check_access(memory: &PhysicalMemory, at: u64, size_bytes: usize, is_there: bool) {
    let hpa = Hpa::new(at);
    let expected = if is_there { Ok(()) } else { Err(NoMemoryAt { at: hpa, size_bytes: size_bytes as u64 }) };
    let mut bytes = vec![0; size_bytes];
    let place = format!("{size_bytes} bytes at {hpa}");
    assert_eq!(memory.read(hpa, &mut bytes), expected, "read of {place}");
    assert_eq!(memory.write(hpa, &bytes), expected, "write of {place}");
    assert_eq!(memory.read_units(hpa, &mut bytes), expected, "read by units of {place}");
    assert_eq!(memory.write_units(hpa, &bytes), expected, "write by units of {place}");
    if let Ok(range) = HpaRange::new(hpa, size_bytes as u64) {
        assert_eq!(memory.contains(range), is_there, "contains {place}");
        assert_eq!(memory.zero(range), expected, "zero {place}");
    }
    if hpa.is_aligned(8) && size_bytes == 8 {
        assert_eq!(memory.load_u64(hpa).map(drop), expected, "load of {place}");
        assert_eq!(memory.store_u64(hpa, 0), expected, "store of {place}");
        assert_eq!(memory.compare_exchange_u64(hpa, 0, 0).map(drop), expected, "compare and swap of {place}");
    }
    if hpa.is_aligned(16) && size_bytes == 16 {
        assert_eq!(memory.load_u128(hpa).map(drop), expected, "load of {place}");
        assert_eq!(memory.store_u128(hpa, 0), expected, "store of {place}");
    }
    if hpa.is_aligned(4) && size_bytes == 4 {
        assert_eq!(memory.store_u32(hpa, 0), expected, "store of {place}");
        assert_eq!(memory.atomic(hpa, AtomicOperation::Swap32(0)).map(drop), expected, "swap of {place}");
    }
}

#[test]
fn an_access_is_there_only_when_every_byte_is_ram() {
    let memory = reserved(3 * GIB + MIB);
    let high_end = 4 * GIB + MIB;
    for (at, size_bytes, is_there) in [
        (0, 1, true),
        (0, 0, true),
        (3 * GIB - 1, 1, true), // the last byte of low RAM
        (3 * GIB - 8, 8, true),
        (3 * GIB - 16, 16, true),
        (3 * GIB - 4, 4, true),
        (3 * GIB - 1, 0, true),
        (3 * GIB, 0, false), // zero bytes at no memory
        (3 * GIB, 1, false),
        (3 * GIB, 8, false),
        (3 * GIB - 1, 2, false), // crosses the end of a region
        (3 * GIB - 7, 8, false),
        (3 * GIB - 16, 4096, false),
        (0xFEE0_0000, 4, false), // interrupts
        (0xFEEF_FFFC, 4, false),
        (4 * GIB - 8, 8, false), // the last word of the hole
        (4 * GIB - 1, 2, false), // from the hole into RAM
        (4 * GIB, 1, true),
        (4 * GIB, 4, true),
        (high_end - 1, 1, true), // the last byte of all
        (high_end - 16, 16, true),
        (high_end - 1, 2, false),
        (high_end, 0, false),
        (high_end, 8, false),
        (high_end, 16, false),
        (u64::MAX, 1, false), // wrap
        (u64::MAX - 7, 8, false),
        (u64::MAX - 15, 16, false),
        (u64::MAX - 3, 4, false),
        (u64::MAX, 4096, false),
    ] {
        check_access(&memory, at, size_bytes, is_there);
    }
}

#[test]
fn a_range_across_the_hole_is_not_contained() {
    let memory = reserved(3 * GIB + MIB);
    for crossing in [range(0, 4 * GIB + 1), range(3 * GIB - 1, GIB + 2), range(0, u64::MAX)] {
        assert!(!memory.contains(crossing), "{crossing}");
        let refused = NoMemoryAt { at: crossing.base(), size_bytes: crossing.size_bytes() };
        assert_eq!(memory.zero(crossing), Err(refused));
    }
}

#[test]
fn ram_has_no_frame_in_the_hole_whatever_its_size() {
    for (size_bytes, expected) in [
        (MIB, vec![range(0, MIB)]),
        (3 * GIB - PAGE_SIZE_BYTES, vec![range(0, 3 * GIB - PAGE_SIZE_BYTES)]),
        (3 * GIB, vec![range(0, 3 * GIB)]),
        (3 * GIB + PAGE_SIZE_BYTES, vec![range(0, 3 * GIB), range(4 * GIB, PAGE_SIZE_BYTES)]),
        (64 * GIB, vec![range(0, 3 * GIB), range(4 * GIB, 61 * GIB)]),
    ] {
        let memory = reserved(size_bytes);
        assert_eq!(memory.size_bytes(), size_bytes);
        assert_eq!(memory.ranges(), expected);
        assert!(memory.ranges().iter().all(|ram| !ram.overlaps(range(0xFEE0_0000, MIB))));
    }
}

#[test]
fn the_two_regions_are_different_memory() {
    let memory = reserved(3 * GIB + MIB);
    memory.store_u64(Hpa::new(4 * GIB), 1).expect("inside");
    memory.store_u64(Hpa::new(3 * GIB - 8), 2).expect("inside");
    memory.store_u64(Hpa::new(0), 3).expect("inside");
    assert_eq!(memory.load_u64(Hpa::new(4 * GIB)), Ok(1));
    assert_eq!(memory.load_u64(Hpa::new(3 * GIB - 8)), Ok(2));
    assert_eq!(memory.load_u64(Hpa::new(0)), Ok(3));
}

#[test]
fn a_size_that_makes_no_sense_is_refused_with_its_reason() {
    let check = |size_bytes, expected: &str| {
        let refused = PhysicalMemory::bare(size_bytes).expect_err("refused").to_string();
        assert!(refused.contains(expected), "{refused}");
    };
    check(0, "too few");
    check(MIB - PAGE_SIZE_BYTES, "too few");
    check(MIB + 1, "not a multiple of the frame size");
    check(MEMORY_BYTES_MAX + PAGE_SIZE_BYTES, "too many");
    check(u64::MAX, "too many");
}

#[test]
fn an_existing_file_is_refused_by_name_with_a_remedy_and_left_alone() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("memory");
    std::fs::write(&path, b"precious").expect("a file");
    let config = MemoryConfig { size_bytes: MIB, backing: Backing::File(path.clone()) };
    let refused = PhysicalMemory::new(&config).expect_err("refused");
    assert!(matches!(&refused, MemoryError::FileExists { path: named } if *named == path), "{refused:?}");
    let message = refused.to_string();
    assert!(
        message.contains(&path.display().to_string()) && message.contains("remove the file"),
        "{message}"
    );
    assert_eq!(std::fs::read(&path).expect("still there"), b"precious");
}

#[test]
fn a_symbolic_link_is_not_followed_to_a_new_file() {
    let directory = tempfile::tempdir().expect("a directory");
    let (link, target) = (directory.path().join("link"), directory.path().join("target"));
    std::os::unix::fs::symlink(&target, &link).expect("a link");
    let config = MemoryConfig { size_bytes: MIB, backing: Backing::File(link) };
    assert!(matches!(PhysicalMemory::new(&config), Err(MemoryError::FileExists { .. })));
    assert!(!target.exists());
}

#[test]
fn a_memory_file_is_private_whole_and_holds_what_was_written() {
    use std::os::unix::fs::MetadataExt;
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("memory");
    let config = MemoryConfig { size_bytes: 2 * MIB, backing: Backing::File(path.clone()) };
    let memory = PhysicalMemory::new(&config).expect("memory");
    let metadata = std::fs::metadata(&path).expect("the file");
    assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
    assert_eq!(metadata.len(), 2 * MIB);
    assert!(metadata.blocks() * 512 >= 2 * MIB, "the file has holes: {} blocks", metadata.blocks());
    memory.write(Hpa::new(0x1003), b"on disk").expect("inside");
    let bytes = std::fs::read(&path).expect("the file");
    assert_eq!(&bytes[0x1003..0x100a], b"on disk");
}

#[test]
fn a_start_that_fails_leaves_no_file_behind() {
    let directory = tempfile::tempdir().expect("a directory");
    let missing = directory.path().join("missing").join("memory");
    let config = MemoryConfig { size_bytes: MIB, backing: Backing::File(missing) };
    assert!(matches!(PhysicalMemory::new(&config), Err(MemoryError::CreateFile { .. })));
    // One GiB more than the file system has free.
    let path = directory.path().join("memory");
    let system = rustix::fs::statvfs(directory.path()).expect("a file system");
    let size_bytes = (system.f_bavail * system.f_frsize).next_multiple_of(PAGE_SIZE_BYTES) + GIB;
    let config =
        MemoryConfig { size_bytes: size_bytes.min(MEMORY_BYTES_MAX), backing: Backing::File(path.clone()) };
    if size_bytes <= MEMORY_BYTES_MAX {
        let refused = PhysicalMemory::new(&config).expect_err("refused");
        assert!(matches!(refused, MemoryError::Allocate { .. }), "{refused:?}");
        assert!(!path.exists(), "a file that was refused would be refused again");
    }
}

#[test]
fn preallocation_takes_every_frame_and_changes_no_byte() {
    let memory = reserved(130 * MIB); // more than two steps
    memory.write(Hpa::new(129 * MIB), b"before").expect("inside");
    std::thread::scope(|threads| {
        let preallocation = threads.spawn(|| memory.preallocate());
        memory.write(Hpa::new(64 * MIB - 3), b"during").expect("inside");
        assert!(preallocation.join().expect("no panic").is_ok());
    });
    memory.preallocate().expect("a second time is harmless");
    let mut bytes = [0; 6];
    memory.read(Hpa::new(129 * MIB), &mut bytes).expect("inside");
    assert_eq!(&bytes, b"before");
    memory.read(Hpa::new(64 * MIB - 3), &mut bytes).expect("inside");
    assert_eq!(&bytes, b"during");
}

#[test]
fn memory_is_shared_between_threads() {
    fn shared<T: Send + Sync>() {}
    shared::<PhysicalMemory>();
    shared::<FrameArray>();
    shared::<MappingRecords>();
}

#[test]
fn pcie_atomics_return_the_old_value_and_touch_only_their_bytes() {
    use AtomicOperation as Op;
    const BEFORE: u64 = 0x1111_2222_ffff_ffff;
    for (operation, size_bytes, old, after) in [
        (Op::FetchAdd32(2), 4, 0xffff_ffff_u128, 0x1111_2222_0000_0001_u64), // wraps, no carry into the neighbour
        (Op::FetchAdd64(1), 8, BEFORE.into(), 0x1111_2223_0000_0000),
        (Op::Swap32(5), 4, 0xffff_ffff, 0x1111_2222_0000_0005),
        (Op::Swap64(5), 8, BEFORE.into(), 5),
        (Op::Cas32 { compare: u32::MAX, new: 9 }, 4, 0xffff_ffff, 0x1111_2222_0000_0009),
        (Op::Cas32 { compare: 1, new: 9 }, 4, 0xffff_ffff, BEFORE),
        (Op::Cas64 { compare: BEFORE, new: 9 }, 8, BEFORE.into(), 9),
        (Op::Cas64 { compare: 1, new: 9 }, 8, BEFORE.into(), BEFORE),
        (Op::Cas128 { compare: BEFORE.into(), new: 9 }, 16, BEFORE.into(), 9),
        (Op::Cas128 { compare: 1 << 64 | u128::from(BEFORE), new: 9 }, 16, BEFORE.into(), BEFORE),
    ] {
        let memory = PhysicalMemory::bare(MIB).expect("memory");
        let at = Hpa::new(0x2000);
        memory.store_u64(at, BEFORE).expect("inside");
        assert_eq!(operation.size_bytes(), size_bytes, "{operation:?}");
        assert_eq!(memory.atomic(at, operation), Ok(old), "{operation:?}");
        assert_eq!(memory.load_u64(at), Ok(after), "{operation:?}");
        assert_eq!(memory.load_u64(Hpa::new(0x2008)), Ok(0), "{operation:?}");
    }
}

#[test]
fn entries_are_stored_little_endian() {
    let memory = PhysicalMemory::bare(MIB).expect("memory");
    memory.store_u128(Hpa::new(0x10), 0x0f0e_0d0c_0b0a_0908_0706_0504_0302_0100).expect("inside");
    memory.store_u32(Hpa::new(0x20), 0x1312_1110).expect("inside");
    let mut bytes = [0xee; 20];
    memory.read(Hpa::new(0x10), &mut bytes).expect("inside");
    let expected: [u8; 20] = std::array::from_fn(|i| i as u8);
    assert_eq!(bytes, expected);
    assert_eq!(memory.load_u64(Hpa::new(0x18)), Ok(0x0f0e_0d0c_0b0a_0908));
}

/// A writer fills a block with one byte value after the other; whoever reads by units never sees two values in one unit.
#[test]
fn an_aligned_unit_is_never_torn() {
    const ROUNDS: u32 = 4_000;
    let memory = PhysicalMemory::bare(MIB).expect("memory");
    let at = Hpa::new(0x1005); // three bytes before the first unit, and five after the last
    std::thread::scope(|threads| {
        threads.spawn(|| {
            for round in 0..ROUNDS {
                memory.write_units(at, &[round as u8; 64]).expect("inside");
            }
        });
        let mut bytes = [0; 64];
        for _ in 0..ROUNDS {
            memory.read_units(at, &mut bytes).expect("inside");
            for unit in bytes[3..59].chunks_exact(8) {
                assert!(unit.iter().all(|byte| *byte == unit[0]), "a torn unit: {unit:?}");
            }
        }
    });
}

#[derive(Clone, Debug)]
enum Step {
    Write(u64, Vec<u8>),
    WriteUnits(u64, Vec<u8>),
    Zero(u64, u64),
    Store(u64, u64),
}

/// Any address, most of them near an edge of a memory of one MiB.
fn address() -> impl Strategy<Value = u64> {
    prop_oneof![6 => 0..300_u64, 6 => MIB - 300..MIB + 50, 1 => any::<u64>(), 1 => u64::MAX - 300..=u64::MAX]
}

fn step() -> impl Strategy<Value = Step> {
    let bytes = prop::collection::vec(any::<u8>(), 0..100);
    prop_oneof![
        (address(), bytes.clone()).prop_map(|(at, bytes)| Step::Write(at, bytes)),
        (address(), bytes).prop_map(|(at, bytes)| Step::WriteUnits(at, bytes)),
        (address(), 1..9000_u64).prop_map(|(at, size_bytes)| Step::Zero(at, size_bytes)),
        (address(), any::<u64>()).prop_map(|(at, value)| Step::Store(at & !7, value)),
    ]
}

/// The stupid twin's write: bytes into a `Vec`, if they all fit.
fn write_twin(twin: &mut [u8], at: u64, bytes: &[u8]) -> bool {
    let room = usize::try_from(at).ok().and_then(|at| Some(at..at.checked_add(bytes.len())?));
    match room.filter(|room| room.start < twin.len()).and_then(|room| twin.get_mut(room)) {
        Some(place) => {
            place.copy_from_slice(bytes);
            true
        }
        None => false,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]
    #[test]
    fn memory_agrees_with_a_vec_at_any_address(
        steps in prop::collection::vec(step(), 1..60),
        reads in prop::collection::vec((address(), 0..100_usize), 1..20),
    ) {
        let memory = PhysicalMemory::bare(MIB).expect("memory");
        let mut twin = vec![0; MIB as usize];
        for step in steps {
            let (done, expected) = match &step {
                Step::Write(at, bytes) => (memory.write(Hpa::new(*at), bytes), write_twin(&mut twin, *at, bytes)),
                Step::WriteUnits(at, bytes) => {
                    (memory.write_units(Hpa::new(*at), bytes), write_twin(&mut twin, *at, bytes))
                }
                Step::Zero(at, size_bytes) => {
                    let Ok(range) = HpaRange::new(Hpa::new(*at), *size_bytes) else { continue };
                    (memory.zero(range), write_twin(&mut twin, *at, &vec![0; *size_bytes as usize]))
                }
                Step::Store(at, value) => {
                    (memory.store_u64(Hpa::new(*at), *value), write_twin(&mut twin, *at, &value.to_le_bytes()))
                }
            };
            prop_assert_eq!(done.is_ok(), expected, "{:?}", step);
        }
        for (at, size_bytes) in reads {
            let expected = usize::try_from(at)
                .ok()
                .filter(|at| *at < twin.len())
                .and_then(|at| twin.get(at..at.checked_add(size_bytes)?));
            let (mut plain, mut by_units) = (vec![0; size_bytes], vec![0; size_bytes]);
            prop_assert_eq!(memory.read(Hpa::new(at), &mut plain).is_ok(), expected.is_some());
            prop_assert_eq!(memory.read_units(Hpa::new(at), &mut by_units).is_ok(), expected.is_some());
            if let Some(expected) = expected {
                prop_assert_eq!(plain.as_slice(), expected);
                prop_assert_eq!(by_units.as_slice(), expected);
            }
        }
        let mut all = vec![0; MIB as usize];
        memory.read(Hpa::new(0), &mut all).expect("inside");
        prop_assert!(all == twin, "memory and twin differ");
    }
}

#[test]
fn appending_takes_what_a_read_takes_and_leaves_what_was_there() {
    let memory = PhysicalMemory::bare(MEMORY_BYTES_MIN).expect("a small memory");
    memory.write(Hpa::new(0x1ffe), &[1, 2, 3, 4]).expect("RAM");
    let mut into = vec![9];
    memory.append(Hpa::new(0x1ffe), 4, &mut into).expect("RAM");
    assert_eq!(into, [9, 1, 2, 3, 4]);
    let end = Hpa::new(MEMORY_BYTES_MIN - 2);
    assert_eq!(memory.append(end, 4, &mut into), Err(NoMemoryAt { at: end, size_bytes: 4 }));
    assert_eq!(into.len(), 5, "all or nothing");
}
