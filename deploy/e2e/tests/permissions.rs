//! Every method of every service over mutual TLS: each role with a good certificate as the one table says, and nobody without one.

use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hyper_util::rt::TokioIo;
use iommu_e2e::http;
use iommu_e2e::raw::{self, ATTACH, RawStream, ask, envelope, hello_message, knock, open_request};
use iommu_e2e::stage::{SOON, Stage, address, owner, soon, within};
use iommu_pki::{CREDENTIAL_DAYS, Directory, Overwrite, Validity};
use iommu_proto::channel::{Dial, DialError, causes};
use iommu_proto::credentials::{CredentialError, Credentials, Refused};
use iommu_proto::errors::reason_of;
use iommu_proto::pb;
use iommu_proto::pb::open_request::Role as WireRole;
use iommu_server::layers::permissions::{Needs, rows};
use iommu_types::{Identity, Role};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{AlertDescription, ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Channel, Endpoint};

/// Handshakes at once.
const AT_ONCE: usize = 8;

/// What a peer without the right gets.
fn refused_with(needs: Needs, peer: Option<Role>) -> Option<&'static str> {
    match (needs, peer) {
        (Needs::Nothing | Needs::Client | Needs::Device, _) => None,
        (Needs::Session(_), None) => Some("SESSION_REQUIRED"),
        (Needs::Session(roles), Some(role)) if roles.admit(role) => None,
        (Needs::Session(_), Some(_)) => Some("ROLE_REFUSED"),
    }
}

async fn check_all(channel: &Channel, peer: Option<Role>) {
    let mut checked = 0;
    for (service, method, needs) in rows() {
        let called = tokio::time::timeout(SOON, knock(channel, service, method)).await;
        let called = called.unwrap_or_else(|_| panic!("{service}/{method} by {peer:?} is not answered"));
        let came = called.err().map(|status| reason_of(&status).unwrap_or_else(|| causes(&status)));
        let refused = came.as_deref().filter(|reason| ["SESSION_REQUIRED", "ROLE_REFUSED"].contains(reason));
        assert_eq!(refused, refused_with(needs, peer), "{service}/{method} by {peer:?}: {came:?}");
        checked += 1;
    }
    assert!(checked > 70, "the schema has more methods than {checked}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i8_a_good_certificate_of_each_role_opens_exactly_the_methods_of_the_table() {
    within(60, async {
        let stage = Stage::start(&[]).await;
        let driver = WireRole::Driver(pb::DriverRole { owner: Some(owner(0).into()) });
        let rows = [
            ("driver0", Role::Driver(owner(0)), driver),
            ("bare", Role::Bare, WireRole::Bare(pb::BareRole {})),
            ("observer", Role::Observer, WireRole::Observer(pb::ObserverRole {})),
            ("operator", Role::Operator, WireRole::Operator(pb::OperatorRole {})),
            ("hv0", Role::Hypervisor, WireRole::Hypervisor(pb::HypervisorRole {})),
        ];
        for (name, role, wire) in rows {
            let identity = Identity { name: name.to_owned(), role };
            // A certificate alone is no session.
            check_all(&raw::connect_as(&stage.server, &identity).await, None).await;
            let channel = raw::connect_as(&stage.server, &identity).await;
            let open = open_request(name, wire);
            let _: pb::OpenResponse =
                ask(&channel, "/iommu.v1.SessionService/Open", &open).await.expect("it is admitted");
            check_all(&channel, Some(role)).await;
        }
        let device = Role::Device(address(0));
        let identity = Identity { name: "engine0".to_owned(), role: device };
        let channel = raw::connect_as(&stage.server, &identity).await;
        let mut stream =
            RawStream::open(&channel, ATTACH, envelope(hello_message(0))).await.expect("it is admitted");
        stream.hear_device().await.expect("a Welcome");
        check_all(&channel, Some(device)).await;
    })
    .await;
}

/// What is wrong with a certificate.
#[derive(Clone, Debug)]
struct Bad {
    what: &'static str,
    /// As the server counts it.
    outcome: &'static str,
    /// As the client is told.
    refused: Refused,
    /// None for a peer that shows no certificate.
    credential: Option<PathBuf>,
}

impl Bad {
    /// All there are, of one identity that would be admitted with a good one.
    async fn all(stage: &Stage, identity: &Identity, elsewhere: &Directory) -> [Self; 4] {
        let pki = Directory::at(stage.server.pki());
        let into = |name: &str| stage.server.path(&format!("{name}.pem"));
        let good = || Validity::of_days(CREDENTIAL_DAYS).expect("a validity");
        let now_s = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs();
        let past = Validity { not_before_unix_s: now_s - 1000, not_after_unix_s: now_s - 10 };
        let issue = |from: &Directory, name: &str, validity: Validity| {
            let path = into(name);
            let issued = from.issue(identity, validity, Some(&path), Overwrite::Never);
            (path, issued.expect("a certificate").serial)
        };
        let (revoked, serial) = issue(&pki, "revoked", good());
        let before = counted(stage, "iommu_tls_reloads_total", "outcome=\"ok\"").await;
        pki.revoke(&[serial]).expect("it is revoked");
        soon("the server reads the list", async || {
            (counted(stage, "iommu_tls_reloads_total", "outcome=\"ok\"").await > before).then_some(())
        })
        .await;
        let (expired, _) = issue(&pki, "expired", past);
        let (foreign, _) = issue(elsewhere, "foreign", good());
        let bad =
            |what, outcome, refused, credential: Option<PathBuf>| Self { what, outcome, refused, credential };
        [
            bad("none", "no_certificate", Refused::NoCertificate, None),
            bad("an expired one", "expired", Refused::Expired, Some(expired)),
            bad("a revoked one", "revoked", Refused::Revoked, Some(revoked)),
            bad("one of another authority", "unknown_ca", Refused::UnknownAuthority, Some(foreign)),
        ]
    }
}

/// The sum of a counter's values in which the labels occur.
async fn counted(stage: &Stage, counter: &str, label: &str) -> u64 {
    let (_, shown) = http::get(stage.server.admin().expect("an admin port"), "/metrics").await;
    let of_it = shown.lines().filter(|line| line.starts_with(counter) && line.contains(label));
    of_it.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum()
}

/// The same once it is so much at least: the server counts a refusal after it has sent the alert, so whoever was refused may look too early.
async fn counted_at_least(stage: &Stage, counter: &str, label: &str, wanted: u64) -> u64 {
    soon(&format!("{counter} with {label} is {wanted}"), async || {
        let now = counted(stage, counter, label).await;
        (now >= wanted).then_some(now)
    })
    .await
}

/// The alert with which the server ended a connection.
type Alert = Arc<Mutex<Option<AlertDescription>>>;

/// A TLS stream that keeps the alert; what is above it keeps a text at most, and not always.
struct Listening(TlsStream<TcpStream>, Alert);

impl AsyncRead for Listening {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.0).poll_read(context, into);
        if let Poll::Ready(Err(error)) = &polled
            && let Some(error) = error.get_ref().and_then(|error| error.downcast_ref())
            && let rustls::Error::AlertReceived(alert) = error
        {
            *self.1.lock().expect("no panic under the lock") = Some(*alert);
        }
        polled
    }
}

impl AsyncWrite for Listening {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(context, bytes)
    }
    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(context)
    }
}

/// A connection that shows no certificate.
fn nameless(endpoint: &str, authority: &Path, alert: &Alert) -> Channel {
    let mut roots = RootCertStore::empty();
    let authority = std::fs::read(authority).expect("the authority's certificate");
    roots.add(CertificateDer::from_pem_slice(&authority).expect("PEM")).expect("a certificate");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("TLS 1.3");
    let mut config = config.with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let connector = TlsConnector::from(Arc::new(config));
    let to = endpoint.trim_start_matches("https://").to_owned();
    let alert = Arc::clone(alert);
    let connect = tower::service_fn(move |_: tonic::codegen::http::Uri| {
        let (connector, to, alert) = (connector.clone(), to.clone(), Arc::clone(&alert));
        async move {
            let socket = TcpStream::connect(to).await?;
            let name = ServerName::try_from("127.0.0.1").expect("an address");
            let stream = connector.connect(name, socket).await?;
            Ok::<_, io::Error>(TokioIo::new(Listening(stream, alert)))
        }
    });
    Endpoint::from_shared(endpoint.to_owned()).expect("an endpoint").connect_with_connector_lazy(connect)
}

/// Calls a method over a connection of its own, and checks that no more came of it than being told why.
async fn refused_at_the_handshake(
    endpoint: &str,
    authority: &Path,
    identity: &Identity,
    bad: &Bad,
    path: (&str, &str),
) {
    let (service, method) = path;
    let Some(credential) = &bad.credential else {
        let alert = Alert::default();
        let channel = nameless(endpoint, authority, &alert);
        let refused = knock(&channel, service, method).await.expect_err("nobody without a certificate");
        let told = *alert.lock().expect("no panic under the lock");
        assert_eq!(told, Some(AlertDescription::CertificateRequired), "{service}/{method}: {refused:?}");
        assert_eq!(reason_of(&refused), None, "no service was asked: {refused:?}");
        return;
    };
    let credentials = Credentials::from_files(credential, authority);
    let dial = Dial::to(endpoint, &credentials, identity).expect("an endpoint");
    let told = match dial.connect().await {
        // Told with the first answer, as in TLS 1.3 the client is done first.
        Ok(dialled) => {
            let refused = knock(&dialled.channel, service, method).await;
            let refused = refused.expect_err("nobody with a bad certificate");
            assert_eq!(reason_of(&refused), None, "no service was asked: {refused:?}");
            dialled.trouble.take()
        }
        Err(DialError::Credential(error)) => Some(error),
        Err(other) => panic!("{service}/{method} with {}: {other:?}", bad.what),
    };
    match told {
        Some(CredentialError::Refused { refused, path, .. }) => {
            assert_eq!(refused, bad.refused, "{service}/{method} with {}", bad.what);
            assert_eq!(path, *credential, "the file is named");
        }
        other => panic!("{service}/{method} with {}: {other:?}", bad.what),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i8_a_bad_certificate_opens_no_method_and_its_bearer_hears_why_and_is_counted() {
    within(300, async {
        let stage = Stage::start(&[]).await;
        let elsewhere = Directory::at(stage.server.path("elsewhere"));
        elsewhere.init(Validity::of_days(1).expect("a validity")).expect("another authority");
        // The operator may call most; who else it might be makes no difference before anybody is known.
        let identity = Identity { name: "operator".to_owned(), role: Role::Operator };
        let all = Bad::all(&stage, &identity, &elsewhere).await;
        let (calls, ok) = (
            counted(&stage, "iommu_calls_total", "method").await,
            counted(&stage, "iommu_tls_handshakes_total", "outcome=\"ok\"").await,
        );
        let authority = stage.server.pki().join("ca.crt");
        for bad in all {
            let outcome = format!("outcome=\"{}\"", bad.outcome);
            let before = counted(&stage, "iommu_tls_handshakes_total", &outcome).await;
            let mut knocking = JoinSet::new();
            let mut methods = 0u64;
            for (service, method, _) in rows() {
                methods += 1;
                if knocking.len() >= AT_ONCE {
                    knocking.join_next().await.expect("some are under way").expect("refused");
                }
                let (endpoint, authority) = (stage.server.endpoint().to_owned(), authority.clone());
                let (identity, bad) = (identity.clone(), bad.clone());
                knocking.spawn(async move {
                    let refused =
                        refused_at_the_handshake(&endpoint, &authority, &identity, &bad, (service, method));
                    tokio::time::timeout(SOON, refused).await.expect("it is told soon");
                });
            }
            while let Some(refused) = knocking.join_next().await {
                refused.expect("refused");
            }
            // Each at least once: a channel whose connection dies before the request is under way may dial again.
            counted_at_least(&stage, "iommu_tls_handshakes_total", &outcome, before + methods).await;
        }
        let calls_after = counted(&stage, "iommu_calls_total", "method").await;
        assert_eq!(calls_after, calls, "no call reached a service");
        let ok_after = counted(&stage, "iommu_tls_handshakes_total", "outcome=\"ok\"").await;
        assert_eq!(ok_after, ok, "nobody was let in");
        // Who was there before was not disturbed.
        let topology = tokio::time::timeout(Duration::from_secs(5), stage.inspect().topology()).await;
        topology.expect("an answer").expect("the observer's session stands");
    })
    .await;
}
