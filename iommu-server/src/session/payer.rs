//! Who pays for the DMA of a session: the owner of its device, out of what it may do in a second (I7).

use std::sync::Arc;
use std::time::Duration;

use iommu_proto::pb;
use iommu_types::Refusal;

use crate::host::devices::{DeviceState, Home};
use crate::host::owners::OwnerState;

/// The owner of the device of a session, asked for again when it changes.
#[derive(Debug, Default)]
pub(super) struct Payer {
    owner: Option<Arc<OwnerState>>,
    as_of_change: Option<u64>,
}

/// Over a rate.
#[derive(Debug)]
pub(super) struct Unpaid {
    /// What the device is told.
    pub(super) refusal: Refusal,
    /// How long nothing more is read from it.
    pub(super) penalty: Duration,
}

/// Bytes that a batch asks to move. The view of the batch checks its columns later; what does not parse moves nothing.
fn asked_bytes(batch: &pb::DmaBatch) -> u64 {
    let operations = batch.iova.len() as u64;
    match batch.size_bytes.as_slice() {
        [] => 0,
        [size] => u64::from(*size).saturating_mul(operations),
        each => each.iter().map(|size| u64::from(*size)).fold(0, u64::saturating_add),
    }
}

impl Payer {
    /// Pays for a batch, or says what it is over.
    pub(super) fn pay(&mut self, device: &DeviceState, batch: &pb::DmaBatch) -> Result<(), Unpaid> {
        if matches!(device.home, Home::Machine(_)) {
            // A bare machine is its client's own; what it may do is bounded by its credits.
            return Ok(());
        }
        let change = device.owner_changes();
        if self.as_of_change != Some(change) {
            self.owner = device.owner();
            self.as_of_change = Some(change);
        }
        let Some(owner) = &self.owner else { return Ok(()) };
        let paid = owner.bounds.pay_dma(batch.iova.len() as u64, asked_bytes(batch));
        paid.map_err(|(refusal, over)| Unpaid { refusal, penalty: over.penalty() })
    }
}
