//! Scatter-gather mappings: several pieces of memory that are mapped and unmapped as one.

use std::sync::Arc;

use iommu_proto::model::{self, RequestHeader};
use iommu_proto::pb;
use iommu_types::errors::{DmaSyncError, DmaUnmapError};
use iommu_types::{DeviceAddress, Direction, DmaAttributes, GpaRange, Iova, IovaRange, SyncFor};

use crate::dma_stream::Client;
use crate::driver::DriverCore;
use crate::mapping::sync;
use crate::{LeakReport, SdkError, UnmapOptions};

/// Pieces of memory mapped for a device (Linux `struct scatterlist`, mapped). Like a [`DmaMapping`](crate::DmaMapping) it is used up by
/// [`unmap`](Self::unmap), and a leak when it is dropped instead.
#[derive(Debug)]
#[must_use = "a mapping that is dropped without unmap is a leak: the device can still use it"]
pub struct DmaSgMapping {
    driver: Arc<DriverCore>,
    device: DeviceAddress,
    pieces: Vec<GpaRange>,
    /// As many as pieces at most, and at least one.
    segments: Vec<IovaRange>,
    direction: Direction,
    attributes: DmaAttributes,
    mapped: bool,
}

impl DmaSgMapping {
    pub(crate) fn new(
        driver: Arc<DriverCore>,
        device: DeviceAddress,
        pieces: Vec<GpaRange>,
        segments: Vec<IovaRange>,
        direction: Direction,
        attributes: DmaAttributes,
    ) -> Self {
        Self { driver, device, pieces, segments, direction, attributes, mapped: true }
    }

    /// The addresses to give to the device, in the order of the pieces (Linux `sg_dma_address` and `sg_dma_len`).
    pub fn segments(&self) -> &[IovaRange] {
        &self.segments
    }

    /// The memory behind them, as it was given.
    pub fn pieces(&self) -> &[GpaRange] {
        &self.pieces
    }

    /// Size of all of them in bytes.
    pub fn size_bytes(&self) -> u64 {
        // Segments of one space may overlap where pieces do, and then have more bytes than a space.
        self.segments.iter().fold(0, |sum, segment| sum.saturating_add(segment.size_bytes()))
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

    /// Hands all of the memory to the CPU while it stays mapped (Linux `dma_sync_sg_for_cpu`). One call per segment: an error leaves those
    /// before it handed over.
    pub async fn sync_for_cpu(&self) -> Result<(), SdkError<DmaSyncError>> {
        self.sync_each(SyncFor::Cpu).await
    }

    /// Hands all of the memory back to the device (Linux `dma_sync_sg_for_device`).
    pub async fn sync_for_device(&self) -> Result<(), SdkError<DmaSyncError>> {
        self.sync_each(SyncFor::Device).await
    }

    async fn sync_each(&self, sync_for: SyncFor) -> Result<(), SdkError<DmaSyncError>> {
        for segment in &self.segments {
            sync(&self.driver, self.device, *segment, self.direction, sync_for).await?;
        }
        Ok(())
    }

    /// Unmaps all segments (Linux `dma_unmap_sg`), and ends the burst. What the answer promises is as with
    /// [`DmaMapping::unmap`](crate::DmaMapping::unmap).
    pub async fn unmap(self) -> Result<(), SdkError<DmaUnmapError>> {
        let attributes = self.attributes;
        self.unmap_with(UnmapOptions { attributes, end_of_burst: true }).await
    }

    /// Unmaps as one of several, as [`DmaMapping::unmap_within_burst`](crate::DmaMapping::unmap_within_burst).
    pub async fn unmap_within_burst(self) -> Result<(), SdkError<DmaUnmapError>> {
        let attributes = self.attributes;
        self.unmap_with(UnmapOptions { attributes, end_of_burst: false }).await
    }

    /// Unmaps with attributes (Linux `dma_unmap_sg_attrs`).
    pub async fn unmap_with(mut self, options: UnmapOptions) -> Result<(), SdkError<DmaUnmapError>> {
        let UnmapOptions { attributes, end_of_burst } = options;
        let (device, iova, direction) = (self.device, self.first(), self.direction);
        let elements = u32::try_from(self.pieces.len()).expect("a session takes fewer pieces in one call");
        let message = |header: RequestHeader| -> pb::DmaUnmapSgRequest {
            model::DmaUnmapSg { header, device, iova, elements, direction, attributes, end_of_burst }.into()
        };
        let call = |mut client: Client, request| async move { client.dma_unmap_sg(request).await };
        let answer = self.driver.mutate(message, call).await;
        self.mapped = false;
        answer.map(drop)
    }

    /// Leaves the mapping to the session, without a leak report: it goes when the session is reclaimed.
    pub fn leave_mapped(mut self) -> Vec<IovaRange> {
        self.mapped = false;
        std::mem::take(&mut self.segments)
    }

    fn first(&self) -> Iova {
        self.segments.first().expect("an answer with no segment does not parse").base()
    }
}

impl Drop for DmaSgMapping {
    fn drop(&mut self) {
        if self.mapped {
            self.driver.report_leak(LeakReport {
                device: self.device,
                iova: self.first(),
                size_bytes: self.size_bytes(),
                direction: self.direction,
            });
        }
    }
}
