//! Randomness that a failure can be replayed with: a seed that is printed, and numbers that follow from it alone.

use std::time::{SystemTime, UNIX_EPOCH};

/// The variable that gives the seed.
pub const SEED: &str = "IOMMU_SEED";

/// The seed of this run: as given, or the clock's; printed, so that a failure can be replayed.
#[expect(clippy::print_stderr, reason = "the seed is what replays a failure")]
pub fn seed(test: &str) -> u64 {
    let given = std::env::var(SEED).ok().and_then(|text| text.parse().ok());
    let seed = given.unwrap_or_else(|| {
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |since| since.subsec_nanos().into())
    });
    eprintln!("{test}: {SEED}={seed}");
    seed
}

/// xorshift64*, begun at a mix of a seed and the place where it is used: what happens in one place does not change what another draws.
#[derive(Clone, Debug)]
pub struct Random(u64);

/// Spreads the bits of a number over all of it (splitmix64).
fn mixed(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Random {
    /// Of a seed and a place, such as a tenant's number and that of a step.
    pub fn of(seed: u64, place: &[u64]) -> Self {
        Self(place.iter().fold(mixed(seed), |state, part| mixed(state ^ mixed(*part))) | 1)
    }
    /// The next number.
    pub fn draw(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    /// A number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        (self.draw() >> 16) % end
    }
    /// One of these.
    pub fn one_of<T: Copy>(&mut self, all: &[T]) -> T {
        all[usize::try_from(self.below(all.len() as u64)).expect("an index")]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_follow_from_seed_and_place_alone() {
        let draw = |seed, place: &[u64]| {
            let mut random = Random::of(seed, place);
            [random.draw(), random.draw(), random.below(10)]
        };
        assert_eq!(draw(7, &[1, 2]), draw(7, &[1, 2]));
        for other in [draw(8, &[1, 2]), draw(7, &[2, 1]), draw(7, &[1, 2, 0])] {
            assert_ne!(draw(7, &[1, 2]), other);
        }
    }
}
