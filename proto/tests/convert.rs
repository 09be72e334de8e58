//! Messages and models: what is sent arrives, and what is wrong is named.

mod wire;

use bytes::Bytes;
use expect_test::expect;
use iommu_proto::model::*;
use iommu_proto::pb;
use iommu_types::errors::{DmaMapError, DmaUnmapError, InvalidField, NotAttached, NotMapped};
use iommu_types::{
    Access, AccessWidth, AddressType, CacheState, Capabilities, DomainId, Explanation, Fault, FaultReason,
    FaultRecord, Generation, Gpa, GpaRange, Hpa, InterruptFault, InvalidRange, Iova, IovaRange, Outcome,
    Owner, PageSize, Pasid, Permissions, RequestId, SourceId, Step, Structure, Translation, TranslationFault,
};
use wire::{check, device, header, wrong};

fn fault() -> TranslationFault {
    let reason = FaultReason(0xee);
    let pasid = Pasid::new(3);
    TranslationFault {
        source_id: SourceId::new(8),
        pasid,
        iova: Iova::new(u64::MAX),
        access: Access::Atomic,
        address_type: AddressType::Translated,
        reason,
    }
}

#[test]
fn requests_arrive_as_they_are_sent() {
    for role in [
        SessionRole::Driver(Owner::Vm(1)),
        SessionRole::Bare,
        SessionRole::Observer,
        SessionRole::Operator,
        SessionRole::Hypervisor,
    ] {
        let resume_token = Some(ResumeToken([7; 16]));
        check::<pb::OpenRequest, _>(Open { schema_version: 1, name: "net0".to_owned(), role, resume_token });
    }
    let range = IovaRange::new(Iova::new(0x1000), 0x2000).expect("a range");
    let memory = GpaRange::new(Gpa::new(0x8000), 0x2000).expect("a range");
    let (domain_id, permissions) = (DomainId::new(u16::MAX), Permissions::WRITE);
    check::<pb::MapRequest, _>(MapFixed { header: header(), domain_id, range, memory, permissions });
    check::<pb::UnmapRequest, _>(UnmapFixed { header: header(), domain_id, range });
    check::<pb::MemoryReadRequest, _>(MemoryRead { owner: Some(Owner::Driver(0)), range: memory });
    let data = Bytes::from_static(b"data");
    check::<pb::MemoryWriteRequest, _>(MemoryWrite::new(None, Gpa::new(1), data).expect("a range"));
    check::<pb::QuarantineRequest, _>(Quarantine { peer: Peer::Device(device()) });
    check::<pb::QuarantineRequest, _>(Quarantine { peer: Peer::Owner(Owner::Vm(2)) });
    let capabilities = Some(Capabilities::FULL);
    let devices = vec![MachineDevice { source_id: SourceId::new(8), name: "dma.0".to_owned() }];
    check::<pb::CreateMachineRequest, _>(CreateMachine { memory_bytes: 8192, capabilities, devices });
}

#[test]
fn the_stream_of_a_device_arrives_as_it_is_sent() {
    let hello = Hello { schema_version: 1, name: "a".repeat(64), address: device(), mmio_credits: 256 };
    check::<pb::DeviceToServer, _>(FromDevice::Hello(hello));
    check::<pb::DeviceToServer, _>(FromDevice::Dma(pb::DmaBatch { iova: vec![1], ..Default::default() }));
    check::<pb::DeviceToServer, _>(FromDevice::ResetDone { tag: 4 });
    for outcome in [Ok(0), Ok(u64::MAX), Err("no such register".to_owned())] {
        check::<pb::DeviceToServer, _>(FromDevice::Mmio(MmioCompletion { tag: 3, outcome }));
    }
    let welcome = Welcome {
        schema_version: 1,
        generation: Generation(2),
        dma_credits: 8,
        batch_operations_max: 128,
        batch_bytes_max: 1 << 20,
        assignment_generation: Generation(3),
    };
    check::<pb::ServerToDevice, _>(ToDevice::Welcome(welcome));
    for write_value in [None, Some(0), Some(0xffff)] {
        let access = MmioAccess { bar: 5, offset: 0x1002, width: AccessWidth::Bytes2, write_value };
        check::<pb::ServerToDevice, _>(ToDevice::Mmio(MmioRequest { tag: 1, access }));
    }
    check::<pb::ServerToDevice, _>(ToDevice::Reset { tag: 5, assignment_generation: Generation(6) });
}

#[test]
fn faults_and_explanations_arrive_with_codes_of_the_future() {
    let interrupt = InterruptFault { source_id: SourceId::new(1), index: Some(9), reason: FaultReason(0x22) };
    for fault in [Fault::Dma(fault()), Fault::Interrupt(interrupt)] {
        let (owner, domain_id) = (Some(Owner::Driver(1)), Some(DomainId::new(0)));
        let (sequence, at_unix_ms, collapsed_count) = (1, 2, 3);
        check::<pb::FaultRecord, _>(FaultRecord {
            sequence,
            at_unix_ms,
            owner,
            device: device(),
            domain_id,
            fault,
            collapsed_count,
        });
    }
    let permissions = Permissions::READ_WRITE;
    let page_size = PageSize::Size2M;
    let translation = Translation { hpa: Hpa::new(5), page_size, permissions, domain_id: DomainId::new(4) };
    let step = |structure| Step {
        structure,
        index: 511,
        at: Hpa::new(0x7000),
        low: Some(1),
        high: None,
        permissions: Some(Permissions::empty()),
        reading: "not present".to_owned(),
    };
    for outcome in [
        Outcome::Translated(translation),
        Outcome::Untranslated(Hpa::new(1)),
        Outcome::Interrupt,
        Outcome::Refused(fault()),
    ] {
        let explanation = Explanation {
            source_id: SourceId::new(8),
            pasid: None,
            iova: Iova::new(0x1234),
            access: Access::Read,
            size_bytes: 0,
            context_cache: CacheState::Hit { entry: "domain 4".to_owned() },
            iotlb: CacheState::Insufficient { entry: "r-".to_owned() },
            paging_structure_cache: CacheState::NotAsked,
            steps: vec![
                step(Structure::Root),
                step(Structure::Context),
                step(Structure::SecondStage { level: 5 }),
                step(Structure::RingRoot),
                step(Structure::RingDevice),
                step(Structure::Ring),
                step(Structure::RingSlot),
            ],
            outcome,
            fault_suppressed: true,
            stale: Some(translation),
            conclusion: "so".to_owned(),
        };
        check::<pb::ExplainResponse, _>(Explained { segment: 0, explanation });
    }
}

fn address(segment: u32, source_id: u32) -> Option<pb::DeviceAddress> {
    Some(pb::DeviceAddress { segment, source_id })
}

#[test]
fn what_is_wrong_is_named_by_its_path() {
    wrong::<_, FromDevice>(
        pb::DeviceToServer { message: None },
        expect!["message: is absent, or of a kind that this version does not know"],
    );
    let hello =
        pb::Hello { schema_version: 1, name: "x".to_owned(), address: address(0, 65536), mmio_credits: 1 };
    let envelope = |hello| pb::DeviceToServer { message: Some(pb::device_to_server::Message::Hello(hello)) };
    wrong::<_, FromDevice>(
        envelope(hello.clone()),
        expect!["hello.address.source_id: 65536 is more than 65535"],
    );
    wrong::<_, Hello>(
        pb::Hello { address: None, ..hello.clone() },
        expect!["address: is absent, or of a kind that this version does not know"],
    );
    wrong::<_, Hello>(
        pb::Hello { address: address(0, 8), mmio_credits: 0, ..hello.clone() },
        expect!["mmio_credits: 0 is not between 1 and 256"],
    );
    wrong::<_, Hello>(
        pb::Hello { address: address(0, 8), name: "a b".to_owned(), ..hello },
        expect!["name: needs 1 to 64 letters, digits, dots, dashes or underscores"],
    );
    wrong::<_, Owner>(
        pb::Owner { kind: None },
        expect!["kind: is absent, or of a kind that this version does not know"],
    );
    wrong::<_, Quarantine>(
        pb::QuarantineRequest { peer: None },
        expect!["peer: is absent, or of a kind that this version does not know"],
    );
    let open = pb::OpenRequest { name: "x".to_owned(), ..Default::default() };
    wrong::<_, Open>(open.clone(), expect!["role: is absent, or of a kind that this version does not know"]);
    let role = Some(pb::open_request::Role::Driver(pb::DriverRole { owner: None }));
    wrong::<_, Open>(
        pb::OpenRequest { role, ..open.clone() },
        expect!["role.driver.owner: is absent, or of a kind that this version does not know"],
    );
    let role = Some(pb::open_request::Role::Bare(pb::BareRole {}));
    wrong::<_, Open>(
        pb::OpenRequest { role, resume_token: Bytes::from_static(b"short"), ..open },
        expect!["resume_token: has 5 bytes; needs 16"],
    );
    let records = vec![pb::FaultRecord { device: address(0, 8), ..Default::default() }];
    wrong::<_, FaultList>(
        pb::ListFaultsResponse { records, ..Default::default() },
        expect!["records[0].fault: is absent, or of a kind that this version does not know"],
    );
}

#[test]
fn unknown_enum_values_are_named() {
    let map = pb::DmaMapRequest {
        header: Some(header().into()),
        device: address(0, 8),
        gpa: 0,
        size_bytes: 1,
        ..Default::default()
    };
    wrong::<_, DmaMap>(map, expect!["direction: is not given"]);
    wrong::<_, DmaMap>(
        pb::DmaMapRequest { direction: 77, ..map },
        expect!["direction: 77 is a value that this version does not know"],
    );
    wrong::<_, DmaMap>(
        pb::DmaMapRequest { size_bytes: 0, ..map },
        expect!["range at gpa:0x0 is empty; its size must be at least one byte"],
    );
    wrong::<_, DmaMap>(
        pb::DmaMapRequest { gpa: u64::MAX, size_bytes: 2, ..map },
        expect!["range at gpa:0xffffffffffffffff of 0x2 bytes wraps around the end of the address space"],
    );
    let reused = pb::RequestHeader { request_id: 4, acknowledged_through: 4 };
    wrong::<_, DmaMap>(
        pb::DmaMapRequest { header: Some(reused), ..map },
        expect![
            "header.acknowledged_through: is not below request_id: the answer to this request cannot have been seen yet"
        ],
    );
    wrong::<_, WalkStep>(
        pb::WalkStep { structure: 9, ..Default::default() },
        expect!["structure: 9 is a value that this version does not know"],
    );
    wrong::<_, WalkStep>(
        pb::WalkStep { structure: 3, level: 6, ..Default::default() },
        expect!["level: 6 is not between 1 and 5"],
    );
}

#[test]
fn register_accesses_fit_their_width_and_bar() {
    let read = pb::MmioReadRequest { device: address(0, 8), bar: 0, offset: 6, width_bytes: 4 };
    wrong::<_, Mmio>(read, expect!["offset: 0x6 is not a multiple of the width, 4"]);
    wrong::<_, Mmio>(
        pb::MmioReadRequest { bar: 6, width_bytes: 2, ..read },
        expect!["bar: 6 is more than 5"],
    );
    wrong::<_, Mmio>(
        pb::MmioReadRequest { width_bytes: 3, ..read },
        expect!["width_bytes: 3 is not a width; use 1, 2, 4 or 8"],
    );
    let write =
        pb::MmioWriteRequest { device: address(0, 8), bar: 0, offset: 6, width_bytes: 2, value: 65536 };
    wrong::<_, Mmio>(write, expect!["value: 0x10000 does not fit 2 bytes"]);
    wrong::<_, ReadRegister>(
        pb::ReadRegisterRequest { segment: 1, offset: 0, width_bytes: 2 },
        expect!["width_bytes: registers are read and written with 4 or 8 bytes"],
    );
    wrong::<_, ReadRegister>(
        pb::ReadRegisterRequest { segment: 65536, offset: 0, width_bytes: 4 },
        expect!["segment: 65536 is more than 65535"],
    );
    let write = pb::WriteRegisterRequest { segment: 1, offset: 0, width_bytes: 4, value: 1 << 32 };
    wrong::<_, WriteRegister>(write, expect!["value: 0x100000000 does not fit a 4-byte access"]);
}

fn stream(sizes: &[u32]) -> pb::DmaStreamRequest {
    let gpa = vec![0, 0x1000, u64::MAX];
    let map = pb::DmaMapBatch { gpa, size_bytes: sizes.to_vec(), direction: 2, ..Default::default() };
    let batch = Some(pb::dma_stream_request::Batch::Map(map));
    pb::DmaStreamRequest { header: Some(header().into()), device: address(0, 8), batch }
}

#[test]
fn a_range_of_a_stream_that_is_none_fails_alone() {
    let request = DmaStreamRequest::parse(stream(&[16]), 3).expect("parses");
    let DmaStreamBatch::Map { batch, .. } = &request.batch else { panic!("a map was sent") };
    let ranges: Vec<_> = batch.ranges().collect();
    let range = |base, size_bytes| GpaRange::new(Gpa::new(base), size_bytes);
    assert_eq!(ranges, [range(0, 16), range(0x1000, 16), range(u64::MAX, 16)]);
    assert!(matches!(ranges[2], Err(InvalidRange::Wraps { .. })));
    let refused = |wire, operations_max| {
        DmaStreamRequest::parse(wire, operations_max).expect_err("refused").to_string()
    };
    expect!["map.size_bytes: has 2 elements; needs one for each of 3 in gpa, or one"]
        .assert_eq(&refused(stream(&[16, 16]), 3));
    expect!["the limit batch_operations_max of 2 is reached"].assert_eq(&refused(stream(&[16]), 2));
    expect!["batch: is absent, or of a kind that this version does not know"]
        .assert_eq(&refused(pb::DmaStreamRequest { batch: None, ..stream(&[1]) }, 3));
}

#[test]
fn the_outcomes_of_a_stream_arrive_in_their_places() {
    let maps: Vec<Result<Iova, DmaMapError>> =
        vec![Ok(Iova::new(0x1000)), Err(NotAttached { device: device() }.into()), Ok(Iova::new(0))];
    let response = map_response(RequestId(4), maps.clone());
    assert_eq!((response.request_id, response.iova[1]), (4, DMA_MAPPING_ERROR));
    assert_eq!(map_outcomes(response, 3), Ok(maps));
    let unmaps: Vec<Result<(), DmaUnmapError>> = vec![Ok(()), Err(NotMapped { iova: Iova::new(1) }.into())];
    let response = unmap_response(RequestId(5), unmaps.clone());
    assert_eq!(unmap_outcomes(response, 2), Ok(unmaps));
}

#[test]
fn an_answer_of_a_stream_that_does_not_fit_is_named() {
    let error = |wire, operations| {
        map_outcomes(wire, operations)
            .map_err(|InvalidField { field, why }| format!("{field}: {why}"))
            .expect_err("refused")
    };
    let response = |iova: &[u64], errors: Vec<pb::OperationError>| pb::DmaStreamResponse {
        request_id: 1,
        iova: iova.to_vec(),
        errors,
    };
    expect!["iova: has 1 elements; 2 mappings were asked for"].assert_eq(&error(response(&[1], vec![]), 2));
    expect!["errors: no error says why mapping 0 failed"]
        .assert_eq(&error(response(&[DMA_MAPPING_ERROR], vec![]), 1));
    let beyond = operation_error(1, &NotAttached { device: device() });
    expect!["errors[0].index: 1 is not an operation of the batch, or named twice"]
        .assert_eq(&error(response(&[DMA_MAPPING_ERROR], vec![beyond]), 1));
    let other = operation_error(0, &NotMapped { iova: Iova::new(1) });
    expect![[r#"errors[0].reason: "NOT_MAPPED" is not a reason of this operation, or lacks facts"#]]
        .assert_eq(&error(response(&[DMA_MAPPING_ERROR], vec![other]), 1));
}
