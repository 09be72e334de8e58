//! What each protection mode promises, one claim a test: what a device reaches before and after an unmap, what was asked of the unit,
//! and that nothing is lost.

mod fixture;

use fixture::*;
use iommu_kernel::{DmaFunction, DmaMap, DmaSync, DmaUnmap, PendingUnmap, Tick};
use iommu_types::errors::{DmaMapError, DmaSyncError, DmaUnmapError, MapError};
use iommu_types::{
    BouncePool, Deferral, Direction, DmaAttributes, DmaLimits, DomainOptions, FaultReason, GpaRange, Iova,
    IovaAllocation, MappingGranularity, PersistentQuota, Protection, RequestId, Rings, SyncFor,
    WalkCachePolicy,
};

const FROM: Direction = Direction::FromDevice;
const TO: Direction = Direction::ToDevice;
const BOTH: Direction = Direction::Bidirectional;

fn tenant(protection: Protection) -> Tenant {
    tenant_with(DomainOptions::new(protection))
}

fn tenant_with(options: DomainOptions) -> Tenant {
    Tenant::with(&kernel(), 1, options)
}

/// A buffer of whole pages; passthrough domains get it into their direct map.
fn buffer(tenant: &mut Tenant, pages: u64) -> GpaRange {
    let buffer = tenant.buffer(pages);
    if tenant.domain.is_passthrough() {
        tenant.domain.open_direct(&tenant.kernel, &tenant.memory, buffer).expect("open");
    }
    buffer
}

fn settle_evicted(tenant: &mut Tenant) {
    for pending in tenant.domain.take_evicted() {
        tenant.finish(pending);
    }
}

fn unmap(tenant: &mut Tenant, iova: Iova, size_bytes: u64, direction: Direction, now: Tick) -> PendingUnmap {
    let request = unmap_request(iova_range(iova, size_bytes), direction);
    tenant.domain.dma_unmap(&tenant.kernel, request, now).expect("unmapped")
}

fn reason(refused: Result<(), iommu_types::DmaFault>) -> Option<FaultReason> {
    refused.err().map(|fault| fault.reason.expect("refused by translation"))
}

/// Tears down and checks that everything is back.
fn leave(tenant: Tenant) {
    let (kernel, account) = (std::sync::Arc::clone(&tenant.kernel), std::sync::Arc::clone(&tenant.account));
    tenant.leave();
    let left = held(&kernel, &account);
    assert_eq!(left.account, [0; 6], "{left:?}");
}

/// The lecture's attack: the device writes into a buffer right after its unmap. What it then finds in memory, and what was recorded.
fn check_after_unmap(options: DomainOptions, lands: bool, recorded: Option<FaultReason>) {
    let mut tenant = tenant_with(options);
    let buffer = buffer(&mut tenant, 1);
    let iova = tenant.dma_map(buffer, FROM);
    tenant.device_writes(iova, b"before").expect("mapped");
    tenant.dma_unmap(iova, PAGE, FROM);
    assert_eq!(tenant.cpu_reads(buffer.base(), 6), b"before", "{options:?}");
    let refused = reason(tenant.device_writes(iova, b"after!"));
    assert_eq!(refused, recorded, "{options:?}");
    let expected: &[u8] = if lands { b"after!" } else { b"before" };
    assert_eq!(tenant.cpu_reads(buffer.base(), 6), expected, "{options:?}");
    leave(tenant);
}

#[test]
fn a_write_right_after_unmap_ends_as_the_mode_says() {
    use MappingGranularity::Byte;
    let write_denied = Some(FaultReason::WRITE_DENIED);
    for (protection, lands, recorded) in [
        (Protection::Passthrough, true, None),
        (Protection::Strict, false, write_denied),
        (Protection::DEFERRED, true, None),
        (Protection::Shared, false, write_denied),
        (Protection::PERSISTENT, true, None),
        (Protection::BOUNCE, false, None),
        (Protection::RING, false, Some(FaultReason::RING_SLOT_INVALID)),
    ] {
        let options = DomainOptions::new(protection);
        check_after_unmap(options, lands, recorded);
        check_after_unmap(options.with_allocator(IovaAllocation::Classic), lands, recorded);
        if options.with_granularity(Byte).check().is_ok() {
            check_after_unmap(options.with_granularity(Byte), lands, recorded);
        }
    }
}

/// How far around a mapping of 100 bytes at offset 200 the device gets.
fn check_neighbours(options: DomainOptions, inside_page: Option<FaultReason>) {
    let mut tenant = tenant_with(options);
    let buffer = buffer(&mut tenant, 1);
    let mapped = gpa_range(buffer.base(), 200, 100);
    let iova = tenant.dma_map(mapped, FROM);
    tenant.device_writes(iova, &[7; 100]).expect("all of the mapping");
    let at = |offset: u64| Iova::new(iova.get() + offset);
    assert_eq!(reason(tenant.device_writes(at(100), &[8])), inside_page, "{options:?}: behind it");
    assert_eq!(reason(tenant.device_writes(at(99), &[8, 8])), inside_page, "{options:?}: over its end");
    let page = tenant.cpu_reads(buffer.base(), PAGE as usize);
    assert_eq!(page[200..300], [[7; 99].as_slice(), &[if inside_page.is_some() { 7 } else { 8 }]].concat());
    leave(tenant);
}

#[test]
fn byte_granularity_opens_exactly_what_is_mapped() {
    use MappingGranularity::{Byte, Page};
    let denied = Some(FaultReason::BYTES_DENIED);
    for (protection, granularity, inside_page) in [
        (Protection::Strict, Page, None),
        (Protection::Strict, Byte, denied),
        (Protection::DEFERRED, Byte, denied),
        (Protection::Shared, Page, None),
        (Protection::Shared, Byte, denied),
        (Protection::PERSISTENT, Byte, denied),
        (Protection::RING, Byte, Some(FaultReason::RING_BEYOND_SLOT)),
    ] {
        check_neighbours(DomainOptions::new(protection).with_granularity(granularity), inside_page);
    }
}

#[test]
fn i9_a_deferred_unmap_gives_nothing_back_before_its_flush() {
    let options = Protection::Deferred(Deferral { batch: 4, interval_ms: 10 });
    let mut tenant = tenant(options);
    let kernel = std::sync::Arc::clone(&tenant.kernel);
    let buffer = buffer(&mut tenant, 8);
    let page = |n: u64| gpa_range(buffer.base(), n * PAGE, PAGE);
    let mut gone = Vec::new();
    let before = tenant.domain.counters();
    for n in 0..3 {
        let iova = tenant.dma_map(page(n), FROM);
        assert!(!gone.contains(&iova), "an address was used again before its flush");
        tenant.device_writes(iova, &[1]).expect("mapped");
        let pending = unmap(&mut tenant, iova, PAGE, FROM, Tick(1000 + n));
        tenant.finish(pending);
        gone.push(iova);
        tenant.device_writes(iova, &[2]).expect("the stale translation is served");
        let waiting = tenant.domain.waiting().expect("something waits");
        assert_eq!((waiting.unmaps, waiting.since), (n + 1, Tick(1000)));
    }
    let error = tenant.memory.free(&kernel, buffer.base()).expect_err("pinned until the flush");
    assert!(matches!(error, iommu_types::errors::FreeError::StillMapped(_)), "{error:?}");
    assert_eq!(tenant.domain.flush_at(), Some(Tick(11_000)));
    assert_eq!(tenant.domain.counters().invalidations, before.invalidations, "nothing was invalidated");
    // The fourth fills the batch.
    let last = tenant.dma_map(page(3), FROM);
    let pending = unmap(&mut tenant, last, PAGE, FROM, Tick(2000));
    tenant.finish(pending);
    let counters = tenant.domain.counters();
    assert_eq!((counters.invalidations, counters.flushes), (before.invalidations + 1, 1));
    assert_eq!((tenant.domain.waiting(), tenant.domain.flush_at()), (None, None));
    for iova in gone {
        assert_eq!(reason(tenant.device_writes(iova, &[3])), Some(FaultReason::WRITE_DENIED));
    }
    tenant.memory.free(&kernel, buffer.base()).expect("nothing is pinned any more");
    leave(tenant);
}

#[test]
fn a_flush_that_is_due_empties_the_queue() {
    let mut tenant = tenant(Protection::DEFERRED);
    let buffer = buffer(&mut tenant, 1);
    let iova = tenant.dma_map(buffer, FROM);
    tenant.device_writes(iova, &[1]).expect("mapped");
    let pending = unmap(&mut tenant, iova, PAGE, FROM, Tick(5));
    tenant.finish(pending);
    let pending = tenant.domain.flush(&tenant.kernel);
    tenant.finish(pending);
    assert_eq!(reason(tenant.device_writes(iova, &[2])), Some(FaultReason::WRITE_DENIED));
    assert_eq!(tenant.domain.waiting(), None);
    leave(tenant);
}

#[test]
fn a_shared_page_stays_until_its_last_user_leaves() {
    let mut tenant = tenant(Protection::Shared);
    let buffer = buffer(&mut tenant, 1);
    let (first, second) = (gpa_range(buffer.base(), 0, 100), gpa_range(buffer.base(), 2000, 100));
    let one = tenant.dma_map(first, TO);
    let two = tenant.dma_map(second, FROM);
    let before = tenant.domain.counters().invalidations;
    tenant.dma_unmap(one, 100, TO);
    assert_eq!(tenant.domain.counters().invalidations, before, "the page still has a user");
    tenant.device_writes(two, &[1; 100]).expect("mapped by the second");
    tenant.dma_unmap(two, 100, FROM);
    assert_eq!(tenant.domain.counters().invalidations, before + 1);
    assert_eq!(reason(tenant.device_writes(two, &[2])), Some(FaultReason::WRITE_DENIED));
    leave(tenant);
}

#[test]
fn a_persistent_page_is_used_again_until_the_quota_evicts_it() {
    let mut tenant = tenant(Protection::Persistent(PersistentQuota { pages_max: 2 }));
    let buffer = buffer(&mut tenant, 4);
    let page = |n: u64| gpa_range(buffer.base(), n * PAGE, PAGE);
    for n in [0, 1, 0, 1] {
        let iova = tenant.dma_map(page(n), FROM);
        tenant.dma_unmap(iova, PAGE, FROM);
    }
    let counters = tenant.domain.counters();
    assert_eq!((counters.reused_pages, counters.evictions, counters.invalidations), (2, 0, 0));
    assert_eq!(counters.idle_pages, 2);
    // A third page: the one longest idle goes.
    let third = tenant.dma_map(page(2), FROM);
    settle_evicted(&mut tenant);
    assert_eq!(tenant.domain.counters().evictions, 1);
    let iova = |n: u64| Iova::new(page(n).base().get());
    assert_eq!(reason(tenant.device_writes(iova(0), &[1])), Some(FaultReason::WRITE_DENIED));
    tenant.device_writes(iova(1), &[1]).expect("kept");
    // With both in use there is no room.
    let second = tenant.dma_map(page(1), FROM);
    let refused = tenant.domain.dma_map(&tenant.kernel, &tenant.memory, dma_map(page(3), FROM), NOW);
    let limit = "persistent_pages".to_owned();
    assert_eq!(refused, Err(DmaMapError::from(iommu_types::errors::LimitReached { limit, allowed: 2 })));
    tenant.dma_unmap(second, PAGE, FROM);
    tenant.dma_unmap(third, PAGE, FROM);
    let kernel = std::sync::Arc::clone(&tenant.kernel);
    assert!(tenant.memory.free(&kernel, buffer.base()).is_err(), "idle pages are pinned");
    let pending = tenant.domain.let_go(&kernel, buffer);
    tenant.finish(pending);
    tenant.memory.free(&kernel, buffer.base()).expect("let go");
    leave(tenant);
}

#[test]
fn a_bounced_buffer_is_never_seen_by_the_device() {
    let mut tenant = tenant(Protection::BOUNCE);
    let buffer = buffer(&mut tenant, 2);
    tenant.cpu_writes(buffer.base(), &[0xaa; 2 * PAGE as usize]);
    let mapped = gpa_range(buffer.base(), 4000, 200);
    let iova = tenant.dma_map(mapped, BOTH);
    assert_eq!(iova.page_offset(), 4000, "the offset in the page is kept");
    assert_eq!(tenant.device_reads(iova, 200).expect("mapped"), [0xaa; 200]);
    let before = Iova::new(iova.get() - 1000);
    assert_eq!(tenant.device_reads(before, 1000).expect("slack"), [0; 1000], "slack is zeroed");
    tenant.device_writes(Iova::new(iova.get() + 10), &[0xbb; 50]).expect("mapped");
    assert_eq!(tenant.cpu_reads(mapped.base(), 200), [0xaa; 200], "nothing is copied before the unmap");
    let sync = DmaSync {
        range: iova_range(Iova::new(iova.get() + 10), 20),
        direction: BOTH,
        target: SyncFor::Cpu,
        request_id: RequestId(1),
    };
    tenant.domain.dma_sync(&tenant.kernel, sync, NOW).expect("synced");
    let now = tenant.cpu_reads(mapped.base(), 200);
    assert_eq!((now[9], now[10], now[29], now[30]), (0xaa, 0xbb, 0xbb, 0xaa), "only what was synced");
    let invalidations = tenant.domain.counters().invalidations;
    tenant.dma_unmap(iova, 200, BOTH);
    assert_eq!(tenant.domain.counters().invalidations, invalidations, "nothing is invalidated");
    let after = tenant.cpu_reads(buffer.base(), 2 * PAGE as usize);
    assert_eq!((after[4009], after[4010], after[4059], after[4060]), (0xaa, 0xbb, 0xbb, 0xaa));
    // The next mapping gets the same shadow, and the device finds nothing of the one before in it.
    let next = tenant.dma_map(gpa_range(buffer.base(), 0, 5000), BOTH);
    assert_eq!(next.page_number(), iova.page_number());
    let shadow = tenant.device_reads(next.page_base(), 2 * PAGE as usize).expect("the shadow");
    assert_eq!(shadow[5000..], [0; 2 * PAGE as usize - 5000]);
    tenant.dma_unmap(next, 5000, BOTH);
    leave(tenant);
}

#[test]
fn the_pool_of_shadows_has_a_bound_and_makes_room_by_itself() {
    let mut tenant = tenant(Protection::Bounce(BouncePool { bytes_max: 1 << 20 }));
    let buffer = buffer(&mut tenant, 300);
    let whole = gpa_range(buffer.base(), 0, 256 * PAGE);
    let first = tenant.dma_map(whole, TO);
    let small = dma_map(gpa_range(buffer.base(), 257 * PAGE, 10), TO);
    let refused = tenant.domain.dma_map(&tenant.kernel, &tenant.memory, small, NOW);
    let limit = "bounce_bytes".to_owned();
    assert_eq!(refused, Err(iommu_types::errors::LimitReached { limit, allowed: 1 << 20 }.into()));
    tenant.dma_unmap(first, 256 * PAGE, TO);
    let second = tenant.dma_map(small.range, TO);
    settle_evicted(&mut tenant);
    assert_eq!(tenant.domain.counters().shadow_bytes, PAGE, "the large one had to go");
    assert_eq!(reason(tenant.device_reads(first, 1).map(|_| ())), Some(FaultReason::READ_DENIED));
    tenant.dma_unmap(second, 10, TO);
    leave(tenant);
}

#[test]
fn a_resource_is_mapped_as_it_is_in_a_bounce_domain() {
    let mut tenant = tenant(Protection::BOUNCE);
    let buffer = buffer(&mut tenant, 1);
    let attributes = DmaAttributes { resource: true, ..DmaAttributes::default() };
    let request = DmaMap { attributes, ..dma_map(buffer, BOTH) };
    let iova = tenant.domain.dma_map(&tenant.kernel, &tenant.memory, request, NOW).expect("mapped");
    tenant.device_writes(iova, b"direct").expect("mapped");
    assert_eq!(tenant.cpu_reads(buffer.base(), 6), b"direct");
    tenant.dma_unmap(iova, PAGE, BOTH);
    assert_eq!(reason(tenant.device_writes(iova, &[1])), Some(FaultReason::WRITE_DENIED));
    leave(tenant);
}

#[test]
fn a_direct_map_follows_the_memory_of_its_owner() {
    let mut tenant = tenant(Protection::Passthrough);
    let kernel = std::sync::Arc::clone(&tenant.kernel);
    let mine = buffer(&mut tenant, 3);
    let iova = Iova::new(mine.base().get());
    tenant.device_writes(iova, b"open").expect("all memory is open");
    let mapped = tenant.dma_map(gpa_range(mine.base(), 5, 10), TO);
    assert_eq!(mapped.get(), mine.base().get() + 5);
    assert!(tenant.domain.uses(&kernel, mine));
    tenant.dma_unmap(mapped, 10, TO);
    assert!(!tenant.domain.uses(&kernel, mine));
    let pending = tenant.domain.let_go(&kernel, mine);
    tenant.finish(pending);
    tenant.memory.free(&kernel, mine.base()).expect("closed");
    assert_eq!(reason(tenant.device_writes(iova, b"shut")), Some(FaultReason::WRITE_DENIED));
    leave(tenant);
}

#[test]
fn a_ring_is_invalidated_once_at_the_end_of_a_burst() {
    let mut tenant = tenant(Protection::Ring(Rings { count: 2, slots: 16 }));
    let buffer = buffer(&mut tenant, 16);
    let page = |n: u64| gpa_range(buffer.base(), n * PAGE, PAGE);
    let iovas: Vec<_> = (0..8).map(|n| tenant.dma_map(page(n), FROM)).collect();
    for iova in &iovas {
        tenant.device_writes(*iova, &[1]).expect("mapped");
    }
    let before = tenant.domain.counters().invalidations;
    for (n, iova) in iovas.iter().enumerate() {
        let request = DmaUnmap { end_of_burst: n == 7, ..unmap_request(iova_range(*iova, PAGE), FROM) };
        let pending = tenant.domain.dma_unmap(&tenant.kernel, request, NOW).expect("unmapped");
        tenant.finish(pending);
        if n < 7 {
            assert_eq!(tenant.domain.waiting().map(|waiting| waiting.unmaps), Some(n as u64 + 1));
        }
    }
    assert_eq!(tenant.domain.counters().invalidations, before + 1);
    assert_eq!(tenant.domain.waiting(), None);
    for iova in iovas {
        assert_eq!(reason(tenant.device_writes(iova, &[2])), Some(FaultReason::RING_SLOT_INVALID));
    }
    leave(tenant);
}

/// A device that is being detached from a ring domain is on no list of the VT-d unit, so the domain's own drains wait for it.
#[test]
fn i1_i9_a_ring_domain_waits_for_a_source_that_is_being_detached() {
    use iommu_hardware::vtd::Request;
    use iommu_types::{Access, AddressType};
    for destroys in [false, true] {
        let mut tenant = tenant(Protection::Ring(Rings { count: 1, slots: 4 }));
        let kernel = std::sync::Arc::clone(&tenant.kernel);
        let buffer = buffer(&mut tenant, 1);
        let iova = tenant.dma_map(buffer, FROM);
        let Tenant { mut domain, source, mut port, .. } = tenant;
        let mut burst = port.burst();
        let (access, address_type) = (Access::Write, AddressType::Untranslated);
        let request = Request { iova, size_bytes: 4, access, pasid: None, address_type };
        burst.translate(request, |_| ()).expect("mapped");
        // The device is in its epoch; nobody awaits the detach yet.
        let detach = kernel.detach(source, &mut domain);
        let pending = if destroys {
            kernel.destroy_domain(domain).take_drain()
        } else {
            let request = unmap_request(iova_range(iova, PAGE), FROM);
            domain.dma_unmap(&kernel, request, NOW).expect("unmapped").split().0
        };
        let pending = pending.try_complete().expect_err("the device may still use the slot");
        drop(burst);
        assert!(pending.try_complete().is_ok());
        assert!(detach.try_complete().is_ok());
    }
}

#[test]
fn a_ring_never_overwrites_a_slot_that_is_mapped_or_not_yet_invalidated() {
    let mut tenant = tenant(Protection::Ring(Rings { count: 1, slots: 2 }));
    let buffer = buffer(&mut tenant, 3);
    let page = |n: u64| gpa_range(buffer.base(), n * PAGE, PAGE);
    let first = tenant.dma_map(page(0), FROM);
    let second = tenant.dma_map(page(1), FROM);
    let overflow = Err(DmaMapError::from(iommu_types::errors::RingOverflow { ring: 0, slots: 2 }));
    let third = dma_map(page(2), FROM);
    let map = |tenant: &mut Tenant| tenant.domain.dma_map(&tenant.kernel, &tenant.memory, third, NOW);
    assert_eq!(map(&mut tenant), overflow, "both are mapped");
    // A hole further on does not help: the tail slot is still valid.
    tenant.dma_unmap(second, PAGE, FROM);
    assert_eq!(map(&mut tenant), overflow, "the tail slot is mapped");
    let request = DmaUnmap { end_of_burst: false, ..unmap_request(iova_range(first, PAGE), FROM) };
    let pending = tenant.domain.dma_unmap(&tenant.kernel, request, NOW).expect("unmapped");
    tenant.finish(pending);
    assert_eq!(map(&mut tenant), overflow, "the tail slot waits for the end of the burst");
    let pending = tenant.domain.flush(&tenant.kernel);
    tenant.finish(pending);
    let third = map(&mut tenant).expect("free");
    tenant.device_writes(third, &[1]).expect("mapped");
    tenant.dma_unmap(third, PAGE, FROM);
    leave(tenant);
}

#[test]
fn a_ring_domain_says_what_it_does_not_take() {
    let mut tenant = tenant(Protection::Ring(Rings { count: 2, slots: 4 }));
    let buffer = buffer(&mut tenant, 1);
    let request = DmaMap { ring: 2, ..dma_map(buffer, FROM) };
    let error =
        tenant.domain.dma_map(&tenant.kernel, &tenant.memory, request, NOW).expect_err("no such ring");
    assert!(matches!(error, DmaMapError::InvalidField(ref field) if field.field == "ring"), "{error:?}");
    let error = tenant.domain.map(&tenant.kernel, &tenant.memory, fixed(1 << 30, buffer.base(), 1), NOW);
    assert!(matches!(error, Err(MapError::ModeRefuses(_))), "{error:?}");
    let limits = DmaLimits { mask_bits: 32, ..DmaLimits::default() };
    assert!(tenant.domain.set_limits(limits).is_err());
    let coherent = DmaMap::coherent(buffer, RequestId(3));
    let iova =
        tenant.domain.dma_map(&tenant.kernel, &tenant.memory, coherent, NOW).expect("a ring of its own");
    tenant.device_writes(iova, &[1]).expect("mapped");
    let request = DmaUnmap { function: DmaFunction::Coherent, ..unmap_request(iova_range(iova, PAGE), BOTH) };
    let pending = tenant.domain.dma_unmap(&tenant.kernel, request, NOW).expect("unmapped");
    tenant.finish(pending);
    leave(tenant);
}

#[test]
fn scatter_gather_merges_what_meets_and_is_unmapped_whole() {
    use iommu_kernel::DmaUnmapSg;
    for options in Protection::ALL.map(DomainOptions::new) {
        let mut tenant = tenant_with(options);
        let buffer = buffer(&mut tenant, 8);
        // Two that meet at a page boundary, one apart.
        let ranges = [
            gpa_range(buffer.base(), 100, PAGE - 100),
            gpa_range(buffer.base(), 4 * PAGE, 2 * PAGE),
            gpa_range(buffer.base(), 7 * PAGE + 5, 50),
        ];
        let request = dma_map(buffer, BOTH);
        let mapped = tenant.domain.dma_map_sg(&tenant.kernel, &tenant.memory, &ranges, request, NOW);
        let segments = mapped.expect("mapped");
        let merges = matches!(options.protection, Protection::Strict | Protection::Deferred(_));
        assert_eq!(segments.len(), if merges { 2 } else { 3 }, "{options:?}: {segments:?}");
        // The device sees the elements one after the other.
        for segment in &segments {
            let bytes: Vec<u8> = (0..segment.size_bytes).map(|n| (n % 251) as u8).collect();
            tenant.device_writes(segment.iova, &bytes).expect("a segment is mapped");
        }
        let single = unmap_request(iova_range(segments[0].iova, PAGE - 100), BOTH);
        let error = tenant.domain.dma_unmap(&tenant.kernel, single, NOW).expect_err("an element");
        assert!(matches!(error, DmaUnmapError::WrongFunction(_)), "{options:?}: {error:?}");
        let request = DmaUnmapSg {
            iova: segments[0].iova,
            elements: 3,
            direction: BOTH,
            request_id: RequestId(9),
            attributes: DmaAttributes::default(),
            end_of_burst: true,
            client: 0,
        };
        let wrong = DmaUnmapSg { elements: 2, ..request };
        assert!(tenant.domain.dma_unmap_sg(&tenant.kernel, wrong, NOW).is_err());
        let pending = tenant.domain.dma_unmap_sg(&tenant.kernel, request, NOW).expect("unmapped");
        tenant.finish(pending);
        let first = tenant.cpu_reads(ranges[0].base(), 4);
        assert_eq!(first, [0, 1, 2, 3], "{options:?}");
        assert_eq!(tenant.domain.counters().mappings, open_mappings(&tenant), "{options:?}");
        leave(tenant);
    }
}

/// What stays mapped without anybody's asking: the direct map, shadows.
fn open_mappings(tenant: &Tenant) -> u64 {
    match tenant.domain.protection() {
        Protection::Passthrough => 1,
        // One for each element: their sizes are of three classes.
        Protection::Bounce(_) => 3,
        _ => 0,
    }
}

#[test]
fn segments_keep_the_limits_of_the_device() {
    let mut tenant = tenant(Protection::Strict);
    let buffer = buffer(&mut tenant, 16);
    let page = |n: u64, pages: u64| gpa_range(buffer.base(), n * PAGE, pages * PAGE);
    let limits =
        DmaLimits { segment_bytes_max: 2 * PAGE, segment_boundary_mask: 4 * PAGE - 1, mask_bits: 32 };
    tenant.domain.set_limits(limits).expect("sound");
    let ranges = [page(0, 1), page(1, 1), page(2, 1), page(3, 2), page(5, 1)];
    let request = dma_map(buffer, TO);
    let segments =
        tenant.domain.dma_map_sg(&tenant.kernel, &tenant.memory, &ranges, request, NOW).expect("mapped");
    for segment in &segments {
        let last = segment.iova.get() + segment.size_bytes - 1;
        assert!(segment.size_bytes <= 2 * PAGE, "{segments:?}");
        assert_eq!(segment.iova.get() & !(4 * PAGE - 1), last & !(4 * PAGE - 1), "{segments:?}");
        assert!(last <= u64::from(u32::MAX));
    }
    assert_eq!(segments.iter().map(|segment| segment.size_bytes).sum::<u64>(), 6 * PAGE);
    let long = tenant.domain.dma_map(&tenant.kernel, &tenant.memory, dma_map(page(0, 3), TO), NOW);
    assert!(matches!(long, Err(DmaMapError::SegmentOverLimit(_))), "{long:?}");
    leave(tenant);
}

#[test]
fn a_sync_is_checked_in_every_mode() {
    for options in Protection::ALL.map(DomainOptions::new) {
        let mut tenant = tenant_with(options);
        let buffer = buffer(&mut tenant, 2);
        let iova = tenant.dma_map(gpa_range(buffer.base(), 10, 5000), FROM);
        let sync = |offset: u64, size_bytes: u64, direction: Direction| DmaSync {
            range: iova_range(Iova::new(iova.get() + offset), size_bytes),
            direction,
            target: SyncFor::Cpu,
            request_id: RequestId(1),
        };
        let mut ask = |request| tenant.domain.dma_sync(&tenant.kernel, request, NOW);
        assert_eq!(ask(sync(4999, 1, FROM)), Ok(()), "{options:?}");
        assert!(matches!(ask(sync(4999, 2, FROM)), Err(DmaSyncError::OutsideMapping(_))), "{options:?}");
        assert!(matches!(ask(sync(0, 1, TO)), Err(DmaSyncError::DirectionMismatch(_))), "{options:?}");
        assert!(matches!(ask(sync(1 << 40, 1, FROM)), Err(DmaSyncError::NotMapped(_))), "{options:?}");
        leave(tenant);
    }
}

#[test]
fn cached_tables_are_forgotten_as_the_policy_says() {
    for (policy, expected_hits) in [(WalkCachePolicy::OnReclaim, 1), (WalkCachePolicy::OnEveryUnmap, 0)] {
        let mut tenant = tenant_with(DomainOptions::new(Protection::Strict).with_walk_cache(policy));
        let buffer = buffer(&mut tenant, 2);
        let first = tenant.dma_map(gpa_range(buffer.base(), 0, PAGE), FROM);
        tenant.device_writes(first, &[1]).expect("mapped");
        tenant.dma_unmap(first, PAGE, FROM);
        let second = tenant.dma_map(gpa_range(buffer.base(), PAGE, PAGE), FROM);
        let before = tenant.kernel.unit().counters().paging_structure_cache.hits;
        tenant.device_writes(second, &[1]).expect("mapped");
        let after = tenant.kernel.unit().counters().paging_structure_cache.hits;
        assert_eq!(after - before, expected_hits, "{policy:?}");
        leave(tenant);
    }
}
