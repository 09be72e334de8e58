//! Steering the host: which devices there are, whose they are, and where they are attached.

use std::sync::Arc;

use iommu_proto::limits::MESSAGE_BYTES_MAX;
use iommu_proto::model;
pub use iommu_proto::model::Peer;
use iommu_proto::pb;
use iommu_proto::pb::admin_service_client::AdminServiceClient;
use iommu_types::errors::{AttachError, DeclareError, DetachError, MmioError};
use iommu_types::{AccessWidth, DeviceAddress, DomainId, Owner, PciFunction};
use tonic::transport::Channel;

use crate::connection::Core;
use crate::mmio::Place;
use crate::{SdkError, convert};

/// The administration service. Its calls carry no request ID; one whose answer was lost and that is made
/// again may be told that it was done already (such as `DEVICE_EXISTS`), so none is retried by itself.
#[derive(Clone, Debug)]
pub struct Admin {
    core: Arc<Core>,
}

fn client(channel: Channel) -> AdminServiceClient<Channel> {
    AdminServiceClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX)
}

impl Admin {
    pub(crate) fn new(core: Arc<Core>) -> Self {
        Self { core }
    }

    /// Declares a device (segment 0), so that an agent may connect for it under `name`; with an owner, it is
    /// attached to that owner's default domain. It is an ordinary function with ACS.
    pub async fn declare_device(
        &self,
        device: DeviceAddress,
        name: impl Into<String>,
        owner: Option<Owner>,
    ) -> Result<(), SdkError<DeclareError>> {
        self.declare_device_as(device, name, owner, PciFunction::ISOLATED).await
    }

    /// The same of a device that is what `function` says, which decides its isolation group.
    pub async fn declare_device_as(
        &self,
        device: DeviceAddress,
        name: impl Into<String>,
        owner: Option<Owner>,
        function: PciFunction,
    ) -> Result<(), SdkError<DeclareError>> {
        let function = Some(function);
        let message: pb::DeclareDeviceRequest =
            model::DeclareDevice { device, name: name.into(), owner, function }.into();
        self.core
            .unary_once(
                message,
                |channel, request| async move { client(channel).declare_device(request).await },
            )
            .await
            .map(drop)
    }

    /// Detaches a device, ends its session and forgets it.
    pub async fn remove_device(&self, device: DeviceAddress) -> Result<(), SdkError<DetachError>> {
        let message: pb::RemoveDeviceRequest = model::RemoveDevice { device }.into();
        self.core
            .unary_once(
                message,
                |channel, request| async move { client(channel).remove_device(request).await },
            )
            .await
            .map(drop)
    }

    /// Declares an owner, so that its driver may connect under `name`.
    pub async fn declare_driver(
        &self,
        owner: Owner,
        name: impl Into<String>,
    ) -> Result<(), SdkError<DeclareError>> {
        let message: pb::DeclareDriverRequest = model::DeclareDriver { owner, name: name.into() }.into();
        self.core
            .unary_once(
                message,
                |channel, request| async move { client(channel).declare_driver(request).await },
            )
            .await
            .map(drop)
    }

    /// Gives a device to an owner and attaches it to a domain of that owner, or to the owner's default domain
    /// of the device. One that is attached is detached first.
    pub async fn attach_to_owner(
        &self,
        device: DeviceAddress,
        owner: Owner,
        domain_id: Option<DomainId>,
    ) -> Result<DomainId, SdkError<AttachError>> {
        let message: pb::AttachToOwnerRequest = model::AttachToOwner { device, owner, domain_id }.into();
        let answer =
            self.core
                .unary_once(message, |channel, request| async move {
                    client(channel).attach_to_owner(request).await
                })
                .await?;
        Ok(convert::domain_id(answer.domain_id)?)
    }

    /// Detaches a device from its domain; it keeps its owner. Answered after invalidation and drain.
    pub async fn detach(&self, device: DeviceAddress) -> Result<(), SdkError<DetachError>> {
        let message: pb::DetachRequest = model::Detach { device }.into();
        self.core
            .unary_once(message, |channel, request| async move { client(channel).detach(request).await })
            .await
            .map(drop)
    }

    /// Ends the session of a peer at once; of a driver, what it holds is reclaimed without grace. Says
    /// whether there was a session.
    pub async fn quarantine(&self, peer: Peer) -> Result<bool, SdkError<AttachError>> {
        let message: pb::QuarantineRequest = model::Quarantine { peer }.into();
        let answer = self
            .core
            .unary_once(message, |channel, request| async move { client(channel).quarantine(request).await })
            .await?;
        Ok(answer.ended)
    }

    /// Reads a register of any device, for debugging beside its driver.
    pub async fn mmio_read(
        &self,
        device: DeviceAddress,
        bar: u8,
        offset: u64,
        width: AccessWidth,
    ) -> Result<u64, SdkError<MmioError>> {
        let place = Place { device, bar, offset, width };
        let answer =
            self.core
                .unary_once(place.read(), |channel, request| async move {
                    client(channel).mmio_read(request).await
                })
                .await?;
        Ok(place.value(answer)?)
    }

    /// Writes a register of any device, for debugging beside its driver; answered when the device has taken
    /// it.
    pub async fn mmio_write(
        &self,
        device: DeviceAddress,
        bar: u8,
        offset: u64,
        width: AccessWidth,
        value: u64,
    ) -> Result<(), SdkError<MmioError>> {
        let place = Place { device, bar, offset, width };
        self.core
            .unary_once(place.write(value), |channel, request| async move {
                client(channel).mmio_write(request).await
            })
            .await
            .map(drop)
    }
}
