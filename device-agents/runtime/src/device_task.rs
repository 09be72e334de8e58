//! The task in which register accesses and resets run, apart from the task that reads the stream.

use std::sync::Arc;

use iommu_proto::pb;
use iommu_proto::pb::mmio_completion::Outcome;
use iommu_types::AccessWidth;
use tokio::sync::mpsc;

use crate::link::{MMIO_CREDITS, RESETS_MAX, Session};
use crate::{DeviceModel, Dma, MmioRefusal, Register};

/// Room of the queue to the task: all that the server may have unanswered.
const WORK_MAX: usize = (MMIO_CREDITS + RESETS_MAX) as usize;

/// What the server asks of the model.
pub(crate) enum Work {
    Mmio(pb::MmioRequest),
    Reset { tag: u64 },
}

/// The queue to the device task.
pub(crate) fn work_queue() -> (mpsc::Sender<Work>, mpsc::Receiver<Work>) {
    mpsc::channel(WORK_MAX)
}

/// Does all work in order until the queue is closed.
pub(crate) async fn run<M: DeviceModel>(
    model: Arc<M>,
    dma: Dma,
    session: Arc<Session>,
    mut queue: mpsc::Receiver<Work>,
) {
    while let Some(work) = queue.recv().await {
        match work {
            Work::Mmio(request) => {
                let tag = request.tag;
                let outcome = match access(&*model, &dma, &session, request).await {
                    Ok(value) => Outcome::Value(value),
                    Err(refusal) => Outcome::Refused(refusal.why().to_owned()),
                };
                session.answer_mmio(pb::MmioCompletion { tag, outcome: Some(outcome) });
            }
            Work::Reset { tag } => {
                model.reset().await;
                session.reset_done(tag);
            }
        }
    }
}

async fn access<M: DeviceModel>(
    model: &M,
    dma: &Dma,
    session: &Session,
    request: pb::MmioRequest,
) -> Result<u64, MmioRefusal> {
    if session.is_resetting() {
        return Err(MmioRefusal::new("the device is being reset"));
    }
    let refused = |what: String| MmioRefusal::new(what);
    let width = AccessWidth::from_bytes(request.width_bytes)
        .ok_or_else(|| refused(format!("width_bytes: {} is not 1, 2, 4 or 8", request.width_bytes)))?;
    let bar = u8::try_from(request.bar)
        .ok()
        .filter(|&bar| bar <= 5)
        .ok_or_else(|| refused(format!("bar: {} is not 0 to 5", request.bar)))?;
    if !request.offset.is_multiple_of(u64::from(width.bytes())) {
        return Err(refused(format!("offset: {:#x} is not a multiple of the width", request.offset)));
    }
    let register = Register { bar, offset: request.offset, width };
    match request.write_value {
        Some(value) if value & !width.mask() != 0 => {
            Err(refused(format!("write_value: {value:#x} does not fit {} bytes", width.bytes())))
        }
        Some(value) => model.mmio_write(register, value, dma).await.map(|()| 0),
        None => model.mmio_read(register, dma).await.map(|value| value & width.mask()),
    }
}
