//! Rows 29 and 30: many tenants on one server: what one can use up, and what one can learn.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use rogue::language::{Answer, Command, Counted, Scan};
use rogue::text::Address;

use crate::matrix::act::language::{Ask, Way};
use crate::matrix::actor::Actor;
use crate::matrix::column::Column;
use crate::matrix::evidence::Evidence;
use crate::matrix::outcome::Outcome;
use crate::matrix::scene::{PIECE_BYTES, PIECES, Scene, WORKING, piece};
use crate::matrix::site::{FILL, PAGE, Site};

/// Row 29: a tenant with small limits maps, creates domains and sends DMA without end, and storms with faults; meanwhile another one works.
pub(super) async fn uses_everything_up(scene: &mut Scene<'_>) -> anyhow::Result<Evidence> {
    const FAR_TOO_MANY: u64 = 10_000;
    const STRAYS: u64 = 64;
    const OVER_RATE: &str = "0x1005";
    /// Half of what a cell may take, so that the storm can be ended within it.
    const STORM_MAX: Duration = Duration::from_secs(30);
    let limits = [("mappings", 64), ("domains", 4), ("dma_operations_per_second", 2000)];
    let limits: BTreeMap<String, u64> = limits.map(|(name, value)| (name.to_owned(), value)).into();
    let mut crowd = scene.crowd(limits).await?;
    // The victim has one fault on record.
    let before = scene.judge.mark(scene.victim.connect.address).await?;
    scene.victim.begin().await?;
    let refused =
        scene.victim.strike(0xdead_0000).await?.context("a stray write of the victim's device is refused")?;

    crowd.begin().await?;
    let gpa = crowd.allocate(1).await?;
    let mut evidence = Evidence::default();
    let mappings = Ask::ExhaustMappings { device: crowd.device(), gpa: Address(gpa), at_most: FAR_TOO_MANY };
    let domains = Ask::ExhaustDomains { column: crowd.column, at_most: FAR_TOO_MANY };
    for ask in [domains, mappings] {
        let refused = crowd.actor.attempt(ask).await?.err();
        evidence.told(refused.map(|refused| refused.reason));
    }
    let strays: Vec<u64> = (0..STRAYS).map(|page| 0xdead_0000_0000 + page * PAGE).collect();
    crowd.rogue.hammer(&strays, 8, FILL, 4).await?;
    let over = |counted: &Counted| counted.refused.get(OVER_RATE).copied().unwrap_or(0);
    // Whatever comes of it, the storm is over before anybody else is looked at.
    let work = work_in_a_storm(&mut scene.victim, &crowd.rogue, over);
    let worked = tokio::time::timeout(STORM_MAX, work).await;
    let counted = crowd.rogue.stop_hammer().await?;
    let rounds = worked.context("the storm was not refused once more in time")??;
    ensure!(counted.ended.is_none(), "the storm ended by itself: {:?}", counted.ended);
    // What is within the rate is refused by translation, which is no news here.
    evidence.told(counted.refused.keys().find(|reason| *reason == OVER_RATE).cloned());
    evidence.notes.push(format!("stray writes: {:?}; {rounds} rounds of the victim's", counted.refused));
    let due = [refused].into();
    let kept = scene.judge.since(scene.victim.connect.address, &before, &due).await?;
    ensure!(kept == due, "the victim's fault record is hidden: {kept:?}");
    crowd.end().await?;
    Ok(evidence)
}

/// The victim works as if nobody else were there, until the storm, which is over its rate, has been refused once more. Gives the rounds.
async fn work_in_a_storm(
    victim: &mut Site,
    rogue: &Actor,
    over: impl Fn(&Counted) -> u64,
) -> anyhow::Result<u64> {
    let storms = rogue.hammered_until("a storm over its rate", |counted| over(counted) > 0).await?;
    let gpa = victim.allocate(1).await?;
    let mut rounds = 0;
    loop {
        let mapping = victim.map(gpa, PAGE, Way::FromDevice).await?;
        victim.allowed(mapping.iova).await?;
        victim.unmap(&mapping, true).await?;
        rounds += 1;
        let counted = rogue.hammered().await?;
        // Nothing more would be refused then.
        ensure!(counted.ended.is_none(), "the storm ended by itself: {:?}", counted.ended);
        if over(&counted) > over(&storms) {
            return Ok(rounds);
        }
    }
}

/// Row 30: a tenant fills the IOTLB with its own translations, lets another one work, and looks which of its own are gone. What it would time
/// on a bus is noise over a wire, so the counters of the unit say it: a miss of the probe is an entry that somebody displaced.
pub(super) async fn listens(scene: &mut Scene<'_>) -> anyhow::Result<Evidence> {
    /// What the listener primes: as much as it can without displacing itself, which depends on its share.
    const SHARES: [usize; 7] =
        [PIECES, PIECES / 2, PIECES / 4, PIECES / 8, PIECES / 16, PIECES / 32, PIECES / 64];
    /// Passes after which a set holds nothing but what is primed: what was there before is displaced way by way.
    const PASSES: u32 = 6;
    scene.listening_memory().await?;
    scene.victim.begin_roomy().await?;
    let worked = map_pieces(&scene.victim, WORKING, PIECE_BYTES).await?;
    scene.attacker.begin_roomy().await?;
    let bytes = if scene.attacker.column == Column::Ring { PAGE } else { PIECE_BYTES };
    let pieces = map_pieces(&scene.attacker, PIECES, bytes).await?;
    let mut evidence = Evidence::default();
    for share in SHARES {
        let primed = &pieces[..share];
        for _ in 0..PASSES {
            for piece in primed {
                read_all(&scene.attacker, *piece).await?;
            }
        }
        // Pieces that stay when nobody works: only of those a miss says anything.
        let (first, second) = (misses_of(scene, primed).await?, misses_of(scene, primed).await?);
        let quiet: Vec<usize> = (0..share).filter(|&n| first[n] + second[n] == 0).collect();
        if quiet.len() < (share / 8).max(1) {
            continue;
        }
        // Silence proves something only where there is no room for both: more did not stay, so this is half of the share at least, and the other one uses twice as
        // much. A ring has one entry, whatever is primed.
        let is_ring = scene.attacker.column == Column::Ring;
        ensure!(
            is_ring || (share < PIECES && 2 * share <= WORKING),
            "{share} pieces stay in the cache, so silence would prove nothing: prime more"
        );
        for piece in &worked {
            read_all(&scene.victim, *piece).await?;
        }
        let probed = misses_of(scene, primed).await?;
        let heard: u64 = quiet.iter().map(|&n| probed[n]).sum();
        evidence.notes.push(format!(
            "{} translations primed that stay by themselves; {heard} of them displaced while the other one used {}",
            quiet.len() as u64 * bytes / PAGE,
            WORKING as u64 * PIECE_BYTES / PAGE,
        ));
        if heard > 0 {
            evidence.reached(Outcome::Succeeds);
        } else {
            evidence.told(Some("NO_EVICTION"));
        }
        return Ok(evidence);
    }
    bail!("no translation that is primed stays by itself")
}

/// Maps so many pieces of the listening memory: addresses and sizes.
async fn map_pieces(site: &Site, count: usize, bytes: u64) -> anyhow::Result<Vec<(u64, u64)>> {
    let mut mapped = Vec::new();
    for n in 0..count {
        mapped.push((site.map(piece(n), bytes, Way::Both).await?.iova, bytes));
    }
    Ok(mapped)
}

/// Reads one word of every page of a piece.
async fn read_all(site: &Site, (iova, bytes): (u64, u64)) -> anyhow::Result<()> {
    let (from, to) = (Address(iova), Address(iova + bytes - PAGE));
    let scan = Scan { from, to, stride: Address(PAGE), size: 8, canary: None, write: None };
    match site.rogue.tell(&Command::Scan(scan)).await? {
        Answer::Scanned { tried, answered, ended: None, .. } if tried == answered => Ok(()),
        other => bail!("a probe was refused: {other:?}"),
    }
}

/// Misses of one probe, piece by piece.
async fn misses_of(scene: &Scene<'_>, pieces: &[(u64, u64)]) -> anyhow::Result<Vec<u64>> {
    let mut all = Vec::new();
    let mut before = misses(scene).await?;
    for piece in pieces {
        read_all(&scene.attacker, *piece).await?;
        let after = misses(scene).await?;
        all.push(after - before);
        before = after;
    }
    Ok(all)
}

async fn misses(scene: &Scene<'_>) -> anyhow::Result<u64> {
    let counters = scene.judge.counters().await?;
    Ok(match scene.attacker.column {
        Column::Ring => counters.ring.map_or(0, |ring| ring.walks),
        _ => counters.iotlb.misses,
    })
}
