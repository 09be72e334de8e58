//! A device, as its driver sees it: registers, interrupts, attachment.

use std::sync::Arc;

use iommu_proto::model::{self, RequestHeader};
use iommu_proto::pb;
use iommu_types::errors::{AttachError, DetachError, DmaLimitsError, InterruptError, MmioError};
use iommu_types::{AccessWidth, DeviceAddress, DmaLimits, DomainId, Iova};

use crate::convert::{self, bad_answer};
use crate::dma_stream::Client;
use crate::driver::{DriverCore, client};
use crate::mmio::Place;
use crate::{MsiVector, SdkError};

/// A device of a driver. Cheap to clone; whether the device exists is told by the first call on it.
#[derive(Clone, Debug)]
pub struct DeviceHandle {
    driver: Arc<DriverCore>,
    address: DeviceAddress,
}

impl DeviceHandle {
    pub(crate) fn new(driver: Arc<DriverCore>, address: DeviceAddress) -> Self {
        Self { driver, address }
    }

    /// Where it is.
    pub fn address(&self) -> DeviceAddress {
        self.address
    }

    /// Reads a register of `width` at `offset` (a multiple of the width) in BAR `bar` (0 to 5).
    ///
    /// A read that got no answer because the connection was lost is made again: a register that changes by
    /// being read may be read twice.
    pub async fn read(&self, bar: u8, offset: u64, width: AccessWidth) -> Result<u64, SdkError<MmioError>> {
        let place = Place { device: self.address, bar, offset, width };
        let answer = self
            .driver
            .core
            .unary(place.read(), |channel, request| async move { client(channel).mmio_read(request).await })
            .await?;
        Ok(place.value(answer)?)
    }

    /// Writes a register; answered when the device has taken it. Bits of `value` above the width are refused.
    ///
    /// The wire gives register writes no request ID, so a write that got no answer is **not** made again: it
    /// ends as [`SdkError::Transport`], and whether the device took it is unknown.
    pub async fn write(
        &self,
        bar: u8,
        offset: u64,
        width: AccessWidth,
        value: u64,
    ) -> Result<(), SdkError<MmioError>> {
        let place = Place { device: self.address, bar, offset, width };
        self.driver
            .core
            .unary_once(place.write(value), |channel, request| async move {
                client(channel).mmio_write(request).await
            })
            .await
            .map(drop)
    }

    /// Reads a 4-byte register of BAR 0.
    pub async fn read32(&self, offset: u64) -> Result<u32, SdkError<MmioError>> {
        let value = self.read(0, offset, AccessWidth::Bytes4).await?;
        Ok(u32::try_from(value).map_err(bad_answer)?)
    }

    /// Reads an 8-byte register of BAR 0.
    pub async fn read64(&self, offset: u64) -> Result<u64, SdkError<MmioError>> {
        self.read(0, offset, AccessWidth::Bytes8).await
    }

    /// Writes a 4-byte register of BAR 0.
    pub async fn write32(&self, offset: u64, value: u32) -> Result<(), SdkError<MmioError>> {
        self.write(0, offset, AccessWidth::Bytes4, value.into()).await
    }

    /// Writes an 8-byte register of BAR 0.
    pub async fn write64(&self, offset: u64, value: u64) -> Result<(), SdkError<MmioError>> {
        self.write(0, offset, AccessWidth::Bytes8, value).await
    }

    /// Allocates an interrupt: what to program into the device, and the vector with which it is delivered.
    pub async fn allocate_interrupt(&self) -> Result<MsiVector, SdkError<InterruptError>> {
        let message = |header: RequestHeader| pb::AllocateInterruptRequest {
            header: Some(header.into()),
            device: Some(self.address.into()),
        };
        let call = |mut client: Client, request| async move { client.allocate_interrupt(request).await };
        let answer = self.driver.mutate(message, call).await?;
        let vector = u8::try_from(answer.vector).map_err(bad_answer)?;
        Ok(MsiVector { address: Iova::new(answer.address), data: answer.data, vector })
    }

    /// What the device can address and how long its segments may be, for mappings made from now on.
    pub async fn set_dma_limits(&self, limits: DmaLimits) -> Result<DmaLimits, SdkError<DmaLimitsError>> {
        let DmaLimits { mask_bits, segment_bytes_max, segment_boundary_mask } = limits;
        self.change_limits(Some(mask_bits), Some(segment_bytes_max), Some(segment_boundary_mask)).await
    }

    /// How many address bits the device has, 12 to 64 (Linux `dma_set_mask`). The other limits stay; all that are in force are returned.
    pub async fn set_dma_mask(&self, mask_bits: u8) -> Result<DmaLimits, SdkError<DmaLimitsError>> {
        self.change_limits(Some(mask_bits), None, None).await
    }

    /// The longest segment that the device takes, in bytes (Linux `dma_set_max_seg_size`).
    pub async fn set_max_seg_size(&self, size_bytes: u64) -> Result<DmaLimits, SdkError<DmaLimitsError>> {
        self.change_limits(None, Some(size_bytes), None).await
    }

    /// No segment crosses a multiple of `mask` plus 1 (Linux `dma_set_seg_boundary`).
    pub async fn set_seg_boundary(&self, mask: u64) -> Result<DmaLimits, SdkError<DmaLimitsError>> {
        self.change_limits(None, None, Some(mask)).await
    }

    /// The limits in force.
    pub async fn dma_limits(&self) -> Result<DmaLimits, SdkError<DmaLimitsError>> {
        self.change_limits(None, None, None).await
    }

    async fn change_limits(
        &self,
        mask_bits: Option<u8>,
        segment_bytes_max: Option<u64>,
        segment_boundary_mask: Option<u64>,
    ) -> Result<DmaLimits, SdkError<DmaLimitsError>> {
        let device = self.address;
        let message = |header: RequestHeader| -> pb::SetDmaLimitsRequest {
            model::SetDmaLimits { header, device, mask_bits, segment_bytes_max, segment_boundary_mask }.into()
        };
        let call = |mut client: Client, request| async move { client.set_dma_limits(request).await };
        Ok(self.driver.mutate(message, call).await?.try_into().map_err(bad_answer)?)
    }

    /// Attaches the device to the owner's default domain of it, the one that the DMA API uses.
    pub async fn attach_default(&self) -> Result<DomainId, SdkError<AttachError>> {
        self.attach_to(None).await
    }

    /// Detaches the device: every DMA of it is refused. Answered after invalidation and drain.
    pub async fn detach(&self) -> Result<(), SdkError<DetachError>> {
        let message = |header: RequestHeader| pb::DetachDeviceRequest {
            header: Some(header.into()),
            device: Some(self.address.into()),
        };
        let call = |mut client: Client, request| async move { client.detach_device(request).await };
        self.driver.mutate(message, call).await.map(drop)
    }

    pub(crate) async fn attach_to(
        &self,
        domain_id: Option<DomainId>,
    ) -> Result<DomainId, SdkError<AttachError>> {
        let message = |header: RequestHeader| pb::AttachDeviceRequest {
            header: Some(header.into()),
            device: Some(self.address.into()),
            domain_id: domain_id.map(|id| id.get().into()),
        };
        let call = |mut client: Client, request| async move { client.attach_device(request).await };
        Ok(convert::domain_id(self.driver.mutate(message, call).await?.domain_id)?)
    }
}
