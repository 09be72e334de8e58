//! Whether the cached allocator ages: a day of mixed sizes, and what it holds and costs by the hour.
//!
//! Linux's per-size caches did (2019, 2020): cached addresses doubled within a day, and a third of the operations per second was lost for ever. An
//! hour here is a 24th of the run; a timer trims once a minute.

use std::collections::VecDeque;

use iommu_kernel::{IovaAllocator, IovaCounters};
use iommu_types::IovaAllocation;

use crate::figure::{Figure, RatioOf, Target};
use crate::plot::{Chart, Line, Scale};
use crate::report::Report;
use crate::rounds::{Random, nanoseconds_each};
use crate::samples::Samples;
use crate::stand::Bench;

const HOURS: usize = 24;
const MINUTES: u32 = 60;
/// Sizes in pages, the small ones more often: network and storage together.
const SIZES: [u64; 10] = [1, 1, 1, 1, 2, 2, 4, 8, 16, 64];
/// Addresses that are live: the number goes up and down between these within the hour.
const LIVE: (u64, u64) = (500, 4000);

/// An hour of the run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Hour {
    /// Ranges at hand at its end.
    pub(crate) cached_ranges: u64,
    /// Nodes looked at per allocation.
    pub(crate) visits: f64,
    /// Nanoseconds of an operation.
    pub(crate) time_ns: f64,
}

/// A day, of so many operations a minute.
pub(crate) fn day(operations_per_minute: u32) -> Vec<Hour> {
    let mut iovas = IovaAllocator::new(IovaAllocation::Cached, 48);
    let mut random = Random::new(17);
    let mut live: VecDeque<(u64, u64, u8)> = VecDeque::new();
    let mut hours = Vec::new();
    for _ in 0..HOURS {
        let before: IovaCounters = iovas.counters();
        let time_ns = nanoseconds_each(operations_per_minute * MINUTES, |_| {
            for minute in 0..MINUTES {
                // Half an hour up, half an hour down.
                let wave = u64::from(minute.min(MINUTES - minute)) * 2;
                let wanted = LIVE.0 + (LIVE.1 - LIVE.0) * wave / u64::from(MINUTES);
                for _ in 0..operations_per_minute {
                    step(&mut iovas, &mut live, &mut random, wanted);
                }
                iovas.trim();
            }
        });
        let after = iovas.counters();
        let visits = (after.visits - before.visits) as f64 / (after.allocations - before.allocations) as f64;
        hours.push(Hour { cached_ranges: after.cached_ranges, visits, time_ns });
    }
    hours
}

/// One operation: a new range, and an old one goes when there are enough; not always the oldest, and not always by whom it came.
fn step(iovas: &mut IovaAllocator, live: &mut VecDeque<(u64, u64, u8)>, random: &mut Random, wanted: u64) {
    let draw = random.draw();
    let client = (draw >> 8) as u8 % 4;
    if (live.len() as u64) < wanted || live.is_empty() {
        let pages = SIZES[(draw >> 16) as usize % SIZES.len()];
        let first = iovas.allocate(pages, u64::MAX, client).expect("48 bits are enough");
        live.push_back((first, pages, client));
    } else {
        let near_the_oldest = (draw >> 32) as usize % live.len().min(64);
        live.swap(0, near_the_oldest);
        let (first, pages, owner) = live.pop_front().expect("something is live");
        iovas.free(first, pages, if draw & 7 == 0 { client } else { owner });
    }
}

/// A day by the hour.
pub(crate) fn ageing(bench: &mut Bench) -> anyhow::Result<Report> {
    let hours = day(bench.plan.pick(1000, 10_000));
    let of = |hour: usize, value: &dyn Fn(&Hour) -> f64| Samples::exactly(value(&hours[hour - 1]));
    let beside = |name: &str, unit, value: &dyn Fn(&Hour) -> f64| {
        let figure = Figure::alone(name, unit, &of(24, value));
        figure.beside("after 4 hours", &of(4, value), RatioOf::ValueToReference)
    };
    let cached = |hour: &Hour| hour.cached_ranges as f64;
    let visits = |hour: &Hour| hour.visits;
    let line = |name: &str, value: &dyn Fn(&Hour) -> f64| Line {
        name: name.into(),
        points: (1u32..).zip(&hours).map(|(hour, seen)| (f64::from(hour), value(seen))).collect(),
        reference: false,
    };
    Ok(Report {
        figures: vec![
            beside("modes-ageing-cached-ranges", "ranges", &cached).judged(Target::ratio_at_most(1.1)),
            beside("modes-ageing-visits", "nodes/allocation", &visits).judged(Target::ratio_at_most(1.05)),
            beside("modes-ageing-time", "ns/operation", &|hour| hour.time_ns),
        ],
        charts: vec![Chart {
            file: "modes-ageing".into(),
            title: "A day of mixed sizes, cached allocator".into(),
            x: "hour",
            y: "free ranges at hand",
            y_scale: Scale::Linear,
            lines: vec![line("cached ranges", &cached)],
        }],
        ..Report::default()
    })
}

#[cfg(test)]
mod tests {
    use super::{LIVE, day};

    #[test]
    fn a_long_mixed_run_neither_fills_the_caches_nor_slows_down() {
        let hours = day(250);
        let ratio = |of: &dyn Fn(usize) -> f64| of(23) / of(3);
        let cached = |hour: usize| hours[hour].cached_ranges as f64;
        // An hour ends with few live ranges; what many needed has been given back.
        assert!(cached(3) > 0.0 && cached(23) < LIVE.0 as f64, "{hours:?}");
        assert!(ratio(&cached) <= 1.1, "{hours:?}");
        assert!(ratio(&|hour| hours[hour].visits) <= 1.05, "{hours:?}");
    }
}
