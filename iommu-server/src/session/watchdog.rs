//! Looks after device streams that nobody reads.
//!
//! A peer that stops reading stops the transport from asking its stream for messages, so the stream cannot notice by itself. The watchdog
//! sees that something is to be sent while the count of polls stands still, ends the session (STREAM_STALLED), and cuts the connection
//! when even the last status cannot be written. It also cuts connections of sessions that were ended for another reason and
//! do not go.

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::device::DeviceSession;
use crate::bounds;
use crate::ending::Ending;

#[derive(Debug)]
struct Watched {
    session: Weak<DeviceSession>,
    polls: u64,
    moved_at: Instant,
    ended_at: Option<Instant>,
}

/// All sessions that have a stream.
#[derive(Debug)]
pub struct Watchdog {
    watched: Mutex<Vec<Watched>>,
    stalled_after: Duration,
}

impl Watchdog {
    /// Watches nothing yet.
    pub fn new(stalled_after: Duration) -> Self {
        Self { watched: Mutex::default(), stalled_after }
    }
    /// Watches one more.
    pub(crate) fn watch(&self, session: &Arc<DeviceSession>) {
        let session = Arc::downgrade(session);
        let watched = Watched { session, polls: 0, moved_at: Instant::now(), ended_at: None };
        self.watched.lock().push(watched);
    }
    /// Every session that has a stream, ended ones included.
    pub(crate) fn sessions(&self) -> Vec<Arc<DeviceSession>> {
        self.watched.lock().iter().filter_map(|watched| watched.session.upgrade()).collect()
    }
    fn look(&self, now: Instant) {
        self.watched.lock().retain_mut(|watched| {
            let Some(session) = watched.session.upgrade().filter(|session| !session.is_gone()) else {
                return false;
            };
            watched.look(&session, now, self.stalled_after);
            true
        });
    }
    /// Looks regularly, for ever.
    pub async fn run(self: Arc<Self>) {
        let mut tick = tokio::time::interval(bounds::WATCHDOG_TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            self.look(Instant::now());
        }
    }
}

impl Watched {
    fn look(&mut self, session: &DeviceSession, now: Instant, stalled_after: Duration) {
        let polls = session.progress.polls();
        if polls != self.polls || !session.is_sending() {
            (self.polls, self.moved_at) = (polls, now);
        }
        if session.ended().is_some() {
            let ended_at = *self.ended_at.get_or_insert(now);
            if now.duration_since(ended_at) >= bounds::ENDING_GRACE {
                session.cut();
            }
            return;
        }
        let stood = now.duration_since(self.moved_at);
        if stood >= stalled_after {
            session.end(Ending::Stalled { stalled_ms: stood.as_millis() as u64 });
        }
    }
}
