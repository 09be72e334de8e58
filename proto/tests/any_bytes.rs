//! Whatever bytes a peer sends: a message or an error, never a panic.

use bytes::Bytes;
use iommu_proto::dma::{Batch, BatchLimits, BatchView, CompletionsBuilder, refuse_whole};
use iommu_proto::model::*;
use iommu_proto::pb;
use iommu_types::{Capabilities, DmaLimits, DomainOptions, Iova, Refusal, SanitizerReport};
use proptest::prelude::*;
use prost::Message;

/// Decodes and parses; what parses is sent again and parses to the same.
fn receive<W, M>(bytes: &[u8])
where
    W: Message + Default + From<M>,
    M: TryFrom<W> + Clone + PartialEq + std::fmt::Debug,
    M::Error: std::fmt::Debug,
{
    let Ok(wire) = W::decode(bytes) else { return };
    let Ok(model) = M::try_from(wire) else { return };
    let again = M::try_from(W::from(model.clone())).expect("what was parsed is sent so that it parses");
    assert_eq!(again, model);
}

/// As `receive`, for what is only received.
fn receive_only<W, M>(bytes: &[u8])
where
    W: Message + Default,
    M: TryFrom<W>,
{
    let _ = W::decode(bytes).map(M::try_from);
}

fn receive_batch(bytes: &[u8]) {
    let Ok(batch) = pb::DmaBatch::decode(bytes) else { return };
    let _ = refuse_whole(&batch, Refusal::Fenced);
    let Ok(view) = BatchView::parse(&batch, BatchLimits::CONTRACT) else { return };
    let mut answer = CompletionsBuilder::new(&view);
    for operation in view.operations() {
        let results = answer.results();
        results.resize(results.len() + operation.result_bytes() as usize, 0);
        answer.succeeded(&operation);
    }
    answer.finish();
}

fn receive_completions(bytes: &[u8]) {
    let Ok(completions) = pb::DmaCompletions::decode(bytes) else { return };
    let mut batch = Batch::new();
    for index in 0..4 {
        batch.read(Iova::new(index), index as u32);
    }
    let (_, shape) = batch.into_message(completions.first_tag);
    if let Ok(completed) = shape.complete(completions) {
        assert_eq!(completed.results().count(), 4);
    }
}

fn receive_stream(bytes: &[u8]) {
    if let Ok(wire) = pb::DmaStreamRequest::decode(bytes)
        && let Ok(request) = DmaStreamRequest::parse(wire, 16)
    {
        match &request.batch {
            DmaStreamBatch::Map { batch, .. } => assert_eq!(batch.ranges().count(), batch.len()),
            DmaStreamBatch::Unmap { batch, .. } => assert_eq!(batch.ranges().count(), batch.len()),
        }
        let again = DmaStreamRequest::parse(request.clone().into(), 16).expect("parses again");
        assert_eq!(again, request);
    }
    if let Ok(wire) = pb::DmaStreamResponse::decode(bytes) {
        let _ = (map_outcomes(wire.clone(), wire.iova.len()), unmap_outcomes(wire, 3));
    }
}

macro_rules! receive_all {
    ($bytes:ident: $($wire:ident as $model:ident),* $(,)?) => {
        $(receive::<pb::$wire, $model>($bytes);)*
    };
}

fn receive_everything(bytes: &[u8]) {
    receive_batch(bytes);
    receive_completions(bytes);
    receive_stream(bytes);
    receive_only::<pb::MmioReadRequest, Mmio>(bytes);
    receive_only::<pb::MmioWriteRequest, Mmio>(bytes);
    receive_only::<pb::ReadMachineMemoryRequest, ReadMachineMemory>(bytes);
    receive_only::<pb::WriteMachineMemoryRequest, WriteMachineMemory>(bytes);
    receive_all!(bytes:
        OpenRequest as Open, OpenResponse as Opened,
        MmioRequest as MmioRequest, MmioCompletion as MmioCompletion, Hello as Hello, Welcome as Welcome,
        DeviceToServer as FromDevice, ServerToDevice as ToDevice,
        RequestHeader as RequestHeader, AllocateBufferRequest as AllocateBuffer,
        AllocateBufferResponse as AllocatedBuffer, FreeBufferRequest as FreeBuffer, DmaMapRequest as DmaMap,
        DmaUnmapRequest as DmaUnmap, DmaMapSgRequest as DmaMapSg, DmaMapSgResponse as DmaSegments,
        DmaUnmapSgRequest as DmaUnmapSg, DmaSyncRequest as DmaSync, SetDmaLimitsRequest as SetDmaLimits,
        SetDmaLimitsResponse as DmaLimits, DomainOptions as DomainOptions, AllocateCoherentRequest as AllocateCoherent,
        AllocateCoherentResponse as AllocatedCoherent, FreeCoherentRequest as FreeCoherent,
        CreateDomainRequest as CreateDomain, DestroyDomainRequest as DestroyDomain,
        AttachDeviceRequest as AttachDevice, DetachDeviceRequest as DetachDevice, MapRequest as MapFixed,
        UnmapRequest as UnmapFixed, AllocateInterruptRequest as AllocateInterrupt,
        AllocateInterruptResponse as AllocatedInterrupt, Interrupt as Interrupt,
        MemoryReadRequest as MemoryRead, MemoryWriteRequest as MemoryWrite,
        ListFaultsRequest as ListFaults, ListFaultsResponse as FaultList,
        WatchFaultsRequest as WatchFaults, WatchFaultsResponse as NewFaults,
        ListReportsRequest as ListReports, ListReportsResponse as ReportList,
        WatchReportsRequest as WatchReports, WatchReportsResponse as NewReports,
        SanitizerReport as SanitizerReport,
        Capabilities as Capabilities, CreateMachineRequest as CreateMachine,
        CreateMachineResponse as CreatedMachine, DestroyMachineRequest as DestroyMachine,
        ListMachinesResponse as Machines, ReadRegisterRequest as ReadRegister,
        WriteRegisterRequest as WriteRegister, WatchMachineInterruptsRequest as WatchMachineInterrupts,
        WatchMachineInterruptsResponse as MachineInterrupts,
        GetTopologyResponse as Topology, ListDomainsRequest as ListDomains, ListDomainsResponse as Domains,
        ListMappingsRequest as ListMappings, ListMappingsResponse as Mappings,
        DumpTablesRequest as DumpTables, DumpTablesResponse as DumpedTables,
        DumpIotlbRequest as DumpIotlb, DumpIotlbResponse as DumpedIotlb,
        GetCountersRequest as GetCounters, GetCountersResponse as Counters,
        ExplainRequest as Explain, ExplainResponse as Explained,
        DeclareDeviceRequest as DeclareDevice, RemoveDeviceRequest as RemoveDevice,
        DeclareDriverRequest as DeclareDriver, AttachToOwnerRequest as AttachToOwner,
        DetachRequest as Detach, QuarantineRequest as Quarantine,
    );
}

/// Bytes that look like protobuf: fields of the small numbers that the schema uses, nested now and then.
fn likely_message() -> impl Strategy<Value = Vec<u8>> {
    let field = (1_u8..20, prop_oneof![Just(0_u8), Just(1), Just(2), Just(5)], any::<[u8; 8]>(), 0_u8..8);
    let fields = proptest::collection::vec(field, 0..12);
    fields.prop_map(|fields| {
        let mut bytes = Vec::new();
        for (number, wire_type, content, length) in fields {
            // Numbers above 15 take a second byte; (number << 3 | type) as a varint.
            prost::encoding::encode_varint(u64::from(number) << 3 | u64::from(wire_type), &mut bytes);
            match wire_type {
                0 => prost::encoding::encode_varint(u64::from(content[0] >> 2), &mut bytes),
                1 => bytes.extend(content),
                2 => {
                    bytes.push(length);
                    bytes.extend(&content[..usize::from(length)]);
                }
                _ => bytes.extend(&content[..4]),
            }
        }
        bytes
    })
}

proptest! {
    #[test]
    fn any_bytes_are_a_message_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        receive_everything(&bytes);
    }

    #[test]
    fn bytes_that_look_like_messages_are_a_message_or_an_error(bytes in likely_message()) {
        receive_everything(&bytes);
    }

    #[test]
    fn batches_of_odd_columns_never_panic(
        first_tag in any::<u64>(),
        iova in proptest::collection::vec(any::<u64>(), 0..6),
        size_bytes in proptest::collection::vec(any::<u32>(), 0..6),
        kind in proptest::collection::vec(0_u8..7, 0..6),
        payload in proptest::collection::vec(any::<u8>(), 0..64),
        pasid in any::<Option<u32>>(),
    ) {
        let (kind, payload) = (Bytes::from(kind), Bytes::from(payload));
        receive_batch(&pb::DmaBatch { first_tag, iova, size_bytes, kind, payload, pasid, address_type: 0, assignment_generation: None }.encode_to_vec());
    }
}

#[test]
fn unknown_fields_are_ignored() {
    let hello = pb::Hello {
        schema_version: 1,
        name: "net0".to_owned(),
        address: Some(pb::DeviceAddress { segment: 0, source_id: 8 }),
        mmio_credits: 4,
    };
    let mut bytes = hello.encode_to_vec();
    prost::encoding::string::encode(1000, &"from a newer schema".to_owned(), &mut bytes);
    let wire = pb::Hello::decode(&*bytes).expect("decodes");
    let parsed = Hello::try_from(wire).expect("parses");
    assert_eq!((parsed.name.as_str(), parsed.mmio_credits), ("net0", 4));
}
