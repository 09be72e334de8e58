//! Who a client is: the first thing it says, and what it can do from then on.

use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use iommu_proto::credentials::Credentials;
use iommu_proto::pb;
use iommu_proto::pb::open_request::Role as WireRole;
use iommu_types::errors::SessionError;
use iommu_types::{Identity, Owner, Role};

use crate::connection::{Core, serving};
use crate::{
    Admin, BareClient, Driver, Faults, Hypervisor, Inspect, Memory, Sanitizer, SavedSession, SdkError,
    TransportError,
};

/// How long a call may take, retries included, unless said otherwise.
const DEADLINE: Duration = Duration::from_secs(10);
/// As whom the health service is asked over TLS unless the credentials are given as files: an observer may do least.
const HEALTH_OBSERVER: &str = "observer";

/// A connection that is still to be opened: where to, with which credentials, and with which deadline.
#[derive(Clone, Debug)]
#[must_use = "a connection does nothing until a role is opened on it"]
pub struct Connection {
    endpoint: String,
    credentials: Credentials,
    deadline: Duration,
}

impl Connection {
    /// A connection to `https://HOST:PORT`, or, without certificates, to `http://HOST:PORT` or `unix:///PATH`.
    pub fn to(endpoint: impl Into<String>) -> Self {
        Self {
            endpoint: endpoint.into(),
            credentials: Credentials::from_default_directory(),
            deadline: DEADLINE,
        }
    }

    /// Where the certificate is with which the client shows who it is; unless given, in the [default
    /// directory](iommu_proto::credentials::default_directory), under the role that is opened.
    pub fn credentials(mut self, credentials: Credentials) -> Self {
        self.credentials = credentials;
        self
    }

    /// How long a call may take, retries included; 10 s unless given. Subscriptions and bulk transfers have
    /// none.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Whether the server says that it serves (`grpc.health.v1`). Needs no session; tries once.
    pub async fn is_serving(&self) -> Result<bool, TransportError> {
        let observer = Identity { name: HEALTH_OBSERVER.to_owned(), role: Role::Observer };
        let asked = serving(&self.endpoint, &self.credentials, &observer);
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
        Driver::begin(self.open(name, Role::Driver(owner), role).await?, owner).await
    }

    /// Opens a session that creates virtual machines and owns them. An earlier session of the same name is fenced, and its virtual machines
    /// are destroyed; [`resume_hypervisor`](Self::resume_hypervisor) goes on with it instead.
    pub async fn hypervisor(self, name: impl Into<String>) -> Result<Hypervisor, SdkError<SessionError>> {
        let role = WireRole::Hypervisor(pb::HypervisorRole {});
        Ok(Hypervisor::new(self.open(name, Role::Hypervisor, role).await?, 0))
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
        Ok(Hypervisor::new(self.open_with(name, Role::Hypervisor, role, token).await?, saved.last_request_id))
    }

    /// Opens a session that may look and not touch.
    pub async fn observer(self, name: impl Into<String>) -> Result<Observer, SdkError<SessionError>> {
        Ok(Observer { core: self.open(name, Role::Observer, WireRole::Observer(pb::ObserverRole {})).await? })
    }

    /// Opens a session that may look, declare and attach devices, and read and write memory.
    pub async fn operator(self, name: impl Into<String>) -> Result<Operator, SdkError<SessionError>> {
        let core = self.open(name, Role::Operator, WireRole::Operator(pb::OperatorRole {})).await?;
        Ok(Operator { observer: Observer { core } })
    }

    /// Opens a session that creates bare machines and owns them.
    pub async fn bare(self, name: impl Into<String>) -> Result<BareClient, SdkError<SessionError>> {
        Ok(BareClient::new(self.open(name, Role::Bare, WireRole::Bare(pb::BareRole {})).await?))
    }

    async fn open(
        self,
        name: impl Into<String>,
        role: Role,
        wire_role: WireRole,
    ) -> Result<Arc<Core>, SdkError<SessionError>> {
        self.open_with(name, role, wire_role, Bytes::new()).await
    }

    async fn open_with(
        self,
        name: impl Into<String>,
        role: Role,
        wire_role: WireRole,
        resume_token: Bytes,
    ) -> Result<Arc<Core>, SdkError<SessionError>> {
        let identity = Identity { name: name.into(), role };
        Core::open(self.endpoint, &self.credentials, self.deadline, identity, wire_role, resume_token).await
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
