//! `driver.proto`, the pipelined stream: batches of maps and unmaps in columns, and their answers.
//!
//! A batch whose columns do not add up is refused whole; an operation that fails by itself is an error in the answer, and the
//! others are done.

use std::collections::HashMap;

use iommu_types::errors::{DmaMapError, DmaUnmapError, InvalidField, LimitReached};
use iommu_types::{
    Address, AddressRange, DeviceAddress, Direction, DmaAttributes, Gpa, InvalidRange, Iova, RequestId,
};

use super::dma_api::{read_end_of_burst, write_end_of_burst};
use super::driver::RequestHeader;
use super::{Field, absent, parse, within, wrong_at};
use crate::errors::{WireError, bounded};
use crate::pb;

/// What the address of a mapping that failed is on the wire (Linux `DMA_MAPPING_ERROR`).
pub const DMA_MAPPING_ERROR: u64 = u64::MAX;

/// Ranges of one batch, with one direction and the same attributes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RangeBatch<A> {
    bases: Vec<u64>,
    sizes: Vec<u32>,
    /// Which way data flows, for all.
    pub direction: Direction,
    /// What else is said of all.
    pub attributes: DmaAttributes,
    space: std::marker::PhantomData<A>,
}

impl<A: Address> RangeBatch<A> {
    fn from_columns(
        base: &str,
        bases: Vec<u64>,
        sizes: Vec<u32>,
        direction: i32,
        attributes: Option<pb::DmaAttributes>,
    ) -> Result<Self, InvalidField> {
        if sizes.len() != bases.len() && sizes.len() != 1 {
            let why = format!(
                "has {} elements; needs one for each of {} in {base}, or one",
                sizes.len(),
                bases.len()
            );
            return Err(wrong_at("size_bytes", why));
        }
        let direction = parse("direction", direction)?;
        let attributes = parse("attributes", attributes)?;
        Ok(Self { bases, sizes, direction, attributes, space: std::marker::PhantomData })
    }
    /// A batch of these ranges without attributes; `None` when one has more bytes than a batch can say (2^32 - 1).
    pub fn new(ranges: &[AddressRange<A>], direction: Direction) -> Option<Self> {
        let bases = ranges.iter().map(|range| range.base().as_u64()).collect();
        let sizes =
            ranges.iter().map(|range| u32::try_from(range.size_bytes()).ok()).collect::<Option<_>>()?;
        let attributes = DmaAttributes::NONE;
        Some(Self { bases, sizes, direction, attributes, space: std::marker::PhantomData })
    }
    /// How many operations there are.
    pub fn len(&self) -> usize {
        self.bases.len()
    }
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.bases.is_empty()
    }
    /// The range of each operation, in order; one that is no range fails alone.
    pub fn ranges(&self) -> impl ExactSizeIterator<Item = Result<AddressRange<A>, InvalidRange>> + '_ {
        let shared = if self.sizes.len() == self.bases.len() { None } else { self.sizes.first().copied() };
        self.bases.iter().enumerate().map(move |(index, base)| {
            let size_bytes = shared.or_else(|| self.sizes.get(index).copied()).unwrap_or(0);
            AddressRange::new(A::from_u64(*base), u64::from(size_bytes))
        })
    }
}

/// What a message of the stream asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DmaStreamBatch {
    /// Mappings to make.
    Map {
        /// The memory.
        batch: RangeBatch<Gpa>,
        /// In a ring domain the ring of all; else 0.
        ring: u16,
    },
    /// Mappings to remove.
    Unmap {
        /// The mappings, each whole.
        batch: RangeBatch<Iova>,
        /// Whether the burst of unmaps ends with the last of them; it never ends before.
        end_of_burst: bool,
    },
}

/// A message of the stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DmaStreamRequest {
    /// Names the batch.
    pub header: RequestHeader,
    /// For which device.
    pub device: DeviceAddress,
    /// What is asked.
    pub batch: DmaStreamBatch,
}

/// Why a message of the stream is refused whole.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidBatch {
    /// A field does not parse.
    #[error(transparent)]
    InvalidField(#[from] InvalidField),
    /// It has too many operations.
    #[error(transparent)]
    LimitReached(#[from] LimitReached),
}

/// A batch and how many operations it has.
fn map_batch(wire: pb::DmaMapBatch) -> Result<(DmaStreamBatch, usize), InvalidField> {
    let pb::DmaMapBatch { gpa, size_bytes, direction, attributes, ring } = wire;
    let batch = RangeBatch::from_columns("gpa", gpa, size_bytes, direction, attributes)?;
    let operations = batch.len();
    Ok((DmaStreamBatch::Map { batch, ring: parse("ring", ring)? }, operations))
}

/// A batch and how many operations it has.
fn unmap_batch(wire: pb::DmaUnmapBatch) -> Result<(DmaStreamBatch, usize), InvalidField> {
    let pb::DmaUnmapBatch { iova, size_bytes, direction, attributes, end_of_burst } = wire;
    let batch = RangeBatch::from_columns("iova", iova, size_bytes, direction, attributes)?;
    let operations = batch.len();
    Ok((DmaStreamBatch::Unmap { batch, end_of_burst: read_end_of_burst(end_of_burst) }, operations))
}

impl DmaStreamRequest {
    /// Parses a message that may have at most so many operations.
    pub fn parse(wire: pb::DmaStreamRequest, operations_max: u32) -> Result<Self, InvalidBatch> {
        use pb::dma_stream_request::Batch;
        let header = parse("header", wire.header)?;
        let device = parse("device", wire.device)?;
        let (batch, operations) = match wire.batch.ok_or_else(|| within("batch", absent()))? {
            Batch::Map(wire) => map_batch(wire).map_err(|error| within("map", error))?,
            Batch::Unmap(wire) => unmap_batch(wire).map_err(|error| within("unmap", error))?,
        };
        if operations > operations_max as usize {
            let limit = "batch_operations_max".to_owned();
            return Err(LimitReached { limit, allowed: u64::from(operations_max) }.into());
        }
        Ok(Self { header, device, batch })
    }
}

impl From<DmaStreamRequest> for pb::DmaStreamRequest {
    fn from(DmaStreamRequest { header, device, batch }: DmaStreamRequest) -> Self {
        use pb::dma_stream_request::Batch;
        let batch = match batch {
            DmaStreamBatch::Map { batch, ring } => Batch::Map(pb::DmaMapBatch {
                gpa: batch.bases,
                size_bytes: batch.sizes,
                direction: batch.direction.write(),
                attributes: batch.attributes.write(),
                ring: ring.write(),
            }),
            DmaStreamBatch::Unmap { batch, end_of_burst } => Batch::Unmap(pb::DmaUnmapBatch {
                iova: batch.bases,
                size_bytes: batch.sizes,
                direction: batch.direction.write(),
                attributes: batch.attributes.write(),
                end_of_burst: write_end_of_burst(end_of_burst),
            }),
        };
        Self { header: Some(header.into()), device: Some(device.into()), batch: Some(batch) }
    }
}

/// One operation's error as the stream carries it.
pub fn operation_error(index: u32, error: &impl WireError) -> pb::OperationError {
    pb::OperationError {
        index,
        reason: error.reason().to_owned(),
        metadata: error.metadata(),
        message: bounded(&error.to_string()),
    }
}

/// The answer to a batch of maps.
pub fn map_response(
    request_id: RequestId,
    outcomes: impl IntoIterator<Item = Result<Iova, DmaMapError>>,
) -> pb::DmaStreamResponse {
    let mut response = pb::DmaStreamResponse { request_id: request_id.0, ..Default::default() };
    for (index, outcome) in (0..).zip(outcomes) {
        match outcome {
            Ok(iova) => response.iova.push(iova.get()),
            Err(error) => {
                response.iova.push(DMA_MAPPING_ERROR);
                response.errors.push(operation_error(index, &error));
            }
        }
    }
    response
}

/// The answer to a batch of unmaps.
pub fn unmap_response(
    request_id: RequestId,
    outcomes: impl IntoIterator<Item = Result<(), DmaUnmapError>>,
) -> pb::DmaStreamResponse {
    let failed = (0..).zip(outcomes).filter_map(|(index, outcome)| Some((index, outcome.err()?)));
    let errors = failed.map(|(index, error)| operation_error(index, &error)).collect();
    pb::DmaStreamResponse { request_id: request_id.0, iova: Vec::new(), errors }
}

/// Reads the errors of an answer to `operations` operations, by index.
fn errors<E: WireError>(
    wire: Vec<pb::OperationError>,
    operations: usize,
) -> Result<HashMap<usize, E>, InvalidField> {
    let mut errors = HashMap::with_capacity(wire.len());
    for (place, error) in wire.into_iter().enumerate() {
        let at = |field: &str, why: String| wrong_at(&format!("errors[{place}].{field}"), why);
        let typed = E::from_reason(&error.reason, &error.metadata).ok_or_else(|| {
            at("reason", format!("{:?} is not a reason of this operation, or lacks facts", error.reason))
        })?;
        let index = error.index as usize;
        if index >= operations || errors.insert(index, typed).is_some() {
            return Err(at("index", format!("{index} is not an operation of the batch, or named twice")));
        }
    }
    Ok(errors)
}

/// How each of `operations` maps ended.
pub fn map_outcomes(
    wire: pb::DmaStreamResponse,
    operations: usize,
) -> Result<Vec<Result<Iova, DmaMapError>>, InvalidField> {
    if wire.iova.len() != operations {
        let why = format!("has {} elements; {operations} mappings were asked for", wire.iova.len());
        return Err(wrong_at("iova", why));
    }
    let mut errors = errors(wire.errors, operations)?;
    let outcome = |(index, iova): (usize, u64)| match (errors.remove(&index), iova) {
        (Some(error), _) => Ok(Err(error)),
        (None, DMA_MAPPING_ERROR) => {
            Err(wrong_at("errors", format!("no error says why mapping {index} failed")))
        }
        (None, iova) => Ok(Ok(Iova::new(iova))),
    };
    wire.iova.into_iter().enumerate().map(outcome).collect()
}

/// How each of `operations` unmaps ended.
pub fn unmap_outcomes(
    wire: pb::DmaStreamResponse,
    operations: usize,
) -> Result<Vec<Result<(), DmaUnmapError>>, InvalidField> {
    let mut errors = errors(wire.errors, operations)?;
    Ok((0..operations).map(|index| errors.remove(&index).map_or(Ok(()), Err)).collect())
}
