//! The services of the schema, one file each. A service parses, asks the host, and answers; who may call it was settled by
//! [`gate`](crate::layers::gate) before.

pub mod admin;
pub mod bare;
pub mod device;
mod dma_stream;
pub mod driver;
pub mod fault;
pub mod feed;
pub mod hypervisor;
pub mod inspect;
pub mod log_token;
pub mod memory;
mod once;
mod ring_tables;
pub mod sanitizer;
mod scope;
pub mod session;
mod tables;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use iommu_proto::errors::WireError;
use iommu_proto::model::{InvalidBatch, InvalidPages, InvalidRequest};
use iommu_types::errors::{Internal, InvalidField, NotYours, SessionFenced, SessionRequired};
use iommu_types::{Owner, Role};
use tonic::{Request, Status};

use crate::connection::ConnectionHandle;
use crate::host::hypervisors::HypervisorState;
use crate::host::owners::OwnerState;
use crate::machine::BareClient;
use crate::session::driver::{ClientSession, Inside, NotEntered, Tenancy};

/// Our own bug: the peer gets a reference, the log gets the rest.
pub fn internal(why: &str) -> Status {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let reference = format!("{:x}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    tracing::error!(reference, reason = why, "internal error");
    Internal { reference }.into_status()
}

/// What does not parse, as a status.
pub(crate) trait Invalid {
    fn status(self) -> Status;
}

impl Invalid for InvalidField {
    fn status(self) -> Status {
        self.into_status()
    }
}

impl Invalid for InvalidRequest {
    fn status(self) -> Status {
        match self {
            Self::InvalidField(error) => error.into_status(),
            Self::InvalidRange(error) => error.into_status(),
        }
    }
}

impl Invalid for InvalidPages {
    fn status(self) -> Status {
        match self {
            Self::InvalidField(error) => error.into_status(),
            Self::InvalidRange(error) => error.into_status(),
            Self::Unaligned(error) => error.into_status(),
        }
    }
}

impl Invalid for InvalidBatch {
    fn status(self) -> Status {
        match self {
            Self::InvalidField(error) => error.into_status(),
            Self::LimitReached(error) => error.into_status(),
        }
    }
}

/// Parses a message into its model.
pub(crate) fn parse<W, M>(wire: W) -> Result<M, Status>
where
    M: TryFrom<W>,
    M::Error: Invalid,
{
    M::try_from(wire).map_err(Invalid::status)
}

/// Who calls, as the gate found it.
#[derive(Clone, Debug)]
pub struct Caller {
    /// Its session.
    pub session: Arc<ClientSession>,
    /// Its connection.
    pub connection: ConnectionHandle,
}

impl Caller {
    /// Of a request that passed the gate. Between the gate and here the message was read, which takes as long as its sender likes: a
    /// session that ended meanwhile calls nothing any more.
    pub fn of<T>(request: &Request<T>) -> Result<Self, Status> {
        let caller = request.extensions().get::<Self>().cloned();
        let caller = caller.ok_or_else(|| SessionRequired {}.into_status())?;
        match caller.session.end.ended() {
            None => Ok(caller),
            Some(ending) => Err(ending.clone().into_status()),
        }
    }
    /// The owner that it drives.
    pub fn driver(&self) -> Result<&Arc<OwnerState>, Status> {
        self.session.owner().ok_or_else(|| internal("the gate let a caller without an owner pass"))
    }
    /// The bare-machine client that it is.
    pub fn bare(&self) -> Result<&Arc<BareClient>, Status> {
        self.session.bare().ok_or_else(|| internal("the gate let a caller without machines pass"))
    }
    /// The hypervisor that it is.
    pub fn hypervisor(&self) -> Result<&Arc<HypervisorState>, Status> {
        self.session
            .hypervisor()
            .ok_or_else(|| internal("the gate let a caller without virtual machines pass"))
    }
    /// What it holds.
    pub fn tenancy(&self) -> Result<&Arc<Tenancy>, Status> {
        self.session.tenancy().ok_or_else(|| internal("the gate let a caller without a tenancy pass"))
    }
    /// Whether it sees everything: observers and operators do.
    pub fn sees_all(&self) -> bool {
        matches!(self.session.identity.role, Role::Observer | Role::Operator)
    }
    /// Whether it sees what belongs to `owner`: a driver its own, a hypervisor what its virtual machines have.
    pub fn sees(&self, owner: Option<Owner>) -> bool {
        let is_own = |owner| {
            let driver = self.session.owner().is_some_and(|own| own.owner == owner);
            driver || self.session.hypervisor().is_some_and(|hypervisor| hypervisor.owns(owner))
        };
        self.sees_all() || owner.is_some_and(is_own)
    }
    /// Refuses what it does not see.
    pub fn must_see(&self, owner: Option<Owner>, object: impl std::fmt::Display) -> Result<(), NotYours> {
        if self.sees(owner) { Ok(()) } else { Err(NotYours { object: object.to_string() }) }
    }
}

/// The answer to a request of a session that is being reclaimed.
fn reclaimed(session: &ClientSession) -> Status {
    session.end.ended().map_or_else(
        || SessionFenced { by_generation: session.generation + 1 }.into_status(),
        |ending| ending.clone().into_status(),
    )
}

/// Begins a change of what a session holds.
pub(crate) fn enter(session: &ClientSession) -> Result<Inside, Status> {
    session.enter().map_err(|error| match error {
        NotEntered::Over => reclaimed(session),
        NotEntered::Limit(limit) => limit.into_status(),
    })
}
