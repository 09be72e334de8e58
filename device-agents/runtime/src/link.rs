//! The state that a session shares between those who ask for DMA and the task that reads the stream.
//!
//! ```text
//!  Dma handles ──submit──► credits ──► in flight (tag order) ──► outbound ──► wire
//!                             ▲              │
//!                             └── +1 ────────┴── oldest answered ◄── reader ◄── wire
//! ```
//!
//! The lock is held to push one entry and to put one message into a channel that has room for all credits, so neither side
//! ever waits for the other. Only a server that answers what it has not read, or asks for more than its credits, can fill it;
//! that ends the session.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use iommu_proto::dma::BatchShape;
use iommu_proto::model::MmioCompletion;
use iommu_proto::pb;
use iommu_proto::pb::device_to_server::Message as Up;
use iommu_types::Generation;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use crate::{Batch, Completed, DmaError, EndReason};

/// DMA batches in flight that we use at most, however many the server offers.
pub(crate) const DMA_CREDITS_MAX: u32 = 1024;
/// Unanswered register accesses that we take, told to the server in Hello.
pub(crate) const MMIO_CREDITS: u32 = 64;
/// Unanswered resets that we take; a server that sends more breaks the rules.
pub(crate) const RESETS_MAX: u32 = 16;
/// Room of the outbound channel: all that can be on its way up at once, and Hello.
pub(crate) const OUTBOUND_MAX: usize = (DMA_CREDITS_MAX + MMIO_CREDITS + RESETS_MAX + 1) as usize;

/// What the server allows in this session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionLimits {
    /// Batches in flight at once.
    pub dma_credits: u32,
    /// Operations in one batch.
    pub batch_operations_max: u32,
    /// Bytes of one batch: written, of operands, and to be read, together.
    pub batch_bytes_max: u32,
}

/// Whether an agent has a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkState {
    /// Not yet, or not any more: why the last one ended, and when the next attempt is due.
    Down {
        /// Why the last session or attempt ended; `None` before the first.
        reason: Option<EndReason>,
        /// Delay until the next attempt.
        retry_in: Duration,
    },
    /// A session stands.
    Up {
        /// Counts the sessions of the device address.
        generation: Generation,
        /// What the server allows.
        limits: SessionLimits,
    },
    /// The agent has ended and does not come back.
    Ended {
        /// Why.
        reason: EndReason,
    },
}

/// The link of an agent: the session of now, if there is one.
#[derive(Debug)]
pub(crate) struct Link {
    session: Mutex<Option<Arc<Session>>>,
    state: watch::Sender<LinkState>,
}

impl Link {
    pub(crate) fn new() -> Self {
        let state = LinkState::Down { reason: None, retry_in: Duration::ZERO };
        Self { session: Mutex::new(None), state: watch::Sender::new(state) }
    }

    pub(crate) fn session(&self) -> Option<Arc<Session>> {
        lock(&self.session).clone()
    }

    pub(crate) fn up(&self, session: Arc<Session>) {
        let state = LinkState::Up { generation: session.generation, limits: session.limits };
        *lock(&self.session) = Some(session);
        self.state.send_replace(state);
    }

    /// The session is over: everything in flight fails.
    pub(crate) fn down(&self, state: LinkState) {
        if let Some(session) = lock(&self.session).take() {
            session.close();
        }
        self.state.send_replace(state);
    }

    pub(crate) fn watch(&self) -> watch::Receiver<LinkState> {
        self.state.subscribe()
    }
}

/// A batch whose answer is awaited.
#[derive(Debug)]
struct InFlight {
    shape: BatchShape,
    /// Gone once the batch was failed by a reset; its answer is then only checked off.
    waiter: Option<oneshot::Sender<Result<Completed, DmaError>>>,
}

/// What the lock of a session covers.
#[derive(Debug)]
struct Traffic {
    in_flight: VecDeque<InFlight>,
    next_tag: u64,
    /// Resets told by the server and not done yet; while there is one, DMA is refused.
    resets: u32,
    /// The device's generation, under which DMA is sent: of Welcome, then of the last reset that was done.
    assignment: Generation,
    /// Counts the resets told: what waited for credit since before the latest one fails with it.
    resets_told: u64,
    /// Gone once the session closed, which ends the stream upward.
    outbound: Option<mpsc::Sender<pb::DeviceToServer>>,
    /// Cancelled when the outbound channel was found full.
    overrun: CancellationToken,
}

/// One session.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) generation: Generation,
    pub(crate) limits: SessionLimits,
    /// Cancelled when the server broke its credits so far that our answers have no room.
    pub(crate) overrun: CancellationToken,
    credits: Semaphore,
    traffic: Mutex<Traffic>,
}

impl Session {
    pub(crate) fn new(
        generation: Generation,
        limits: SessionLimits,
        assignment: Generation,
        outbound: mpsc::Sender<pb::DeviceToServer>,
    ) -> Self {
        let overrun = CancellationToken::new();
        let traffic = Traffic {
            in_flight: VecDeque::new(),
            next_tag: 0,
            resets: 0,
            resets_told: 0,
            assignment,
            outbound: Some(outbound),
            overrun: overrun.clone(),
        };
        Self {
            generation,
            limits,
            overrun,
            credits: Semaphore::new(limits.dma_credits as usize),
            traffic: Mutex::new(traffic),
        }
    }

    /// Waits for a credit and sends the batch. Dropping the future sends nothing; dropping what it returns
    /// forgets the answer.
    pub(crate) async fn submit(
        &self,
        batch: Batch,
    ) -> Result<oneshot::Receiver<Result<Completed, DmaError>>, DmaError> {
        self.check_limits(&batch)?;
        let (waiter, answer) = oneshot::channel();
        if batch.is_empty() {
            let (_, shape) = batch.into_message(0);
            let nothing = shape.complete(pb::DmaCompletions::default());
            let _ = waiter.send(Ok(nothing.expect("an empty batch has an empty answer")));
            return Ok(answer);
        }
        let (credit, resets_told) = match self.credits.try_acquire() {
            Ok(credit) => (credit, None),
            Err(_) => {
                let resets_told = lock(&self.traffic).resets_told;
                let credit = self.credits.acquire().await.map_err(|_| DmaError::SessionLost)?;
                (credit, Some(resets_told))
            }
        };
        let mut traffic = lock(&self.traffic);
        if traffic.resets > 0 || resets_told.is_some_and(|told| told != traffic.resets_told) {
            return Err(DmaError::Reset);
        }
        let first_tag = traffic.next_tag;
        traffic.next_tag = first_tag.wrapping_add(batch.len() as u64);
        let (message, shape) = batch.with_assignment_generation(traffic.assignment).into_message(first_tag);
        traffic.send(Up::Dma(message)).map_err(|_| DmaError::SessionLost)?;
        traffic.in_flight.push_back(InFlight { shape, waiter: Some(waiter) });
        credit.forget();
        Ok(answer)
    }

    fn check_limits(&self, batch: &Batch) -> Result<(), DmaError> {
        let over = |limit, asked: u64, allowed: u32| {
            if asked > u64::from(allowed) {
                return Err(DmaError::OverLimit { limit, asked, allowed: u64::from(allowed) });
            }
            Ok(())
        };
        over("batch_operations_max", batch.len() as u64, self.limits.batch_operations_max)?;
        over("batch_bytes_max", batch.bytes(), self.limits.batch_bytes_max)
    }

    /// Takes the answer to the oldest batch in flight. `Err` says which rule the server broke.
    pub(crate) fn completed(&self, answer: pb::DmaCompletions) -> Result<(), String> {
        let oldest = lock(&self.traffic).in_flight.pop_front();
        let Some(InFlight { shape, waiter }) = oldest else {
            return Err(format!("completions with tag {} while no batch is in flight", answer.first_tag));
        };
        let completed = shape.complete(answer).map_err(|broken| broken.to_string())?;
        self.credits.add_permits(1);
        if let Some(waiter) = waiter {
            // Whoever asked may have stopped waiting; that is theirs to decide.
            let _ = waiter.send(Ok(completed));
        }
        Ok(())
    }

    /// A reset was told: everything in flight fails now, and new DMA until [`reset_done`](Self::reset_done).
    pub(crate) fn reset_begun(&self) -> Result<(), String> {
        let mut traffic = lock(&self.traffic);
        traffic.resets += 1;
        traffic.resets_told += 1;
        if traffic.resets > RESETS_MAX {
            return Err(format!("more than {RESETS_MAX} resets unanswered"));
        }
        for batch in &mut traffic.in_flight {
            if let Some(waiter) = batch.waiter.take() {
                let _ = waiter.send(Err(DmaError::Reset));
            }
        }
        Ok(())
    }

    /// The model is as new: DMA may begin again, under the generation that the reset was told with.
    pub(crate) fn reset_done(&self, tag: u64, assignment: Generation) {
        let mut traffic = lock(&self.traffic);
        traffic.resets -= 1;
        traffic.assignment = assignment;
        // A session that closed meanwhile awaits no answer.
        let _ = traffic.send(Up::ResetDone(pb::ResetDone { tag }));
    }

    pub(crate) fn is_resetting(&self) -> bool {
        lock(&self.traffic).resets > 0
    }

    /// Answers a register access. Never waits.
    pub(crate) fn answer_mmio(&self, answer: MmioCompletion) {
        // A session that closed meanwhile awaits no answer.
        let _ = lock(&self.traffic).send(Up::Mmio(answer.into()));
    }

    /// Whether a batch is in flight.
    pub(crate) fn is_quiet(&self) -> bool {
        lock(&self.traffic).in_flight.is_empty()
    }

    /// Takes no new batch; those in flight go on.
    pub(crate) fn stop_admitting(&self) {
        self.credits.close();
    }

    /// Ends the session: what is in flight fails with `SessionLost`, and the stream upward ends.
    pub(crate) fn close(&self) {
        self.credits.close();
        let mut traffic = lock(&self.traffic);
        traffic.outbound = None;
        traffic.in_flight.clear();
    }
}

impl Traffic {
    /// Puts a message on its way. `Err` when the session is closed.
    fn send(&mut self, message: Up) -> Result<(), ()> {
        let outbound = self.outbound.as_ref().ok_or(())?;
        match outbound.try_send(pb::DeviceToServer { message: Some(message) }) {
            Ok(()) => Ok(()),
            Err(mpsc::error::TrySendError::Closed(_)) => Err(()),
            Err(mpsc::error::TrySendError::Full(_)) => {
                self.overrun.cancel();
                Err(())
            }
        }
    }
}

/// A panic while the lock was held left data that is still whole: every critical section is a few pushes.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use iommu_types::Iova;

    fn session(dma_credits: u32) -> (Arc<Session>, mpsc::Receiver<pb::DeviceToServer>) {
        let limits = SessionLimits { dma_credits, batch_operations_max: 16, batch_bytes_max: 4096 };
        let (outbound, messages) = mpsc::channel(OUTBOUND_MAX);
        (Arc::new(Session::new(Generation(1), limits, Generation(1), outbound)), messages)
    }

    fn read(iova: u64) -> Batch {
        let mut batch = Batch::new();
        batch.read(Iova::new(iova), 0);
        batch
    }

    #[test]
    fn a_server_that_asks_without_reading_ends_the_session_and_does_not_panic_the_agent() {
        let (session, _unread) = session(1);
        for tag in 0..=OUTBOUND_MAX as u64 {
            assert!(!session.overrun.is_cancelled(), "{tag} answers have room");
            session.answer_mmio(MmioCompletion { tag, outcome: Ok(0) });
        }
        assert!(session.overrun.is_cancelled());
    }

    #[tokio::test]
    async fn a_server_that_answers_batches_without_reading_them_ends_the_session() {
        let (session, _unread) = session(1);
        for first_tag in 0..OUTBOUND_MAX as u64 {
            let _ticket = session.submit(read(0)).await.expect("a credit");
            session.completed(pb::DmaCompletions { first_tag, ..Default::default() }).expect("it fits");
        }
        assert!(matches!(session.submit(read(0)).await, Err(DmaError::SessionLost)));
        assert!(session.overrun.is_cancelled());
    }

    #[tokio::test]
    async fn a_batch_that_waited_for_its_credit_through_a_reset_is_not_sent_after_it() {
        let (session, _messages) = session(1);
        let before = session.submit(read(1)).await.expect("a credit");
        let waiting = tokio::spawn({
            let session = Arc::clone(&session);
            async move { session.submit(read(2)).await.map(drop) }
        });
        tokio::task::yield_now().await;
        session.reset_begun().expect("the first reset");
        session.reset_done(0, Generation(2));
        session.completed(pb::DmaCompletions::default()).expect("the answer of the first batch");
        assert_eq!(waiting.await.expect("no panic"), Err(DmaError::Reset));
        assert!(matches!(before.await, Ok(Err(DmaError::Reset))));
    }
}
