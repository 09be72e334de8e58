//! Client sessions: who may open one, what outlives a lost connection, and what is reclaimed.

mod support;

use std::time::Duration;

use bytes::Bytes;
use iommu_proto::pb;
use support::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i8_a_session_is_checked_against_the_configuration() {
    let server = server().await;
    let cases = [
        (
            pb::OpenRequest { schema_version: 7, ..open_request("driver0", driver_role(0)) },
            "VERSION_MISMATCH",
        ),
        (open_request("driver0", driver_role(1)), "IDENTITY_REFUSED"),
        (open_request("nobody", driver_role(0)), "IDENTITY_REFUSED"),
        (open_request("driver9", driver_role(9)), "IDENTITY_REFUSED"),
        (open_request("no spaces", driver_role(0)), "INVALID_FIELD"),
        (pb::OpenRequest { role: None, ..open_request("driver0", driver_role(0)) }, "INVALID_FIELD"),
        (
            pb::OpenRequest {
                resume_token: Bytes::from_static(&[1; 3]),
                ..open_request("driver0", driver_role(0))
            },
            "INVALID_FIELD",
        ),
        (
            pb::OpenRequest {
                resume_token: Bytes::from_static(&[1; 16]),
                ..open_request("driver0", driver_role(0))
            },
            "BAD_RESUME_TOKEN",
        ),
    ];
    for (request, expected) in cases {
        let channel = connect(&server).await;
        assert_eq!(refused(open(&channel, request.clone()).await), expected, "{request:?}");
        // A refused identity leaves the connection free to say who it really is.
        open(&channel, open_request("driver3", driver_role(3))).await.unwrap();
        assert_eq!(refused(open(&channel, open_request("driver3", driver_role(3))).await), "SESSION_EXISTS");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn roles_are_checked_in_every_service() {
    let server = server().await;
    let nobody = connect(&server).await;
    let observer = observer(&server).await;
    let driver = Driver::open(&server, 0).await;
    let declare = pb::DeclareDriverRequest { owner: Some(owner(9)), name: "x".to_owned() };
    assert_eq!(refused(admin(&nobody).declare_driver(declare.clone()).await), "SESSION_REQUIRED");
    assert_eq!(refused(admin(&observer).declare_driver(declare.clone()).await), "ROLE_REFUSED");
    assert_eq!(refused(admin(&driver.channel).declare_driver(declare).await), "ROLE_REFUSED");
    assert!(inspect(&observer).get_topology(pb::GetTopologyRequest {}).await.is_ok());
    let read = pb::MemoryReadRequest { owner: Some(owner(0)), gpa: PAGE, size_bytes: 1 };
    let mut memory = iommu_proto::pb::memory_service_client::MemoryServiceClient::new(observer.clone());
    assert_eq!(refused(memory.read(read).await), "ROLE_REFUSED");
    let mut drivers = iommu_proto::pb::driver_service_client::DriverServiceClient::new(observer);
    let allocate = pb::AllocateBufferRequest { header: driver.header(), size_bytes: 1 };
    assert_eq!(refused(drivers.allocate_buffer(allocate).await), "ROLE_REFUSED");
    let mut machines =
        iommu_proto::pb::bare_machine_service_client::BareMachineServiceClient::new(driver.channel.clone());
    assert_eq!(refused(machines.list(pb::ListMachinesRequest {}).await), "ROLE_REFUSED");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_comes_back_in_time_has_everything_again() {
    let server = server_with(|args| args.grace = Some("10s".to_owned())).await;
    let (driver, mut agent, gpa, iova) = mapped(&server, 1).await;
    driver.write(gpa, b"kept").await;
    let retry = pb::AllocateBufferRequest { header: driver.header(), size_bytes: PAGE };
    let before = driver.client().allocate_buffer(retry).await.unwrap().into_inner();
    let token = driver.opened.resume_token.clone();
    assert_eq!((token.len(), driver.opened.resumed), (16, false));
    drop(driver);
    let channel = connect(&server).await;
    let request = pb::OpenRequest { resume_token: token, ..open_request("driver0", driver_role(0)) };
    let opened = open(&channel, request).await.unwrap();
    assert!(opened.resumed && opened.generation == 2);
    let driver = Driver::on(channel, opened);
    assert_eq!(driver.read(gpa, 4).await, "kept");
    assert_eq!(agent.read(iova, 4).await.unwrap(), "kept");
    assert_eq!(
        driver.client().allocate_buffer(retry).await.unwrap().into_inner(),
        before,
        "a retry over the gap"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_nobody_comes_back_for_is_reclaimed_after_the_grace() {
    let server = server().await;
    let operator = operator(&server).await;
    let free_before = topology(&operator).await.memory_free_bytes;
    let (driver, mut agent, gpa, iova) = mapped(&server, 64).await;
    let strict = pb::DomainOptions { protection: pb::Protection::Strict.into(), ..Default::default() };
    let domain_id = driver.create_domain(strict).await.unwrap();
    driver.attach(ENGINE0, Some(domain_id)).await.unwrap();
    let map = pb::MapRequest {
        header: driver.header(),
        domain_id,
        iova: 0x40_0000,
        gpa,
        size_bytes: 64 * PAGE,
        permissions: Some(pb::Permissions { read: true, write: false }),
    };
    driver.client().map(map).await.unwrap();
    assert!(agent.read(0x40_0000, 64).await.is_ok());
    drop(driver);
    eventually("everything is free again", async || {
        let topology = topology(&operator).await;
        let owner = topology.owners.iter().find(|state| state.owner == Some(owner(0))).unwrap();
        owner.memory_bytes == 0 && owner.mappings == 0 && owner.domain_ids.len() == 1 && !owner.connected
    })
    .await;
    let state = device_state(&operator, ENGINE0).await;
    assert_eq!(state.owner, Some(owner(0)), "assignments stay");
    assert_ne!(state.domain_id, Some(domain_id));
    while agent.receive().await.is_ok_and(|message| !matches!(message, Down::Reset(_))) {}
    assert!(agent.read(iova, 8).await.is_err() && agent.read(0x40_0000, 8).await.is_err());
    let kept = free_before - topology(&operator).await.memory_free_bytes;
    assert!(
        kept <= 4 * PAGE,
        "{kept} bytes: all but the tables of the default domain, which stay for the next driver"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn opening_afresh_fences_and_reclaims_at_once() {
    let server = server_with(|args| args.grace = Some("1h".to_owned())).await;
    let (first, mut agent, _, iova) = mapped(&server, 1).await;
    let mut watch =
        first.client().watch_interrupts(pb::WatchInterruptsRequest {}).await.unwrap().into_inner();
    watch.message().await.unwrap();
    let second = Driver::open(&server, 0).await;
    assert_eq!(second.opened.generation, 2);
    let ended = tokio::time::timeout(Duration::from_secs(5), watch.message()).await.expect("streams end");
    assert_eq!(refused(ended), "SESSION_FENCED");
    let allocate = pb::AllocateBufferRequest { header: first.header(), size_bytes: 1 };
    assert_eq!(refused(first.client().allocate_buffer(allocate).await), "SESSION_FENCED");
    assert!(matches!(agent.receive().await.unwrap(), Down::Reset(_)));
    assert!(agent.read(iova, 8).await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i8_a_message_that_a_fenced_session_kept_back_changes_nothing() {
    let server = server().await;
    let first = Driver::open(&server, 0).await;
    let gpa = first.buffer(PAGE).await;
    let (up, messages) = tokio::sync::mpsc::channel(8);
    let messages = tokio_stream::wrappers::ReceiverStream::new(messages);
    let mut memory = first.memory();
    let bulk = tokio::spawn(async move { memory.write_bulk(messages).await });
    let write = |byte| pb::MemoryWriteRequest { owner: None, gpa, data: vec![byte; 8].into() };
    up.send(write(1)).await.unwrap();
    eventually("the first write is there", async || first.read(gpa, 8).await[0] == 1).await;
    let channel = connect(&server).await;
    let mut request = open_request("driver0", driver_role(0));
    request.resume_token = first.opened.resume_token.clone();
    let opened = open(&channel, request).await.unwrap();
    let second = Driver::on(channel, opened);
    // The stream may be gone already.
    let _gone = up.send(write(2)).await;
    assert_eq!(refused(bulk.await.unwrap()), "SESSION_FENCED");
    assert_eq!(second.read(gpa, 8).await[0], 1);
}
