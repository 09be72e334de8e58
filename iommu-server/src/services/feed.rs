//! Response streams that are not on the data path: a task makes messages, a bounded channel carries them, and the session's end, the
//! server's end or a reader that does not read ends them with a typed status.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures_core::Stream;
use tokio::sync::{mpsc, watch};
use tonic::Status;

use super::Caller;
use crate::bounds;
use crate::connection::WatcherPlace;
use crate::ending::{EndSignal, Ending};
use crate::host::Host;

/// A response stream.
pub struct Feed<T> {
    messages: mpsc::Receiver<Result<T, Status>>,
    end: Pin<Box<dyn Future<Output = Ending> + Send>>,
    over: bool,
    _place: Option<WatcherPlace>,
}

/// Where the task puts its messages.
pub struct FeedSender<T> {
    messages: mpsc::Sender<Result<T, Status>>,
    stalled: EndSignal,
    caller: Caller,
    patience: std::time::Duration,
}

/// The reader is gone, or does not read: stop making messages.
#[derive(Debug)]
pub struct ReaderGone;

impl<T> FeedSender<T> {
    /// Sends one message.
    pub async fn send(&self, message: Result<T, Status>) -> Result<(), ReaderGone> {
        match tokio::time::timeout(self.patience, self.messages.send(message)).await {
            Ok(sent) => sent.map_err(|_| ReaderGone),
            Err(_) => {
                let stalled_ms = self.patience.as_millis() as u64;
                self.stalled.end(Ending::Stalled { stalled_ms });
                tokio::time::sleep(bounds::ENDING_GRACE).await;
                if !self.messages.is_closed() {
                    // It does not even read why its stream ended.
                    self.caller.connection.cut();
                }
                Err(ReaderGone)
            }
        }
    }
    /// Resolves when nobody reads any more.
    pub async fn closed(&self) {
        self.messages.closed().await;
    }
}

/// Waits until a bell rings, at least [`bounds::FEED_SPACING`] after the message before; false when it is gone.
pub async fn rung(bell: &mut watch::Receiver<u64>) -> bool {
    tokio::time::sleep(bounds::FEED_SPACING).await;
    bell.changed().await.is_ok()
}

/// Starts a stream whose messages `produce` makes, in a task of its own that ends when the reader does.
pub fn feed<T, F>(
    host: &Host,
    caller: &Caller,
    place: Option<WatcherPlace>,
    produce: impl FnOnce(FeedSender<T>) -> F,
) -> Feed<T>
where
    T: Send + 'static,
    F: Future<Output = Result<(), ReaderGone>> + Send + 'static,
{
    let (sender, messages) = mpsc::channel(bounds::FEED_DEPTH);
    let stalled = EndSignal::new();
    let end = {
        let (session, shutdown) = (caller.session.end.wait_owned(), host.shutdown.wait_owned());
        let stalled = stalled.wait_owned();
        async move {
            tokio::select! {
                ending = session => ending,
                ending = shutdown => ending,
                ending = stalled => ending,
            }
        }
    };
    let closing = sender.clone();
    let patience = host.config.stream_stalled;
    let produced = produce(FeedSender { messages: sender, stalled, caller: caller.clone(), patience });
    tokio::spawn(async move {
        tokio::select! {
            // A reader that is gone needs no telling.
            _ = produced => {}
            () = closing.closed() => {}
        }
    });
    Feed { messages, end: Box::pin(end), over: false, _place: place }
}

impl<T> Stream for Feed<T> {
    type Item = Result<T, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.over {
            return Poll::Ready(None);
        }
        if let Poll::Ready(ending) = self.end.as_mut().poll(context) {
            self.over = true;
            self.messages.close();
            return Poll::Ready(Some(Err(ending.into_status())));
        }
        let next = self.messages.poll_recv(context);
        if let Poll::Ready(None | Some(Err(_))) = next {
            self.over = true;
        }
        next
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn i7_who_watches_an_endless_bell_is_told_so_often_and_of_a_single_ring_at_once() {
        let bell = watch::Sender::new(0_u64);
        let mut heard = bell.subscribe();
        let watcher = tokio::spawn(async move {
            let mut rings = 0_u32;
            while rung(&mut heard).await {
                rings += 1;
            }
            rings
        });
        tokio::time::sleep(2 * bounds::FEED_SPACING).await;
        let for_each = Duration::from_millis(1);
        let rung_times = 100 * bounds::FEED_SPACING.as_millis();
        for _ in 0..rung_times {
            bell.send_modify(|count| *count += 1);
            tokio::time::sleep(for_each).await;
        }
        drop(bell);
        let rings = watcher.await.expect("it ends with the bell");
        assert!((99..=101).contains(&rings), "{rings} of {rung_times}");

        let bell = watch::Sender::new(0_u64);
        let mut heard = bell.subscribe();
        let watcher = tokio::spawn(async move { rung(&mut heard).await });
        tokio::time::sleep(2 * bounds::FEED_SPACING).await;
        let begun = tokio::time::Instant::now();
        bell.send_modify(|count| *count += 1);
        assert!(watcher.await.expect("it was rung"));
        assert_eq!(begun.elapsed(), Duration::ZERO);
    }
}
