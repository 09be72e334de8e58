//! When to try again: exponential delays with jitter, bounded, and the same for the same seed.

use std::time::Duration;

/// When an agent connects again after its session has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reconnect {
    /// Delay before the first new attempt; at least 1 ms.
    pub first: Duration,
    /// Longest delay.
    pub longest: Duration,
    /// New attempts in a row without a session before giving up; `None` goes on for ever.
    pub attempts_max: Option<u32>,
    /// Connect again even when a newer session of the same device has fenced this one. Two agents with this
    /// set fence each other for ever.
    pub after_fenced: bool,
    /// Connect again even when the server refused the identity; for agents that start before their device is
    /// declared.
    pub after_refused: bool,
    /// Seed of the jitter; `None` takes one from the process and the time, so that agents do not come back in
    /// step.
    pub seed: Option<u64>,
}

impl Reconnect {
    /// For ever, from 50 ms to 5 s, not after being fenced or refused.
    pub const STANDARD: Self = Self {
        first: Duration::from_millis(50),
        longest: Duration::from_secs(5),
        attempts_max: None,
        after_fenced: false,
        after_refused: false,
        seed: None,
    };

    /// Never: the agent ends with its first session.
    pub const NEVER: Self = Self { attempts_max: Some(0), ..Self::STANDARD };
}

/// The delays of a [`Reconnect`]: the n-th is between half of and the whole of `first * 2^n`, and never above
/// `longest`.
#[derive(Clone, Debug)]
pub struct Backoff {
    first: Duration,
    longest: Duration,
    step: u32,
    random: u64,
}

impl Backoff {
    /// The delays of `policy`.
    pub fn new(policy: &Reconnect) -> Self {
        let first = policy.first.max(Duration::from_millis(1));
        let random = policy.seed.unwrap_or_else(seed_of_this_process);
        Self { first, longest: policy.longest.max(first), step: 0, random }
    }

    /// The next delay.
    pub fn next_delay(&mut self) -> Duration {
        let factor = 1u32.checked_shl(self.step).unwrap_or(u32::MAX);
        let whole = self.first.saturating_mul(factor).min(self.longest);
        self.step = self.step.saturating_add(1);
        let half = whole / 2;
        let half_ns = u64::try_from(half.as_nanos()).unwrap_or(u64::MAX).max(1);
        half + Duration::from_nanos(self.next_random() % half_ns)
    }

    /// Starts again with the shortest delay: a session stood.
    pub fn succeeded(&mut self) {
        self.step = 0;
    }

    /// splitmix64: small, seedable, and good enough to keep agents apart.
    fn next_random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.random;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

fn seed_of_this_process() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(std::process::id())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(seed: u64) -> Reconnect {
        Reconnect { seed: Some(seed), ..Reconnect::STANDARD }
    }

    #[test]
    fn delays_grow_to_the_bound_and_start_again_after_a_session() {
        for seed in 0..200 {
            let mut backoff = Backoff::new(&policy(seed));
            for step in 0..40u32 {
                let whole = Duration::from_millis(50)
                    .saturating_mul(1u32.checked_shl(step).unwrap_or(u32::MAX))
                    .min(Duration::from_secs(5));
                let delay = backoff.next_delay();
                assert!(
                    delay >= whole / 2 && delay <= whole,
                    "seed {seed}, step {step}: {delay:?} of {whole:?}"
                );
            }
            backoff.succeeded();
            assert!(backoff.next_delay() <= Duration::from_millis(50), "seed {seed}");
        }
    }

    #[test]
    fn one_seed_gives_one_sequence() {
        let sequence = |seed| {
            let mut backoff = Backoff::new(&policy(seed));
            (0..10).map(|_| backoff.next_delay()).collect::<Vec<_>>()
        };
        assert_eq!(sequence(7), sequence(7));
        assert_ne!(sequence(7), sequence(8));
    }
}
