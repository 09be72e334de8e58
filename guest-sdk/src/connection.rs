//! The session of a client: opened once, opened again when its connection is lost, and the calls on it.
//!
//! A session lives on one HTTP/2 connection. When that is lost, the next call (or a retry) connects anew and
//! comes back with the resume token; each connection has a number (epoch), so that of many calls that see one
//! loss only one opens again.

use std::future::Future;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use bytes::Bytes;
use iommu_proto::channel::{CONNECT_TIMEOUT, Dial, DialError, Dialled, causes};
use iommu_proto::credentials::Credentials;
use iommu_proto::errors::WireError;
use iommu_proto::limits::SCHEMA_VERSION;
use iommu_proto::pb;
use iommu_proto::pb::open_request::Role as WireRole;
use iommu_proto::pb::session_service_client::SessionServiceClient;
use iommu_types::errors::{CallError, SessionError};
use iommu_types::{Generation, Identity};
use tonic::transport::Channel;
use tonic::{Code, IntoRequest, Request, Response, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::error::of_status;
use crate::{SdkError, TransportError};

/// Delays between the attempts of a call.
pub(crate) const RETRY_FIRST: Duration = Duration::from_millis(20);
pub(crate) const RETRY_LONGEST: Duration = Duration::from_millis(500);

/// Limits of a session, enforced by the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionLimits {
    /// Largest message in bytes, either way.
    pub message_bytes_max: u32,
    /// Most operations in one batch.
    pub batch_operations_max: u32,
    /// Most bytes that one memory message may read or write.
    pub batch_bytes_max: u32,
    /// Most request IDs remembered for retries.
    pub request_window: u32,
}

/// One connection on which the session stands.
#[derive(Debug)]
pub(crate) struct Live {
    pub(crate) channel: Channel,
    pub(crate) epoch: u64,
    pub(crate) limits: SessionLimits,
    generation: Generation,
    grace: Duration,
}

/// A session and all that is needed to open it again.
#[derive(Debug)]
pub(crate) struct Core {
    dial: Dial,
    endpoint_text: String,
    deadline: Duration,
    /// What Open is called with; its token is the latest.
    open: tokio::sync::Mutex<pb::OpenRequest>,
    live: RwLock<Arc<Live>>,
}

impl Core {
    /// Connects and opens the session, with a token the one that it belongs to. Tries once: a server that is not there is told at once.
    pub(crate) async fn open(
        endpoint_text: String,
        credentials: &Credentials,
        deadline: Duration,
        identity: Identity,
        role: WireRole,
        resume_token: Bytes,
    ) -> Result<Arc<Self>, SdkError<SessionError>> {
        let dial = Dial::to(&endpoint_text, credentials, &identity).map_err(TransportError::from)?;
        let mut open = pb::OpenRequest {
            schema_version: SCHEMA_VERSION,
            name: identity.name,
            role: Some(role),
            resume_token,
        };
        let live = timed(deadline, open_session(&dial, &endpoint_text, &mut open, 1)).await?;
        Ok(Arc::new(Self {
            dial,
            endpoint_text,
            deadline,
            open: tokio::sync::Mutex::new(open),
            live: RwLock::new(Arc::new(live)),
        }))
    }

    pub(crate) fn live(&self) -> Arc<Live> {
        Arc::clone(&self.live.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn limits(&self) -> SessionLimits {
        self.live().limits
    }

    pub(crate) fn generation(&self) -> Generation {
        self.live().generation
    }

    /// What brings the session back, from another process too.
    pub(crate) async fn resume_token(&self) -> Bytes {
        self.open.lock().await.resume_token.clone()
    }

    pub(crate) fn grace(&self) -> Duration {
        self.live().grace
    }

    /// Opens the session again after connection `epoch` was lost. Whoever comes second gets what the first
    /// one opened.
    pub(crate) async fn reopen(&self, epoch: u64) -> Result<Arc<Live>, SdkError<SessionError>> {
        let mut open = self.open.lock().await;
        let current = self.live();
        if current.epoch != epoch {
            return Ok(current);
        }
        // Where what we held is gone the token stays as it is, so that every later attempt is told the same.
        let mut asked = open.clone();
        let opened = open_session(&self.dial, &self.endpoint_text, &mut asked, epoch.wrapping_add(1));
        let live = Arc::new(opened.await?);
        *open = asked;
        *self.live.write().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&live);
        tracing::info!(generation = live.generation.0, "session opened again");
        Ok(live)
    }

    /// Calls until there is an answer, a refusal, or the deadline. `attempt` is given the connection of each
    /// attempt.
    pub(crate) async fn call<E, T, F, A>(&self, attempt: F) -> Result<T, SdkError<E>>
    where
        E: WireError,
        F: Fn(Channel) -> A,
        A: Future<Output = Result<Response<T>, Status>>,
    {
        self.call_within(self.deadline, attempt).await
    }

    /// The same with a deadline of its own.
    pub(crate) async fn call_within<E, T, F, A>(
        &self,
        deadline: Duration,
        attempt: F,
    ) -> Result<T, SdkError<E>>
    where
        E: WireError,
        F: Fn(Channel) -> A,
        A: Future<Output = Result<Response<T>, Status>>,
    {
        let mut last = None;
        let retried = async {
            let mut delay = RETRY_FIRST;
            loop {
                let live = self.live();
                let status = match attempt(live.channel.clone()).await {
                    Ok(answer) => return Ok(answer.into_inner()),
                    Err(status) => status,
                };
                if !may_retry(&status) {
                    return Err(of_status(&status));
                }
                last = Some(causes(&status));
                if let Err(error) = self.reopen(live.epoch).await {
                    last = Some(error.to_string());
                    passing(error)?;
                }
                tokio::time::sleep(delay).await;
                delay = (delay * 2).min(RETRY_LONGEST);
            }
        };
        match timed(deadline, retried).await {
            Err(SdkError::Transport(TransportError::Deadline { waited, .. })) => {
                Err(TransportError::Deadline { waited, last }.into())
            }
            ended => ended,
        }
    }

    /// Calls once, for what must not be done twice and has no request ID; without a deadline, for transfers that take as long as they
    /// take. A session that the server does not know any more has not done anything, so that is opened again first.
    pub(crate) async fn call_once_at_length<E, T, F, A>(&self, attempt: F) -> Result<T, SdkError<E>>
    where
        E: WireError,
        F: Fn(Channel) -> A,
        A: Future<Output = Result<Response<T>, Status>>,
    {
        let live = self.live();
        let status = match attempt(live.channel.clone()).await {
            Ok(answer) => return Ok(answer.into_inner()),
            Err(status) => status,
        };
        if !matches!(CallError::from_status(&status), Some(CallError::SessionRequired(_))) {
            return Err(of_status(&status));
        }
        match self.reopen(live.epoch).await {
            Ok(live) => attempt(live.channel.clone())
                .await
                .map(Response::into_inner)
                .map_err(|status| of_status(&status)),
            Err(error) => passing(error).and(Err(of_status(&status))),
        }
    }

    /// [`call`](Self::call) of a unary method, with `message` and the deadline in each attempt.
    pub(crate) async fn unary<E, M, T, F, A>(&self, message: M, method: F) -> Result<T, SdkError<E>>
    where
        E: WireError,
        M: Clone,
        F: Fn(Channel, Request<M>) -> A,
        A: Future<Output = Result<Response<T>, Status>>,
    {
        self.call(|channel| method(channel, within(self.deadline, message.clone()))).await
    }

    /// [`call_once_at_length`](Self::call_once_at_length) of a unary method, which has the deadline of a call.
    pub(crate) async fn unary_once<E, M, T, F, A>(&self, message: M, method: F) -> Result<T, SdkError<E>>
    where
        E: WireError,
        M: Clone,
        F: Fn(Channel, Request<M>) -> A,
        A: Future<Output = Result<Response<T>, Status>>,
    {
        self.unary_once_within(self.deadline, message, method).await
    }

    /// The same with a deadline of its own.
    pub(crate) async fn unary_once_within<E, M, T, F, A>(
        &self,
        deadline: Duration,
        message: M,
        method: F,
    ) -> Result<T, SdkError<E>>
    where
        E: WireError,
        M: Clone,
        F: Fn(Channel, Request<M>) -> A,
        A: Future<Output = Result<Response<T>, Status>>,
    {
        let attempt = |channel| method(channel, within(deadline, message.clone()));
        timed(deadline, self.call_once_at_length(attempt)).await
    }

    /// One attempt on the connection that stands, for what comes too late on another one.
    pub(crate) async fn unary_here<E, M, T, F, A>(&self, message: M, method: F) -> Result<T, SdkError<E>>
    where
        E: WireError,
        F: FnOnce(Channel, Request<M>) -> A,
        A: Future<Output = Result<Response<T>, Status>>,
    {
        let attempt = method(self.live().channel.clone(), within(self.deadline, message));
        let answered = async {
            let answer = attempt.await;
            answer.map(Response::into_inner).map_err(|status| of_status(&status))
        };
        timed(self.deadline, answered).await
    }

    /// The deadline of a call.
    pub(crate) fn deadline(&self) -> Duration {
        self.deadline
    }
}

/// A request that tells the server how long its answer is waited for.
pub(crate) fn within<M>(deadline: Duration, message: M) -> Request<M> {
    let mut request = message.into_request();
    request.set_timeout(deadline);
    request
}

/// Gives the work up when the deadline has passed.
pub(crate) async fn timed<T, E>(
    deadline: Duration,
    work: impl Future<Output = Result<T, SdkError<E>>>,
) -> Result<T, SdkError<E>> {
    let ended = tokio::time::timeout(deadline, work).await;
    ended.unwrap_or_else(|_| Err(TransportError::Deadline { waited: deadline, last: None }.into()))
}

/// Whether a call that ended so may be made again: there was no answer, or the session is not known any more.
pub(crate) fn may_retry(status: &Status) -> bool {
    match CallError::from_status(status) {
        Some(error) => matches!(
            error,
            CallError::SessionRequired(_)
                | CallError::ShuttingDown(_)
                // The next connection shows the certificate that is in the file then.
                | CallError::CertificateExpired(_)
                | CallError::CertificateRevoked(_)
        ),
        None => status.code() == Code::Unavailable || is_broken_connection(status),
    }
}

/// Whether the server does not know the token any more: it has reclaimed the session, or was started anew. An identity that is refused says
/// nothing about the token, which the server has not looked at then.
fn is_forgotten(error: &SdkError<SessionError>) -> bool {
    matches!(error, SdkError::Refused(SessionError::BadResumeToken(_)))
}

/// Whether what the session held is there again when it is opened with its token. Who holds nothing opens afresh.
fn is_resumable(role: Option<&WireRole>) -> bool {
    matches!(role, Some(WireRole::Driver(_) | WireRole::Bare(_) | WireRole::Hypervisor(_)))
}

/// Whether a failure to open again is worth another attempt.
fn passing<E>(error: SdkError<SessionError>) -> Result<(), SdkError<E>> {
    match error {
        SdkError::Refused(SessionError::ShuttingDown(_) | SessionError::LimitReached(_)) => Ok(()),
        SdkError::Refused(refused) => Err(TransportError::SessionRefused(refused).into()),
        SdkError::Transport(TransportError::Unreachable { .. } | TransportError::Status { .. }) => Ok(()),
        SdkError::Transport(error) => Err(error.into()),
        SdkError::Call(CallError::ShuttingDown(_)) => Ok(()),
        SdkError::Call(error) => Err(error.into()),
    }
}

/// tonic tells a connection that broke under a call as Unknown or Cancelled with a source, or as a broken
/// stream (Internal).
fn is_broken_connection(status: &Status) -> bool {
    matches!(status.code(), Code::Unknown | Code::Internal | Code::Cancelled)
        && std::error::Error::source(status).is_some()
}

/// Connects; a failure is told with the endpoint as it was given.
async fn connect(dial: &Dial, endpoint_text: &str) -> Result<Dialled, TransportError> {
    dial.connect().await.map_err(|error| match error {
        DialError::Credential(error) => error.into(),
        DialError::Unreachable(why) => unreachable(endpoint_text, why),
    })
}

fn unreachable(endpoint_text: &str, why: String) -> TransportError {
    TransportError::Unreachable { endpoint: endpoint_text.to_owned(), why }
}

/// Asks the health service, over a connection of its own.
pub(crate) async fn serving(
    endpoint_text: &str,
    credentials: &Credentials,
    identity: &Identity,
) -> Result<bool, TransportError> {
    let dial = Dial::to(endpoint_text, credentials, identity)?;
    let Dialled { channel, trouble } = connect(&dial, endpoint_text).await?;
    let question = HealthCheckRequest { service: String::new() };
    let answer = HealthClient::new(channel).check(question).await;
    match answer {
        Ok(answer) => Ok(answer.into_inner().status() == ServingStatus::Serving),
        Err(status) => Err(match trouble.take() {
            Some(error) => error.into(),
            None if status.code() == Code::Unavailable => unreachable(endpoint_text, causes(&status)),
            None => TransportError::Status { code: status.code(), message: causes(&status) },
        }),
    }
}

/// Connects and opens; leaves the new token in `open`. A session that was to go on where it was and does not is [`TransportError::StateLost`],
/// whether the server refuses its token or opens another one.
async fn open_session(
    dial: &Dial,
    endpoint_text: &str,
    open: &mut pb::OpenRequest,
    epoch: u64,
) -> Result<Live, SdkError<SessionError>> {
    let token_given = !open.resume_token.is_empty();
    let Dialled { channel, trouble } = connect(dial, endpoint_text).await?;
    let answer = SessionServiceClient::new(channel.clone())
        .open(within(CONNECT_TIMEOUT, open.clone()))
        .await
        .map_err(|status| match (trouble.take(), of_status(&status)) {
            // The server refused the certificate, which in TLS 1.3 is told with the first answer.
            (Some(error), _) => TransportError::from(error).into(),
            (None, SdkError::Transport(TransportError::Status { code: Code::Unavailable, message })) => {
                unreachable(endpoint_text, message).into()
            }
            (None, error) if token_given && is_forgotten(&error) => TransportError::StateLost.into(),
            (None, error) => error,
        })?
        .into_inner();
    if answer.schema_version != SCHEMA_VERSION {
        let why = format!("schema_version: {} where {SCHEMA_VERSION} was agreed", answer.schema_version);
        return Err(TransportError::BadAnswer(why).into());
    }
    if token_given && !answer.resumed {
        return Err(TransportError::StateLost.into());
    }
    let limits = answer.limits.ok_or_else(|| TransportError::BadAnswer("limits: absent".into()))?;
    let limits = SessionLimits {
        message_bytes_max: limits.message_bytes_max,
        batch_operations_max: limits.batch_operations_max.max(1),
        batch_bytes_max: limits.batch_bytes_max.max(1),
        request_window: limits.request_window.max(1),
    };
    if is_resumable(open.role.as_ref()) {
        open.resume_token = answer.resume_token;
    }
    let generation = Generation(answer.generation);
    let grace = Duration::from_millis(answer.grace_ms);
    Ok(Live { channel, epoch, limits, generation, grace })
}
