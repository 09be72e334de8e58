//! The answer to a batch, as the server gathers it.

use bytes::{Bytes, BytesMut};
use iommu_types::{DmaFault, Refusal};

use super::{Action, BatchView, Operation, reason_code};
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
