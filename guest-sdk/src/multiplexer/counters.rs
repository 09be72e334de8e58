//! What a multiplexer has done, for whom.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::codec::Ended;

/// Guests that are counted apart; machines come and go, and those beyond are in the total only.
const GUESTS_MAX: usize = 1024;

/// What was done for a guest, or for all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestCounters {
    /// Batches that were carried out.
    pub requests: u64,
    /// Packets that were moved.
    pub packets: u64,
    /// Bytes that were copied between the guest's memory and the multiplexer.
    pub bytes_copied: u64,
    /// Packets that were not moved: memory that is not the guest's, or a failure.
    pub failed: u64,
    /// Batches that were refused: too many waited, it waited for too long or for a stream that is lost, or it was none.
    pub refused: u64,
}

/// The counters of a multiplexer. Cheap to clone; all clones are the same counters.
#[derive(Clone, Debug, Default)]
pub struct MultiplexerCounters {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug, Default)]
struct Inner {
    total: GuestCounters,
    guests: BTreeMap<u32, GuestCounters>,
}

impl GuestCounters {
    pub(super) fn add(&mut self, ended: &[Ended]) {
        self.requests += 1;
        for ended in ended {
            match ended {
                Ended::Done { bytes } => {
                    self.packets += 1;
                    self.bytes_copied += u64::from(*bytes);
                }
                Ended::NotYours | Ended::DeviceFailed | Ended::MemoryFailed => self.failed += 1,
            }
        }
    }
}

impl MultiplexerCounters {
    /// Of all guests together.
    pub fn total(&self) -> GuestCounters {
        self.lock().total
    }

    /// Of each guest, by the number of its machine.
    pub fn guests(&self) -> BTreeMap<u32, GuestCounters> {
        self.lock().guests.clone()
    }

    pub(super) fn of(&self, guest: u32, count: impl Fn(&mut GuestCounters)) {
        let mut inner = self.lock();
        count(&mut inner.total);
        if inner.guests.len() < GUESTS_MAX || inner.guests.contains_key(&guest) {
            count(inner.guests.entry(guest).or_default());
        }
    }

    /// A panic while the lock was held leaves counters that are still whole.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
