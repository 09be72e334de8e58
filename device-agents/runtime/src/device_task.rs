//! The task in which register accesses and resets run, apart from the task that reads the stream.

use std::sync::Arc;

use iommu_proto::model::{MmioAccess, MmioCompletion, MmioRequest};
use iommu_types::Generation;
use tokio::sync::mpsc;

use crate::link::{MMIO_CREDITS, RESETS_MAX, Session};
use crate::{DeviceModel, Dma, MmioRefusal, Register};

/// Room of the queue to the task: all that the server may have unanswered.
const WORK_MAX: usize = (MMIO_CREDITS + RESETS_MAX) as usize;

/// What the server asks of the model.
pub(crate) enum Work {
    Mmio(MmioRequest),
    Reset { tag: u64, assignment_generation: Generation },
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
                let refused = |refusal: MmioRefusal| refusal.why().to_owned();
                let outcome = access(&*model, &dma, &session, request.access).await.map_err(refused);
                session.answer_mmio(MmioCompletion { tag: request.tag, outcome });
            }
            Work::Reset { tag, assignment_generation } => {
                model.reset().await;
                session.reset_done(tag, assignment_generation);
            }
        }
    }
}

async fn access<M: DeviceModel>(
    model: &M,
    dma: &Dma,
    session: &Session,
    access: MmioAccess,
) -> Result<u64, MmioRefusal> {
    if session.is_resetting() {
        return Err(MmioRefusal::new("the device is being reset"));
    }
    let MmioAccess { bar, offset, width, write_value } = access;
    let register = Register { bar, offset, width };
    match write_value {
        Some(value) => model.mmio_write(register, value, dma).await.map(|()| 0),
        None => model.mmio_read(register, dma).await.map(|value| value & width.mask()),
    }
}
