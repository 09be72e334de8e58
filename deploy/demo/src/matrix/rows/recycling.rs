//! Rows 26 to 28: mistakes that only the server could make, provoked from outside: what is used again too early, and what is acknowledged too early.

use anyhow::ensure;
use rogue::language::Counted;
use rogue::text::Address;

use crate::matrix::act::language::{Ask, Way};
use crate::matrix::column::Column;
use crate::matrix::evidence::{Evidence, race};
use crate::matrix::outcome::Outcome;
use crate::matrix::scene::{Scene, VICTIM_MEMORY};
use crate::matrix::site::{FILL, PAGE, Site};

/// Row 26: domains come and go, so that one has the number that another had a moment ago; its device then uses the other's addresses. First between
/// two tenants, whose numbers are kept apart, then between two domains of one tenant.
pub(super) async fn domain_number(scene: &mut Scene<'_>) -> anyhow::Result<Evidence> {
    const ROUNDS: u32 = 6;
    let mut evidence = Evidence::default();
    for (whose, between_tenants) in [("another tenant", true), ("the same tenant", false)] {
        let mut again = 0;
        for _ in 0..ROUNDS {
            let mut first = if between_tenants { scene.victim.clone() } else { scene.attacker.clone() };
            let number = first.begin().await?;
            let gpa = first.allocate(1).await?;
            let mapping = first.map(gpa, PAGE, Way::FromDevice).await?;
            first.allowed(mapping.iova).await?;
            first.leave().await?;
            first.seed(gpa, PAGE).await?;
            again += u32::from(scene.attacker.begin().await? == number);
            let refused = scene.attacker.strike(mapping.iova).await?;
            let is_open = scene.attacker.column == Column::Passthrough && !between_tenants;
            // Memory of the same owner is open in each of its direct maps, by the next one as by the last.
            if !is_open && (refused.is_none() || !first.is_intact(gpa, PAGE).await?) {
                evidence.reached(Outcome::Succeeds);
            }
            evidence.told(refused);
            scene.attacker.end().await?;
            first.end().await?;
        }
        evidence.notes.push(format!("{again} of {ROUNDS} domains had the number of one of {whose} before"));
        if between_tenants {
            // A domain has a number of its owner's partition of the IOTLB as long as there is one, and few owners have a partition each.
            ensure!(again == 0, "a domain got the number that another tenant's had a moment ago");
        } else {
            ensure!(again > 0, "no number was used again, so nothing was attacked");
        }
    }
    Ok(evidence)
}

/// Row 27: many mappings come and go with their tables under a device that uses all of their addresses without a pause; then the frames of the
/// tables become another tenant's memory.
pub(super) async fn table_pages(scene: &mut Scene<'_>) -> anyhow::Result<Evidence> {
    const PAGES: u64 = 64;
    const ROUNDS: u64 = 4;
    const IN_FLIGHT: usize = 4;
    let mut evidence = Evidence::default();
    let (mut blows, mut stale) = (0, Vec::new());
    for _ in 0..ROUNDS {
        let site = &mut scene.attacker;
        site.begin().await?;
        let gpa = site.allocate(PAGES).await?;
        let mut mappings = Vec::new();
        for page in 0..PAGES {
            mappings.push(site.map(gpa + page * PAGE, PAGE, Way::FromDevice).await?);
        }
        stale = mappings.iter().map(|mapping| mapping.iova).collect();
        site.rogue.hammer(&stale, 64, FILL, IN_FLIGHT).await?;
        site.rogue
            .hammered_until("writes to live mappings", |counted| counted.succeeded >= 2 * PAGES)
            .await?;
        for mapping in &mappings {
            site.unmap(mapping, true).await?;
        }
        site.leave().await?;
        // Answers to what was sent before may still be on their way. With so many more than that, every later one is to a write that was sent afterwards.
        let then = site.rogue.hammered().await?.answered();
        let more = |than: u64| move |counted: &Counted| counted.answered() >= than + IN_FLIGHT as u64 * PAGES;
        let before = site.rogue.hammered_until("writes to what is gone", more(then)).await?;
        // What was freed last is given first: frames of tables become memory of the victim.
        let (at, bytes) = scene.new_memory(PAGES);
        let add = Ask::AddMemory { vm: VICTIM_MEMORY.0, gpa: Address(at), bytes };
        scene.hypervisor()?.request(add).await?;
        scene.victim.seed(at, bytes).await?;
        let rogue = &scene.attacker.rogue;
        let then = rogue.hammered().await?.answered();
        rogue.hammered_until("writes while the frames are another's", more(then)).await?;
        let after = rogue.stop_hammer().await?;
        blows += after.answered();
        let grew = |reason: &String, count: u64| count > before.refused.get(reason).copied().unwrap_or(0);
        let reasons = after.refused.iter().filter(|(reason, count)| grew(reason, **count));
        evidence.told.extend(reasons.map(|(reason, _)| reason.clone()));
        // A frame that is walked as a table may lead anywhere: a write that lands at all has gone where nothing is mapped.
        if after.succeeded > before.succeeded || !scene.victim.is_intact(at, bytes).await? {
            evidence.reached(Outcome::Succeeds);
        }
        scene.attacker.end().await?;
    }
    evidence.notes.push(format!("{blows} writes in {ROUNDS} rounds"));
    for iova in stale {
        evidence.told(scene.attacker.strike(iova).await?);
    }
    Ok(evidence)
}

/// Row 28: large writes are in flight when the driver unmaps; what it writes after the answer must stay.
pub(super) async fn acknowledged_early(scene: &mut Scene<'_>) -> anyhow::Result<Evidence> {
    const BYTES: u64 = 8 * PAGE;
    let rounds = if scene.own.column == Column::Deferred { 1 } else { 6 };
    let site = &mut scene.own;
    site.begin().await?;
    let gpa = site.allocate(BYTES / PAGE).await?;
    let mut all = Evidence::default();
    for _ in 0..rounds {
        let mapping = site.map(gpa, BYTES, Way::FromDevice).await?;
        let unmap = async |site: &mut Site| site.unmap(&mapping, true).await;
        let seed = async |site: &Site| site.seed(gpa, BYTES).await;
        let is_intact = async |site: &Site| site.is_intact(gpa, BYTES).await;
        let evidence = race(site, &mapping, unmap, seed, is_intact).await?;
        all.told.extend(evidence.told);
        all.reached = all.reached.max(evidence.reached);
        all.window_us = all.window_us.max(evidence.window_us);
    }
    all.notes.push(format!("{rounds} rounds"));
    Ok(all)
}
