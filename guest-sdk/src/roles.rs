//! Who a client is: the first thing it says, and what it can do from then on.

use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use iommu_proto::pb;
use iommu_proto::pb::open_request::Role as WireRole;
use iommu_types::Owner;
use iommu_types::errors::SessionError;

use crate::connection::{Core, serving};
use crate::{
    Admin, BareClient, Driver, Faults, Hypervisor, Inspect, Memory, Sanitizer, SavedSession, SdkError,
    TransportError,
};

/// How long a call may take, retries included, unless said otherwise.
const DEADLINE: Duration = Duration::from_secs(10);

/// A connection that is still to be opened: where to, and with which deadline.
#[derive(Clone, Debug)]
#[must_use = "a connection does nothing until a role is opened on it"]
pub struct Connection {
    endpoint: String,
    deadline: Duration,
}

impl Connection {
    /// A connection to `http://ADDRESS:PORT` or `unix:///PATH`.
    pub fn to(endpoint: impl Into<String>) -> Self {
        Self { endpoint: endpoint.into(), deadline: DEADLINE }
    }

    /// How long a call may take, retries included; 10 s unless given. Subscriptions and bulk transfers have
    /// none.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Whether the server says that it serves (`grpc.health.v1`). Needs no session; tries once.
    pub async fn is_serving(&self) -> Result<bool, TransportError> {
        let asked = serving(&self.endpoint);
        let ended = tokio::time::timeout(self.deadline, asked).await;
        ended.unwrap_or(Err(TransportError::Deadline { waited: self.deadline, last: None }))
    }

    /// Opens a session as the driver software of `owner`, under the name that the server's configuration has
    /// for it. An earlier session of the same driver that is still there is fenced, and what it held is
    /// reclaimed.
    pub async fn driver(
        self,
        name: impl Into<String>,
        owner: Owner,
    ) -> Result<Driver, SdkError<SessionError>> {
        let role = WireRole::Driver(pb::DriverRole { owner: Some(owner.into()) });
        Driver::begin(self.open(name, role).await?, owner).await
    }

    /// Opens a session that creates virtual machines and owns them. An earlier session of the same name is fenced, and its virtual machines
    /// are destroyed; [`resume_hypervisor`](Self::resume_hypervisor) goes on with it instead.
    pub async fn hypervisor(self, name: impl Into<String>) -> Result<Hypervisor, SdkError<SessionError>> {
        let role = WireRole::Hypervisor(pb::HypervisorRole {});
        Ok(Hypervisor::new(self.open(name, role).await?, 0))
    }

    /// Goes on with the session of another process of this hypervisor, which is fenced if it is still there. Ends with
    /// [`TransportError::StateLost`] when the server's grace is over.
    pub async fn resume_hypervisor(
        self,
        name: impl Into<String>,
        saved: &SavedSession,
    ) -> Result<Hypervisor, SdkError<SessionError>> {
        let role = WireRole::Hypervisor(pb::HypervisorRole {});
        let token = Bytes::copy_from_slice(&saved.resume_token);
        Ok(Hypervisor::new(self.open_with(name, role, token).await?, saved.last_request_id))
    }

    /// Opens a session that may look and not touch.
    pub async fn observer(self, name: impl Into<String>) -> Result<Observer, SdkError<SessionError>> {
        Ok(Observer { core: self.open(name, WireRole::Observer(pb::ObserverRole {})).await? })
    }

    /// Opens a session that may look, declare and attach devices, and read and write memory.
    pub async fn operator(self, name: impl Into<String>) -> Result<Operator, SdkError<SessionError>> {
        let core = self.open(name, WireRole::Operator(pb::OperatorRole {})).await?;
        Ok(Operator { observer: Observer { core } })
    }

    /// Opens a session that creates bare machines and owns them.
    pub async fn bare(self, name: impl Into<String>) -> Result<BareClient, SdkError<SessionError>> {
        Ok(BareClient::new(self.open(name, WireRole::Bare(pb::BareRole {})).await?))
    }

    async fn open(
        self,
        name: impl Into<String>,
        role: WireRole,
    ) -> Result<Arc<Core>, SdkError<SessionError>> {
        self.open_with(name, role, Bytes::new()).await
    }

    async fn open_with(
        self,
        name: impl Into<String>,
        role: WireRole,
        resume_token: Bytes,
    ) -> Result<Arc<Core>, SdkError<SessionError>> {
        Core::open(self.endpoint, self.deadline, name.into(), role, resume_token).await
    }
}

/// A client that may look, and may not touch.
#[derive(Clone, Debug)]
pub struct Observer {
    core: Arc<Core>,
}

impl Observer {
    /// Topology, domains, mappings, tables, IOTLB, counters, explanations.
    pub fn inspect(&self) -> Inspect {
        Inspect::new(Arc::clone(&self.core))
    }

    /// The fault logs of all owners.
    pub fn faults(&self) -> Faults {
        Faults::new(Arc::clone(&self.core))
    }

    /// What the DMA sanitizer reports on the domains of all owners.
    pub fn sanitizer(&self) -> Sanitizer {
        Sanitizer::new(Arc::clone(&self.core))
    }
}

/// A client that may look at everything, declare and attach devices, and read and write memory.
#[derive(Clone, Debug)]
pub struct Operator {
    observer: Observer,
}

impl Operator {
    /// Devices, owners and attachments.
    pub fn admin(&self) -> Admin {
        Admin::new(Arc::clone(&self.observer.core))
    }

    /// The memory of `owner`, around the IOMMU.
    pub fn memory(&self, owner: Owner) -> Memory {
        Memory::new(Arc::clone(&self.observer.core), Some(owner))
    }
}

impl Deref for Operator {
    type Target = Observer;
    fn deref(&self) -> &Observer {
        &self.observer
    }
}
