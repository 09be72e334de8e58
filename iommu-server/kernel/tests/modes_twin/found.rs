//! What the twin found, one claim a test.

use std::sync::Arc;

use iommu_kernel::{DmaFunction, DmaMap, DmaSync, DmaUnmap, DmaUnmapSg, Segment, Tick};
use iommu_types::errors::{DmaMapError, DmaUnmapError};
use iommu_types::{
    BouncePool, Direction, DmaAttributes, DmaLimits, DomainOptions, GpaRange, Iova, Protection, ReportClass,
    RequestId, Rings, SyncFor,
};

use super::fixture::*;
use super::steps::{BOTH, FROM, TO};

const IDENTITY: [Protection; 3] = [Protection::Passthrough, Protection::Shared, Protection::PERSISTENT];

fn tenant(protection: Protection) -> Tenant {
    Tenant::with(&kernel(), 1, DomainOptions::new(protection).with_sanitizer(true))
}

/// A buffer of whole pages; passthrough domains get it into their direct map.
fn buffer(tenant: &mut Tenant, pages: u64) -> GpaRange {
    let buffer = tenant.buffer(pages);
    if tenant.domain.is_passthrough() {
        tenant.domain.open_direct(&tenant.kernel, &tenant.memory, buffer).expect("open");
    }
    buffer
}

fn map_sg(tenant: &mut Tenant, ranges: &[GpaRange], request: DmaMap) -> Result<Vec<Segment>, DmaMapError> {
    let result = tenant.domain.dma_map_sg(&tenant.kernel, &tenant.memory, ranges, request, NOW);
    for pending in tenant.domain.take_evicted() {
        tenant.finish(pending);
    }
    result
}

fn unmap_sg(iova: Iova, elements: u32, direction: Direction) -> DmaUnmapSg {
    DmaUnmapSg {
        iova,
        elements,
        direction,
        request_id: RequestId(9),
        attributes: DmaAttributes::default(),
        end_of_burst: true,
        client: 0,
    }
}

fn reported(tenant: &Tenant) -> Vec<ReportClass> {
    let sanitizer = tenant.domain.sanitizer().expect("it has one");
    sanitizer.drain_reports().iter().map(|report| report.class).collect()
}

fn leave(tenant: Tenant) {
    let (kernel, account) = (Arc::clone(&tenant.kernel), Arc::clone(&tenant.account));
    tenant.leave();
    assert_eq!(held(&kernel, &account).account, [0; 6]);
}

#[test]
fn an_element_of_scatter_gather_is_neither_mapped_nor_unmapped_alone() {
    for protection in Protection::ALL {
        let mut tenant = tenant(protection);
        let buffer = buffer(&mut tenant, 1);
        let function = DmaFunction::ScatterGather;
        let alone = DmaMap { function, ..dma_map(buffer, FROM) };
        let refused = tenant.domain.dma_map(&tenant.kernel, &tenant.memory, alone, NOW);
        assert!(matches!(refused, Err(DmaMapError::InvalidField(_))), "{protection}: {refused:?}");
        let segments = map_sg(&mut tenant, &[buffer], dma_map(buffer, FROM)).expect("mapped");
        let alone = DmaUnmap { function, ..unmap_request(iova_range(segments[0].iova, PAGE), FROM) };
        let refused = tenant.domain.dma_unmap(&tenant.kernel, alone, NOW).expect_err("one of a group");
        assert!(matches!(refused, DmaUnmapError::WrongFunction(_)), "{protection}: {refused:?}");
        let request = unmap_sg(segments[0].iova, 1, FROM);
        let pending = tenant.domain.dma_unmap_sg(&tenant.kernel, request, NOW).expect("whole");
        tenant.finish(pending);
        leave(tenant);
    }
}

#[test]
fn scatter_gather_takes_no_other_mapping_at_its_address_for_its_element() {
    for protection in IDENTITY {
        let mut tenant = tenant(protection);
        let buffer = buffer(&mut tenant, 1);
        let single = tenant.dma_map(buffer, BOTH);
        // The same memory twice, where a buffer is mapped already.
        let segments = map_sg(&mut tenant, &[buffer, buffer], dma_map(buffer, TO)).expect("mapped");
        let request = unmap_sg(segments[0].iova, 2, TO);
        let pending = tenant.domain.dma_unmap_sg(&tenant.kernel, request, NOW).expect("unmapped");
        tenant.finish(pending);
        tenant.device_writes(single, b"still there").expect("mapped");
        tenant.dma_unmap(single, PAGE, BOTH);
        leave(tenant);
    }
}

#[test]
fn a_buffer_is_not_unmapped_as_scatter_gather() {
    for protection in Protection::ALL {
        let mut tenant = tenant(protection);
        let buffer = buffer(&mut tenant, 1);
        let iova = tenant.dma_map(buffer, FROM);
        let refused = tenant.domain.dma_unmap_sg(&tenant.kernel, unmap_sg(iova, 1, FROM), NOW);
        let refused = refused.expect_err("made by another function");
        assert!(matches!(refused, DmaUnmapError::WrongFunction(_)), "{protection}: {refused:?}");
        assert_eq!(reported(&tenant), [ReportClass::WrongFree], "{protection}");
        tenant.dma_unmap(iova, PAGE, FROM);
        leave(tenant);
    }
}

#[test]
fn a_map_that_a_ring_refuses_leaves_its_tail_where_it_was() {
    let mut tenant = tenant(Protection::Ring(Rings { count: 1, slots: 4 }));
    let buffer = buffer(&mut tenant, 3);
    let page = |n: u64| gpa_range(buffer.base(), n * PAGE, PAGE);
    let held = [tenant.dma_map(page(0), FROM), tenant.dma_map(page(1), FROM)];
    // Two slots are free, and three are asked for.
    let refused = map_sg(&mut tenant, &[page(0), page(1), page(2)], dma_map(buffer, FROM));
    assert!(matches!(refused, Err(DmaMapError::RingOverflow(_))), "{refused:?}");
    let third = tenant.dma_map(page(2), FROM);
    tenant.device_writes(third, &[1]).expect("mapped");
    for iova in held.into_iter().chain([third]) {
        tenant.dma_unmap(iova, PAGE, FROM);
    }
    leave(tenant);
}

#[test]
fn elements_wait_in_a_ring_since_they_were_unmapped() {
    let mut tenant = tenant(Protection::RING);
    let buffer = buffer(&mut tenant, 2);
    let page = |n: u64| gpa_range(buffer.base(), n * PAGE, PAGE);
    let segments = map_sg(&mut tenant, &[page(0), page(1)], dma_map(buffer, FROM)).expect("mapped");
    let request = DmaUnmapSg { end_of_burst: false, ..unmap_sg(segments[0].iova, 2, FROM) };
    let pending = tenant.domain.dma_unmap_sg(&tenant.kernel, request, Tick(77)).expect("unmapped");
    tenant.finish(pending);
    let waiting = tenant.domain.waiting().expect("the burst goes on");
    assert_eq!((waiting.unmaps, waiting.since), (2, Tick(77)));
    leave(tenant);
}

#[test]
fn a_map_that_fails_changes_no_byte_of_the_buffers() {
    let mut tenant = tenant(Protection::Bounce(BouncePool { bytes_max: 1 << 20 }));
    let buffer = buffer(&mut tenant, 257);
    tenant.cpu_writes(buffer.base(), &[0xaa; PAGE as usize]);
    let ranges = [gpa_range(buffer.base(), 0, PAGE), gpa_range(buffer.base(), PAGE, 256 * PAGE)];
    // Not copied into its shadow, so nothing of the shadow may be copied back.
    let attributes = DmaAttributes { skip_cpu_sync: true, ..DmaAttributes::default() };
    let refused = map_sg(&mut tenant, &ranges, DmaMap { attributes, ..dma_map(buffer, FROM) });
    assert!(matches!(refused, Err(DmaMapError::LimitReached(_))), "{refused:?}");
    assert_eq!(tenant.cpu_reads(buffer.base(), PAGE as usize), [0xaa; PAGE as usize]);
    leave(tenant);
}

#[test]
fn an_idle_shadow_that_the_device_cannot_address_is_left_alone() {
    let mut tenant = tenant(Protection::BOUNCE);
    let buffer = buffer(&mut tenant, 1);
    let high = tenant.dma_map(buffer, FROM);
    tenant.dma_unmap(high, PAGE, FROM);
    let limits = DmaLimits { mask_bits: 20, ..DmaLimits::NONE };
    assert!(high.get() > limits.last_address(), "the test means something");
    tenant.domain.set_limits(limits).expect("sound");
    let low = tenant.dma_map(buffer, FROM);
    assert!(low.get() <= limits.last_address());
    tenant.dma_unmap(low, PAGE, FROM);
    leave(tenant);
}

#[test]
fn a_sync_means_any_mapping_that_it_fits() {
    for protection in IDENTITY {
        let mut tenant = tenant(protection);
        let buffer = buffer(&mut tenant, 1);
        let inside = gpa_range(buffer.base(), 100, 100);
        let mapped = [(buffer, BOTH), (inside, BOTH), (buffer, TO), (buffer, FROM)];
        for (range, direction) in mapped {
            tenant.dma_map(range, direction);
        }
        let _overlaps = reported(&tenant);
        for (offset, size_bytes, direction, target) in [
            (0, PAGE, TO, SyncFor::Device),
            (0, PAGE, FROM, SyncFor::Cpu),
            (0, PAGE, BOTH, SyncFor::Cpu),
            // Longer than the nearest mapping that covers its address.
            (150, 1000, BOTH, SyncFor::Device),
        ] {
            let range = iova_range(Iova::new(buffer.base().get() + offset), size_bytes);
            let sync = DmaSync { range, direction, target, request_id: RequestId(1) };
            assert_eq!(tenant.domain.dma_sync(&tenant.kernel, sync, NOW), Ok(()), "{protection}: {sync:?}");
        }
        assert_eq!(reported(&tenant), [], "{protection}");
        leave(tenant);
    }
}

#[test]
fn a_segment_is_synced_whole() {
    for protection in [Protection::Strict, Protection::DEFERRED] {
        let mut tenant = tenant(protection);
        let buffer = buffer(&mut tenant, 4);
        let ranges = [gpa_range(buffer.base(), 2 * PAGE, PAGE), gpa_range(buffer.base(), 0, PAGE)];
        let segments = map_sg(&mut tenant, &ranges, dma_map(buffer, FROM)).expect("mapped");
        assert_eq!(segments.len(), 1, "two that meet are one segment");
        let sync = |size_bytes| DmaSync {
            range: iova_range(segments[0].iova, size_bytes),
            direction: FROM,
            target: SyncFor::Cpu,
            request_id: RequestId(1),
        };
        assert_eq!(tenant.domain.dma_sync(&tenant.kernel, sync(2 * PAGE), NOW), Ok(()), "{protection}");
        assert!(tenant.domain.dma_sync(&tenant.kernel, sync(2 * PAGE + 1), NOW).is_err());
        assert_eq!(reported(&tenant), [ReportClass::SyncOutside], "{protection}");
        leave(tenant);
    }
}

#[test]
fn the_sanitizer_knows_the_memory_of_every_element_of_a_segment() {
    let mut tenant = tenant(Protection::Strict);
    let (one, two) = (buffer(&mut tenant, 1), buffer(&mut tenant, 1));
    let segments = map_sg(&mut tenant, &[one, two], dma_map(one, FROM)).expect("mapped");
    assert_eq!(segments.len(), 1, "two that meet are one segment");
    assert!(tenant.domain.released_while_mapped(two, NOW, RequestId(1)));
    let again = tenant.dma_map(two, FROM);
    assert_eq!(reported(&tenant), [ReportClass::ReleasedWhileMapped, ReportClass::Overlap]);
    tenant.dma_unmap(again, PAGE, FROM);
    let pending = tenant.domain.dma_unmap_sg(&tenant.kernel, unmap_sg(segments[0].iova, 2, FROM), NOW);
    tenant.finish(pending.expect("unmapped"));
    assert!(!tenant.domain.released_while_mapped(two, NOW, RequestId(1)));
    leave(tenant);
}

#[test]
fn an_unmap_that_is_refused_asks_nothing_of_the_unit() {
    let mut tenant = tenant(Protection::DEFERRED);
    let buffer = buffer(&mut tenant, 1);
    // So many tables become empty that the next invalidation takes them away.
    for region in 1..=20 {
        tenant.map(region << 21, buffer.base(), 1);
        tenant.unmap(region << 21, 1);
    }
    let before = tenant.domain.counters();
    let request = unmap_request(iova_range(Iova::new(1 << 21), PAGE), FROM);
    assert!(tenant.domain.dma_unmap(&tenant.kernel, request, NOW).is_err());
    assert_eq!(tenant.domain.counters(), before);
    leave(tenant);
}
