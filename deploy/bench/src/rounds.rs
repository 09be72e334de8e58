//! Rounds: ours and the reference in turn, so that whatever else the machine does meets both alike.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use crate::samples::Samples;

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    /// Fewer and shorter rounds.
    pub(crate) quick: bool,
}

impl Plan {
    /// Rounds of a measurement on the wire: many short ones, so that what else the machine does meets both sides alike.
    pub(crate) const fn rounds(self) -> u32 {
        if self.quick { 9 } else { 21 }
    }
    /// How long one side of a round on the wire lasts.
    pub(crate) const fn slice(self) -> Duration {
        Duration::from_millis(if self.quick { 40 } else { 120 })
    }
    /// Rounds of a measurement in process: many short ones, so that a disturbance meets few of them.
    pub(crate) const fn rounds_in_process(self) -> u32 {
        if self.quick { 15 } else { 31 }
    }
    /// How many operations of some 100 ns one side of a round in process has.
    pub(crate) const fn operations(self) -> u32 {
        if self.quick { 1 << 16 } else { 1 << 18 }
    }
    /// `full`, or `quick` when in a hurry.
    pub(crate) fn pick<T>(self, quick: T, full: T) -> T {
        if self.quick { quick } else { full }
    }
}

/// Runs both in turn; who begins changes from round to round. One round before the first is thrown away: it warms caches.
pub(crate) fn in_turn(
    plan: Plan,
    mut ours: impl FnMut() -> f64,
    mut reference: impl FnMut() -> f64,
) -> (Samples, Samples) {
    let mut values = (Vec::new(), Vec::new());
    ours();
    reference();
    for round in 0..plan.rounds_in_process() {
        if round % 2 == 0 {
            values.0.push(ours());
            values.1.push(reference());
        } else {
            values.1.push(reference());
            values.0.push(ours());
        }
    }
    (Samples::new(values.0), Samples::new(values.1))
}

/// Runs all of them in turn; who begins changes from round to round. One round before the first is thrown away: it warms caches.
pub(crate) fn all_in_turn<T>(
    rounds: u32,
    runners: &mut [T],
    mut run: impl FnMut(&mut T) -> f64,
) -> Vec<Samples> {
    let count = runners.len();
    let mut values = vec![Vec::new(); count];
    for round in 0..=rounds as usize {
        for turn in 0..count {
            let index = (round + turn) % count;
            let value = run(&mut runners[index]);
            if round > 0 {
                values[index].push(value);
            }
        }
    }
    values.into_iter().map(Samples::new).collect()
}

/// [`in_turn`] for what waits and can fail.
pub(crate) async fn in_turn_async(
    plan: Plan,
    mut ours: impl AsyncFnMut() -> anyhow::Result<f64>,
    mut reference: impl AsyncFnMut() -> anyhow::Result<f64>,
) -> anyhow::Result<(Samples, Samples)> {
    let mut values = (Vec::new(), Vec::new());
    ours().await?;
    reference().await?;
    for round in 0..plan.rounds() {
        if round % 2 == 0 {
            values.0.push(ours().await?);
            values.1.push(reference().await?);
        } else {
            values.1.push(reference().await?);
            values.0.push(ours().await?);
        }
    }
    Ok((Samples::new(values.0), Samples::new(values.1)))
}

/// Nanoseconds that one operation takes: `run` is told how many to do. Processor time of this thread, so that a machine that
/// does other things beside does not count.
pub(crate) fn nanoseconds_each(operations: u32, run: impl FnOnce(u32)) -> f64 {
    let start = processor_seconds();
    run(operations);
    (processor_seconds() - start) * 1e9 / f64::from(operations)
}

/// Seconds that this thread has had a processor.
fn processor_seconds() -> f64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Random numbers for keys and orders (xorshift64*): the same in every run, so that runs compare.
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    /// A sequence of its own for each seed.
    pub(crate) const fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    /// The next number.
    pub(crate) fn draw(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    /// A number below `bound`.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        assert!(bound > 0, "there is no number below 0");
        u64::try_from((u128::from(self.draw()) * u128::from(bound)) >> 64).expect("the high half has 64 bits")
    }
    /// `count` of the items, drawn with repetition.
    pub(crate) fn draws<T: Copy>(&mut self, items: &[T], count: usize) -> Vec<T> {
        (0..count)
            .map(|_| items[usize::try_from(self.below(items.len() as u64)).expect("an index")])
            .collect()
    }
}
