//! Rows 3 and 13 to 17: what shares a page with a buffer, and what may be changed while it is mapped.

use anyhow::ensure;
use rogue::language::Dma;
use rogue::text::Address;

use crate::matrix::act::language::{Ask, Way};
use crate::matrix::evidence::{Evidence, beside};
use crate::matrix::outcome::Outcome;
use crate::matrix::scene::Scene;
use crate::matrix::site::{BLOW, PAGE};

/// Maps `bytes` bytes from `offset` in a page, and strikes at `at` in the same page.
async fn strike_beside(scene: &mut Scene<'_>, offset: u64, bytes: u64, at: u64) -> anyhow::Result<Evidence> {
    let site = &mut scene.own;
    site.begin().await?;
    let page = site.allocate(2).await?;
    let mapping = site.map(page + offset, bytes, Way::FromDevice).await?;
    site.allowed(mapping.iova).await?;
    let iova = |at: u64| (mapping.iova + at).wrapping_sub(offset);
    beside(site, iova(at), page + at, (iova(PAGE), page + PAGE)).await
}

/// Row 3: the length is that of a larger buffer, and ends on the same page.
pub(super) async fn within_the_last_page(scene: &mut Scene<'_>) -> anyhow::Result<Evidence> {
    strike_beside(scene, 0, 1500, 1500).await
}

/// Row 14: an unrelated object lies beside the buffer.
pub(super) async fn neighbour(scene: &mut Scene<'_>) -> anyhow::Result<Evidence> {
    strike_beside(scene, 512, 512, 2048).await
}

/// Row 15: the operating system keeps a pointer behind the payload.
pub(super) async fn behind_the_payload(scene: &mut Scene<'_>) -> anyhow::Result<Evidence> {
    strike_beside(scene, 0, 2048, 2048).await
}

/// Row 16: the driver keeps its own data before the buffer.
pub(super) async fn before_the_buffer(scene: &mut Scene<'_>) -> anyhow::Result<Evidence> {
    strike_beside(scene, 256, 1024, 256 - u64::from(BLOW)).await
}

/// Row 13: the driver checks what the device wrote, the device changes it, and the driver uses it; all that while it is mapped.
pub(super) async fn after_the_check(scene: &mut Scene<'_>) -> anyhow::Result<Evidence> {
    const GOOD: [u8; 64] = [1; 64];
    let site = &mut scene.own;
    site.begin().await?;
    let gpa = site.allocate(1).await?;
    let mapping = site.map(gpa, PAGE, Way::FromDevice).await?;
    let written = site.rogue.dma(Dma::write(mapping.iova, GOOD.to_vec())).await?;
    ensure!(written.is_ok(), "the device may write: {written:?}");
    if !site.is_bare() {
        site.actor.request(Ask::SyncForCpu { iova: Address(mapping.iova) }).await?;
    }
    ensure!(site.read(gpa, 64).await? == GOOD, "the check passes");
    let mut evidence = Evidence::default();
    evidence.told(site.strike(mapping.iova).await?);
    if site.read(gpa, 64).await? != GOOD {
        evidence.reached(Outcome::Succeeds);
    }
    Ok(evidence)
}

/// Row 17: two buffers on one page, each with an address of its own; the first is unmapped, and reached through the second's.
pub(super) async fn second_address(scene: &mut Scene<'_>) -> anyhow::Result<Evidence> {
    let site = &mut scene.own;
    site.begin().await?;
    let page = site.allocate(2).await?;
    let second = site.map(page, 1024, Way::FromDevice).await?;
    let first = site.map(page + 1024, 1024, Way::FromDevice).await?;
    for mapping in [&first, &second] {
        site.allowed(mapping.iova).await?;
    }
    site.unmap(&first, true).await?;
    // Beside the second address may lie the first one, which a cache may still know.
    let first_is_next = first.iova / PAGE == second.iova / PAGE + 1;
    let next = if first_is_next { second.iova - PAGE } else { second.iova + PAGE };
    beside(site, second.iova + 1024, page + 1024, (next, page + PAGE)).await
}
