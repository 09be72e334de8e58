//! `driver.proto`, the DMA API one call at a time: single mappings, scatter-gather, sync, limits. The pipelined stream is in `stream.rs`.

use iommu_types::errors::InvalidField;
use iommu_types::{
    Address, AddressRange, DeviceAddress, Direction, DmaAttributes, DmaLimits, Gpa, GpaRange, Iova,
    IovaRange, SyncFor,
};

use super::driver::{InvalidRequest, RequestHeader};
use super::{Field, choices, convert, messages, parse, wrong_at};
use crate::limits::BATCH_OPERATIONS_MAX;
use crate::pb;

choices! {
    SyncFor as SyncFor { Cpu, Device }
}

// Nothing on the wire for no attribute: mappings are the most frequent requests.
impl Field<Option<pb::DmaAttributes>> for DmaAttributes {
    fn parse(wire: Option<pb::DmaAttributes>) -> Result<Self, InvalidField> {
        let pb::DmaAttributes { skip_cpu_sync, resource } = wire.unwrap_or_default();
        Ok(Self { skip_cpu_sync, resource })
    }
    fn write(self) -> Option<pb::DmaAttributes> {
        let Self { skip_cpu_sync, resource } = self;
        (self != Self::NONE).then_some(pb::DmaAttributes { skip_cpu_sync, resource })
    }
}

/// Absent is true: whoever knows nothing of bursts ends one with every unmap.
pub(super) fn read_end_of_burst(wire: Option<bool>) -> bool {
    wire.unwrap_or(true)
}
pub(super) fn write_end_of_burst(end_of_burst: bool) -> Option<bool> {
    (!end_of_burst).then_some(false)
}

/// A mapping to make with the DMA API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaMap {
    /// Names the request.
    pub header: RequestHeader,
    /// For which device.
    pub device: DeviceAddress,
    /// The memory.
    pub range: GpaRange,
    /// Which way data flows.
    pub direction: Direction,
    /// What else is said of it.
    pub attributes: DmaAttributes,
    /// In a ring domain the ring; else 0.
    pub ring: u16,
}

impl TryFrom<pb::DmaMapRequest> for DmaMap {
    type Error = InvalidRequest;
    fn try_from(wire: pb::DmaMapRequest) -> Result<Self, InvalidRequest> {
        Ok(Self {
            header: parse("header", wire.header)?,
            device: parse("device", wire.device)?,
            range: GpaRange::new(Gpa::new(wire.gpa), wire.size_bytes)?,
            direction: parse("direction", wire.direction)?,
            attributes: parse("attributes", wire.attributes)?,
            ring: parse("ring", wire.ring)?,
        })
    }
}
impl From<DmaMap> for pb::DmaMapRequest {
    fn from(map: DmaMap) -> Self {
        Self {
            header: map.header.write(),
            device: map.device.write(),
            gpa: map.range.base().get(),
            size_bytes: map.range.size_bytes(),
            direction: map.direction.write(),
            attributes: map.attributes.write(),
            ring: map.ring.write(),
        }
    }
}

/// A mapping to remove with the DMA API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaUnmap {
    /// Names the request.
    pub header: RequestHeader,
    /// For which device.
    pub device: DeviceAddress,
    /// The mapping, whole.
    pub range: IovaRange,
    /// As it was mapped.
    pub direction: Direction,
    /// What else is said of it.
    pub attributes: DmaAttributes,
    /// Whether the burst of unmaps ends here.
    pub end_of_burst: bool,
}

impl TryFrom<pb::DmaUnmapRequest> for DmaUnmap {
    type Error = InvalidRequest;
    fn try_from(wire: pb::DmaUnmapRequest) -> Result<Self, InvalidRequest> {
        Ok(Self {
            header: parse("header", wire.header)?,
            device: parse("device", wire.device)?,
            range: IovaRange::new(Iova::new(wire.iova), wire.size_bytes)?,
            direction: parse("direction", wire.direction)?,
            attributes: parse("attributes", wire.attributes)?,
            end_of_burst: read_end_of_burst(wire.end_of_burst),
        })
    }
}
impl From<DmaUnmap> for pb::DmaUnmapRequest {
    fn from(unmap: DmaUnmap) -> Self {
        Self {
            header: unmap.header.write(),
            device: unmap.device.write(),
            iova: unmap.range.base().get(),
            size_bytes: unmap.range.size_bytes(),
            direction: unmap.direction.write(),
            attributes: unmap.attributes.write(),
            end_of_burst: write_end_of_burst(unmap.end_of_burst),
        }
    }
}

/// Two columns of equal length as ranges: at least one, and no more than a batch has.
fn ranges<A: Address>(
    base: &str,
    bases: &[u64],
    sizes: &[u64],
) -> Result<Vec<AddressRange<A>>, InvalidRequest> {
    if bases.is_empty() || bases.len() > BATCH_OPERATIONS_MAX as usize {
        let why = format!("has {} elements; 1 to {BATCH_OPERATIONS_MAX} can be", bases.len());
        return Err(wrong_at(base, why).into());
    }
    if sizes.len() != bases.len() {
        let why = format!("has {} elements; needs one for each of {} in {base}", sizes.len(), bases.len());
        return Err(wrong_at("size_bytes", why).into());
    }
    let range = |(base, size_bytes): (&u64, &u64)| Ok(AddressRange::new(A::from_u64(*base), *size_bytes)?);
    bases.iter().zip(sizes).map(range).collect()
}

/// The columns of these ranges.
fn columns<A: Address>(ranges: &[AddressRange<A>]) -> (Vec<u64>, Vec<u64>) {
    ranges.iter().map(|range| (range.base().as_u64(), range.size_bytes())).unzip()
}

/// Pieces of memory to map in one call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DmaMapSg {
    /// Names the request.
    pub header: RequestHeader,
    /// For which device.
    pub device: DeviceAddress,
    /// The pieces, in order: 1 to [`BATCH_OPERATIONS_MAX`].
    pub pieces: Vec<GpaRange>,
    /// Which way data flows.
    pub direction: Direction,
    /// What else is said of them.
    pub attributes: DmaAttributes,
    /// In a ring domain the ring; else 0.
    pub ring: u16,
}

impl TryFrom<pb::DmaMapSgRequest> for DmaMapSg {
    type Error = InvalidRequest;
    fn try_from(wire: pb::DmaMapSgRequest) -> Result<Self, InvalidRequest> {
        Ok(Self {
            header: parse("header", wire.header)?,
            device: parse("device", wire.device)?,
            pieces: ranges("gpa", &wire.gpa, &wire.size_bytes)?,
            direction: parse("direction", wire.direction)?,
            attributes: parse("attributes", wire.attributes)?,
            ring: parse("ring", wire.ring)?,
        })
    }
}
impl From<DmaMapSg> for pb::DmaMapSgRequest {
    fn from(map: DmaMapSg) -> Self {
        let (gpa, size_bytes) = columns(&map.pieces);
        Self {
            header: map.header.write(),
            device: map.device.write(),
            gpa,
            size_bytes,
            direction: map.direction.write(),
            attributes: map.attributes.write(),
            ring: map.ring.write(),
        }
    }
}

/// Pieces of memory as the device is to see them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DmaSegments {
    /// In order; at least one, and at most as many as there were pieces.
    pub segments: Vec<IovaRange>,
}

impl TryFrom<pb::DmaMapSgResponse> for DmaSegments {
    type Error = InvalidRequest;
    fn try_from(wire: pb::DmaMapSgResponse) -> Result<Self, InvalidRequest> {
        Ok(Self { segments: ranges("iova", &wire.iova, &wire.size_bytes)? })
    }
}
impl From<DmaSegments> for pb::DmaMapSgResponse {
    fn from(DmaSegments { segments }: DmaSegments) -> Self {
        let (iova, size_bytes) = columns(&segments);
        Self { iova, size_bytes }
    }
}

fn check_elements(unmap: &DmaUnmapSg) -> Result<(), InvalidField> {
    if (1..=BATCH_OPERATIONS_MAX).contains(&unmap.elements) {
        return Ok(());
    }
    let why = format!("{} is not a number of pieces; 1 to {BATCH_OPERATIONS_MAX} can be", unmap.elements);
    Err(wrong_at("elements", why))
}

/// What a [`DmaMapSg`] mapped, to unmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaUnmapSg {
    /// Names the request.
    pub header: RequestHeader,
    /// For which device.
    pub device: DeviceAddress,
    /// First address of the first segment.
    pub iova: Iova,
    /// How many pieces were mapped; not how many segments there are.
    pub elements: u32,
    /// As it was mapped.
    pub direction: Direction,
    /// What else is said of it.
    pub attributes: DmaAttributes,
    /// Whether the burst of unmaps ends here.
    pub end_of_burst: bool,
}

impl TryFrom<pb::DmaUnmapSgRequest> for DmaUnmapSg {
    type Error = InvalidField;
    fn try_from(wire: pb::DmaUnmapSgRequest) -> Result<Self, InvalidField> {
        let unmap = Self {
            header: parse("header", wire.header)?,
            device: parse("device", wire.device)?,
            iova: parse("iova", wire.iova)?,
            elements: wire.elements,
            direction: parse("direction", wire.direction)?,
            attributes: parse("attributes", wire.attributes)?,
            end_of_burst: read_end_of_burst(wire.end_of_burst),
        };
        check_elements(&unmap)?;
        Ok(unmap)
    }
}
impl From<DmaUnmapSg> for pb::DmaUnmapSgRequest {
    fn from(unmap: DmaUnmapSg) -> Self {
        Self {
            header: unmap.header.write(),
            device: unmap.device.write(),
            iova: unmap.iova.write(),
            elements: unmap.elements,
            direction: unmap.direction.write(),
            attributes: unmap.attributes.write(),
            end_of_burst: write_end_of_burst(unmap.end_of_burst),
        }
    }
}

/// A mapping, or a part of it, to hand over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaSync {
    /// Names the request.
    pub header: RequestHeader,
    /// For which device.
    pub device: DeviceAddress,
    /// Which bytes.
    pub range: IovaRange,
    /// As it was mapped.
    pub direction: Direction,
    /// To whom.
    pub sync_for: SyncFor,
}

impl TryFrom<pb::DmaSyncRequest> for DmaSync {
    type Error = InvalidRequest;
    fn try_from(wire: pb::DmaSyncRequest) -> Result<Self, InvalidRequest> {
        Ok(Self {
            header: parse("header", wire.header)?,
            device: parse("device", wire.device)?,
            range: IovaRange::new(Iova::new(wire.iova), wire.size_bytes)?,
            direction: parse("direction", wire.direction)?,
            sync_for: parse("sync_for", wire.sync_for)?,
        })
    }
}
impl From<DmaSync> for pb::DmaSyncRequest {
    fn from(sync: DmaSync) -> Self {
        Self {
            header: sync.header.write(),
            device: sync.device.write(),
            iova: sync.range.base().get(),
            size_bytes: sync.range.size_bytes(),
            direction: sync.direction.write(),
            sync_for: sync.sync_for.write(),
        }
    }
}

impl SetDmaLimits {
    /// The limits that are in force after this change of `limits`.
    pub fn applied_to(&self, limits: DmaLimits) -> DmaLimits {
        DmaLimits {
            mask_bits: self.mask_bits.unwrap_or(limits.mask_bits),
            segment_bytes_max: self.segment_bytes_max.unwrap_or(limits.segment_bytes_max),
            segment_boundary_mask: self.segment_boundary_mask.unwrap_or(limits.segment_boundary_mask),
        }
    }
    fn check(&self) -> Result<(), InvalidField> {
        self.applied_to(DmaLimits::NONE).check()
    }
}

messages! {
    /// What is to change of a device's limits; `None` leaves one as it is.
    #[derive(Copy)]
    SetDmaLimits as SetDmaLimitsRequest {
        /// Names the request.
        header: RequestHeader,
        /// Which device.
        device: DeviceAddress,
        /// Address bits that the device has.
        mask_bits: Option<u8>,
        /// Longest segment.
        segment_bytes_max: Option<u64>,
        /// No segment crosses a multiple of this plus 1.
        segment_boundary_mask: Option<u64>,
    } check SetDmaLimits::check;
}

convert!(DmaLimits as SetDmaLimitsResponse {
    mask_bits, segment_bytes_max, segment_boundary_mask
} check DmaLimits::check);
