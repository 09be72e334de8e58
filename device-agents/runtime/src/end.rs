//! Why a session ended, and whether another one makes sense.

use iommu_proto::errors::WireError;
use iommu_types::errors::{CallError, SessionError, SessionFenced};
use tonic::Status;

use crate::Reconnect;

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
    /// The endpoint is not one that can be connected to.
    #[error("the endpoint {endpoint:?} is not usable: {why}; write http://ADDRESS:PORT or unix:///PATH")]
    BadEndpoint {
        /// As given.
        endpoint: String,
        /// What is wrong with it.
        why: String,
    },
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

    /// Whether to connect again.
    pub(crate) fn allows_reconnect(&self, policy: &Reconnect) -> bool {
        match self {
            Self::Cancelled | Self::BadEndpoint { .. } | Self::Protocol(_) => false,
            Self::Fenced(_) => policy.after_fenced,
            Self::Refused(SessionError::ShuttingDown(_) | SessionError::LimitReached(_)) => true,
            Self::Refused(_) => policy.after_refused,
            Self::Ended(error) => ended_is_passing(error),
            Self::Lost(_) => true,
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

/// An error with all its causes, which tonic keeps to itself ("transport error").
pub(crate) fn causes(error: &dyn std::error::Error) -> String {
    let mut told = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let words = error.to_string();
        if !told.contains(&words) {
            told.push_str(": ");
            told.push_str(&words);
        }
        cause = error.source();
    }
    told
}
