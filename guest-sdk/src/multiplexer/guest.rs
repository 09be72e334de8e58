//! The guest's side of a shared device.

use std::sync::Arc;

use iommu_types::GpaRange;
use iommu_types::errors::HypercallError;
use tokio::sync::Semaphore;

use super::codec::{BadBatch, Batch, Ended, Entry, Reply};
use super::queues::WAITING_PER_GUEST_MAX;
use crate::{Driver, SdkError};

/// Why a batch has no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MultiplexError {
    /// The entries make no batch; nothing was asked.
    #[error(transparent)]
    Batch(#[from] BadBatch),
    /// Nothing was done: as many batches of this guest wait as may. Those of one [`MultiplexedDevice`] are no more than that, unless some are left of calls
    /// that were given up, by a deadline or by dropping their future.
    #[error("{WAITING_PER_GUEST_MAX} batches of this guest wait already; wait for their answers")]
    Busy,
    /// The hypercall was not answered; what became of the batch is known only where it was refused.
    #[error(transparent)]
    Hypercall(#[from] SdkError<HypercallError>),
    /// The answer is none: somebody else serves the hypercalls.
    #[error("the answer is not that of a multiplexer; does another program serve the hypercalls?")]
    NotAMultiplexer,
}

/// A device that the hypervisor shares among its guests. Cheap to clone; all clones are one queue of [`WAITING_PER_GUEST_MAX`] batches.
#[derive(Clone, Debug)]
pub struct MultiplexedDevice {
    driver: Driver,
    places: Arc<Semaphore>,
}

impl MultiplexedDevice {
    /// The device that the hypervisor of this machine shares.
    pub fn new(driver: &Driver) -> Self {
        Self { driver: driver.clone(), places: Arc::new(Semaphore::new(WAITING_PER_GUEST_MAX)) }
    }

    /// Has the device read these packets. They may be changed once there is an answer, which tells how each ended, in order.
    pub async fn transmit(&self, packets: &[GpaRange]) -> Result<Vec<Ended>, MultiplexError> {
        self.run(packets.iter().copied().map(Entry::transmit).collect()).await
    }

    /// Has the device write packets into these buffers. Each ends with the bytes that were written.
    pub async fn receive(&self, buffers: &[GpaRange]) -> Result<Vec<Ended>, MultiplexError> {
        self.run(buffers.iter().copied().map(Entry::receive).collect()).await
    }

    /// Both kinds in one batch, carried out in order.
    pub async fn run(&self, entries: Vec<Entry>) -> Result<Vec<Ended>, MultiplexError> {
        let batch = Batch::new(entries)?;
        let _place = self.places.acquire().await.expect("it is never closed");
        let answer = self.driver.hypercall(batch.encode()).await?;
        match Reply::decode(&answer) {
            Some(Reply::Ended(ended)) if ended.len() == batch.entries().len() => Ok(ended),
            Some(Reply::Busy) => Err(MultiplexError::Busy),
            _ => Err(MultiplexError::NotAMultiplexer),
        }
    }
}
