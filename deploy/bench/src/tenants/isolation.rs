//! What a neighbour can do to a tenant: a victim's DMA beside one who keeps to its limits, and beside the same one who floods.
//!
//! The victim's device does batches of one shape, one under way at a time, and faults now and then where nothing is mapped. The neighbour has limits on its
//! rates. In one round it keeps just below them by its own pace; in the next it does as much as it can of everything: DMA over both rates, DMA that faults, calls
//! and map streams, subscriptions, and connections.
//!
//! In earnest the neighbour burns the processors of its own machine. So its processes run on one processor here, and the server, the hypervisor and the
//! victim on the others, in both rounds alike: what is measured is what comes through the server, and not what the scheduler of one machine shares out.
//! With two processors the server and the victim share one, so that whatever the flood costs the server is taken from the victim.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use iommu_launch::Binaries;

use super::peer::Peer;
use super::processors::Machines;
use super::stage::Stage;
use super::words::{Ask, DmaDone, DmaWork, Requests, RequestsDone, Shape, Told};
use crate::figure::{Figure, RatioOf, Target};
use crate::report::{Report, Skipped};
use crate::samples::Samples;
use crate::stand::Bench;

/// What each device has mapped.
const MAPPED_BYTES: u64 = 1 << 20;
/// What a loud neighbour is compared with.
const BESIDE: &str = "neighbour at its limits";
/// How much longer the neighbour goes on than the victim, before and after.
const LEAD: Duration = Duration::from_millis(100);
/// The victim's batch, and the one in so many that goes astray once.
const VICTIM: Shape = Shape { operations: 64, size_bytes: 64, strays: 0 };
const VICTIM_STRAYS_EVERY: usize = 64;
/// Just below every limit of the neighbour: operations, bytes, requests.
const HELD_OPERATIONS: u32 = 196_000;
const HELD: [Shape; 1] = [Shape { operations: 128, size_bytes: 320, strays: 0 }];
const HELD_REQUESTS: u32 = 980;

/// What the neighbour does too much of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flood {
    Dma,
    Faults,
    Calls,
    Streams,
    Connections,
    /// All of it at once.
    Everything,
}

/// How the neighbour speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Voice {
    /// It paces itself, with requests of the kind that it floods with otherwise.
    Held,
    /// At the top of it.
    Loud,
}

impl Flood {
    const APART: [Self; 5] = [Self::Dma, Self::Faults, Self::Calls, Self::Streams, Self::Connections];

    const fn name(self) -> &'static str {
        match self {
            Self::Dma => "dma",
            Self::Faults => "faults",
            Self::Calls => "calls",
            Self::Streams => "streams",
            Self::Connections => "connections",
            Self::Everything => "everything",
        }
    }
    fn has(self, what: Self) -> bool {
        self == what || self == Self::Everything
    }
    fn dma(self, voice: Voice, iova: u64, milliseconds: u64) -> DmaWork {
        let mut shapes = Vec::new();
        if voice == Voice::Loud && self.has(Self::Faults) {
            shapes.extend([Shape { operations: 128, size_bytes: 64, strays: 128 }; 64]);
        }
        // More operations than a burst may have, then more bytes.
        if voice == Voice::Loud && self.has(Self::Dma) {
            shapes.extend([Shape { operations: 128, size_bytes: 64, strays: 0 }; 120]);
            shapes.extend([Shape { operations: 16, size_bytes: 64 << 10, strays: 0 }; 8]);
        }
        let is_held = shapes.is_empty();
        if is_held {
            shapes.extend(HELD);
        }
        let (in_flight, operations_per_second) =
            if is_held { (4, Some(HELD_OPERATIONS)) } else { (32, None) };
        DmaWork { iova, mapped_bytes: MAPPED_BYTES, shapes, in_flight, operations_per_second, milliseconds }
    }
    fn requests(self, voice: Voice, milliseconds: u64) -> Requests {
        let is_loud = voice == Voice::Loud;
        let of_requests = self.has(Self::Calls) || self.has(Self::Streams);
        // Two calls for a batch of a stream, unless one of the two is the whole flood.
        let (calls, streams) = match self {
            Self::Calls => (6, 0),
            Self::Streams => (0, 6),
            _ => (4, 2),
        };
        let times = if is_loud && of_requests { 32 } else { 1 };
        let if_loud = |what, count| if is_loud && self.has(what) { count } else { 0 };
        Requests {
            calls: calls * times,
            streams: streams * times,
            per_second: (times == 1).then_some(HELD_REQUESTS),
            watchers: if_loud(Self::Faults, 80),
            connections: if_loud(Self::Connections, 16),
            milliseconds,
        }
    }
}

/// What one round gave.
#[derive(Debug)]
struct Round {
    victim: DmaDone,
    meanwhile: RequestsDone,
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
    machines.enter()?;
    let measured = in_the_hall(bench, &binaries, &machines).await;
    machines.leave()?;
    measured
}

async fn in_the_hall(bench: &Bench, binaries: &Binaries, machines: &Machines) -> anyhow::Result<Report> {
    let mut hall = Hall::start(Stage::start(binaries).await?, machines).await?;
    let measured = hall.all(bench).await;
    for device in [hall.victim, hall.neighbour] {
        device.end().await;
    }
    hall.stage.stop().await;
    measured
}

impl Hall {
    async fn start(mut stage: Stage, machines: &Machines) -> anyhow::Result<Self> {
        stage.populate(false, true).await?;
        let victim = stage.generator(1).await?;
        let neighbour = stage.generator(2).await?;
        for process in [neighbour.id()?, stage.guests[1].id()?] {
            machines.send_away(process)?;
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
        let (held, loud) = self.in_turn(Flood::Everything, rounds, milliseconds).await?;
        report.figures.extend(figures(Flood::Everything, &held, &loud));
        report.figures.extend(evidence(&held, &loud));
        report.figures.extend(refusals(&loud));
        report.figures.push(self.connecting(bench.plan.pick(2, 5), milliseconds).await?);
        if !bench.plan.quick {
            for flood in Flood::APART {
                bench.progress.detail(flood.name());
                let (held, loud) = self.in_turn(flood, 5, milliseconds).await?;
                report.figures.extend(figures(flood, &held, &loud));
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
        let (mut held, mut loud) = (Vec::new(), Vec::new());
        for round in 0..=rounds {
            let order = if round % 2 == 0 { [Voice::Held, Voice::Loud] } else { [Voice::Loud, Voice::Held] };
            for voice in order {
                let measured = self
                    .round(flood, voice, milliseconds, Requests::default())
                    .await
                    .with_context(|| flood.name())?;
                match (round, voice) {
                    (0, _) => {}
                    (_, Voice::Held) => held.push(measured),
                    (_, Voice::Loud) => loud.push(measured),
                }
            }
        }
        Ok((held, loud))
    }

    /// How long the victim's driver takes to connect meanwhile, over and over. Nobody pays for a handshake, and who connects again and again has what is left.
    async fn connecting(&mut self, rounds: usize, milliseconds: u64) -> anyhow::Result<Figure> {
        let connects = Requests { connections: 1, ..Requests::default() };
        let (mut held, mut loud) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            for (voice, times) in [(Voice::Held, &mut held), (Voice::Loud, &mut loud)] {
                let round = self.round(Flood::Everything, voice, milliseconds, connects).await?;
                let RequestsDone { seconds, connections, .. } = round.meanwhile;
                ensure!(connections > 0, "the victim's driver connects to nobody in {seconds:.1} s");
                times.push(seconds / connections as f64 * 1e3);
            }
        }
        let (held, loud) = (Samples::new(held), Samples::new(loud));
        let figure = Figure::alone("tenants-isolation-connecting", "ms", &loud);
        Ok(figure.beside(BESIDE, &held, RatioOf::ValueToReference))
    }

    /// One round; `meanwhile` is what the victim's driver does.
    async fn round(
        &mut self,
        flood: Flood,
        voice: Voice,
        milliseconds: u64,
        meanwhile: Requests,
    ) -> anyhow::Result<Round> {
        let [of_victim, of_neighbour] = self.iovas;
        let longer = milliseconds + 2 * LEAD.as_millis() as u64;
        self.neighbour.ask(&Ask::Dma(flood.dma(voice, of_neighbour, longer))).await?;
        self.stage.guests[1].ask(&Ask::Requests(flood.requests(voice, longer))).await?;
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
        self.stage.guests[0].ask(&Ask::Requests(Requests { milliseconds, ..meanwhile })).await?;
        let victim = dma_done(self.victim.answer(&Ask::Dma(work)).await?)?;
        let neighbour = dma_done(self.neighbour.told().await?)?;
        let [of_victim, requests] = [self.stage.guests[0].told().await?, self.stage.guests[1].told().await?];
        let (meanwhile, requests) = (requests_done(of_victim)?, requests_done(requests)?);
        let after = std::mem::take(&mut self.log_end);
        match self.stage.guests[0].answer(&Ask::Faults { after }).await? {
            Told::Faults { recorded, missed, end } => {
                self.log_end = end;
                Ok(Round { victim, meanwhile, recorded, missed, neighbour, requests })
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

fn requests_done(told: Told) -> anyhow::Result<RequestsDone> {
    match told {
        Told::Requests(done) => Ok(done),
        other => bail!("a guest told {other:?}"),
    }
}

fn of(rounds: &[Round], what: impl Fn(&Round) -> f64) -> Samples {
    Samples::new(rounds.iter().map(what).collect())
}

/// The victim beside both. Everything at once is judged: I7 is kept in time as well when a flood leaves four fifths, and at most twice the tail. The
/// parts of it say where a loss comes from.
fn figures(flood: Flood, held: &[Round], loud: &[Round]) -> [Figure; 2] {
    let name = format!("tenants-isolation-{}", flood.name());
    let rate = |rounds| of(rounds, |round: &Round| round.victim.operations as f64 / round.victim.seconds);
    let tail = |rounds| of(rounds, |round: &Round| round.victim.p99_us);
    let rate = Figure::alone(format!("{name}-rate"), "operations/s", &rate(loud)).beside(
        BESIDE,
        &rate(held),
        RatioOf::ValueToReference,
    );
    let tail = Figure::alone(format!("{name}-p99"), "us", &tail(loud)).beside(
        BESIDE,
        &tail(held),
        RatioOf::ValueToReference,
    );
    if flood != Flood::Everything {
        return [rate, tail];
    }
    [rate.judged(Target::ratio_at_least(0.8)), tail.judged(Target::ratio_at_most(2.0))]
}

/// That no fault of the victim is missing, whatever the neighbour does; and that nobody refused it anything.
fn evidence(held: &[Round], loud: &[Round]) -> [Figure; 3] {
    let both = || held.iter().chain(loud);
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
fn refusals(loud: &[Round]) -> Vec<Figure> {
    let of_device: f64 = loud.iter().map(|round| round.neighbour.seconds).sum();
    // Its refusals are told late: long after what passed.
    let of_guest: f64 = loud.iter().map(|round| round.requests.seconds).sum();
    let mut refused: BTreeMap<String, f64> = BTreeMap::new();
    for round in loud {
        let by_device = round.neighbour.refused.iter().map(|(name, count)| (name, *count as f64 / of_device));
        let by_guest = round.requests.refused.iter().map(|(name, count)| (name, *count as f64 / of_guest));
        for (name, per_second) in by_device.chain(by_guest) {
            *refused.entry(name.clone()).or_default() += per_second;
        }
    }
    let figure = |name: &str, unit, value: f64| {
        Figure::alone(format!("tenants-isolation-{name}"), unit, &Samples::exactly(value))
    };
    let mut figures = Vec::new();
    for name in ["dma_operations_per_second", "dma_bytes_per_second", "requests_per_second"] {
        let refused = figure(&format!("over-{name}"), "refused/s", refused.remove(name).unwrap_or(0.0));
        figures.push(refused.judged(Target::value_at_least(1.0)));
    }
    for (name, refused) in refused {
        figures.push(figure(&format!("over-{}", name.replace(' ', "_")), "refused/s", refused));
    }
    let sum = |what: fn(&Round) -> u64| loud.iter().map(what).sum::<u64>() as f64;
    let operations = sum(|round| round.neighbour.operations + round.neighbour.faults) / of_device;
    figures.push(figure("passed-dma", "operations/s", operations));
    figures.push(figure("passed-requests", "requests/s", sum(|round| round.requests.answered) / of_device));
    figures.push(figure("connections", "handshakes/s", sum(|round| round.requests.connections) / of_device));
    figures
}
