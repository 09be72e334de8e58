//! Measurements over the wire: the real server, and beside it an echo of the same messages.
//!
//! The client is `device-runtime` (or `guest-sdk`) in this process for both; server and echo are processes of their own with
//! the same listener, the same HTTP/2 settings and the same runtime.

pub(crate) mod agents;
pub(crate) mod echo;
pub(crate) mod latency;
pub(crate) mod load;
pub(crate) mod map_stream;
pub(crate) mod memory;
pub(crate) mod modes;
pub(crate) mod peer;
pub(crate) mod start;
pub(crate) mod throughput;

use crate::stand::Ends;

/// How client and server are connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transport {
    /// Over the loopback interface.
    Tcp,
    /// Over a UNIX socket.
    Unix,
}

impl Transport {
    const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Unix => "unix",
        }
    }
    const fn words(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Unix => "a UNIX socket",
        }
    }
    fn server(self, ends: &Ends) -> String {
        match self {
            Self::Tcp => ends.server.endpoint().to_owned(),
            Self::Unix => ends.server.unix_endpoint(),
        }
    }
    fn echo(self, ends: &Ends) -> String {
        match self {
            Self::Tcp => ends.echo.endpoint().to_owned(),
            Self::Unix => ends.echo.unix_endpoint().to_owned(),
        }
    }
}
