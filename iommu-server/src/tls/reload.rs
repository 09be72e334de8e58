//! Rotation: files that change are read anew, and connections whose certificate has had its day are ended.
//!
//! What does not parse leaves in force what was read before. A connection is ended, with the reason, once its certificate expires or
//! stands on a list that was read later; it is cut when the reason had time to arrive.

use std::sync::Arc;
use std::time::{Duration, Instant};

use iommu_pki::PeerCertificate;

use super::Tls;
use super::material::{Material, Stamps};
use crate::bounds;
use crate::connection::ConnectionHandle;
use crate::ending::Ending;
use crate::host::Host;
use crate::telemetry::{now_unix_ms, warn_limited};

const A_DAY: Duration = Duration::from_secs(86_400);

impl Tls {
    /// Reads the files anew when they have changed, or in any case when that was asked for.
    fn reload(&self, asked: bool) {
        let now = Stamps::of(&self.directory);
        if !asked && now == *self.seen.read() {
            return;
        }
        // Taken before the files are read: one that changes in between looks changed again next time.
        *self.seen.write() = now;
        match Material::load(&self.directory) {
            Ok(material) => {
                let (revoked, own_not_after_unix_s) = (material.revoked.len(), material.own_not_after_unix_s);
                *self.current.write() = Arc::new(material);
                self.metrics.reload(true);
                tracing::info!(directory = %self.directory().display(), revoked, own_not_after_unix_s, "certificates read anew");
            }
            Err(error) => {
                self.metrics.reload(false);
                tracing::error!(reason = %error, "certificates cannot be read anew; those that were read before stay in force");
            }
        }
    }

    /// Why a connection with this certificate must end now.
    pub(crate) fn verdict(&self, certificate: &PeerCertificate, now_unix_s: u64) -> Option<Ending> {
        if now_unix_s > certificate.not_after_unix_s {
            return Some(Ending::CertificateExpired { expired_unix_s: certificate.not_after_unix_s });
        }
        let revoked = self.is_revoked(&certificate.serial);
        revoked.then(|| Ending::CertificateRevoked { serial: certificate.serial.to_string() })
    }

    fn warn_of_own(&self, now_unix_s: u64) {
        let left_s = self.own_not_after_unix_s().saturating_sub(now_unix_s);
        if left_s < bounds::OWN_CERTIFICATE_WARNING.as_secs() {
            tracing::warn!(
                left_s,
                "the server's own certificate expires soon; issue another with `iommuctl pki issue server --force`"
            );
        }
    }
}

/// Ends everything that stands on a connection.
fn end(host: &Host, connection: &ConnectionHandle, why: &Ending) {
    if !connection.end(why) {
        return;
    }
    for session in host.watchdog.sessions() {
        if session.is_on(connection) {
            session.end(why.clone());
        }
    }
    let identity = connection.certificate().map(|certificate| certificate.identity.to_string());
    warn_limited!(peer = %connection.peer(), identity, reason = why.label(), "connection ended");
    let connection = connection.clone();
    tokio::spawn(async move {
        tokio::time::sleep(bounds::ENDING_GRACE).await;
        connection.cut();
    });
}

/// Looks after certificates, for ever.
pub(crate) async fn run(host: Arc<Host>, tls: Arc<Tls>) {
    let mut tick = tokio::time::interval(bounds::CERTIFICATES_TICK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut warned: Option<Instant> = None;
    loop {
        let asked = tokio::select! {
            _ = tick.tick() => false,
            () = tls.asked.notified() => true,
        };
        tls.reload(asked);
        let now_unix_s = now_unix_ms() / 1000;
        for connection in host.connections.certified() {
            let why = connection.certificate().and_then(|one| tls.verdict(one, now_unix_s));
            if let Some(why) = why {
                end(&host, &connection, &why);
            }
        }
        if warned.is_none_or(|at| at.elapsed() >= A_DAY) {
            warned = Some(Instant::now());
            tls.warn_of_own(now_unix_s);
        }
    }
}
