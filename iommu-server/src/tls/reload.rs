//! Rotation: files that change are read anew, and connections whose certificate has had its day are ended.
//!
//! What does not parse leaves in force what was read before. A connection is ended, with the reason, once its certificate expires or
//! stands on a list that was read later; it is cut when the reason had time to arrive.

use std::sync::Arc;
use std::time::{Duration, Instant};

use iommu_pki::PeerCertificate;

use super::material::{Material, Stamps};
use super::{Reloads, Tls};
use crate::bounds;
use crate::connection::ConnectionHandle;
use crate::ending::Ending;
use crate::host::Host;
use crate::telemetry::{now_unix_ms, warn_limited};

const A_DAY: Duration = Duration::from_secs(86_400);

impl Tls {
    /// Reads the files anew when they have changed, or in any case when that was asked for. What cannot be read is tried again next time.
    pub(super) fn reload(&self, asked: bool) {
        let mut reloads = self.reloads.lock();
        // Taken before the files are read: one that changes in between looks changed again next time.
        let now = Stamps::of(&self.directory);
        if !asked && now == reloads.seen {
            return;
        }
        match Material::load(&self.directory) {
            Ok(material) => {
                let (revoked, own_not_after_unix_s) = (material.revoked.len(), material.own_not_after_unix_s);
                *self.current.write() = Arc::new(material);
                *reloads = Reloads { seen: now, failed: None };
                self.metrics.reload(true);
                tracing::info!(directory = %self.directory().display(), revoked, own_not_after_unix_s, "certificates read anew");
            }
            Err(error) => self.reload_failed(&mut reloads, asked, &error.to_string()),
        }
    }

    /// Told when it is another failure than before, when somebody asked, and once in a while.
    fn reload_failed(&self, reloads: &mut Reloads, asked: bool, reason: &str) {
        self.metrics.reload(false);
        let told = reloads
            .failed
            .as_ref()
            .is_some_and(|(before, at)| before == reason && at.elapsed() < bounds::RELOAD_FAILURE_TOLD_AGAIN);
        if told && !asked {
            return;
        }
        reloads.failed = Some((reason.to_owned(), Instant::now()));
        tracing::error!(
            reason,
            "certificates cannot be read anew; those that were read before stay in force"
        );
    }

    /// [`reload`](Self::reload) where nobody waits for it: a list may have megabytes, and each signature is verified.
    async fn reload_off_the_runtime(self: &Arc<Self>, asked: bool) {
        let tls = Arc::clone(self);
        if tokio::task::spawn_blocking(move || tls.reload(asked)).await.is_err() {
            tracing::error!("reading certificates anew ended early");
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
        tls.reload_off_the_runtime(asked).await;
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

#[cfg(test)]
mod tests {
    use iommu_pki::{Directory, REVOCATIONS, Validity};

    use super::*;

    #[test]
    fn a_reload_that_failed_is_tried_again_without_a_change() {
        let parent = tempfile::tempdir().expect("a directory");
        let directory = Directory::at(parent.path().join("pki"));
        directory.init(Validity::of_days(1).expect("a validity")).expect("an authority");
        let validity = Validity::of_days(1).expect("a validity");
        let never = iommu_pki::Overwrite::Never;
        directory.issue_server(&[], validity, None, never).expect("issued");
        let tls = Tls::open(directory.clone()).expect("certificates");
        let seen = tls.reloads.lock().seen;
        // Something cannot be read for a moment, and comes back as it was: as when there are no file descriptors.
        let (list, aside) = (directory.file(REVOCATIONS), parent.path().join("aside"));
        std::fs::rename(&list, &aside).expect("moved");
        tls.reload(false);
        {
            let reloads = tls.reloads.lock();
            assert!(reloads.failed.is_some() && reloads.seen == seen, "what failed has not been seen");
        }
        std::fs::write(&list, std::fs::read(&aside).expect("read")).expect("written");
        tls.reload(false);
        let reloads = tls.reloads.lock();
        assert!(reloads.failed.is_none() && reloads.seen == Stamps::of(&directory));
    }
}
