//! The DMA API of a driver, as Linux has it: single mappings, pages, resources, scatter-gather, coherent memory, streams.
//!
//! A plain call does what most drivers want; what a few of them say beside range and direction is in [`MapOptions`] and [`UnmapOptions`].

use std::sync::Arc;

use iommu_proto::model::{self, RequestHeader};
use iommu_proto::pb;
use iommu_types::errors::{DmaMapError, LimitReached};
use iommu_types::{
    Address, AddressRange, Direction, DmaAttributes, Gpa, GpaRange, InvalidRange, Iova, IovaRange,
};

use crate::convert::bad_answer;
use crate::{Coherent, DeviceHandle, DmaMapping, DmaSgMapping, DmaStream, Driver, SdkError, TransportError};

/// What is said of a mapping beside range and direction. The default is no attribute and ring 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MapOptions {
    /// Attributes, as Linux names them.
    pub attributes: DmaAttributes,
    /// In a ring domain the ring, 0 to its count less 1; else 0.
    pub ring: u16,
}

impl MapOptions {
    /// Without attributes, on `ring` of a ring domain.
    pub const fn on_ring(ring: u16) -> Self {
        Self { attributes: DmaAttributes::NONE, ring }
    }
}

/// What is said of an unmap beside the mapping. The default is no attribute and the end of the burst.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnmapOptions {
    /// Attributes as given to the map, but for `skip_cpu_sync`, which is chosen for each of the two.
    pub attributes: DmaAttributes,
    /// Whether a burst of unmaps ends here. In a ring domain the ring is then invalidated; without, up to 2 stale translations of each ring
    /// remain until a later unmap ends the burst. It means nothing in other modes.
    pub end_of_burst: bool,
}

impl Default for UnmapOptions {
    fn default() -> Self {
        Self { attributes: DmaAttributes::NONE, end_of_burst: true }
    }
}

impl UnmapOptions {
    /// Without attributes, and the burst goes on.
    pub const WITHIN_BURST: Self = Self { attributes: DmaAttributes::NONE, end_of_burst: false };
}

fn total_bytes<A: Address>(ranges: &[AddressRange<A>]) -> u128 {
    ranges.iter().map(|range| u128::from(range.size_bytes())).sum()
}

impl Driver {
    /// Maps memory for one DMA (Linux `dma_map_single`): any offset and size. The server chooses the address
    /// and returns it; it has the offset of `memory` in its page (in a ring domain it has none). What Linux tells by
    /// [`DMA_MAPPING_ERROR`](crate::DMA_MAPPING_ERROR) is `Err` here.
    pub async fn dma_map_single(
        &self,
        device: &DeviceHandle,
        memory: GpaRange,
        direction: Direction,
    ) -> Result<DmaMapping, SdkError<DmaMapError>> {
        self.dma_map(device, memory, direction, MapOptions::default()).await
    }

    /// The same with attributes and ring (Linux `dma_map_single_attrs`).
    pub async fn dma_map(
        &self,
        device: &DeviceHandle,
        memory: GpaRange,
        direction: Direction,
        options: MapOptions,
    ) -> Result<DmaMapping, SdkError<DmaMapError>> {
        let MapOptions { attributes, ring } = options;
        let (range, device) = (memory, device.address());
        let message = |header: RequestHeader| -> pb::DmaMapRequest {
            model::DmaMap { header, device, range, direction, attributes, ring }.into()
        };
        let answer = self
            .inner
            .mutate(message, |mut client, request| async move { client.dma_map(request).await })
            .await?;
        let range = IovaRange::new(Iova::new(answer.iova), memory.size_bytes()).map_err(bad_answer)?;
        Ok(DmaMapping::new(Arc::clone(&self.inner), device, range, memory, direction, attributes))
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
        let wraps = InvalidRange::Wraps { space: "gpa", base: page.get(), size_bytes };
        let range = base.ok_or(wraps).and_then(|base| GpaRange::new(base, size_bytes));
        let range = range.map_err(|invalid| SdkError::Refused(invalid.into()))?;
        self.dma_map_single(device, range, direction).await
    }

    /// Maps memory of a device, such as its registers, for another one (Linux `dma_map_resource`): never copied and never
    /// synced.
    pub async fn dma_map_resource(
        &self,
        device: &DeviceHandle,
        memory: GpaRange,
        direction: Direction,
    ) -> Result<DmaMapping, SdkError<DmaMapError>> {
        let options = MapOptions { attributes: DmaAttributes::RESOURCE, ring: 0 };
        self.dma_map(device, memory, direction, options).await
    }

    /// Maps several pieces of memory in one call, all or none (Linux `dma_map_sg`). Pieces that are adjacent for the device are
    /// merged within its limits, so the device sees at most as many segments as there are pieces.
    pub async fn dma_map_sg(
        &self,
        device: &DeviceHandle,
        pieces: &[GpaRange],
        direction: Direction,
    ) -> Result<DmaSgMapping, SdkError<DmaMapError>> {
        self.dma_map_sg_with(device, pieces, direction, MapOptions::default()).await
    }

    /// The same with attributes and ring (Linux `dma_map_sg_attrs`).
    pub async fn dma_map_sg_with(
        &self,
        device: &DeviceHandle,
        pieces: &[GpaRange],
        direction: Direction,
        options: MapOptions,
    ) -> Result<DmaSgMapping, SdkError<DmaMapError>> {
        let allowed = u64::from(self.limits().batch_operations_max);
        if pieces.len() as u64 > allowed {
            let limit = LimitReached { limit: "batch_operations_max".to_owned(), allowed };
            return Err(SdkError::Refused(limit.into()));
        }
        let MapOptions { attributes, ring } = options;
        let device = device.address();
        let message = |header: RequestHeader| -> pb::DmaMapSgRequest {
            let pieces = pieces.to_vec();
            model::DmaMapSg { header, device, pieces, direction, attributes, ring }.into()
        };
        let answer = self
            .inner
            .mutate(message, |mut client, request| async move { client.dma_map_sg(request).await })
            .await?;
        let model::DmaSegments { segments } = answer.try_into().map_err(bad_answer)?;
        let (given, mapped) = (total_bytes(pieces), total_bytes(&segments));
        if segments.len() > pieces.len() || mapped != given {
            let (count, pieces) = (segments.len(), pieces.len());
            let why = format!("{count} segments of {mapped} bytes for {pieces} pieces of {given} bytes");
            return Err(TransportError::BadAnswer(why).into());
        }
        let driver = Arc::clone(&self.inner);
        Ok(DmaSgMapping::new(driver, device, pieces.to_vec(), segments, direction, attributes))
    }

    /// Allocates memory that CPU and device share for long (Linux `dma_alloc_coherent`), such as a descriptor
    /// ring.
    ///
    /// The server allocates it, so a virtual machine, which has memory of its own, is refused
    /// ([`NotAHostDriver`](crate::errors::NotAHostDriver)): it takes blocks of a [`DmaPool`](crate::DmaPool), or maps a buffer for long.
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
}
