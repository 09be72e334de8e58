//! How long a device can use what was unmapped: an attacker polls every address that it has lost.
//!
//! Deferred: until the flush, so 256 unmaps or 10 ms, whichever comes first. Time is simulated, and once more it is real: then the
//! loop flushes when the domain says, as the server's timer does. Strict: not once. Ring: the slot in use and the prefetched one until the
//! end of the burst, nothing after it.

use std::time::{Duration, Instant};

use iommu_hardware::dma::{Run, Transfer};
use iommu_kernel::Tick;
use iommu_types::{Direction, DomainOptions, Gpa, GpaRange, Iova, PAGE_SIZE_BYTES, Protection, Rings};

use super::stage::{Buffer, HostStage};
use crate::figure::{Figure, Target};
use crate::in_process::host::{Caches, LARGE};
use crate::plot::{Chart, Line, Scale};
use crate::report::Report;
use crate::rounds::Random;
use crate::samples::Samples;
use crate::stand::Bench;

/// Pages of the buffer that is mapped over and over, more than wait at once.
const PAGES: u64 = 512;
/// Slots of a burst in the ring's part.
const BURST: usize = 16;

/// How long one address was of use after its unmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Window {
    /// From the answer of its unmap to the last DMA that landed, or to the flush when time is simulated.
    pub(crate) time_us: u64,
    /// Unmaps that followed meanwhile, its own included.
    pub(crate) unmaps: u64,
}

/// An address that the attacker has lost.
struct Lost {
    iova: Iova,
    at_us: u64,
    unmaps_before: u64,
    last_landed_us: Option<u64>,
}

/// A driver that maps and unmaps, and a device that keeps trying.
struct Attack {
    stage: HostStage,
    memory: Gpa,
    unmaps: u64,
    lost: Vec<Lost>,
    windows: Vec<Window>,
}

impl Attack {
    fn new(options: DomainOptions) -> anyhow::Result<Self> {
        let mut stage = HostStage::new(64 << 20, Caches { iotlb: LARGE, paging: LARGE }, options)?;
        let memory = stage.allocate(PAGES * PAGE_SIZE_BYTES)?.base();
        Ok(Self { stage, memory, unmaps: 0, lost: Vec::new(), windows: Vec::new() })
    }
    fn map(&mut self, page: u64, now_us: u64) -> Buffer {
        let base = self.memory.checked_add(page % PAGES * PAGE_SIZE_BYTES).expect("it lies in the buffer");
        let range = GpaRange::new(base, PAGE_SIZE_BYTES).expect("a page does not wrap");
        self.stage.map(range, Direction::FromDevice, 0, Tick(now_us))
    }
    /// One DMA of a driver's life: map, use, unmap.
    fn lose_one(&mut self, now_us: u64) {
        let buffer = self.map(self.unmaps, now_us);
        assert!(lands(&mut self.stage, buffer.iova), "what is mapped is open");
        self.stage.unmap(&buffer, 0, true, Tick(now_us));
        let unmaps_before = self.unmaps;
        self.unmaps += 1;
        self.lost.push(Lost { iova: buffer.iova, at_us: now_us, unmaps_before, last_landed_us: None });
    }
    /// Tries every lost address at a simulated moment. The window of one that is refused now ends now.
    fn try_all(&mut self, now_us: u64) {
        let (stage, windows, unmaps) = (&mut self.stage, &mut self.windows, self.unmaps);
        self.lost.retain(|lost| {
            let landed = lands(stage, lost.iova);
            if !landed {
                let unmaps = unmaps - lost.unmaps_before;
                windows.push(Window { time_us: now_us - lost.at_us, unmaps });
            }
            landed
        });
    }
}

/// Whether a write by the device lands.
fn lands(stage: &mut HostStage, iova: Iova) -> bool {
    Run::new(&mut stage.port).execute(iova, None, Transfer::Write(&[0x66])).is_ok()
}

/// The windows of so many unmaps, one every `interval_us` of simulated time.
pub(crate) fn simulated(
    protection: Protection,
    interval_us: u64,
    unmaps: u64,
) -> anyhow::Result<Vec<Window>> {
    let mut attack = Attack::new(DomainOptions::new(protection))?;
    for n in 0..unmaps {
        let now_us = n * interval_us;
        // The timer comes before the next unmap: the last try before it and the first after it.
        if let Some(Tick(due_us)) = attack.stage.domain.flush_at().filter(|at| at.0 <= now_us) {
            attack.try_all(due_us);
            attack.stage.flush_if_due(Tick(due_us));
            attack.try_all(due_us);
        }
        attack.lose_one(now_us);
        attack.try_all(now_us);
    }
    Ok(attack.windows)
}

/// The windows of a while of real time.
fn real(interval: Duration, whole: Duration) -> anyhow::Result<Vec<Window>> {
    let mut attack = Attack::new(DomainOptions::new(Protection::DEFERRED))?;
    let begin = Instant::now();
    let now_us = || begin.elapsed().as_micros() as u64;
    let mut next = Duration::ZERO;
    while begin.elapsed() < whole {
        if begin.elapsed() >= next {
            next += interval;
            attack.lose_one(now_us());
        }
        let mut flushed = false;
        for index in 0..attack.lost.len() {
            let now = now_us();
            if attack.stage.domain.flush_at().is_some_and(|at| at.0 <= now) {
                attack.stage.flush();
                flushed = true;
                break;
            }
            if lands(&mut attack.stage, attack.lost[index].iova) {
                attack.lost[index].last_landed_us = Some(now);
            }
        }
        if flushed || attack.stage.domain.waiting().is_none() {
            let unmaps = attack.unmaps;
            attack.windows.extend(attack.lost.drain(..).map(|lost| Window {
                time_us: lost.last_landed_us.unwrap_or(lost.at_us) - lost.at_us,
                unmaps: unmaps - lost.unmaps_before,
            }));
        }
    }
    Ok(attack.windows)
}

/// The most slots of a ring that were of use after their unmap at once: within a burst, and after its end.
pub(crate) fn ring_slots(bursts: u64) -> anyhow::Result<(usize, usize)> {
    let options = DomainOptions::new(Protection::Ring(Rings { count: 1, slots: 2 * BURST as u32 }));
    let mut attack = Attack::new(options)?;
    let mut random = Random::new(31);
    let mut most = (0, 0);
    for burst in 0..bursts {
        let mut mapped: Vec<_> = (0..BURST as u64).map(|n| attack.map(burst + n, 0)).collect();
        // The device has used some of them when the driver unmaps all, in any order.
        for buffer in &mapped[..=random.below(BURST as u64 - 1) as usize] {
            assert!(lands(&mut attack.stage, buffer.iova), "what is mapped is open");
        }
        let mut lost = Vec::new();
        while !mapped.is_empty() {
            let buffer = mapped.swap_remove(random.below(mapped.len() as u64) as usize);
            let is_last = mapped.is_empty();
            attack.stage.unmap(&buffer, 0, is_last, Tick(0));
            lost.push(buffer.iova);
            let landed = lost.iter().filter(|iova| lands(&mut attack.stage, **iova)).count();
            let seen = if is_last { &mut most.1 } else { &mut most.0 };
            *seen = landed.max(*seen);
        }
    }
    Ok(most)
}

/// The windows of every kind.
pub(crate) fn windows(bench: &mut Bench) -> anyhow::Result<Report> {
    let mut report = Report::default();
    let mut lines = Vec::new();
    let unmaps = bench.plan.pick(2048, 16_384);
    let mut add = |name: &str, windows: &[Window], report: &mut Report| {
        let mut times: Vec<f64> = windows.iter().map(|window| window.time_us as f64 / 1000.0).collect();
        times.sort_by(f64::total_cmp);
        report.figures.extend(figures(name, windows));
        let share = |index: usize| (index + 1) as f64 / times.len() as f64;
        let step = (times.len() / 100).max(1);
        let at = |index: usize| (times[index].max(0.001), share(index));
        let points = (0..times.len()).step_by(step).chain([times.len() - 1]).map(at).collect();
        lines.push(Line { name: name.into(), points, reference: false });
    };
    for (name, interval_us) in [("deferred-busy", 1), ("deferred-idle", 150)] {
        bench.progress.detail(name);
        add(name, &simulated(Protection::DEFERRED, interval_us, unmaps)?, &mut report);
    }
    for (name, interval_us) in [("deferred-busy-real", 2), ("deferred-idle-real", 150)] {
        bench.progress.detail(name);
        let whole = Duration::from_millis(bench.plan.pick(100, 500));
        let measured = tokio::task::block_in_place(|| real(Duration::from_micros(interval_us), whole))?;
        add(name, &measured, &mut report);
    }
    let strict = simulated(Protection::Strict, 1, unmaps)?;
    let longest = strict.iter().map(|window| window.unmaps - 1).max().unwrap_or(u64::MAX);
    let figure = Figure::alone("modes-stale-strict", "further unmaps", &Samples::exactly(longest as f64));
    report.figures.push(figure.judged(Target::value_at_most(0.0)));
    let (within, after) = ring_slots(bench.plan.pick(500, 5000))?;
    let slots = |name: &str, slots: usize| Figure::alone(name, "slots", &Samples::exactly(slots as f64));
    report.figures.push(slots("modes-stale-ring", within).judged(Target::value_at_most(2.0)));
    report.figures.push(slots("modes-stale-ring-after-burst", after).judged(Target::value_at_most(0.0)));
    report.charts.push(Chart {
        file: "modes-stale".into(),
        title: "How long an unmapped address stays of use, deferred (256 or 10 ms)".into(),
        x: "window (ms)",
        y: "share of unmaps with this window or a shorter one",
        y_scale: Scale::Linear,
        lines,
    });
    Ok(report)
}

fn figures(name: &str, windows: &[Window]) -> [Figure; 2] {
    let time_ms: Vec<f64> = windows.iter().map(|window| window.time_us as f64 / 1000.0).collect();
    let (time_ms, unmaps): (Samples, Vec<f64>) =
        (Samples::new(time_ms), windows.iter().map(|window| window.unmaps as f64).collect());
    let longest = |samples: &Samples, name: String, unit, most| {
        // The value is the longest of all; median and shortest are in the spread's company.
        let figure = Figure::alone(name, unit, &Samples::exactly(samples.max()));
        let counts =
            std::collections::BTreeMap::from([("median", samples.median()), ("shortest", samples.min())]);
        Figure { counts: Some(counts), ..figure }.judged(Target::value_at_most(most))
    };
    [
        longest(&time_ms, format!("modes-stale-{name}-longest"), "ms", 10.0),
        longest(&Samples::new(unmaps), format!("modes-stale-{name}-most-unmaps"), "unmaps", 256.0),
    ]
}

#[cfg(test)]
mod tests {
    use iommu_types::Protection;

    use super::{ring_slots, simulated};

    /// The longest windows of a deferred domain with an unmap every so often: in time, in unmaps.
    fn check_deferred(interval_us: u64, time_us: u64, unmaps: u64) {
        let windows = simulated(Protection::DEFERRED, interval_us, 700).expect("an attack");
        let longest = |of: fn(&super::Window) -> u64| windows.iter().map(of).max();
        assert_eq!(longest(|window| window.time_us), Some(time_us), "every {interval_us} µs");
        assert_eq!(longest(|window| window.unmaps), Some(unmaps), "every {interval_us} µs");
    }

    #[test]
    fn a_deferred_window_ends_with_the_batch_or_with_the_interval() {
        check_deferred(1, 255, 256);
        check_deferred(39, 39 * 255, 256);
        check_deferred(40, 10_000, 250);
        check_deferred(1000, 10_000, 10);
    }

    #[test]
    fn a_strict_unmap_leaves_no_window() {
        let windows = simulated(Protection::Strict, 1, 300).expect("an attack");
        assert_eq!(windows.len(), 300);
        assert!(windows.iter().all(|window| window.time_us == 0 && window.unmaps == 1));
    }

    #[test]
    fn a_ring_leaves_two_slots_until_the_burst_ends() {
        assert_eq!(ring_slots(60).expect("an attack"), (2, 0));
    }
}
