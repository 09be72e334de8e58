//! The driver software of an owner: buffers, domains, interrupts, and the registers of its devices. The DMA API is in `dma.rs`.

use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use iommu_proto::errors::WireError;
use iommu_proto::limits::MESSAGE_BYTES_MAX;
use iommu_proto::model::{self, RequestHeader};
use iommu_proto::pb;
use iommu_proto::pb::driver_service_client::DriverServiceClient;
use iommu_types::errors::{AllocateError, CreateDomainError, SessionError};
use iommu_types::{DeviceAddress, Direction, DomainOptions, Generation, Gpa, GpaRange, Iova, Owner};
use tonic::transport::Channel;
use tonic::{Request, Response, Status};

use crate::connection::Core;
use crate::convert::bad_answer;
use crate::error::without_refusal;
use crate::guest_memory::GuestMemory;
use crate::requests::Requests;
use crate::{
    Buffer, DeviceHandle, Domain, Faults, Inspect, InterruptEvent, Memory, Never, Sanitizer, SdkError,
    SessionLimits, Subscription,
};

/// A mapping that was dropped without being unmapped, or whose unmap was dropped before its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeakReport {
    /// The device it was made for.
    pub device: DeviceAddress,
    /// Its first address.
    pub iova: Iova,
    /// Its size.
    pub size_bytes: u64,
    /// Its direction.
    pub direction: Direction,
}

type LeakWatcher = Box<dyn Fn(LeakReport) + Send + Sync>;

/// A driver's session. Cheap to clone; all clones are one session.
#[derive(Clone, Debug)]
pub struct Driver {
    pub(crate) inner: Arc<DriverCore>,
}

/// What a driver and all that it made share.
pub(crate) struct DriverCore {
    pub(crate) core: Arc<Core>,
    pub(crate) requests: Arc<Requests>,
    pub(crate) owner: Owner,
    /// Of a virtual machine, whose buffers are pages of its own memory. Drivers of the host have theirs from the server.
    pub(crate) own_memory: Option<GuestMemory>,
    leaked: AtomicU64,
    on_leak: OnceLock<LeakWatcher>,
}

impl std::fmt::Debug for DriverCore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DriverCore")
            .field("owner", &self.owner)
            .field("leaked", &self.leaked)
            .finish_non_exhaustive()
    }
}

impl DriverCore {
    /// A mutating call: one request ID for all of its attempts.
    pub(crate) async fn mutate<E, M, T, F, A>(
        &self,
        message: impl Fn(RequestHeader) -> M,
        call: F,
    ) -> Result<T, SdkError<E>>
    where
        E: WireError,
        F: Fn(DriverServiceClient<Channel>, Request<M>) -> A,
        A: Future<Output = Result<Response<T>, Status>>,
    {
        let method = |channel, request| call(client(channel), request);
        self.requests.call(&self.core, Duration::ZERO, message, method).await
    }

    pub(crate) fn report_leak(&self, leak: LeakReport) {
        self.leaked.fetch_add(1, Ordering::Relaxed);
        tracing::warn!(
            device = %leak.device,
            iova = %leak.iova,
            size_bytes = leak.size_bytes,
            direction = %leak.direction,
            "a DMA mapping was dropped without unmap; the device can still use it"
        );
        if let Some(watcher) = self.on_leak.get() {
            watcher(leak);
        }
    }
}

pub(crate) fn client(channel: Channel) -> DriverServiceClient<Channel> {
    DriverServiceClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX)
}

impl Driver {
    /// The driver of a session that stands; that of a virtual machine learns what memory it has.
    pub(crate) async fn begin(core: Arc<Core>, owner: Owner) -> Result<Self, SdkError<SessionError>> {
        let requests = Requests::new(core.limits().request_window);
        let own_memory = matches!(owner, Owner::Vm(_)).then(GuestMemory::default);
        let (leaked, on_leak) = (AtomicU64::new(0), OnceLock::new());
        let inner = DriverCore { core, requests, owner, own_memory, leaked, on_leak };
        if inner.own_memory.is_some() {
            inner.learn_memory().await.map_err(without_refusal)?;
        }
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The owner that this driver acts for.
    pub fn owner(&self) -> Owner {
        self.inner.owner
    }

    /// What the server allows in this session.
    pub fn limits(&self) -> SessionLimits {
        self.inner.core.limits()
    }

    /// Counts the sessions of this identity; larger after each reconnect.
    pub fn generation(&self) -> Generation {
        self.inner.core.generation()
    }

    /// How long the server keeps what this driver holds after its connection is lost.
    pub fn grace(&self) -> Duration {
        self.inner.core.grace()
    }

    /// How many mappings were dropped without unmap.
    pub fn leaked_mappings(&self) -> u64 {
        self.inner.leaked.load(Ordering::Relaxed)
    }

    /// Calls `watcher` for every mapping that is dropped without unmap, beside the warning in the log. Only
    /// the first one given is kept; `false` says that there was one already.
    pub fn on_leak(&self, watcher: impl Fn(LeakReport) + Send + Sync + 'static) -> bool {
        self.inner.on_leak.set(Box::new(watcher)).is_ok()
    }

    /// A device of this owner.
    pub fn device(&self, address: DeviceAddress) -> DeviceHandle {
        DeviceHandle::new(Arc::clone(&self.inner), address)
    }

    /// The memory of this owner, as its processor sees it.
    pub fn memory(&self) -> Memory {
        Memory::new(Arc::clone(&self.inner.core), None)
    }

    /// The faults of this owner's devices.
    pub fn faults(&self) -> Faults {
        Faults::new(Arc::clone(&self.inner.core))
    }

    /// What the DMA sanitizer reports on this owner's domains.
    pub fn sanitizer(&self) -> Sanitizer {
        Sanitizer::new(Arc::clone(&self.inner.core))
    }

    /// This owner's devices and domains, inspected. Physical addresses are left out.
    pub fn inspect(&self) -> Inspect {
        Inspect::new(Arc::clone(&self.inner.core))
    }

    /// Allocates a buffer of at least `size_bytes` (at least 1), rounded up to whole 4 KiB pages and zeroed.
    ///
    /// A virtual machine has the memory that its hypervisor gave it, so its buffers are pages of that, chosen here and not by the server:
    /// whoever uses [`memory_regions`](Self::memory_regions) directly divides it with this allocator. [`OutOfMemory`](crate::errors::OutOfMemory) then means that
    /// no run of free pages is long enough, and the hypervisor has to give more.
    pub async fn allocate(&self, size_bytes: u64) -> Result<Buffer, SdkError<AllocateError>> {
        if let Some(own) = &self.inner.own_memory {
            let range = self.inner.allocate_own(own, size_bytes).await?;
            return Ok(Buffer::new(Arc::clone(&self.inner), range));
        }
        let message =
            |header: RequestHeader| pb::AllocateBufferRequest { header: Some(header.into()), size_bytes };
        let answer = self
            .inner
            .mutate(message, |mut client, request| async move { client.allocate_buffer(request).await })
            .await?;
        let range = GpaRange::new(Gpa::new(answer.gpa), answer.size_bytes).map_err(bad_answer)?;
        Ok(Buffer::new(Arc::clone(&self.inner), range))
    }

    /// Creates a domain: an empty address space with a protection mode of its own. Devices that are attached to it use it for the DMA
    /// API too. Options that make no sense together are refused with the name of the field and the remedy.
    ///
    /// ```no_run
    /// use guest_sdk::{DomainOptions, IovaAllocation, Protection};
    ///
    /// # async fn run(driver: guest_sdk::Driver, device: guest_sdk::DeviceHandle) -> Result<(), Box<dyn std::error::Error>> {
    /// let options = DomainOptions::new(Protection::DEFERRED)
    ///     .with_allocator(IovaAllocation::Classic)
    ///     .with_sanitizer(true);
    /// let domain = driver.create_domain(options).await?;
    /// domain.attach(&device).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn create_domain(&self, options: DomainOptions) -> Result<Domain, SdkError<CreateDomainError>> {
        let message = |header: RequestHeader| -> pb::CreateDomainRequest {
            model::CreateDomain { header, options }.into()
        };
        let answer = self
            .inner
            .mutate(message, |mut client, request| async move { client.create_domain(request).await })
            .await?;
        let id = crate::convert::domain_id(answer.domain_id)?;
        Ok(Domain::new(Arc::clone(&self.inner), id, options))
    }

    /// Interrupts of this owner's devices, from now on. Returns once the subscription stands, so that an
    /// interrupt provoked afterwards is seen.
    pub async fn watch_interrupts(&self) -> Result<Subscription<InterruptEvent, Never>, SdkError<Never>> {
        crate::interrupts::watch(Arc::clone(&self.inner.core)).await
    }
}
