//! Listening: TCP and UNIX sockets, all feeding one stream of connections.
//!
//! Sockets are bound before anything else is started, and the addresses that came out are told in the ready line. The number of connections
//! is limited here, because nothing above does.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::net::{TcpListener, UnixListener};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::bounds;
use crate::config::Config;
use crate::connection::{Admission, Connection, Connections};
use crate::ending::EndSignal;
use crate::telemetry::warn_limited;

/// An address that cannot be bound.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address}: {reason}\n  remedy: {remedy}")]
pub struct BindError {
    address: String,
    reason: io::Error,
    remedy: &'static str,
}

/// Sockets that are bound.
#[derive(Debug)]
pub struct Listeners {
    tcp: Vec<(TcpListener, SocketAddr)>,
    unix: Vec<(UnixListener, SocketFile)>,
}

/// Removes the socket file when the server leaves.
#[derive(Debug)]
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        // The file may be gone already; there is nobody to tell.
        let _gone = std::fs::remove_file(&self.0);
    }
}

async fn bind_tcp(address: SocketAddr) -> Result<(TcpListener, SocketAddr), BindError> {
    let error = |reason| BindError {
        address: address.to_string(),
        reason,
        remedy: "stop whoever uses it, or give another --listen (port 0 takes any free port)",
    };
    let listener = TcpListener::bind(address).await.map_err(error)?;
    let bound = listener.local_addr().map_err(error)?;
    Ok((listener, bound))
}

/// Binds a UNIX socket. A socket file on which nobody listens any more is removed; one that answers is somebody's.
async fn bind_unix(path: &Path) -> Result<(UnixListener, SocketFile), BindError> {
    let error = |reason, remedy| BindError { address: path.display().to_string(), reason, remedy };
    let is_socket =
        |metadata: std::fs::Metadata| std::os::unix::fs::FileTypeExt::is_socket(&metadata.file_type());
    match std::fs::symlink_metadata(path) {
        Ok(metadata) if is_socket(metadata.clone()) => {
            if tokio::net::UnixStream::connect(path).await.is_ok() {
                let reason = io::Error::from(io::ErrorKind::AddrInUse);
                return Err(error(reason, "another server listens there; give another --listen-unix"));
            }
            std::fs::remove_file(path).map_err(|e| error(e, "remove the stale socket file"))?;
        }
        Ok(_) => {
            let reason = io::Error::from(io::ErrorKind::AlreadyExists);
            return Err(error(reason, "the file is not a socket; give another --listen-unix"));
        }
        Err(_) => {}
    }
    let listener = UnixListener::bind(path).map_err(|e| error(e, "give a path that can be created"))?;
    Ok((listener, SocketFile(path.to_owned())))
}

impl Listeners {
    /// Binds what the configuration names.
    pub async fn bind(config: &Config) -> Result<Self, BindError> {
        let (mut tcp, mut unix) = (Vec::new(), Vec::new());
        for address in &config.listen {
            tcp.push(bind_tcp(*address).await?);
        }
        for path in &config.listen_unix {
            unix.push(bind_unix(path).await?);
        }
        Ok(Self { tcp, unix })
    }
    /// TCP addresses as they came out.
    pub fn tcp_addresses(&self) -> Vec<SocketAddr> {
        self.tcp.iter().map(|(_, address)| *address).collect()
    }
    /// UNIX sockets.
    pub fn unix_paths(&self) -> Vec<PathBuf> {
        self.unix.iter().map(|(_, file)| file.0.clone()).collect()
    }
    /// Accepts until `shutdown`.
    pub fn accept(
        self,
        connections: &Arc<Connections>,
        shutdown: &EndSignal,
    ) -> ReceiverStream<io::Result<Connection>> {
        let (accepted, incoming) = mpsc::channel(bounds::ACCEPTED_QUEUE_MAX);
        let door = || Door {
            connections: Arc::clone(connections),
            accepted: accepted.clone(),
            shutdown: shutdown.clone(),
        };
        for (listener, _) in self.tcp {
            let door = door();
            tokio::spawn(async move { door.serve_tcp(listener).await });
        }
        for (listener, file) in self.unix {
            let door = door();
            tokio::spawn(async move {
                door.serve_unix(listener).await;
                drop(file);
            });
        }
        ReceiverStream::new(incoming)
    }
}

struct Door {
    connections: Arc<Connections>,
    accepted: mpsc::Sender<io::Result<Connection>>,
    shutdown: EndSignal,
}

impl Door {
    async fn serve_tcp(&self, listener: TcpListener) {
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                _ = self.shutdown.wait() => return,
            };
            let connection = match accepted {
                Ok((socket, _)) => self.admit().map(|admission| Connection::tcp(socket, admission)),
                Err(reason) => {
                    self.back_off(&reason).await;
                    continue;
                }
            };
            // A peer that is gone before it was set up is nobody's problem.
            if let Some(Ok(connection)) = connection
                && self.accepted.send(Ok(connection)).await.is_err()
            {
                return;
            }
        }
    }
    async fn serve_unix(&self, listener: UnixListener) {
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                _ = self.shutdown.wait() => return,
            };
            let connection = match accepted {
                Ok((socket, _)) => self.admit().map(|admission| Connection::unix(socket, admission)),
                Err(reason) => {
                    self.back_off(&reason).await;
                    continue;
                }
            };
            if let Some(connection) = connection
                && self.accepted.send(Ok(connection)).await.is_err()
            {
                return;
            }
        }
    }
    fn admit(&self) -> Option<Admission> {
        let admission = self.connections.admit(bounds::CONNECTIONS_MAX);
        let cut = self.connections.cut_strangers(bounds::ANONYMOUS_CONNECTIONS_MAX);
        if admission.is_none() || cut > 0 {
            warn_limited!(
                open = self.connections.open(),
                anonymous = self.connections.anonymous(),
                refused = admission.is_none(),
                cut,
                "too many connections"
            );
        }
        admission
    }
    async fn back_off(&self, reason: &io::Error) {
        warn_limited!(%reason, "accept failed");
        tokio::time::sleep(bounds::ACCEPT_BACKOFF).await;
    }
}
