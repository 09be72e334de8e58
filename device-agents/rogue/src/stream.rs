//! A device stream as it is: messages up in any order, and answers matched to batches by their order.
//!
//! Whoever submits puts a waiter into the queue and its message into the channel under one lock, so both have the same order whoever else
//! submits at that time.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use iommu_proto::channel::{Dial, DialError, Dialled};
use iommu_proto::credentials::{CredentialError, Credentials};
use iommu_proto::errors::reason_of;
use iommu_proto::pb;
use iommu_proto::pb::device_service_client::DeviceServiceClient;
use iommu_proto::pb::device_to_server::Message as Up;
use iommu_proto::pb::server_to_device::Message as Down;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use crate::bounds::{ANSWER_DEADLINE, IN_FLIGHT_MAX, MESSAGE_BYTES_MAX};
use crate::language::{Connect, End};
use crate::peer::Peer;

/// How soon a full channel is tried again.
const FULL_AGAIN: Duration = Duration::from_micros(200);

/// Answers to come, and where messages go.
#[derive(Debug)]
struct Traffic {
    waiting: VecDeque<oneshot::Sender<pb::DmaCompletions>>,
    up: Option<mpsc::Sender<pb::DeviceToServer>>,
}

/// What the reader shares with those who submit.
#[derive(Debug)]
pub(crate) struct Shared {
    traffic: Mutex<Traffic>,
    pub(crate) peer: Mutex<Peer>,
    ended: watch::Sender<Option<End>>,
    pub(crate) reading: watch::Sender<bool>,
}

/// A stream that stands, or stood.
#[derive(Debug)]
pub struct Stream {
    shared: Arc<Shared>,
    /// What the server said first.
    pub welcome: pb::Welcome,
    reader: tokio::task::JoinHandle<()>,
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.reader.abort();
        lock(&self.shared.traffic).up = None;
    }
}

/// A panic while a lock was held left values that are still whole: every critical section is a few moves.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn end_of(status: &Status) -> End {
    End {
        reason: reason_of(status).unwrap_or_else(|| "CONNECTION".to_owned()),
        message: format!("{:?}: {}", status.code(), status.message()),
    }
}

/// The Hello that a command asks for.
pub(crate) fn hello(connect: &Connect) -> pb::Hello {
    pb::Hello {
        schema_version: connect.schema_version,
        name: connect.name.clone(),
        address: Some(pb::DeviceAddress {
            segment: connect.address.segment.into(),
            source_id: connect.address.source_id.get().into(),
        }),
        mmio_credits: connect.mmio_credits,
    }
}

impl Stream {
    /// Says Hello and waits for Welcome.
    pub async fn open(
        server: &str,
        credentials: &Credentials,
        connect: &Connect,
        peer: Peer,
    ) -> Result<Self, End> {
        let opening = Self::shake_hands(server, credentials, connect, peer);
        tokio::time::timeout(ANSWER_DEADLINE, opening).await.unwrap_or_else(|_| {
            Err(End {
                reason: "CONNECTION".into(),
                message: format!("no Welcome within {ANSWER_DEADLINE:?}"),
            })
        })
    }

    async fn shake_hands(
        server: &str,
        credentials: &Credentials,
        connect: &Connect,
        mut peer: Peer,
    ) -> Result<Self, End> {
        let broken = |message: String| End { reason: "CONNECTION".into(), message };
        let untrusted =
            |error: CredentialError| End { reason: "CREDENTIAL".into(), message: error.to_string() };
        let dial = Dial::to(server, credentials, &connect.shown()).map_err(|bad| broken(bad.to_string()))?;
        let Dialled { channel, trouble } = dial.connect().await.map_err(|error| match error {
            DialError::Credential(error) => untrusted(error),
            DialError::Unreachable(why) => broken(why),
        })?;
        // In TLS 1.3 a refusal of the certificate comes with the first answer.
        let refused = |status: Status| trouble.take().map_or_else(|| end_of(&status), untrusted);
        let mut client = DeviceServiceClient::new(channel)
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        let (up, messages) = mpsc::channel(IN_FLIGHT_MAX);
        let first = pb::DeviceToServer { message: Some(Up::Hello(hello(connect))) };
        up.try_send(first).map_err(|_| broken("a new channel is full".into()))?;
        let attached = client.attach(ReceiverStream::new(messages)).await.map_err(refused)?;
        let mut inbound = attached.into_inner();
        let welcome = match inbound.message().await.map_err(refused)?.and_then(|first| first.message) {
            Some(Down::Welcome(welcome)) => welcome,
            other => return Err(broken(format!("Welcome was due, not {other:?}"))),
        };
        peer.status.assignment_generation = welcome.assignment_generation;
        peer.status.connected = true;
        let shared = Arc::new(Shared::new(up, peer));
        let reader = tokio::spawn(read(Arc::clone(&shared), inbound));
        Ok(Self { shared, welcome, reader })
    }

    pub(crate) fn shared(&self) -> Arc<Shared> {
        Arc::clone(&self.shared)
    }

    pub(crate) fn peer(&self) -> MutexGuard<'_, Peer> {
        lock(&self.shared.peer)
    }
}

impl Shared {
    fn new(up: mpsc::Sender<pb::DeviceToServer>, peer: Peer) -> Self {
        Self {
            traffic: Mutex::new(Traffic { waiting: VecDeque::new(), up: Some(up) }),
            peer: Mutex::new(peer),
            ended: watch::Sender::new(None),
            reading: watch::Sender::new(true),
        }
    }

    /// Sends a batch; the answer comes later.
    pub(crate) async fn submit(
        &self,
        batch: pb::DmaBatch,
    ) -> Result<oneshot::Receiver<pb::DmaCompletions>, End> {
        let (waiter, answer) = oneshot::channel();
        self.put(Up::Dma(batch), Some(waiter)).await?;
        Ok(answer)
    }

    /// Sends a message that no answer comes to.
    pub(crate) async fn tell(&self, message: Up) -> Result<(), End> {
        self.put(message, None).await
    }

    /// Gives up where a server that does not read leaves no room for so long.
    async fn put(&self, message: Up, waiter: Option<oneshot::Sender<pb::DmaCompletions>>) -> Result<(), End> {
        let mut unsent = Some((message, waiter));
        let give_up = Instant::now() + ANSWER_DEADLINE;
        while self.try_put(&mut unsent).is_some() {
            if unsent.is_none() {
                return Ok(());
            }
            if Instant::now() >= give_up {
                let message = format!("no room for a message within {ANSWER_DEADLINE:?}");
                return Err(End { reason: "NO_ANSWER".into(), message });
            }
            tokio::time::sleep(FULL_AGAIN).await;
        }
        Err(self.end().await)
    }

    /// Takes what is to be sent when there is room for it. `None` when the stream is over.
    fn try_put(&self, unsent: &mut Option<(Up, Option<oneshot::Sender<pb::DmaCompletions>>)>) -> Option<()> {
        let mut traffic = lock(&self.traffic);
        let room = match traffic.up.as_ref()?.try_reserve() {
            Ok(room) => room,
            Err(mpsc::error::TrySendError::Closed(())) => return None,
            Err(mpsc::error::TrySendError::Full(())) => return Some(()),
        };
        if let Some((message, waiter)) = unsent.take() {
            room.send(pb::DeviceToServer { message: Some(message) });
            traffic.waiting.extend(waiter);
        }
        Some(())
    }

    /// Waits for the answer to a batch.
    pub(crate) async fn answer(
        &self,
        answer: oneshot::Receiver<pb::DmaCompletions>,
    ) -> Result<pb::DmaCompletions, End> {
        match tokio::time::timeout(ANSWER_DEADLINE, answer).await {
            Ok(Ok(completions)) => Ok(completions),
            Ok(Err(_)) => Err(self.end().await),
            Err(_) => {
                Err(End { reason: "NO_ANSWER".into(), message: format!("none within {ANSWER_DEADLINE:?}") })
            }
        }
    }

    /// How the stream ended; asked when it did, or is about to be told.
    async fn end(&self) -> End {
        let mut ended = self.ended.subscribe();
        let waited = tokio::time::timeout(ANSWER_DEADLINE, ended.wait_for(Option::is_some)).await;
        let told = waited.ok().and_then(Result::ok).and_then(|end| end.clone());
        told.unwrap_or_else(|| End {
            reason: "CLOSED".into(),
            message: "the stream ended without a word".into(),
        })
    }

    /// Waits until the stream ends, at most for `patience`.
    pub(crate) async fn end_within(&self, patience: Duration) -> Option<End> {
        let mut ended = self.ended.subscribe();
        let waited = tokio::time::timeout(patience, ended.wait_for(Option::is_some)).await;
        waited.ok().and_then(Result::ok).and_then(|end| end.clone())
    }
}

/// Reads the stream until it ends, as far as it is told to read.
async fn read(shared: Arc<Shared>, mut inbound: Streaming<pb::ServerToDevice>) {
    let mut reading = shared.reading.subscribe();
    let end = loop {
        if reading.wait_for(|reading| *reading).await.is_err() {
            break End { reason: "CLOSED".into(), message: "dropped".into() };
        }
        match inbound.message().await {
            Ok(Some(message)) => take(&shared, message.message).await,
            Ok(None) => break End { reason: "CLOSED".into(), message: "the server ended the stream".into() },
            Err(status) => break end_of(&status),
        }
    };
    {
        let mut peer = lock(&shared.peer);
        peer.status.connected = false;
        peer.status.ended = Some(end.clone());
    }
    shared.ended.send_replace(Some(end));
    let mut traffic = lock(&shared.traffic);
    traffic.up = None;
    traffic.waiting.clear();
}

async fn take(shared: &Shared, message: Option<Down>) {
    if let Some(Down::Dma(completions)) = message {
        let waiter = lock(&shared.traffic).waiting.pop_front();
        if let Some(waiter) = waiter {
            // Whoever asked may have given up.
            let _ = waiter.send(completions);
        }
        return;
    }
    let answer = message.and_then(|message| lock(&shared.peer).told(message));
    if let Some(answer) = answer {
        // A stream that is over awaits no answer.
        let _ = shared.tell(answer).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_server_that_does_not_read_is_not_waited_for_for_ever() {
        let (up, mut messages) = mpsc::channel(1);
        let shared = Shared::new(up, Peer::default());
        let message = || Up::ResetDone(pb::ResetDone { tag: 1 });
        shared.tell(message()).await.expect("there is room for one");
        let waited = tokio::time::timeout(ANSWER_DEADLINE * 2, shared.tell(message())).await;
        let end = waited.expect("it has a deadline").expect_err("there is no room");
        assert_eq!(end.reason, "NO_ANSWER");
        // What was given up is not sent later.
        drop(shared);
        assert!(messages.recv().await.is_some() && messages.recv().await.is_none());
    }
}
