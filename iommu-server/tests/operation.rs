//! Operation: what operators do and see, bare machines' registers, faults that are watched, and how the server behaves as a server.

mod support;

use std::time::{Duration, Instant};

use bytes::Bytes;
use iommu_proto::pb;
use iommu_server::drain::Drained;
use support::*;
use tonic::transport::Endpoint;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn devices_are_declared_given_detached_and_removed() {
    let server = server().await;
    let operator = operator(&server).await;
    let mut admin = admin(&operator);
    let declare = |source, name: &str, owner| pb::DeclareDeviceRequest {
        device: Some(device(source)),
        name: name.to_owned(),
        owner,
        function: None,
    };
    assert_eq!(refused(admin.declare_device(declare(ENGINE0, "x", None)).await), "DEVICE_EXISTS");
    assert_eq!(refused(admin.declare_device(declare(0x40, "x", Some(owner(77)))).await), "UNKNOWN_OWNER");
    assert_eq!(refused(admin.declare_device(declare(0x40, "a b", None)).await), "INVALID_FIELD");
    let driver = pb::DeclareDriverRequest { owner: Some(owner(9)), name: "driver9".to_owned() };
    admin.declare_driver(driver.clone()).await.unwrap();
    assert_eq!(refused(admin.declare_driver(driver).await), "INVALID_FIELD");
    admin.declare_device(declare(0x40, "engine7", Some(owner(9)))).await.unwrap();
    let driver = Driver::open(&server, 9).await;
    let gpa = driver.buffer(PAGE).await;
    let iova = driver.map(0x40, gpa, PAGE).await.unwrap();
    let mut agent = Agent::attach(&server, 0x40).await;
    assert!(agent.read(iova, 8).await.is_ok());
    let detach = pb::DetachRequest { device: Some(device(0x40)) };
    admin.detach(detach).await.unwrap();
    assert_eq!(agent.read(iova, 8).await, Err(2));
    assert_eq!(refused(admin.detach(detach).await), "NOT_ATTACHED");
    let give = |source, number, domain_id| pb::AttachToOwnerRequest {
        device: Some(device(source)),
        owner: Some(owner(number)),
        domain_id,
    };
    admin.attach_to_owner(give(0x40, 9, None)).await.unwrap();
    assert!(agent.read(iova, 8).await.is_ok(), "its mappings were kept");
    // Given to another, it finds nothing there, and comes back to nothing.
    let given = admin.attach_to_owner(give(0x40, 1, None)).await.unwrap().into_inner();
    assert!(agent.read(iova, 8).await.is_err());
    assert_eq!(refused(driver.map(0x40, gpa, PAGE).await), "NOT_YOURS");
    assert_eq!(refused(admin.attach_to_owner(give(0x40, 9, Some(given.domain_id))).await), "NOT_YOURS");
    assert_eq!(refused(admin.attach_to_owner(give(0x99, 9, None)).await), "UNKNOWN_DEVICE");
    assert_eq!(refused(admin.attach_to_owner(give(0x40, 55, None)).await), "UNKNOWN_OWNER");
    admin.attach_to_owner(give(0x40, 9, None)).await.unwrap();
    assert!(agent.read(iova, 8).await.is_err());
    let remove = pb::RemoveDeviceRequest { device: Some(device(0x40)) };
    admin.remove_device(remove).await.unwrap();
    assert_eq!(agent.ending().await, "UNKNOWN_DEVICE");
    assert_eq!(refused(admin.remove_device(remove).await), "UNKNOWN_DEVICE");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn quarantine_ends_sessions_and_reclaims_without_grace() {
    let server = server_with(|args| args.grace = Some("1h".to_owned())).await;
    let operator = operator(&server).await;
    let (driver, mut agent, _, _) = mapped(&server, 1).await;
    let peer = |peer| pb::QuarantineRequest { peer: Some(peer) };
    let of_device = peer(pb::quarantine_request::Peer::Device(device(ENGINE0)));
    let of_owner = peer(pb::quarantine_request::Peer::Owner(owner(0)));
    assert!(admin(&operator).quarantine(of_device).await.unwrap().into_inner().ended);
    assert_eq!(agent.ending().await, "SESSION_FENCED");
    assert!(admin(&operator).quarantine(of_owner).await.unwrap().into_inner().ended);
    let allocate = pb::AllocateBufferRequest { header: driver.header(), size_bytes: 1 };
    assert_eq!(refused(driver.client().allocate_buffer(allocate).await), "SESSION_FENCED");
    let owners = topology(&operator).await.owners;
    assert_eq!(owners[0].memory_bytes, 0);
    assert!(!admin(&operator).quarantine(of_device).await.unwrap().into_inner().ended);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn faults_are_watched_and_a_token_goes_on_where_it_ended() {
    let server = server().await;
    let driver = Driver::open(&server, 0).await;
    let mut agent = Agent::attach(&server, ENGINE0).await;
    let mut stranger = Agent::attach(&server, ENGINE1).await;
    let watch =
        |resume_token: &str| pb::WatchFaultsRequest { filter: None, resume_token: resume_token.to_owned() };
    let mut stream = faults(&driver.channel).watch(watch("")).await.unwrap().into_inner();
    let first = stream.message().await.unwrap().unwrap();
    assert!(first.records.is_empty());
    stranger.read(0x5000, 4).await.unwrap_err();
    agent.read(0x6000, 4).await.unwrap_err();
    let told = stream.message().await.unwrap().unwrap();
    assert_eq!(told.records.len(), 1, "not the stranger's");
    let record = &told.records[0];
    assert_eq!((record.device, record.sequence), (Some(device(ENGINE0)), 1));
    agent.read(0x7000, 4).await.unwrap_err();
    // From the first token on: both. From the second: one.
    for (token, count) in [(&first.resume_token, 2), (&told.resume_token, 1)] {
        let mut again = faults(&driver.channel).watch(watch(token)).await.unwrap().into_inner();
        assert!(again.message().await.unwrap().unwrap().records.is_empty());
        assert_eq!(again.message().await.unwrap().unwrap().records.len(), count);
    }
    for token in ["nonsense", "0;driver:0=1", &format!("{}9", told.resume_token)] {
        assert_eq!(refused(faults(&driver.channel).watch(watch(token)).await), "BAD_RESUME_TOKEN", "{token}");
    }
    let others = Some(pb::FaultFilter { owner: Some(owner(1)), device: None });
    let list = pb::ListFaultsRequest { filter: others, limit: 0 };
    assert_eq!(refused(faults(&driver.channel).list(list).await), "NOT_YOURS");
    let observer = observer(&server).await;
    assert_eq!(faults(&observer).list(list).await.unwrap().into_inner().records.len(), 1);
    let newest = pb::ListFaultsRequest { filter: None, limit: 1 };
    let newest = faults(&driver.channel).list(newest).await.unwrap().into_inner();
    assert_eq!(newest.records[0].sequence, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i7_one_tenants_faults_do_not_hide_anothers() {
    let server = server().await;
    let victim = Driver::open(&server, 1).await;
    let mut noisy = Agent::attach(&server, ENGINE0).await;
    let mut quiet = Agent::attach(&server, ENGINE1).await;
    quiet.read(0x1234_5000, 4).await.unwrap_err();
    for round in 0..40_u64 {
        noisy.batch(read_batch(&vec![round << 20; 100], 4)).await;
    }
    let list = faults(&victim.channel).list(pb::ListFaultsRequest::default()).await.unwrap().into_inner();
    assert_eq!((list.records.len(), list.overwritten_count), (1, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_access_is_explained_and_only_operators_see_physical_addresses() {
    let server = server().await;
    let (driver, mut agent, _, iova) = mapped(&server, 1).await;
    agent.read(iova, 8).await.unwrap();
    let explain = |source, iova| pb::ExplainRequest {
        device: Some(device(source)),
        pasid: None,
        iova,
        access: pb::Access::Read.into(),
        size_bytes: 8,
    };
    let observer = observer(&server).await;
    let full = inspect(&observer).explain(explain(ENGINE0, iova)).await.unwrap().into_inner();
    assert!(full.steps.len() >= 6 && full.steps.iter().any(|step| step.hpa != 0));
    let Some(pb::explain_response::Outcome::Translated(translation)) = full.outcome else {
        panic!("{full:?}")
    };
    assert_ne!(translation.hpa, 0);
    let own = inspect(&driver.channel).explain(explain(ENGINE0, iova)).await.unwrap().into_inner();
    assert!(own.steps.iter().all(|step| step.hpa == 0));
    assert!(matches!(own.outcome, Some(pb::explain_response::Outcome::Translated(t)) if t.hpa == 0));
    assert_eq!(refused(inspect(&driver.channel).explain(explain(ENGINE1, iova)).await), "NOT_YOURS");
    assert_eq!(refused(inspect(&observer).explain(explain(0x99, iova)).await), "UNKNOWN_DEVICE");
    let dump = pb::DumpTablesRequest { device: Some(device(ENGINE0)), without_page_tables: false };
    let mut dumped = inspect(&observer).dump_tables(dump).await.unwrap().into_inner();
    let mut entries = Vec::new();
    while let Some(message) = dumped.message().await.unwrap() {
        entries.extend(message.entries);
    }
    assert_eq!(entries.iter().filter(|entry| entry.level == 1).count(), 1);
    assert_eq!(entries.last().unwrap().iova, Some(iova));
    let iotlb = inspect(&observer).dump_iotlb(pb::DumpIotlbRequest::default()).await.unwrap().into_inner();
    assert!(iotlb.entries.iter().any(|entry| entry.iova == iova && entry.hpa == translation.hpa & !0xfff));
    let state = device_state(&observer, ENGINE0).await;
    let mappings =
        pb::ListMappingsRequest { domain_id: state.domain_id.unwrap(), from_iova: 0, skip: 0, limit: 0 };
    let mappings = inspect(&driver.channel).list_mappings(mappings).await.unwrap().into_inner();
    assert_eq!((mappings.mappings[0].iova, mappings.next_iova), (iova, None));
    let counters = inspect(&observer).get_counters(pb::GetCountersRequest { segment: None }).await.unwrap();
    assert_eq!(counters.into_inner().iotlb.unwrap().misses, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_ends_idle_streams_within_the_deadline() {
    let server = server().await;
    let driver = Driver::open(&server, 0).await;
    let mut agent = Agent::attach(&server, ENGINE0).await;
    let mut silent = Agent::silent(&server).await;
    let mut watch =
        driver.client().watch_interrupts(pb::WatchInterruptsRequest {}).await.unwrap().into_inner();
    watch.message().await.unwrap();
    let (_up, requests) = tokio::sync::mpsc::channel(1);
    let requests = tokio_stream::wrappers::ReceiverStream::new(requests);
    let mut batches = driver.client().dma_stream(requests).await.unwrap().into_inner();
    let address = server.listen[0];
    let began = Instant::now();
    let drained = tokio::spawn(server.drain(Duration::from_secs(5)));
    assert_eq!(agent.ending().await, "SHUTTING_DOWN");
    assert_eq!(silent.ending().await, "SHUTTING_DOWN");
    assert_eq!(refused(watch.message().await), "SHUTTING_DOWN");
    assert_eq!(refused(batches.message().await), "SHUTTING_DOWN");
    assert_eq!(drained.await.unwrap(), Drained::Cleanly);
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    assert!(tokio::net::TcpStream::connect(address).await.is_err(), "nobody listens any more");
}

/// A client whose windows are so small that the server's answers soon have nowhere to go.
async fn narrow(server: &iommu_server::server::Server) -> tonic::transport::Channel {
    let address = server.listen[0];
    let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
    endpoint.initial_stream_window_size(65_535).connect().await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_does_not_read_its_stream_loses_it() {
    let server = server_with(|args| args.stream_stalled = Some("300ms".to_owned())).await;
    let observer = observer(&server).await;
    let (_driver, healthy, _, iova) = mapped(&server, 16).await;
    drop(healthy);
    let mut agent = Agent::silent_on(narrow(&server).await).await;
    agent.greet(hello(device(ENGINE0), "engine0")).await.unwrap();
    // Answers of 64 KiB each, and nobody who takes them.
    for _ in 0..32 {
        agent.send(Up::Dma(read_batch(&[iova], 65_536))).await;
    }
    eventually("its session is over", async || !device_state(&observer, ENGINE0).await.connected).await;
    let mut next = Agent::attach(&server, ENGINE0).await;
    assert!(next.read(iova, 64).await.is_ok(), "the server goes on");
    drop(agent);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_does_not_wait_for_a_peer_that_does_not_read() {
    let server = server().await;
    let (_driver, healthy, _, iova) = mapped(&server, 16).await;
    drop(healthy);
    let mut agent = Agent::silent_on(narrow(&server).await).await;
    agent.greet(hello(device(ENGINE0), "engine0")).await.unwrap();
    for _ in 0..32 {
        agent.send(Up::Dma(read_batch(&[iova], 65_536))).await;
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(server.drain(Duration::from_secs(3)).await, Drained::Cleanly);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_schema_does_not_know_has_a_typed_error() {
    let server = server().await;
    let channel = connect(&server).await;
    let call = |path: &'static str, frame: &'static [u8]| {
        let mut channel = channel.clone();
        async move {
            use tower::Service as _;
            std::future::poll_fn(|cx| channel.poll_ready(cx)).await.unwrap();
            let body = tonic::body::Body::new(http_body_util::Full::new(Bytes::from_static(frame)));
            let request = http::Request::post(format!("http://x{path}"))
                .header("content-type", "application/grpc")
                .header("te", "trailers")
                .body(body)
                .unwrap();
            let response = channel.call(request).await.unwrap();
            let in_headers = tonic::Status::from_header_map(response.headers());
            let status = match in_headers {
                Some(status) => status,
                None => {
                    use http_body_util::BodyExt as _;
                    let collected = response.into_body().collect().await.unwrap();
                    tonic::Status::from_header_map(collected.trailers().unwrap()).unwrap()
                }
            };
            reason(&status)
        }
    };
    assert_eq!(call("/iommu.v1.SessionService/Close", &[]).await, "UNKNOWN_METHOD");
    assert_eq!(call("/iommu.v2.SessionService/Open", &[]).await, "UNKNOWN_METHOD");
    let open = "/iommu.v1.SessionService/Open";
    assert_eq!(call(open, &[0, 0, 0, 0, 2, 0xff, 0xff]).await, "MALFORMED_MESSAGE");
    assert_eq!(call(open, &[0, 0xff, 0, 0, 0]).await, "MESSAGE_TOO_LARGE");
    assert_eq!(call(open, &[0, 0, 0, 0, 0]).await, "VERSION_MISMATCH");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unix_sockets_serve_and_a_stale_one_is_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("iommu.sock");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let on_socket = |args: &mut iommu_server::cli::ServeArgs| {
        args.listen = Vec::new();
        args.listen_unix = vec![path.clone()];
    };
    let server = server_with(on_socket).await;
    assert!(server.listen.is_empty());
    let address = format!("unix:{}", path.display());
    let credentials = iommu_proto::credentials::Credentials::from_directory(directory.path());
    let served = iommu_server::healthcheck::healthcheck(&address, &credentials, SOON).await;
    assert_eq!(served, Ok(true));
    let second = iommu_server::server::Server::start(config(on_socket)).await;
    assert!(second.is_err(), "a socket that answers is somebody's");
    assert_eq!(server.drain(Duration::from_secs(2)).await, Drained::Cleanly);
    eventually("the socket file is gone", async || !path.exists()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i7_strangers_cannot_take_all_connections() {
    let server = server().await;
    let known = observer(&server).await;
    let mut strangers = Vec::new();
    for _ in 0..iommu_server::bounds::ANONYMOUS_CONNECTIONS_MAX + 20 {
        strangers.push(tokio::net::TcpStream::connect(server.listen[0]).await.unwrap());
    }
    eventually("the excess is closed", async || {
        server.host.connections.anonymous() <= iommu_server::bounds::ANONYMOUS_CONNECTIONS_MAX
    })
    .await;
    assert!(inspect(&known).get_topology(pb::GetTopologyRequest {}).await.is_ok());
    // Whoever comes next finds a place, at the cost of the oldest stranger.
    let driver = Driver::open(&server, 0).await;
    driver.buffer(PAGE).await;
    drop(strangers);
    eventually("their places are free again", async || server.host.connections.anonymous() == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metrics_are_those_of_the_unit_and_all_described() {
    let server = server().await;
    let (_driver, mut agent, _, iova) = mapped(&server, 1).await;
    agent.read(iova, 8).await.unwrap();
    agent.read(0x7777_0000, 8).await.unwrap_err();
    let text = metrics(&server);
    for line in [
        "iommu_faults_total 1",
        "iommu_device_operations_total{device=\"0000:00:01.0\"} 1",
        "iommu_device_faults_total{device=\"0000:00:01.0\"} 1",
        "iommu_cache_misses_total{cache=\"iotlb\"}",
        "iommu_calls_total{method=\"iommu.v1.SessionService/Open\",code=\"0\"} 1",
        "iommu_device_sessions 1",
        "iommu_memory_size_bytes 67108864",
    ] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
    let names = text.lines().filter(|line| line.starts_with("# TYPE ")).count();
    assert_eq!(names, text.lines().filter(|line| line.starts_with("# HELP ")).count());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_falls_silent_is_noticed() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let server = server_with(|args| args.keepalive = Some("200ms".to_owned())).await;
    let mut socket = tokio::net::TcpStream::connect(server.listen[0]).await.unwrap();
    // A preface and settings, and then nothing, not even an answer to a ping.
    socket.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
    let mut said = Vec::new();
    let closed = tokio::time::timeout(Duration::from_secs(5), socket.read_to_end(&mut said)).await;
    assert!(closed.is_ok(), "the connection is still open");
    eventually("its place is free again", async || server.host.connections.open() == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_lets_a_call_end_and_then_cuts_who_holds_it_up() {
    let server = server().await;
    let driver = Driver::open(&server, 0).await;
    // A reader of bulk memory that does not read: its connection has a stream that nobody polls.
    let channel = narrow(&server).await;
    let opened = open(&channel, open_request("driver1", driver_role(1))).await.unwrap();
    let lazy = Driver::on(channel, opened);
    let gpa = lazy.buffer(8 << 20).await;
    let read = pb::MemoryReadRequest { owner: None, gpa, size_bytes: 8 << 20 };
    let unread = lazy.memory().read_bulk(read).await.unwrap();
    let agent = Agent::attach(&server, ENGINE0).await;
    let mut client = driver.client();
    let call = tokio::spawn(async move {
        let device = Some(device(ENGINE0));
        client.mmio_read(pb::MmioReadRequest { device, bar: 0, offset: 0, width_bytes: 4 }).await
    });
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(server.drain(Duration::from_secs(3)).await, Drained::Cleanly);
    assert_eq!(refused(call.await.unwrap()), "DEVICE_ABSENT", "the call was answered");
    drop((agent, unread));
}
