//! Rows 29 and 30: many tenants on one server: what one can use up, and what one can learn.

use std::collections::BTreeMap;

use anyhow::{Context, bail, ensure};
use rogue::language::{Answer, Command, Flood, Kind, Scan};
use rogue::text::Address;

use crate::matrix::act::language::{Ask, Way};
use crate::matrix::column::Column;
use crate::matrix::evidence::Evidence;
use crate::matrix::outcome::Outcome;
use crate::matrix::scene::{PIECE_BYTES, PIECES, Scene, piece};
use crate::matrix::site::{PAGE, Site};

/// Row 29: a tenant with small limits maps, creates domains and sends DMA without end, and storms with faults; meanwhile another one works.
pub(super) async fn uses_everything_up(scene: &mut Scene<'_>) -> anyhow::Result<Evidence> {
    const FAR_TOO_MANY: u64 = 10_000;
    const STORM: u64 = 4096;
    let limits = [("mappings", 64), ("domains", 4), ("dma_operations_per_second", 2000)];
    let limits: BTreeMap<String, u64> = limits.map(|(name, value)| (name.to_owned(), value)).into();
    let mut crowd = scene.crowd(limits).await?;
    // The victim has one fault on record.
    let before = scene.judge.mark(scene.victim.connect.address).await?;
    scene.victim.begin().await?;
    let refused = scene.victim.strike(0xdead_0000).await?.context("a stray write of the victim's device is refused")?;

    crowd.begin().await?;
    let gpa = crowd.allocate(1).await?;
    let mut evidence = Evidence::default();
    let mappings = Ask::ExhaustMappings { device: crowd.device(), gpa: Address(gpa), at_most: FAR_TOO_MANY };
    let domains = Ask::ExhaustDomains { column: crowd.column, at_most: FAR_TOO_MANY };
    for ask in [domains, mappings] {
        let refused = crowd.actor.attempt(ask).await?.err();
        evidence.told(refused.map(|refused| refused.reason));
    }
    let storm = Command::Flood(Flood {
        kind: Kind::Write,
        iova: Address(0xdead_0000_0000),
        stride: Address(PAGE),
        span: 0,
        size: 8,
        operations: 64,
        batches: STORM / 64,
        in_flight: None,
    });
    let Answer::Counted(counted) = crowd.rogue.tell(&storm).await? else { bail!("counts were due") };
    // What is within the rate is refused by translation, which is no news here.
    evidence.told(counted.refused.keys().find(|reason| *reason == "0x1005").cloned());
    evidence.notes.push(format!("{STORM} stray writes: {:?}", counted.refused));

    // The victim works as if nobody else were there.
    let gpa = scene.victim.allocate(1).await?;
    let mapping = scene.victim.map(gpa, PAGE, Way::FromDevice).await?;
    scene.victim.allowed(mapping.iova).await?;
    scene.victim.unmap(&mapping, true).await?;
    let due = [refused].into();
    let kept = scene.judge.since(scene.victim.connect.address, &before, &due).await?;
    ensure!(kept == due, "the victim's fault record is hidden: {kept:?}");
    crowd.end().await?;
    Ok(evidence)
}

/// Row 30: a tenant fills the IOTLB with its own translations, lets another one work, and looks which of its own are gone. What it would time
/// on a bus is noise over a wire, so the counters of the unit say it: a miss of the probe is an entry that the other one displaced.
pub(super) async fn listens(scene: &mut Scene<'_>) -> anyhow::Result<Evidence> {
    const WORKING: u64 = 64;
    /// What the listener primes: as much as it can without displacing itself, which depends on its share.
    const SHARES: [usize; 7] =
        [PIECES, PIECES / 2, PIECES / 4, PIECES / 8, PIECES / 16, PIECES / 32, PIECES / 64];
    /// Passes after which a set holds nothing but what is primed: what was there before is displaced way by way.
    const PASSES: u32 = 8;
    let mut pages = Vec::new();
    let worker = &mut scene.victim;
    worker.begin().await?;
    let gpa = worker.allocate(WORKING).await?;
    for page in 0..WORKING {
        pages.push(worker.map(gpa + page * PAGE, PAGE, Way::FromDevice).await?.iova);
    }
    scene.listening_memory().await?;
    scene.attacker.begin_roomy().await?;
    let mut pieces = Vec::new();
    for n in 0..PIECES {
        let bytes = if scene.attacker.column == Column::Ring { PAGE } else { PIECE_BYTES };
        pieces.push((scene.attacker.map(piece(n), bytes, Way::Both).await?.iova, bytes));
    }
    let mut evidence = Evidence::default();
    for share in SHARES {
        let primed = &pieces[..share];
        let mut own = 1;
        for _ in 0..PASSES {
            own = misses_of(scene, primed).await?;
            if own == 0 {
                break;
            }
        }
        if own > 0 && share > 1 {
            continue;
        }
        for iova in &pages {
            scene.victim.allowed(*iova).await?;
        }
        let misses = misses_of(scene, primed).await?;
        let entries = primed.iter().map(|(_, bytes)| bytes / PAGE).sum::<u64>();
        evidence.notes.push(format!(
            "{entries} primed, {own} of them displaced by nobody else, {misses} displaced while the other one used {WORKING} pages"
        ));
        if misses > own {
            evidence.reached(Outcome::Succeeds);
        } else {
            evidence.told(Some("NO_EVICTION"));
        }
        return Ok(evidence);
    }
    bail!("no share of the cache stays its own")
}

/// Reads one word of every page.
async fn read_all(site: &Site, pieces: &[(u64, u64)]) -> anyhow::Result<()> {
    for (iova, bytes) in pieces {
        let (from, to) = (Address(*iova), Address(iova + bytes - PAGE));
        let scan = Scan { from, to, stride: Address(PAGE), size: 8, canary: None, write: None };
        match site.rogue.tell(&Command::Scan(scan)).await? {
            Answer::Scanned { tried, answered, .. } if tried == answered => {}
            other => bail!("a probe was refused: {other:?}"),
        }
    }
    Ok(())
}

/// Misses of one probe of everything.
async fn misses_of(scene: &Scene<'_>, pieces: &[(u64, u64)]) -> anyhow::Result<u64> {
    let misses = async || {
        let counters = scene.judge.counters().await?;
        let rings = counters.ring.map_or(0, |ring| ring.walks);
        anyhow::Ok(if scene.attacker.column == Column::Ring { rings } else { counters.iotlb.misses })
    };
    let before = misses().await?;
    read_all(&scene.attacker, pieces).await?;
    Ok(misses().await? - before)
}
