//! Listening: TCP and UNIX sockets, all feeding one stream of connections.
//!
//! Sockets are bound before anything else is started, and the addresses that came out are told in the ready line. The number of connections
//! is limited here, because nothing above does. A TCP peer shakes hands (TLS) before it is passed on; a peer on a UNIX socket is let in when the
//! system says that it is a user who may.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::bounds;
use crate::config::Config;
use crate::connection::{Admission, Connection, ConnectionHandle, Connections};
use crate::ending::EndSignal;
use crate::metrics::Metrics;
use crate::telemetry::warn_limited;
use crate::tls::{Tls, desk};

/// An address that cannot be bound.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address}: {reason}\n  remedy: {remedy}")]
pub struct BindError {
    address: String,
    reason: io::Error,
    remedy: &'static str,
}

/// Users whose processes may connect over a UNIX socket: the server's own, root, and those that the configuration names.
#[derive(Clone, Debug)]
pub struct UnixUsers(Vec<u32>);

impl UnixUsers {
    /// The server's own user, root, and these.
    pub fn with(named: &[u32]) -> Self {
        let own = [rustix::process::geteuid().as_raw(), 0];
        Self(own.iter().chain(named).copied().collect())
    }
    /// Whether a process of this user may connect; one whose user the system does not tell may not.
    pub fn admit(&self, uid: Option<u32>) -> bool {
        uid.is_some_and(|uid| self.0.contains(&uid))
    }
}

/// Who is let in, and as whom.
#[derive(Clone, Debug)]
pub struct Entrance {
    /// What TCP peers shake hands with; none for plaintext.
    pub tls: Option<Arc<Tls>>,
    /// Who may use UNIX sockets.
    pub users: UnixUsers,
    /// Where those are counted who are not let in.
    pub metrics: Arc<Metrics>,
}

impl Entrance {
    /// For measurements and tests: plaintext, and this user's processes.
    pub fn plaintext() -> Self {
        Self { tls: None, users: UnixUsers::with(&[]), metrics: Arc::default() }
    }
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
    /// Accepts until `shutdown`. Fails where the system gives no thread for handshakes.
    pub fn accept(
        self,
        connections: &Arc<Connections>,
        shutdown: &EndSignal,
        entrance: &Entrance,
    ) -> io::Result<ReceiverStream<io::Result<Connection>>> {
        let tls = match &entrance.tls {
            Some(tls) => Some((Arc::clone(tls), desk::start(shutdown)?)),
            None => None,
        };
        let (accepted, incoming) = mpsc::channel(bounds::ACCEPTED_QUEUE_MAX);
        let door = || Door {
            connections: Arc::clone(connections),
            accepted: accepted.clone(),
            shutdown: shutdown.clone(),
            entrance: entrance.clone(),
            tls: tls.clone(),
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
        Ok(ReceiverStream::new(incoming))
    }
}

struct Door {
    connections: Arc<Connections>,
    accepted: mpsc::Sender<io::Result<Connection>>,
    shutdown: EndSignal,
    entrance: Entrance,
    /// With the thread that shakes hands.
    tls: Option<(Arc<Tls>, Handle)>,
}

impl Door {
    async fn serve_tcp(&self, listener: TcpListener) {
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                _ = self.shutdown.wait() => return,
            };
            let admitted = match accepted {
                Ok((socket, _)) => self.admit().map(|admission| (socket, admission)),
                Err(reason) => {
                    self.back_off(&reason).await;
                    continue;
                }
            };
            let Some((socket, admission)) = admitted else { continue };
            if let Some((tls, desk)) = &self.tls {
                self.shake_hands(tls, desk, socket, admission);
                continue;
            }
            // A peer that is gone before it was set up is nobody's problem.
            if let Ok(connection) = Connection::tcp(socket, admission)
                && self.accepted.send(Ok(connection)).await.is_err()
            {
                return;
            }
        }
    }
    /// In a task of its own, so that one slow peer holds up nobody.
    fn shake_hands(&self, tls: &Arc<Tls>, desk: &Handle, socket: TcpStream, admission: Admission) {
        // A peer that is gone before it was set up is nobody's problem.
        let Ok(handle) = ConnectionHandle::tcp(&socket, admission) else { return };
        let (tls, connections) = (Arc::clone(tls), Arc::clone(&self.connections));
        let (accepted, shutdown) = (self.accepted.clone(), self.shutdown.clone());
        desk.spawn(async move {
            let shaken = tokio::select! {
                shaken = tls.accept(socket, handle, &connections) => shaken,
                _ = shutdown.wait() => None,
            };
            if let Some(connection) = shaken {
                // Nobody takes it up when the server goes down.
                let _passed_on = accepted.send(Ok(connection)).await;
            }
        });
    }
    async fn serve_unix(&self, listener: UnixListener) {
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                _ = self.shutdown.wait() => return,
            };
            let connection = match accepted {
                Ok((socket, _)) if !self.may_enter(&socket) => continue,
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
    fn may_enter(&self, socket: &UnixStream) -> bool {
        let peer = socket.peer_cred().ok();
        let (uid, pid) = (peer.map(|peer| peer.uid()), peer.and_then(|peer| peer.pid()));
        let may = self.entrance.users.admit(uid);
        if !may {
            self.entrance.metrics.unix_peer_refused();
            warn_limited!(
                uid,
                pid,
                "peer refused on a UNIX socket: its user may not connect; --unix-uid lets it in"
            );
        }
        may
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_own_user_root_and_those_named_use_a_unix_socket() {
        let own = rustix::process::geteuid().as_raw();
        let other = own.wrapping_add(4711);
        let rows = [
            (&[][..], Some(own), true),
            (&[], Some(0), true),
            (&[], Some(other), false),
            (&[other], Some(other), true),
            (&[other], Some(other + 1), false),
            (&[other], None, false),
        ];
        for (named, uid, admitted) in rows {
            assert_eq!(UnixUsers::with(named).admit(uid), admitted, "{named:?} {uid:?}");
        }
    }
}
