//! One batch of DMA, carried out.

use iommu_hardware::dma::{Done, Run, Transfer};
use iommu_hardware::vtd::Port;
use iommu_hardware::vtd::interrupt::DeliveredInterrupt;
use iommu_proto::dma::{Action, BatchError, BatchView, CompletionsBuilder, Operation, refuse_whole};
use iommu_proto::pb;
use iommu_types::{DmaFault, Refusal};

use crate::bounds;
use crate::host::devices::BatchCount;

/// What came of a batch.
pub(crate) struct Executed {
    pub(crate) completions: pb::DmaCompletions,
    pub(crate) count: BatchCount,
}

/// Refuses every operation.
pub(crate) fn refuse(batch: &pb::DmaBatch, refusal: Refusal) -> Executed {
    let refusals = batch.iova.len() as u64;
    Executed {
        completions: refuse_whole(batch, refusal),
        count: BatchCount { refusals, ..BatchCount::default() },
    }
}

/// Carries out `batch`, operation by operation; interrupts go to `deliver`. The error is the peer's violation of the protocol.
pub(crate) fn execute(
    port: &mut Port,
    batch: &pb::DmaBatch,
    mut deliver: impl FnMut(DeliveredInterrupt),
) -> Result<Executed, String> {
    let view = match BatchView::parse(batch, bounds::BATCH) {
        Ok(view) => view,
        Err(BatchError::Bytes(_)) => return Ok(refuse(batch, Refusal::OverLimit)),
        Err(error @ (BatchError::Columns(_) | BatchError::Operations(_))) => return Err(error.to_string()),
    };
    let mut completions = CompletionsBuilder::new(&view);
    let mut count = BatchCount::default();
    let mut run = Run::new(port).with_address_type(view.address_type());
    for operation in view.operations() {
        match one(&mut run, &view, &operation, &mut completions) {
            Ok(done) => {
                if let Done::Interrupt(interrupt) = done {
                    deliver(interrupt);
                }
                completions.succeeded(&operation);
                count.operations += 1;
                count.bytes += u64::from(operation.size_bytes);
            }
            Err(fault) => {
                completions.failed(&operation, fault);
                count.bytes += u64::from(fault.done_bytes);
                match fault.reason {
                    Ok(_) => count.faults += 1,
                    Err(_) => count.refusals += 1,
                }
            }
        }
    }
    drop(run);
    Ok(Executed { completions: completions.finish(), count })
}

fn one(
    run: &mut Run<'_>,
    view: &BatchView<'_>,
    operation: &Operation<'_>,
    completions: &mut CompletionsBuilder,
) -> Result<Done, DmaFault> {
    let transfer = match operation.action {
        Action::Read => Transfer::Append { into: completions.results(), size_bytes: operation.size_bytes },
        Action::Write { data, .. } => Transfer::Write(data),
        Action::Atomic(operation) => Transfer::Atomic(operation),
        Action::Malformed => {
            return Err(DmaFault { done_bytes: 0, iova: operation.iova, reason: Err(Refusal::Malformed) });
        }
    };
    let done = run.execute(operation.iova, view.pasid(), transfer)?;
    if let Done::Old(old) = done {
        let size_bytes = operation.result_bytes() as usize;
        completions.results().extend_from_slice(&old.to_le_bytes()[..size_bytes]);
    }
    Ok(done)
}
