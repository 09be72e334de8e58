//! The driver's calls: each one as it should go, and each error of its table. Retries, sessions, and what is reclaimed.

mod support;

use bytes::Bytes;
use iommu_proto::pb;
use support::*;
use tokio_stream::StreamExt as _;
use tonic::Status;

async fn domain(driver: &Driver, width_bits: u32) -> Result<u32, Status> {
    let options = pb::DomainOptions {
        protection: pb::Protection::Strict.into(),
        width_bits,
        ..pb::DomainOptions::default()
    };
    driver.create_domain(options).await
}

async fn map_fixed(
    driver: &Driver,
    domain_id: u32,
    iova: u64,
    gpa: u64,
    size_bytes: u64,
) -> Result<(), Status> {
    let permissions = Some(pb::Permissions { read: true, write: true });
    let request = pb::MapRequest { header: driver.header(), domain_id, iova, gpa, size_bytes, permissions };
    driver.client().map(request).await.map(|_| ())
}

async fn unmap_fixed(driver: &Driver, domain_id: u32, iova: u64, size_bytes: u64) -> Result<u64, Status> {
    let request = pb::UnmapRequest { header: driver.header(), domain_id, iova, size_bytes };
    driver.client().unmap(request).await.map(|unmapped| unmapped.into_inner().unmapped_bytes)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_dma_api_answers_each_error_of_its_table() {
    let server = server().await;
    let driver = Driver::open(&server, 0).await;
    let gpa = driver.buffer(2 * PAGE).await;
    assert_eq!(refused(driver.map(ENGINE0, gpa, 0).await), "INVALID_RANGE");
    assert_eq!(refused(driver.map(ENGINE0, u64::MAX, 2).await), "INVALID_RANGE");
    assert_eq!(refused(driver.map(0x99, gpa, 1).await), "UNKNOWN_DEVICE");
    assert_eq!(refused(driver.map(ENGINE1, gpa, 1).await), "NOT_YOURS");
    assert_eq!(refused(driver.map(ENGINE2, gpa, 1).await), "NOT_YOURS");
    assert_eq!(refused(driver.map(ENGINE0, gpa + 2 * PAGE, 1).await), "NOT_OWNED");
    let iova = driver.map(ENGINE0, gpa + 5, PAGE).await.unwrap();
    assert_eq!(iova % PAGE, 5, "any offset, and it is kept");
    assert_eq!(refused(driver.free(gpa).await), "STILL_MAPPED");
    assert_eq!(refused(driver.unmap(ENGINE0, iova + PAGE, PAGE).await), "NOT_MAPPED");
    assert_eq!(refused(driver.unmap(ENGINE0, iova, PAGE - 1).await), "SIZE_MISMATCH");
    let other_direction = pb::DmaUnmapRequest {
        header: driver.header(),
        device: Some(device(ENGINE0)),
        iova,
        size_bytes: PAGE,
        direction: pb::Direction::ToDevice.into(),
        attributes: None,
        end_of_burst: None,
    };
    assert_eq!(refused(driver.client().dma_unmap(other_direction).await), "DIRECTION_MISMATCH");
    driver.unmap(ENGINE0, iova, PAGE).await.unwrap();
    assert_eq!(refused(driver.unmap(ENGINE0, iova, PAGE).await), "NOT_MAPPED");
    assert_eq!(refused(driver.free(gpa + PAGE).await), "NOT_ALLOCATED");
    driver.free(gpa).await.unwrap();
    driver.detach(ENGINE0).await.unwrap();
    let gpa = driver.buffer(1).await;
    assert_eq!(refused(driver.map(ENGINE0, gpa, 1).await), "NOT_ATTACHED");
    assert_eq!(refused(driver.detach(ENGINE0).await), "NOT_ATTACHED");
    driver.attach(ENGINE0, None).await.unwrap();
    driver.map(ENGINE0, gpa, 1).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i7_one_owner_cannot_take_all_memory() {
    let server = server().await;
    let driver = Driver::open(&server, 0).await;
    let allocate = |size_bytes| pb::AllocateBufferRequest { header: driver.header(), size_bytes };
    assert_eq!(refused(driver.client().allocate_buffer(allocate(0)).await), "INVALID_FIELD");
    assert_eq!(refused(driver.client().allocate_buffer(allocate(48 << 20)).await), "LIMIT_REACHED");
    assert_eq!(refused(driver.client().allocate_buffer(allocate(u64::MAX)).await), "OUT_OF_MEMORY");
    driver.buffer(16 << 20).await;
    let other = Driver::open(&server, 1).await;
    other.buffer(16 << 20).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_domain_api_answers_each_error_of_its_table() {
    let server = server().await;
    let driver = Driver::open(&server, 0).await;
    let stranger = Driver::open(&server, 1).await;
    let gpa = driver.buffer(8 * PAGE).await;
    assert_eq!(refused(domain(&driver, 40).await), "INVALID_FIELD");
    let id = domain(&driver, 39).await.unwrap();
    assert_eq!(refused(map_fixed(&driver, id, 0x10_0001, gpa, PAGE).await), "UNALIGNED");
    assert_eq!(refused(map_fixed(&driver, id, 0x10_0000, gpa + 8, PAGE).await), "UNALIGNED");
    assert_eq!(refused(map_fixed(&driver, id, 0x10_0000, gpa, 0).await), "INVALID_RANGE");
    assert_eq!(refused(map_fixed(&driver, id, 1 << 39, gpa, PAGE).await), "BEYOND_WIDTH");
    assert_eq!(refused(map_fixed(&driver, id, 0xfee0_0000, gpa, PAGE).await), "RESERVED_RANGE");
    assert_eq!(refused(map_fixed(&driver, id, 0, gpa, PAGE).await), "RESERVED_RANGE");
    assert_eq!(refused(map_fixed(&driver, id, 0x10_0000, gpa + 8 * PAGE, PAGE).await), "NOT_OWNED");
    assert_eq!(refused(map_fixed(&driver, 999, 0x10_0000, gpa, PAGE).await), "UNKNOWN_DOMAIN");
    assert_eq!(refused(map_fixed(&stranger, id, 0x10_0000, gpa, PAGE).await), "NOT_YOURS");
    map_fixed(&driver, id, 0x10_0000, gpa, 4 * PAGE).await.unwrap();
    assert_eq!(refused(map_fixed(&driver, id, 0x10_3000, gpa, PAGE).await), "RANGE_OVERLAPS");
    assert_eq!(refused(unmap_fixed(&driver, id, 0x10_0000, PAGE).await), "SPLITS_MAPPING");
    assert_eq!(refused(unmap_fixed(&driver, id, 0x10_0001, PAGE).await), "UNALIGNED");
    assert_eq!(refused(unmap_fixed(&stranger, id, 0x10_0000, PAGE).await), "NOT_YOURS");
    assert_eq!(driver.attach(ENGINE0, Some(id)).await.unwrap(), id);
    assert_eq!(refused(stranger.attach(ENGINE1, Some(id)).await), "NOT_YOURS");
    assert_eq!(refused(driver.attach(ENGINE1, Some(id)).await), "NOT_YOURS");
    assert_eq!(refused(driver.attach(ENGINE0, Some(999)).await), "UNKNOWN_DOMAIN");
    assert_eq!(refused(driver.destroy(id).await), "DOMAIN_IN_USE");
    assert_eq!(refused(stranger.destroy(id).await), "NOT_YOURS");
    let mut agent = Agent::attach(&server, ENGINE0).await;
    driver.write(gpa, b"fixed").await;
    assert_eq!(agent.read(0x10_0000, 5).await.unwrap(), "fixed");
    assert_eq!(unmap_fixed(&driver, id, 0x10_0000, 16 * PAGE).await.unwrap(), 4 * PAGE);
    assert!(agent.read(0x10_0000, 5).await.is_err());
    driver.attach(ENGINE0, None).await.unwrap();
    driver.destroy(id).await.unwrap();
    assert_eq!(refused(driver.destroy(id).await), "UNKNOWN_DOMAIN");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn coherent_memory_comes_and_goes_as_one() {
    let server = server().await;
    let driver = Driver::open(&server, 0).await;
    let mut agent = Agent::attach(&server, ENGINE0).await;
    let ask = pb::AllocateCoherentRequest {
        header: driver.header(),
        device: Some(device(ENGINE0)),
        size_bytes: 100,
    };
    let coherent = driver.client().allocate_coherent(ask).await.unwrap().into_inner();
    assert_eq!(coherent.size_bytes, PAGE);
    driver.write(coherent.gpa, b"ring").await;
    assert_eq!(agent.read(coherent.iova, 4).await.unwrap(), "ring");
    let free = |gpa, iova| pb::FreeCoherentRequest {
        header: driver.header(),
        device: Some(device(ENGINE0)),
        gpa,
        iova,
    };
    let wrong = driver.client().free_coherent(free(coherent.gpa + PAGE, coherent.iova)).await;
    assert_eq!(refused(wrong), "NOT_ALLOCATED");
    driver.client().free_coherent(free(coherent.gpa, coherent.iova)).await.unwrap();
    assert!(agent.read(coherent.iova, 4).await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_retry_is_answered_again_and_does_nothing_again() {
    let server = server().await;
    let driver = Driver::open(&server, 0).await;
    let request = pb::AllocateBufferRequest { header: driver.header(), size_bytes: PAGE };
    let first = driver.client().allocate_buffer(request).await.unwrap().into_inner();
    let again = driver.client().allocate_buffer(request).await.unwrap().into_inner();
    assert_eq!(first, again);
    let different = pb::AllocateBufferRequest { size_bytes: 2 * PAGE, ..request };
    assert_eq!(refused(driver.client().allocate_buffer(different).await), "REQUEST_REUSED");
    let header = Some(pb::RequestHeader { request_id: 50, acknowledged_through: 49 });
    let later = pb::AllocateBufferRequest { header, size_bytes: PAGE };
    driver.client().allocate_buffer(later).await.unwrap();
    assert_eq!(refused(driver.client().allocate_buffer(request).await), "REQUEST_TOO_OLD");
    let nameless = pb::AllocateBufferRequest { header: None, size_bytes: PAGE };
    assert_eq!(refused(driver.client().allocate_buffer(nameless).await), "INVALID_FIELD");
}

fn map_batch(header: Option<pb::RequestHeader>, gpa: Vec<u64>) -> pb::DmaStreamRequest {
    let direction = pb::Direction::Bidirectional.into();
    let map = pb::DmaMapBatch { gpa, size_bytes: vec![PAGE as u32], direction, ..Default::default() };
    let batch = Some(pb::dma_stream_request::Batch::Map(map));
    pb::DmaStreamRequest { header, device: Some(device(ENGINE0)), batch }
}

fn unmap_batch(header: Option<pb::RequestHeader>, iova: Vec<u64>) -> pb::DmaStreamRequest {
    let direction = pb::Direction::Bidirectional.into();
    let unmap = pb::DmaUnmapBatch { iova, size_bytes: vec![PAGE as u32], direction, ..Default::default() };
    let batch = Some(pb::dma_stream_request::Batch::Unmap(unmap));
    pb::DmaStreamRequest { header, device: Some(device(ENGINE0)), batch }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_of_batches_is_answered_in_order_and_operation_by_operation() {
    let server = server().await;
    let driver = Driver::open(&server, 0).await;
    let gpa = driver.buffer(64 * PAGE).await;
    let (up, requests) = tokio::sync::mpsc::channel(8);
    let requests = tokio_stream::wrappers::ReceiverStream::new(requests);
    let mut answers = driver.client().dma_stream(requests).await.unwrap().into_inner();
    let mut pages: Vec<u64> = (0..64).map(|page| gpa + page * PAGE).collect();
    pages.push(gpa + 64 * PAGE);
    let first = map_batch(driver.header(), pages);
    up.send(first.clone()).await.unwrap();
    let mapped = answers.message().await.unwrap().unwrap();
    assert_eq!((mapped.request_id, mapped.iova.len()), (2, 65));
    assert_eq!((mapped.errors[0].index, mapped.errors[0].reason.as_str()), (64, "NOT_OWNED"));
    assert_eq!(mapped.iova[64], u64::MAX);
    // A repeated batch is answered again, and maps nothing again.
    up.send(first).await.unwrap();
    assert_eq!(answers.message().await.unwrap().unwrap(), mapped);
    let mut iovas = mapped.iova[..64].to_vec();
    iovas.insert(3, 0x7000_0000);
    up.send(unmap_batch(driver.header(), iovas)).await.unwrap();
    let unmapped = answers.message().await.unwrap().unwrap();
    assert_eq!(unmapped.errors.len(), 1);
    assert_eq!((unmapped.errors[0].index, unmapped.errors[0].reason.as_str()), (3, "NOT_MAPPED"));
    driver.free(gpa).await.unwrap();
    // A batch that does not parse ends the stream, typed.
    up.send(map_batch(driver.header(), vec![gpa; 2000])).await.unwrap();
    assert_eq!(refused(answers.message().await), "LIMIT_REACHED");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i1_unmaps_of_a_stream_under_dma_load_are_settled_before_they_are_answered() {
    let server = server().await;
    let driver = Driver::open(&server, 0).await;
    let gpa = driver.buffer(16 * PAGE).await;
    let mut agent = Agent::attach(&server, ENGINE0).await;
    let stop = tokio_util::sync::CancellationToken::new();
    let target = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(PAGE));
    let load = tokio::spawn({
        let (stop, target) = (stop.clone(), target.clone());
        async move {
            while !stop.is_cancelled() {
                let iova = target.load(std::sync::atomic::Ordering::Relaxed);
                agent.batch(read_batch(&[iova; 32], PAGE as u32)).await;
            }
        }
    });
    let (up, requests) = tokio::sync::mpsc::channel(8);
    let requests = tokio_stream::wrappers::ReceiverStream::new(requests);
    let mut answers = driver.client().dma_stream(requests).await.unwrap().into_inner();
    for _ in 0..50 {
        let pages = (0..16).map(|page| gpa + page * PAGE).collect();
        up.send(map_batch(driver.header(), pages)).await.unwrap();
        let mapped = answers.message().await.unwrap().unwrap();
        assert!(mapped.errors.is_empty());
        target.store(mapped.iova[7], std::sync::atomic::Ordering::Relaxed);
        up.send(unmap_batch(driver.header(), mapped.iova)).await.unwrap();
        assert!(answers.message().await.unwrap().unwrap().errors.is_empty());
        // Nothing is pinned any more: the buffer could be freed.
    }
    driver.free(gpa).await.unwrap();
    stop.cancel();
    load.await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_is_the_owners_own() {
    let server = server().await;
    let driver = Driver::open(&server, 0).await;
    let gpa = driver.buffer(2 << 20).await;
    let read = |owner, gpa, size_bytes| pb::MemoryReadRequest { owner, gpa, size_bytes };
    let mut memory = driver.memory();
    assert_eq!(refused(memory.read(read(None, gpa, 0)).await), "INVALID_RANGE");
    assert_eq!(refused(memory.read(read(None, gpa + (2 << 20), 1)).await), "NOT_OWNED");
    assert_eq!(refused(memory.read(read(Some(owner(1)), gpa, 1)).await), "NOT_YOURS");
    assert_eq!(refused(memory.read(read(None, gpa, 3 << 20)).await), "LIMIT_REACHED");
    // Bulk, both ways.
    let pieces: Vec<pb::MemoryWriteRequest> = (0..8_u64)
        .map(|piece| pb::MemoryWriteRequest {
            owner: None,
            gpa: gpa + piece * (256 << 10),
            data: Bytes::from(vec![piece as u8; 256 << 10]),
        })
        .collect();
    let written = memory.write_bulk(tokio_stream::iter(pieces)).await.unwrap().into_inner();
    assert_eq!(written.written_bytes, 2 << 20);
    let mut bulk = memory.read_bulk(read(None, gpa, 2 << 20)).await.unwrap().into_inner();
    let mut seen = 0_usize;
    while let Some(piece) = bulk.next().await {
        for byte in piece.unwrap().data {
            assert_eq!(usize::from(byte), seen / (256 << 10));
            seen += 1;
        }
    }
    assert_eq!(seen, 2 << 20);
    let operator = operator(&server).await;
    let mut by_operator = iommu_proto::pb::memory_service_client::MemoryServiceClient::new(operator.clone());
    assert_eq!(refused(by_operator.read(read(None, gpa, 1)).await), "INVALID_FIELD");
    assert_eq!(refused(by_operator.read(read(Some(owner(99)), gpa, 1)).await), "UNKNOWN_OWNER");
    let seen = by_operator.read(read(Some(owner(0)), gpa + (256 << 10), 1)).await.unwrap().into_inner();
    assert_eq!(seen.data[..], [1]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i7_one_owner_cannot_take_all_mapping_records() {
    let server = server_with(|args| args.memory = Some("16MiB".to_owned())).await;
    let driver = Driver::open(&server, 0).await;
    let gpa = driver.buffer(PAGE).await;
    let (up, requests) = tokio::sync::mpsc::channel(8);
    let requests = tokio_stream::wrappers::ReceiverStream::new(requests);
    let mut answers = driver.client().dma_stream(requests).await.unwrap().into_inner();
    let limited = async {
        loop {
            up.send(map_batch(driver.header(), vec![gpa; 1024])).await.unwrap();
            let answer = answers.message().await.unwrap().unwrap();
            if let Some(error) = answer.errors.first() {
                return error.reason.clone();
            }
        }
    };
    assert_eq!(limited.await, "LIMIT_REACHED");
    let other = Driver::open(&server, 1).await;
    let gpa = other.buffer(PAGE).await;
    other.map(ENGINE1, gpa, PAGE).await.unwrap();
}
