//! One operation in flight: what a round trip costs beside the echo's.

use std::cell::RefCell;

use hdrhistogram::Histogram;

use super::Transport;
use super::load::{Kind, Load};
use super::peer::{Device, WorkingSet, driver};
use crate::figure::{Figure, RatioOf, Target};
use crate::plot::{Chart, Line, Scale};
use crate::report::Report;
use crate::rounds::in_turn_async;
use crate::samples::Samples;
use crate::stand::{Bench, Ends};

/// Longest time told apart: a minute.
const TIME_MAX: u64 = 60_000_000_000;

/// Sizes that are measured; the one that has a target is the first.
const SIZES: [u32; 3] = [64, 4 << 10, 64 << 10];

/// Reads and writes of 64 bytes, and in a full run of larger sizes.
pub(crate) async fn one_in_flight(bench: &mut Bench, transport: Transport) -> anyhow::Result<Report> {
    let ends = bench.take().await?;
    let measured = all(bench, &ends, transport).await;
    bench.put(ends);
    measured
}

async fn all(bench: &Bench, ends: &Ends, transport: Transport) -> anyhow::Result<Report> {
    let driver = driver(ends.server.endpoint(), 0).await?;
    let ours = Device::connect(&transport.server(ends), 0).await?;
    let echo = Device::connect(&transport.echo(ends), 0).await?;
    let set = WorkingSet::map(&driver, 0, 32, 64 << 10).await?;
    let mut report = Report::default();
    let mut lines = Vec::new();
    let sizes = bench.plan.pick(&SIZES[..1], &SIZES[..]);
    for kind in [Kind::Read, Kind::Write] {
        let mut points = (Vec::new(), Vec::new());
        for &size_bytes in sizes {
            bench.progress.detail(&format!("{} {size_bytes} B", kind.name()));
            let load = Load::new(kind, size_bytes, set.iovas.clone()).one_at_a_time();
            let (value, reference) = times(bench, &load, &ours, &echo).await?;
            points.0.push((f64::from(size_bytes), value.p50.median()));
            points.1.push((f64::from(size_bytes), reference.p50.median()));
            let name = format!("latency-{}-{}-{size_bytes}", transport.name(), kind.name());
            let ratio = RatioOf::ValueToReference;
            let p50 =
                Figure::alone(format!("{name}-p50"), "us", &value.p50).beside("echo", &reference.p50, ratio);
            report.figures.push(p50.judged(Target::ratio_at_most(1.15)));
            let p99 = Figure::alone(format!("{name}-p99"), "us", &value.p99);
            report.figures.push(p99.beside("echo", &reference.p99, ratio));
        }
        lines.push(Line { name: kind.name().into(), points: points.0, reference: false });
        lines.push(Line { name: format!("{}, echo", kind.name()), points: points.1, reference: true });
    }
    set.unmap().await?;
    ours.leave().await?;
    echo.leave().await?;
    if sizes.len() > 1 {
        report.charts.push(Chart {
            file: format!("latency-{}", transport.name()),
            title: format!("One DMA in flight over {}: median", transport.words()),
            x: "size of an operation (bytes)",
            y: "latency, p50 (us)",
            y_scale: Scale::Linear,
            lines,
        });
    }
    Ok(report)
}

/// Percentiles of each round, in microseconds.
struct Percentiles {
    p50: Samples,
    p99: Samples,
}

async fn times(
    bench: &Bench,
    load: &Load,
    ours: &Device,
    echo: &Device,
) -> anyhow::Result<(Percentiles, Percentiles)> {
    let slice = bench.plan.slice();
    // The 99th percentiles go beside the rounds of the medians; those of the round that only warms are the first.
    let tails = [RefCell::new(Vec::new()), RefCell::new(Vec::new())];
    let measure = async |device: &Device, tail: &RefCell<Vec<f64>>| -> anyhow::Result<f64> {
        let mut histogram = Histogram::<u64>::new_with_max(TIME_MAX, 3)?;
        for time in load.time_each(&device.dma, slice).await? {
            histogram.record(time.clamp(1, TIME_MAX))?;
        }
        tail.borrow_mut().push(histogram.value_at_quantile(0.99) as f64 / 1e3);
        Ok(histogram.value_at_quantile(0.5) as f64 / 1e3)
    };
    let (value, reference) = in_turn_async(
        bench.plan,
        async || measure(ours, &tails[0]).await,
        async || measure(echo, &tails[1]).await,
    )
    .await?;
    let [ours, echo] = tails.map(|tail| Samples::new(tail.into_inner().split_off(1)));
    Ok((Percentiles { p50: value, p99: ours }, Percentiles { p50: reference, p99: echo }))
}
