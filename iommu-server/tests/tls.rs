//! Mutual TLS: who gets in and as whom, what a refused peer hears, and how certificates come and go while the server runs.

#[path = "support/certificates.rs"]
mod certificates;
mod support;

use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use certificates::*;
use iommu_pki::{Overwrite, Validity};
use iommu_proto::channel::{Dial, DialError};
use iommu_proto::credentials::{CredentialError, Credentials, Refused};
use iommu_proto::pb;
use iommu_proto::pb::open_request::Role as WireRole;
use iommu_server::bounds;
use iommu_server::tls::metrics::Handshake;
use iommu_types::{Owner, Role};
use rustls::AlertDescription;
use support::*;
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;

fn operator_role() -> WireRole {
    WireRole::Operator(pb::OperatorRole {})
}
fn observer_role() -> WireRole {
    WireRole::Observer(pb::ObserverRole {})
}

/// Everything that a certificate can be, and what becomes of its bearer at the handshake.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i8_a_handshake_lets_in_who_has_one_good_certificate_and_tells_the_others_why() {
    let stage = TlsStage::start().await;
    let operator = peer("iommuctl", Role::Operator);
    let elsewhere = authority_elsewhere();
    let uri = "spiffe://iommu/operator/iommuctl";
    let past = Validity { not_before_unix_s: now_s() - 1000, not_after_unix_s: now_s() - 10 };
    let future = Validity { not_before_unix_s: now_s() + 1000, not_after_unix_s: now_s() + 2000 };
    let revoked = stage.issue(&operator, day());
    stage.pki.revoke(std::slice::from_ref(&serial_of(&revoked))).unwrap();
    stage.reloaded(1).await;
    let refused = |alert: &str| Some(Refused::Other(alert.to_owned()));
    let cases = [
        ("good", stage.issue(&operator, day()), None, Handshake::Ok),
        ("one URI beside a DNS name", stage.odd(&[uri], &["x.example"], Usage::Client), None, Handshake::Ok),
        ("expired", stage.issue(&operator, past), Some(Refused::Expired), Handshake::Expired),
        ("not valid yet", stage.issue(&operator, future), Some(Refused::Expired), Handshake::Expired),
        ("revoked", revoked, Some(Refused::Revoked), Handshake::Revoked),
        (
            "of another authority",
            elsewhere.issue(&operator, day()),
            Some(Refused::UnknownAuthority),
            Handshake::UnknownCa,
        ),
        (
            "several identities",
            stage.odd(&[uri, "spiffe://iommu/observer/iommuctl"], &[], Usage::Client),
            Some(Refused::NoIdentity),
            Handshake::NoIdentity,
        ),
        (
            "the same identity twice",
            stage.odd(&[uri, uri], &[], Usage::Client),
            Some(Refused::NoIdentity),
            Handshake::NoIdentity,
        ),
        (
            "no role",
            stage.odd(&["spiffe://iommu/janitor/iommuctl"], &[], Usage::Client),
            Some(Refused::NoIdentity),
            Handshake::NoIdentity,
        ),
        (
            "another trust domain",
            stage.odd(&["spiffe://elsewhere/operator/iommuctl"], &[], Usage::Client),
            Some(Refused::NoIdentity),
            Handshake::NoIdentity,
        ),
        (
            "no URI",
            stage.odd(&[], &["iommuctl"], Usage::Client),
            Some(Refused::NoIdentity),
            Handshake::NoIdentity,
        ),
        (
            "for a server",
            stage.odd(&[uri], &[], Usage::Server),
            refused("UnsupportedCertificate"),
            Handshake::Other,
        ),
    ];
    for (what, credential, expected, outcome) in cases {
        let before = stage.handshakes(outcome);
        let opened = stage.open_with(&credential, &operator, operator_role()).await;
        match expected {
            None => assert!(opened.is_ok(), "{what}: {opened:?}"),
            Some(expected) => match opened {
                Err(Why::Credential(CredentialError::Refused { refused, path, .. })) => {
                    assert_eq!(refused, expected, "{what}");
                    assert_eq!(path, credential, "{what}: the file is named");
                }
                other => panic!("{what}: {other:?}"),
            },
        }
        // The client may have tried again before it gave up.
        eventually("it is counted", async || stage.handshakes(outcome) > before).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_certificate_the_alert_says_that_one_is_required() {
    let stage = TlsStage::start().await;
    let alert = stage.alert_without_certificate().await;
    assert_eq!(alert, AlertDescription::CertificateRequired);
    // It is counted once the alert is out.
    eventually("it is counted", async || stage.handshakes(Handshake::NoCertificate) == 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i8_over_tls_a_peer_claims_nothing_else_than_its_certificate_says() {
    let stage = TlsStage::start().await;
    let operator = peer("iommuctl", Role::Operator);
    let driver = peer("driver0", Role::Driver(Owner::Driver(0)));
    let engine = peer("engine0", Role::Device("00:01.0".parse().unwrap()));
    let cases = [
        (&operator, "iommuctl", observer_role()),
        (&operator, "other", operator_role()),
        (&operator, "driver0", driver_role(0)),
        (&driver, "driver1", driver_role(1)),
        (&driver, "driver0", driver_role(1)),
        (&driver, "driver1", driver_role(0)),
        (&driver, "driver0", operator_role()),
        (&engine, "engine0", operator_role()),
    ];
    for (certified, name, role) in cases {
        let channel = stage.connect(certified).await;
        let refusal = open(&channel, open_request(name, role)).await.expect_err("refused");
        assert_eq!(reason(&refusal), "IDENTITY_REFUSED", "{certified} as {name} {role:?}");
        assert!(refusal.message().contains(&certified.to_string()), "it says for whom: {refusal:?}");
    }
    for (certified, address, name) in [
        (&engine, ENGINE1, "engine1"),
        (&engine, ENGINE0, "engine1"),
        (&engine, ENGINE1, "engine0"),
        (&operator, ENGINE0, "engine0"),
    ] {
        let mut agent = Agent::silent_on(stage.connect(certified).await).await;
        let refusal = agent.greet(hello(device(address), name)).await.expect_err("refused");
        assert_eq!(reason(&refusal), "IDENTITY_REFUSED", "{certified} as {name}");
    }
    // Who is certified is still only whom the configuration knows.
    let stranger = peer("driver9", Role::Driver(Owner::Driver(9)));
    let credential = stage.issue(&stranger, day());
    match stage.open_with(&credential, &stranger, driver_role(9)).await {
        Err(Why::Status(status)) => assert_eq!(reason(&status), "IDENTITY_REFUSED"),
        other => panic!("{other:?}"),
    }
    // And a certificate alone is no session.
    let channel = stage.connect(&operator).await;
    let topology = inspect(&channel).get_topology(pb::GetTopologyRequest {}).await;
    assert_eq!(refused(topology), "SESSION_REQUIRED");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_servers_certificate_rotates_under_a_live_session() {
    let stage = TlsStage::start().await;
    let driver = stage.driver(0).await;
    let before = stage.own_certificate().await;
    stage.pki.issue_server(&[], day(), None, Overwrite::Replace).unwrap();
    stage.reloaded(1).await;
    assert_ne!(stage.own_certificate().await, before, "who connects now sees the new one");
    driver.buffer(PAGE).await;
    // Asked for, it is read again although nothing changed.
    stage.server.host.tls.as_ref().unwrap().reload_soon();
    stage.reloaded(2).await;
    driver.buffer(PAGE).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_list_that_is_loaded_later_ends_the_sessions_of_who_is_on_it_and_no_other() {
    let stage = TlsStage::start().await;
    let engine = peer("engine0", Role::Device("00:01.0".parse().unwrap()));
    let (driver, other) = (stage.driver(0).await, stage.driver(1).await);
    let mut agent = Agent::silent_on(stage.connect(&engine).await).await;
    agent.greet(hello(device(ENGINE0), "engine0")).await.unwrap();
    let mut interrupts =
        driver.client().watch_interrupts(pb::WatchInterruptsRequest {}).await.unwrap().into_inner();

    let of_driver = stage.pki.file("driver-driver-0.pem");
    let of_engine = stage.pki.file("device-0000-00-01.0.pem");
    stage.pki.revoke(&[serial_of(&of_driver), serial_of(&of_engine)]).unwrap();

    assert_eq!(agent.ending().await, "CERTIFICATE_REVOKED");
    let ended = loop {
        match tokio::time::timeout(SOON, interrupts.message()).await.expect("it ends soon") {
            Ok(Some(_)) => {}
            Ok(None) => panic!("it ended without a status"),
            Err(status) => break status,
        }
    };
    assert_eq!(reason(&ended), "CERTIFICATE_REVOKED");
    let allocate = pb::AllocateBufferRequest { header: other.header(), size_bytes: PAGE };
    other.client().allocate_buffer(allocate).await.expect("another peer is not touched");
    let identity = peer("driver0", Role::Driver(Owner::Driver(0)));
    match stage.open_with(&of_driver, &identity, driver_role(0)).await {
        Err(Why::Credential(CredentialError::Refused { refused: Refused::Revoked, .. })) => {}
        other => panic!("it comes back: {other:?}"),
    }
    // Cut after the grace, whoever its peer is.
    eventually("the places are given back", async || stage.server.host.connections.open() == 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_end_of_a_certificate_is_the_end_of_its_sessions() {
    let stage = TlsStage::start().await;
    let engine = peer("engine0", Role::Device("00:01.0".parse().unwrap()));
    let short = Validity { not_before_unix_s: now_s() - 10, not_after_unix_s: now_s() + 2 };
    let credential = stage.issue(&engine, short);
    let mut agent = Agent::silent_on(stage.connect_with(&credential, &engine).await.unwrap().channel).await;
    agent.greet(hello(device(ENGINE0), "engine0")).await.unwrap();
    assert_eq!(agent.ending().await, "CERTIFICATE_EXPIRED");
    assert!(now_s() > short.not_after_unix_s, "not before its time");
    eventually("the connection is cut", async || stage.server.host.connections.open() == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_does_not_parse_leaves_the_old_one_in_force() {
    let stage = TlsStage::start().await;
    let operator = peer("iommuctl", Role::Operator);
    let elsewhere = authority_elsewhere();
    let foreign_list = std::fs::read(elsewhere.pki.file("ca.crl")).unwrap();
    let foreign_key = std::fs::read(elsewhere.pki.file("ca.key")).unwrap();
    let own = std::fs::read_to_string(stage.pki.file("server.pem")).unwrap();
    let (certificate, _) = own.split_at(own.find("-----BEGIN PRIVATE").unwrap());
    let mismatched = [certificate.as_bytes(), &foreign_key].concat();
    let rows: [(&str, &[u8]); 6] = [
        ("ca.crl", b"no list"),
        ("ca.crl", b""),
        ("ca.crl", &foreign_list),
        ("ca.crt", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"),
        ("server.pem", certificate.as_bytes()),
        ("server.pem", &mismatched),
    ];
    let tls = stage.server.host.tls.as_ref().unwrap();
    let endpoint = format!("https://{}", stage.server.listen[0]);
    let authority = tempfile::NamedTempFile::new().unwrap().into_temp_path();
    std::fs::copy(stage.pki.file("ca.crt"), &authority).unwrap();
    for (round, (name, content)) in rows.into_iter().enumerate() {
        let path = stage.pki.file(name);
        let good = std::fs::read(&path).unwrap();
        let (taken, _) = tls.metrics.reloads();
        std::fs::write(&path, content).unwrap();
        eventually("it is tried", async || tls.metrics.reloads().1 == round as u64 + 1).await;
        assert_eq!(tls.metrics.reloads().0, taken, "{name} {content:?} is not taken");
        let credential = stage.pki.file("operator-iommuctl.pem");
        let trusting =
            Dial::to(&endpoint, &Credentials::from_files(credential, authority.to_path_buf()), &operator)
                .unwrap();
        let channel = trusting.connect().await.unwrap_or_else(|error| panic!("{name}: {error}")).channel;
        open(&channel, open_request("iommuctl", operator_role())).await.expect("handshakes go on");
        std::fs::write(&path, good).unwrap();
        eventually("the good one is taken", async || tls.metrics.reloads().0 == taken + 1).await;
        stage.connect(&operator).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_start_issues_for_everybody_and_the_second_overwrites_nothing() {
    let stage = TlsStage::start().await;
    let files = stage.files();
    let names: Vec<&str> = files.iter().map(|(name, _, _)| name.as_str()).collect();
    for expected in [
        "bare-bare.pem",
        "ca.crl",
        "ca.crt",
        "ca.key",
        "device-0000-00-01.0.pem",
        "device-0000-00-03.0.pem",
        "driver-driver-0.pem",
        "driver-driver-3.pem",
        "observer-observer.pem",
        "operator-iommuctl.pem",
        "server.pem",
    ] {
        assert!(names.contains(&expected), "{expected} is missing: {names:?}");
    }
    for (name, mode, _) in &files {
        let public = ["ca.crt", "ca.crl"].contains(&name.as_str());
        assert_eq!(*mode, if public { 0o644 } else { 0o600 }, "{name}");
    }
    let mode = std::fs::metadata(stage.pki.path()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o700, "the directory");

    let again = stage.start_again(|_| {}).await;
    assert_eq!(stage.files(), files, "nothing was touched");
    drop(again);
    // A device that is new in the configuration gets its own, and the rest stays.
    let more = stage.start_again(|args| args.device = vec!["00:09.0=new".to_owned()]).await;
    let after = stage.files();
    assert!(after.iter().any(|(name, _, _)| name == "device-0000-00-09.0.pem"));
    let untouched = |name: &str| name != "issued" && name != "device-0000-00-09.0.pem";
    assert!(after.iter().filter(|(name, ..)| untouched(name)).all(|file| files.contains(file)));
    drop(more);
    // Without the authority's key it serves, and issues nothing.
    std::fs::remove_file(stage.pki.file("ca.key")).unwrap();
    let keyless = stage.start_again(|args| args.device = vec!["00:0a.0=newer".to_owned()]).await;
    assert!(!stage.pki.file("device-0000-00-0a.0.pem").exists());
    drop(keyless);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_directory_that_cannot_be_served_from_is_refused_with_a_remedy() {
    let rows: [(&str, &str); 3] = [("ca.crl", "ca.crl"), ("server.pem", "server.pem"), ("ca.crt", "ca.crt")];
    for (gone, named) in rows {
        let stage = TlsStage::start().await;
        std::fs::remove_file(stage.pki.file("ca.key")).unwrap();
        std::fs::remove_file(stage.pki.file(gone)).unwrap();
        let error = stage.try_again(|_| {}).await.expect_err("it must not start").to_string();
        assert!(error.contains(named) && error.contains("remedy"), "{gone}: {error}");
    }
    let stage = TlsStage::start().await;
    let open_to_all = std::fs::Permissions::from_mode(0o777);
    std::fs::set_permissions(stage.pki.path(), open_to_all).unwrap();
    let error = stage.try_again(|_| {}).await.expect_err("others could put a CA there").to_string();
    assert!(error.contains("written by others"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i7_a_flood_of_half_open_handshakes_keeps_no_good_peer_out() {
    let stage = TlsStage::start().await;
    let address = stage.server.listen[0];
    let mut flood = Vec::new();
    for _ in 0..bounds::ANONYMOUS_CONNECTIONS_MAX + 100 {
        flood.push(TcpStream::connect(address).await.unwrap());
    }
    let began = Instant::now();
    let driver = stage.driver(0).await;
    driver.buffer(PAGE).await;
    assert!(began.elapsed() < bounds::HANDSHAKE_TIMEOUT, "{:?}: it did not wait for them", began.elapsed());
    eventually("the oldest made room", async || {
        stage.server.host.connections.anonymous() <= bounds::ANONYMOUS_CONNECTIONS_MAX
    })
    .await;
    eventually("they are counted", async || stage.handshakes(Handshake::Displaced) >= 100).await;
    // The others have their time, and no more.
    let mut last = flood.pop().unwrap();
    let closed = tokio::time::timeout(bounds::HANDSHAKE_TIMEOUT + SOON, last.read(&mut [0; 1])).await;
    assert!(matches!(closed.expect("it is closed"), Ok(0) | Err(_)));
    driver.buffer(PAGE).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i7_one_peer_cannot_take_all_places() {
    let stage = TlsStage::start().await;
    let observer = peer("observer", Role::Observer);
    let mut held = Vec::new();
    for _ in 0..bounds::CONNECTIONS_PER_PEER_MAX + 5 {
        held.push(stage.connect(&observer).await);
    }
    eventually("the oldest made room", async || {
        stage.server.host.connections.open() <= bounds::CONNECTIONS_PER_PEER_MAX
    })
    .await;
    let newest = held.last().unwrap();
    open(newest, open_request("observer", observer_role())).await.expect("the newest is admitted");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_says_what_is_missing_and_whom_it_does_not_trust() {
    let stage = TlsStage::start().await;
    let absent = peer("absent", Role::Operator);
    match stage.connect_with(&stage.pki.file("operator-absent.pem"), &absent).await {
        Err(DialError::Credential(CredentialError::Missing { path, remedy })) => {
            assert!(path.ends_with("operator-absent.pem"));
            assert!(remedy.contains("iommuctl pki issue operator absent"), "{remedy}");
        }
        other => panic!("{other:?}"),
    }
    let elsewhere = authority_elsewhere();
    let operator = peer("iommuctl", Role::Operator);
    let credential = elsewhere.issue(&operator, day());
    match elsewhere.dial(stage.server.listen[0], &credential, &operator).await {
        Err(DialError::Credential(CredentialError::ServerNotTrusted { .. })) => {}
        other => panic!("{other:?}"),
    }
    let plaintext = server().await;
    match stage.dial(plaintext.listen[0], &stage.pki.file("operator-iommuctl.pem"), &operator).await {
        Err(DialError::Credential(CredentialError::NotTls { .. })) => {}
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_counted_is_shown() {
    let stage = TlsStage::start().await;
    stage.driver(0).await;
    stage.alert_without_certificate().await;
    eventually("it is counted", async || stage.handshakes(Handshake::NoCertificate) == 1).await;
    let shown = metrics(&stage.server);
    for line in [
        "iommu_tls_handshakes_total{outcome=\"ok\"} 1",
        "iommu_tls_handshakes_total{outcome=\"no_certificate\"} 1",
        "iommu_unix_peers_refused_total 0",
    ] {
        assert!(shown.contains(line), "{line} is missing:\n{shown}");
    }
    let left = shown.lines().find_map(|line| line.strip_prefix("iommu_tls_certificate_left_seconds "));
    let left: u64 = left.expect("the time left is shown").parse().unwrap();
    assert!(Duration::from_secs(left) > Duration::from_secs(364 * 86_400), "{left}");
}
