//! The client's end of a connection: one set of transport settings for device agents and guests.

use std::time::Duration;

use hyper_util::rt::TokioIo;
use iommu_types::Identity;
use tonic::transport::{Channel, Endpoint};

use crate::credentials::{CredentialError, Credentials};
use crate::tls::{TlsPeer, Trouble};

/// How long one attempt to connect may take: a server on the same network that has not answered by then will not.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How often a connection is probed, idle or not: a silent partition sends no reset and would go unnoticed.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(1);
/// How long a probe may stay unanswered. With the interval, a lost peer is noticed within 3 s.
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(2);
/// Room for one whole message in flight, of any size, without waiting for a window update.
const STREAM_WINDOW_BYTES: u32 = 4 << 20;
/// Room for two streams at that.
const CONNECTION_WINDOW_BYTES: u32 = 2 * STREAM_WINDOW_BYTES;
/// A batch in few frames; frames of other streams wait no longer than one of these takes.
const FRAME_BYTES_MAX: u32 = 256 << 10;

const _: () = assert!(crate::limits::MESSAGE_BYTES_MAX <= STREAM_WINDOW_BYTES as usize);

/// The endpoint is not one that can be connected to.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the endpoint {endpoint:?} is not usable: {why}; write https://HOST:PORT, http://HOST:PORT (plaintext) or unix:///PATH"
)]
pub struct BadEndpoint {
    /// As given.
    pub endpoint: String,
    /// What is wrong with it.
    pub why: String,
}

/// The endpoint that everything connects to unless told otherwise.
pub const DEFAULT_ENDPOINT: &str = "https://127.0.0.1:7450";
/// The port of `https` where an endpoint names none.
const HTTPS_PORT: u16 = 443;

/// Where to connect and as whom: `https://HOST:PORT` with a certificate, `http://HOST:PORT` or `unix:///PATH` without.
#[derive(Clone, Debug)]
pub struct Dial {
    endpoint: Endpoint,
    tls: Option<TlsPeer>,
}

/// Why no connection came about.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DialError {
    /// Certificates are the reason.
    #[error(transparent)]
    Credential(#[from] CredentialError),
    /// Anything else, in the words of the transport.
    #[error("{0}")]
    Unreachable(String),
}

/// A connection, and the place where a refusal of its certificate is left: in TLS 1.3 it comes with the first answer.
#[derive(Clone, Debug)]
pub struct Dialled {
    /// The connection.
    pub channel: Channel,
    /// What certificates had to do with its end.
    pub trouble: Trouble,
}

impl Dial {
    /// To an endpoint, as `identity`; set up for a data path.
    pub fn to(text: &str, credentials: &Credentials, identity: &Identity) -> Result<Self, BadEndpoint> {
        let bad = |why: String| BadEndpoint { endpoint: text.to_owned(), why };
        if !["https://", "http://", "unix:"].iter().any(|scheme| text.starts_with(scheme)) {
            return Err(bad("the scheme must be https, http or unix".into()));
        }
        let endpoint = Endpoint::from_shared(text.to_owned()).map_err(|error| bad(causes(&error)))?;
        let tls = match endpoint.uri().scheme_str() {
            Some("https") => Some(TlsPeer {
                host: host_of(endpoint.uri()).ok_or_else(|| bad("it names no host".into()))?,
                port: endpoint.uri().port_u16().unwrap_or(HTTPS_PORT),
                credentials: credentials.clone(),
                identity: identity.clone(),
            }),
            _ => None,
        };
        Ok(Self { endpoint: configured(endpoint), tls })
    }

    /// The same with other settings of the transport.
    #[must_use]
    pub fn with(self, change: impl FnOnce(Endpoint) -> Endpoint) -> Self {
        Self { endpoint: change(self.endpoint), tls: self.tls }
    }

    /// Connects. The certificate is read from its file now, and again whenever the channel connects anew.
    pub async fn connect(&self) -> Result<Dialled, DialError> {
        let trouble = Trouble::default();
        let connected = match &self.tls {
            None => self.endpoint.connect().await,
            Some(peer) => {
                let (peer, trouble) = (peer.clone(), trouble.clone());
                let connector = tower::service_fn(move |_: http::Uri| {
                    let connecting = peer.clone().connect(trouble.clone());
                    async move { connecting.await.map(TokioIo::new) }
                });
                self.endpoint.connect_with_connector(connector).await
            }
        };
        match connected {
            Ok(channel) => Ok(Dialled { channel, trouble }),
            Err(error) => Err(match trouble.take() {
                Some(error) => error.into(),
                None => DialError::Unreachable(causes(&error)),
            }),
        }
    }
}

/// The host without the brackets that an IPv6 address has in a URI.
fn host_of(uri: &http::Uri) -> Option<String> {
    let host = uri.host()?;
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    (!bare.is_empty()).then(|| bare.to_owned())
}

fn configured(endpoint: Endpoint) -> Endpoint {
    endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(FRAME_BYTES_MAX)
}

/// An error with all its causes, which tonic keeps to itself ("transport error").
pub fn causes(error: &dyn std::error::Error) -> String {
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
