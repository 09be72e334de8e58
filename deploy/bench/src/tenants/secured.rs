//! What mutual TLS costs: the same DMA to a server over TLS and to one over plaintext, in turn.

use guest_sdk::{Connection, Credentials, Driver};
use iommu_launch::{Binaries, Server, ServerOptions, Wire};

use crate::figure::{Figure, RatioOf, Target};
use crate::report::Report;
use crate::rounds::in_turn_async;
use crate::samples::Samples;
use crate::stand::{Bench, address, name, owner};
use crate::wire::load::{Kind, Load};
use crate::wire::peer::{Device, WorkingSet};

/// Size of an operation and the share of plaintext that must be left. In batches of 128 the protocol's own work hides some of the cipher's; at
/// 4 KiB the cipher has every byte, so that is told and not judged.
const SIZES: [(u32, Option<f64>); 2] = [(64, Some(0.65)), (4 << 10, None)];

/// A server and its first device and driver.
struct End {
    server: Server,
    _driver: Driver,
    device: Device,
    set: WorkingSet,
}

impl End {
    async fn start(binaries: &Binaries, wire: Wire) -> anyhow::Result<Self> {
        let mut arguments = vec!["--memory".to_owned(), "64MiB".to_owned()];
        arguments.extend(["--driver".into(), format!("{}={}", owner(0), name(0))]);
        arguments.extend(["--device".into(), format!("{}={}@{}", address(0), name(0), owner(0))]);
        let server = Server::start(binaries, &ServerOptions { wire, arguments }).await?;
        let credentials = Credentials::from_directory(server.pki());
        let connection = Connection::to(server.endpoint()).credentials(credentials.clone());
        let driver = connection.driver(name(0), owner(0)).await?;
        let device = Device::connect_with(server.endpoint(), 0, credentials).await?;
        let set = WorkingSet::map(&driver, 0, 256, 4 << 10).await?;
        Ok(Self { server, _driver: driver, device, set })
    }
    async fn stop(mut self) -> anyhow::Result<()> {
        self.set.unmap().await?;
        self.device.leave().await?;
        self.server.process.kill().await
    }
}

/// Batches and single operations, reads and writes.
pub(crate) async fn beside_plaintext(bench: &mut Bench) -> anyhow::Result<Report> {
    let binaries = bench.binaries()?;
    let ends = [End::start(&binaries, Wire::Tls).await?, End::start(&binaries, Wire::Plaintext).await?];
    let measured = all(bench, &ends).await;
    for end in ends {
        end.stop().await?;
    }
    measured
}

async fn all(bench: &Bench, [tls, plaintext]: &[End; 2]) -> anyhow::Result<Report> {
    let mut report = Report::default();
    let slice = bench.plan.slice();
    for (size, target) in SIZES {
        for kind in [Kind::Read, Kind::Write] {
            bench.progress.detail(&format!("{} {size} B", kind.name()));
            let load = |end: &End| Load::new(kind, size, end.set.iovas.clone());
            let (ours, theirs) = in_turn_async(
                bench.plan,
                async || load(tls).run(&tls.device.dma, slice).await,
                async || load(plaintext).run(&plaintext.device.dma, slice).await,
            )
            .await?;
            let name = format!("tenants-tls-{}-{size}", kind.name());
            let figure = beside(name, "operations/s", &ours, &theirs);
            report.figures.push(match target {
                Some(share) => figure.judged(Target::ratio_at_least(share)),
                None => figure,
            });
            if bench.plan.quick && size > 64 {
                continue;
            }
            let one = |end: &End| load(end).one_at_a_time();
            let (ours, theirs) = in_turn_async(
                bench.plan,
                async || median_us(one(tls).time_each(&tls.device.dma, slice).await?),
                async || median_us(one(plaintext).time_each(&plaintext.device.dma, slice).await?),
            )
            .await?;
            let name = format!("tenants-tls-latency-{}-{size}", kind.name());
            report.figures.push(beside(name, "us, p50", &ours, &theirs));
        }
    }
    Ok(report)
}

fn beside(name: String, unit: &'static str, ours: &Samples, plaintext: &Samples) -> Figure {
    Figure::alone(name, unit, ours).beside("plaintext", plaintext, RatioOf::ValueToReference)
}

fn median_us(mut nanoseconds: Vec<u64>) -> anyhow::Result<f64> {
    nanoseconds.sort_unstable();
    let middle = nanoseconds.get(nanoseconds.len() / 2).copied();
    Ok(middle.ok_or_else(|| anyhow::anyhow!("no operation was timed"))? as f64 / 1e3)
}
