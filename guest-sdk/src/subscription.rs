//! A subscription that goes on by itself when its connection is lost.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use iommu_proto::errors::WireError;
use iommu_types::errors::CallError;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::Stream;
use tonic::Streaming;

use crate::connection::may_retry;
use crate::error::of_status;
use crate::{SdkError, TransportError};

/// Items that may wait for their reader; a slower one holds up the server's stream, which then counts or
/// merges what it drops.
const WAITING_MAX: usize = 256;
/// Delay between attempts to subscribe again, beyond those of the call itself.
const RETRY_DELAY: Duration = Duration::from_millis(200);

/// A stream of items from the server. Ends after an `Err`; dropping it ends the subscription.
#[derive(Debug)]
pub struct Subscription<T, E> {
    items: mpsc::Receiver<Result<T, SdkError<E>>>,
    pump: JoinHandle<()>,
}

impl<T, E> Subscription<T, E> {
    /// The next item; `None` once an `Err` was given.
    pub async fn next(&mut self) -> Option<Result<T, SdkError<E>>> {
        self.items.recv().await
    }
}

impl<T, E> Stream for Subscription<T, E> {
    type Item = Result<T, SdkError<E>>;
    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.items.poll_recv(context)
    }
}

impl<T, E> Drop for Subscription<T, E> {
    fn drop(&mut self) {
        self.pump.abort();
    }
}

/// What a subscription is fed from.
pub(crate) trait Feed: Send + 'static {
    /// What the server sends.
    type Message: Send + 'static;
    /// What the subscriber gets.
    type Item: Send + 'static;
    /// Why it is refused.
    type Error: WireError + Send + 'static;

    /// Subscribes, from where the feed has come to.
    fn open(
        &mut self,
    ) -> impl Future<Output = Result<Streaming<Self::Message>, SdkError<Self::Error>>> + Send;
    /// The items of a message. `Err` says which rule of the schema it breaks.
    fn items(&mut self, message: Self::Message) -> Result<Vec<Self::Item>, String>;
    /// What to tell the subscriber after a new subscription took the place of a lost one; nothing, unless it
    /// must know.
    fn resumed(&mut self) -> Option<Self::Item> {
        None
    }
}

/// Subscribes and returns once the subscription stands: when its first message has come.
pub(crate) async fn subscribe<F: Feed>(
    mut feed: F,
) -> Result<Subscription<F::Item, F::Error>, SdkError<F::Error>> {
    let (mut stream, first) = stand(&mut feed).await?;
    let (sender, items) = mpsc::channel(WAITING_MAX);
    let pump = tokio::spawn(async move {
        let mut waiting = first;
        loop {
            for item in waiting.drain(..) {
                if sender.send(Ok(item)).await.is_err() {
                    return;
                }
            }
            match next(&mut feed, &mut stream).await {
                Ok(items) => waiting = items,
                Err(error) => {
                    let _ = sender.send(Err(error)).await;
                    return;
                }
            }
        }
    });
    Ok(Subscription { items, pump })
}

async fn stand<F: Feed>(feed: &mut F) -> Result<(Streaming<F::Message>, Vec<F::Item>), SdkError<F::Error>> {
    let mut stream = feed.open().await?;
    match stream.message().await {
        Ok(Some(message)) => {
            let items = feed.items(message).map_err(TransportError::BadAnswer)?;
            Ok((stream, items))
        }
        Ok(None) => Err(TransportError::BadAnswer("the subscription ended at once".into()).into()),
        Err(status) => Err(of_status(&status)),
    }
}

/// Whether a failure to subscribe again is worth another attempt.
pub(crate) fn may_stand_again<E>(error: &SdkError<E>) -> bool {
    matches!(
        error,
        SdkError::Transport(
            TransportError::Deadline { .. }
                | TransportError::Unreachable { .. }
                | TransportError::Status { .. },
        ) | SdkError::Call(
            CallError::ShuttingDown(_)
                | CallError::SessionRequired(_)
                | CallError::CertificateExpired(_)
                | CallError::CertificateRevoked(_)
        )
    )
}

/// The items of the next message; subscribes again for as long as that may help.
async fn next<F: Feed>(
    feed: &mut F,
    stream: &mut Streaming<F::Message>,
) -> Result<Vec<F::Item>, SdkError<F::Error>> {
    match stream.message().await {
        Ok(Some(message)) => return Ok(feed.items(message).map_err(TransportError::BadAnswer)?),
        Ok(None) => {}
        Err(status) if may_retry(&status) => {}
        Err(status) => return Err(of_status(&status)),
    }
    loop {
        tokio::time::sleep(RETRY_DELAY).await;
        match stand(feed).await {
            Ok((again, first)) => {
                *stream = again;
                return Ok(feed.resumed().into_iter().chain(first).collect());
            }
            Err(error) if may_stand_again(&error) => {}
            Err(error) => return Err(error),
        }
    }
}
