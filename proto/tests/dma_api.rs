//! The DMA API on the wire: attributes, rings, bursts, scatter-gather, sync and limits arrive, and what is wrong is named.

mod wire;

use expect_test::{Expect, expect};
use iommu_proto::limits::BATCH_OPERATIONS_MAX;
use iommu_proto::model::*;
use iommu_proto::pb;
use iommu_types::errors::InvalidField;
use iommu_types::{Direction, DmaAttributes, DmaLimits, Gpa, GpaRange, Iova, IovaRange, SyncFor};
use wire::{check, device, header, wrong};

const DIRECTIONS: [Direction; 3] = [Direction::Bidirectional, Direction::ToDevice, Direction::FromDevice];

fn every_attribute() -> impl Iterator<Item = DmaAttributes> {
    (0..4).map(|bits| DmaAttributes { skip_cpu_sync: bits & 1 != 0, resource: bits & 2 != 0 })
}
fn memory(base: u64, size_bytes: u64) -> GpaRange {
    GpaRange::new(Gpa::new(base), size_bytes).expect("a range")
}
fn addresses(base: u64, size_bytes: u64) -> IovaRange {
    IovaRange::new(Iova::new(base), size_bytes).expect("a range")
}

#[test]
fn maps_and_unmaps_arrive_as_they_are_sent() {
    let (header, device, iova) = (header(), device(), Iova::new(0x5010));
    for direction in DIRECTIONS {
        for attributes in every_attribute() {
            for (ring, end_of_burst) in [(0, true), (255, false), (u16::MAX, true)] {
                let range = memory(0x1234, 77);
                check::<pb::DmaMapRequest, _>(DmaMap { header, device, range, direction, attributes, ring });
                let pieces = vec![memory(0x1234, 1), memory(u64::MAX, 1), memory(0, u64::MAX)];
                let sg = DmaMapSg { header, device, pieces, direction, attributes, ring };
                check::<pb::DmaMapSgRequest, _>(sg);
                let range = addresses(u64::MAX, 1);
                let unmap = DmaUnmap { header, device, range, direction, attributes, end_of_burst };
                check::<pb::DmaUnmapRequest, _>(unmap);
                let elements = BATCH_OPERATIONS_MAX;
                let sg = DmaUnmapSg { header, device, iova, elements, direction, attributes, end_of_burst };
                check::<pb::DmaUnmapSgRequest, _>(sg);
            }
        }
        for sync_for in [SyncFor::Cpu, SyncFor::Device] {
            let range = addresses(0x5010, 3);
            check::<pb::DmaSyncRequest, _>(DmaSync { header, device, range, direction, sync_for });
        }
    }
    check::<pb::DmaMapSgResponse, _>(DmaSegments { segments: vec![addresses(0x5010, 5), addresses(0, 9)] });
}

#[test]
fn limits_arrive_and_change_what_they_name() {
    let none = SetDmaLimits {
        header: header(),
        device: device(),
        mask_bits: None,
        segment_bytes_max: None,
        segment_boundary_mask: None,
    };
    let now = DmaLimits { mask_bits: 48, segment_bytes_max: 4096, segment_boundary_mask: 0xffff };
    for (change, expected) in [
        (none, now),
        (SetDmaLimits { mask_bits: Some(12), ..none }, DmaLimits { mask_bits: 12, ..now }),
        (SetDmaLimits { segment_bytes_max: Some(1), ..none }, DmaLimits { segment_bytes_max: 1, ..now }),
        (
            SetDmaLimits { segment_boundary_mask: Some(u64::MAX), ..none },
            DmaLimits { segment_boundary_mask: u64::MAX, ..now },
        ),
    ] {
        check::<pb::SetDmaLimitsRequest, _>(change);
        check::<pb::SetDmaLimitsResponse, _>(expected);
        assert_eq!(change.applied_to(now), expected);
    }
}

#[test]
fn batches_arrive_with_attributes_ring_and_burst() {
    for attributes in every_attribute() {
        for (ring, end_of_burst) in [(0, true), (7, false)] {
            let mut batch =
                RangeBatch::new(&[memory(0, 1), memory(9, 4)], Direction::ToDevice).expect("fits");
            batch.attributes = attributes;
            stream_arrives(DmaStreamBatch::Map { batch, ring });
            let mut batch = RangeBatch::new(&[addresses(9, 4)], Direction::FromDevice).expect("fits");
            batch.attributes = attributes;
            stream_arrives(DmaStreamBatch::Unmap { batch, end_of_burst });
        }
    }
}

fn stream_arrives(batch: DmaStreamBatch) {
    let request = DmaStreamRequest { header: header(), device: device(), batch };
    assert_eq!(DmaStreamRequest::parse(request.clone().into(), 2), Ok(request));
}

#[test]
fn a_client_that_knows_no_bursts_ends_each() {
    let unmap = pb::DmaUnmapRequest {
        header: Some(header().into()),
        device: Some(device().into()),
        iova: 0x1000,
        size_bytes: 4,
        direction: 1,
        attributes: None,
        end_of_burst: None,
    };
    let parsed = DmaUnmap::try_from(unmap).expect("parses");
    assert!(parsed.end_of_burst);
    assert_eq!(parsed.attributes, DmaAttributes::NONE);
    // And nothing of the new fields is sent where nothing is said.
    assert_eq!(pb::DmaUnmapRequest::from(parsed), unmap);
    let parsed = DmaUnmap::try_from(pb::DmaUnmapRequest { end_of_burst: Some(false), ..unmap });
    assert!(!parsed.expect("parses").end_of_burst);
}

fn sg(gpa: &[u64], size_bytes: &[u64], expected: Expect) {
    let request = pb::DmaMapSgRequest {
        header: Some(header().into()),
        device: Some(device().into()),
        gpa: gpa.to_vec(),
        size_bytes: size_bytes.to_vec(),
        direction: 1,
        attributes: None,
        ring: 0,
    };
    wrong::<_, DmaMapSg>(request, expected);
}

#[test]
fn columns_of_scatter_gather_are_equal_bounded_and_ranges() {
    sg(&[], &[], expect!["gpa: has 0 elements; 1 to 1024 can be"]);
    sg(&[0; 1025], &[1; 1025], expect!["gpa: has 1025 elements; 1 to 1024 can be"]);
    // Unlike in a batch, one size does not stand for all: pieces differ.
    sg(&[0, 1], &[1], expect!["size_bytes: has 1 elements; needs one for each of 2 in gpa"]);
    sg(&[0], &[1, 1], expect!["size_bytes: has 2 elements; needs one for each of 1 in gpa"]);
    sg(&[0, 0x1000], &[1, 0], expect!["range at gpa:0x1000 is empty; its size must be at least one byte"]);
    sg(
        &[u64::MAX],
        &[2],
        expect!["range at gpa:0xffffffffffffffff of 0x2 bytes wraps around the end of the address space"],
    );
    wrong::<_, DmaSegments>(
        pb::DmaMapSgResponse { iova: vec![], size_bytes: vec![1] },
        expect!["iova: has 0 elements; 1 to 1024 can be"],
    );
}

#[test]
fn what_is_wrong_with_the_rest_is_named() {
    let (header, device) = (Some(header().into()), Some(device().into()));
    let unmap = pb::DmaUnmapSgRequest { header, device, elements: 1, direction: 1, ..Default::default() };
    for (elements, expected) in [
        (0, expect!["elements: 0 is not a number of pieces; 1 to 1024 can be"]),
        (1025, expect!["elements: 1025 is not a number of pieces; 1 to 1024 can be"]),
    ] {
        wrong::<_, DmaUnmapSg>(pb::DmaUnmapSgRequest { elements, ..unmap }, expected);
    }
    let sync = pb::DmaSyncRequest { header, device, iova: 0, size_bytes: 1, direction: 1, sync_for: 0 };
    wrong::<_, DmaSync>(sync, expect!["sync_for: is not given"]);
    wrong::<_, DmaSync>(
        pb::DmaSyncRequest { sync_for: 3, ..sync },
        expect!["sync_for: 3 is a value that this version does not know"],
    );
    wrong::<_, DmaSync>(
        pb::DmaSyncRequest { sync_for: 1, size_bytes: 0, ..sync },
        expect!["range at iova:0x0 is empty; its size must be at least one byte"],
    );
    let map =
        pb::DmaMapRequest { header, device, size_bytes: 1, direction: 1, ring: 65_536, ..Default::default() };
    wrong::<_, DmaMap>(map, expect!["ring: 65536 is more than 65535"]);
    let limits = pb::SetDmaLimitsRequest { header, device, ..Default::default() };
    wrong::<_, SetDmaLimits>(
        pb::SetDmaLimitsRequest { mask_bits: Some(0), ..limits },
        expect!["mask_bits: is 0, and must be between 12 and 64"],
    );
    wrong::<_, SetDmaLimits>(
        pb::SetDmaLimitsRequest { segment_bytes_max: Some(0), ..limits },
        expect!["segment_bytes_max: is 0; at least 1 is needed"],
    );
    wrong::<_, SetDmaLimits>(
        pb::SetDmaLimitsRequest { segment_boundary_mask: Some(0x1_0000), ..limits },
        expect!["segment_boundary_mask: 0x10000 is not a power of two less 1, or is below 0xfff"],
    );
    let map = pb::DmaMapBatch { direction: 1, ring: 65_536, ..Default::default() };
    let batch = Some(pb::dma_stream_request::Batch::Map(map));
    let error = DmaStreamRequest::parse(pb::DmaStreamRequest { header, device, batch }, 1);
    let (field, why) = ("map.ring".to_owned(), "65536 is more than 65535".to_owned());
    // A batch of no operations has one size for each of none.
    assert_eq!(error, Err(InvalidField { field, why }.into()));
}
