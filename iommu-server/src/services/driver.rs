//! `DriverService`: buffers, the DMA API, the domain API, interrupts, registers.
//!
//! A mutating call is carried out once (`once.rs`).

use std::sync::Arc;

use iommu_kernel as kernel;
use iommu_proto::errors::WireError;
use iommu_proto::model;
use iommu_proto::pb::{self, driver_service_server::DriverService};
use iommu_types::errors::{
    AttachError, DetachError, DeviceAbsent, DmaMapError, InterruptError, LimitReached, MmioError,
    NoHypervisor, NotAllocated, NotYours,
};
use iommu_types::{Direction, GpaRange, InvalidRange, IovaRange, Owner};
use tonic::{Request, Response, Status, Streaming};

use super::dma_stream::DmaStream;
use super::feed::{Feed, feed};
use super::once::once;
use super::{Caller, parse};
use crate::bounds;
use crate::ending::Ending;
use crate::host::Host;
use crate::host::dma::{FreeCoherentError, MapAsk};
use crate::host::owners::OwnerState;
use crate::interrupts::Signal;
use crate::session::watch::supply;

/// The service.
#[derive(Clone, Debug)]
pub struct Drivers {
    /// The host.
    pub host: Arc<Host>,
}

fn status(error: impl WireError) -> Status {
    error.into_status()
}

/// A place among the subscriptions of a connection.
pub(super) fn watcher(caller: &Caller) -> Result<crate::connection::WatcherPlace, Status> {
    let place = caller.connection.watcher().ok_or_else(|| {
        let allowed = bounds::WATCHERS_PER_CONNECTION_MAX as u64;
        LimitReached { limit: "watchers_per_connection".to_owned(), allowed }.into_status()
    })?;
    match caller.session.owner() {
        None => Ok(place),
        Some(owner) => place.of_owner(Arc::clone(owner)).map_err(status),
    }
}

async fn allocate_coherent(
    host: &Host,
    owner: &OwnerState,
    ask: &model::AllocateCoherent,
) -> Result<model::AllocatedCoherent, Status> {
    host.device_of(owner.owner, ask.device).map_err(|e| status(DmaMapError::from(e)))?;
    let range = host.allocate_buffer(owner, ask.size_bytes).await.map_err(status)?;
    match host.dma_map(owner, ask.device, kernel::DmaMap::coherent(range, ask.header.request_id)).await {
        Ok(iova) => Ok(model::AllocatedCoherent { gpa: range.base(), iova, size_bytes: range.size_bytes() }),
        Err(error) => {
            // Another call of the owner may have freed it meanwhile, or mapped it: then it is that call's.
            let _freed = host.free_buffer(owner, range.base(), ask.header.request_id).await;
            Err(status(error))
        }
    }
}

async fn free_coherent(host: &Host, owner: &OwnerState, ask: &model::FreeCoherent) -> Result<(), Status> {
    let buffer = owner.memory.read().buffers().into_iter().find(|buffer| buffer.base() == ask.gpa);
    let buffer: GpaRange = buffer.ok_or_else(|| status(NotAllocated { gpa: ask.gpa }))?;
    let range = IovaRange::new(ask.iova, buffer.size_bytes()).map_err(|e: InvalidRange| status(e))?;
    let request = kernel::DmaUnmap {
        function: kernel::DmaFunction::Coherent,
        ..kernel::DmaUnmap::single(range, Direction::Bidirectional, ask.header.request_id)
    };
    host.free_coherent(owner, ask.device, buffer, request).await.map_err(|error| match error {
        FreeCoherentError::Unmap(error) => status(error),
        FreeCoherentError::Free(error) => status(error),
    })
}

impl Drivers {
    async fn mmio(&self, caller: &Caller, mmio: model::Mmio) -> Result<u64, Status> {
        let owner = caller.driver()?.owner;
        self.host.device_of(owner, mmio.device).map_err(|e| status(MmioError::from(e)))?;
        // A drain lets calls end; for a fenced session nothing is sent any more.
        let fenced = async {
            match caller.session.end.wait().await {
                Ending::ShuttingDown => std::future::pending().await,
                ending => ending,
            }
        };
        tokio::select! {
            biased;
            ending = fenced => Err(ending.into_status()),
            outcome = mmio_call(&self.host, mmio, Some(owner)) => outcome.map_err(status),
        }
    }
}

/// Brings a register access to the agent of its device, which must belong to `owner` if one is named.
pub(super) async fn mmio_call(
    host: &Host,
    mmio: model::Mmio,
    owner: Option<Owner>,
) -> Result<u64, MmioError> {
    let device = host.devices.get(mmio.device)?;
    let session = device.session().ok_or(DeviceAbsent { device: mmio.device })?;
    let ticket = session.mmio.ticket();
    // Asked after the ticket was taken: who loses the device from here on loses the ticket too.
    if owner.is_some() && device.owner().map(|now| now.owner) != owner {
        return Err(NotYours { object: mmio.device.to_string() }.into());
    }
    supply(&device, mmio.access);
    session.mmio(ticket, mmio.access).await
}

fn interrupt(signal: Signal, count: u32) -> Option<pb::Interrupt> {
    match signal {
        Signal::Device { device, vector, destination } => {
            Some(model::Interrupt { device, vector, destination, count }.into())
        }
        Signal::Event(_) => None,
    }
}

#[tonic::async_trait]
impl DriverService for Drivers {
    async fn allocate_buffer(
        &self,
        request: Request<pb::AllocateBufferRequest>,
    ) -> Result<Response<pb::AllocateBufferResponse>, Status> {
        once!(self, request, driver, model::AllocateBuffer, |host, owner, ask| {
            let range = host.allocate_buffer(&owner, ask.size_bytes).await.map_err(status)?;
            Ok(model::AllocatedBuffer { gpa: range.base(), size_bytes: range.size_bytes() }.into())
        })
    }

    async fn free_buffer(
        &self,
        request: Request<pb::FreeBufferRequest>,
    ) -> Result<Response<pb::FreeBufferResponse>, Status> {
        once!(self, request, driver, model::FreeBuffer, |host, owner, ask| {
            host.free_buffer(&owner, ask.gpa, ask.header.request_id).await.map_err(status)?;
            Ok(pb::FreeBufferResponse {})
        })
    }

    async fn dma_map(
        &self,
        request: Request<pb::DmaMapRequest>,
    ) -> Result<Response<pb::DmaMapResponse>, Status> {
        once!(self, request, driver, model::DmaMap, |host, owner, ask| {
            let model::DmaMap { header, device, range, direction, attributes, ring } = ask;
            let single = kernel::DmaMap::single(range, direction, header.request_id);
            let map = kernel::DmaMap { attributes, ring, ..single };
            let iova = host.dma_map(&owner, device, map).await.map_err(status)?;
            Ok(pb::DmaMapResponse { iova: iova.get() })
        })
    }

    async fn dma_unmap(
        &self,
        request: Request<pb::DmaUnmapRequest>,
    ) -> Result<Response<pb::DmaUnmapResponse>, Status> {
        once!(self, request, driver, model::DmaUnmap, |host, owner, ask| {
            let model::DmaUnmap { header, device, range, direction, attributes, end_of_burst } = ask;
            let single = kernel::DmaUnmap::single(range, direction, header.request_id);
            let unmap = kernel::DmaUnmap { attributes, end_of_burst, ..single };
            host.dma_unmap(owner.owner, device, unmap).await.map_err(status)?;
            Ok(pb::DmaUnmapResponse {})
        })
    }

    async fn dma_map_sg(
        &self,
        request: Request<pb::DmaMapSgRequest>,
    ) -> Result<Response<pb::DmaMapSgResponse>, Status> {
        once!(self, request, driver, model::DmaMapSg, |host, owner, ask| {
            let model::DmaMapSg { header, device, pieces, direction, attributes, ring } = ask;
            let ask = MapAsk { direction, request_id: header.request_id, attributes, ring, client: 0 };
            let mapped = host.dma_map_sg(&owner, device, &pieces, ask).await.map_err(status)?;
            let range = |segment: kernel::Segment| {
                IovaRange::new(segment.iova, segment.size_bytes)
                    .expect("a segment that was mapped is a range")
            };
            Ok(model::DmaSegments { segments: mapped.into_iter().map(range).collect() }.into())
        })
    }

    async fn dma_unmap_sg(
        &self,
        request: Request<pb::DmaUnmapSgRequest>,
    ) -> Result<Response<pb::DmaUnmapSgResponse>, Status> {
        once!(self, request, driver, model::DmaUnmapSg, |host, owner, ask| {
            let model::DmaUnmapSg { header, device, iova, elements, direction, attributes, end_of_burst } =
                ask;
            let request_id = header.request_id;
            let unmap = kernel::DmaUnmapSg {
                iova,
                elements,
                direction,
                request_id,
                attributes,
                end_of_burst,
                client: 0,
            };
            host.dma_unmap_sg(owner.owner, device, unmap).await.map_err(status)?;
            Ok(pb::DmaUnmapSgResponse {})
        })
    }

    async fn dma_sync(
        &self,
        request: Request<pb::DmaSyncRequest>,
    ) -> Result<Response<pb::DmaSyncResponse>, Status> {
        once!(self, request, driver, model::DmaSync, |host, owner, ask| {
            let model::DmaSync { header, device, range, direction, sync_for } = ask;
            let request_id = header.request_id;
            let sync = kernel::DmaSync { range, direction, target: sync_for, request_id };
            host.dma_sync(owner.owner, device, sync).map_err(status)?;
            Ok(pb::DmaSyncResponse {})
        })
    }

    async fn set_dma_limits(
        &self,
        request: Request<pb::SetDmaLimitsRequest>,
    ) -> Result<Response<pb::SetDmaLimitsResponse>, Status> {
        once!(self, request, driver, model::SetDmaLimits, |host, owner, ask| {
            let limits = host.set_dma_limits(owner.owner, ask.device, |before| ask.applied_to(before));
            Ok(limits.map_err(status)?.into())
        })
    }

    async fn list_memory(
        &self,
        request: Request<pb::ListMemoryRequest>,
    ) -> Result<Response<pb::ListMemoryResponse>, Status> {
        let caller = Caller::of(&request)?;
        let owner = caller.driver()?;
        let regions = if owner.is_vm() { owner.memory.read().buffers() } else { Vec::new() };
        Ok(Response::new(pb::ListMemoryResponse {
            gpa: regions.iter().map(|region| region.base().get()).collect(),
            size_bytes: regions.iter().map(|region| region.size_bytes()).collect(),
        }))
    }

    async fn hypercall(
        &self,
        request: Request<pb::HypercallRequest>,
    ) -> Result<Response<pb::HypercallResponse>, Status> {
        let caller = Caller::of(&request)?;
        let owner = Arc::clone(caller.driver()?);
        let model::Hypercall { payload } = parse(request.into_inner())?;
        let (Some(hypervisor), Owner::Vm(vm)) = (&owner.hypervisor, owner.owner) else {
            return Err(status(NoHypervisor {}));
        };
        tokio::select! {
            biased;
            ending = caller.session.end.wait() => Err(ending.into_status()),
            answer = hypervisor.hypercalls.call(vm, payload, bounds::HYPERCALL_TIMEOUT) => {
                Ok(Response::new(pb::HypercallResponse { payload: answer.map_err(status)? }))
            }
        }
    }

    type DmaStreamStream = DmaStream;

    async fn dma_stream(
        &self,
        request: Request<Streaming<pb::DmaStreamRequest>>,
    ) -> Result<Response<DmaStream>, Status> {
        let caller = Caller::of(&request)?;
        let stream = DmaStream::new(Arc::clone(&self.host), &caller, request.into_inner())?;
        Ok(Response::new(stream))
    }

    async fn allocate_coherent(
        &self,
        request: Request<pb::AllocateCoherentRequest>,
    ) -> Result<Response<pb::AllocateCoherentResponse>, Status> {
        once!(self, request, driver, model::AllocateCoherent, |host, owner, ask| {
            allocate_coherent(&host, &owner, &ask).await.map(Into::into)
        })
    }

    async fn free_coherent(
        &self,
        request: Request<pb::FreeCoherentRequest>,
    ) -> Result<Response<pb::FreeCoherentResponse>, Status> {
        once!(self, request, driver, model::FreeCoherent, |host, owner, ask| {
            free_coherent(&host, &owner, &ask).await?;
            Ok(pb::FreeCoherentResponse {})
        })
    }

    async fn create_domain(
        &self,
        request: Request<pb::CreateDomainRequest>,
    ) -> Result<Response<pb::CreateDomainResponse>, Status> {
        once!(self, request, driver, model::CreateDomain, |host, owner, ask| {
            let slot = host.create_domain(&owner, ask.options).await.map_err(status)?;
            Ok(pb::CreateDomainResponse { domain_id: u32::from(slot.id.get()) })
        })
    }

    async fn destroy_domain(
        &self,
        request: Request<pb::DestroyDomainRequest>,
    ) -> Result<Response<pb::DestroyDomainResponse>, Status> {
        once!(self, request, driver, model::DestroyDomain, |host, owner, ask| {
            host.destroy_domain(owner.owner, ask.domain_id, ask.header.request_id).await.map_err(status)?;
            Ok(pb::DestroyDomainResponse {})
        })
    }

    async fn attach_device(
        &self,
        request: Request<pb::AttachDeviceRequest>,
    ) -> Result<Response<pb::AttachDeviceResponse>, Status> {
        once!(self, request, driver, model::AttachDevice, |host, owner, ask| {
            host.device_of(owner.owner, ask.device).map_err(|e| status(AttachError::from(e)))?;
            let device = host.devices.get(ask.device).map_err(status)?;
            let domain_id =
                host.give_own(&device, &owner, ask.domain_id, ask.header.request_id).await.map_err(status)?;
            Ok(pb::AttachDeviceResponse { domain_id: u32::from(domain_id.get()) })
        })
    }

    async fn detach_device(
        &self,
        request: Request<pb::DetachDeviceRequest>,
    ) -> Result<Response<pb::DetachDeviceResponse>, Status> {
        once!(self, request, driver, model::DetachDevice, |host, owner, ask| {
            host.device_of(owner.owner, ask.device).map_err(|e| status(DetachError::from(e)))?;
            let device = host.devices.get(ask.device).map_err(status)?;
            host.detach_own(&device, owner.owner, ask.header.request_id).await.map_err(status)?;
            Ok(pb::DetachDeviceResponse {})
        })
    }

    async fn map(&self, request: Request<pb::MapRequest>) -> Result<Response<pb::MapResponse>, Status> {
        once!(self, request, driver, model::MapFixed, |host, owner, ask| {
            let map = kernel::MapFixed {
                iova: ask.range,
                gpa: ask.memory.base(),
                permissions: ask.permissions,
                request_id: ask.header.request_id,
            };
            host.map_fixed(&owner, ask.domain_id, map).map_err(status)?;
            Ok(pb::MapResponse {})
        })
    }

    async fn unmap(&self, request: Request<pb::UnmapRequest>) -> Result<Response<pb::UnmapResponse>, Status> {
        once!(self, request, driver, model::UnmapFixed, |host, owner, ask| {
            let unmapped = host.unmap_fixed(owner.owner, ask.domain_id, ask.range).await;
            Ok(pb::UnmapResponse { unmapped_bytes: unmapped.map_err(status)? })
        })
    }

    async fn allocate_interrupt(
        &self,
        request: Request<pb::AllocateInterruptRequest>,
    ) -> Result<Response<pb::AllocateInterruptResponse>, Status> {
        once!(self, request, driver, model::AllocateInterrupt, |host, owner, ask| {
            let device = host.devices.get(ask.device).map_err(status)?;
            // The device must not change hands between the look at its owner and the entry.
            let _placement = device.placement.lock().await;
            host.device_of(owner.owner, ask.device).map_err(|e| status(InterruptError::from(e)))?;
            let source = ask.device.source_id;
            let message = host.kernel.allocate_interrupt(&owner.account, source).map_err(status)?;
            let kernel::MsiMessage { address, data, vector } = message;
            Ok(model::AllocatedInterrupt { address, data, vector }.into())
        })
    }

    type WatchInterruptsStream = Feed<pb::WatchInterruptsResponse>;

    async fn watch_interrupts(
        &self,
        request: Request<pb::WatchInterruptsRequest>,
    ) -> Result<Response<Self::WatchInterruptsStream>, Status> {
        let caller = Caller::of(&request)?;
        let place = watcher(&caller)?;
        let subscription = caller.driver()?.interrupts.subscribe();
        let stream = feed(&self.host, &caller, Some(place), |sender| async move {
            sender.send(Ok(pb::WatchInterruptsResponse::default())).await?;
            loop {
                let signals = subscription.next().await;
                let interrupts =
                    signals.into_iter().filter_map(|(signal, count)| interrupt(signal, count)).collect();
                sender.send(Ok(pb::WatchInterruptsResponse { interrupts })).await?;
            }
        });
        Ok(Response::new(stream))
    }

    async fn mmio_read(
        &self,
        request: Request<pb::MmioReadRequest>,
    ) -> Result<Response<pb::MmioReadResponse>, Status> {
        let caller = Caller::of(&request)?;
        let value = self.mmio(&caller, parse(request.into_inner())?).await?;
        Ok(Response::new(pb::MmioReadResponse { value }))
    }

    async fn mmio_write(
        &self,
        request: Request<pb::MmioWriteRequest>,
    ) -> Result<Response<pb::MmioWriteResponse>, Status> {
        let caller = Caller::of(&request)?;
        self.mmio(&caller, parse(request.into_inner())?).await?;
        Ok(Response::new(pb::MmioWriteResponse {}))
    }
}
