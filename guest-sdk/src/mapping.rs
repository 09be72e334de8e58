//! Mappings of the DMA API: values that are used up by unmapping.

use std::sync::Arc;

use iommu_proto::model::RequestHeader;
use iommu_proto::pb;
use iommu_types::errors::DmaUnmapError;
use iommu_types::{DeviceAddress, Direction, GpaRange, Iova};

use crate::dma_stream::{Client, wire_direction};
use crate::driver::DriverCore;
use crate::{LeakReport, Memory, SdkError};

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
    iova: Iova,
    memory: GpaRange,
    direction: Direction,
    mapped: bool,
}

impl DmaMapping {
    pub(crate) fn new(
        driver: Arc<DriverCore>,
        device: DeviceAddress,
        iova: Iova,
        memory: GpaRange,
        direction: Direction,
    ) -> Self {
        Self { driver, device, iova, memory, direction, mapped: true }
    }

    /// The address to give to the device.
    pub fn iova(&self) -> Iova {
        self.iova
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

    /// Unmaps (Linux `dma_unmap_single`). When this is answered, no DMA uses the translation any more: not a cached one, not one
    /// in flight (I1). The value is used up whatever comes; an error without an answer leaves the outcome unknown. Dropping the future
    /// before the answer is a leak.
    pub async fn unmap(mut self) -> Result<(), SdkError<DmaUnmapError>> {
        let message = |header: RequestHeader| pb::DmaUnmapRequest {
            header: Some(header.into()),
            device: Some(self.device.into()),
            iova: self.iova.get(),
            size_bytes: self.memory.size_bytes(),
            direction: wire_direction(self.direction),
        };
        let call = |mut client: Client, request| async move { client.dma_unmap(request).await };
        let answer = self.driver.mutate(message, call).await;
        self.mapped = false;
        answer.map(drop)
    }

    /// Leaves the mapping to the session, without a leak report: it goes when the session is reclaimed.
    pub fn leave_mapped(mut self) -> Iova {
        self.mapped = false;
        self.iova
    }
}

impl Drop for DmaMapping {
    fn drop(&mut self) {
        if self.mapped {
            self.driver.report_leak(LeakReport {
                device: self.device,
                iova: self.iova,
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
