//! The client's end of TLS: a handshake of our own under the transport, which remembers why the server cut it short.
//!
//! In TLS 1.3 a client is done before the server has seen its certificate, so a refusal comes as an alert on the first read, under HTTP/2,
//! which keeps of it a text at most. The stream here sees the alert itself and leaves it in a [`Trouble`] that whoever connects can ask.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use iommu_types::Identity;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{AlertDescription, ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::credentials::{CredentialError, Credentials, Files, Refused, missing, refused};

/// The protocol inside: HTTP/2.
pub const ALPN: &[u8] = b"h2";

/// Largest file of a client: a chain of certificates and a key, or a few authorities, have some kilobytes.
const CREDENTIAL_BYTES_MAX: u64 = 1 << 20;

/// What certificates had to do with the end of a connection, or of an attempt at one.
#[derive(Clone, Debug, Default)]
pub struct Trouble(Arc<Mutex<Option<CredentialError>>>);

impl Trouble {
    /// Takes it, when there was some.
    pub fn take(&self) -> Option<CredentialError> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
    fn leave(&self, error: CredentialError) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
    }
}

/// Where to and as whom.
#[derive(Clone, Debug)]
pub(crate) struct TlsPeer {
    pub(crate) host: String,
    pub(crate) port: u16,
    pub(crate) credentials: Credentials,
    pub(crate) identity: Identity,
}

fn read(path: &Path, identity: &Identity) -> Result<Vec<u8>, CredentialError> {
    let bounded = || {
        let mut bytes = Vec::new();
        File::open(path)?.take(CREDENTIAL_BYTES_MAX + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > CREDENTIAL_BYTES_MAX {
            return Err(io::Error::other("it is larger than certificates and a key are"));
        }
        Ok(bytes)
    };
    bounded().map_err(|reason: io::Error| match reason.kind() {
        io::ErrorKind::NotFound => missing(path, identity),
        _ => CredentialError::Unreadable { path: path.to_owned(), why: reason.to_string() },
    })
}

fn certificates(path: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, CredentialError> {
    let unreadable = |why: String| CredentialError::Unreadable { path: path.to_owned(), why };
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let certificates = certificates.map_err(|error| unreadable(error.to_string()))?;
    if certificates.is_empty() {
        return Err(unreadable("it holds no certificate".to_owned()));
    }
    Ok(certificates)
}

impl TlsPeer {
    /// Reads the files, as they are now.
    fn config(&self, files: &Files) -> Result<ClientConfig, CredentialError> {
        let unreadable =
            |path: &Path, why: String| CredentialError::Unreadable { path: path.to_owned(), why };
        let mut roots = RootCertStore::empty();
        for root in certificates(&files.authority, &read(&files.authority, &self.identity)?)? {
            roots.add(root).map_err(|error| unreadable(&files.authority, error.to_string()))?;
        }
        let credential = read(&files.credential, &self.identity)?;
        let chain = certificates(&files.credential, &credential)?;
        let key = PrivateKeyDer::from_pem_slice(&credential)
            .map_err(|error| unreadable(&files.credential, format!("it holds no key ({error})")))?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .and_then(|builder| builder.with_root_certificates(roots).with_client_auth_cert(chain, key));
        let mut config = config.map_err(|error| unreadable(&files.credential, error.to_string()))?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        // Each connection shows the certificate that is there now, so there is nothing to resume.
        config.resumption = rustls::client::Resumption::disabled();
        Ok(config)
    }

    /// Connects and shakes hands. What certificates have to do with a failure is left in `trouble`.
    pub(crate) async fn connect(self, trouble: Trouble) -> io::Result<Watched> {
        let told = |error: CredentialError| {
            let words = error.to_string();
            trouble.leave(error);
            io::Error::other(words)
        };
        let files = self.credentials.files(&self.identity).map_err(told)?;
        let config = self.config(&files).map_err(told)?;
        let name = ServerName::try_from(self.host.clone()).map_err(io::Error::other)?;
        let socket = TcpStream::connect((self.host.as_str(), self.port)).await?;
        socket.set_nodelay(true)?;
        let watch = Watch { trouble: trouble.clone(), files, identity: self.identity };
        match TlsConnector::from(Arc::new(config)).connect(name, socket).await {
            Ok(stream) => Ok(Watched { stream, watch }),
            Err(error) => {
                watch.look(&error);
                Err(error)
            }
        }
    }
}

/// Reads TLS errors and leaves what they mean.
#[derive(Debug)]
struct Watch {
    trouble: Trouble,
    files: Files,
    identity: Identity,
}

impl Watch {
    fn look(&self, error: &io::Error) {
        let Some(error) = error.get_ref().and_then(|error| error.downcast_ref::<rustls::Error>()) else {
            return;
        };
        let refuse = |reason| refused(&self.files.credential, reason, &self.identity);
        let meant = match error {
            rustls::Error::AlertReceived(alert) => match reason_of(*alert) {
                Some(reason) => refuse(reason),
                None => return,
            },
            rustls::Error::InvalidCertificate(_) => CredentialError::ServerNotTrusted {
                authority: self.files.authority.clone(),
                why: error.to_string(),
            },
            rustls::Error::InvalidMessage(_) => CredentialError::NotTls { why: error.to_string() },
            _ => return,
        };
        self.trouble.leave(meant);
    }
}

/// What an alert says about our certificate; `None` for those that say something else, such as that no protocol is common to both: those are failures of
/// the handshake, which the error itself tells.
fn reason_of(alert: AlertDescription) -> Option<Refused> {
    match alert {
        AlertDescription::CertificateExpired => Some(Refused::Expired),
        AlertDescription::CertificateRevoked => Some(Refused::Revoked),
        AlertDescription::UnknownCA => Some(Refused::UnknownAuthority),
        AlertDescription::CertificateRequired => Some(Refused::NoCertificate),
        // What remains when the chain is good: what the certificate says.
        AlertDescription::CertificateUnknown => Some(Refused::NoIdentity),
        AlertDescription::BadCertificate
        | AlertDescription::UnsupportedCertificate
        | AlertDescription::AccessDenied
        // The signature that proves that the key is ours.
        | AlertDescription::DecryptError => Some(Refused::Other(format!("{alert:?}"))),
        _ => None,
    }
}

/// A TLS stream that remembers the alert that ended it.
#[derive(Debug)]
pub(crate) struct Watched {
    stream: TlsStream<TcpStream>,
    watch: Watch,
}

impl AsyncRead for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.stream).poll_read(context, buffer);
        if let Poll::Ready(Err(error)) = &polled {
            self.watch.look(error);
        }
        polled
    }
}

impl AsyncWrite for Watched {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }
    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }
    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_alerts_about_certificates_are_a_refused_certificate() {
        let other = |words: &str| Some(Refused::Other(words.to_owned()));
        for (alert, expected) in [
            (AlertDescription::CertificateExpired, Some(Refused::Expired)),
            (AlertDescription::CertificateRevoked, Some(Refused::Revoked)),
            (AlertDescription::UnknownCA, Some(Refused::UnknownAuthority)),
            (AlertDescription::CertificateRequired, Some(Refused::NoCertificate)),
            (AlertDescription::CertificateUnknown, Some(Refused::NoIdentity)),
            (AlertDescription::BadCertificate, other("BadCertificate")),
            (AlertDescription::NoApplicationProtocol, None),
            (AlertDescription::ProtocolVersion, None),
            (AlertDescription::HandshakeFailure, None),
            (AlertDescription::InternalError, None),
            (AlertDescription::UnrecognisedName, None),
        ] {
            assert_eq!(reason_of(alert), expected, "{alert:?}");
        }
    }
}
