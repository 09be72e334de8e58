//! Why a session ended, and whether another one makes sense.

use std::time::Duration;

use iommu_proto::channel::{BadEndpoint, DialError, causes};
use iommu_proto::credentials::CredentialError;
use iommu_proto::errors::WireError;
use iommu_types::errors::{CallError, SessionError, SessionFenced};
use tonic::Status;

use crate::Reconnect;

/// How long an agent whose certificate is refused waits before it shows what is in the file then.
const REFUSED_CERTIFICATE_DELAY: Duration = Duration::from_secs(5);

/// Why the session of an agent ended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EndReason {
    /// The agent's cancellation token was cancelled.
    #[error("the agent was asked to stop")]
    Cancelled,
    /// A newer session of the same device address took over.
    #[error(transparent)]
    Fenced(#[from] SessionFenced),
    /// The server refused the handshake.
    #[error("the server refused the session: {0}")]
    Refused(#[from] SessionError),
    /// The server ended the session for a reason of its own.
    #[error("the server ended the session: {0}")]
    Ended(#[from] CallError),
    /// The server broke the rules of the stream.
    #[error("the server broke the rules of the stream: {0}")]
    Protocol(String),
    /// The connection could not be made, or was lost.
    #[error("no connection: {0}")]
    Lost(String),
    /// The certificate is not there, or the server does not take it, or the server's own is not to be trusted. A new certificate may mend
    /// it, so an agent goes on trying, slowly.
    #[error("certificate: {0}")]
    Credential(#[from] CredentialError),
    /// The endpoint is not one that can be connected to.
    #[error(transparent)]
    BadEndpoint(#[from] BadEndpoint),
}

impl From<DialError> for EndReason {
    fn from(error: DialError) -> Self {
        match error {
            DialError::Credential(error) => Self::Credential(error),
            DialError::Unreachable(why) => Self::Lost(why),
        }
    }
}

impl EndReason {
    /// What a status that ended a stream, or refused to open one, means.
    pub(crate) fn of(status: &Status, handshake_done: bool) -> Self {
        let ended = || CallError::from_status(status);
        if let Some(CallError::SessionFenced(fenced)) = ended() {
            return Self::Fenced(fenced);
        }
        if !handshake_done && let Some(refused) = SessionError::from_status(status) {
            return Self::Refused(refused);
        }
        match ended() {
            Some(error) => Self::Ended(error),
            None => Self::Lost(format!("{:?}: {}", status.code(), causes(status))),
        }
    }

    /// The least time before the next attempt: what a person has to mend is not mended within milliseconds.
    pub(crate) fn least_delay(&self) -> Duration {
        match self {
            Self::Credential(CredentialError::Refused { .. } | CredentialError::ServerNotTrusted { .. }) => {
                REFUSED_CERTIFICATE_DELAY
            }
            _ => Duration::ZERO,
        }
    }

    /// Whether to connect again.
    pub(crate) fn allows_reconnect(&self, policy: &Reconnect) -> bool {
        match self {
            Self::Cancelled | Self::BadEndpoint(_) | Self::Protocol(_) => false,
            Self::Fenced(_) => policy.after_fenced,
            Self::Refused(SessionError::ShuttingDown(_) | SessionError::LimitReached(_)) => true,
            Self::Refused(_) => policy.after_refused,
            Self::Ended(error) => ended_is_passing(error),
            Self::Lost(_) | Self::Credential(_) => true,
        }
    }
}

/// Whether the same agent may fare better next time. A session that was ended for how its agent behaves would
/// end again.
fn ended_is_passing(error: &CallError) -> bool {
    match error {
        CallError::ShuttingDown(_)
        | CallError::StreamStalled(_)
        | CallError::LimitReached(_)
        | CallError::CertificateExpired(_)
        | CallError::CertificateRevoked(_)
        | CallError::Internal(_) => true,
        CallError::SessionRequired(_)
        | CallError::SessionFenced(_)
        | CallError::RoleRefused(_)
        | CallError::RequestTooOld(_)
        | CallError::RequestReused(_)
        | CallError::ProtocolViolation(_)
        | CallError::MalformedMessage(_)
        | CallError::MessageTooLarge(_)
        | CallError::UnknownMethod(_)
        | CallError::BadResumeToken(_)
        | CallError::InvalidField(_) => false,
    }
}
