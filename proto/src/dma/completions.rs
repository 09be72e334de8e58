//! The answer to a batch, as the server gathers it.

use bytes::Bytes;
use iommu_types::{DmaFault, Refusal};

use super::{Action, BatchView, Operation, reason_code};
use crate::pb;

/// Gathers the ends of a batch's operations, in their order.
///
/// A read is made straight to the end of the answer ([`results`](Self::results)), so that its bytes are copied once and written nowhere before.
#[derive(Debug)]
pub struct CompletionsBuilder {
    answer: pb::DmaCompletions,
    results: Vec<u8>,
    filled_bytes: usize,
    operations: u32,
    ended: u32,
}

impl CompletionsBuilder {
    /// The answer to `batch`, with nothing ended yet.
    pub fn new(batch: &BatchView<'_>) -> Self {
        Self {
            answer: pb::DmaCompletions { first_tag: batch.first_tag(), ..Default::default() },
            results: Vec::with_capacity(batch.result_bytes() as usize),
            filled_bytes: 0,
            operations: batch.len() as u32,
            ended: 0,
        }
    }
    /// Where the result of the next operation to end is to be appended. There is room for all results of the batch.
    pub fn results(&mut self) -> &mut Vec<u8> {
        &mut self.results
    }
    /// `operation` succeeded; its result, if it has one, has been appended.
    pub fn succeeded(&mut self, operation: &Operation<'_>) {
        self.end(operation, operation.result_bytes());
    }
    /// `operation` ended with `fault`; of a read, the bytes done have been appended.
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
        assert!(
            self.results.len() == self.filled_bytes,
            "the result of an operation is as long as its end says"
        );
    }
    /// The answer. Every operation has ended.
    pub fn finish(mut self) -> pb::DmaCompletions {
        assert!(self.ended == self.operations, "every operation is answered (I6)");
        self.answer.payload = self.results.into();
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
