//! One handshake: bounded in time, cut when others need its place, and refused so that the peer hears why.

use std::io;
use std::sync::Arc;

use iommu_pki::PeerCertificate;
use rustls::CertificateError;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::Tls;
use super::metrics::Handshake;
use crate::bounds;
use crate::connection::{Connection, ConnectionHandle, Connections};
use crate::telemetry::{now_unix_ms, warn_limited};

/// How a refused handshake is counted.
fn outcome_of(error: &io::Error) -> Handshake {
    let error = error.get_ref().and_then(|error| error.downcast_ref::<rustls::Error>());
    match error {
        Some(rustls::Error::NoCertificatesPresented) => Handshake::NoCertificate,
        Some(rustls::Error::InvalidCertificate(certificate)) => match certificate {
            CertificateError::Expired
            | CertificateError::ExpiredContext { .. }
            | CertificateError::NotValidYet
            | CertificateError::NotValidYetContext { .. } => Handshake::Expired,
            CertificateError::Revoked => Handshake::Revoked,
            CertificateError::UnknownIssuer
            | CertificateError::UnknownRevocationStatus
            | CertificateError::BadSignature => Handshake::UnknownCa,
            CertificateError::Other(_) => Handshake::NoIdentity,
            _ => Handshake::Other,
        },
        _ => Handshake::Other,
    }
}

/// The reason in words that say what was found; rustls would print an error of ours with its debug form.
fn words_of(error: &io::Error) -> String {
    let inner = error.get_ref().and_then(|error| error.downcast_ref::<rustls::Error>());
    match inner {
        Some(rustls::Error::InvalidCertificate(CertificateError::Other(other))) => other.0.to_string(),
        Some(error) => error.to_string(),
        None => error.to_string(),
    }
}

impl Tls {
    /// Shakes hands; `None` when nothing came of it, which is logged and counted.
    pub(crate) async fn accept(
        self: Arc<Self>,
        socket: TcpStream,
        handle: ConnectionHandle,
        connections: &Connections,
    ) -> Option<Connection> {
        let shaken = tokio::select! {
            shaken = tokio::time::timeout(bounds::HANDSHAKE_TIMEOUT, self.shake(socket)) => shaken,
            () = handle.cut_in_handshake() => return self.refuse(&handle, Handshake::Displaced, "others need its place"),
        };
        match shaken {
            Ok(Ok((stream, certificate))) => {
                // It was verified by the list that was in force when the handshake began.
                if let Some(why) = self.verdict(&certificate, now_unix_ms() / 1000) {
                    return self.refuse(&handle, Handshake::Revoked, why.label());
                }
                self.metrics.handshake(Handshake::Ok);
                let cut = connections.certify(&handle, certificate);
                if cut > 0 {
                    warn_limited!(peer = %handle.peer(), cut, "too many connections of one peer");
                }
                Some(Connection::tls(stream, handle))
            }
            Ok(Err((error, socket))) => {
                let refused = self.refuse(&handle, outcome_of(&error), &words_of(&error));
                tokio::select! {
                    () = let_the_alert_arrive(socket) => {}
                    () = handle.cut_in_handshake() => {}
                }
                refused
            }
            Err(_) => self.refuse(&handle, Handshake::Timeout, "it took too long"),
        }
    }

    async fn shake(
        &self,
        socket: TcpStream,
    ) -> Result<(TlsStream<TcpStream>, PeerCertificate), (io::Error, TcpStream)> {
        let acceptor = TlsAcceptor::from(Arc::clone(&self.current().config));
        let stream = acceptor.accept(socket).into_fallible().await?;
        // The verifier has read it already; what it took reads again.
        let shown = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
        match shown.map(|certificate| PeerCertificate::read(certificate)) {
            Some(Ok(certificate)) => Ok((stream, certificate)),
            _ => Err((io::Error::other("the certificate was not kept"), stream.into_inner().0)),
        }
    }

    fn refuse(&self, handle: &ConnectionHandle, outcome: Handshake, reason: &str) -> Option<Connection> {
        self.metrics.handshake(outcome);
        warn_limited!(peer = %handle.peer(), outcome = outcome.label(), reason, "handshake refused");
        None
    }
}

/// Closes our side and reads what still comes: a socket that is closed with unread bytes sends a reset, which overtakes the alert.
async fn let_the_alert_arrive(mut socket: TcpStream) {
    let linger = async {
        socket.shutdown().await?;
        let mut rest = socket.take(bounds::ALERT_LINGER_BYTES);
        tokio::io::copy(&mut rest, &mut tokio::io::sink()).await
    };
    // However it ends, the connection is over.
    let _over = tokio::time::timeout(bounds::ALERT_LINGER, linger).await;
}
