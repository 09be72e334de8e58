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

/// What a look at a log found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look<T> {
    /// Nothing new.
    Nothing,
    /// Something new that this reader does not want.
    Unwanted,
    /// A message.
    New(T),
}

/// Tells of a log whose bell rings when something is filed. What comes after a while of quiet is told at once, what comes in quick succession together: there
/// is a look every [`bounds::FEED_SPACING`] at most, whether it finds something for this reader or not.
pub async fn follow<T, F>(
    mut bell: watch::Receiver<u64>,
    mut look: impl FnMut() -> Look<T>,
    tell: impl Fn(T) -> F,
) -> Result<(), ReaderGone>
where
    F: Future<Output = Result<(), ReaderGone>>,
{
    loop {
        let is_quiet = match look() {
            Look::New(message) => {
                tell(message).await?;
                false
            }
            Look::Unwanted => false,
            Look::Nothing => true,
        };
        tokio::time::sleep(bounds::FEED_SPACING).await;
        if is_quiet && bell.changed().await.is_err() {
            return Ok(());
        }
    }
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
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::Duration;

    use super::*;

    const MILLISECOND: Duration = Duration::from_millis(1);

    /// Follows a log that is rung every millisecond between two moments; gives how often it was looked at, and when something was told.
    async fn followed(from: u32, until: u32, found: fn() -> Look<()>) -> (u32, Vec<u128>) {
        let bell = watch::Sender::new(0_u64);
        let (heard, now) = (bell.subscribe(), Arc::new(AtomicU32::new(0)));
        let (looks, told) = (AtomicU32::new(0), parking_lot::Mutex::new(Vec::new()));
        let begun = tokio::time::Instant::now();
        let clock = Arc::clone(&now);
        tokio::spawn(async move {
            for millisecond in 0..until {
                clock.store(millisecond, Ordering::Relaxed);
                if millisecond >= from {
                    bell.send_modify(|count| *count += 1);
                }
                tokio::time::sleep(MILLISECOND).await;
            }
            clock.store(u32::MAX, Ordering::Relaxed);
        });
        let look = || {
            looks.fetch_add(1, Ordering::Relaxed);
            // The log fills as fast as it is read.
            if (from..until).contains(&now.load(Ordering::Relaxed)) { found() } else { Look::Nothing }
        };
        let tell = |()| {
            told.lock().push(begun.elapsed().as_millis());
            std::future::ready(Ok(()))
        };
        follow(heard, look, tell).await.expect("the reader stays");
        (looks.into_inner(), told.into_inner())
    }

    #[tokio::test(start_paused = true)]
    async fn i7_who_watches_a_log_that_never_ends_is_told_so_often_and_of_a_first_record_at_once() {
        let spacing = bounds::FEED_SPACING.as_millis();
        for found in [|| Look::New(()), || Look::Unwanted] {
            let (looks, told) = followed(100, 1100, found).await;
            let most = 1000 / spacing as u32 + 10;
            assert!((most - 20..=most).contains(&looks), "{looks} looks in a second");
            if found() == Look::Unwanted {
                assert_eq!(told, []);
                continue;
            }
            assert_eq!(told.first(), Some(&100), "at once");
            assert!(told.windows(2).all(|pair| pair[1] - pair[0] >= spacing), "{told:?}");
            assert!(told.len() as u32 > most - 20);
        }
    }
}
