//! Domains: address spaces with a protection mode, and the domain API, in which the driver chooses the addresses (virtio-iommu's
//! contract).

use std::sync::Arc;

use iommu_proto::model::RequestHeader;
use iommu_proto::pb;
use iommu_types::errors::{AttachError, DestroyDomainError, MapError, UnmapError};
use iommu_types::{DomainId, DomainOptions, Gpa, Iova, Permissions};

use crate::dma_stream::Client;
use crate::driver::DriverCore;
use crate::{DeviceHandle, SdkError};

/// A domain of this owner. It stays until it is destroyed or the session is reclaimed; dropping the value
/// destroys nothing.
#[derive(Clone, Debug)]
pub struct Domain {
    driver: Arc<DriverCore>,
    id: DomainId,
    options: DomainOptions,
}

impl Domain {
    pub(crate) fn new(driver: Arc<DriverCore>, id: DomainId, options: DomainOptions) -> Self {
        Self { driver, id, options }
    }

    /// Its identifier.
    pub fn id(&self) -> DomainId {
        self.id
    }

    /// What was chosen when it was created.
    pub fn options(&self) -> DomainOptions {
        self.options
    }

    /// Maps `size_bytes` of memory at `gpa` to `iova`; all three are multiples of 4096. A range that touches
    /// an existing mapping is refused whole, and so is a fixed address where the mode gives the addresses.
    pub async fn map(
        &self,
        iova: Iova,
        gpa: Gpa,
        size_bytes: u64,
        permissions: Permissions,
    ) -> Result<(), SdkError<MapError>> {
        let message = |header: RequestHeader| pb::MapRequest {
            header: Some(header.into()),
            domain_id: self.id.get().into(),
            iova: iova.get(),
            gpa: gpa.get(),
            size_bytes,
            permissions: Some(permissions.into()),
        };
        let call = |mut client: Client, request| async move { client.map(request).await };
        self.driver.mutate(message, call).await.map(drop)
    }

    /// Unmaps every mapping in the range, which may have holes; one that would be split refuses the whole.
    /// Answered after invalidation and drain, with the bytes of mappings removed.
    pub async fn unmap(&self, iova: Iova, size_bytes: u64) -> Result<u64, SdkError<UnmapError>> {
        let message = |header: RequestHeader| pb::UnmapRequest {
            header: Some(header.into()),
            domain_id: self.id.get().into(),
            iova: iova.get(),
            size_bytes,
        };
        let call = |mut client: Client, request| async move { client.unmap(request).await };
        Ok(self.driver.mutate(message, call).await?.unmapped_bytes)
    }

    /// Attaches a device of this owner. One that is attached elsewhere moves.
    pub async fn attach(&self, device: &DeviceHandle) -> Result<(), SdkError<AttachError>> {
        device.attach_to(Some(self.id)).await.map(drop)
    }

    /// Destroys the domain with its mappings. Refused while a device is attached to it.
    pub async fn destroy(self) -> Result<(), SdkError<DestroyDomainError>> {
        let message = |header: RequestHeader| pb::DestroyDomainRequest {
            header: Some(header.into()),
            domain_id: self.id.get().into(),
        };
        let call = |mut client: Client, request| async move { client.destroy_domain(request).await };
        self.driver.mutate(message, call).await.map(drop)
    }
}
