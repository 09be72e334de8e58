//! The DMA API: what it maps, what it refuses, what it leaves.

mod fixture;

use expect_test::{Expect, expect};
use fixture::*;
use iommu_kernel::{DmaFunction, DmaMap, DmaUnmap, OwnerLimits};
use iommu_types::errors::{DmaMapError, DmaUnmapError, FreeError, LimitReached, StillMapped};
use iommu_types::{Direction, FaultReason, Gpa, Iova, RequestId};

#[test]
fn a_mapping_keeps_the_offset_in_the_page_and_any_size() {
    let kernel = kernel();
    let mut tenant = Tenant::new(&kernel, 1, 48);
    let buffer = tenant.buffer(600);
    for (offset, size_bytes) in [(0, 1), (0, 4096), (4095, 2), (100, 1500), (1, 513 * PAGE), (0, 600 * PAGE)]
    {
        let range = gpa_range(buffer.base(), offset, size_bytes);
        let iova = tenant.dma_map(range, Direction::Bidirectional);
        assert_eq!(iova.page_offset(), range.base().page_offset());
        tenant.device_writes(iova, &vec![0x5a; size_bytes as usize]).expect("mapped");
        assert!(tenant.cpu_reads(range.base(), size_bytes as usize).iter().all(|byte| *byte == 0x5a));
        tenant.cpu_writes(range.base(), &vec![0; size_bytes as usize]);
        tenant.dma_unmap(iova, size_bytes, Direction::Bidirectional);
    }
    assert_eq!(tenant.domain.counters().mappings, 0);
}

#[test]
fn i2_a_direction_grants_its_permissions_and_no_more() {
    let kernel = kernel();
    let mut tenant = Tenant::new(&kernel, 1, 39);
    let buffer = tenant.buffer(1);
    let reason = |result: Result<(), iommu_types::DmaFault>| result.err().map(|fault| fault.reason);
    for (direction, read, write) in [
        (Direction::Bidirectional, None, None),
        (Direction::ToDevice, None, Some(Ok(FaultReason::WRITE_DENIED))),
        (Direction::FromDevice, Some(Ok(FaultReason::READ_DENIED)), None),
    ] {
        let iova = tenant.dma_map(buffer, direction);
        assert_eq!(reason(tenant.device_reads(iova, 8).map(|_| ())), read, "{direction}");
        assert_eq!(reason(tenant.device_writes(iova, &[0; 8])), write, "{direction}");
        tenant.dma_unmap(iova, PAGE, direction);
        assert_eq!(
            reason(tenant.device_reads(iova, 8).map(|_| ())),
            Some(Ok(FaultReason::READ_DENIED)),
            "after unmap"
        );
    }
}

fn check_unmap_refused(change: impl Fn(&mut DmaUnmap), expected: Expect) {
    let kernel = kernel();
    let mut tenant = Tenant::new(&kernel, 1, 48);
    let buffer = tenant.buffer(2);
    let iova = tenant.dma_map(gpa_range(buffer.base(), 16, 5000), Direction::ToDevice);
    let before = (tenant.domain.counters(), held(&kernel, &tenant.account));
    let mut request = unmap_request(iova_range(iova, 5000), Direction::ToDevice);
    change(&mut request);
    let error = tenant.domain.dma_unmap(&kernel, request, NOW).expect_err("refused");
    expected.assert_eq(&error.to_string());
    assert_eq!((tenant.domain.counters(), held(&kernel, &tenant.account)), before, "nothing changes");
    tenant.device_reads(iova, 5000).expect("still mapped");
    tenant.dma_unmap(iova, 5000, Direction::ToDevice);
}

#[test]
fn an_unmap_is_exact_and_a_refused_one_changes_nothing() {
    let at = |unmap: &mut DmaUnmap, offset: u64, size_bytes: u64| {
        unmap.range = iova_range(Iova::new(unmap.range.base().get() + offset), size_bytes);
    };
    check_unmap_refused(|unmap| at(unmap, 1, 5000), expect!["nothing is mapped at iova:0xffe00011"]);
    check_unmap_refused(|unmap| at(unmap, 4096, 904), expect!["nothing is mapped at iova:0xffe01010"]);
    check_unmap_refused(|unmap| at(unmap, 1 << 30, 5000), expect!["nothing is mapped at iova:0x13fe00010"]);
    check_unmap_refused(
        |unmap| at(unmap, 0, 4999),
        expect!["the mapping at iova:0xffe00010 has 5000 bytes, not 4999"],
    );
    check_unmap_refused(
        |unmap| unmap.direction = Direction::FromDevice,
        expect!["the mapping at iova:0xffe00010 is to-device, not from-device"],
    );
}

#[test]
fn a_batch_answers_each_operation_and_invalidates_once() {
    let kernel = kernel();
    let mut tenant = Tenant::new(&kernel, 1, 48);
    let buffer = tenant.buffer(4);
    let iovas: Vec<Iova> = (0..4)
        .map(|n| tenant.dma_map(gpa_range(buffer.base(), n * PAGE, PAGE), Direction::ToDevice))
        .collect();
    let unmap = |iova: Iova| unmap_request(iova_range(iova, PAGE), Direction::ToDevice);
    let requests = [unmap(iovas[0]), unmap(iovas[0]), unmap(Iova::new(0x1000)), unmap(iovas[3])];
    let invalidations = kernel.unit().counters().invalidations;
    let (results, pending) = tenant.domain.dma_unmap_batch(&kernel, &requests, NOW);
    assert_eq!(kernel.unit().counters().invalidations - invalidations, 1);
    assert_eq!(results.iter().map(Result::is_ok).collect::<Vec<_>>(), [true, false, false, true]);
    assert_eq!(tenant.finish(pending), 2 * PAGE);
    for (iova, is_mapped) in iovas.iter().zip([false, true, true, false]) {
        assert_eq!(tenant.device_reads(*iova, 8).is_ok(), is_mapped, "{iova}");
    }
    let (results, pending) = tenant.domain.dma_unmap_batch(&kernel, &requests[1..3], NOW);
    assert!(results.iter().all(Result::is_err) && pending.undone.is_empty());
    assert_eq!(kernel.unit().counters().invalidations - invalidations, 1, "nothing to invalidate");
    tenant.finish(pending);
}

#[test]
fn a_buffer_may_be_mapped_many_times_and_each_mapping_counts() {
    let kernel = kernel();
    let mut tenant = Tenant::new(&kernel, 1, 48);
    let buffer = tenant.buffer(1);
    let first = tenant.dma_map(buffer, Direction::ToDevice);
    let second = tenant.dma_map(buffer, Direction::FromDevice);
    assert_ne!(first, second);
    let still_mapped = Err(FreeError::StillMapped(StillMapped { gpa: buffer.base() }));
    assert_eq!(tenant.memory.free(&kernel, buffer.base()), still_mapped);
    tenant.dma_unmap(first, PAGE, Direction::ToDevice);
    assert_eq!(tenant.memory.free(&kernel, buffer.base()), still_mapped, "I9: pins add up");
    tenant.dma_unmap(second, PAGE, Direction::FromDevice);
    assert_eq!(tenant.memory.free(&kernel, buffer.base()), Ok(buffer));
}

#[test]
fn i2_memory_of_others_and_memory_of_nobody_is_not_mapped() {
    let kernel = kernel();
    let mut tenant = Tenant::new(&kernel, 1, 48);
    let mut other = Tenant::new(&kernel, 2, 48);
    let mine = tenant.buffer(2);
    let theirs = other.buffer(9);
    let mut check = |gpa: Gpa, size_bytes: u64, expected: Expect| {
        let request = dma_map(gpa_range(gpa, 0, size_bytes), Direction::Bidirectional);
        let before = (tenant.domain.counters(), held(&kernel, &tenant.account));
        let error = tenant.domain.dma_map(&kernel, &tenant.memory, request, NOW).expect_err("refused");
        expected.assert_eq(&error.to_string());
        assert_eq!((tenant.domain.counters(), held(&kernel, &tenant.account)), before);
    };
    check(Gpa::new(0), 1, expect!["gpa:0x0 is not memory of this owner"]);
    check(mine.base(), 2 * PAGE + 1, expect!["gpa:0x3000 is not memory of this owner"]);
    check(theirs.last(), 1, expect!["gpa:0x9fff is not memory of this owner"]);
    check(Gpa::new(u64::MAX), 1, expect!["gpa:0xffffffffffffffff is not memory of this owner"]);
}

#[test]
fn a_coherent_mapping_is_known_as_one() {
    let kernel = kernel();
    let mut tenant = Tenant::new(&kernel, 1, 48);
    let buffer = tenant.buffer(1);
    let request = DmaMap::coherent(buffer, RequestId(7));
    let iova = tenant.domain.dma_map(&kernel, &tenant.memory, request, NOW).expect("mapped");
    let state = tenant.domain.mappings(&kernel, Iova::new(0), 10);
    assert_eq!(state.len(), 1);
    assert_eq!(
        (state[0].range.base(), state[0].gpa, state[0].request_id),
        (iova, buffer.base(), RequestId(7))
    );
    let single = unmap_request(iova_range(iova, PAGE), Direction::Bidirectional);
    let error = tenant.domain.dma_unmap(&kernel, single, NOW).expect_err("made by another function");
    assert!(matches!(error, DmaUnmapError::WrongFunction(_)), "{error:?}");
    let coherent = DmaUnmap { function: DmaFunction::Coherent, ..single };
    let pending = tenant.domain.dma_unmap(&kernel, coherent, NOW).expect("unmapped");
    tenant.finish(pending);
}

#[test]
fn i7_each_limit_of_an_owner_refuses_by_name_and_leaves_nothing() {
    let limits = OwnerLimits { mappings: 2, mapped_bytes: 100 * PAGE, ..LIMITS };
    let check = |limits: OwnerLimits, first_pages: &[u64], refused_pages: u64, expected: (&str, u64)| {
        let kernel = kernel_with(16 << 20, limits);
        let mut tenant = Tenant::new(&kernel, 1, 48);
        let buffer = tenant.buffer(200);
        let refused_bytes = refused_pages * PAGE;
        let next = tenant.dma_map(gpa_range(buffer.base(), 0, refused_bytes), Direction::ToDevice);
        tenant.dma_unmap(next, refused_bytes, Direction::ToDevice);
        let map =
            |pages: &u64| tenant.dma_map(gpa_range(buffer.base(), 0, pages * PAGE), Direction::ToDevice);
        let live: Vec<Iova> = first_pages.iter().map(map).collect();
        let before = (tenant.domain.counters(), held(&kernel, &tenant.account));
        let request = dma_map(gpa_range(buffer.base(), 0, refused_pages * PAGE), Direction::ToDevice);
        let error = tenant.domain.dma_map(&kernel, &tenant.memory, request, NOW).expect_err("refused");
        let (limit, allowed) = expected;
        assert_eq!(error, DmaMapError::LimitReached(LimitReached { limit: limit.to_owned(), allowed }));
        assert_eq!((tenant.domain.counters(), held(&kernel, &tenant.account)), before);
        for (iova, pages) in live.iter().zip(first_pages).rev() {
            tenant.dma_unmap(*iova, pages * PAGE, Direction::ToDevice);
        }
        let again = tenant.dma_map(gpa_range(buffer.base(), 0, refused_bytes), Direction::ToDevice);
        assert_eq!(again, next, "the refused map gave its address back");
    };
    check(limits, &[1, 1], 1, ("mappings_per_owner", 2));
    // Of another size, so that the address of the refused one is the next to be handed out.
    check(limits, &[65], 36, ("mapped_bytes_per_owner", 100 * PAGE));
}
