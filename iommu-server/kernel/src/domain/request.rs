//! What the DMA API is asked.

use iommu_types::{Direction, DmaAttributes, GpaRange, Iova, IovaRange, RequestId};

/// Microseconds since the UNIX epoch. This floor has no clock: whoever calls says what time it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Tick(pub u64);

impl Tick {
    /// How long after `earlier` this is, in microseconds; 0 when it is not.
    pub const fn since_us(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
    /// So many milliseconds later.
    pub const fn after_ms(self, ms: u32) -> Self {
        Self(self.0.saturating_add(ms as u64 * 1000))
    }
}

/// Which function of the DMA API makes or removes a mapping. One made by one is not removed by another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DmaFunction {
    /// `dma_map_single` and its kin.
    Single,
    /// `dma_map_sg`.
    ScatterGather,
    /// `dma_alloc_coherent`: shared with the device for long.
    Coherent,
}

impl DmaFunction {
    /// As errors name it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Single => "single",
            Self::ScatterGather => "scatter-gather",
            Self::Coherent => "coherent",
        }
    }
}

/// A buffer to map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaMap {
    /// The buffer, at any offset.
    pub range: GpaRange,
    /// Which way data flows.
    pub direction: Direction,
    /// The client's number for the request.
    pub request_id: RequestId,
    /// The function that maps.
    pub function: DmaFunction,
    /// What is special about it.
    pub attributes: DmaAttributes,
    /// Ring domains: the ring. Coherent memory has a ring of its own, whatever this says.
    pub ring: u16,
    /// Which of the client's threads asks: it has free addresses of its own at hand.
    pub client: u8,
}

impl DmaMap {
    /// As `dma_map_single` maps.
    pub fn single(range: GpaRange, direction: Direction, request_id: RequestId) -> Self {
        Self {
            range,
            direction,
            request_id,
            function: DmaFunction::Single,
            attributes: DmaAttributes::default(),
            ring: 0,
            client: 0,
        }
    }
    /// As `dma_alloc_coherent` maps.
    pub fn coherent(range: GpaRange, request_id: RequestId) -> Self {
        let function = DmaFunction::Coherent;
        Self { function, ..Self::single(range, Direction::Bidirectional, request_id) }
    }
}

/// A mapping to remove: exactly what was mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaUnmap {
    /// As `dma_map` returned it, with the size that was mapped.
    pub range: IovaRange,
    /// As it was mapped.
    pub direction: Direction,
    /// The client's number for the request.
    pub request_id: RequestId,
    /// The function that mapped.
    pub function: DmaFunction,
    /// What is special about it.
    pub attributes: DmaAttributes,
    /// Ring domains: whether the ring is invalidated now. In a batch, what the last operation says counts.
    pub end_of_burst: bool,
    /// Which of the client's threads asks.
    pub client: u8,
}

impl DmaUnmap {
    /// As `dma_unmap_single` unmaps, at the end of a burst.
    pub fn single(range: IovaRange, direction: Direction, request_id: RequestId) -> Self {
        Self {
            range,
            direction,
            request_id,
            function: DmaFunction::Single,
            attributes: DmaAttributes::default(),
            end_of_burst: true,
            client: 0,
        }
    }
}

/// A segment of a scatter-gather mapping, as the device is to see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First address.
    pub iova: Iova,
    /// Size in bytes.
    pub size_bytes: u64,
}
