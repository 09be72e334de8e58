//! What it costs to share: packets through a device that is assigned to the guest, in four modes, and through one that the hypervisor shares by copying.
//!
//! The same engine receives the same packets, one batch of 128 under way for each guest. A guest with a device of its own maps the batch (but in a direct
//! map), posts descriptors, rings the doorbell, waits for the interrupt, reads the completions, and unmaps. A guest without posts the batch by
//! hypercall; the hypervisor's process has the engine write into its own buffers and copies.

use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use iommu_launch::Process;

use super::busy::processor_seconds;
use super::stage::{GUESTS, Stage};
use super::words::{Ask, Mode, Told, Work};
use crate::figure::{Figure, RatioOf, Target};
use crate::plot::{Chart, Line, Scale};
use crate::report::{Report, Sheet, number};
use crate::samples::Samples;
use crate::stand::Bench;

/// How long engines may take to have a session.
const PATIENCE: Duration = Duration::from_secs(20);

/// A way to a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Direct(Mode),
    Multiplexed,
}

impl Way {
    const ALL: [Self; 5] = [
        Self::Direct(Mode::Strict),
        Self::Direct(Mode::Deferred),
        Self::Direct(Mode::Ring),
        Self::Direct(Mode::Passthrough),
        Self::Multiplexed,
    ];
    const fn name(self) -> &'static str {
        match self {
            Self::Direct(mode) => mode.name(),
            Self::Multiplexed => "multiplexed",
        }
    }
    const fn ask(self, work: Work) -> Ask {
        match self {
            Self::Direct(mode) => Ask::Direct { mode, work },
            Self::Multiplexed => Ask::Multiplexed { work },
        }
    }
}

const _: () = assert!(Way::ALL.len() == Mode::ALL.len() + 1);

/// What a round of one way gave.
#[derive(Clone, Copy, Debug)]
struct Round {
    packets_per_second: f64,
    /// Copies of a packet in software, in bytes.
    copied_bytes: f64,
    /// Processor time of the server for a packet.
    server_seconds: f64,
    /// Of everybody.
    all_seconds: f64,
}

/// Everybody.
struct Hall {
    stage: Stage,
    engines: Vec<Process>,
}

/// Every way, by packet size and number of guests.
pub(crate) async fn ways(bench: &mut Bench) -> anyhow::Result<Report> {
    let binaries = bench.binaries()?;
    bench.progress.detail("processes start");
    let mut stage = Stage::start(&binaries).await?;
    let engines = (0..=GUESTS.len() as u16).map(|number| stage.engine(number)).collect::<Result<_, _>>()?;
    let mut hall = Hall { stage, engines };
    hall.connected().await?;
    hall.stage.populate(true, false).await?;
    let measured = hall.all(bench).await;
    for mut engine in hall.engines {
        let _ended = engine.kill().await;
    }
    hall.stage.stop().await;
    measured
}

impl Hall {
    /// Waits until the engines have their sessions: a device that is assigned is reset, and one that is shared is programmed.
    async fn connected(&self) -> anyhow::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let log = self.stage.server.process.log();
            if log.matches("device session begins").count() >= self.engines.len() {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "an engine got no session; the server's log:\n{log}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    async fn all(&mut self, bench: &Bench) -> anyhow::Result<Report> {
        let sizes: &[u32] = bench.plan.pick(&[1500], &[64, 1500, 4096]);
        let guests: &[usize] = bench.plan.pick(&[1], &[1, 2]);
        let mut report = Report::default();
        let mut rows = Vec::new();
        for &guests in guests {
            let mut points = vec![Vec::new(); Way::ALL.len()];
            for &size in sizes {
                bench.progress.detail(&format!("{guests} guests, {size} B"));
                let rounds = self.rounds(bench, guests, size).await?;
                for (way, points) in points.iter_mut().enumerate() {
                    points
                        .push((f64::from(size), of(&rounds[way], |round| round.packets_per_second).median()));
                }
                report.figures.extend(figures(guests, size, &rounds));
                rows.extend(
                    Way::ALL.iter().zip(&rounds).map(|(way, rounds)| row(*way, guests, size, rounds)),
                );
            }
            let lines = Way::ALL.iter().zip(points).map(|(way, points)| Line {
                name: way.name().into(),
                points,
                reference: *way == Way::Multiplexed,
            });
            report.charts.push(Chart {
                file: format!("tenants-sharing-{guests}"),
                title: format!("Packets of {guests} guests in batches of 128, by way to the device"),
                x: "size of a packet (bytes)",
                y: "packets per second",
                y_scale: Scale::Linear,
                lines: lines.collect(),
            });
        }
        let header =
            ["way, guests, bytes", "packets/s", "min..max", "copied B/packet", "server s/GB", "all s/GB"];
        report.tables.push(Sheet {
            title: "Sharing a device: one batch of 128 packets under way for each guest, over mutual TLS"
                .into(),
            header: header.map(String::from).into(),
            rows,
        });
        Ok(report)
    }

    /// The rounds of each way; who begins changes from round to round. The first round is thrown away: domains are made and caches warmed.
    async fn rounds(&mut self, bench: &Bench, guests: usize, size: u32) -> anyhow::Result<Vec<Vec<Round>>> {
        let rounds = bench.plan.pick(3, 11);
        let milliseconds = bench.plan.pick(60, 150);
        let mut values = vec![Vec::new(); Way::ALL.len()];
        for round in 0..=rounds {
            for turn in 0..Way::ALL.len() {
                let index = (round + turn) % Way::ALL.len();
                let work = Work { packet_bytes: size, milliseconds };
                let measured = self.round(Way::ALL[index], guests, work).await;
                let measured = measured.with_context(|| Way::ALL[index].name())?;
                if round > 0 {
                    values[index].push(measured);
                }
            }
        }
        Ok(values)
    }

    async fn round(&mut self, way: Way, guests: usize, work: Work) -> anyhow::Result<Round> {
        let copied_before = self.copied(way).await?;
        let before = self.processors()?;
        for guest in &mut self.stage.guests[..guests] {
            guest.ask(&way.ask(work)).await?;
        }
        let (mut packets, mut copied, mut per_second) = (0, 0, 0.0);
        for guest in &mut self.stage.guests[..guests] {
            match guest.told().await? {
                Told::Packets { packets: of_guest, copied_bytes, seconds } => {
                    packets += of_guest;
                    copied += copied_bytes;
                    per_second += of_guest as f64 / seconds;
                }
                other => bail!("a guest told {other:?}"),
            }
        }
        let after = self.processors()?;
        copied += self.copied(way).await? - copied_before;
        let each = |sum: f64| sum / packets as f64;
        Ok(Round {
            packets_per_second: per_second,
            copied_bytes: each(copied as f64),
            server_seconds: each(after.0 - before.0),
            all_seconds: each(after.1 - before.1),
        })
    }

    /// What the multiplexer has copied.
    async fn copied(&mut self, way: Way) -> anyhow::Result<u64> {
        if way != Way::Multiplexed {
            return Ok(0);
        }
        let hypervisor = self.stage.hypervisor.as_mut().context("there is a hypervisor")?;
        match hypervisor.answer(&Ask::Copied).await? {
            Told::Copied { bytes, .. } => Ok(bytes),
            other => bail!("the hypervisor told {other:?}"),
        }
    }

    /// Processor time of the server, and of everybody.
    fn processors(&self) -> anyhow::Result<(f64, f64)> {
        let server = processor_seconds(self.stage.server.process.id().context("the server has ended")?)?;
        let mut all = server;
        for engine in &self.engines {
            all += processor_seconds(engine.id().context("an engine has ended")?)?;
        }
        for peer in self.stage.guests.iter().chain(&self.stage.hypervisor) {
            all += processor_seconds(peer.id()?)?;
        }
        Ok((server, all))
    }
}

fn of(rounds: &[Round], what: impl Fn(&Round) -> f64) -> Samples {
    Samples::new(rounds.iter().map(what).collect())
}

/// Seconds for a gigabyte, of seconds for a packet.
fn per_gigabyte(size: u32) -> impl Fn(f64) -> f64 {
    move |seconds| seconds * 1e9 / f64::from(size)
}

fn row(way: Way, guests: usize, size: u32, rounds: &[Round]) -> Vec<String> {
    let rate = of(rounds, |round| round.packets_per_second);
    let gigabyte = per_gigabyte(size);
    vec![
        format!("{}, {guests}, {size}", way.name()),
        number(rate.median()),
        format!("{}..{}", number(rate.min()), number(rate.max())),
        number(of(rounds, |round| round.copied_bytes).median()),
        number(of(rounds, |round| round.server_seconds).map(&gigabyte).median()),
        number(of(rounds, |round| round.all_seconds).map(&gigabyte).median()),
    ]
}

fn figures(guests: usize, size: u32, rounds: &[Vec<Round>]) -> Vec<Figure> {
    let index = |way: Way| Way::ALL.iter().position(|other| *other == way).unwrap_or_default();
    let rates: Vec<Samples> =
        rounds.iter().map(|rounds| of(rounds, |round| round.packets_per_second)).collect();
    let multiplexed = &rates[index(Way::Multiplexed)];
    let mut figures = Vec::new();
    for (way, rounds) in Way::ALL.iter().zip(rounds) {
        let name = format!("tenants-sharing-{}-{guests}-{size}", way.name());
        let rate = Figure::alone(&name, "packets/s", &rates[index(*way)]);
        figures.push(match way {
            // What direct assignment is for: whatever the mode, it beats copying.
            Way::Direct(_) => rate
                .beside("multiplexed", multiplexed, RatioOf::ValueToReference)
                .judged(Target::ratio_at_least(1.0)),
            Way::Multiplexed => rate,
        });
        let copied = of(rounds, |round| round.copied_bytes / f64::from(size));
        let copied = Figure::alone(format!("{name}-copies"), "copies/byte", &copied);
        figures.push(copied.judged(match way {
            Way::Direct(_) => Target::value_at_most(0.0),
            Way::Multiplexed => Target::value_at_least(2.0),
        }));
        let server = of(rounds, |round| round.server_seconds).map(per_gigabyte(size));
        figures.push(Figure::alone(format!("{name}-server"), "CPU s/GB", &server));
        let all = of(rounds, |round| round.all_seconds).map(per_gigabyte(size));
        figures.push(Figure::alone(format!("{name}-all"), "CPU s/GB", &all));
    }
    // Nothing is mapped and unmapped in a direct map.
    let direct = &rates[index(Way::Direct(Mode::Passthrough))];
    for mode in [Mode::Strict, Mode::Deferred, Mode::Ring] {
        let name = format!("tenants-sharing-direct-map-{guests}-{size}-{}", mode.name());
        let figure = Figure::alone(name, "packets/s", direct);
        let reference = &rates[index(Way::Direct(mode))];
        figures.push(
            figure
                .beside("the other mode", reference, RatioOf::ValueToReference)
                .judged(Target::ratio_at_least(1.0)),
        );
    }
    figures
}
