//! Sessions of clients (drivers, hypervisors, bare machine clients, observers, operators), and what outlives a lost connection.
//!
//! Three things are kept apart: a *session* is a connection with an identity; a *tenancy* is what an identity holds, and outlives its
//! session for the grace period; a *seat* is the place of an identity, which at most one session takes.

use std::sync::Arc;

use iommu_proto::model::ResumeToken;
use iommu_types::Identity;
use iommu_types::errors::LimitReached;
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::replay::Replay;
use crate::bounds;
use crate::ending::{EndSignal, Ending};
use crate::host::hypervisors::HypervisorState;
use crate::host::owners::OwnerState;
use crate::host::rates::OwnerBounds;
use crate::machine::BareClient;

/// Who holds things.
#[derive(Clone, Debug)]
pub enum Tenant {
    /// The driver of an owner.
    Driver(Arc<OwnerState>),
    /// A client of bare machines.
    Bare(Arc<BareClient>),
    /// A hypervisor.
    Hypervisor(Arc<HypervisorState>),
}

impl Tenant {
    /// Its seat.
    pub fn seat(&self) -> &Seat {
        match self {
            Self::Driver(owner) => &owner.seat,
            Self::Bare(client) => &client.seat,
            Self::Hypervisor(hypervisor) => &hypervisor.seat,
        }
    }
}

impl std::fmt::Display for Tenant {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Driver(owner) => owner.owner.fmt(f),
            Self::Bare(client) => write!(f, "bare-machine client {}", client.name),
            Self::Hypervisor(hypervisor) => write!(f, "hypervisor {}", hypervisor.name),
        }
    }
}

/// What an identity holds from one fresh start to the next. Closed before it is reclaimed, so that a request which began before does not
/// leave something behind afterwards.
#[derive(Debug)]
pub struct Tenancy {
    /// With this its client comes back. Secret.
    pub token: ResumeToken,
    /// Makes retries safe.
    pub replay: Arc<Replay>,
    gate: Mutex<Gate>,
    left: Notify,
}

#[derive(Debug, Default)]
struct Gate {
    closed: bool,
    inside: usize,
}

/// A request that changes what the tenancy holds.
#[derive(Debug)]
pub struct Inside {
    tenancy: Arc<Tenancy>,
}

impl Drop for Inside {
    fn drop(&mut self) {
        let last = {
            let mut gate = self.tenancy.gate.lock();
            gate.inside -= 1;
            gate.inside == 0
        };
        if last {
            self.tenancy.left.notify_waiters();
        }
    }
}

/// Why a change does not begin.
#[derive(Debug, thiserror::Error)]
pub enum NotEntered {
    /// The session has ended, or what it held is being taken back.
    #[error("the session is over")]
    Over,
    /// Too many are under way.
    #[error(transparent)]
    Limit(#[from] LimitReached),
}

impl Tenancy {
    /// A fresh one.
    pub fn new(token: ResumeToken) -> Arc<Self> {
        let (gate, left) = (Mutex::default(), Notify::new());
        Arc::new(Self { token, replay: Arc::default(), gate, left })
    }
    /// Begins a change, unless the session has ended or the tenancy is being reclaimed. Both are asked under the lock of the gate,
    /// so that whoever ends a session and then waits here for those inside has seen its last change. A change goes on when its call is given up, so that
    /// it is counted here, however few calls there are (I7).
    fn enter(self: &Arc<Self>, session: &EndSignal) -> Result<Inside, NotEntered> {
        let mut gate = self.gate.lock();
        if gate.closed || session.ended().is_some() {
            return Err(NotEntered::Over);
        }
        if gate.inside >= bounds::CHANGES_PER_TENANCY_MAX {
            let allowed = bounds::CHANGES_PER_TENANCY_MAX as u64;
            return Err(LimitReached { limit: "changes_per_tenancy".to_owned(), allowed }.into());
        }
        gate.inside += 1;
        Ok(Inside { tenancy: Arc::clone(self) })
    }
    /// Admits no further change and waits for those under way.
    pub async fn close(&self) {
        self.gate.lock().closed = true;
        self.settled().await;
    }
    /// Waits for the changes under way.
    pub async fn settled(&self) {
        loop {
            let left = self.left.notified();
            tokio::pin!(left);
            left.as_mut().enable();
            if self.gate.lock().inside == 0 {
                return;
            }
            left.await;
        }
    }
    /// Compares without telling by its time how much was right.
    pub fn token_is(&self, given: ResumeToken) -> bool {
        std::iter::zip(given.0, self.token.0).fold(0, |difference, (a, b)| difference | (a ^ b)) == 0
    }
}

/// A session: a connection that said who it is.
#[derive(Debug)]
pub struct ClientSession {
    /// Who.
    pub identity: Identity,
    /// The how manieth session of that identity.
    pub generation: u64,
    /// Ends it.
    pub end: EndSignal,
    /// What it acts for; `None` for observers and operators, who hold nothing.
    pub tenant: Option<(Tenant, Arc<Tenancy>)>,
}

impl ClientSession {
    /// The owner it drives.
    pub fn owner(&self) -> Option<&Arc<OwnerState>> {
        match &self.tenant {
            Some((Tenant::Driver(owner), _)) => Some(owner),
            _ => None,
        }
    }
    /// The client of bare machines that it is.
    pub fn bare(&self) -> Option<&Arc<BareClient>> {
        match &self.tenant {
            Some((Tenant::Bare(client), _)) => Some(client),
            _ => None,
        }
    }
    /// The hypervisor that it is.
    pub fn hypervisor(&self) -> Option<&Arc<HypervisorState>> {
        match &self.tenant {
            Some((Tenant::Hypervisor(hypervisor), _)) => Some(hypervisor),
            _ => None,
        }
    }
    /// What it may ask in a second and at once; `None` for those who are not counted.
    pub fn bounds(&self) -> Option<&Arc<OwnerBounds>> {
        match &self.tenant {
            Some((Tenant::Driver(owner), _)) => Some(&owner.bounds),
            Some((Tenant::Hypervisor(hypervisor), _)) => Some(&hypervisor.bounds),
            Some((Tenant::Bare(_), _)) | None => None,
        }
    }
    /// What it holds.
    pub fn tenancy(&self) -> Option<&Arc<Tenancy>> {
        self.tenant.as_ref().map(|(_, tenancy)| tenancy)
    }
    /// Begins a change of what it holds. Not once it has ended: a fenced session changes nothing any more (I8).
    pub fn enter(&self) -> Result<Inside, NotEntered> {
        self.tenancy().ok_or(NotEntered::Over)?.enter(&self.end)
    }
}

/// What stands on a seat.
#[derive(Debug, Default)]
pub struct Seated {
    /// Generation of the latest session.
    pub generation: u64,
    /// The session, while its connection lives or its grace runs.
    pub session: Option<Arc<ClientSession>>,
    /// What is held.
    pub tenancy: Option<Arc<Tenancy>>,
    /// Whether the identity is no more: nobody takes the seat again.
    pub is_gone: bool,
}

/// The place of an identity.
#[derive(Debug, Default)]
pub struct Seat {
    /// Held across a reclaim, so that opening and reclaiming of one identity follow each other. Nobody else waits for it.
    pub seated: tokio::sync::Mutex<Seated>,
    connected: Mutex<Option<Arc<ClientSession>>>,
}

impl Seat {
    /// Empty.
    pub fn new() -> Self {
        Self::default()
    }
    /// The session that is connected now.
    pub fn connected(&self) -> Option<Arc<ClientSession>> {
        self.connected.lock().clone()
    }
    /// Sets who is connected, and fences whoever was.
    pub fn connect(&self, session: Arc<ClientSession>) {
        let by_generation = session.generation;
        let before = self.connected.lock().replace(session);
        if let Some(before) = before {
            before.end.end(Ending::Fenced { by_generation });
        }
    }
    /// Nobody is connected any more, if it was still this session.
    pub fn disconnect(&self, session: &Arc<ClientSession>) {
        let mut connected = self.connected.lock();
        if connected.as_ref().is_some_and(|seated| Arc::ptr_eq(seated, session)) {
            *connected = None;
        }
    }
    /// Fences whoever is connected.
    pub fn fence(&self, by_generation: u64) -> bool {
        let before = self.connected.lock().take();
        before.is_some_and(|before| before.end.end(Ending::Fenced { by_generation }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn i7_changes_whose_calls_were_given_up_are_bounded_all_the_same() {
        let (tenancy, end) = (Tenancy::new(ResumeToken([0; 16])), EndSignal::new());
        let enter = || tenancy.enter(&end);
        let mut inside: Vec<_> =
            (0..bounds::CHANGES_PER_TENANCY_MAX).map(|_| enter().expect("room")).collect();
        match enter().expect_err("no room") {
            NotEntered::Limit(limit) => assert_eq!(limit.limit, "changes_per_tenancy"),
            NotEntered::Over => panic!("the session stands"),
        }
        inside.pop();
        inside.push(enter().expect("a place was given back"));
        end.end(Ending::ShuttingDown);
        inside.pop();
        assert!(matches!(enter(), Err(NotEntered::Over)), "room, but not for what is over");
    }
}
