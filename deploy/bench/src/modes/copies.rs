//! Copy or invalidate: a shadow buffer against a strict mapping, by size, and where they meet.
//!
//! Modelled with the costs of strict+ and 16 bytes copied a cycle, a buffer that is copied costs as much as one that is mapped at 50 KB
//! or so (Markuze, Morrison, Tsafrir, ASPLOS'16, name the same trade). Here copies are real as well, and an invalidation costs what it costs
//! in this process.

use iommu_kernel::Tick;
use iommu_types::{Direction, DomainOptions, GpaRange, Protection};

use super::configuration::Configuration;
use super::costs::Costs;
use super::counts::Counts;
use super::model::Bill;
use super::stage::HostStage;
use crate::figure::{Figure, RatioOf, Target};
use crate::in_process::host::{Caches, LARGE};
use crate::plot::{Chart, Line, Points, Scale};
use crate::report::Report;
use crate::rounds::{all_in_turn, nanoseconds_each};
use crate::samples::Samples;
use crate::stand::Bench;

/// 64 B to 256 KiB, each the double of the one before.
const SIZES_LOG2: std::ops::RangeInclusive<u32> = 6..=18;
/// Pairs that are counted.
const COUNTED: u32 = 64;
const NOW: Tick = Tick(0);

/// A domain in which one buffer is mapped and unmapped.
struct Pairs {
    configuration: Configuration,
    stage: HostStage,
    buffer: GpaRange,
}

impl Pairs {
    fn new(configuration: Configuration, size_bytes: u64) -> anyhow::Result<Self> {
        let protection = match configuration {
            Configuration::Bounce => Protection::BOUNCE,
            _ => Protection::Strict,
        };
        let caches = Caches { iotlb: LARGE, paging: LARGE };
        let mut stage = HostStage::new(64 << 20, caches, DomainOptions::new(protection))?;
        let buffer = GpaRange::new(stage.allocate(size_bytes)?.base(), size_bytes)?;
        let mut pairs = Self { configuration, stage, buffer };
        pairs.run(COUNTED);
        Ok(pairs)
    }
    fn run(&mut self, pairs: u32) {
        for _ in 0..pairs {
            let mapped = self.stage.map(self.buffer, Direction::ToDevice, 0, NOW);
            self.stage.unmap(&mapped, 0, true, NOW);
        }
    }
    /// Modelled cycles of a pair.
    fn cycles(&mut self, costs: &Costs) -> f64 {
        let before = self.stage.reading();
        self.run(COUNTED);
        let counts = Counts::between(&before, &self.stage.reading()).per(COUNTED.into());
        Bill::of_protection(self.configuration, &counts, costs).cycles()
    }
}

/// Modelled cycles of a pair by size: invalidated, and copied.
pub(crate) fn modelled(costs: &Costs) -> anyhow::Result<[Points; 2]> {
    let mut lines = [Vec::new(), Vec::new()];
    for size_bytes in SIZES_LOG2.map(|log2| 1 << log2) {
        for (line, configuration) in
            lines.iter_mut().zip([Configuration::StrictCached, Configuration::Bounce])
        {
            let cycles = Pairs::new(configuration, size_bytes)?.cycles(costs);
            line.push((size_bytes as f64, cycles));
        }
    }
    Ok(lines)
}

/// The size from which on the second line is above the first; between two points as the crow flies.
pub(crate) fn crossover([first, second]: &[Points; 2]) -> Option<f64> {
    let above = |index: usize| second[index].1 - first[index].1;
    let index = (1..first.len()).rev().find(|&index| above(index - 1) <= 0.0 && above(index) > 0.0)?;
    let share = -above(index - 1) / (above(index) - above(index - 1));
    let (from, to) = (first[index - 1].0, first[index].0);
    Some(from + share * (to - from))
}

/// By size, modelled and in time.
pub(crate) fn copies(bench: &mut Bench) -> anyhow::Result<Report> {
    bench.progress.detail("modelled");
    let cycles = modelled(&bench.costs)?;
    let mut times = [Vec::new(), Vec::new()];
    let mut report = Report::default();
    for size_bytes in SIZES_LOG2.map(|log2| 1u64 << log2) {
        bench.progress.detail(&format!("{size_bytes} bytes"));
        let mut pairs = [
            Pairs::new(Configuration::StrictCached, size_bytes)?,
            Pairs::new(Configuration::Bounce, size_bytes)?,
        ];
        let operations = (bench.plan.operations() / 64 / (1 + (size_bytes >> 13) as u32)).max(64);
        let measured = all_in_turn(bench.plan.rounds_in_process() / 2, &mut pairs, |pairs| {
            nanoseconds_each(operations, |n| pairs.run(n))
        });
        for (line, samples) in times.iter_mut().zip(&measured) {
            line.push((size_bytes as f64, samples.median()));
        }
        let figure = Figure::alone(format!("modes-copy-{size_bytes}"), "ns/pair", &measured[1]);
        report.figures.push(figure.beside("strict+", &measured[0], RatioOf::ValueToReference));
    }
    let met = |name: &str, lines: &[Points; 2]| match crossover(lines) {
        Some(size_bytes) => Some(Figure::alone(name, "bytes", &Samples::exactly(size_bytes))),
        None => {
            bench.progress.say(&format!("{name}: the lines do not meet between 64 B and 256 KiB"));
            None
        }
    };
    let expected = Target::value_between(25.0 * 1024.0, 50.0 * 1024.0);
    report
        .figures
        .extend(met("modes-copy-crossover-modelled", &cycles).map(|figure| figure.judged(expected)));
    report.figures.extend(met("modes-copy-crossover-time", &times));
    report.charts.push(chart("modes-copy-cycles", "modelled cycles per map and unmap", cycles));
    report.charts.push(chart("modes-copy-time", "time per map and unmap (ns)", times));
    Ok(report)
}

fn chart(file: &str, y: &'static str, [strict, bounce]: [Points; 2]) -> Chart {
    let line = |name: &str, points| Line { name: name.into(), points, reference: false };
    Chart {
        file: file.into(),
        title: "Copy or invalidate, by size".into(),
        x: "buffer (bytes)",
        y,
        y_scale: Scale::Logarithmic,
        lines: vec![line("strict+ (invalidates)", strict), line("bounce (copies)", bounce)],
    }
}

#[cfg(test)]
mod tests {
    use super::{crossover, modelled};
    use crate::modes::costs::Costs;

    #[test]
    fn small_buffers_are_cheaper_to_copy_and_large_ones_to_map() {
        let lines = modelled(&Costs::of_riommu_paper()).expect("a stage");
        let size_bytes = crossover(&lines).expect("they meet");
        // 3,152 cycles of tables and invalidation, at 16 bytes a cycle.
        assert!((25_000.0..=51_200.0).contains(&size_bytes), "{size_bytes}");
        let [strict, bounce] = &lines;
        assert!(bounce[0].1 < strict[0].1 && bounce[12].1 > strict[12].1);
    }

    #[test]
    fn lines_cross_where_they_cross() {
        let first = vec![(1.0, 10.0), (2.0, 10.0), (4.0, 10.0)];
        assert_eq!(crossover(&[first.clone(), vec![(1.0, 2.0), (2.0, 8.0), (4.0, 12.0)]]), Some(3.0));
        assert_eq!(crossover(&[first.clone(), vec![(1.0, 2.0), (2.0, 3.0), (4.0, 4.0)]]), None);
        assert_eq!(crossover(&[first, vec![(1.0, 12.0), (2.0, 12.0), (4.0, 14.0)]]), None);
    }
}
