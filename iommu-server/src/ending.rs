//! Why a session or a stream ends, told once and to everybody who waits for it.
//!
//! Every stream of the server hangs on an [`EndSignal`], idle ones included: that is what lets a drain finish within its
//! deadline, and what fences an old session the moment a newer one stands.

use std::future::Future;
use std::sync::{Arc, OnceLock};

use iommu_proto::errors::WireError;
use iommu_types::DeviceAddress;
use iommu_types::errors::{
    CertificateExpired, CertificateRevoked, ProtocolViolation, SessionFenced, ShuttingDown, StreamStalled,
    UnknownDevice,
};
use tokio_util::sync::CancellationToken;
use tonic::Status;

/// Why something ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// A newer session of the same identity took over.
    Fenced {
        /// Its generation.
        by_generation: u64,
    },
    /// The peer did not read.
    Stalled {
        /// For how long, in milliseconds.
        stalled_ms: u64,
    },
    /// The peer broke a rule of its stream.
    Violation {
        /// Which.
        why: String,
    },
    /// The device is not declared any more.
    Removed {
        /// Which.
        device: DeviceAddress,
    },
    /// The certificate of the connection has expired.
    CertificateExpired {
        /// When, in seconds since the UNIX epoch.
        expired_unix_s: u64,
    },
    /// The certificate of the connection was revoked.
    CertificateRevoked {
        /// Its serial number.
        serial: String,
    },
    /// The server goes down.
    ShuttingDown,
}

impl Ending {
    /// What the peer is told.
    pub fn into_status(self) -> Status {
        match self {
            Self::Fenced { by_generation } => SessionFenced { by_generation }.into_status(),
            Self::Stalled { stalled_ms } => StreamStalled { stalled_ms }.into_status(),
            Self::Violation { why } => ProtocolViolation { why }.into_status(),
            Self::Removed { device } => UnknownDevice { device }.into_status(),
            Self::CertificateExpired { expired_unix_s } => {
                CertificateExpired { expired_unix_s }.into_status()
            }
            Self::CertificateRevoked { serial } => CertificateRevoked { serial }.into_status(),
            Self::ShuttingDown => ShuttingDown {}.into_status(),
        }
    }

    /// A word for logs and metrics.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Fenced { .. } => "fenced",
            Self::Stalled { .. } => "stalled",
            Self::Violation { .. } => "violation",
            Self::Removed { .. } => "removed",
            Self::CertificateExpired { .. } => "certificate_expired",
            Self::CertificateRevoked { .. } => "certificate_revoked",
            Self::ShuttingDown => "shutting_down",
        }
    }
}

/// Ends once; the first reason stays.
#[derive(Clone, Debug, Default)]
pub struct EndSignal {
    why: Arc<OnceLock<Ending>>,
    token: CancellationToken,
}

impl EndSignal {
    /// Not ended.
    pub fn new() -> Self {
        Self::default()
    }
    /// Ends it; `true` when this call did.
    pub fn end(&self, why: Ending) -> bool {
        let first = self.why.set(why).is_ok();
        self.token.cancel();
        first
    }
    /// Why it ended, when it did.
    pub fn ended(&self) -> Option<&Ending> {
        self.why.get()
    }
    /// Resolves when it ends.
    pub async fn wait(&self) -> Ending {
        self.token.cancelled().await;
        self.why.get().cloned().expect("the reason is set before the token is cancelled")
    }
    /// The same, owned.
    pub fn wait_owned(&self) -> impl Future<Output = Ending> + Send + 'static {
        let this = self.clone();
        async move { this.wait().await }
    }
}
