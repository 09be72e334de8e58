//! The answer to a batch: checked once against the batch it belongs to, then read without allocation.

use bytes::Bytes;
use iommu_types::errors::InvalidField;
use iommu_types::{DmaFault, Iova};

use super::batch::result_bytes;
use super::builder::Gathered;
use super::{kind, reason_from_code};
use crate::pb;

/// What is kept of a batch while it is in flight: as much as is needed to read its answer.
#[derive(Clone, Debug)]
pub struct BatchShape {
    pub(super) first_tag: u64,
    pub(super) count: usize,
    pub(super) size_bytes: Gathered<u32>,
    pub(super) kind: Gathered<u8>,
    pub(super) returned_bytes: u64,
}

impl BatchShape {
    /// Checks an answer against the batch. Everything is checked before the first result is given out; the error says
    /// which rule the server broke.
    pub fn complete(self, answer: pb::DmaCompletions) -> Result<Completed, InvalidField> {
        if answer.first_tag != self.first_tag {
            let why = format!("is {}; the oldest batch has {}", answer.first_tag, self.first_tag);
            return Err(invalid("first_tag", why));
        }
        let mut expected_bytes = self.returned_bytes;
        let faults = self.faults(&answer)?;
        for (index, fault) in &faults {
            let missing = self.returned(*index as usize, None) - self.returned(*index as usize, Some(fault));
            expected_bytes -= missing as u64;
        }
        if answer.payload.len() as u64 != expected_bytes {
            let why = format!("has {} bytes; the operations give {expected_bytes}", answer.payload.len());
            return Err(invalid("payload", why));
        }
        Ok(Completed { shape: self, payload: answer.payload, faults })
    }

    /// The fault columns as rows.
    fn faults(&self, answer: &pb::DmaCompletions) -> Result<Vec<(u32, DmaFault)>, InvalidField> {
        let pb::DmaCompletions { fault_index, fault_reason, fault_iova, fault_done_bytes, .. } = answer;
        for (field, length) in [
            ("fault_reason", fault_reason.len()),
            ("fault_iova", fault_iova.len()),
            ("fault_done_bytes", fault_done_bytes.len()),
        ] {
            if length != fault_index.len() {
                let why = format!("has {length} elements; fault_index has {}", fault_index.len());
                return Err(invalid(field, why));
            }
        }
        let mut faults: Vec<(u32, DmaFault)> = Vec::with_capacity(fault_index.len().min(self.count));
        let columns = std::iter::zip(fault_reason, std::iter::zip(fault_iova, fault_done_bytes));
        for (&index, (&reason, (&iova, &done_bytes))) in std::iter::zip(fault_index, columns) {
            let at = index as usize;
            if at >= self.count || faults.last().is_some_and(|&(before, _)| before >= index) {
                let why = format!("{index} is not an operation of the batch, or not in order");
                return Err(invalid("fault_index", why));
            }
            if done_bytes > self.size_bytes(at) {
                let why = format!("operation {index} did {done_bytes} of {} bytes", self.size_bytes(at));
                return Err(invalid("fault_done_bytes", why));
            }
            faults.push((
                index,
                DmaFault { done_bytes, iova: Iova::new(iova), reason: reason_from_code(reason) },
            ));
        }
        Ok(faults)
    }

    fn kind(&self, index: usize) -> u8 {
        self.kind.get(index).expect("a batch has a kind for each of its operations")
    }

    fn size_bytes(&self, index: usize) -> u32 {
        self.size_bytes.get(index).expect("a batch has a size for each of its operations")
    }

    /// Bytes in the payload of the answer that belong to operation `index`.
    fn returned(&self, index: usize, fault: Option<&DmaFault>) -> usize {
        match (self.kind(index), fault) {
            (kind::READ, Some(fault)) => fault.done_bytes as usize,
            (_, Some(_)) => 0,
            (kind, None) => result_bytes(kind, self.size_bytes(index)) as usize,
        }
    }
}

fn invalid(field: &str, why: String) -> InvalidField {
    InvalidField { field: format!("dma.{field}"), why }
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
    shape: BatchShape,
    payload: Bytes,
    faults: Vec<(u32, DmaFault)>,
}

impl Completed {
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
