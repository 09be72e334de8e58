//! One batch of DMA, carried out.
//!
//! Somebody may [`Watch`] what is done, operation by operation. Without a watch ([`NoWatch`]) the code is that of a crate that knows no
//! watches: which of the two it is, is decided when this is compiled, and chosen once for each batch ([`execute_for`]). `cargo measure
//! modes` counts the instructions.

use std::ops::Range;

use iommu_hardware::dma::{Done, Run, Transfer};
use iommu_hardware::vtd::Port;
use iommu_hardware::vtd::interrupt::DeliveredInterrupt;
use iommu_proto::dma::{Action, BatchError, BatchView, CompletionsBuilder, Operation, refuse_whole};
use iommu_proto::pb;
use iommu_types::{DmaFault, Refusal};

use super::watch::BatchWatch;
use crate::bounds;
use crate::host::devices::{BatchCount, DeviceState};

/// What came of a batch.
#[derive(Debug)]
pub struct Executed {
    /// The answer.
    pub completions: pb::DmaCompletions,
    /// What it adds to the counters of its device.
    pub count: BatchCount,
}

/// Looks at each operation of a batch.
pub trait Watch {
    /// Whether there is anything to look at. What is done for a watch alone is not compiled where this is `false`.
    const IS_ON: bool;
    /// What is to be known of an operation before it begins.
    type Begun;
    /// An operation begins.
    fn begin(&mut self) -> Self::Begun;
    /// It ended; what it brought back is `result` of all results of the batch.
    fn end(
        &mut self,
        begun: Self::Begun,
        operation: &Operation<'_>,
        outcome: Result<Done, DmaFault>,
        result: Range<usize>,
    );
}

/// Nobody watches.
#[derive(Clone, Copy, Debug)]
pub struct NoWatch;

impl Watch for NoWatch {
    const IS_ON: bool = false;
    type Begun = ();
    #[inline]
    fn begin(&mut self) {}
    #[inline]
    fn end(&mut self, (): (), _: &Operation<'_>, _: Result<Done, DmaFault>, _: Range<usize>) {}
}

// Nothing of it is carried from one side of an operation to the other, so nothing is left of it in the code.
const _: () =
    assert!(!NoWatch::IS_ON && size_of::<NoWatch>() == 0 && size_of::<<NoWatch as Watch>::Begun>() == 0);

/// Refuses every operation.
pub fn refuse(batch: &pb::DmaBatch, refusal: Refusal) -> Executed {
    let refusals = batch.iova.len() as u64;
    Executed {
        completions: refuse_whole(batch, refusal),
        count: BatchCount { refusals, ..BatchCount::default() },
    }
}

/// Carries out `batch` of `device`, before the eyes of its domain's sanitizer if there is one; otherwise as [`execute`] with [`NoWatch`].
pub fn execute_for(
    device: &DeviceState,
    port: &mut Port,
    batch: &pb::DmaBatch,
    deliver: impl FnMut(DeliveredInterrupt),
) -> Result<Executed, String> {
    let Some(domain) = device.watched() else {
        return execute(port, batch, deliver, &mut NoWatch);
    };
    let mut watch = BatchWatch::new(&domain, device.address);
    let executed = execute(port, batch, deliver, &mut watch)?;
    watch.tell(&executed.completions.payload);
    Ok(executed)
}

/// Carries out `batch`, operation by operation, before the eyes of `watch`; interrupts go to `deliver`. The error is the peer's
/// violation of the protocol.
pub fn execute<W: Watch>(
    port: &mut Port,
    batch: &pb::DmaBatch,
    mut deliver: impl FnMut(DeliveredInterrupt),
    watch: &mut W,
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
        let results_before = if W::IS_ON { completions.results().len() } else { 0 };
        let begun = watch.begin();
        let outcome = one(&mut run, &view, &operation, &mut completions);
        if W::IS_ON {
            let result = results_before..completions.results().len();
            watch.end(begun, &operation, outcome, result);
        }
        match outcome {
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
