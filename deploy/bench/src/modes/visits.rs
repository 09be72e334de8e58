//! What finding a free address takes, against how many are live: the classic allocator, the cached one, and rings, which need none.
//!
//! The load is EiovaR's (FAST'15): a long-lived receive ring of pages and short-lived transmit buffers of 1, 1, 2 and 16 pages.

use iommu_kernel::IovaReplay;
use iommu_types::IovaAllocation;

use super::configuration::Configuration;
use super::replay::Replay;
use super::workload::{Profile, Workload};
use crate::figure::{Figure, RatioOf, Target};
use crate::plot::{Chart, Line, Scale};
use crate::report::Report;
use crate::rounds::{all_in_turn, nanoseconds_each};
use crate::samples::Samples;
use crate::stand::Bench;

/// Packets of which visits are counted.
const COUNTED_PACKETS: u64 = 4096;
/// Packets of a round.
const TIMED_PACKETS: u32 = 2000;
/// As many live addresses as EiovaR's figures are quoted for.
const QUOTED_LIVE: u32 = 4096;
/// How straight the classic allocator's line has to be.
const LINEARITY_MIN: f64 = 0.9;

/// Visits per allocation.
pub(crate) fn of_allocator(allocation: IovaAllocation, live: u32) -> f64 {
    IovaReplay::new(allocation, live).visits_per_allocation(COUNTED_PACKETS)
}

/// Visits per map of a ring domain with so many live mappings.
pub(crate) fn of_ring(live: u32) -> anyhow::Result<f64> {
    let workload = Workload { profile: Profile::Brcm, descriptors: live, burst: 64 };
    let counted = Replay::new(Configuration::Ring, workload)?.counted(16);
    Ok(counted.allocator_visits / counted.maps)
}

/// How much of the spread of y a straight line over x explains.
pub(crate) fn linearity(points: &[(f64, f64)]) -> f64 {
    let count = points.len() as f64;
    let mean = |of: &dyn Fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / count;
    let (mean_x, mean_y) = (mean(&|point| point.0), mean(&|point| point.1));
    let covariance = mean(&|(x, y)| (x - mean_x) * (y - mean_y));
    let variances = mean(&|(x, _)| (x - mean_x).powi(2)) * mean(&|(_, y)| (y - mean_y).powi(2));
    if variances == 0.0 { 0.0 } else { covariance * covariance / variances }
}

/// Against live addresses.
pub(crate) fn visits(bench: &mut Bench) -> anyhow::Result<Report> {
    let lives: &[u32] =
        bench.plan.pick(&[256, 1024, 2048, 4096], &[256, 512, 1024, 2048, 4096, 8192, 12_288]);
    let mut report = Report::default();
    let mut lines = [("classic", Vec::new()), ("cached", Vec::new()), ("ring", Vec::new())];
    for &live in lives {
        bench.progress.detail(&format!("{live} live"));
        let counted = [
            of_allocator(IovaAllocation::Classic, live),
            of_allocator(IovaAllocation::Cached, live),
            of_ring(live)?,
        ];
        for ((name, points), visits) in lines.iter_mut().zip(counted) {
            points.push((f64::from(live), visits));
            let name = format!("modes-visits-{name}-{live}");
            report.figures.push(Figure::alone(name, "nodes/allocation", &Samples::exactly(visits)));
        }
    }
    let [(_, classic), (_, cached), _] = &lines;
    let straight = Samples::exactly(linearity(classic));
    let figure = Figure::alone("modes-visits-classic-linearity", "R² over live", &straight);
    report.figures.push(figure.judged(Target::value_at_least(LINEARITY_MIN)));
    let at = |points: &[(f64, f64)]| {
        let quoted = points.iter().find(|point| point.0 == f64::from(QUOTED_LIVE));
        // The step that every allocation takes, whatever it looks at.
        Samples::exactly(1.0 + quoted.expect("it is one of them").1)
    };
    let figure = Figure::alone("modes-visits-classic-steps", "steps/allocation", &at(classic))
        .beside("cached, both at 4,096 live", &at(cached), RatioOf::ValueToReference)
        .judged(Target::ratio_at_least(40.0));
    report.figures.push(figure);
    report.figures.extend(times(bench, lives));
    report.charts.push(Chart {
        file: "modes-visits".into(),
        title: "Allocator visits, EiovaR's load".into(),
        x: "live addresses",
        y: "nodes per allocation",
        y_scale: Scale::Linear,
        lines: lines.map(|(name, points)| Line { name: name.into(), points, reference: false }).into(),
    });
    Ok(report)
}

/// The same load in time, classic beside cached.
fn times(bench: &Bench, lives: &[u32]) -> Vec<Figure> {
    let mut figures = Vec::new();
    for &live in lives {
        bench.progress.detail(&format!("time with {live} live"));
        let mut replays = [IovaAllocation::Classic, IovaAllocation::Cached].map(|allocation| {
            let mut replay = IovaReplay::new(allocation, live);
            replay.run(u64::from(live).min(COUNTED_PACKETS));
            replay
        });
        let times = all_in_turn(bench.plan.rounds_in_process() / 3, &mut replays, |replay| {
            nanoseconds_each(TIMED_PACKETS, |packets| replay.run(packets.into()))
        });
        let name = format!("modes-visits-time-classic-{live}");
        let figure = Figure::alone(name, "ns/packet", &times[0]);
        figures.push(figure.beside("cached", &times[1], RatioOf::ValueToReference));
    }
    figures
}

#[cfg(test)]
mod tests {
    use iommu_types::IovaAllocation;

    use super::{LINEARITY_MIN, linearity, of_allocator, of_ring};

    #[test]
    fn the_classic_allocator_is_linear_and_the_others_are_flat() {
        let lives = [256u32, 512, 1024, 2048];
        let of = |allocation| lives.map(|live| (f64::from(live), of_allocator(allocation, live)));
        let classic = of(IovaAllocation::Classic);
        assert!(linearity(&classic) > LINEARITY_MIN, "{classic:?}");
        assert!(classic[3].1 > 4.0 * classic[0].1, "eight times as many live: {classic:?}");
        let cached = of(IovaAllocation::Cached);
        assert!(cached[3].1 <= cached[0].1 * 1.1 && cached[3].1 < 1.0, "{cached:?}");
        for live in [256, 1024] {
            assert_eq!(of_ring(live).expect("a replay"), 0.0, "a ring has no allocator");
        }
    }

    #[test]
    fn linearity_tells_a_line_from_a_cloud() {
        assert!(linearity(&[(1.0, 2.0), (2.0, 4.0), (3.0, 6.0)]) > 0.999);
        assert!(linearity(&[(1.0, 2.0), (2.0, 9.0), (3.0, 2.0)]) < 0.1);
        assert_eq!(linearity(&[(1.0, 5.0), (2.0, 5.0)]), 0.0, "flat is not linear");
    }
}
