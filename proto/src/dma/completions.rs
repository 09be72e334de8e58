//! The answer to a batch, on both sides.

use bytes::{Bytes, BytesMut};
use iommu_types::errors::InvalidField;
use iommu_types::{DmaFault, Iova, Refusal};

use super::builder::{BatchShape, Expected};
use super::{Action, BatchView, Operation, reason_code, reason_from_code};
use crate::pb;

/// Gathers the ends of a batch's operations, in their order.
///
/// A read is made straight into its place in the answer ([`space`](Self::space)), so that its bytes are copied once.
#[derive(Debug)]
pub struct CompletionsBuilder {
    answer: pb::DmaCompletions,
    results: BytesMut,
    filled_bytes: usize,
    operations: u32,
    ended: u32,
}

impl CompletionsBuilder {
    /// The answer to `batch`, with nothing ended yet.
    pub fn new(batch: &BatchView<'_>) -> Self {
        Self {
            answer: pb::DmaCompletions { first_tag: batch.first_tag(), ..Default::default() },
            results: BytesMut::zeroed(batch.result_bytes() as usize),
            filled_bytes: 0,
            operations: batch.len() as u32,
            ended: 0,
        }
    }
    /// Where the result of `operation`, the next one to end, is to be written.
    pub fn space(&mut self, operation: &Operation<'_>) -> &mut [u8] {
        let end = self.filled_bytes + operation.result_bytes() as usize;
        self.results
            .get_mut(self.filled_bytes..end)
            .expect("the batch's results were added up when it was parsed")
    }
    /// `operation` succeeded; its result, if it has one, is in its [`space`](Self::space).
    pub fn succeeded(&mut self, operation: &Operation<'_>) {
        self.end(operation, operation.result_bytes());
    }
    /// `operation` ended with `fault`; of a read, the bytes done are in its [`space`](Self::space).
    pub fn failed(&mut self, operation: &Operation<'_>, fault: DmaFault) {
        assert!(fault.done_bytes <= operation.size_bytes, "an operation does no more than it asks");
        self.answer.fault_index.push(operation.index);
        self.answer.fault_reason.push(reason_code(fault.reason));
        self.answer.fault_iova.push(fault.iova.get());
        self.answer.fault_done_bytes.push(fault.done_bytes);
        self.end(operation, if matches!(operation.action, Action::Read) { fault.done_bytes } else { 0 });
    }
    /// `operation` is refused before it did anything.
    pub fn refused(&mut self, operation: &Operation<'_>, refusal: Refusal) {
        self.failed(operation, DmaFault { done_bytes: 0, iova: operation.iova, reason: Err(refusal) });
    }
    fn end(&mut self, operation: &Operation<'_>, result_bytes: u32) {
        assert!(operation.index == self.ended, "operations end in their order");
        self.ended += 1;
        self.filled_bytes += result_bytes as usize;
    }
    /// The answer. Every operation has ended.
    pub fn finish(mut self) -> pb::DmaCompletions {
        assert!(self.ended == self.operations, "every operation is answered (I6)");
        self.results.truncate(self.filled_bytes);
        self.answer.payload = self.results.freeze();
        self.answer
    }
}

/// The answer to a batch of which every operation is refused for the same reason, parsed or not. Its size is that of the batch.
pub fn refuse_whole(batch: &pb::DmaBatch, refusal: Refusal) -> pb::DmaCompletions {
    let operations = batch.iova.len();
    pb::DmaCompletions {
        first_tag: batch.first_tag,
        payload: Bytes::new(),
        fault_index: (0..operations as u32).collect(),
        fault_reason: vec![reason_code(Err(refusal)); operations],
        fault_iova: batch.iova.clone(),
        fault_done_bytes: vec![0; operations],
    }
}

/// How each operation of a batch ended, in order: with its result (empty for a write) or with its fault.
#[derive(Debug)]
pub struct Results {
    expected: std::vec::IntoIter<Expected>,
    index: u32,
    payload: Bytes,
    faults: std::iter::Peekable<std::vec::IntoIter<(u32, DmaFault)>>,
}

fn invalid(field: &str, why: String) -> InvalidField {
    InvalidField { field: format!("dma.{field}"), why }
}

impl Results {
    pub(super) fn new(shape: BatchShape, completions: pb::DmaCompletions) -> Result<Self, InvalidField> {
        if completions.first_tag != shape.first_tag {
            let why = format!("is {}; the oldest batch has {}", completions.first_tag, shape.first_tag);
            return Err(invalid("first_tag", why));
        }
        let faults = faults(&completions)?;
        let mut carried_bytes = 0_u64;
        let mut next_fault = faults.iter().peekable();
        for (index, expected) in (0_u32..).zip(&shape.expected) {
            let fault = next_fault.next_if(|(at, _)| *at == index);
            let (Expected::Data(size_bytes) | Expected::OldValue(size_bytes) | Expected::Nothing(size_bytes)) =
                *expected;
            if let Some((_, fault)) = fault
                && fault.done_bytes > size_bytes
            {
                let why = format!("operation {index} did {} of {size_bytes} bytes", fault.done_bytes);
                return Err(invalid("fault_done_bytes", why));
            }
            carried_bytes += u64::from(carried(*expected, fault.map(|(_, fault)| fault)));
        }
        if let Some((index, _)) = next_fault.next() {
            let why = format!("{index} is not an operation of the batch, or not in order");
            return Err(invalid("fault_index", why));
        }
        if carried_bytes != completions.payload.len() as u64 {
            let why = format!("has {} bytes; the operations give {carried_bytes}", completions.payload.len());
            return Err(invalid("payload", why));
        }
        Ok(Self {
            expected: shape.expected.into_iter(),
            index: 0,
            payload: completions.payload,
            faults: faults.into_iter().peekable(),
        })
    }
}

/// Bytes of the payload that belong to an operation.
fn carried(expected: Expected, fault: Option<&DmaFault>) -> u32 {
    match (expected, fault) {
        (Expected::Data(size_bytes) | Expected::OldValue(size_bytes), None) => size_bytes,
        (Expected::Data(_), Some(fault)) => fault.done_bytes,
        (Expected::OldValue(_), Some(_)) | (Expected::Nothing(_), _) => 0,
    }
}

/// The fault columns as rows.
fn faults(completions: &pb::DmaCompletions) -> Result<Vec<(u32, DmaFault)>, InvalidField> {
    let pb::DmaCompletions { fault_index, fault_reason, fault_iova, fault_done_bytes, .. } = completions;
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
    let rows = std::iter::zip(fault_index, fault_reason).zip(std::iter::zip(fault_iova, fault_done_bytes));
    rows.map(|((index, code), (iova, done_bytes))| {
        let reason = reason_from_code(*code)
            .ok_or_else(|| invalid("fault_reason", format!("{code:#x} is not a reason of this version")))?;
        Ok((*index, DmaFault { done_bytes: *done_bytes, iova: Iova::new(*iova), reason }))
    })
    .collect()
}

impl Iterator for Results {
    type Item = Result<Bytes, DmaFault>;

    fn next(&mut self) -> Option<Self::Item> {
        let expected = self.expected.next()?;
        let index = self.index;
        self.index += 1;
        let fault = self.faults.next_if(|(at, _)| *at == index).map(|(_, fault)| fault);
        let data = self.payload.split_to(carried(expected, fault.as_ref()) as usize);
        Some(fault.map_or(Ok(data), Err))
    }
    fn size_hint(&self) -> (usize, Option<usize>) {
        self.expected.size_hint()
    }
}

impl ExactSizeIterator for Results {}
