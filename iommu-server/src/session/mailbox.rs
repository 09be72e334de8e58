//! What the server has for a device, until its stream takes it: MMIO requests and resets. DMA completions never come here.
//!
//! Bounded by the device's MMIO credits and one reset, so it never grows with what guests or devices do (I7).

use std::collections::VecDeque;
use std::task::{Context, Poll, Waker};

use iommu_proto::pb;
use parking_lot::Mutex;

#[derive(Debug, Default)]
struct Inner {
    messages: VecDeque<pb::server_to_device::Message>,
    waker: Option<Waker>,
}

/// A queue with one reader, the session's stream.
#[derive(Debug, Default)]
pub(crate) struct Mailbox {
    inner: Mutex<Inner>,
}

impl Mailbox {
    /// Adds a message. The caller keeps the bound: it holds a credit for what it adds.
    pub(crate) fn push(&self, message: pb::server_to_device::Message) {
        let waker = {
            let mut inner = self.inner.lock();
            inner.messages.push_back(message);
            inner.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }
    /// Takes an MMIO request back that was not sent yet.
    pub(crate) fn withdraw_mmio(&self, tag: u64) -> bool {
        let mut inner = self.inner.lock();
        let before = inner.messages.len();
        inner.messages.retain(
            |message| !matches!(message, pb::server_to_device::Message::Mmio(request) if request.tag == tag),
        );
        inner.messages.len() < before
    }
    /// Takes back every reset that was not sent yet: the one to come covers it.
    pub(crate) fn withdraw_resets(&self) {
        self.inner
            .lock()
            .messages
            .retain(|message| !matches!(message, pb::server_to_device::Message::Reset(_)));
    }
    /// The next message; when there is none, the reader is woken by the next one.
    pub(crate) fn poll_take(&self, context: &Context<'_>) -> Poll<pb::server_to_device::Message> {
        let mut inner = self.inner.lock();
        if let Some(message) = inner.messages.pop_front() {
            return Poll::Ready(message);
        }
        if !inner.waker.as_ref().is_some_and(|waker| waker.will_wake(context.waker())) {
            inner.waker = Some(context.waker().clone());
        }
        Poll::Pending
    }
    /// Wakes the reader for another reason, such as the end of the session.
    pub(crate) fn wake(&self) {
        if let Some(waker) = self.inner.lock().waker.take() {
            waker.wake();
        }
    }
    /// Whether something waits to be sent.
    pub(crate) fn is_waiting(&self) -> bool {
        !self.inner.lock().messages.is_empty()
    }
}
