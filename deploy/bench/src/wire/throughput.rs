//! Batches of DMA beside the echo: operations per second at 64 bytes, bytes per second above.

use super::Transport;
use super::load::{Kind, Load};
use super::peer::{Device, WorkingSet, driver};
use crate::figure::{Figure, RatioOf, Target};
use crate::plot::{Chart, Line, Scale};
use crate::report::Report;
use crate::rounds::in_turn_async;
use crate::stand::{Bench, Ends};

/// Size of an operation, its mappings (how many, how large), and the share of the echo that must be left.
const SIZES: [(u32, u64, u64, f64); 5] = [
    (64, 256, 4 << 10, 0.70),
    (1500, 256, 4 << 10, 0.75),
    (4 << 10, 256, 4 << 10, 0.75),
    (64 << 10, 32, 64 << 10, 0.80),
    (1 << 20, 8, 1 << 20, 0.80),
];

/// Reads and writes of every size.
pub(crate) async fn batches(bench: &mut Bench, transport: Transport) -> anyhow::Result<Report> {
    let ends = bench.take().await?;
    let measured = all_sizes(bench, &ends, transport).await;
    bench.put(ends);
    measured
}

async fn all_sizes(bench: &Bench, ends: &Ends, transport: Transport) -> anyhow::Result<Report> {
    let driver = driver(ends.server.endpoint(), 0).await?;
    let ours = Device::connect(&transport.server(ends), 0).await?;
    let echo = Device::connect(&transport.echo(ends), 0).await?;
    let mut report = Report::default();
    let mut lines: Vec<Line> = Vec::new();
    for kind in [Kind::Read, Kind::Write] {
        let mut points = (Vec::new(), Vec::new());
        for (size_bytes, count, mapped_bytes, target) in SIZES {
            let name = format!("dma-{}-{}-{size_bytes}", transport.name(), kind.name());
            if !bench.wanted.figure(&name) {
                continue;
            }
            bench.progress.detail(&format!("{} {size_bytes} B", kind.name()));
            let set = WorkingSet::map(&driver, 0, count, mapped_bytes).await?;
            let load = Load::new(kind, size_bytes, set.iovas.clone());
            let slice = bench.plan.slice();
            let (value, reference) = in_turn_async(
                bench.plan,
                async || load.run(&ours.dma, slice).await,
                async || load.run(&echo.dma, slice).await,
            )
            .await?;
            set.unmap().await?;
            let megabytes = |operations: f64| operations * f64::from(size_bytes) / 1e6;
            points.0.push((f64::from(size_bytes), megabytes(value.median())));
            points.1.push((f64::from(size_bytes), megabytes(reference.median())));
            let (unit, value, reference) = if size_bytes == 64 {
                ("operations/s", value, reference)
            } else {
                ("MB/s", value.map(megabytes), reference.map(megabytes))
            };
            let figure = Figure::alone(name, unit, &value);
            let figure = figure.beside("echo", &reference, RatioOf::ValueToReference);
            report.figures.push(figure.judged(Target::ratio_at_least(target)));
        }
        lines.push(Line { name: kind.name().into(), points: points.0, reference: false });
        lines.push(Line { name: format!("{}, echo", kind.name()), points: points.1, reference: true });
    }
    ours.leave().await?;
    echo.leave().await?;
    report.charts.push(Chart {
        file: format!("dma-{}", transport.name()),
        title: format!("DMA over {}, in batches", transport.words()),
        x: "size of an operation (bytes)",
        y: "throughput (MB/s)",
        y_scale: Scale::Logarithmic,
        lines,
    });
    Ok(report)
}
