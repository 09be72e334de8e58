//! One HTTP/2 connection to the server, set up for a data path.

use std::time::Duration;

use tonic::transport::{Channel, Endpoint};

use crate::EndReason;
use crate::end::causes;

/// How often an idle connection is probed, so that a silent partition is noticed.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(1);
/// How long a probe may stay unanswered.
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(2);
/// How long connecting may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// HTTP/2 windows and frames, in bytes: a whole batch in flight without waiting for a window update.
const STREAM_WINDOW_BYTES: u32 = 4 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 8 << 20;
const FRAME_BYTES_MAX: u32 = 256 << 10;
/// Largest message taken from the server: the largest batch of DESIGN (2 MiB to be read) with room to spare.
pub(crate) const MESSAGE_BYTES_MAX: usize = 8 << 20;

/// Connects to `http://ADDRESS:PORT` or `unix:///PATH`.
pub(crate) async fn connect(endpoint: &str) -> Result<Channel, EndReason> {
    configured(endpoint)?.connect().await.map_err(|error| EndReason::Lost(causes(&error)))
}

fn configured(endpoint: &str) -> Result<Endpoint, EndReason> {
    let bad = |why: String| EndReason::BadEndpoint { endpoint: endpoint.to_owned(), why };
    if !endpoint.starts_with("http://") && !endpoint.starts_with("unix:") {
        return Err(bad("the scheme must be http or unix".into()));
    }
    let endpoint = Endpoint::from_shared(endpoint.to_owned()).map_err(|error| bad(causes(&error)))?;
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
