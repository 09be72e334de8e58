//! `AdminService`: steering the host. Every change runs in a task of its own, so that a cancelled call does not stop half-way.

use std::future::Future;
use std::sync::Arc;

use iommu_kernel::DeviceEntry;
use iommu_proto::errors::WireError;
use iommu_proto::model::{self, Peer};
use iommu_proto::pb;
use iommu_proto::pb::admin_service_server::AdminService;
use iommu_types::errors::{AttachError, DeclareError, DetachError, InvalidField};
use iommu_types::{DeviceAddress, Owner, PciFunction, Role};
use tonic::{Request, Response, Status};

use super::driver::mmio_call;
use super::{Caller, internal, parse};
use crate::host::Host;
use crate::host::placement::OPERATOR;
use crate::session::open::{quarantine, tenant_of};

/// The service.
#[derive(Clone, Debug)]
pub struct Admin {
    /// The host.
    pub host: Arc<Host>,
}

async fn to_its_end<T, E>(work: impl Future<Output = Result<T, E>> + Send + 'static) -> Result<T, Status>
where
    T: Send + 'static,
    E: WireError + Send + 'static,
{
    match tokio::spawn(work).await {
        Ok(done) => done.map_err(WireError::into_status),
        Err(_) => Err(internal("the task of a change ended early")),
    }
}

/// Only devices of the host are steered here; a bare machine's are its creator's.
fn on_host(device: DeviceAddress) -> Result<DeviceAddress, Status> {
    if device.segment == 0 {
        return Ok(device);
    }
    Err(iommu_types::errors::UnknownDevice { device }.into_status())
}

#[tonic::async_trait]
impl AdminService for Admin {
    async fn declare_device(
        &self,
        request: Request<pb::DeclareDeviceRequest>,
    ) -> Result<Response<pb::DeclareDeviceResponse>, Status> {
        let caller = Caller::of(&request)?;
        let model::DeclareDevice { device: address, name, owner, function } = parse(request.into_inner())?;
        let host = Arc::clone(&self.host);
        let function = function.unwrap_or(PciFunction::ISOLATED);
        let entry = DeviceEntry { function, ..DeviceEntry::new(address, name.clone(), owner) };
        to_its_end(async move {
            host.declare_device(entry).await?;
            host.peer_comes(&name, Role::Device(address)).await;
            Ok::<_, DeclareError>(())
        })
        .await?;
        tracing::info!(device = %address, by = %caller.session.identity, "device declared");
        Ok(Response::new(pb::DeclareDeviceResponse {}))
    }

    async fn remove_device(
        &self,
        request: Request<pb::RemoveDeviceRequest>,
    ) -> Result<Response<pb::RemoveDeviceResponse>, Status> {
        let caller = Caller::of(&request)?;
        let model::RemoveDevice { device } = parse(request.into_inner())?;
        let device = on_host(device)?;
        let host = Arc::clone(&self.host);
        to_its_end(async move { host.remove_device(device).await }).await?;
        tracing::info!(%device, by = %caller.session.identity, "device removed");
        Ok(Response::new(pb::RemoveDeviceResponse {}))
    }

    async fn declare_driver(
        &self,
        request: Request<pb::DeclareDriverRequest>,
    ) -> Result<Response<pb::DeclareDriverResponse>, Status> {
        let caller = Caller::of(&request)?;
        let model::DeclareDriver { owner, name } = parse(request.into_inner())?;
        if !matches!(owner, Owner::Driver(_)) {
            let why = format!("{owner} is not a driver");
            return Err(InvalidField { field: "owner".to_owned(), why }.into_status());
        }
        self.host.declare_owner(owner, name.clone()).map_err(WireError::into_status)?;
        self.host.peer_comes(&name, Role::Driver(owner)).await;
        tracing::info!(%owner, by = %caller.session.identity, "driver declared");
        Ok(Response::new(pb::DeclareDriverResponse {}))
    }

    async fn attach_to_owner(
        &self,
        request: Request<pb::AttachToOwnerRequest>,
    ) -> Result<Response<pb::AttachToOwnerResponse>, Status> {
        let caller = Caller::of(&request)?;
        let model::AttachToOwner { device: address, owner, domain_id } = parse(request.into_inner())?;
        let address = on_host(address)?;
        let host = Arc::clone(&self.host);
        let attached = to_its_end(async move {
            let device = host.devices.get(address)?;
            let owner = host.owners.get(owner)?;
            host.give(&device, &owner, domain_id, OPERATOR).await
        });
        let domain_id = attached.await?;
        tracing::info!(device = %address, %owner, %domain_id, by = %caller.session.identity, "device given");
        Ok(Response::new(pb::AttachToOwnerResponse { domain_id: u32::from(domain_id.get()) }))
    }

    async fn detach(
        &self,
        request: Request<pb::DetachRequest>,
    ) -> Result<Response<pb::DetachResponse>, Status> {
        let caller = Caller::of(&request)?;
        let model::Detach { device: address } = parse(request.into_inner())?;
        let address = on_host(address)?;
        let host = Arc::clone(&self.host);
        to_its_end::<_, DetachError>(async move {
            let device = host.devices.get(address)?;
            host.detach(&device, OPERATOR).await
        })
        .await?;
        tracing::info!(device = %address, by = %caller.session.identity, "device detached");
        Ok(Response::new(pb::DetachResponse {}))
    }

    async fn quarantine(
        &self,
        request: Request<pb::QuarantineRequest>,
    ) -> Result<Response<pb::QuarantineResponse>, Status> {
        let caller = Caller::of(&request)?;
        let model::Quarantine { peer } = parse(request.into_inner())?;
        let host = Arc::clone(&self.host);
        let ended = to_its_end::<_, AttachError>(async move {
            match peer {
                Peer::Device(address) => Ok(host.devices.get(address)?.quarantine().await),
                Peer::Owner(owner) => {
                    let tenant = tenant_of(&host, owner)?;
                    Ok(quarantine(host, tenant).await)
                }
            }
        })
        .await?;
        tracing::info!(?peer, ended, by = %caller.session.identity, "quarantined");
        Ok(Response::new(pb::QuarantineResponse { ended }))
    }

    async fn mmio_read(
        &self,
        request: Request<pb::MmioReadRequest>,
    ) -> Result<Response<pb::MmioReadResponse>, Status> {
        let mmio: model::Mmio = parse(request.into_inner())?;
        on_host(mmio.device)?;
        let value = mmio_call(&self.host, mmio, None).await.map_err(WireError::into_status)?;
        Ok(Response::new(pb::MmioReadResponse { value }))
    }

    async fn mmio_write(
        &self,
        request: Request<pb::MmioWriteRequest>,
    ) -> Result<Response<pb::MmioWriteResponse>, Status> {
        let caller = Caller::of(&request)?;
        let mmio: model::Mmio = parse(request.into_inner())?;
        on_host(mmio.device)?;
        mmio_call(&self.host, mmio, None).await.map_err(WireError::into_status)?;
        tracing::info!(
            device = %mmio.device, offset = mmio.access.offset, by = %caller.session.identity, "register written"
        );
        Ok(Response::new(pb::MmioWriteResponse {}))
    }
}
