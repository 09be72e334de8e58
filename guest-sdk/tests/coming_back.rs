//! Coming back after a lost connection, and calls whose future is dropped half-way.

mod support;

use std::time::Duration;

use guest_sdk::{Connection, Direction, FaultFilter, Gpa, GpaRange, SdkError, TransportError, errors};
use iommu_proto::errors::WireError;
use iommu_proto::pb;
use support::{Fake, soon};

#[tokio::test]
async fn an_observer_comes_back_though_it_has_nothing_to_resume() {
    let fake = Fake::default();
    // As the server does for those who hold nothing.
    fake.state().forgets_state = true;
    let connection = Connection::to(fake.start().await).deadline(Duration::from_secs(5));
    let observer = connection.observer("watcher").await.expect("the fake opens sessions");
    fake.lose_sessions();
    fake.answer("list", pb::ListFaultsResponse::default());
    let filter = FaultFilter { owner: None, device: None };
    soon("the list", observer.faults().list(filter, 0)).await.expect("the session is opened again");
    assert!(fake.state().opens.iter().all(|open| open.resume_token.is_empty()));
}

#[tokio::test]
async fn a_token_that_the_server_does_not_know_any_more_is_lost_state() {
    let fake = Fake::default();
    let driver = fake.driver().await;
    let unknown = errors::BadResumeToken { token: "01010101...".into() };
    fake.state().open_refusals.push_back(unknown.into_status());
    fake.lose_sessions();
    let refused = soon("an end", driver.allocate(4096)).await.expect_err("what it held is gone");
    assert_eq!(refused, SdkError::Transport(TransportError::StateLost));
}

#[tokio::test]
async fn a_refused_identity_says_nothing_about_the_token() {
    let fake = Fake::default();
    let driver = fake.driver().await;
    let refused =
        errors::IdentityRefused { name: "net-driver".into(), why: "the certificate is for iommuctl".into() };
    fake.state().open_refusals.push_back(refused.clone().into_status());
    fake.lose_sessions();
    let told = soon("an end", driver.allocate(4096)).await.expect_err("it is not opened");
    assert_eq!(told, SdkError::Transport(TransportError::SessionRefused(refused.into())));
    // Once it is admitted again it comes back to what it has.
    fake.answer("allocate_buffer", pb::AllocateBufferResponse { gpa: 0x1000, size_bytes: 4096 });
    soon("an answer", driver.allocate(4096)).await.expect("the session goes on");
    assert!(fake.state().opens.last().is_some_and(|open| open.resume_token == vec![1; 16]));
}

#[tokio::test]
async fn an_unmap_that_is_dropped_before_its_answer_is_a_leak() {
    let fake = Fake::default();
    let driver = fake.driver().await;
    let memory = GpaRange::new(Gpa::new(0x1000), 64).expect("a range");
    let device = driver.device("00:05.0".parse().expect("an address"));
    fake.answer("dma_map", pb::DmaMapResponse { iova: 0x1000 });
    let mapping = driver.dma_map_single(&device, memory, Direction::ToDevice).await.expect("it is mapped");
    fake.answer("dma_unmap", pb::DmaUnmapResponse {});
    {
        let unmap = mapping.unmap();
        tokio::pin!(unmap);
        tokio::select! {
            biased;
            _ = &mut unmap => panic!("an answer takes a round trip"),
            () = std::future::ready(()) => {}
        }
    }
    assert_eq!(driver.leaked_mappings(), 1);
}
