//! A driver against a scripted server: retries, resuming, typed errors, leaks, streams.

mod support;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use guest_sdk::{
    Access, AccessWidth, Connection, Direction, Driver, FaultFilter, Gpa, GpaRange, Interrupt,
    InterruptEvent, Iova, Owner, SdkError, TransportError, errors,
};
use iommu_proto::errors::WireError;
use iommu_proto::model::operation_error;
use iommu_proto::pb;
use iommu_types::{AddressType, Fault, FaultReason, FaultRecord, TranslationFault};
use support::{BATCH_BYTES_MAX, Fake, soon};
use tonic::Status;

fn device() -> iommu_types::DeviceAddress {
    "0000:00:05.0".parse().unwrap()
}

fn range() -> GpaRange {
    GpaRange::new(Gpa::new(0x1234), 100).unwrap()
}

async fn map(driver: &Driver) -> Result<guest_sdk::DmaMapping, SdkError<errors::DmaMapError>> {
    driver.dma_map_single(&driver.device(device()), range(), Direction::ToDevice).await
}

fn lost() -> Status {
    Status::unavailable("the connection is lost")
}

#[tokio::test]
async fn a_retry_has_the_same_request_id_and_comes_back_with_the_resume_token() {
    let fake = Fake::default();
    let driver = fake.driver().await;
    fake.fail("dma_map", lost())
        .fail("dma_map", lost())
        .answer("dma_map", pb::DmaMapResponse { iova: 0x9234 });
    let mapping = soon("the mapping", map(&driver)).await.unwrap();
    assert_eq!((mapping.iova(), mapping.size_bytes()), (Iova::new(0x9234), 100));
    assert_eq!(fake.calls("dma_map"), [1, 1, 1]);
    let tokens = fake.state().opens.iter().map(|open| open.resume_token.to_vec()).collect::<Vec<_>>();
    assert_eq!(tokens, [vec![], vec![1; 16], vec![2; 16]]);
    assert_eq!(driver.generation().0, 3);
    mapping.leave_mapped();
}

#[tokio::test]
async fn a_session_that_the_server_lost_is_opened_again_by_itself() {
    let fake = Fake::default();
    let driver = fake.driver().await;
    fake.lose_sessions();
    fake.answer("dma_map", pb::DmaMapResponse { iova: 0x9234 });
    soon("the mapping", map(&driver)).await.unwrap().leave_mapped();
    assert_eq!(fake.state().opens.len(), 2);
    fake.lose_sessions();
    // Two calls see one loss: one of them opens again.
    fake.answer("mmio_read", pb::MmioReadResponse { value: 1 })
        .answer("mmio_read", pb::MmioReadResponse { value: 1 });
    let handle = driver.device(device());
    let (first, second) = soon("both", async { tokio::join!(handle.read32(0), handle.read32(4)) }).await;
    assert_eq!((first.unwrap(), second.unwrap()), (1, 1));
    assert_eq!(fake.state().opens.len(), 3);
}

#[tokio::test]
async fn what_the_server_has_reclaimed_is_told_and_not_papered_over() {
    let fake = Fake::default();
    let driver = fake.driver().await;
    fake.state().forgets_state = true;
    fake.lose_sessions();
    for _ in 0..2 {
        let ended = soon("the end", map(&driver)).await.unwrap_err();
        assert_eq!(ended, SdkError::Transport(TransportError::StateLost));
    }
}

#[tokio::test]
async fn request_ids_go_up_and_the_watermark_follows_the_answers() {
    let fake = Fake::default();
    let driver = fake.driver().await;
    for number in 0..6 {
        fake.answer("dma_map", pb::DmaMapResponse { iova: 0x1000 * number });
        map(&driver).await.unwrap().leave_mapped();
    }
    assert_eq!(fake.calls("dma_map"), [1, 2, 3, 4, 5, 6]);
    assert_eq!(fake.state().acknowledged, [0, 1, 2, 3, 4, 5]);
}

#[tokio::test]
async fn refusals_are_the_enums_of_their_operations() {
    let fake = Fake::default();
    let driver = fake.driver().await;
    let handle = driver.device(device());

    let not_owned = errors::NotOwned { gpa: Gpa::new(0x1234) };
    fake.refuse("dma_map", not_owned.clone());
    assert_eq!(map(&driver).await.unwrap_err(), SdkError::Refused(not_owned.into()));

    let refused =
        errors::MmioRefused { device: device(), offset: 8, why: "there is no register at 0x8".into() };
    fake.refuse("mmio_write", refused.clone());
    assert_eq!(handle.write32(8, 1).await.unwrap_err(), SdkError::Refused(refused.into()));

    let old = errors::RequestTooOld { request_id: 1, oldest: 5 };
    fake.refuse("dma_map", old.clone());
    assert_eq!(map(&driver).await.unwrap_err(), SdkError::Call(old.into()));

    fake.fail("dma_map", Status::internal("no details"));
    let status = map(&driver).await.unwrap_err();
    assert!(matches!(status, SdkError::Transport(TransportError::Status { .. })), "{status:?}");

    let fenced = errors::SessionFenced { by_generation: 9 };
    fake.refuse("dma_map", fenced.clone());
    assert_eq!(map(&driver).await.unwrap_err(), SdkError::Call(fenced.into()));
}

#[tokio::test]
async fn a_register_write_without_an_answer_is_not_made_twice() {
    let fake = Fake::default();
    let driver = fake.driver().await;
    let handle = driver.device(device());
    fake.fail("mmio_write", lost());
    let ended = handle.write32(0, 1).await.unwrap_err();
    assert!(matches!(ended, SdkError::Transport(TransportError::Status { .. })), "{ended:?}");
    assert_eq!(fake.calls("mmio_write").len(), 1);
    // One that the server has not even looked at is.
    fake.lose_sessions();
    fake.answer("mmio_write", pb::MmioWriteResponse {});
    handle.write32(0, 1).await.unwrap();
    assert_eq!(fake.calls("mmio_write").len(), 2);
}

#[tokio::test]
async fn an_answer_that_is_wider_than_the_register_is_not_believed() {
    let fake = Fake::default();
    let driver = fake.driver().await;
    fake.answer("mmio_read", pb::MmioReadResponse { value: 0x100 });
    let ended = driver.device(device()).read(0, 0, AccessWidth::Bytes1).await.unwrap_err();
    assert!(matches!(ended, SdkError::Transport(TransportError::BadAnswer(_))), "{ended:?}");
}

#[tokio::test]
async fn the_deadline_covers_the_retries_and_names_the_last_failure() {
    let fake = Fake::default();
    let connection = Connection::to(fake.start().await).deadline(Duration::from_millis(200));
    let driver = connection.driver("net-driver", Owner::Driver(1)).await.unwrap();
    for _ in 0..100 {
        fake.fail("dma_map", lost());
    }
    match map(&driver).await.unwrap_err() {
        SdkError::Transport(TransportError::Deadline { last: Some(last), .. }) => {
            assert!(last.contains("the connection is lost"), "{last}");
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_mapping_that_is_dropped_is_a_leak_and_one_that_is_unmapped_is_not() {
    let fake = Fake::default();
    let driver = fake.driver().await;
    let reports = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&reports);
    assert!(driver.on_leak(move |leak| seen.lock().unwrap().push(leak)));
    fake.answer("dma_map", pb::DmaMapResponse { iova: 0x1234 })
        .answer("dma_map", pb::DmaMapResponse { iova: 0x2234 });
    let (leaked, unmapped) = (map(&driver).await.unwrap(), map(&driver).await.unwrap());
    fake.answer("dma_unmap", pb::DmaUnmapResponse {});
    unmapped.unmap().await.unwrap();
    assert_eq!(driver.leaked_mappings(), 0);
    drop(leaked);
    assert_eq!(driver.leaked_mappings(), 1);
    let reports = reports.lock().unwrap();
    assert_eq!((reports.len(), reports[0].iova, reports[0].device), (1, Iova::new(0x1234), device()));
}

#[tokio::test]
async fn a_buffer_that_is_still_mapped_comes_back_from_free() {
    let fake = Fake::default();
    let driver = fake.driver().await;
    fake.answer("allocate_buffer", pb::AllocateBufferResponse { gpa: 0x4000, size_bytes: 4096 });
    let buffer = driver.allocate(100).await.unwrap();
    let still = errors::StillMapped { gpa: Gpa::new(0x4000) };
    fake.refuse("free_buffer", still.clone());
    let (buffer, error) = buffer.free().await.unwrap_err();
    assert_eq!(error, SdkError::Refused(still.into()));
    fake.answer("free_buffer", pb::FreeBufferResponse {});
    buffer.free().await.unwrap();
    assert_eq!(fake.calls("free_buffer"), [2, 3]);
}

#[tokio::test]
async fn memory_of_any_size_goes_over_one_message_or_a_stream() {
    let fake = Fake::default();
    fake.state().memory = vec![0; 0x10000];
    let driver = fake.driver().await;
    fake.answer("allocate_buffer", pb::AllocateBufferResponse { gpa: 0x4000, size_bytes: 0x4000 });
    let buffer = driver.allocate(0x4000).await.unwrap();
    for size in [1, BATCH_BYTES_MAX as usize, BATCH_BYTES_MAX as usize + 1, 5000] {
        let data = (0..size).map(|index| (index * 7) as u8).collect::<Vec<_>>();
        buffer.write(3, data.clone()).await.unwrap();
        assert_eq!(buffer.read(3, size as u64).await.unwrap(), data, "{size} bytes");
    }
    let (one, bulk) = (fake.calls("write").len(), fake.calls("write_bulk").len());
    assert_eq!((one, bulk), (2, 2));
}

#[tokio::test]
async fn a_dma_stream_goes_on_over_a_lost_connection_with_the_same_request_ids() {
    let fake = Fake::default();
    let driver = fake.driver().await;
    fake.state().stream_breaks = 1;
    let stream = driver.dma_stream(&driver.device(device()));
    let ranges = [0x1000, 0x3000].map(|gpa| GpaRange::new(Gpa::new(gpa), 64).unwrap());
    let first = stream.map(&ranges, Direction::FromDevice).await.unwrap();
    let second = stream.map(&ranges[..1], Direction::FromDevice).await.unwrap();
    let mapped = soon("the first batch", first).await.unwrap();
    assert_eq!(mapped, [Ok(Iova::new(0x1000_1000)), Ok(Iova::new(0x1000_3000))]);
    assert_eq!(soon("the second batch", second).await.unwrap(), [Ok(Iova::new(0x1000_1000))]);
    let batches = fake.calls("dma_stream_batch");
    assert!(batches.starts_with(&[1]) && batches.ends_with(&[1, 2]), "{batches:?}");

    let unknown = errors::NotMapped { iova: Iova::new(0x5000) };
    fake.state().stream_errors = vec![operation_error(1, &unknown)];
    let unmaps = [(Iova::new(0x1000_1000), 64), (Iova::new(0x5000), 64)];
    let ticket = stream.unmap(&unmaps, Direction::FromDevice).await.unwrap();
    let outcome = soon("the unmaps", ticket).await.unwrap();
    assert_eq!(outcome, [Ok(()), Err(unknown.into())]);

    let too_many = stream.unmap(&[(Iova::new(0), 64); 9], Direction::FromDevice).await.unwrap_err();
    assert!(matches!(too_many, SdkError::Call(errors::CallError::LimitReached(_))), "{too_many:?}");
}

#[tokio::test]
async fn interrupts_are_watched_from_the_first_message_on_and_a_gap_is_told() {
    let raised = |vector| pb::WatchInterruptsResponse {
        interrupts: vec![pb::Interrupt { device: Some(device().into()), vector, destination: 0, count: 1 }],
    };
    let stands = || Ok(pb::WatchInterruptsResponse::default());
    let fake = Fake::default();
    let driver = fake.driver().await;
    fake.state().interrupts =
        [vec![stands(), Ok(raised(0x41)), Err(lost())], vec![stands(), Ok(raised(0x42))]].into();
    let mut interrupts = driver.watch_interrupts().await.unwrap();
    let event =
        |vector| InterruptEvent::Raised(Interrupt { device: device(), vector, destination: 0, count: 1 });
    for expected in [event(0x41), InterruptEvent::Gap, event(0x42)] {
        assert_eq!(soon("an event", interrupts.next()).await.unwrap().unwrap(), expected);
    }
}

#[tokio::test]
async fn faults_are_watched_on_from_the_last_token() {
    let record = |sequence| FaultRecord {
        sequence,
        at_unix_ms: 1,
        owner: Some(Owner::Driver(1)),
        device: device(),
        domain_id: None,
        fault: Fault::Dma(TranslationFault {
            source_id: device().source_id,
            pasid: None,
            iova: Iova::new(0x1000),
            access: Access::Read,
            address_type: AddressType::Untranslated,
            reason: FaultReason::READ_DENIED,
        }),
        collapsed_count: 0,
    };
    let message = |sequences: &[u64], token: &str| {
        Ok(pb::WatchFaultsResponse {
            records: sequences.iter().map(|&sequence| record(sequence).into()).collect(),
            missed_count: 0,
            resume_token: token.into(),
        })
    };
    let fake = Fake::default();
    let driver = fake.driver().await;
    fake.state().faults = [
        vec![message(&[], "t0"), message(&[1, 2], "t2"), Err(lost())],
        vec![
            message(&[], "t2"),
            message(&[3], "t3"),
            Err(errors::BadResumeToken { token: "t3".into() }.into_status()),
        ],
    ]
    .into();
    let mut faults = driver.faults().watch(FaultFilter::default(), "t0").await.unwrap();
    for expected in [vec![1, 2], vec![3]] {
        let new = soon("faults", faults.next()).await.unwrap().unwrap();
        assert_eq!(new.records.iter().map(|record| record.sequence).collect::<Vec<_>>(), expected);
    }
    let end = soon("the end", faults.next()).await.unwrap().unwrap_err();
    assert!(matches!(end, SdkError::Call(errors::CallError::BadResumeToken(_))), "{end:?}");
    assert!(faults.next().await.is_none());
    assert_eq!(fake.state().fault_tokens, ["t0", "t2"]);
}

#[tokio::test]
async fn a_refused_identity_and_an_absent_server_are_told_apart() {
    let fake = Fake::default();
    let refused = errors::IdentityRefused { name: "nobody".into(), why: "not in the configuration".into() };
    fake.state().open_refusals.push_back(refused.clone().into_status());
    let opened = Connection::to(fake.start().await).observer("nobody").await.unwrap_err();
    assert_eq!(opened, SdkError::Refused(refused.into()));
    let absent = Connection::to("unix:///nonexistent/iommu.sock").observer("anybody").await.unwrap_err();
    assert!(matches!(absent, SdkError::Transport(TransportError::Unreachable { .. })), "{absent:?}");
    let bad = Connection::to("ftp://host").observer("anybody").await.unwrap_err();
    assert!(matches!(bad, SdkError::Transport(TransportError::BadEndpoint { .. })), "{bad:?}");
}
