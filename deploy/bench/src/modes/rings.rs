//! The replay in every configuration: counts, modelled cycles and time in one table for each load.

use super::configuration::Configuration;
use super::costs::Costs;
use super::counts::Counts;
use super::model::{Bill, EXPECTED};
use super::replay::Replay;
use super::workload::Workload;
use crate::figure::{Figure, RatioOf, Target};
use crate::plot::{Chart, Line, Scale};
use crate::report::{Report, Sheet, number};
use crate::rounds::{all_in_turn, nanoseconds_each};
use crate::samples::Samples;
use crate::stand::Bench;

/// Packets that are counted, at least.
const COUNTED_PACKETS: u32 = 4096;
/// Packets of a round, at least: some milliseconds.
const TIMED_PACKETS: u32 = 1000;
/// How far the model may be from what the paper's numbers make.
const MODEL_TOLERANCE: f64 = 0.01;

/// What one configuration did with a load.
struct Row {
    configuration: Configuration,
    counts: Counts,
    cycles: f64,
    gigabits: f64,
    /// Nanoseconds per packet.
    time: Samples,
}

/// Every load in every configuration.
pub(crate) fn rings(bench: &mut Bench) -> anyhow::Result<Report> {
    let workloads = bench.plan.pick(Workload::few(), Workload::all());
    let mut report = Report::default();
    let mut by_burst: Vec<(u32, Vec<Row>)> = Vec::new();
    for (index, &workload) in workloads.iter().enumerate() {
        bench.progress.detail(&format!("{} ({} of {})", workload.name(), index + 1, workloads.len()));
        let rows = rows(bench, workload)?;
        report.tables.push(sheet(workload, &rows));
        report.figures.extend(rows.iter().map(|row| entry(workload, row)));
        if workload == Workload::PAPER {
            report.figures.extend(judged(&rows, bench.costs == Costs::of_riommu_paper()));
            bench.progress.detail("with every promise checked");
            report.figures.extend(promises(workload, bench.plan.pick(4, 40))?);
        }
        if (Workload { burst: workload.burst, ..Workload::PAPER }) == workload {
            by_burst.push((workload.burst, rows));
        }
    }
    let modelled = |row: &Row| row.cycles;
    let timed = |row: &Row| row.time.median();
    report.charts.push(chart("modes-rings-cycles", "modelled cycles per packet", &by_burst, modelled));
    report.charts.push(chart("modes-rings-time", "time per packet (ns)", &by_burst, timed));
    Ok(report)
}

fn rows(bench: &Bench, workload: Workload) -> anyhow::Result<Vec<Row>> {
    let mut replays = Vec::new();
    let mut counted = Vec::new();
    for configuration in Configuration::ALL.into_iter().filter(|one| one.has_own_code()) {
        let mut replay = Replay::new(configuration, workload)?;
        let interrupts = COUNTED_PACKETS.div_ceil(workload.packets_per_interrupt());
        counted.push((configuration, counts_of(configuration, &mut replay, workload.interrupts(interrupts))));
        replays.push(replay);
    }
    let interrupts = TIMED_PACKETS.div_ceil(workload.packets_per_interrupt());
    let packets = interrupts * workload.packets_per_interrupt();
    let times = all_in_turn(bench.plan.rounds_in_process(), &mut replays, |replay| {
        nanoseconds_each(packets, |_| replay.run(interrupts))
    });
    let measured: Vec<_> = counted.into_iter().zip(times).collect();
    let row = |configuration: Configuration| {
        let code = if configuration.has_own_code() { configuration } else { Configuration::Ring };
        let ((_, counts), time) =
            measured.iter().find(|((known, _), _)| *known == code).expect("every code was measured");
        let cycles = Bill::of(configuration, counts, &bench.costs).cycles();
        let gigabits = bench.costs.gigabits_per_second(cycles);
        Row { configuration, counts: *counts, cycles, gigabits, time: time.clone() }
    };
    Ok(Configuration::ALL.map(row).into())
}

/// What a replay counts, per packet. A bare machine has no counters: its driver hands over what the others map.
fn counts_of(configuration: Configuration, replay: &mut Replay, interrupts: u32) -> Counts {
    let counts = replay.counted(interrupts);
    assert!(
        configuration != Configuration::None || counts == Counts::default(),
        "nothing is counted where nothing is translated"
    );
    counts
}

fn sheet(workload: Workload, rows: &[Row]) -> Sheet {
    let mut header = vec!["configuration".to_owned()];
    header.extend(Counts::default().named().map(|(_, heading, _)| heading.to_owned()));
    header.extend(["cycles", "Gbit/s", "ns", "ns min..max", "of none"].map(String::from));
    let none = rows.iter().find(|row| row.configuration == Configuration::None).expect("it is one of them");
    let text = |row: &Row| {
        let mut cells = vec![row.configuration.name().to_owned()];
        cells.extend(row.counts.named().map(|(_, _, count)| count_text(count)));
        cells.extend([number(row.cycles), number(row.gigabits)]);
        if row.configuration.has_own_code() {
            let (min, median, max) = (row.time.min(), row.time.median(), row.time.max());
            cells.extend([number(median), format!("{}..{}", number(min), number(max))]);
            cells.push(format!("{:.2}x", median / none.time.median()));
        } else {
            cells.extend(["as ring", "", ""].map(String::from));
        }
        cells
    };
    let Workload { profile, descriptors, burst } = workload;
    let buffers = profile.buffers().len();
    let title = format!(
        "{}: rings of {descriptors} descriptors, {buffers} buffer(s) a packet, {burst} packet(s) per ring and \
         interrupt. Counted | modelled | measured, per packet",
        workload.name()
    );
    Sheet { title, header, rows: rows.iter().map(text).collect() }
}

/// Counts are exact, so small ones get their digits.
fn count_text(count: f64) -> String {
    if count == 0.0 {
        "0".to_owned()
    } else if count < 0.1 {
        format!("{count:.4}")
    } else if count < 100.0 {
        format!("{count:.3}")
    } else {
        number(count)
    }
}

/// The entry of a row in `report.json`.
fn entry(workload: Workload, row: &Row) -> Figure {
    let name = format!("modes-rings-{}-{}", workload.name(), row.configuration.name());
    let mut counts = row.counts.by_name();
    counts.insert("gigabits_per_second", row.gigabits);
    counts.insert("nanoseconds", row.time.median());
    Figure {
        counts: Some(counts),
        tabulated: true,
        ..Figure::alone(name, "modelled cycles/packet", &Samples::exactly(row.cycles))
    }
}

/// What has a target: cycles as the paper's numbers make them (other costs are only shown beside them), and the order in time of those
/// pairs that a software IOMMU can reproduce.
fn judged(rows: &[Row], are_papers_costs: bool) -> Vec<Figure> {
    let of = |configuration: Configuration| {
        rows.iter().find(|row| row.configuration == configuration).expect("it is one of them")
    };
    let mut figures = Vec::new();
    for (configuration, expected) in EXPECTED {
        let name = format!("modes-rings-cycles-{}", configuration.name());
        let figure = Figure::alone(name, "cycles/packet", &Samples::exactly(of(configuration).cycles))
            .beside("the paper's costs, summed [D]", &Samples::exactly(expected), RatioOf::ValueToReference);
        let target = Target::ratio_between(1.0 - MODEL_TOLERANCE, 1.0 + MODEL_TOLERANCE);
        figures.push(if are_papers_costs { figure.judged(target) } else { figure });
    }
    let steps = EXPECTED.windows(2).filter(|pair| of(pair[0].0).cycles > of(pair[1].0).cycles).count();
    let figure = Figure::alone("modes-rings-order", "steps down of 6", &Samples::exactly(steps as f64));
    figures.push(figure.judged(Target::value_at_least(6.0)));
    for (name, ours, base, paper) in [
        ("modes-rings-speedup-over-strict", Configuration::Ring, Configuration::Strict, 7.56),
        ("modes-rings-share-of-none", Configuration::Ring, Configuration::None, 0.77),
    ] {
        let ratio = Samples::exactly(of(base).cycles / of(ours).cycles);
        let figure = Figure::alone(name, "times the packets/s, modelled", &ratio);
        figures.push(figure.beside(
            "rIOMMU's abstract [V]",
            &Samples::exactly(paper),
            RatioOf::ValueToReference,
        ));
    }
    for (dear, cheap) in [
        (Configuration::Strict, Configuration::StrictCached),
        (Configuration::Deferred, Configuration::DeferredCached),
        (Configuration::Ring, Configuration::None),
    ] {
        let name = format!("modes-rings-time-{}", dear.name());
        let figure = Figure::alone(name, "ns/packet", &of(dear).time)
            .beside(cheap.name(), &of(cheap).time, RatioOf::ValueToReference)
            .judged(Target::ratio_at_least(1.0));
        figures.push(figure);
    }
    figures
}

/// The load once more, with what each mode promises checked at every step: a broken promise panics. What was the most at once.
fn promises(workload: Workload, interrupts: u32) -> anyhow::Result<Vec<Figure>> {
    let mut figures = Vec::new();
    let mut most = |name: String, unit, value: usize, allowed: u32| {
        let figure = Figure::alone(name, unit, &Samples::exactly(value as f64));
        figures.push(figure.judged(Target::value_at_most(allowed.into())));
    };
    for (configuration, allowed) in [
        (Configuration::StrictCached, 0),
        (Configuration::Deferred, 256),
        (Configuration::DeferredCached, 256),
        (Configuration::Ring, 2),
    ] {
        let mut replay = Replay::watched(configuration, workload)?;
        replay.run(interrupts);
        let (name, seen) = (format!("modes-rings-stale-{}", configuration.name()), replay.seen());
        if configuration == Configuration::Ring {
            most(name.clone(), "slots of a ring", seen.stale_max, allowed);
            most(format!("{name}-after-burst"), "slots of a ring", seen.stale_after_burst_max, 0);
        } else {
            most(name, "unmaps", seen.waiting_max, allowed);
        }
    }
    Ok(figures)
}

fn chart(file: &str, y: &'static str, by_burst: &[(u32, Vec<Row>)], value: impl Fn(&Row) -> f64) -> Chart {
    let line = |configuration: Configuration| {
        let of = |rows: &[Row]| {
            value(rows.iter().find(|row| row.configuration == configuration).expect("it is one of them"))
        };
        let points = by_burst.iter().map(|(burst, rows)| (f64::from(*burst), of(rows))).collect();
        Line { name: configuration.name().into(), points, reference: false }
    };
    Chart {
        file: file.into(),
        title: "Ring replay, two buffers a packet, 1,024 descriptors".into(),
        x: "packets completed per ring and interrupt",
        y,
        y_scale: Scale::Logarithmic,
        lines: Configuration::ALL.map(line).into(),
    }
}
