//! What is counted about handshakes, and about certificates that were read anew.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

/// How a handshake ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Handshake {
    /// The peer is who its certificate says.
    Ok,
    /// Its certificate is not, or no longer, in its time.
    Expired,
    /// Its certificate was revoked.
    Revoked,
    /// Another authority signed it.
    UnknownCa,
    /// It showed none.
    NoCertificate,
    /// Its certificate names no identity, or several.
    NoIdentity,
    /// It took too long.
    Timeout,
    /// Others needed its place.
    Displaced,
    /// Something else.
    Other,
}

impl Handshake {
    /// For logs and metrics.
    pub fn label(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Expired => "expired",
            Self::Revoked => "revoked",
            Self::UnknownCa => "unknown_ca",
            Self::NoCertificate => "no_certificate",
            Self::NoIdentity => "no_identity",
            Self::Timeout => "timeout",
            Self::Displaced => "displaced",
            Self::Other => "other",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabels {
    outcome: &'static str,
}

/// The counters.
#[derive(Debug, Default)]
pub struct TlsMetrics {
    handshakes: Family<OutcomeLabels, Counter>,
    reloads: Family<OutcomeLabels, Counter>,
}

impl TlsMetrics {
    pub(super) fn handshake(&self, outcome: Handshake) {
        self.handshakes.get_or_create(&OutcomeLabels { outcome: outcome.label() }).inc();
    }
    pub(super) fn reload(&self, read: bool) {
        let outcome = if read { "ok" } else { "failed" };
        self.reloads.get_or_create(&OutcomeLabels { outcome }).inc();
    }
    /// Handshakes with this outcome so far.
    pub fn handshakes(&self, outcome: Handshake) -> u64 {
        self.handshakes.get_or_create(&OutcomeLabels { outcome: outcome.label() }).get()
    }
    /// Reloads so far that were taken, and that were not.
    pub fn reloads(&self) -> (u64, u64) {
        let of = |outcome| self.reloads.get_or_create(&OutcomeLabels { outcome }).get();
        (of("ok"), of("failed"))
    }
    pub(crate) fn register(&self, registry: &mut Registry) {
        registry.register("tls_handshakes", "TLS handshakes, by outcome", self.handshakes.clone());
        let help = "Certificates read anew, by whether they were taken";
        registry.register("tls_reloads", help, self.reloads.clone());
    }
}
