//! Mappings of the DMA API: values that are used up by unmapping.

use std::sync::Arc;

use iommu_proto::model::{self, RequestHeader};
use iommu_proto::pb;
use iommu_types::errors::{DmaSyncError, DmaUnmapError};
use iommu_types::{
    DeviceAddress, Direction, DmaAttributes, GpaRange, InvalidRange, Iova, IovaRange, SyncFor,
};

use crate::dma_stream::Client;
use crate::driver::DriverCore;
use crate::{LeakReport, Memory, SdkError, UnmapOptions};

/// The address that stands for no mapping (Linux `DMA_MAPPING_ERROR`). A failed map is an `Err` in this
/// crate; the wire's batches carry this in their address column.
pub const DMA_MAPPING_ERROR: Iova = Iova::new(u64::MAX);

/// Memory mapped for a device (Linux `dma_addr_t`, with what belongs to it). [`unmap`](Self::unmap) uses it
/// up, so that an address that is no longer mapped cannot be handed out by mistake; dropping it instead is a
/// leak, which the [`Driver`](crate::Driver) counts and reports.
#[derive(Debug)]
#[must_use = "a mapping that is dropped without unmap is a leak: the device can still use it"]
pub struct DmaMapping {
    driver: Arc<DriverCore>,
    device: DeviceAddress,
    range: IovaRange,
    memory: GpaRange,
    direction: Direction,
    attributes: DmaAttributes,
    mapped: bool,
}

/// Hands `range` of a mapping to one side.
pub(crate) async fn sync(
    driver: &DriverCore,
    device: DeviceAddress,
    range: IovaRange,
    direction: Direction,
    sync_for: SyncFor,
) -> Result<(), SdkError<DmaSyncError>> {
    let message = |header: RequestHeader| -> pb::DmaSyncRequest {
        model::DmaSync { header, device, range, direction, sync_for }.into()
    };
    let call = |mut client: Client, request| async move { client.dma_sync(request).await };
    driver.mutate(message, call).await.map(drop)
}

impl DmaMapping {
    pub(crate) fn new(
        driver: Arc<DriverCore>,
        device: DeviceAddress,
        range: IovaRange,
        memory: GpaRange,
        direction: Direction,
        attributes: DmaAttributes,
    ) -> Self {
        Self { driver, device, range, memory, direction, attributes, mapped: true }
    }

    /// The address to give to the device.
    pub fn iova(&self) -> Iova {
        self.range.base()
    }

    /// The memory behind it.
    pub fn memory(&self) -> GpaRange {
        self.memory
    }

    /// Size in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.memory.size_bytes()
    }

    /// Which way data flows.
    pub fn direction(&self) -> Direction {
        self.direction
    }

    /// The device it was made for.
    pub fn device(&self) -> DeviceAddress {
        self.device
    }

    /// What was said of it when it was mapped.
    pub fn attributes(&self) -> DmaAttributes {
        self.attributes
    }

    /// Hands the memory to the CPU while it stays mapped (Linux `dma_sync_single_for_cpu`). In a bounce domain this brings what the
    /// device wrote; elsewhere it is checked and changes nothing.
    pub async fn sync_for_cpu(&self) -> Result<(), SdkError<DmaSyncError>> {
        self.sync_range(0, self.size_bytes(), SyncFor::Cpu).await
    }

    /// Hands the memory back to the device (Linux `dma_sync_single_for_device`).
    pub async fn sync_for_device(&self) -> Result<(), SdkError<DmaSyncError>> {
        self.sync_range(0, self.size_bytes(), SyncFor::Device).await
    }

    /// Hands a part to the CPU (Linux `dma_sync_single_range_for_cpu`): `size_bytes` from `offset` in the mapping.
    pub async fn sync_range_for_cpu(
        &self,
        offset: u64,
        size_bytes: u64,
    ) -> Result<(), SdkError<DmaSyncError>> {
        self.sync_range(offset, size_bytes, SyncFor::Cpu).await
    }

    /// Hands a part back to the device (Linux `dma_sync_single_range_for_device`).
    pub async fn sync_range_for_device(
        &self,
        offset: u64,
        size_bytes: u64,
    ) -> Result<(), SdkError<DmaSyncError>> {
        self.sync_range(offset, size_bytes, SyncFor::Device).await
    }

    async fn sync_range(
        &self,
        offset: u64,
        size_bytes: u64,
        sync_for: SyncFor,
    ) -> Result<(), SdkError<DmaSyncError>> {
        // What leaves the mapping is for the server to refuse; what leaves the address space cannot be asked for.
        let wraps = InvalidRange::Wraps { space: "iova", base: self.iova().get(), size_bytes: offset };
        let base = self.iova().checked_add(offset).ok_or(wraps);
        let range = base.and_then(|base| IovaRange::new(base, size_bytes));
        let range = range.map_err(|invalid| SdkError::Refused(invalid.into()))?;
        sync(&self.driver, self.device, range, self.direction, sync_for).await
    }

    /// Unmaps (Linux `dma_unmap_single`), and ends the burst. In a strict or ring domain no DMA uses the translation any more when this is
    /// answered: not a cached one, not one in flight (I1); what other modes promise is said at
    /// [`Protection`](crate::Protection). The value is used up whatever comes; an error without an answer leaves the outcome unknown.
    /// Dropping the future before the answer is a leak.
    pub async fn unmap(self) -> Result<(), SdkError<DmaUnmapError>> {
        let attributes = self.attributes;
        self.unmap_with(UnmapOptions { attributes, end_of_burst: true }).await
    }

    /// Unmaps as one of several: in a ring domain the ring is not invalidated yet, so up to 2 stale translations of it remain until a later
    /// [`unmap`](Self::unmap) ends the burst.
    pub async fn unmap_within_burst(self) -> Result<(), SdkError<DmaUnmapError>> {
        let attributes = self.attributes;
        self.unmap_with(UnmapOptions { attributes, end_of_burst: false }).await
    }

    /// Unmaps with attributes (Linux `dma_unmap_single_attrs`).
    pub async fn unmap_with(mut self, options: UnmapOptions) -> Result<(), SdkError<DmaUnmapError>> {
        let UnmapOptions { attributes, end_of_burst } = options;
        let (device, range, direction) = (self.device, self.range, self.direction);
        let message = |header: RequestHeader| -> pb::DmaUnmapRequest {
            model::DmaUnmap { header, device, range, direction, attributes, end_of_burst }.into()
        };
        let call = |mut client: Client, request| async move { client.dma_unmap(request).await };
        let answer = self.driver.mutate(message, call).await;
        self.mapped = false;
        answer.map(drop)
    }

    /// Leaves the mapping to the session, without a leak report: it goes when the session is reclaimed.
    pub fn leave_mapped(mut self) -> Iova {
        self.mapped = false;
        self.iova()
    }
}

impl Drop for DmaMapping {
    fn drop(&mut self) {
        if self.mapped {
            self.driver.report_leak(LeakReport {
                device: self.device,
                iova: self.iova(),
                size_bytes: self.memory.size_bytes(),
                direction: self.direction,
            });
        }
    }
}

/// Memory that the CPU and a device share for long (Linux `dma_alloc_coherent`). It goes with
/// [`free`](Self::free) or with the session; dropping the value frees nothing and is no leak.
#[derive(Debug)]
pub struct Coherent {
    driver: Arc<DriverCore>,
    device: DeviceAddress,
    range: GpaRange,
    iova: Iova,
}

impl Coherent {
    pub(crate) fn new(driver: Arc<DriverCore>, device: DeviceAddress, range: GpaRange, iova: Iova) -> Self {
        Self { driver, device, range, iova }
    }

    /// For the device.
    pub fn iova(&self) -> Iova {
        self.iova
    }

    /// For the CPU.
    pub fn range(&self) -> GpaRange {
        self.range
    }

    /// Size in bytes: whole pages.
    pub fn size_bytes(&self) -> u64 {
        self.range.size_bytes()
    }

    /// The owner's memory, to read and write it; addresses are those of [`range`](Self::range).
    pub fn memory(&self) -> Memory {
        Memory::new(Arc::clone(&self.driver.core), None)
    }

    /// Unmaps and frees (Linux `dma_free_coherent`).
    pub async fn free(self) -> Result<(), SdkError<DmaUnmapError>> {
        let message = |header: RequestHeader| pb::FreeCoherentRequest {
            header: Some(header.into()),
            device: Some(self.device.into()),
            gpa: self.range.base().get(),
            iova: self.iova.get(),
        };
        let call = |mut client: Client, request| async move { client.free_coherent(request).await };
        self.driver.mutate(message, call).await.map(drop)
    }
}
