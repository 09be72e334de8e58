//! A connection: the bytes of a peer, and who it said it is.
//!
//! **Architecture invariant (I8):** over TLS a connection is whoever its certificate says, from the end of the handshake on. What it acts as
//! is set once, by `SessionService.Open` or by a device's `Hello`, which over TLS can claim nothing else than the certificate says, and never
//! changes; every later call is judged by it. The [`ConnectionHandle`] travels with each request as tonic's
//! connect info, so that no service has to ask the message who sent it.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::task::{Context, Poll, Waker};

use iommu_pki::PeerCertificate;
use iommu_types::Identity;
use iommu_types::errors::{IdentityRefused, LimitReached};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::Notify;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;

use crate::bounds;
use crate::ending::{EndSignal, Ending};
use crate::host::owners::OwnerState;
use crate::session::driver::ClientSession;

/// All connections: how many there are, and how many of them have no identity yet.
#[derive(Debug, Default)]
pub struct Connections {
    open: AtomicUsize,
    anonymous: AtomicUsize,
    /// Oldest first; those that are gone are dropped now and then.
    all: Mutex<Vec<Weak<Shared>>>,
}

impl Connections {
    /// Counts one more; `None` when there are too many.
    pub fn admit(self: &Arc<Self>, open_max: usize) -> Option<Admission> {
        // Counted first and taken back if too many, so that two at once cannot both take the last place.
        let open = self.open.fetch_add(1, Ordering::Relaxed);
        self.anonymous.fetch_add(1, Ordering::Relaxed);
        let admission = Admission { connections: Arc::clone(self), anonymous: AtomicBool::new(true) };
        (open < open_max).then_some(admission)
    }
    /// Connections now.
    pub fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }
    /// Connections without an identity now.
    pub fn anonymous(&self) -> usize {
        self.anonymous.load(Ordering::Relaxed)
    }
    fn enter(&self, connection: &ConnectionHandle) {
        let mut all = self.all.lock();
        if all.len() >= 2 * (self.open() + 1) {
            all.retain(|connection| connection.strong_count() > 0);
        }
        all.push(Arc::downgrade(&connection.shared));
    }
    /// Cuts the oldest connections that have not said who they are, so that at most `anonymous_max` are left: strangers make room for whoever
    /// comes next, who may be no stranger. Gives how many were cut.
    pub fn cut_strangers(&self, anonymous_max: usize) -> usize {
        let excess = self.anonymous().saturating_sub(anonymous_max);
        if excess == 0 {
            return 0;
        }
        let live: Vec<_> = self.all.lock().iter().filter_map(Weak::upgrade).collect();
        let strangers = live
            .into_iter()
            .filter(|shared| shared.admission.is_anonymous() && !shared.cut.load(Ordering::Acquire));
        strangers.take(excess).map(|shared| ConnectionHandle { shared }.cut()).count()
    }
    /// The handshake of a connection is done, and this is whose it is. Of too many connections of one peer the oldest is cut, so that a peer
    /// cannot take the places of others (I7); gives how many were.
    pub(crate) fn certify(&self, connection: &ConnectionHandle, certificate: PeerCertificate) -> usize {
        let live: Vec<_> = self.all.lock().iter().filter_map(Weak::upgrade).collect();
        let of_the_same: Vec<_> = live
            .into_iter()
            .filter(|shared| {
                let other = shared.certificate.get();
                other.is_some_and(|other| other.identity == certificate.identity)
                    && !shared.cut.load(Ordering::Acquire)
            })
            .collect();
        let excess = (of_the_same.len() + 1).saturating_sub(bounds::CONNECTIONS_PER_PEER_MAX);
        let set = connection.shared.certificate.set(certificate);
        assert!(set.is_ok(), "a connection has one handshake");
        connection.shared.admission.identified();
        of_the_same.into_iter().take(excess).map(|shared| ConnectionHandle { shared }.cut()).count()
    }
    /// Every connection that has a certificate and has not ended.
    pub(crate) fn certified(&self) -> Vec<ConnectionHandle> {
        let live: Vec<_> = self.all.lock().iter().filter_map(Weak::upgrade).collect();
        let certified = live.into_iter().filter(|shared| shared.certificate.get().is_some());
        certified.map(|shared| ConnectionHandle { shared }).filter(|one| one.ended().is_none()).collect()
    }
    /// Cuts every connection.
    pub fn cut_all(&self) {
        let live: Vec<_> = self.all.lock().iter().filter_map(Weak::upgrade).collect();
        for shared in live {
            ConnectionHandle { shared }.cut();
        }
    }
}

/// A place among the connections, given back on drop.
#[derive(Debug)]
pub struct Admission {
    connections: Arc<Connections>,
    anonymous: AtomicBool,
}

impl Admission {
    fn is_anonymous(&self) -> bool {
        self.anonymous.load(Ordering::Relaxed)
    }
    fn identified(&self) {
        if self.anonymous.swap(false, Ordering::Relaxed) {
            self.connections.anonymous.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Drop for Admission {
    fn drop(&mut self) {
        self.identified();
        self.connections.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Where a peer comes from, for logs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peer {
    /// TCP.
    Tcp(std::net::SocketAddr),
    /// UNIX socket; the process that connected, where the system says it.
    Unix {
        /// Its process ID.
        pid: Option<i32>,
        /// Its user.
        uid: Option<u32>,
    },
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix { pid, uid } => {
                f.write_str("unix")?;
                pid.map_or(Ok(()), |pid| write!(f, ":pid={pid}"))?;
                uid.map_or(Ok(()), |uid| write!(f, ":uid={uid}"))
            }
        }
    }
}

#[derive(Debug)]
struct Shared {
    peer: Peer,
    certificate: OnceLock<PeerCertificate>,
    identity: OnceLock<Identity>,
    session: OnceLock<Arc<ClientSession>>,
    ended: EndSignal,
    closed: CancellationToken,
    cut: AtomicBool,
    /// For the handshake, which waits for other things than the socket as well.
    cut_in_handshake: Notify,
    cut_waker: Mutex<Option<Waker>>,
    watchers: AtomicUsize,
    admission: Admission,
}

/// What the services know of a connection.
#[derive(Clone, Debug)]
pub struct ConnectionHandle {
    shared: Arc<Shared>,
}

impl ConnectionHandle {
    fn new(peer: Peer, admission: Admission) -> Self {
        let connections = Arc::clone(&admission.connections);
        let connection = Self {
            shared: Arc::new(Shared {
                peer,
                certificate: OnceLock::new(),
                identity: OnceLock::new(),
                session: OnceLock::new(),
                ended: EndSignal::new(),
                closed: CancellationToken::new(),
                cut: AtomicBool::new(false),
                cut_in_handshake: Notify::new(),
                cut_waker: Mutex::new(None),
                watchers: AtomicUsize::new(0),
                admission,
            }),
        };
        connections.enter(&connection);
        connection
    }
    /// Where it comes from.
    pub fn peer(&self) -> &Peer {
        &self.shared.peer
    }
    /// Of a TCP socket. Nagle is switched off here, because tonic ignores its own setting for incoming streams.
    pub(crate) fn tcp(socket: &TcpStream, admission: Admission) -> io::Result<Self> {
        socket.set_nodelay(true)?;
        let peer = Peer::Tcp(socket.peer_addr()?);
        rustix::net::sockopt::set_socket_keepalive(socket, true)?;
        rustix::net::sockopt::set_tcp_keepidle(socket, bounds::TCP_KEEPALIVE_IDLE)?;
        Ok(Self::new(peer, admission))
    }
    /// What its certificate says; none without TLS.
    pub fn certificate(&self) -> Option<&PeerCertificate> {
        self.shared.certificate.get()
    }
    /// Refuses an identity that is not the one of the certificate (I8).
    pub fn must_be_certified(&self, claimed: &Identity) -> Result<(), IdentityRefused> {
        match self.certificate() {
            Some(certificate) if certificate.identity != *claimed => Err(IdentityRefused {
                name: claimed.name.clone(),
                why: format!(
                    "it asks to be the {claimed_role}, and its certificate is for {}; connect with the certificate of the one that is meant",
                    certificate.identity,
                    claimed_role = claimed.role,
                ),
            }),
            _ => Ok(()),
        }
    }
    /// Ends everything on it for a reason; it is cut later, when the reason had time to arrive. `true` when this call did.
    pub(crate) fn end(&self, why: &Ending) -> bool {
        let first = self.shared.ended.end(why.clone());
        if let Some(session) = self.session() {
            session.end.end(why.clone());
        }
        first
    }
    /// Why it ended, when it did.
    pub fn ended(&self) -> Option<&Ending> {
        self.shared.ended.ended()
    }
    /// Whether both are the same connection.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.shared, &other.shared)
    }
    /// Resolves when it is cut, for one that waits.
    pub(crate) async fn cut_in_handshake(&self) {
        self.shared.cut_in_handshake.notified().await;
    }
    /// Who it is, once it said so.
    pub fn identity(&self) -> Option<&Identity> {
        self.shared.identity.get()
    }
    /// Sets who it is; `false` when it is somebody already (I8). The same identity again is allowed only for devices, whose
    /// stream may be opened anew on the same connection.
    pub fn identify(&self, identity: &Identity) -> bool {
        let set = self.shared.identity.set(identity.clone()).is_ok();
        self.shared.admission.identified();
        set
    }
    /// The session opened with `SessionService.Open`.
    pub fn session(&self) -> Option<&Arc<ClientSession>> {
        self.shared.session.get()
    }
    /// Binds the session; only after `identify` succeeded, so at most once.
    pub fn bind(&self, session: Arc<ClientSession>) {
        let set = self.shared.session.set(Arc::clone(&session));
        assert!(set.is_ok(), "identify() succeeds once, and bind() follows it");
        // Whoever ends the connection meanwhile sees the session, or is seen here.
        if let Some(why) = self.ended() {
            session.end.end(why.clone());
        }
    }
    /// Resolves when the connection is gone.
    pub async fn closed(&self) {
        self.shared.closed.cancelled().await;
    }
    /// Whether it is gone.
    pub fn is_closed(&self) -> bool {
        self.shared.closed.is_cancelled()
    }
    /// Breaks the connection: the only way to be rid of a peer that does not read.
    pub fn cut(&self) {
        self.shared.cut.store(true, Ordering::Release);
        self.shared.cut_in_handshake.notify_one();
        if let Some(waker) = self.shared.cut_waker.lock().take() {
            waker.wake();
        }
    }
    /// A place among the subscriptions of this connection.
    pub fn watcher(&self) -> Option<WatcherPlace> {
        let before = self.shared.watchers.fetch_add(1, Ordering::Relaxed);
        let place = WatcherPlace { connection: self.clone(), owner: None };
        (before < bounds::WATCHERS_PER_CONNECTION_MAX).then_some(place)
    }
}

/// Given back on drop.
#[derive(Debug)]
pub struct WatcherPlace {
    connection: ConnectionHandle,
    owner: Option<Arc<OwnerState>>,
}

impl WatcherPlace {
    /// Takes a place among the subscriptions of an owner too.
    pub fn of_owner(mut self, owner: Arc<OwnerState>) -> Result<Self, LimitReached> {
        owner.bounds.watchers.enter()?;
        self.owner = Some(owner);
        Ok(self)
    }
}

impl Drop for WatcherPlace {
    fn drop(&mut self) {
        self.connection.shared.watchers.fetch_sub(1, Ordering::Relaxed);
        if let Some(owner) = &self.owner {
            owner.bounds.watchers.leave();
        }
    }
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
    Unix(UnixStream),
}

/// The bytes of a connection.
#[derive(Debug)]
pub struct Connection {
    socket: Socket,
    handle: ConnectionHandle,
}

impl Connection {
    /// Over TCP, in plaintext.
    pub fn tcp(socket: TcpStream, admission: Admission) -> io::Result<Self> {
        let handle = ConnectionHandle::tcp(&socket, admission)?;
        Ok(Self { socket: Socket::Tcp(socket), handle })
    }
    /// Over TLS, after the handshake.
    pub(crate) fn tls(stream: TlsStream<TcpStream>, handle: ConnectionHandle) -> Self {
        Self { socket: Socket::Tls(Box::new(stream)), handle }
    }
    /// Over a UNIX socket.
    pub fn unix(socket: UnixStream, admission: Admission) -> Self {
        let credentials = socket.peer_cred().ok();
        let pid = credentials.and_then(|peer| peer.pid());
        let peer = Peer::Unix { pid, uid: credentials.map(|peer| peer.uid()) };
        Self { socket: Socket::Unix(socket), handle: ConnectionHandle::new(peer, admission) }
    }
    /// What the services know of it.
    pub fn handle(&self) -> &ConnectionHandle {
        &self.handle
    }
    fn check_cut(&self) -> io::Result<()> {
        if self.handle.shared.cut.load(Ordering::Acquire) {
            return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "cut by the server"));
        }
        Ok(())
    }
    /// A reader that waits is woken by `cut`. HTTP/2 always waits to read, so this covers a stuck writer too.
    fn watch_cut(&self, context: &Context<'_>) {
        let mut waker = self.handle.shared.cut_waker.lock();
        if !waker.as_ref().is_some_and(|waker| waker.will_wake(context.waker())) {
            *waker = Some(context.waker().clone());
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.handle.shared.closed.cancel();
    }
}

impl Connected for Connection {
    type ConnectInfo = ConnectionHandle;
    fn connect_info(&self) -> ConnectionHandle {
        self.handle.clone()
    }
}

macro_rules! on_socket {
    ($self:ident, $socket:ident => $what:expr) => {
        match &mut $self.socket {
            Socket::Tcp($socket) => $what,
            Socket::Tls($socket) => $what,
            Socket::Unix($socket) => $what,
        }
    };
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let polled = on_socket!(self, socket => Pin::new(socket).poll_read(context, buffer));
        if polled.is_pending() {
            self.watch_cut(context);
            // Looked at after the waker is in place, so that a cut in between is not lost.
            self.check_cut()?;
        }
        polled
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.check_cut()?;
        on_socket!(self, socket => Pin::new(socket).poll_write(context, bytes))
    }
    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.check_cut()?;
        on_socket!(self, socket => Pin::new(socket).poll_write_vectored(context, slices))
    }
    fn is_write_vectored(&self) -> bool {
        true
    }
    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        on_socket!(self, socket => Pin::new(socket).poll_flush(context))
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        on_socket!(self, socket => Pin::new(socket).poll_shutdown(context))
    }
}
