//! The driver software of an owner: buffers, the DMA API, domains, interrupts, and the registers of its
//! devices.

use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use iommu_proto::errors::WireError;
use iommu_proto::model::{self, RequestHeader};
use iommu_proto::pb;
use iommu_proto::pb::driver_service_client::DriverServiceClient;
use iommu_types::errors::{AllocateError, CreateDomainError, DmaMapError};
use iommu_types::{DeviceAddress, Direction, Generation, Gpa, GpaRange, Iova, Owner, Protection};
use tonic::transport::Channel;
use tonic::{Request, Response, Status};

use crate::connection::{Core, MESSAGE_BYTES_MAX};
use crate::convert::bad_answer;
use crate::requests::Requests;
use crate::{
    Buffer, Coherent, DeviceHandle, DmaMapping, DmaStream, Domain, DomainWidth, Faults, Inspect,
    InterruptEvent, Memory, Never, SdkError, SessionLimits, Subscription, TransportError,
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
    inner: Arc<DriverCore>,
}

/// What a driver and all that it made share.
pub(crate) struct DriverCore {
    pub(crate) core: Arc<Core>,
    pub(crate) requests: Arc<Requests>,
    owner: Owner,
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
        let waited = self.core.deadline();
        let request = tokio::time::timeout(waited, self.requests.begin()).await.map_err(|_| {
            let last = Some("the server's window is full of requests without an answer".to_owned());
            TransportError::Deadline { waited, last }
        })?;
        self.core.call(|channel| call(client(channel), self.core.request(message(request.header())))).await
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
    pub(crate) fn new(core: Arc<Core>, owner: Owner) -> Self {
        let requests = Requests::new(core.limits().request_window);
        let inner = DriverCore { core, requests, owner, leaked: AtomicU64::new(0), on_leak: OnceLock::new() };
        Self { inner: Arc::new(inner) }
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

    /// This owner's devices and domains, inspected. Physical addresses are left out.
    pub fn inspect(&self) -> Inspect {
        Inspect::new(Arc::clone(&self.inner.core))
    }

    /// Allocates a buffer of at least `size_bytes` (at least 1), rounded up to whole 4 KiB pages and zeroed.
    pub async fn allocate(&self, size_bytes: u64) -> Result<Buffer, SdkError<AllocateError>> {
        let message =
            |header: RequestHeader| pb::AllocateBufferRequest { header: Some(header.into()), size_bytes };
        let answer = self
            .inner
            .mutate(message, |mut client, request| async move { client.allocate_buffer(request).await })
            .await?;
        let range = GpaRange::new(Gpa::new(answer.gpa), answer.size_bytes).map_err(bad_answer)?;
        Ok(Buffer::new(Arc::clone(&self.inner), range))
    }

    /// Maps memory for one DMA (Linux `dma_map_single`): any offset and size. The server chooses the address
    /// and returns it; it has the offset of `memory` in its page. What Linux tells by
    /// [`DMA_MAPPING_ERROR`](crate::DMA_MAPPING_ERROR) is `Err` here.
    pub async fn dma_map_single(
        &self,
        device: &DeviceHandle,
        memory: GpaRange,
        direction: Direction,
    ) -> Result<DmaMapping, SdkError<DmaMapError>> {
        let device_address = device.address();
        let message = |header: RequestHeader| -> pb::DmaMapRequest {
            model::DmaMap { header, device: device_address, range: memory, direction }.into()
        };
        let answer = self
            .inner
            .mutate(message, |mut client, request| async move { client.dma_map(request).await })
            .await?;
        let iova = Iova::new(answer.iova);
        Ok(DmaMapping::new(Arc::clone(&self.inner), device.address(), iova, memory, direction))
    }

    /// Maps part of one 4 KiB page (Linux `dma_map_page`): `size_bytes` from `offset` in the page that holds
    /// `page`.
    pub async fn dma_map_page(
        &self,
        device: &DeviceHandle,
        page: Gpa,
        offset: u64,
        size_bytes: u64,
        direction: Direction,
    ) -> Result<DmaMapping, SdkError<DmaMapError>> {
        let base = page.page_base().checked_add(offset);
        let wraps = iommu_types::InvalidRange::Wraps { space: "gpa", base: page.get(), size_bytes };
        let range = base.ok_or(wraps).and_then(|base| GpaRange::new(base, size_bytes));
        let range = range.map_err(|invalid| SdkError::Refused(invalid.into()))?;
        self.dma_map_single(device, range, direction).await
    }

    /// Allocates memory that CPU and device share for long (Linux `dma_alloc_coherent`), such as a descriptor
    /// ring.
    pub async fn dma_alloc_coherent(
        &self,
        device: &DeviceHandle,
        size_bytes: u64,
    ) -> Result<Coherent, SdkError<DmaMapError>> {
        let message = |header: RequestHeader| pb::AllocateCoherentRequest {
            header: Some(header.into()),
            device: Some(device.address().into()),
            size_bytes,
        };
        let answer = self
            .inner
            .mutate(message, |mut client, request| async move { client.allocate_coherent(request).await })
            .await?;
        let range = GpaRange::new(Gpa::new(answer.gpa), answer.size_bytes).map_err(bad_answer)?;
        Ok(Coherent::new(Arc::clone(&self.inner), device.address(), range, Iova::new(answer.iova)))
    }

    /// A stream of map and unmap batches of one device, pipelined. It goes on over a reconnect.
    pub fn dma_stream(&self, device: &DeviceHandle) -> DmaStream {
        DmaStream::new(Arc::clone(&self.inner), device.address())
    }

    /// Creates an empty address space for the domain API.
    pub async fn create_domain(
        &self,
        protection: Protection,
        width: DomainWidth,
    ) -> Result<Domain, SdkError<CreateDomainError>> {
        let message = |header: RequestHeader| -> pb::CreateDomainRequest {
            model::CreateDomain { header, protection, width_bits: width.bits() }.into()
        };
        let answer = self
            .inner
            .mutate(message, |mut client, request| async move { client.create_domain(request).await })
            .await?;
        Ok(Domain::new(Arc::clone(&self.inner), crate::convert::domain_id(answer.domain_id)?))
    }

    /// Interrupts of this owner's devices, from now on. Returns once the subscription stands, so that an
    /// interrupt provoked afterwards is seen.
    pub async fn watch_interrupts(&self) -> Result<Subscription<InterruptEvent, Never>, SdkError<Never>> {
        crate::interrupts::watch(Arc::clone(&self.inner.core)).await
    }
}
