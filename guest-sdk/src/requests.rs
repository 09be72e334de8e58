//! Request IDs: monotonic, acknowledged in order, never further ahead than the server remembers; and the calls that have one.

use std::collections::BTreeSet;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use iommu_proto::errors::WireError;
use iommu_proto::model::RequestHeader;
use iommu_types::RequestId;
use tokio::sync::Notify;
use tonic::transport::Channel;
use tonic::{Request, Response, Status};

use crate::connection::{Core, within};
use crate::{SdkError, TransportError};

/// The request IDs of one session identity.
#[derive(Debug)]
pub(crate) struct Requests {
    window: u64,
    state: Mutex<State>,
    ended: Notify,
}

#[derive(Debug)]
struct State {
    last: u64,
    /// All IDs up to this one have ended.
    acknowledged_through: u64,
    /// Ended ones above it.
    ended: BTreeSet<u64>,
}

impl Requests {
    pub(crate) fn new(window: u32) -> Arc<Self> {
        Self::after(0, window)
    }

    /// Those of an identity that has used all IDs up to `last` before, and asks for none of their answers again.
    pub(crate) fn after(last: u64, window: u32) -> Arc<Self> {
        let state = State { last, acknowledged_through: last, ended: BTreeSet::new() };
        Arc::new(Self { window: u64::from(window.max(1)), state: Mutex::new(state), ended: Notify::new() })
    }

    /// Takes the next ID; waits while the server would have to remember more than its window.
    pub(crate) async fn begin(self: &Arc<Self>) -> RequestInFlight {
        loop {
            let ended = self.ended.notified();
            {
                let mut state = self.lock();
                if state.last - state.acknowledged_through < self.window {
                    state.last += 1;
                    return RequestInFlight { id: state.last, requests: Arc::clone(self) };
                }
            }
            ended.await;
        }
    }

    /// A mutating call: one request ID for all of its attempts. The server may take `longer` than the deadline of a call, where it is asked
    /// to wait for something.
    pub(crate) async fn call<E, M, T, F, A>(
        self: &Arc<Self>,
        core: &Core,
        longer: Duration,
        message: impl Fn(RequestHeader) -> M,
        method: F,
    ) -> Result<T, SdkError<E>>
    where
        E: WireError,
        F: Fn(Channel, Request<M>) -> A,
        A: Future<Output = Result<Response<T>, Status>>,
    {
        let waited = core.deadline();
        let request = tokio::time::timeout(waited, self.begin()).await.map_err(|_| {
            let last = Some("the server's window is full of requests without an answer".to_owned());
            TransportError::Deadline { waited, last }
        })?;
        let deadline = waited.saturating_add(longer);
        core.call_within(deadline, |channel| method(channel, within(deadline, message(request.header()))))
            .await
    }

    /// The last ID that was used.
    pub(crate) fn last(&self) -> u64 {
        self.lock().last
    }

    fn acknowledged_through(&self) -> u64 {
        self.lock().acknowledged_through
    }

    fn end(&self, id: u64) {
        {
            let mut state = self.lock();
            state.ended.insert(id);
            while state.ended.first().is_some_and(|&first| first == state.acknowledged_through + 1) {
                state.ended.pop_first();
                state.acknowledged_through += 1;
            }
        }
        self.ended.notify_waiters();
    }

    /// A panic while the lock was held leaves a state that is still whole.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A request that has an ID. Once dropped it is never sent again, so the server may forget it.
#[derive(Debug)]
pub(crate) struct RequestInFlight {
    id: u64,
    requests: Arc<Requests>,
}

impl RequestInFlight {
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    /// The header of every attempt; the ID is the same in all of them.
    pub(crate) fn header(&self) -> RequestHeader {
        RequestHeader {
            request_id: RequestId(self.id),
            acknowledged_through: RequestId(self.requests.acknowledged_through()),
        }
    }
}

impl Drop for RequestInFlight {
    fn drop(&mut self) {
        self.requests.end(self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_watermark_stops_at_the_oldest_request_that_is_not_answered() {
        let requests = Requests::new(8);
        let (first, second, third) = (requests.begin().await, requests.begin().await, requests.begin().await);
        assert_eq!((first.id(), second.id(), third.id()), (1, 2, 3));
        drop(second);
        drop(third);
        assert_eq!(requests.acknowledged_through(), 0);
        drop(first);
        assert_eq!(requests.acknowledged_through(), 3);
        let header = requests.begin().await.header();
        assert_eq!((header.request_id, header.acknowledged_through), (RequestId(4), RequestId(3)));
    }

    #[tokio::test]
    async fn a_full_window_waits_for_the_oldest_request() {
        let requests = Requests::new(2);
        let (first, second) = (requests.begin().await, requests.begin().await);
        drop(second);
        let next = tokio::spawn({
            let requests = Arc::clone(&requests);
            async move { requests.begin().await.id() }
        });
        tokio::task::yield_now().await;
        assert!(!next.is_finished(), "the window of 2 above 0 is full");
        drop(first);
        assert_eq!(next.await.unwrap(), 3);
    }
}
