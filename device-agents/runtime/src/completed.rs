//! The answer to a batch: checked once against the batch it belongs to, then read without allocation.

use bytes::Bytes;
use iommu_proto::dma::reason_from_code;
use iommu_proto::pb;
use iommu_types::{DmaFault, Iova};

use crate::batch::{Column, Kind};

/// What is kept of a batch while it is in flight.
#[derive(Debug)]
pub(crate) struct Shape {
    pub(crate) count: usize,
    pub(crate) size_bytes: Column<u32>,
    pub(crate) kind: Column<Kind>,
    pub(crate) returned_bytes: u64,
}

impl Shape {
    fn kind(&self, index: usize) -> Kind {
        self.kind.get(index).expect("a batch has a kind for each of its operations")
    }

    fn size_bytes(&self, index: usize) -> u32 {
        self.size_bytes.get(index).expect("a batch has a size for each of its operations")
    }

    /// Bytes in the payload of the answer that belong to operation `index`.
    fn returned(&self, index: usize, fault: Option<&DmaFault>) -> usize {
        match (self.kind(index), fault) {
            (Kind::Write | Kind::PostedWrite, _) => 0,
            (Kind::Read, Some(fault)) => fault.done_bytes as usize,
            (Kind::FetchAdd | Kind::Swap | Kind::Cas, Some(_)) => 0,
            (_, None) => self.size_bytes(index) as usize,
        }
    }
}

/// How one operation of a batch ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OperationResult<'a> {
    /// What was read, or the old value of an atomic; of a refused read the bytes done before, of a write
    /// nothing.
    pub bytes: &'a [u8],
    /// Why and where it ended early; `None` for success.
    pub fault: Option<DmaFault>,
}

/// How the operations of a batch ended, in the order in which they were added.
#[derive(Debug)]
pub struct Completed {
    shape: Shape,
    payload: Bytes,
    faults: Vec<(u32, DmaFault)>,
}

impl Completed {
    /// Checks an answer against its batch. `Err` says which rule the server broke.
    pub(crate) fn check(shape: Shape, answer: pb::DmaCompletions) -> Result<Self, String> {
        let count = answer.fault_index.len();
        let columns = [answer.fault_reason.len(), answer.fault_iova.len(), answer.fault_done_bytes.len()];
        if count > shape.count || columns.iter().any(|&length| length != count) {
            return Err(format!("fault columns of {count} and {columns:?} elements for {}", shape.count));
        }
        let mut expected = shape.returned_bytes;
        let mut faults = Vec::with_capacity(count);
        let columns = answer.fault_reason.iter().zip(&answer.fault_iova).zip(&answer.fault_done_bytes);
        for (&index, ((&reason, &iova), &done_bytes)) in answer.fault_index.iter().zip(columns) {
            let at = index as usize;
            if at >= shape.count || faults.last().is_some_and(|&(before, _)| before >= index) {
                return Err(format!(
                    "fault_index {index} is out of order or beyond {} operations",
                    shape.count
                ));
            }
            if done_bytes > shape.size_bytes(at) {
                return Err(format!(
                    "fault_done_bytes {done_bytes} is more than operation {index} asked for"
                ));
            }
            let reason = reason_from_code(reason)
                .ok_or_else(|| format!("fault_reason {reason:#x} is unknown to this version"))?;
            let fault = DmaFault { done_bytes, iova: Iova::new(iova), reason };
            let missing = shape.returned(at, None) - shape.returned(at, Some(&fault));
            expected -= missing as u64;
            faults.push((index, fault));
        }
        if answer.payload.len() as u64 != expected {
            return Err(format!("a payload of {} bytes where {expected} belong", answer.payload.len()));
        }
        Ok(Self { shape, payload: answer.payload, faults })
    }

    /// How an empty batch ends, which is never sent.
    pub(crate) fn nothing(shape: Shape) -> Self {
        assert_eq!(shape.count, 0, "only an empty batch ends without an answer");
        Self { shape, payload: Bytes::new(), faults: Vec::new() }
    }

    /// How many operations there were.
    pub fn len(&self) -> usize {
        self.shape.count
    }

    /// Whether the batch was empty.
    pub fn is_empty(&self) -> bool {
        self.shape.count == 0
    }

    /// The operations that did not succeed, with their index, ascending.
    pub fn faults(&self) -> &[(u32, DmaFault)] {
        &self.faults
    }

    /// The first operation that did not succeed.
    pub fn first_fault(&self) -> Option<DmaFault> {
        self.faults.first().map(|&(_, fault)| fault)
    }

    /// What was read, end to end; what refused reads left out is missing.
    pub fn payload(&self) -> &Bytes {
        &self.payload
    }

    /// What was read, end to end.
    pub fn into_payload(self) -> Bytes {
        self.payload
    }

    /// Each operation, in order.
    pub fn results(&self) -> impl Iterator<Item = OperationResult<'_>> {
        let mut faults = self.faults.iter().peekable();
        let mut rest: &[u8] = &self.payload;
        (0..self.shape.count).map(move |index| {
            let fault = faults.next_if(|&&(at, _)| at as usize == index).map(|&(_, fault)| fault);
            let (bytes, behind) = rest.split_at(self.shape.returned(index, fault.as_ref()));
            rest = behind;
            OperationResult { bytes, fault }
        })
    }
}
