//! What those who run it rely on: the command line, the end on SIGTERM, configuration that is refused, health, reflection, metrics.

use std::time::{Duration, Instant};

use guest_sdk::{Direction, FaultFilter, SdkError};
use iommu_e2e::device::{Device, REGISTER_VALUE, fault};
use iommu_e2e::http;
use iommu_e2e::raw;
use iommu_e2e::stage::{SOON, Stage, address, binaries, run, run_server, soon, within};
use iommu_types::{FaultReason, Iova};
use rustix::process::Signal;
use serde_json::Value;
use tokio_stream::StreamExt as _;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::{v1, v1alpha};

/// Services of the schema.
const SERVICES: [&str; 8] = [
    "iommu.v1.AdminService",
    "iommu.v1.BareMachineService",
    "iommu.v1.DeviceService",
    "iommu.v1.DriverService",
    "iommu.v1.FaultService",
    "iommu.v1.InspectService",
    "iommu.v1.MemoryService",
    "iommu.v1.SessionService",
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn explain_tells_a_refused_access_from_its_source_to_the_reason_in_words() {
    within(60, async {
        let stage = Stage::start(&[]).await;
        let driver = stage.driver(0).await;
        let buffer = driver.allocate(4096).await.expect("memory");
        let handle = driver.device(address(0));
        let mapping =
            driver.dma_map_single(&handle, buffer.range(), Direction::ToDevice).await.expect("a mapping");
        let iova = format!("{:#x}", mapping.iova().get());

        // A write to a read-only mapping: all levels are there, and the last one denies.
        let arguments = ["explain", "00:01.0", &iova, "--access", "write"];
        let (code, out, err) = stage.server.iommuctl(&arguments).await.expect("iommuctl runs");
        assert_eq!(code, 3, "the access would be refused: {out}{err}");
        let lower = out.to_lowercase();
        for part in
            ["00:01.0", "root", "context", "iotlb", "write", &iova, FaultReason::WRITE_DENIED.meaning()]
        {
            assert!(lower.contains(part), "{part:?} is missing:\n{out}");
        }
        let tables = stage.inspect().dump_tables(address(0), false).await.expect("tables");
        let json = [&arguments[..], &["--json"]].concat();
        let (code, out_json, _) = stage.server.iommuctl(&json).await.expect("iommuctl runs");
        assert_eq!(code, 3);
        let told: Value = serde_json::from_str(&out_json).expect("--json prints JSON");
        assert_eq!(told["outcome"], "refused");
        assert_eq!(told["reason"], 5);
        assert_eq!(told["access"], "write");
        let steps = told["steps"].as_array().expect("steps");
        let structures: Vec<&str> = steps.iter().filter_map(|step| step["structure"].as_str()).collect();
        assert_eq!(structures[..2], ["root", "context"]);
        let levels: Vec<u64> = steps.iter().filter_map(|step| step["level"].as_u64()).collect();
        assert!(
            levels.len() >= 3 && levels.is_sorted_by(|a, b| a == &(b + 1)),
            "every level, downwards: {levels:?}"
        );
        assert_eq!(levels.last(), Some(&1));
        for step in steps {
            // The raw value is that of the dump, and stands in the words as well.
            let raw = step["low"].as_str().expect("raw");
            let low = u64::from_str_radix(raw.trim_start_matches("0x"), 16).expect("hexadecimal");
            let at = step["hpa"].as_str().expect("where");
            assert!(tables.iter().any(|entry| entry.step.low == Some(low)), "{raw} at {at} is in no table");
            assert!(
                lower.contains(&format!("{low:016x}")) || lower.contains(raw),
                "{raw} is missing:\n{out}"
            );
        }
        for cache in ["context_cache", "iotlb", "paging_structure_cache"] {
            assert!(told["caches"][cache]["state"].is_string(), "{cache}: {told}");
        }
        assert!(!told["conclusion"].as_str().unwrap_or_default().is_empty());

        // Explaining records nothing and changes nothing.
        assert!(stage.faults_of(address(0)).await.is_empty());
        let (code, out, err) =
            stage.server.iommuctl(&["explain", "00:01.0", &iova]).await.expect("iommuctl runs");
        assert_eq!(code, 0, "a read would be translated: {out}{err}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn explain_tells_that_a_device_of_nobody_has_no_context_entry() {
    within(60, async {
        let stage = Stage::start(&[]).await;
        let device = stage.device(2).await;
        let refused = fault(device.dma.read(Iova::new(0x1000), 8).await);
        assert_eq!(refused.reason, Ok(FaultReason::CONTEXT_NOT_PRESENT));
        let (code, out, err) =
            stage.server.iommuctl(&["explain", "00:03.0", "0x1000", "--json"]).await.expect("iommuctl runs");
        assert_eq!(code, 3, "{out}{err}");
        let told: Value = serde_json::from_str(&out).expect("--json prints JSON");
        assert_eq!((told["outcome"].as_str(), told["reason"].as_u64()), (Some("refused"), Some(2)));
        let records = stage.faults_of(address(2)).await;
        assert_eq!(records.len(), 1, "the refused DMA is recorded although nobody owns the device");
        let (code, out, _) =
            stage.server.iommuctl(&["fault", "list", "--json"]).await.expect("iommuctl runs");
        assert_eq!(code, 0);
        assert!(out.contains("00:03.0"), "{out}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn iommuctl_without_a_server_exits_69_and_with_nonsense_2() {
    within(60, async {
        let nowhere = ["--server", "http://127.0.0.1:1", "status"];
        let output = run(&binaries().iommuctl, &nowhere).await;
        assert_eq!(output.status.code(), Some(69), "{output:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("127.0.0.1:1"), "it says where: {output:?}");
        let output = run(&binaries().iommuctl, &["explain", "here", "there"]).await;
        assert_eq!(output.status.code(), Some(2), "{output:?}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_ends_a_server_with_idle_streams_within_its_deadline() {
    within(60, async {
        let mut stage = Stage::start(&["--drain-deadline", "5s"]).await;
        let driver = stage.driver(0).await;
        let device = stage.device(0).await;
        let mut interrupts = driver.watch_interrupts().await.expect("a subscription");
        let everything = FaultFilter { owner: None, device: None };
        let mut faults = stage.observer.faults().watch(everything, "").await.expect("a subscription");
        let mut raw_stream =
            raw::RawStream::attach(&stage.server.unix_endpoint(), raw::envelope(raw::hello_message(1)))
                .await
                .expect("a stream");
        raw_stream.hear_device().await.expect("welcome");

        let asked = Instant::now();
        stage.server.process.signal(Signal::TERM).expect("SIGTERM");
        let ended = raw_stream.end().await;
        assert_eq!(raw::reason(&ended), "SHUTTING_DOWN", "{ended:?}");
        let status = stage.server.process.wait(SOON).await.expect("the server ends");
        assert_eq!(status.code(), Some(0), "drained: {}", stage.log());
        assert!(asked.elapsed() < Duration::from_secs(5), "within the deadline: {:?}", asked.elapsed());
        drop((interrupts.next(), faults.next(), device));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_configuration_that_makes_no_sense_exits_64_with_the_flag_and_the_remedy() {
    within(60, async {
        let plain = "--insecure-plaintext";
        let rows: [(&[&str], &str); 8] = [
            (&["--listen", "127.0.0.1:0", "--admin", "off", "--pki", "/dev/null/pki"], "--pki"),
            (&[plain, "--listen", "0.0.0.0:0"], "--listen"),
            (&[plain, "--listen", "192.0.2.1:7450"], "--listen"),
            (&[plain, "--listen", "127.0.0.1:0", "--admin", "0.0.0.0:0"], "--admin"),
            (&[plain, "--listen", "127.0.0.1:0", "--memory", "lots"], "--memory"),
            (&[plain, "--listen", "127.0.0.1:0", "--grace", "soon"], "--grace"),
            (&[plain, "--listen", "127.0.0.1:0", "--device", "00:01.0=x@driver:77"], "--device"),
            (&[plain, "--listen", "127.0.0.1:0", "--config", "/nonexistent.toml"], "--config"),
        ];
        for (arguments, flag) in rows {
            let output = run_server(arguments).await;
            let told = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(64), "{arguments:?}: {told}");
            assert!(told.contains(flag) && told.contains("remedy"), "{arguments:?}: {told}");
            assert!(output.stdout.is_empty(), "it was never ready");
        }
        // An address that is taken is another matter.
        let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = taken.local_addr().expect("bound").to_string();
        let output = run_server(&[plain, "--listen", &address, "--admin", "off", "--memory", "64MiB"]).await;
        assert_eq!(output.status.code(), Some(69), "{output:?}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn health_and_both_reflections_answer_without_a_session() {
    within(60, async {
        let stage = Stage::start(&[]).await;
        let channel = raw::connect(&stage.server.unix_endpoint()).await;
        let mut health = HealthClient::new(channel.clone());
        for service in [""].iter().chain(&SERVICES) {
            let answer = health.check(HealthCheckRequest { service: (*service).to_owned() }).await;
            let answer = answer.unwrap_or_else(|status| panic!("health of {service:?}: {status:?}"));
            assert_eq!(answer.into_inner().status(), ServingStatus::Serving, "{service:?}");
        }

        let mut told = Vec::new();
        let list = v1::server_reflection_request::MessageRequest::ListServices(String::new());
        let ask = v1::ServerReflectionRequest { host: String::new(), message_request: Some(list) };
        let mut client = v1::server_reflection_client::ServerReflectionClient::new(channel.clone());
        let mut answers =
            client.server_reflection_info(tokio_stream::once(ask)).await.expect("reflection v1").into_inner();
        while let Some(answer) = answers.next().await {
            if let Some(v1::server_reflection_response::MessageResponse::ListServicesResponse(list)) =
                answer.expect("an answer").message_response
            {
                told.push(list.service.into_iter().map(|service| service.name).collect::<Vec<_>>());
            }
        }
        let list = v1alpha::server_reflection_request::MessageRequest::ListServices(String::new());
        let ask = v1alpha::ServerReflectionRequest { host: String::new(), message_request: Some(list) };
        let mut client = v1alpha::server_reflection_client::ServerReflectionClient::new(channel);
        let mut answers = client
            .server_reflection_info(tokio_stream::once(ask))
            .await
            .expect("reflection v1alpha")
            .into_inner();
        while let Some(answer) = answers.next().await {
            if let Some(v1alpha::server_reflection_response::MessageResponse::ListServicesResponse(list)) =
                answer.expect("an answer").message_response
            {
                told.push(list.service.into_iter().map(|service| service.name).collect::<Vec<_>>());
            }
        }
        assert_eq!(told.len(), 2, "both answer");
        for services in told {
            for service in SERVICES {
                assert!(services.iter().any(|name| name == service), "{service} is missing in {services:?}");
            }
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metrics_tell_what_happened_with_help_and_readyz_says_ready() {
    within(60, async {
        let stage = Stage::start(&[]).await;
        let device = stage.device(2).await;
        let refused = fault(device.dma.read(Iova::new(0x1000), 8).await);
        assert!(refused.reason.is_ok());
        let admin = stage.server.admin().expect("an admin port");
        assert_eq!(http::get(admin, "/readyz").await.0, 200);
        assert_eq!(http::get(admin, "/healthz").await.0, 200);
        assert_eq!(http::get(admin, "/nothing").await.0, 404);
        let (status, metrics) = http::get(admin, "/metrics").await;
        assert_eq!(status, 200);
        let names: Vec<&str> =
            metrics.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).collect();
        let ours: Vec<&&str> = names.iter().filter(|name| name.starts_with("iommu_")).collect();
        assert!(ours.len() >= 5, "our metrics: {names:?}");
        for name in &names {
            let help = metrics.lines().find_map(|line| line.strip_prefix(&format!("# HELP {name} ")));
            assert!(help.is_some_and(|help| !help.trim().is_empty()), "{name} has no help text");
        }
        let faults = metrics.lines().any(|line| {
            !line.starts_with('#')
                && line.contains("fault")
                && line.rsplit(' ').next().is_some_and(|v| v.trim() == "1")
        });
        assert!(faults, "the refused DMA is counted:\n{metrics}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_unix_socket_serves_agents_and_drivers_alike() {
    within(60, async {
        let stage = Stage::start(&[]).await;
        let endpoint = stage.server.unix_endpoint();
        let driver = stage.driver_over(&endpoint, 0).await;
        let device = Device::attach(&stage.server, &endpoint, "engine0", address(0)).await;
        let buffer = driver.allocate(1 << 20).await.expect("memory");
        let handle = driver.device(address(0));
        let mapping = driver
            .dma_map_single(&handle, buffer.range(), Direction::Bidirectional)
            .await
            .expect("a mapping");
        let data: Vec<u8> = (0..1 << 20).map(|byte: u32| (byte % 251) as u8).collect();
        buffer.write(0, data.clone()).await.expect("a write");
        assert_eq!(device.dma.read(mapping.iova(), 1 << 20).await.expect("mapped")[..], data[..]);
        device.dma.write(mapping.iova(), &b"over a socket"[..]).await.expect("mapped");
        assert_eq!(buffer.read(0, 13).await.expect("a read")[..], b"over a socket"[..]);
        assert_eq!(u64::from(handle.read32(0).await.expect("its register")), REGISTER_VALUE);
        mapping.unmap().await.expect("an unmap");
        // A TCP client and a UNIX client are the same to the server.
        let fenced = stage.driver(0).await;
        soon("the session over the socket is fenced", async || {
            matches!(driver.allocate(4096).await, Err(SdkError::Call(_) | SdkError::Transport(_)))
                .then_some(())
        })
        .await;
        drop(fenced);
    })
    .await;
}
