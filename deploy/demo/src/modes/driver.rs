//! The driver of a device that writes after unmap, in one domain after the other.

use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use dma_engine::pattern;
use guest_sdk::{
    Buffer, Connection, DeviceAddress, DeviceHandle, Direction, DmaMapping, Domain, DomainOptions,
    DomainState, Driver, Iova, Protection, SanitizerFilter, SanitizerReport,
};

use super::blame;
use super::expected::{Attack, Expected, WINDOW};
use super::seen::{Memory, Recorded, Reported, Seen};
use crate::driver::{NAME, OWNER};
use crate::engine::{Ended, Engine, PATTERN};
use crate::records::{end_of_log, record_after};
use crate::report::{self, Step, Told};

/// Bytes of the buffer, and of what the device writes at its beginning.
pub(super) const BUFFER_BYTES: u64 = 4096;
pub(super) const WRITE_BYTES: u32 = 64;
/// What the CPU puts into the buffer once it is unmapped.
const CANARY: &[u8; 8] = b"canary! ";
/// Reports are there when a DMA is answered; a machine under load may need more.
const REPORT_DEADLINE: Duration = Duration::from_secs(5);
/// How much longer than its window a flush may take on a machine under load.
const FLUSH_DEADLINE: Duration = Duration::from_secs(10);

/// What the parent says on the command line.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Where the server listens.
    #[arg(long)]
    server: String,
    /// The device.
    #[arg(long)]
    device: DeviceAddress,
}

/// Attacks every mode.
pub(crate) async fn run(options: Options) -> anyhow::Result<()> {
    let driver =
        Connection::to(&options.server).driver(NAME, OWNER).await.context("open a session as driver")?;
    let engine = Engine::start(&driver, driver.device(options.device)).await?;
    let mut play = Play { driver, engine };
    for attack in [Attack::Passthrough, Attack::Strict, Attack::StrictByte] {
        play.right_after_unmap(attack).await?;
    }
    play.deferred().await?;
    for attack in [Attack::Shared, Attack::Persistent, Attack::Bounce] {
        play.right_after_unmap(attack).await?;
    }
    play.ring().await?;
    blame::run(&mut play).await
}

/// A driver and its device.
pub(super) struct Play {
    pub(super) driver: Driver,
    pub(super) engine: Engine,
}

/// A buffer that is mapped in a domain of its own.
pub(super) struct Mapped {
    options: DomainOptions,
    domain: Domain,
    buffer: Buffer,
    mapping: DmaMapping,
    neighbour: Option<(Buffer, DmaMapping)>,
}

impl Mapped {
    /// Where.
    pub(super) fn iova(&self) -> Iova {
        self.mapping.iova()
    }
}

/// A buffer of a domain that was mapped, written by the device, and unmapped.
pub(super) struct Target {
    options: DomainOptions,
    domain: Domain,
    buffer: Buffer,
    /// Where it was mapped.
    pub(super) iova: Iova,
    /// Occupies slot 0 of ring 0 where there are rings: its address is 0, and then small numbers in any register pass for addresses.
    neighbour: Option<(Buffer, DmaMapping)>,
    /// Before the unmap.
    invalidations: u64,
    unmapped: Instant,
}

/// Where the logs ended before an attack.
pub(super) struct Before {
    faults: String,
    reports: u64,
}

pub(super) fn canary() -> Vec<u8> {
    CANARY.repeat(BUFFER_BYTES as usize / CANARY.len())
}

/// What the device writes.
pub(super) fn written() -> Bytes {
    pattern::fill(PATTERN, WRITE_BYTES as usize)
}

pub(super) fn begin(name: &str, story: &str) -> anyhow::Result<()> {
    Told::Begin { name: name.to_owned(), story: story.to_owned() }.tell()
}

/// Compares what came with what must come, and tells both.
pub(super) fn end(name: &str, expected: &Expected, seen: Seen) -> anyhow::Result<()> {
    let wrong = seen.differs(expected);
    let mut details = seen.lines();
    details.extend(report::wrapped("because   ", expected.why));
    let observed = if wrong.is_empty() { seen.in_short() } else { wrong.join("; ") };
    Told::End(Box::new(Step {
        name: name.to_owned(),
        expected: expected.to_string(),
        observed,
        passed: wrong.is_empty(),
        details,
        attack: Some(seen),
    }))
    .tell()
}

impl Play {
    /// Map, write, unmap, attack.
    async fn right_after_unmap(&mut self, attack: Attack) -> anyhow::Result<()> {
        let target = self.prepare(attack, true).await?;
        self.strike(&target, attack).await?;
        self.leave(target).await
    }

    /// The attack inside the stale window, and again when the window is closed.
    async fn deferred(&mut self) -> anyhow::Result<()> {
        let target = self.prepare(Attack::DeferredWithin, true).await?;
        self.strike(&target, Attack::DeferredWithin).await?;
        begin(Attack::DeferredAfter.name(), &Attack::DeferredAfter.story())?;
        let flushed = async {
            while self.state(&target.domain).await?.pending_flushes > 0 {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            anyhow::Ok(())
        };
        tokio::time::timeout(WINDOW + FLUSH_DEADLINE, flushed)
            .await
            .with_context(|| format!("no flush within {FLUSH_DEADLINE:?} after the window"))??;
        self.strike(&target, Attack::DeferredAfter).await?;
        self.leave(target).await
    }

    /// The attack while the burst goes on, and again when it has ended.
    async fn ring(&mut self) -> anyhow::Result<()> {
        let mut target = self.prepare(Attack::RingWithin, false).await?;
        self.strike(&target, Attack::RingWithin).await?;
        begin(Attack::RingAfter.name(), &Attack::RingAfter.story())?;
        let (buffer, mapping) = target.neighbour.take().context("a ring has a neighbour")?;
        mapping.unmap().await?;
        self.strike(&target, Attack::RingAfter).await?;
        buffer.free().await.map_err(|(_, error)| error)?;
        self.leave(target).await
    }

    async fn prepare(&mut self, attack: Attack, end_of_burst: bool) -> anyhow::Result<Target> {
        begin(attack.name(), &attack.story())?;
        let options = attack.options().context("a domain is attacked")?;
        let mapped = self.map(options).await?;
        self.unmap(mapped, end_of_burst).await
    }

    async fn strike(&mut self, target: &Target, attack: Attack) -> anyhow::Result<()> {
        let expected = attack.expected();
        let before = self.arm(target).await?;
        let ended = self.engine.write_again().await?;
        let seen = self.look(target, before, ended, &expected).await?;
        end(attack.name(), &expected, seen)
    }

    /// A domain with the device in it, and a buffer that is mapped and that the device has written, so that its translation is cached.
    pub(super) async fn map(&mut self, options: DomainOptions) -> anyhow::Result<Mapped> {
        let device = self.engine.device().clone();
        let domain = self.driver.create_domain(options).await.context("create a domain")?;
        domain.attach(&device).await.context("attach the device")?;
        let neighbour = match options.protection {
            Protection::Ring(_) => Some(self.map_buffer(&device).await?),
            _ => None,
        };
        let (buffer, mapping) = self.map_buffer(&device).await?;
        let allowed = self.engine.write(mapping.iova(), WRITE_BYTES).await?;
        ensure!(!allowed.is_error(), "while it was mapped the write ended so: {allowed}");
        Ok(Mapped { options, domain, buffer, mapping, neighbour })
    }

    async fn map_buffer(&self, device: &DeviceHandle) -> anyhow::Result<(Buffer, DmaMapping)> {
        let buffer = self.driver.allocate(BUFFER_BYTES).await?;
        let mapping = self.driver.dma_map_single(device, buffer.range(), Direction::FromDevice).await?;
        Ok((buffer, mapping))
    }

    /// Unmaps; what the device wrote before has arrived.
    pub(super) async fn unmap(&self, mapped: Mapped, end_of_burst: bool) -> anyhow::Result<Target> {
        let Mapped { options, domain, buffer, mapping, neighbour } = mapped;
        let iova = mapping.iova();
        let invalidations = self.state(&domain).await?.invalidations;
        let unmapped = Instant::now();
        if end_of_burst {
            mapping.unmap().await?
        } else {
            mapping.unmap_within_burst().await?
        }
        let arrived = buffer.read(0, WRITE_BYTES.into()).await?;
        ensure!(arrived == written(), "what the device wrote before the unmap did not arrive");
        Ok(Target { options, domain, buffer, iova, neighbour, invalidations, unmapped })
    }

    /// Puts the canary into the buffer, and notes where the logs end.
    pub(super) async fn arm(&self, target: &Target) -> anyhow::Result<Before> {
        target.buffer.write(0, canary()).await?;
        let faults = end_of_log(&self.driver).await?;
        let reports = self.driver.sanitizer().list(filter(&target.domain), 1).await?.reports;
        Ok(Before { faults, reports: reports.last().map_or(0, |report| report.sequence) })
    }

    /// What came of an attack.
    pub(super) async fn look(
        &self,
        target: &Target,
        before: Before,
        ended: Ended,
        expected: &Expected,
    ) -> anyhow::Result<Seen> {
        let since_unmap_us = u64::try_from(target.unmapped.elapsed().as_micros())?;
        let content = target.buffer.read(0, BUFFER_BYTES).await?;
        // What was let through leaves no record, now or later.
        let is_recorded = ended.is_error() || end_of_log(&self.driver).await? != before.faults;
        let recorded = match is_recorded {
            true => Some(Recorded::of(&record_after(&self.driver, &before.faults).await?)),
            false => None,
        };
        let reports = self.reports_after(&target.domain, before.reports).await?;
        let invalidations = self.state(&target.domain).await?.invalidations;
        Ok(Seen {
            mode: Some(target.options.protection.to_string()),
            granularity: Some(target.options.granularity.to_string()),
            memory: Memory::of(&content, &canary(), &written()),
            device: ended,
            recorded,
            sanitizer: Some(reports.iter().map(Reported::of).collect()),
            invalidations: invalidations
                .checked_sub(target.invalidations)
                .context("a counter went backwards")?,
            per: expected.invalidations.1.to_owned(),
            since_unmap_us,
        })
    }

    /// Reports on a domain after `sequence`. Waits for the first; none within the deadline is an answer too.
    async fn reports_after(&self, domain: &Domain, sequence: u64) -> anyhow::Result<Vec<SanitizerReport>> {
        let asked = Instant::now();
        loop {
            let list = self.driver.sanitizer().list_after(filter(domain), sequence, 0).await?;
            if !list.reports.is_empty() || asked.elapsed() > REPORT_DEADLINE {
                return Ok(list.reports);
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn state(&self, domain: &Domain) -> anyhow::Result<DomainState> {
        let domains = self.driver.inspect().domains(Some(OWNER)).await?;
        let found = domains.into_iter().find(|state| state.domain_id == domain.id());
        found.with_context(|| format!("domain {} is not listed", domain.id()))
    }

    /// Gives the device back to its default domain, and everything else to the host.
    pub(super) async fn leave(&self, target: Target) -> anyhow::Result<()> {
        if target.neighbour.is_some() {
            bail!("a neighbour is still mapped");
        }
        self.engine.device().attach_default().await?;
        target.domain.destroy().await?;
        target.buffer.free().await.map_err(|(_, error)| error).map_err(Into::into)
    }
}

fn filter(domain: &Domain) -> SanitizerFilter {
    SanitizerFilter { owner: Some(OWNER), domain_id: Some(domain.id()), device: None }
}
