//! What a call can end with: a refusal of its operation, something that can befall any call, or no answer.

use std::collections::HashMap;
use std::time::Duration;

use iommu_proto::channel::{BadEndpoint, causes};
use iommu_proto::credentials::CredentialError;
use iommu_proto::errors::WireError;
use iommu_types::errors::{CallError, SessionError};
use tonic::{Code, Status};
use tonic_types::ErrorDetails;

/// Why a call did not succeed. `E` is the operation's own enum, the very one that the server's core returned.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SdkError<E> {
    /// The operation was refused, and nothing was changed.
    #[error("{0}")]
    Refused(E),
    /// What can befall any call: session, role, framing, limits, the server.
    #[error(transparent)]
    Call(#[from] CallError),
    /// There was no answer that could be understood. Whether a mutating call took effect is not known.
    #[error(transparent)]
    Transport(#[from] TransportError),
}

impl<E> SdkError<E> {
    /// The operation's own error, when it was refused.
    pub fn refusal(&self) -> Option<&E> {
        match self {
            Self::Refused(refusal) => Some(refusal),
            Self::Call(_) | Self::Transport(_) => None,
        }
    }
}

/// Why there was no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TransportError {
    /// The endpoint is not one that can be connected to.
    #[error(transparent)]
    BadEndpoint(#[from] BadEndpoint),
    /// The certificate is not there, or the server does not take it, or the server's own is not to be trusted.
    #[error(transparent)]
    Credential(#[from] CredentialError),
    /// No connection could be made.
    #[error("no connection to {endpoint}: {why}; is the server running there?")]
    Unreachable {
        /// As given.
        endpoint: String,
        /// What the transport said.
        why: String,
    },
    /// The deadline of the call passed, retries included.
    #[error("no answer within {waited:?}{}", because(.last))]
    Deadline {
        /// The deadline.
        waited: Duration,
        /// How the last attempt failed, when one did.
        last: Option<String>,
    },
    /// The server refused to open the session again after the connection was lost.
    #[error("the session was not opened again: {0}")]
    SessionRefused(#[from] SessionError),
    /// The connection was away for longer than the server's grace: what the session held is reclaimed.
    #[error(
        "the server has reclaimed what this session held (it was away for longer than the grace); open a new one"
    )]
    StateLost,
    /// The server ended the call with a status that is none of this schema's.
    #[error("{code:?}: {message}")]
    Status {
        /// The gRPC code.
        code: Code,
        /// Its message, with causes.
        message: String,
    },
    /// The answer breaks the schema.
    #[error("the answer of the server is not understood: {0}")]
    BadAnswer(String),
}

fn because(last: &Option<String>) -> String {
    last.as_ref().map_or_else(String::new, |last| format!("; the last attempt: {last}"))
}

/// The error type of calls that have no refusals of their own; it has no values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Never {}

impl WireError for Never {
    fn reason(&self) -> &'static str {
        match *self {}
    }
    fn code(&self) -> Code {
        match *self {}
    }
    fn metadata(&self) -> HashMap<String, String> {
        match *self {}
    }
    fn details(&self) -> ErrorDetails {
        match *self {}
    }
    fn from_reason(_: &str, _: &HashMap<String, String>) -> Option<Self> {
        None
    }
}

/// An error of a call that has no refusals, as one of any other call.
pub(crate) fn without_refusal<E>(error: SdkError<Never>) -> SdkError<E> {
    match error {
        SdkError::Refused(never) => match never {},
        SdkError::Call(error) => SdkError::Call(error),
        SdkError::Transport(error) => SdkError::Transport(error),
    }
}

/// What a refused status means to the caller.
pub(crate) fn of_status<E: WireError>(status: &Status) -> SdkError<E> {
    if let Some(refusal) = E::from_status(status) {
        return SdkError::Refused(refusal);
    }
    match CallError::from_status(status) {
        Some(error) => SdkError::Call(error),
        None => TransportError::Status { code: status.code(), message: causes(status) }.into(),
    }
}
