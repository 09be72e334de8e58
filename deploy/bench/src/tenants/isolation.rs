//! What a neighbour can do to a tenant: a victim's DMA beside one who keeps to its limits, and beside the same one who floods.
//!
//! The victim's device does batches of one shape, one under way at a time, and faults now and then where nothing is mapped. The neighbour has limits on its
//! rates. In one round it stays below them by its own pace; in the next it does as much as it can of everything: DMA over both rates, DMA that faults, calls and
//! map streams, subscriptions, and connections.
//!
//! In earnest the neighbour burns the processors of its own machine. So its processes run on one processor here, and the server, the hypervisor and the
//! victim on the others, in both rounds alike: what is measured is what comes through the server, and not what the scheduler of one machine shares out.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, bail};

use super::peer::Peer;
use super::processors::{self, Machines};
use super::stage::Stage;
use super::words::{Ask, DmaDone, DmaWork, Requests, RequestsDone, Shape, Told};
use crate::figure::{Figure, RatioOf, Target};
use crate::report::{Report, Skipped};
use crate::samples::Samples;
use crate::stand::Bench;

/// What each device has mapped.
const MAPPED_BYTES: u64 = 1 << 20;
/// How much longer the neighbour goes on than the victim, before and after.
const LEAD: Duration = Duration::from_millis(100);
/// The victim's batch, and the one in so many that goes astray once.
const VICTIM: Shape = Shape { operations: 64, size_bytes: 64, strays: 0 };
const VICTIM_STRAYS_EVERY: usize = 64;
/// Below every limit of the neighbour by a tenth: operations, bytes, requests.
const PACED_OPERATIONS: u32 = 180_000;
const PACED_REQUESTS: u32 = 900;
const PACED: [Shape; 1] = [Shape { operations: 128, size_bytes: 256, strays: 0 }];

/// What the neighbour does too much of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flood {
    /// Nothing: it paces itself.
    None,
    Dma,
    Faults,
    Calls,
    Streams,
    Connections,
    /// All of it at once.
    Everything,
}

impl Flood {
    const APART: [Self; 5] = [Self::Dma, Self::Faults, Self::Calls, Self::Streams, Self::Connections];

    const fn name(self) -> &'static str {
        match self {
            Self::None => "paced",
            Self::Dma => "dma",
            Self::Faults => "faults",
            Self::Calls => "calls",
            Self::Streams => "streams",
            Self::Connections => "connections",
            Self::Everything => "everything",
        }
    }
    fn does(self, what: Self) -> bool {
        self == what || self == Self::Everything
    }
    fn dma(self, iova: u64, milliseconds: u64) -> DmaWork {
        let mut shapes = Vec::new();
        if self.does(Self::Faults) {
            shapes.extend([Shape { operations: 128, size_bytes: 64, strays: 128 }; 64]);
        }
        // More operations than a burst may have, then more bytes.
        if self.does(Self::Dma) {
            shapes.extend([Shape { operations: 128, size_bytes: 64, strays: 0 }; 120]);
            shapes.extend([Shape { operations: 16, size_bytes: 64 << 10, strays: 0 }; 8]);
        }
        let is_paced = shapes.is_empty();
        if is_paced {
            shapes.extend(PACED);
        }
        let (in_flight, operations_per_second) =
            if is_paced { (4, Some(PACED_OPERATIONS)) } else { (32, None) };
        DmaWork { iova, mapped_bytes: MAPPED_BYTES, shapes, in_flight, operations_per_second, milliseconds }
    }
    fn requests(self, milliseconds: u64) -> Requests {
        let floods = self.does(Self::Calls) || self.does(Self::Streams);
        let of = |flood: Self, paced: usize, flooding: usize| match (self.does(flood), floods) {
            (true, _) => flooding,
            // Who floods with one kind of request does not do the other.
            (false, true) => 0,
            (false, false) => paced,
        };
        Requests {
            calls: of(Self::Calls, 4, 128),
            streams: of(Self::Streams, 2, 64),
            per_second: (!floods).then_some(PACED_REQUESTS),
            watchers: if self.does(Self::Faults) { 80 } else { 0 },
            connections: if self.does(Self::Connections) { 16 } else { 0 },
            milliseconds,
        }
    }
}

/// What one round gave.
#[derive(Debug)]
struct Round {
    victim: DmaDone,
    recorded: u64,
    missed: u64,
    neighbour: DmaDone,
    requests: RequestsDone,
}

/// Everybody.
struct Hall {
    stage: Stage,
    victim: Peer,
    neighbour: Peer,
    iovas: [u64; 2],
    log_end: String,
}

/// Rounds beside a neighbour who paces itself and beside one who floods.
pub(crate) async fn beside_a_flood(bench: &mut Bench) -> anyhow::Result<Report> {
    let binaries = bench.binaries()?;
    bench.progress.detail("processes start");
    let Some(machines) = Machines::divide()? else {
        let skipped = vec![Skipped { name: "tenants-isolation", skipped: "a single processor" }];
        return Ok(Report { skipped, ..Report::default() });
    };
    let mut hall = Hall::start(Stage::start(&binaries).await?, &machines).await?;
    let measured = hall.all(bench).await;
    hall.stage.stop().await;
    measured
}

impl Hall {
    async fn start(mut stage: Stage, machines: &Machines) -> anyhow::Result<Self> {
        stage.populate(false, true).await?;
        let victim = stage.generator(1).await?;
        let neighbour = stage.generator(2).await?;
        let hypervisor = stage.hypervisor.as_ref().context("the stage is populated")?.id()?;
        let server = stage.server.process.id().context("the server has ended")?;
        for process in [server, hypervisor, victim.id()?, stage.guests[0].id()?] {
            processors::bind(process, &machines.near)?;
        }
        for process in [neighbour.id()?, stage.guests[1].id()?] {
            processors::bind(process, &machines.far)?;
        }
        let mut iovas = [0; 2];
        for (guest, iova) in stage.guests.iter_mut().zip(&mut iovas) {
            match guest.answer(&Ask::Map { size_bytes: MAPPED_BYTES }).await? {
                Told::Mapped { iova: at } => *iova = at,
                other => bail!("a guest told {other:?}"),
            }
        }
        Ok(Self { stage, victim, neighbour, iovas, log_end: String::new() })
    }

    async fn all(&mut self, bench: &Bench) -> anyhow::Result<Report> {
        let milliseconds = bench.plan.pick(250, 600);
        let mut report = Report::default();
        let rounds = bench.plan.pick(4, 15);
        bench.progress.detail("everything");
        let (paced, flooded) = self.in_turn(Flood::Everything, rounds, milliseconds).await?;
        report.figures.extend(figures(Flood::Everything, &paced, &flooded));
        report.figures.extend(evidence(&paced, &flooded));
        report.figures.extend(refusals(&flooded)?);
        if !bench.plan.quick {
            for flood in Flood::APART {
                bench.progress.detail(flood.name());
                let (paced, flooded) = self.in_turn(flood, 5, milliseconds).await?;
                report.figures.extend(figures(flood, &paced, &flooded));
            }
        }
        Ok(report)
    }

    /// Both in turn; who begins changes from round to round. One round before the first is thrown away.
    async fn in_turn(
        &mut self,
        flood: Flood,
        rounds: usize,
        milliseconds: u64,
    ) -> anyhow::Result<(Vec<Round>, Vec<Round>)> {
        let (mut paced, mut flooded) = (Vec::new(), Vec::new());
        for round in 0..=rounds {
            let order = if round % 2 == 0 { [Flood::None, flood] } else { [flood, Flood::None] };
            for each in order {
                let measured = self.round(each, milliseconds).await.with_context(|| each.name())?;
                match (round, each) {
                    (0, _) => {}
                    (_, Flood::None) => paced.push(measured),
                    _ => flooded.push(measured),
                }
            }
        }
        Ok((paced, flooded))
    }

    async fn round(&mut self, flood: Flood, milliseconds: u64) -> anyhow::Result<Round> {
        let [of_victim, of_neighbour] = self.iovas;
        let longer = milliseconds + 2 * LEAD.as_millis() as u64;
        self.neighbour.ask(&Ask::Dma(flood.dma(of_neighbour, longer))).await?;
        self.stage.guests[1].ask(&Ask::Requests(flood.requests(longer))).await?;
        tokio::time::sleep(LEAD).await;
        let mut shapes = vec![VICTIM; VICTIM_STRAYS_EVERY];
        shapes[0].strays = 1;
        let work = DmaWork {
            iova: of_victim,
            mapped_bytes: MAPPED_BYTES,
            shapes,
            in_flight: 1,
            operations_per_second: None,
            milliseconds,
        };
        let victim = dma_done(self.victim.answer(&Ask::Dma(work)).await?)?;
        let neighbour = dma_done(self.neighbour.told().await?)?;
        let requests = match self.stage.guests[1].told().await? {
            Told::Requests(done) => done,
            other => bail!("the neighbour told {other:?}"),
        };
        let after = std::mem::take(&mut self.log_end);
        match self.stage.guests[0].answer(&Ask::Faults { after }).await? {
            Told::Faults { recorded, missed, end } => {
                self.log_end = end;
                Ok(Round { victim, recorded, missed, neighbour, requests })
            }
            other => bail!("the victim told {other:?}"),
        }
    }
}

fn dma_done(told: Told) -> anyhow::Result<DmaDone> {
    match told {
        Told::Dma(done) => Ok(done),
        other => bail!("a device told {other:?}"),
    }
}

fn of(rounds: &[Round], what: impl Fn(&Round) -> f64) -> Samples {
    Samples::new(rounds.iter().map(what).collect())
}

/// The victim beside both. Everything at once is judged: I7 is kept in time as well when a flood leaves four fifths, and at most twice the tail. The
/// parts of it say where a loss comes from.
fn figures(flood: Flood, paced: &[Round], flooded: &[Round]) -> [Figure; 2] {
    let name = format!("tenants-isolation-{}", flood.name());
    let rate = |rounds| of(rounds, |round: &Round| round.victim.operations as f64 / round.victim.seconds);
    let tail = |rounds| of(rounds, |round: &Round| round.victim.p99_us);
    let beside = "paced neighbour";
    let rate = Figure::alone(format!("{name}-rate"), "operations/s", &rate(flooded)).beside(
        beside,
        &rate(paced),
        RatioOf::ValueToReference,
    );
    let tail = Figure::alone(format!("{name}-p99"), "us", &tail(flooded)).beside(
        beside,
        &tail(paced),
        RatioOf::ValueToReference,
    );
    if flood != Flood::Everything {
        return [rate, tail];
    }
    [rate.judged(Target::ratio_at_least(0.8)), tail.judged(Target::ratio_at_most(2.0))]
}

/// That no fault of the victim is missing, whatever the neighbour does; and that nobody refused it anything.
fn evidence(paced: &[Round], flooded: &[Round]) -> [Figure; 3] {
    let both = || paced.iter().chain(flooded);
    let sum = |what: fn(&Round) -> u64| Samples::exactly(both().map(what).sum::<u64>() as f64);
    let faults = sum(|round| round.victim.faults);
    let recorded = Figure::alone("tenants-isolation-faults", "recorded", &sum(|round| round.recorded))
        .beside("faults made", &faults, RatioOf::ValueToReference)
        .judged(Target::ratio_between(1.0, 1.0));
    let missed = Figure::alone("tenants-isolation-overwritten", "records", &sum(|round| round.missed));
    let refused = Figure::alone(
        "tenants-isolation-refused",
        "operations",
        &sum(|round| round.victim.refused.values().sum()),
    );
    [recorded, missed.judged(Target::value_at_most(0.0)), refused.judged(Target::value_at_most(0.0))]
}

/// What the neighbour was refused, by the name of the limit, in a second; and what passed.
fn refusals(flooded: &[Round]) -> anyhow::Result<Vec<Figure>> {
    let first = flooded.first().context("there is a round")?;
    let seconds = first.neighbour.seconds;
    let mut refused: BTreeMap<String, u64> = BTreeMap::new();
    for round in flooded {
        for (name, count) in round.neighbour.refused.iter().chain(&round.requests.refused) {
            *refused.entry(name.clone()).or_default() += count;
        }
    }
    let each = |count: u64| Samples::exactly(count as f64 / flooded.len() as f64 / seconds);
    let mut figures = Vec::new();
    for name in ["dma_operations_per_second", "dma_bytes_per_second", "requests_per_second"] {
        let count = refused.remove(name).unwrap_or(0);
        let figure = Figure::alone(format!("tenants-isolation-over-{name}"), "refused/s", &each(count));
        figures.push(figure.judged(Target::value_at_least(1.0)));
    }
    for (name, count) in refused {
        let name = name.replace(' ', "_");
        figures.push(Figure::alone(format!("tenants-isolation-over-{name}"), "refused/s", &each(count)));
    }
    let passed = |what: fn(&Round) -> u64| each(flooded.iter().map(what).sum());
    let operations = passed(|round| round.neighbour.operations + round.neighbour.faults);
    figures.push(Figure::alone("tenants-isolation-passed-dma", "operations/s", &operations));
    let requests = passed(|round| round.requests.answered);
    figures.push(Figure::alone("tenants-isolation-passed-requests", "requests/s", &requests));
    let connections = passed(|round| round.requests.connections);
    figures.push(Figure::alone("tenants-isolation-connections", "handshakes/s", &connections));
    Ok(figures)
}
