//! The client's end of a connection: one set of transport settings for device agents and guests.

use std::time::Duration;

use tonic::transport::Endpoint;

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
#[error("the endpoint {endpoint:?} is not usable: {why}; write http://ADDRESS:PORT or unix:///PATH")]
pub struct BadEndpoint {
    /// As given.
    pub endpoint: String,
    /// What is wrong with it.
    pub why: String,
}

/// The endpoint `http://ADDRESS:PORT` or `unix:///PATH`, set up for a data path.
pub fn endpoint(text: &str) -> Result<Endpoint, BadEndpoint> {
    let bad = |why: String| BadEndpoint { endpoint: text.to_owned(), why };
    if !text.starts_with("http://") && !text.starts_with("unix:") {
        return Err(bad("the scheme must be http or unix".into()));
    }
    let endpoint = Endpoint::from_shared(text.to_owned()).map_err(|error| bad(causes(&error)))?;
    Ok(endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(FRAME_BYTES_MAX))
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
