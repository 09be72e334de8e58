//! What an owner does in a second, compared with what it may (I7).
//!
//! A rate is a bucket that fills with what is done and drains at the rate allowed (the generic cell rate algorithm): one word, changed in one atomic step, so that
//! all sessions of an owner share it without a lock. What would overflow it is refused, and the refusal is counted; who is refused is also
//! made to wait, one after the other, so that a flood costs its sender more than the server however many calls and devices it comes from.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use iommu_proto::model::{LimitState, TenantLimits};
use iommu_types::Refusal;
use iommu_types::errors::LimitReached;

use crate::bounds;

/// Nanoseconds since some moment of this process; never 0 again after the first call.
fn now_ns() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_nanos() as u64
}

/// So much in a second, with a burst of [`bounds::RATE_BURST`].
#[derive(Debug)]
pub struct Rate {
    limit: &'static str,
    per_second: u64,
    /// When the bucket will be empty, in nanoseconds.
    empty_at_ns: AtomicU64,
    /// When the last of those who were refused is told so.
    told_at_ns: AtomicU64,
    refused: AtomicU64,
}

/// Over a rate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OverRate {
    /// Which.
    pub limit: LimitReached,
    /// How long until as much would have passed.
    pub retry_after: Duration,
    /// How long who is refused is made to wait.
    pub penalty: Duration,
}

const BURST_NS: u64 = bounds::RATE_BURST.as_nanos() as u64;

impl Rate {
    /// An empty bucket.
    pub fn new(limit: &'static str, per_second: u64) -> Self {
        assert!(per_second > 0, "a rate of nothing is no rate");
        Self {
            limit,
            per_second,
            empty_at_ns: AtomicU64::new(0),
            told_at_ns: AtomicU64::new(0),
            refused: AtomicU64::new(0),
        }
    }
    fn cost_ns(&self, amount: u64) -> u64 {
        let cost = u128::from(amount) * 1_000_000_000 / u128::from(self.per_second);
        u64::try_from(cost).unwrap_or(u64::MAX)
    }
    /// Takes `amount`, or takes nothing and says for how long.
    #[inline]
    pub fn take(&self, amount: u64) -> Result<(), OverRate> {
        self.take_at(now_ns(), amount)
    }
    fn take_at(&self, now: u64, amount: u64) -> Result<(), OverRate> {
        let cost = self.cost_ns(amount);
        // What is larger than the whole burst passes when the bucket is empty; it pays afterwards.
        let full_at = now.saturating_add(BURST_NS);
        let fill = |empty_at: u64| {
            let begins = empty_at.max(now);
            let filled = begins.saturating_add(cost);
            (filled <= full_at || begins == now).then_some(filled)
        };
        match self.empty_at_ns.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fill) {
            Ok(_) => Ok(()),
            Err(empty_at) => {
                self.refused.fetch_add(amount, Ordering::Relaxed);
                let retry_ns = empty_at.saturating_add(cost).saturating_sub(full_at).min(empty_at - now);
                let retry_after = Duration::from_nanos(retry_ns);
                Err(OverRate {
                    limit: LimitReached { limit: self.limit.to_owned(), allowed: self.per_second },
                    retry_after,
                    penalty: self.penalty_at(now, retry_after),
                })
            }
        }
    }
    /// Takes `amount` whether there is room or not, and says how long to wait until there is. Who books has few things waiting at once.
    pub fn book(&self, amount: u64) -> Duration {
        self.book_at(now_ns(), amount)
    }
    fn book_at(&self, now: u64, amount: u64) -> Duration {
        let cost = self.cost_ns(amount);
        let filled = |empty_at: u64| empty_at.max(now).saturating_add(cost);
        let before = self
            .empty_at_ns
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |empty_at| Some(filled(empty_at)))
            .unwrap_or_else(|unchanged| unchanged);
        let wait = filled(before).saturating_sub(now.saturating_add(BURST_NS));
        if wait > 0 {
            self.refused.fetch_add(amount, Ordering::Relaxed);
        }
        Duration::from_nanos(wait)
    }
    /// Until as much would have passed, and until those are told who were refused before: with many at once, each waits for its turn.
    fn penalty_at(&self, now: u64, retry_after: Duration) -> Duration {
        let (least, most) = bounds::RATE_PENALTY;
        let (spacing, most_ns) = (least.as_nanos() as u64, bounds::RATE_PENALTY_QUEUE.as_nanos() as u64);
        let turn = |told: u64| Some(told.max(now).saturating_add(spacing).min(now.saturating_add(most_ns)));
        let before = self.told_at_ns.fetch_update(Ordering::Relaxed, Ordering::Relaxed, turn);
        let turn_ns = before.unwrap_or(now).max(now).saturating_add(spacing).saturating_sub(now).min(most_ns);
        retry_after.clamp(least, most).max(Duration::from_nanos(turn_ns))
    }
    /// How it stands.
    pub fn state(&self) -> LimitState {
        let ahead_ns = self.empty_at_ns.load(Ordering::Relaxed).saturating_sub(now_ns());
        let used = u128::from(ahead_ns) * u128::from(self.per_second) / 1_000_000_000;
        LimitState {
            limit: self.limit.to_owned(),
            used: u64::try_from(used).unwrap_or(u64::MAX),
            allowed: self.per_second,
            refused_count: self.refused.load(Ordering::Relaxed),
        }
    }
}

/// A number of things at once.
#[derive(Debug)]
pub struct Places {
    limit: &'static str,
    allowed: usize,
    taken: AtomicUsize,
    refused: AtomicU64,
}

impl Places {
    /// All free.
    pub fn new(limit: &'static str, allowed: usize) -> Self {
        Self { limit, allowed, taken: AtomicUsize::new(0), refused: AtomicU64::new(0) }
    }
    /// Takes one; [`leave`](Self::leave) gives it back.
    pub fn enter(&self) -> Result<(), LimitReached> {
        let within = |taken: usize| (taken < self.allowed).then_some(taken + 1);
        match self.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, within) {
            Ok(_) => Ok(()),
            Err(_) => {
                self.refused.fetch_add(1, Ordering::Relaxed);
                Err(LimitReached { limit: self.limit.to_owned(), allowed: self.allowed as u64 })
            }
        }
    }
    /// Gives one back.
    pub fn leave(&self) {
        let before = self.taken.fetch_sub(1, Ordering::Relaxed);
        assert!(before > 0, "{}: only who entered leaves", self.limit);
    }
    /// How it stands.
    pub fn state(&self) -> LimitState {
        LimitState {
            limit: self.limit.to_owned(),
            used: self.taken.load(Ordering::Relaxed) as u64,
            allowed: self.allowed as u64,
            refused_count: self.refused.load(Ordering::Relaxed),
        }
    }
}

/// What the service bounds for one owner, beside what its [account](iommu_kernel::OwnerAccount) bounds.
#[derive(Debug)]
pub struct OwnerBounds {
    /// Requests of its driver.
    pub requests: Rate,
    /// DMA operations of its devices.
    pub dma_operations: Rate,
    /// Bytes of DMA of its devices.
    pub dma_bytes: Rate,
    /// Calls of its driver under way.
    pub calls: Places,
    /// Subscriptions of its driver.
    pub watchers: Places,
}

impl OwnerBounds {
    /// As asked, and the usual where nothing is.
    pub fn new(asked: TenantLimits) -> Self {
        let or = |asked: Option<u32>, usual: u64| asked.map_or(usual, u64::from);
        let dma_bytes = asked.dma_bytes_per_second.unwrap_or(bounds::DMA_BYTES_PER_SECOND_MAX);
        Self {
            requests: Rate::new(
                "requests_per_second",
                or(asked.requests_per_second, bounds::REQUESTS_PER_SECOND_MAX),
            ),
            dma_operations: Rate::new(
                "dma_operations_per_second",
                or(asked.dma_operations_per_second, bounds::DMA_OPERATIONS_PER_SECOND_MAX),
            ),
            dma_bytes: Rate::new("dma_bytes_per_second", dma_bytes),
            calls: Places::new("calls_per_owner", bounds::CALLS_PER_OWNER_MAX),
            watchers: Places::new("watchers_per_owner", bounds::WATCHERS_PER_OWNER_MAX),
        }
    }
    /// Pays for a batch of DMA, or says what it is over. The clock is read once for both rates.
    #[inline]
    pub fn pay_dma(&self, operations: u64, bytes: u64) -> Result<(), (Refusal, OverRate)> {
        let now = now_ns();
        self.dma_operations.take_at(now, operations).map_err(|over| (Refusal::OverOperationRate, over))?;
        self.dma_bytes.take_at(now, bytes).map_err(|over| (Refusal::OverByteRate, over))
    }
    /// How they stand.
    pub fn state(&self) -> Vec<LimitState> {
        vec![
            self.requests.state(),
            self.dma_operations.state(),
            self.dma_bytes.state(),
            self.calls.state(),
            self.watchers.state(),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn i7_a_rate_lets_pass_its_burst_and_then_its_rate_and_no_more() {
        let rate = Rate::new("things_per_second", 1000);
        let burst = 1000 * BURST_NS / SECOND;
        let begin = 5 * SECOND;
        let passed = |from: u64, until: u64, step: u64| {
            (from..until).step_by(step as usize).filter(|now| rate.take_at(*now, 1).is_ok()).count() as u64
        };
        // Ten times as often as allowed.
        let passed = passed(begin, begin + 2 * SECOND, SECOND / 10_000);
        assert!((2000 + burst - 2..=2000 + burst + 2).contains(&passed), "{passed} of 20000 in two seconds");
        let over = rate.take_at(begin + 2 * SECOND, 100).expect_err("the bucket is full");
        assert_eq!(over.limit, LimitReached { limit: "things_per_second".to_owned(), allowed: 1000 });
        let later = begin + 2 * SECOND + over.retry_after.as_nanos() as u64;
        assert_eq!(rate.take_at(later, 100), Ok(()), "as long as it said");
        assert!(rate.refused.load(Ordering::Relaxed) > 10_000);
    }

    #[test]
    fn i7_what_is_booked_waits_for_its_turn_and_all_together_keep_the_rate() {
        let rate = Rate::new("things_per_second", 1000);
        let waits: Vec<_> = (0..1100).map(|_| rate.book_at(SECOND, 1)).collect();
        assert!(waits[..100].iter().all(Duration::is_zero), "a burst");
        assert_eq!(waits[1099], Duration::from_secs(1), "the thousandth after it, a second later");
        assert!(rate.take_at(SECOND, 1).is_err(), "and nobody else passes meanwhile");
    }

    #[test]
    fn i7_refusals_are_told_one_after_the_other_however_many_come_at_once() {
        let rate = Rate::new("things_per_second", 1000);
        while rate.take_at(SECOND, 1).is_ok() {}
        let (least, _) = bounds::RATE_PENALTY;
        let penalties: Vec<_> =
            (0..256).map(|_| rate.take_at(SECOND, 1).expect_err("it is full").penalty).collect();
        assert!(penalties.is_sorted_by(|one, next| *next == *one + least), "{penalties:?}");
        assert!(penalties.iter().all(|penalty| *penalty <= bounds::RATE_PENALTY_QUEUE));
        let much_later = rate.take_at(SECOND + BURST_NS / 2, 200).expect_err("that is too much").penalty;
        assert!(much_later >= least, "{much_later:?}");
        let told: Vec<_> = (0..4096).map(|_| rate.take_at(SECOND, 1)).collect();
        let longest = told.into_iter().filter_map(Result::err).map(|over| over.penalty).max();
        assert_eq!(longest, Some(bounds::RATE_PENALTY_QUEUE), "nobody waits for ever");
    }

    #[test]
    fn what_is_larger_than_a_burst_passes_and_pays_afterwards() {
        let rate = Rate::new("bytes_per_second", 1000);
        assert_eq!(rate.take_at(SECOND, 10_000), Ok(()));
        let over = rate.take_at(2 * SECOND, 1).expect_err("it pays for ten seconds");
        assert!(over.retry_after > Duration::from_secs(8), "{over:?}");
        assert_eq!(rate.take_at(11 * SECOND, 1), Ok(()));
    }

    #[test]
    fn amounts_and_rates_at_their_ends_neither_panic_nor_wrap() {
        for per_second in [1, 1 << 32, u64::MAX] {
            let rate = Rate::new("things_per_second", per_second);
            for (now, amount) in [(0, u64::MAX), (u64::MAX, u64::MAX), (1, 0), (u64::MAX, 1)] {
                let _either = rate.take_at(now, amount);
            }
        }
    }

    #[test]
    fn places_are_given_back() {
        let places = Places::new("things_at_once", 2);
        places.enter().expect("one");
        places.enter().expect("two");
        let over = LimitReached { limit: "things_at_once".to_owned(), allowed: 2 };
        assert_eq!(places.enter(), Err(over));
        places.leave();
        places.enter().expect("one was given back");
        let state = places.state();
        assert_eq!((state.used, state.allowed, state.refused_count), (2, 2, 1));
    }
}
