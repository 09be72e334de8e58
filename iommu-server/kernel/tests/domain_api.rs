//! The domain API: virtio-iommu's contract, superpages, refusals, and maps that fail half-way.

mod fixture;

use expect_test::{Expect, expect};
use fixture::*;
use iommu_kernel::{MapFixed, OwnerLimits};
use iommu_types::errors::{MapError, SplitsMapping, UnmapError};
use iommu_types::{Gpa, Iova, PageSize, Permissions};

/// Pages of the examples stand from here on.
const BASE: u64 = 0x10_0000;

fn check_unmap(maps: &[(u64, u64)], unmap: (u64, u64), expected: Result<&[u64], u64>) {
    let kernel = kernel();
    let mut tenant = Tenant::new(&kernel, 1, 48);
    let buffer = tenant.buffer(16);
    for (first, last) in maps {
        tenant.map(BASE + first * PAGE, buffer.base(), last - first + 1);
    }
    let range = iova_range(Iova::new(BASE + unmap.0 * PAGE), (unmap.1 - unmap.0 + 1) * PAGE);
    let left = match (tenant.domain.unmap(&kernel, range, NOW), expected) {
        (Ok(pending), Ok(left)) => {
            tenant.finish(pending);
            left.to_vec()
        }
        (Err(error), Err(split)) => {
            let iova = Iova::new(BASE + split * PAGE);
            assert_eq!(error, UnmapError::SplitsMapping(SplitsMapping { iova }));
            maps.iter().map(|(first, _)| *first).collect()
        }
        (result, _) => panic!("{maps:?} unmap {unmap:?}: {result:?}"),
    };
    let mappings = tenant.domain.mappings(&kernel, Iova::new(0), 100);
    let found: Vec<u64> = mappings.iter().map(|state| (state.range.base().get() - BASE) / PAGE).collect();
    assert_eq!(found, left, "{maps:?} unmap {unmap:?}");
    for (first, last) in maps {
        let is_left = left.contains(first);
        for page in *first..=*last {
            let iova = Iova::new(BASE + page * PAGE);
            assert_eq!(
                tenant.device_reads(iova, 8).is_ok(),
                is_left,
                "{maps:?} unmap {unmap:?}: page {page}"
            );
        }
    }
}

#[test]
fn unmap_follows_the_seven_worked_examples_of_virtio_iommu() {
    check_unmap(&[], (0, 4), Ok(&[]));
    check_unmap(&[(0, 9)], (0, 9), Ok(&[]));
    check_unmap(&[(0, 4), (5, 9)], (0, 9), Ok(&[]));
    check_unmap(&[(0, 9)], (0, 4), Err(0));
    check_unmap(&[(0, 4), (5, 9)], (0, 4), Ok(&[5]));
    check_unmap(&[(0, 4)], (0, 9), Ok(&[]));
    check_unmap(&[(0, 4), (10, 14)], (0, 14), Ok(&[]));
}

#[test]
fn unmap_never_splits_from_either_side() {
    check_unmap(&[(0, 9)], (5, 20), Err(0));
    check_unmap(&[(0, 9)], (3, 4), Err(0));
    check_unmap(&[(0, 1), (4, 9)], (0, 6), Err(4));
}

fn check_map_refused(change: impl Fn(&mut MapFixed), expected: Expect) {
    let kernel = kernel();
    let mut tenant = Tenant::new(&kernel, 1, 39);
    let buffer = tenant.buffer(8);
    tenant.map(BASE, buffer.base(), 4);
    let dma = tenant.dma_map(buffer, iommu_types::Direction::ToDevice);
    assert_eq!(dma, Iova::new(0xffe0_0000));
    let before = (tenant.domain.counters(), held(&kernel, &tenant.account));
    let mut request = fixed(BASE + 4 * PAGE, buffer.base(), 4);
    change(&mut request);
    let error = tenant.domain.map(&kernel, &tenant.memory, request, NOW).expect_err("refused");
    expected.assert_eq(&error.to_string());
    assert_eq!((tenant.domain.counters(), held(&kernel, &tenant.account)), before, "nothing changes");
}

#[test]
fn a_refused_map_names_the_reason_and_changes_nothing() {
    let at = |map: &mut MapFixed, iova: u64, bytes: u64| map.iova = iova_range(Iova::new(iova), bytes);
    check_map_refused(
        |map| at(map, BASE - PAGE, 2 * PAGE),
        expect!["the range overlaps the mapping at iova:0x100000"],
    );
    check_map_refused(
        |map| at(map, BASE + 3 * PAGE, PAGE),
        expect!["the range overlaps the mapping at iova:0x100000"],
    );
    check_map_refused(
        |map| at(map, 0xffe0_7000, PAGE),
        expect!["the range overlaps the mapping at iova:0xffe00000"],
    );
    check_map_refused(
        |map| at(map, 0xffdf_f000, 2 * PAGE),
        expect!["the range overlaps the mapping at iova:0xffe00000"],
    );
    check_map_refused(|map| at(map, 0x1001, PAGE), expect!["iova: 0x1001 is not a multiple of 0x1000"]);
    check_map_refused(|map| at(map, 0x1000, 100), expect!["size_bytes: 0x64 is not a multiple of 0x1000"]);
    check_map_refused(|map| map.gpa = Gpa::new(0x1800), expect!["gpa: 0x1800 is not a multiple of 0x1000"]);
    check_map_refused(
        |map| at(map, 0, PAGE),
        expect!["iova:0x0 is reserved: page 0 and FEE0_0000 to FEEF_FFFF are never mapped"],
    );
    check_map_refused(
        |map| at(map, 0xfedf_f000, 2 * PAGE),
        expect!["iova:0xfee00000 is reserved: page 0 and FEE0_0000 to FEEF_FFFF are never mapped"],
    );
    check_map_refused(
        |map| at(map, 0xfeef_f000, PAGE),
        expect!["iova:0xfeeff000 is reserved: page 0 and FEE0_0000 to FEEF_FFFF are never mapped"],
    );
    check_map_refused(
        |map| at(map, (1 << 39) - PAGE, 2 * PAGE),
        expect!["iova:0x8000000fff is beyond the 39-bit address width of the domain"],
    );
    check_map_refused(|map| map.gpa = Gpa::new(0x9000), expect!["gpa:0x9000 is not memory of this owner"]);
    check_map_refused(
        |map| map.permissions = Permissions::empty(),
        expect!["permissions: must allow reading, writing or both"],
    );
}

#[test]
fn the_first_and_the_last_page_of_every_width_translate() {
    for width_bits in [39, 48, 57] {
        let kernel = kernel();
        let mut tenant = Tenant::new(&kernel, 1, width_bits);
        let buffer = tenant.buffer(1);
        for iova in [PAGE, 0xfedf_f000, 0xfef0_0000, (1 << 32) - PAGE, (1 << width_bits) - PAGE] {
            tenant.map(iova, buffer.base(), 1);
            tenant.device_writes(Iova::new(iova), &iova.to_le_bytes()).expect("mapped");
            assert_eq!(
                tenant.cpu_reads(buffer.base(), 8),
                iova.to_le_bytes(),
                "{width_bits} bits, {iova:#x}"
            );
        }
        let all = iova_range(Iova::new(0), u64::MAX - PAGE + 1);
        let pending = tenant.domain.unmap(&kernel, all, NOW).expect("unmap");
        assert_eq!(tenant.finish(pending), 5 * PAGE);
    }
}

#[test]
fn superpages_are_used_where_address_frame_and_length_allow() {
    let kernel = kernel_with(64 << 20, LIMITS);
    let mut tenant = Tenant::new(&kernel, 1, 48);
    let buffer = tenant.buffer(2048);
    let tables = |tenant: &Tenant| tenant.domain.counters().table_bytes / PAGE;
    assert_eq!(tables(&tenant), 1, "the top");
    tenant.map(1 << 30, buffer.base(), 2048);
    assert_eq!(tables(&tenant), 3, "one table of level 3 and one of level 2 for four 2 MiB pages");
    tenant.device_writes(Iova::new((1 << 30) + 5 * PAGE), &[0x77]).expect("mapped");
    assert_eq!(tenant.cpu_reads(Gpa::new(buffer.base().get() + 5 * PAGE), 1), [0x77]);
    let entries = kernel.unit().iotlb_entries();
    assert_eq!(entries.iter().map(|entry| entry.size).collect::<Vec<_>>(), [PageSize::Size2M]);
    // One page off: only the middle of the range is aligned, and then not the frames.
    tenant.map((2 << 30) + PAGE, buffer.base(), 2048);
    assert_eq!(tables(&tenant), 4 + 5, "a table of level 2 and five of level 1");
    assert_eq!(tenant.unmap(1 << 30, 2048), 2048 * PAGE);
    assert!(tenant.device_reads(Iova::new(1 << 30), 1).is_err());
    tenant.device_reads(Iova::new((2 << 30) + PAGE), 1).expect("mapped");
}

#[test]
fn a_1_gib_page_stands_in_the_top_table_of_39_bits() {
    let limits = OwnerLimits { mapped_bytes: 1 << 32, memory_bytes: 1 << 31, ..LIMITS };
    let kernel = kernel_with(5 << 29, limits);
    let mut tenant = Tenant::new(&kernel, 1, 39);
    let buffer = tenant.buffer(1 << 18);
    for _ in 0..2 {
        tenant.map(7 << 30, buffer.base(), 1 << 18);
        assert_eq!(tenant.domain.counters().table_bytes, PAGE, "the top alone");
        tenant.device_writes(Iova::new((7 << 30) + 0x1234_5678), b"far").expect("mapped");
        assert_eq!(tenant.cpu_reads(Gpa::new(buffer.base().get() + 0x1234_5678), 3), b"far");
        assert_eq!(tenant.unmap(7 << 30, 1 << 18), 1 << 30);
        assert!(tenant.device_reads(Iova::new(7 << 30), 1).is_err());
    }
    // The top table stays, however many tables come and go.
    for n in 1..40 {
        tenant.map(n << 30, buffer.base(), 1);
        tenant.unmap(n << 30, 1);
    }
    tenant.map(1 << 30, buffer.base(), 1);
    tenant.device_reads(Iova::new(1 << 30), 1).expect("mapped");
}

#[test]
fn a_page_mapped_where_an_empty_table_stands_translates() {
    let kernel = kernel_with(64 << 20, LIMITS);
    let mut tenant = Tenant::new(&kernel, 1, 48);
    let buffer = tenant.buffer(1024);
    tenant.map(1 << 30, buffer.base(), 1);
    tenant.device_reads(Iova::new(1 << 30), 1).expect("mapped");
    tenant.unmap(1 << 30, 1);
    tenant.map(1 << 30, buffer.base(), 1024);
    for page in [0, 511, 512, 1023] {
        let offset = page * PAGE;
        tenant.device_writes(Iova::new((1 << 30) + offset), &page.to_le_bytes()).expect("mapped");
        assert_eq!(tenant.cpu_reads(Gpa::new(buffer.base().get() + offset), 8), page.to_le_bytes());
    }
}

#[test]
fn a_mapping_of_large_pages_around_a_table_of_small_ones_is_unmapped_whole() {
    let kernel = kernel_with(64 << 20, LIMITS);
    let mut tenant = Tenant::new(&kernel, 1, 48);
    let buffer = tenant.buffer(3 * 512);
    let base = 1 << 30;
    // Leaves an empty leaf table behind over the second of three regions.
    tenant.map(base + (2 << 20), buffer.base(), 1);
    tenant.unmap(base + (2 << 20), 1);
    for all in [false, true] {
        tenant.map(base, buffer.base(), 3 * 512);
        tenant.device_writes(Iova::new(base + (3 << 20)), &[7]).expect("mapped");
        if all {
            let pending = tenant.domain.unmap_all(&kernel, NOW);
            tenant.finish(pending);
        } else {
            assert_eq!(tenant.unmap(base, 3 * 512), 6 << 20);
        }
        assert!(tenant.device_reads(Iova::new(base + (3 << 20)), 1).is_err(), "I1: gone");
    }
    // Nothing is pinned any more, and what is mapped there later translates.
    tenant.map(base + (2 << 20), buffer.base(), 1);
    tenant.device_writes(Iova::new(base + (2 << 20)), &[8]).expect("mapped");
    tenant.unmap(base + (2 << 20), 1);
    tenant.memory.free(&kernel, buffer.base()).expect("every frame was unpinned");
}

/// Row 27 of the attack table: a table page must not be reused while a walk cache points at it.
#[test]
fn i1_i4_tables_come_and_go_without_a_stale_walk() {
    let kernel = kernel();
    let mut tenant = Tenant::new(&kernel, 1, 48);
    let buffer = tenant.buffer(1);
    let start = tenant.domain.counters().table_bytes;
    let mut most = 0;
    for n in 1..200u64 {
        let iova = n << 30;
        tenant.map(iova, buffer.base(), 1);
        tenant.device_writes(Iova::new(iova), &n.to_le_bytes()).expect("mapped");
        tenant.unmap(iova, 1);
        // With a frame used again too early, an old address would lead through a cached table to the page of a new one.
        for old in 1..=n {
            assert!(tenant.device_reads(Iova::new(old << 30), 8).is_err(), "round {n}: {old}");
        }
        tenant.map(iova + PAGE, buffer.base(), 1);
        for old in 1..n {
            let stale = tenant.device_reads(Iova::new((old << 30) + PAGE), 8);
            assert!(stale.is_err(), "round {n}: {old} reaches the mapping of another address");
        }
        tenant.unmap(iova + PAGE, 1);
        most = most.max(tenant.domain.counters().table_bytes);
    }
    assert!(most - start <= 50 * PAGE, "tables are bounded: {} pages", (most - start) / PAGE);
}

#[test]
fn a_map_that_runs_out_of_tables_leaves_nothing_behind() {
    let limits = OwnerLimits { mappings: 10_000, ..LIMITS };
    let mut refusals = 0;
    // A map across a 512 GiB boundary needs two tables at every level but the top: six. Each time one frame more is left.
    for left in 0..=6 {
        let kernel = kernel_with(2 << 20, limits);
        let mut tenant = Tenant::new(&kernel, 1, 48);
        let buffer = tenant.buffer(2);
        let rest = kernel.free_bytes() - left * PAGE;
        let _hoard = tenant.memory.allocate(&kernel, rest).expect("all but what is left");
        let before = (tenant.domain.counters(), held(&kernel, &tenant.account));
        let request = fixed((1 << 39) - PAGE, buffer.base(), 2);
        match tenant.domain.map(&kernel, &tenant.memory, request, NOW) {
            Ok(()) => assert_eq!(left, 6),
            Err(MapError::OutOfMemory(_)) => {
                refusals += 1;
                assert_eq!((tenant.domain.counters(), held(&kernel, &tenant.account)), before, "{left} left");
                assert!(tenant.device_reads(Iova::new((1 << 39) - PAGE), 1).is_err());
                assert_eq!(tenant.memory.free(&kernel, buffer.base()), Ok(buffer), "no pin is left");
            }
            Err(error) => panic!("{left} left: {error}"),
        }
    }
    assert_eq!(refusals, 6);
}

#[test]
fn each_api_removes_only_what_it_mapped() {
    let kernel = kernel();
    let mut tenant = Tenant::new(&kernel, 1, 48);
    let buffer = tenant.buffer(1);
    let dma = tenant.dma_map(buffer, iommu_types::Direction::ToDevice);
    tenant.map(BASE, buffer.base(), 1);
    assert_eq!(tenant.unmap(dma.get(), 1), 0);
    let request = unmap_request(iova_range(Iova::new(BASE), PAGE), iommu_types::Direction::Bidirectional);
    assert!(tenant.domain.dma_unmap(&kernel, request, NOW).is_err());
    let pending = tenant.domain.unmap_all(&kernel, NOW);
    assert_eq!(tenant.finish(pending), 2 * PAGE);
    assert_eq!(tenant.memory.free(&kernel, buffer.base()), Ok(buffer));
}
