//! Rows 6 to 8 and 10 to 12: what the device does when a mapping has ended, or ends wrongly.

use std::time::Instant;

use anyhow::ensure;
use rogue::language::{Answer, Command};
use rogue::text::Address;

use crate::matrix::act::language::{Ask, Way};
use crate::matrix::column::{Column, WINDOW};
use crate::matrix::evidence::{Evidence, late, race};
use crate::matrix::outcome::Outcome;
use crate::matrix::scene::Scene;
use crate::matrix::site::{BLOW, Mapping, PAGE, Site};

/// A page that the device has written, so that its translation is cached.
async fn used(site: &mut Site, way: Way) -> anyhow::Result<Mapping> {
    site.begin().await?;
    let gpa = site.allocate(1).await?;
    let mapping = site.map(gpa, PAGE, way).await?;
    if way == Way::ToDevice {
        ensure!(site.rogue.peek(mapping.iova, BLOW).await?.is_ok(), "the device may read");
    } else {
        site.allowed(mapping.iova).await?;
    }
    Ok(mapping)
}

/// Row 6: an unmap of half the size, then the right one, then once more; then DMA.
pub(super) async fn wrong_unmaps(scene: &mut Scene<'_>) -> anyhow::Result<Evidence> {
    let site = &mut scene.own;
    let mapping = used(site, Way::FromDevice).await?;
    let mut evidence = Evidence::default();
    let refused = site.try_unmap(&mapping, PAGE / 2, true).await?.err();
    evidence.told(refused.map(|refused| refused.reason));
    site.unmap(&mapping, true).await?;
    let unmapped = Instant::now();
    let refused = site.try_unmap(&mapping, PAGE, true).await?.err();
    evidence.told(refused.map(|refused| refused.reason));
    let iova = mapping.iova;
    late(site, &mapping, unmapped, evidence, async move |site: &Site| site.strike(iova).await).await
}

/// Row 7: the driver frees a page that is still mapped, and the page is used for something else.
pub(super) async fn freed_while_mapped(scene: &mut Scene<'_>) -> anyhow::Result<Evidence> {
    let site = &mut scene.own;
    let mapping = used(site, Way::FromDevice).await?;
    let mut evidence = Evidence::default();
    let victim = if site.is_bare() {
        // Nothing keeps the operating system from using the page again.
        mapping.gpa
    } else {
        let freed = site.actor.attempt(Ask::Free { gpa: Address(mapping.gpa) }).await?;
        evidence.told(freed.err().map(|refused| refused.reason));
        site.allocate(1).await?
    };
    site.seed(victim, PAGE).await?;
    evidence.told(site.strike(mapping.iova).await?);
    if !site.is_intact(victim, PAGE).await? {
        evidence.reached(Outcome::Succeeds);
    }
    Ok(evidence)
}

/// Row 8: the driver unmaps while the device writes without a pause.
pub(super) async fn unmapped_early(scene: &mut Scene<'_>) -> anyhow::Result<Evidence> {
    let site = &mut scene.own;
    let mapping = used(site, Way::FromDevice).await?;
    let unmap = async |site: &mut Site| site.unmap(&mapping, true).await;
    let seed = async |site: &Site| site.seed(mapping.gpa, PAGE).await;
    let is_intact = async |site: &Site| site.is_intact(mapping.gpa, PAGE).await;
    race(site, &mapping, unmap, seed, is_intact).await
}

/// Row 10: the device repeats its last write once the driver has unmapped.
pub(super) async fn repeated(scene: &mut Scene<'_>) -> anyhow::Result<Evidence> {
    let site = &mut scene.own;
    let mapping = used(site, Way::FromDevice).await?;
    site.unmap(&mapping, true).await?;
    let unmapped = Instant::now();
    let again = async |site: &Site| match site.rogue.tell(&Command::Replay).await? {
        Answer::Batch { faults, .. } => anyhow::Ok(faults.first().map(|fault| fault.reason.to_string())),
        other => anyhow::bail!("{other:?}"),
    };
    late(site, &mapping, unmapped, Evidence::default(), again).await
}

/// Row 11: the device looks for a secret that was put into a buffer after its unmap, around every address that it knows.
pub(super) async fn scanned(scene: &mut Scene<'_>) -> anyhow::Result<Evidence> {
    const SECRET: &[u8; 16] = b"the secret value";
    const AROUND: u64 = 16 * PAGE;
    let site = &mut scene.own;
    let mapping = used(site, Way::ToDevice).await?;
    site.unmap(&mapping, true).await?;
    let unmapped = Instant::now();
    site.write(mapping.gpa, SECRET).await?;
    // In a ring domain an address is a ring, a slot and an offset: the slots of ring 0, one after the other.
    let ranges = match site.column {
        Column::Ring => vec![(1 << 30, 32 << 30, 1 << 30)],
        _ => [mapping.iova, mapping.gpa]
            .map(|at| (at.saturating_sub(AROUND), at.saturating_add(AROUND), PAGE))
            .to_vec(),
    };
    let mut evidence = Evidence::default();
    let (mut tried, mut last_found, mut found) = (0, None, false);
    loop {
        let was_found = found;
        found = false;
        for (from, to, stride) in &ranges {
            let scanned = site.rogue.scan(*from, *to, *stride, SECRET).await?;
            evidence.told.extend(scanned.refused);
            tried += scanned.tried;
            found |= scanned.found;
        }
        if found {
            last_found = Some(unmapped.elapsed());
        } else if !was_found || last_found.is_none() {
            break;
        }
        if unmapped.elapsed() > WINDOW * 4 {
            break;
        }
    }
    evidence.notes.push(format!("{tried} addresses read"));
    if found {
        evidence.reached(Outcome::Succeeds);
    } else if let Some(last) = last_found {
        evidence.reached(Outcome::Window);
        evidence.window_us = Some(last.as_micros() as u64);
    }
    Ok(evidence)
}

/// Row 12: the device writes right after the unmap, inside a burst where there are bursts.
pub(super) async fn between_unmap_and_flush(scene: &mut Scene<'_>) -> anyhow::Result<Evidence> {
    let site = &mut scene.own;
    let mapping = used(site, Way::FromDevice).await?;
    site.unmap(&mapping, false).await?;
    let unmapped = Instant::now();
    let iova = mapping.iova;
    late(site, &mapping, unmapped, Evidence::default(), async move |site: &Site| site.strike(iova).await)
        .await
}
