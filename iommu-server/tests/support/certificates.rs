//! A server with certificates, clients with any certificate, and authorities that make odd ones.
#![allow(unreachable_pub, reason = "every test program takes the module in as its own")]

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use iommu_pki::{Directory, Overwrite, Serial, Validity};
use iommu_proto::channel::{Dial, DialError, Dialled};
use iommu_proto::credentials::{CredentialError, Credentials};
use iommu_proto::pb;
use iommu_server::cli::ServeArgs;
use iommu_server::config::Config;
use iommu_server::server::{Server, ServerError};
use iommu_server::tls::metrics::Handshake;
use iommu_types::{Identity, Owner, Role};
use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, Issuer, KeyPair, SanType};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{AlertDescription, ClientConfig, RootCertStore};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::Status;
use tonic::transport::Channel;

use super::support::{Driver, driver_role, eventually, open, open_request};

pub fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

pub fn day() -> Validity {
    Validity::of_days(1).unwrap()
}

pub fn peer(name: &str, role: Role) -> Identity {
    Identity { name: name.to_owned(), role }
}

pub fn serial_of(path: &Path) -> Serial {
    Directory::show(path).unwrap().serial
}

/// What a certificate is made for.
#[derive(Clone, Copy)]
pub enum Usage {
    Client,
    Server,
}

/// An authority in a directory of its own.
pub struct Authority {
    pub pki: Directory,
    directory: tempfile::TempDir,
}

/// One that has nothing to do with the server.
pub fn authority_elsewhere() -> Authority {
    let authority = Authority::empty();
    authority.pki.init(day()).unwrap();
    authority
}

impl Authority {
    fn empty() -> Self {
        let directory = tempfile::tempdir().unwrap();
        Self { pki: Directory::at(directory.path().join("pki")), directory }
    }
    fn fresh_file(&self) -> PathBuf {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        self.directory.path().join(format!("{}.pem", NEXT.fetch_add(1, Ordering::Relaxed)))
    }
    /// A credential in a file of its own.
    pub fn issue(&self, identity: &Identity, validity: Validity) -> PathBuf {
        let file = self.fresh_file();
        self.pki.issue(identity, validity, Some(&file), Overwrite::Never).unwrap().path
    }
    /// A credential with names that `issue` would not give.
    pub fn odd(&self, uris: &[&str], hosts: &[&str], usage: Usage) -> PathBuf {
        let read = |name| std::fs::read_to_string(self.pki.file(name)).unwrap();
        let key = KeyPair::from_pem(&read("ca.key")).unwrap();
        let issuer = Issuer::from_ca_cert_pem(&read("ca.crt"), key).unwrap();
        let mut params = CertificateParams::default();
        let uris = uris.iter().map(|uri| SanType::URI((*uri).try_into().unwrap()));
        let hosts = hosts.iter().map(|host| SanType::DnsName((*host).try_into().unwrap()));
        params.subject_alt_names = uris.chain(hosts).collect();
        params.use_authority_key_identifier_extension = true;
        params.extended_key_usages = vec![match usage {
            Usage::Client => ExtendedKeyUsagePurpose::ClientAuth,
            Usage::Server => ExtendedKeyUsagePurpose::ServerAuth,
        }];
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &issuer).unwrap();
        let file = self.fresh_file();
        std::fs::write(&file, certificate.pem() + &key.serialize_pem()).unwrap();
        file
    }
    /// Connects with this credential, trusting this authority.
    pub async fn dial(
        &self,
        to: SocketAddr,
        credential: &Path,
        identity: &Identity,
    ) -> Result<Dialled, DialError> {
        let credentials = Credentials::from_files(credential, self.pki.file("ca.crt"));
        Dial::to(&format!("https://{to}"), &credentials, identity).unwrap().connect().await
    }
}

/// Why no session came about.
#[derive(Debug)]
pub enum Why {
    Credential(CredentialError),
    Status(Status),
}

/// A server over TLS and its authority.
pub struct TlsStage {
    pub server: Server,
    authority: Authority,
}

impl std::ops::Deref for TlsStage {
    type Target = Authority;
    fn deref(&self) -> &Authority {
        &self.authority
    }
}

fn config(authority: &Authority, change: impl FnOnce(&mut ServeArgs)) -> Config {
    let mut args = ServeArgs {
        listen: vec!["127.0.0.1:0".parse().unwrap()],
        pki: Some(authority.pki.path().to_owned()),
        memory: Some("64MiB".to_owned()),
        grace: Some("200ms".to_owned()),
        admin: Some("off".to_owned()),
        ..ServeArgs::default()
    };
    change(&mut args);
    Config::from_args(args).unwrap()
}

impl TlsStage {
    pub async fn start() -> Self {
        let authority = Authority::empty();
        let server = Server::start(config(&authority, |_| {})).await.unwrap();
        Self { server, authority }
    }
    /// Another server on the same directory.
    pub async fn try_again(&self, change: impl FnOnce(&mut ServeArgs)) -> Result<Server, ServerError> {
        Server::start(config(&self.authority, change)).await
    }
    pub async fn start_again(&self, change: impl FnOnce(&mut ServeArgs)) -> Server {
        self.try_again(change).await.unwrap()
    }
    pub fn handshakes(&self, outcome: Handshake) -> u64 {
        self.server.host.tls.as_ref().unwrap().metrics.handshakes(outcome)
    }
    /// Waits until files were read anew so many times.
    pub async fn reloaded(&self, times: u64) {
        let tls = self.server.host.tls.as_ref().unwrap();
        eventually("certificates are read anew", async || tls.metrics.reloads().0 >= times).await;
    }
    pub async fn connect_with(&self, credential: &Path, identity: &Identity) -> Result<Dialled, DialError> {
        self.dial(self.server.listen[0], credential, identity).await
    }
    /// Connects with the certificate that the server made.
    pub async fn connect(&self, identity: &Identity) -> Channel {
        let credential = self.pki.file(&identity.credential_file().unwrap());
        self.connect_with(&credential, identity).await.unwrap().channel
    }
    /// Connects and opens a session.
    pub async fn open_with(
        &self,
        credential: &Path,
        identity: &Identity,
        role: pb::open_request::Role,
    ) -> Result<Channel, Why> {
        let dialled = self.connect_with(credential, identity).await.map_err(|error| match error {
            DialError::Credential(error) => Why::Credential(error),
            DialError::Unreachable(why) => panic!("nobody is there: {why}"),
        })?;
        match open(&dialled.channel, open_request(&identity.name, role)).await {
            Ok(_) => Ok(dialled.channel),
            Err(status) => Err(dialled.trouble.take().map_or(Why::Status(status), Why::Credential)),
        }
    }
    pub async fn driver(&self, number: u32) -> Driver {
        let channel =
            self.connect(&peer(&format!("driver{number}"), Role::Driver(Owner::Driver(number)))).await;
        let opened = open(&channel, open_request(&format!("driver{number}"), driver_role(number))).await;
        Driver::on(channel, opened.unwrap())
    }
    async fn handshake_without_certificate(&self) -> TlsStream<TcpStream> {
        let mut roots = RootCertStore::empty();
        let authority = std::fs::read(self.pki.file("ca.crt")).unwrap();
        roots.add(CertificateDer::from_pem_slice(&authority).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec()];
        let socket = TcpStream::connect(self.server.listen[0]).await.unwrap();
        let name = ServerName::try_from("127.0.0.1").unwrap();
        TlsConnector::from(Arc::new(config)).connect(name, socket).await.unwrap()
    }
    /// What a peer without a certificate hears, although it speaks first.
    pub async fn alert_without_certificate(&self) -> AlertDescription {
        let mut stream = self.handshake_without_certificate().await;
        let _sent = stream.write_all(&[0; 8192]).await;
        let error = stream.read(&mut [0; 64]).await.expect_err("an alert comes");
        match error.get_ref().and_then(|error| error.downcast_ref::<rustls::Error>()) {
            Some(rustls::Error::AlertReceived(alert)) => *alert,
            _ => panic!("no alert: {error:?}"),
        }
    }
    /// The certificate that the server shows.
    pub async fn own_certificate(&self) -> CertificateDer<'static> {
        let stream = self.handshake_without_certificate().await;
        stream.get_ref().1.peer_certificates().unwrap()[0].clone()
    }
    /// Every file of the directory: name, mode, content.
    pub fn files(&self) -> Vec<(String, u32, Vec<u8>)> {
        let entries = std::fs::read_dir(self.pki.path()).unwrap().map(Result::unwrap);
        let mut files: Vec<_> = entries
            .map(|entry| {
                let mode = entry.metadata().unwrap().permissions().mode() & 0o777;
                let content = std::fs::read(entry.path()).unwrap();
                (entry.file_name().into_string().unwrap(), mode, content)
            })
            .collect();
        files.sort();
        files
    }
}
