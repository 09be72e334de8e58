//! A hypervisor: virtual machines, the memory they have, the devices they are given, and what they ask.
//!
//! A virtual machine is an owner, `vm:NUMBER`. The hypervisor gives it memory and devices; the software in it opens a session of its own
//! ([`Connection::driver`](crate::Connection::driver) with [`Owner::Vm`](crate::Owner::Vm)) and uses the DMA API by guest-physical address.

mod functions;
mod hypercalls;
mod vm;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use iommu_proto::errors::WireError;
use iommu_proto::limits::MESSAGE_BYTES_MAX;
use iommu_proto::model::{self, RequestHeader};
pub use iommu_proto::model::{FunctionState, MemoryRegion, Revocation, TenantLimits, VmState};
use iommu_proto::pb;
use iommu_proto::pb::hypervisor_service_client::HypervisorServiceClient;
use iommu_types::errors::CreateVmError;
use iommu_types::{Generation, Owner};
use tonic::transport::Channel;
use tonic::{Request, Response, Status};

use crate::connection::Core;
use crate::convert::bad_answer;
use crate::requests::Requests;
use crate::{Faults, Inspect, Memory, Never, Sanitizer, SdkError, SessionLimits};

pub(crate) use hypercalls::Standing;
pub use hypercalls::{Hypercall, Hypercalls};
pub use vm::Vm;

pub(crate) type Client = HypervisorServiceClient<Channel>;

pub(crate) fn client(channel: Channel) -> Client {
    HypervisorServiceClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX)
}

/// A hypervisor's session. Cheap to clone; all clones are one session. What it made stays until it is destroyed or the session is
/// reclaimed: when it is away for longer than the server's grace.
///
/// ```no_run
/// use guest_sdk::{Connection, Gpa, GpaRange, Revocation, VmOptions};
///
/// # async fn run() -> Result<(), Box<dyn std::error::Error>> {
/// let hypervisor = Connection::to("https://127.0.0.1:7450").hypervisor("hv0").await?;
/// let vm = hypervisor.create_vm(VmOptions::new("guest1")).await?;
/// vm.add_memory(GpaRange::new(Gpa::new(0x10_0000), 1 << 20)?).await?;
/// vm.assign("00:03.0".parse()?).await?;
/// // … the guest works; then all of it goes, drained and wiped:
/// vm.remove_memory(GpaRange::new(Gpa::new(0x10_0000), 1 << 20)?, Revocation::Revoke).await?;
/// vm.destroy().await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Hypervisor {
    inner: Arc<HypervisorCore>,
}

/// What a hypervisor and its virtual machines share.
#[derive(Debug)]
pub(crate) struct HypervisorCore {
    pub(crate) core: Arc<Core>,
    requests: Arc<Requests>,
}

/// A session in a form that another process can go on with ([`Connection::resume_hypervisor`](crate::Connection::resume_hypervisor)).
#[derive(Clone, PartialEq, Eq)]
pub struct SavedSession {
    /// Brings it back. Secret: whoever has it is the hypervisor.
    pub resume_token: Vec<u8>,
    /// The last request ID that was used; those after it are counted on.
    pub last_request_id: u64,
}

impl std::fmt::Debug for SavedSession {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SavedSession").field("last_request_id", &self.last_request_id).finish_non_exhaustive()
    }
}

/// A virtual machine to create: its name, and what the server may not choose.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use = "a virtual machine is made by Hypervisor::create_vm"]
pub struct VmOptions {
    name: String,
    number: Option<u32>,
    limits: Option<TenantLimits>,
}

impl VmOptions {
    /// A virtual machine with the next free number and the server's limits, whose driver opens its session as `name`.
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), number: None, limits: None }
    }

    /// With this number, at least 1.
    pub fn with_number(mut self, number: u32) -> Self {
        self.number = Some(number);
        self
    }

    /// With these limits; what is `None` in them is the server's, which is also the most that may be given.
    pub fn with_limits(mut self, limits: TenantLimits) -> Self {
        self.limits = Some(limits);
        self
    }
}

impl HypervisorCore {
    /// A mutating call: one request ID for all of its attempts.
    pub(crate) async fn mutate<E, M, T, F, A>(
        &self,
        longer: Duration,
        message: impl Fn(RequestHeader) -> M,
        call: F,
    ) -> Result<T, SdkError<E>>
    where
        E: WireError,
        F: Fn(Client, Request<M>) -> A,
        A: Future<Output = Result<Response<T>, Status>>,
    {
        let method = |channel, request| call(client(channel), request);
        self.requests.call(&self.core, longer, message, method).await
    }
}

impl Hypervisor {
    pub(crate) fn new(core: Arc<Core>, last_request_id: u64) -> Self {
        let requests = Requests::after(last_request_id, core.limits().request_window);
        Self { inner: Arc::new(HypervisorCore { core, requests }) }
    }

    /// What the server allows in this session.
    pub fn limits(&self) -> SessionLimits {
        self.inner.core.limits()
    }

    /// Counts the sessions of this identity; larger after each reconnect.
    pub fn generation(&self) -> Generation {
        self.inner.core.generation()
    }

    /// How long the server keeps what this hypervisor holds after its connection is lost.
    pub fn grace(&self) -> Duration {
        self.inner.core.grace()
    }

    /// The session as another process can go on with it, as long as no request is made here after.
    pub async fn save(&self) -> SavedSession {
        let resume_token = self.inner.core.resume_token().await.to_vec();
        SavedSession { resume_token, last_request_id: self.inner.requests.last() }
    }

    /// Its virtual machines, their domains, mappings, limits and devices, inspected.
    pub fn inspect(&self) -> Inspect {
        Inspect::new(Arc::clone(&self.inner.core))
    }

    /// The faults of its virtual machines' devices.
    pub fn faults(&self) -> Faults {
        Faults::new(Arc::clone(&self.inner.core))
    }

    /// What the DMA sanitizer reports on its virtual machines' domains.
    pub fn sanitizer(&self) -> Sanitizer {
        Sanitizer::new(Arc::clone(&self.inner.core))
    }

    /// Creates a virtual machine without memory and without devices.
    pub async fn create_vm(&self, options: VmOptions) -> Result<Vm, SdkError<CreateVmError>> {
        let message = |header: RequestHeader| -> pb::CreateVmRequest {
            let VmOptions { name, number, limits } = options.clone();
            model::CreateVm { header, name, number, limits }.into()
        };
        let call = |mut client: Client, request| async move { client.create_vm(request).await };
        let answer = self.inner.mutate(Duration::ZERO, message, call).await?;
        Ok(self.vm(answer.number))
    }

    /// A virtual machine of this hypervisor; whether it exists is told by the first call on it.
    pub fn vm(&self, number: u32) -> Vm {
        Vm::new(Arc::clone(&self.inner), number)
    }

    /// The virtual machines of this hypervisor, by number.
    pub async fn vms(&self) -> Result<Vec<VmState>, SdkError<Never>> {
        let answer = self
            .inner
            .core
            .unary(pb::ListVmsRequest {}, |channel, request| async move {
                client(channel).list_vms(request).await
            })
            .await?;
        Ok(model::Vms::try_from(answer).map_err(bad_answer)?.vms)
    }

    /// The memory of one of its virtual machines, around the IOMMU.
    pub fn memory(&self, vm: u32) -> Memory {
        Memory::new(Arc::clone(&self.inner.core), Some(Owner::Vm(vm)))
    }

    /// Serves what the virtual machines ask. Returns once the server sends their calls here; a stream that was opened before ends.
    pub async fn serve_hypercalls(&self) -> Result<Hypercalls, SdkError<Never>> {
        Hypercalls::begin(Arc::clone(&self.inner.core)).await
    }
}
