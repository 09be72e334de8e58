//! Makes retries safe: a repeated request is answered with the first answer and does nothing again.
//!
//! The window is bounded twice, in requests and in bytes of answers, and moves up when the client acknowledges answers or when it is
//! full. An ID below the window is refused, because its outcome is no longer known. A request in flight is waited for.

use std::any::Any;
use std::collections::BTreeMap;
use std::future::Future;
use std::hash::{BuildHasher, RandomState};
use std::marker::PhantomData;
use std::sync::Arc;

use iommu_proto::errors::WireError;
use iommu_proto::model::RequestHeader;
use iommu_types::RequestId;
use iommu_types::errors::{RequestReused, RequestTooOld};
use parking_lot::Mutex;
use prost::Message;
use tokio::sync::Notify;
use tonic::Status;

use crate::bounds;

type Answer = Arc<dyn Any + Send + Sync>;

#[derive(Debug)]
enum Entry {
    InFlight { digest: u64 },
    Done { digest: u64, answer: Answer, bytes: usize },
}

#[derive(Debug, Default)]
struct Window {
    entries: BTreeMap<u64, Entry>,
    /// IDs below are forgotten.
    oldest: u64,
    bytes: usize,
}

/// The answers of one session identity.
#[derive(Debug, Default)]
pub struct Replay {
    window: Mutex<Window>,
    finished: Notify,
    digests: RandomState,
}

/// What a mutating request says about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestName {
    /// Its number.
    pub id: RequestId,
    /// Answers up to here are not asked for again.
    pub acknowledged_through: u64,
    /// What it asks, so that a different request with the same number is noticed.
    pub digest: u64,
}

impl RequestName {
    /// From the header of a request and its digest.
    pub fn new(header: RequestHeader, digest: u64) -> Self {
        Self { id: header.request_id, acknowledged_through: header.acknowledged_through.0, digest }
    }
}

/// What to do with a request.
pub enum Verdict {
    /// Carry it out as one that is [`Underway`].
    First,
    /// It was answered before.
    Again(Answer),
    /// It is being carried out; ask again after [`Replay::settled`].
    InFlight,
}

impl Replay {
    /// A digest of what a request asks: of the message without its header.
    pub fn digest<M: Message>(&self, method: &'static str, rest: &M) -> u64 {
        self.digests.hash_one((method, rest.encode_to_vec()))
    }

    /// Judges a request and, when it is the first of its number, marks it as in flight.
    pub fn begin(&self, name: RequestName) -> Result<Verdict, Status> {
        let mut window = self.window.lock();
        window.acknowledge(name.acknowledged_through);
        let id = name.id.0;
        if let Some(entry) = window.entries.get(&id) {
            let (Entry::InFlight { digest } | Entry::Done { digest, .. }) = entry;
            if *digest != name.digest {
                return Err(RequestReused { request_id: id }.into_status());
            }
            return Ok(match entry {
                Entry::InFlight { .. } => Verdict::InFlight,
                Entry::Done { answer, .. } => Verdict::Again(Arc::clone(answer)),
            });
        }
        if id < window.oldest {
            return Err(RequestTooOld { request_id: id, oldest: window.oldest }.into_status());
        }
        window.entries.insert(id, Entry::InFlight { digest: name.digest });
        window.trim();
        Ok(Verdict::First)
    }

    /// Remembers the answer of a request that began.
    fn finish(&self, name: RequestName, answer: Answer, bytes: usize) {
        {
            let mut window = self.window.lock();
            // Acknowledged or pushed out while it was carried out: nobody will ask again.
            if let Some(entry) = window.entries.get_mut(&name.id.0) {
                *entry = Entry::Done { digest: name.digest, answer, bytes };
                window.bytes += bytes;
                window.trim();
            }
        }
        self.finished.notify_waiters();
    }

    /// Forgets a request that began and was not carried out.
    fn abandon(&self, name: RequestName) {
        self.window.lock().entries.remove(&name.id.0);
        self.finished.notify_waiters();
    }

    /// Carries `operation` out once per request, in a task of its own: a call that is cancelled does not cancel it. Whether it may `begin` matters for the first of
    /// its number alone: who asks again is told what came of it.
    pub async fn once<M, B, F>(
        self: &Arc<Self>,
        name: RequestName,
        begin: Result<B, Status>,
        operation: impl FnOnce(B) -> F,
    ) -> Result<M, Status>
    where
        M: Message + Clone + 'static,
        F: Future<Output = Result<M, Status>> + Send + 'static,
    {
        loop {
            let finished = self.finished.notified();
            tokio::pin!(finished);
            finished.as_mut().enable();
            match self.begin(name)? {
                Verdict::First => break,
                Verdict::Again(answer) => return recalled(&answer),
                Verdict::InFlight => finished.await,
            }
        }
        let underway = Underway::new(self, name);
        let operation = match begin {
            Ok(begin) => operation(begin),
            Err(refused) => {
                underway.abandon();
                return Err(refused);
            }
        };
        let carried_out = tokio::spawn(async move { underway.answered(operation.await) });
        match carried_out.await {
            Ok(result) => result,
            // Told as whoever asks again will be.
            Err(_) => match self.begin(name)? {
                Verdict::Again(answer) => recalled(&answer),
                Verdict::First | Verdict::InFlight => {
                    Err(crate::services::internal("a request that ended early was forgotten"))
                }
            },
        }
    }

    /// Waits for `begin` to say something else than [`Verdict::InFlight`].
    pub async fn settled(&self, name: RequestName) {
        loop {
            let finished = self.finished.notified();
            tokio::pin!(finished);
            finished.as_mut().enable();
            let in_flight =
                matches!(self.window.lock().entries.get(&name.id.0), Some(Entry::InFlight { .. }));
            if !in_flight {
                return;
            }
            finished.await;
        }
    }
}

/// A request that began. Its answer is remembered, and that there is none where its task panicked, so that nobody waits for it for ever.
#[derive(Debug)]
pub struct Underway<M: Message + Clone + 'static> {
    replay: Arc<Replay>,
    name: RequestName,
    is_over: bool,
    answer: PhantomData<fn() -> M>,
}

impl<M: Message + Clone + 'static> Underway<M> {
    /// After [`Verdict::First`].
    pub fn new(replay: &Arc<Replay>, name: RequestName) -> Self {
        Self { replay: Arc::clone(replay), name, is_over: false, answer: PhantomData }
    }
    /// Remembers what came of it, and gives it back.
    pub fn answered(mut self, answer: Result<M, Status>) -> Result<M, Status> {
        self.remember(answer.clone());
        answer
    }
    /// It was not carried out, and may be asked for again.
    pub fn abandon(mut self) {
        self.is_over = true;
        self.replay.abandon(self.name);
    }
    fn remember(&mut self, answer: Result<M, Status>) {
        self.is_over = true;
        let bytes = answer.as_ref().map_or(256, |message| message.encoded_len() + 64);
        self.replay.finish(self.name, Arc::new(answer), bytes);
    }
}

impl<M: Message + Clone + 'static> Drop for Underway<M> {
    fn drop(&mut self) {
        if !self.is_over {
            self.remember(Err(crate::services::internal("a request's task ended early")));
        }
    }
}

/// The answer that was given before.
pub fn recalled<M: Clone + 'static>(answer: &Answer) -> Result<M, Status> {
    match answer.downcast_ref::<Result<M, Status>>() {
        Some(result) => result.clone(),
        // The digest covers the method, so this needs a collision of 64 bits.
        None => Err(crate::services::internal("a remembered answer is of another kind")),
    }
}

impl Window {
    fn acknowledge(&mut self, through: u64) {
        while let Some(entry) = self.entries.first_entry() {
            if *entry.key() > through || matches!(entry.get(), Entry::InFlight { .. }) {
                return;
            }
            let id = *entry.key();
            self.forget(id);
        }
    }
    /// Keeps both bounds. A request in flight is never forgotten, because its answer is still to be recorded; of those there are no more than
    /// [`bounds::CHANGES_PER_TENANCY_MAX`].
    fn trim(&mut self) {
        while self.entries.len() > bounds::REQUEST_WINDOW
            || (self.bytes > bounds::REPLAY_BYTES_MAX && self.entries.len() > 1)
        {
            let done = self.entries.iter().find(|(_, entry)| matches!(entry, Entry::Done { .. }));
            let Some(id) = done.map(|(id, _)| *id) else { return };
            self.forget(id);
        }
    }
    fn forget(&mut self, id: u64) {
        if let Some(Entry::Done { bytes, .. }) = self.entries.remove(&id) {
            self.bytes -= bytes;
        }
        self.oldest = self.oldest.max(id.saturating_add(1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(id: u64, acknowledged_through: u64, digest: u64) -> RequestName {
        RequestName { id: RequestId(id), acknowledged_through, digest }
    }
    fn answer(value: u64) -> Answer {
        Arc::new(value)
    }
    fn first(replay: &Replay, id: u64) {
        let name = name(id, 0, 7);
        assert!(matches!(replay.begin(name).unwrap(), Verdict::First));
        replay.finish(name, answer(id), 8);
    }
    fn reason(result: Result<Verdict, Status>) -> String {
        iommu_proto::errors::reason_of(&result.err().expect("must be refused")).unwrap()
    }

    #[test]
    fn the_same_request_is_answered_again_and_not_carried_out() {
        let replay = Replay::default();
        first(&replay, 5);
        let Verdict::Again(answer) = replay.begin(name(5, 0, 7)).unwrap() else {
            panic!("must be remembered")
        };
        assert_eq!(answer.downcast_ref(), Some(&5_u64));
    }
    #[test]
    fn another_request_with_the_same_number_is_refused() {
        let replay = Replay::default();
        first(&replay, 5);
        assert_eq!(reason(replay.begin(name(5, 0, 8))), "REQUEST_REUSED");
    }
    #[test]
    fn an_acknowledged_request_is_too_old() {
        let replay = Replay::default();
        first(&replay, 5);
        assert!(matches!(replay.begin(name(6, 5, 7)).unwrap(), Verdict::First));
        assert_eq!(reason(replay.begin(name(5, 5, 7))), "REQUEST_TOO_OLD");
    }
    #[test]
    fn i7_the_window_is_bounded_in_requests() {
        let replay = Replay::default();
        for id in 1..=2 * bounds::REQUEST_WINDOW as u64 {
            first(&replay, id);
        }
        assert_eq!(replay.window.lock().entries.len(), bounds::REQUEST_WINDOW);
        assert_eq!(reason(replay.begin(name(1, 0, 7))), "REQUEST_TOO_OLD");
    }
    #[test]
    fn i7_the_window_is_bounded_in_bytes() {
        let replay = Replay::default();
        for id in 1..=10 {
            let name = name(id, 0, 7);
            assert!(matches!(replay.begin(name).unwrap(), Verdict::First));
            replay.finish(name, answer(id), bounds::REPLAY_BYTES_MAX / 2);
        }
        assert!(replay.window.lock().bytes <= bounds::REPLAY_BYTES_MAX);
    }
    #[tokio::test]
    async fn a_duplicate_in_flight_waits_for_the_first() {
        let replay = Arc::new(Replay::default());
        let name = name(1, 0, 7);
        let (go, gone) = tokio::sync::oneshot::channel::<()>();
        let slow = replay.once(name, Ok(()), |()| async move {
            let _ = gone.await;
            Ok(iommu_proto::pb::DmaMapResponse { iova: 0x1000 })
        });
        let again =
            replay.once(name, Ok(()), |()| async { Ok(iommu_proto::pb::DmaMapResponse { iova: 0x2000 }) });
        let (slow, again, ()) = tokio::join!(slow, again, async { go.send(()).unwrap() });
        assert_eq!((slow.unwrap().iova, again.unwrap().iova), (0x1000, 0x1000));
    }
    #[tokio::test]
    async fn a_request_that_panicked_is_answered_and_so_is_its_duplicate() {
        let replay = Arc::new(Replay::default());
        let name = name(1, 0, 7);
        async fn panics() -> Result<iommu_proto::pb::DmaMapResponse, Status> {
            panic!("on purpose")
        }
        let panics = replay.once(name, Ok(()), |()| panics());
        let again =
            replay.once(name, Ok(()), |()| async { Ok(iommu_proto::pb::DmaMapResponse { iova: 0x2000 }) });
        let soon = std::time::Duration::from_secs(10);
        let both = tokio::time::timeout(soon, async { tokio::join!(panics, again) });
        let (first, again) = both.await.expect("nobody waits for ever");
        let (first, again) = (first.expect_err("it panicked"), again.expect_err("it is not done again"));
        assert_eq!(first.code(), tonic::Code::Internal);
        assert_eq!(first.message(), again.message(), "the same answer");
    }
    #[tokio::test]
    async fn what_may_not_begin_is_not_remembered_and_what_was_done_is_told_all_the_same() {
        let replay = Arc::new(Replay::default());
        let ask = |begin: Result<(), Status>| {
            let name = name(1, 0, 7);
            replay.once(name, begin, |()| async { Ok(iommu_proto::pb::DmaMapResponse { iova: 0x1000 }) })
        };
        let full = || Err(Status::resource_exhausted("full"));
        assert_eq!(ask(full()).await.expect_err("it may not begin").code(), tonic::Code::ResourceExhausted);
        assert_eq!(ask(Ok(())).await.expect("it is the first").iova, 0x1000);
        assert_eq!(ask(full()).await.expect("it was done").iova, 0x1000);
    }
}
