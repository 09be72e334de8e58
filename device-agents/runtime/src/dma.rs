//! What a device model reads and writes with.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use iommu_types::{DmaFault, Iova, Refusal};
use tokio::sync::{oneshot, watch};

use crate::link::Link;
use crate::{AtomicValue, Batch, Completed, LinkState, SessionLimits};

/// Why a DMA did not succeed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DmaError {
    /// Translation, or the root complex, refused it. The device may go on.
    #[error("refused at {} after {} bytes: {}", .0.iova, .0.done_bytes, reason(.0))]
    Fault(DmaFault),
    /// There is no session, or it ended before the answer came: it is not known whether the operation
    /// happened.
    #[error("the session with the server was lost")]
    SessionLost,
    /// The device is being reset.
    #[error("the device is being reset")]
    Reset,
    /// The batch is larger than the session allows; nothing was sent.
    #[error("{asked} is more than the {allowed} that {limit} allows")]
    OverLimit {
        /// Name of the limit, as in the Welcome message.
        limit: &'static str,
        /// How much was asked.
        asked: u64,
        /// How much is allowed.
        allowed: u64,
    },
}

fn reason(fault: &DmaFault) -> String {
    match fault.reason {
        Ok(reason) => reason.to_string(),
        Err(refusal) => refusal.to_string(),
    }
}

/// A handle for DMA: cheap to clone, and good for the life of the agent, over every reconnect. Without a
/// session, operations fail at once with [`DmaError::SessionLost`]; [`Dma::connected`] waits for one.
#[derive(Clone, Debug)]
pub struct Dma {
    link: Arc<Link>,
}

/// A batch on its way; awaiting it gives its results. Dropping it does not stop the operations.
#[derive(Debug)]
#[must_use = "a batch that nobody awaits ends unseen"]
pub struct Ticket {
    answer: oneshot::Receiver<Result<Completed, DmaError>>,
}

impl Future for Ticket {
    type Output = Result<Completed, DmaError>;
    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.answer).poll(context).map(|answer| answer.unwrap_or(Err(DmaError::SessionLost)))
    }
}

impl Dma {
    pub(crate) fn new(link: Arc<Link>) -> Self {
        Self { link }
    }

    /// Waits for a session and says what it allows. `None` when the agent has ended.
    pub async fn connected(&self) -> Option<SessionLimits> {
        let mut state = self.link.watch();
        loop {
            match &*state.borrow_and_update() {
                LinkState::Up { limits, .. } => return Some(*limits),
                LinkState::Ended { .. } => return None,
                LinkState::Down { .. } => {}
            }
            state.changed().await.ok()?;
        }
    }

    /// The state of the session, and every change of it.
    pub fn watch(&self) -> watch::Receiver<LinkState> {
        self.link.watch()
    }

    /// What the session of now allows; `None` without one.
    pub fn limits(&self) -> Option<SessionLimits> {
        self.link.session().map(|session| session.limits)
    }

    /// Sends a batch as soon as there is a credit for it, and returns while it is in flight; several may be.
    /// They are carried out and answered in the order of their submission.
    pub async fn submit(&self, batch: Batch) -> Result<Ticket, DmaError> {
        let session = self.link.session().ok_or(DmaError::SessionLost)?;
        Ok(Ticket { answer: session.submit(batch).await? })
    }

    /// Sends a batch and awaits its results.
    pub async fn execute(&self, batch: Batch) -> Result<Completed, DmaError> {
        self.submit(batch).await?.await
    }

    /// Reads `size_bytes` bytes; at most `batch_bytes_max`. Zero asks for read permission and reads nothing.
    pub async fn read(&self, iova: Iova, size_bytes: u32) -> Result<Bytes, DmaError> {
        let mut batch = Batch::with_capacity(1);
        batch.read(iova, size_bytes);
        Ok(self.execute_whole(batch).await?.into_payload())
    }

    /// Fills `target` from `iova`; at most `batch_bytes_max` bytes. After an error its content is as before.
    pub async fn read_into(&self, iova: Iova, target: &mut [u8]) -> Result<(), DmaError> {
        let asked = target.len() as u64;
        let size_bytes = u32::try_from(asked).map_err(|_| DmaError::OverLimit {
            limit: "batch_bytes_max",
            asked,
            allowed: u64::from(u32::MAX),
        })?;
        target.copy_from_slice(&self.read(iova, size_bytes).await?);
        Ok(())
    }

    /// Writes `data`; at most `batch_bytes_max`. Answered when it is in memory.
    pub async fn write(&self, iova: Iova, data: impl Into<Bytes>) -> Result<(), DmaError> {
        let mut batch = Batch::with_capacity(1);
        batch.write(iova, data);
        self.execute_whole(batch).await.map(drop)
    }

    /// Writes `data`, posted. Returns when it is on its way; the ticket tells, to those who ask, how it
    /// ended.
    pub async fn posted_write(&self, iova: Iova, data: impl Into<Bytes>) -> Result<Ticket, DmaError> {
        let mut batch = Batch::with_capacity(1);
        batch.posted_write(iova, data);
        self.submit(batch).await
    }

    /// Reads scattered pieces in one batch and returns them end to end. The first piece that is refused is
    /// the error.
    pub async fn read_sg(&self, pieces: &[(Iova, u32)]) -> Result<Bytes, DmaError> {
        let mut batch = Batch::with_capacity(pieces.len());
        for &(iova, size_bytes) in pieces {
            batch.read(iova, size_bytes);
        }
        Ok(self.execute_whole(batch).await?.into_payload())
    }

    /// Writes scattered pieces in one batch. The first piece that is refused is the error; the ones after it
    /// are written.
    pub async fn write_sg(&self, pieces: &[(Iova, &[u8])]) -> Result<(), DmaError> {
        let mut batch = Batch::with_capacity(pieces.len());
        for &(iova, data) in pieces {
            batch.write_slice(iova, data);
        }
        self.execute_whole(batch).await.map(drop)
    }

    /// PCIe FetchAdd: adds, and returns the value before. Needs an aligned address, and read and write
    /// permission.
    pub async fn fetch_add(&self, iova: Iova, operand: AtomicValue) -> Result<AtomicValue, DmaError> {
        let mut batch = Batch::with_capacity(1);
        batch.fetch_add(iova, operand);
        self.atomic(batch).await
    }

    /// PCIe Swap: replaces, and returns the value before.
    pub async fn swap(&self, iova: Iova, operand: AtomicValue) -> Result<AtomicValue, DmaError> {
        let mut batch = Batch::with_capacity(1);
        batch.swap(iova, operand);
        self.atomic(batch).await
    }

    /// PCIe CAS: replaces if `expected` is there, and returns the value before. Both operands have one width.
    pub async fn compare_and_swap(
        &self,
        iova: Iova,
        expected: AtomicValue,
        new: AtomicValue,
    ) -> Result<AtomicValue, DmaError> {
        let mut batch = Batch::with_capacity(1);
        batch.compare_and_swap(iova, expected, new);
        self.atomic(batch).await
    }

    /// Raises an interrupt: a 4-byte write of `data` to `address` in FEEx_xxxx, answered when it was
    /// delivered or refused.
    pub async fn msi(&self, address: Iova, data: u32) -> Result<(), DmaError> {
        let mut batch = Batch::with_capacity(1);
        batch.msi(address, data);
        self.execute_whole(batch).await.map(drop)
    }

    /// A batch of which any fault is the error.
    async fn execute_whole(&self, batch: Batch) -> Result<Completed, DmaError> {
        let completed = self.execute(batch).await?;
        match completed.first_fault() {
            Some(fault) => Err(DmaError::Fault(fault)),
            None => Ok(completed),
        }
    }

    async fn atomic(&self, batch: Batch) -> Result<AtomicValue, DmaError> {
        let completed = self.execute_whole(batch).await?;
        let malformed = DmaFault { done_bytes: 0, iova: Iova::new(0), reason: Err(Refusal::Malformed) };
        AtomicValue::from_le_bytes(completed.payload()).ok_or(DmaError::Fault(malformed))
    }
}
