//! The DMA API against a scripted server: what is sent, what is believed of the answers, and the typed errors.

mod support;

use guest_sdk::errors::{
    BeyondMask, DmaLimitsError, DmaMapError, DmaSyncError, DmaUnmapError, InvalidField, ModeRefuses,
    NotContiguous, OutsideMapping, RingOverflow, SegmentOverLimit, WrongFunction,
};
use guest_sdk::{
    Direction, DmaAttributes, DmaLimits, DomainId, DomainOptions, Driver, Gpa, GpaRange, Iova,
    IovaAllocation, IovaRange, MapOptions, Protection, SdkError, TransportError, UnmapOptions, errors,
};
use iommu_proto::errors::WireError;
use iommu_proto::model::{CreateDomain, DmaMap, DmaMapSg, DmaSync, DmaUnmap, DmaUnmapSg, SetDmaLimits};
use iommu_proto::pb;
use iommu_types::SyncFor;
use support::{Fake, soon};

fn device() -> iommu_types::DeviceAddress {
    "0000:00:05.0".parse().expect("an address")
}
fn memory(base: u64, size_bytes: u64) -> GpaRange {
    GpaRange::new(Gpa::new(base), size_bytes).expect("a range")
}
fn addresses(base: u64, size_bytes: u64) -> IovaRange {
    IovaRange::new(Iova::new(base), size_bytes).expect("a range")
}

/// The only message of its type that was sent, parsed.
fn sent<W, M>(fake: &Fake) -> M
where
    W: Clone + 'static,
    M: TryFrom<W>,
    M::Error: std::fmt::Debug,
{
    let mut messages = fake.sent::<W>();
    assert_eq!(messages.len(), 1, "sent once");
    M::try_from(messages.remove(0)).expect("what the SDK sends parses")
}

async fn mapped(fake: &Fake, driver: &Driver, options: MapOptions) -> guest_sdk::DmaMapping {
    fake.answer("dma_map", pb::DmaMapResponse { iova: 0x9234 });
    let device = driver.device(device());
    driver.dma_map(&device, memory(0x1234, 100), Direction::ToDevice, options).await.expect("a mapping")
}

#[tokio::test]
async fn attributes_ring_and_burst_travel_with_a_mapping() {
    let skip = MapOptions { attributes: DmaAttributes::SKIP_CPU_SYNC, ring: 3 };
    for (options, within_burst) in
        [(MapOptions::default(), false), (MapOptions::on_ring(255), true), (skip, false), (skip, true)]
    {
        let fake = Fake::default();
        let driver = fake.driver().await;
        let mapping = mapped(&fake, &driver, options).await;
        let map: DmaMap = sent::<pb::DmaMapRequest, _>(&fake);
        assert_eq!(
            (map.range, map.attributes, map.ring),
            (memory(0x1234, 100), options.attributes, options.ring)
        );
        assert_eq!(mapping.attributes(), options.attributes);
        fake.answer("dma_unmap", pb::DmaUnmapResponse {});
        let unmapped = if within_burst { mapping.unmap_within_burst().await } else { mapping.unmap().await };
        unmapped.expect("an unmap");
        let unmap: DmaUnmap = sent::<pb::DmaUnmapRequest, _>(&fake);
        assert_eq!((unmap.range, unmap.direction), (addresses(0x9234, 100), Direction::ToDevice));
        // An unmap has the attributes of its map, unless it is told otherwise.
        assert_eq!((unmap.attributes, unmap.end_of_burst), (options.attributes, !within_burst));
        assert_eq!(driver.leaked_mappings(), 0);
    }
}

#[tokio::test]
async fn an_unmap_may_have_attributes_of_its_own() {
    let fake = Fake::default();
    let driver = fake.driver().await;
    let mapping = mapped(&fake, &driver, MapOptions::default()).await;
    fake.answer("dma_unmap", pb::DmaUnmapResponse {});
    let options = UnmapOptions { attributes: DmaAttributes::SKIP_CPU_SYNC, end_of_burst: false };
    mapping.unmap_with(options).await.expect("an unmap");
    let unmap: DmaUnmap = sent::<pb::DmaUnmapRequest, _>(&fake);
    assert_eq!((unmap.attributes, unmap.end_of_burst), (options.attributes, false));
}

#[tokio::test]
async fn a_resource_is_mapped_as_one() {
    let fake = Fake::default();
    let driver = fake.driver().await;
    fake.answer("dma_map", pb::DmaMapResponse { iova: 0x9000 });
    let device = driver.device(device());
    let registers = memory(0x5000, 4096);
    let mapping =
        driver.dma_map_resource(&device, registers, Direction::Bidirectional).await.expect("mapped");
    let map: DmaMap = sent::<pb::DmaMapRequest, _>(&fake);
    assert_eq!((map.range, map.attributes), (registers, DmaAttributes::RESOURCE));
    mapping.leave_mapped();
}

#[tokio::test]
async fn syncs_name_the_part_and_the_side() {
    let fake = Fake::default();
    let driver = fake.driver().await;
    let mapping = mapped(&fake, &driver, MapOptions::default()).await;
    for _ in 0..4 {
        fake.answer("dma_sync", pb::DmaSyncResponse {});
    }
    mapping.sync_for_cpu().await.expect("a sync");
    mapping.sync_for_device().await.expect("a sync");
    mapping.sync_range_for_cpu(10, 1).await.expect("a sync");
    // That this leaves the mapping is for the server to say.
    mapping.sync_range_for_device(99, 2).await.expect("a sync");
    let syncs: Vec<_> = fake.sent::<pb::DmaSyncRequest>().into_iter().map(DmaSync::try_from).collect();
    let asked: Vec<_> =
        syncs.into_iter().map(|sync| sync.expect("parses")).map(|sync| (sync.range, sync.sync_for)).collect();
    let whole = addresses(0x9234, 100);
    assert_eq!(
        asked,
        [
            (whole, SyncFor::Cpu),
            (whole, SyncFor::Device),
            (addresses(0x923e, 1), SyncFor::Cpu),
            (addresses(0x9297, 2), SyncFor::Device),
        ]
    );
    // What is no range is refused without asking.
    for (offset, size_bytes) in [(u64::MAX, 1), (0, 0)] {
        let refused = mapping.sync_range_for_cpu(offset, size_bytes).await.expect_err("refused");
        assert!(matches!(refused, SdkError::Refused(DmaSyncError::InvalidRange(_))), "{refused:?}");
    }
    assert_eq!(fake.calls("dma_sync").len(), 4);
    mapping.leave_mapped();
}

#[tokio::test]
async fn pieces_are_mapped_as_segments_and_unmapped_by_their_number() {
    let fake = Fake::default();
    let driver = fake.driver().await;
    let device = driver.device(device());
    let pieces = [memory(0x1000, 4096), memory(0x2000, 100), memory(0x8800, 8)];
    fake.answer("dma_map_sg", pb::DmaMapSgResponse { iova: vec![0x7000, 0x9800], size_bytes: vec![4196, 8] });
    let options = MapOptions::on_ring(1);
    let sg = driver.dma_map_sg_with(&device, &pieces, Direction::FromDevice, options).await.expect("mapped");
    assert_eq!(sg.segments(), [addresses(0x7000, 4196), addresses(0x9800, 8)]);
    assert_eq!((sg.pieces(), sg.size_bytes()), (pieces.as_slice(), 4204));
    let map: DmaMapSg = sent::<pb::DmaMapSgRequest, _>(&fake);
    assert_eq!(
        (map.pieces.as_slice(), map.ring, map.direction),
        (pieces.as_slice(), 1, Direction::FromDevice)
    );

    fake.answer("dma_sync", pb::DmaSyncResponse {}).answer("dma_sync", pb::DmaSyncResponse {});
    sg.sync_for_cpu().await.expect("a sync");
    let synced: Vec<_> =
        fake.sent::<pb::DmaSyncRequest>().iter().map(|sync| (sync.iova, sync.size_bytes)).collect();
    assert_eq!(synced, [(0x7000, 4196), (0x9800, 8)]);

    fake.answer("dma_unmap_sg", pb::DmaUnmapSgResponse {});
    sg.unmap_within_burst().await.expect("unmapped");
    let unmap: DmaUnmapSg = sent::<pb::DmaUnmapSgRequest, _>(&fake);
    assert_eq!((unmap.iova, unmap.elements, unmap.end_of_burst), (Iova::new(0x7000), 3, false));
    assert_eq!(driver.leaked_mappings(), 0);

    fake.answer("dma_map_sg", pb::DmaMapSgResponse { iova: vec![0x7000], size_bytes: vec![4096] });
    drop(driver.dma_map_sg(&device, &pieces[..1], Direction::FromDevice).await.expect("mapped"));
    assert_eq!(driver.leaked_mappings(), 1, "dropped without unmap");
}

#[tokio::test]
async fn segments_that_do_not_cover_the_pieces_are_not_believed() {
    let fake = Fake::default();
    let driver = fake.driver().await;
    let device = driver.device(device());
    let pieces = [memory(0x1000, 4096), memory(0x2000, 100)];
    for (iova, size_bytes) in [
        (vec![0x7000], vec![4096]),
        (vec![0x7000, 0x8000, 0x9000], vec![4096, 50, 50]),
        (vec![], vec![]),
        (vec![0x7000, 0x8000], vec![4196]),
        (vec![u64::MAX], vec![4196]),
    ] {
        fake.answer("dma_map_sg", pb::DmaMapSgResponse { iova, size_bytes });
        let refused =
            driver.dma_map_sg(&device, &pieces, Direction::ToDevice).await.expect_err("not believed");
        assert!(matches!(refused, SdkError::Transport(TransportError::BadAnswer(_))), "{refused:?}");
    }
    // The fake allows 8 operations.
    let refused =
        driver.dma_map_sg(&device, &[memory(0, 1); 9], Direction::ToDevice).await.expect_err("refused");
    let limit = errors::LimitReached { limit: "batch_operations_max".to_owned(), allowed: 8 };
    assert_eq!(refused, SdkError::Refused(limit.into()));
}

#[tokio::test]
async fn an_address_that_wraps_is_not_believed() {
    let fake = Fake::default();
    let driver = fake.driver().await;
    fake.answer("dma_map", pb::DmaMapResponse { iova: u64::MAX });
    let device = driver.device(device());
    let refused = driver.dma_map_single(&device, memory(0, 2), Direction::ToDevice).await.expect_err("wraps");
    assert!(matches!(refused, SdkError::Transport(TransportError::BadAnswer(_))), "{refused:?}");
}

#[tokio::test]
async fn limits_are_changed_one_by_one_or_together() {
    let fake = Fake::default();
    let driver = fake.driver().await;
    let device = driver.device(device());
    let answer = DmaLimits { mask_bits: 32, segment_bytes_max: 4096, segment_boundary_mask: 0xffff };
    for _ in 0..5 {
        fake.answer("set_dma_limits", pb::SetDmaLimitsResponse::from(answer));
    }
    assert_eq!(device.set_dma_mask(40).await, Ok(answer));
    assert_eq!(device.set_max_seg_size(1).await, Ok(answer));
    assert_eq!(device.set_seg_boundary(0xfff).await, Ok(answer));
    assert_eq!(device.dma_limits().await, Ok(answer));
    assert_eq!(device.set_dma_limits(DmaLimits::NONE).await, Ok(answer));
    let asked: Vec<_> = fake
        .sent::<pb::SetDmaLimitsRequest>()
        .into_iter()
        .map(|request| SetDmaLimits::try_from(request).expect("parses"))
        .map(|ask| (ask.mask_bits, ask.segment_bytes_max, ask.segment_boundary_mask))
        .collect();
    let all = Some(u64::MAX);
    assert_eq!(
        asked,
        [
            (Some(40), None, None),
            (None, Some(1), None),
            (None, None, Some(0xfff)),
            (None, None, None),
            (Some(64), all, all),
        ]
    );
}

#[tokio::test]
async fn batches_have_attributes_ring_and_burst() {
    let fake = Fake::default();
    let driver = fake.driver().await;
    let stream = driver.dma_stream(&driver.device(device()));
    let options = MapOptions { attributes: DmaAttributes::SKIP_CPU_SYNC, ring: 2 };
    let ticket = stream.map_with(&[memory(0x1000, 64)], Direction::ToDevice, options).await.expect("sent");
    soon("the maps", ticket).await.expect("answered");
    let mappings = [(Iova::new(0x1000_1000), 64)];
    for options in [UnmapOptions::default(), UnmapOptions::WITHIN_BURST] {
        let ticket = stream.unmap_with(&mappings, Direction::ToDevice, options).await.expect("sent");
        soon("the unmaps", ticket).await.expect("answered");
    }
    let batches: Vec<_> =
        fake.sent::<pb::DmaStreamRequest>().into_iter().filter_map(|sent| sent.batch).collect();
    let skip = Some(pb::DmaAttributes { skip_cpu_sync: true, resource: false });
    use pb::dma_stream_request::Batch;
    match batches.as_slice() {
        [Batch::Map(map), Batch::Unmap(ends), Batch::Unmap(goes_on)] => {
            assert_eq!((map.attributes, map.ring), (skip, 2));
            assert_eq!((ends.attributes, ends.end_of_burst), (None, None));
            assert_eq!(goes_on.end_of_burst, Some(false));
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_domain_is_created_with_all_that_was_chosen() {
    let fake = Fake::default();
    let driver = fake.driver().await;
    for protection in Protection::ALL {
        let options = DomainOptions::new(protection)
            .with_allocator(IovaAllocation::Classic)
            .with_width(57)
            .with_sanitizer(true);
        fake.answer("create_domain", pb::CreateDomainResponse { domain_id: 9 });
        let domain = driver.create_domain(options).await.expect("a domain");
        assert_eq!((domain.id(), domain.options()), (DomainId::new(9), options));
        let asked = fake.sent::<pb::CreateDomainRequest>().pop().expect("it was asked for");
        assert_eq!(CreateDomain::try_from(asked).expect("parses").options, options);
    }
}

/// What one of the calls is refused with.
async fn check_refusal<E>(
    method: &'static str,
    fact: impl WireError + Into<E>,
    call: impl AsyncFn(&Driver) -> SdkError<E>,
) where
    E: WireError + PartialEq + Clone,
{
    let fake = Fake::default();
    let driver = fake.driver().await;
    // As an answer of the server and as the enum of the operation.
    let expected: E = fact.into();
    fake.refuse(method, expected.clone());
    assert_eq!(soon("the refusal", call(&driver)).await, SdkError::Refused(expected));
}

async fn refused_map(driver: &Driver) -> SdkError<DmaMapError> {
    let device = driver.device(device());
    driver.dma_map_single(&device, memory(0, 1), Direction::ToDevice).await.expect_err("refused")
}
async fn refused_sg(driver: &Driver) -> SdkError<DmaMapError> {
    let device = driver.device(device());
    driver.dma_map_sg(&device, &[memory(0, 1)], Direction::ToDevice).await.expect_err("refused")
}
async fn refused_unmap(driver: &Driver) -> SdkError<DmaUnmapError> {
    let mapping = driver.dma_map_single(&driver.device(device()), memory(0, 1), Direction::ToDevice).await;
    mapping.expect("mapped").unmap().await.expect_err("refused")
}
async fn refused_sync(driver: &Driver) -> SdkError<DmaSyncError> {
    let mapping = driver.dma_map_single(&driver.device(device()), memory(0, 1), Direction::ToDevice).await;
    let mapping = mapping.expect("mapped");
    let refused = mapping.sync_for_cpu().await.expect_err("refused");
    mapping.leave_mapped();
    refused
}
async fn refused_limits(driver: &Driver) -> SdkError<DmaLimitsError> {
    driver.device(device()).set_dma_mask(11).await.expect_err("refused")
}

#[tokio::test]
async fn every_new_refusal_reaches_the_enum_of_its_operation() {
    let iova = Iova::new(0x9000);
    let mode_refuses = || ModeRefuses { mode: "ring".to_owned(), why: "has no masks".to_owned() };
    check_refusal("dma_map", RingOverflow { ring: 1, slots: 1024 }, refused_map).await;
    check_refusal("dma_map", NotContiguous { gpa: Gpa::new(0x1000) }, refused_map).await;
    check_refusal("dma_map", BeyondMask { iova, mask_bits: 32 }, refused_map).await;
    check_refusal("dma_map", mode_refuses(), refused_map).await;
    check_refusal("dma_map_sg", SegmentOverLimit { size_bytes: 9, allowed_bytes: 8 }, refused_sg).await;
    check_refusal("set_dma_limits", mode_refuses(), refused_limits).await;
    let field = InvalidField { field: "mask_bits".to_owned(), why: "is 11".to_owned() };
    check_refusal("set_dma_limits", field, refused_limits).await;
}

#[tokio::test]
async fn every_new_refusal_of_a_mapping_reaches_the_enum_of_its_operation() {
    let iova = Iova::new(0x9000);
    let wrong =
        || WrongFunction { iova, made_as: "scatter-gather".to_owned(), asked_as: "single".to_owned() };
    let fake = Fake::default();
    let driver = fake.driver().await;
    for _ in 0..3 {
        fake.answer("dma_map", pb::DmaMapResponse { iova: 0x9000 });
    }
    fake.refuse("dma_unmap", wrong());
    assert_eq!(refused_unmap(&driver).await, SdkError::Refused(wrong().into()));
    fake.refuse("dma_sync", wrong());
    assert_eq!(refused_sync(&driver).await, SdkError::Refused(wrong().into()));
    let outside = OutsideMapping { iova, size_bytes: 2 };
    fake.refuse("dma_sync", outside.clone());
    assert_eq!(refused_sync(&driver).await, SdkError::Refused(outside.into()));
}
