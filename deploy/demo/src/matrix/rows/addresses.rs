//! Rows 1, 2, 4, 5 and 9: addresses that are wrong.

use crate::matrix::act::language::Way;
use crate::matrix::evidence::{Evidence, stray};
use crate::matrix::outcome::Outcome;
use crate::matrix::scene::Scene;
use crate::matrix::site::{BLOW, PAGE};

/// Row 1: the driver gives its device the address of memory instead of one that it mapped.
pub(super) async fn raw_address(scene: &mut Scene<'_>) -> anyhow::Result<Evidence> {
    let site = &mut scene.own;
    site.begin().await?;
    let victim = site.allocate(1).await?;
    let mut evidence = Evidence::default();
    stray(site, victim, victim, &mut evidence).await?;
    Ok(evidence)
}

/// Row 2: the length runs over the end of the buffer into the next page.
pub(super) async fn into_the_next_page(scene: &mut Scene<'_>) -> anyhow::Result<Evidence> {
    let site = &mut scene.own;
    site.begin().await?;
    let gpa = site.allocate(2).await?;
    let mapping = site.map(gpa, PAGE, Way::FromDevice).await?;
    site.allowed(mapping.iova).await?;
    let mut evidence = Evidence::default();
    // Half of the blow is the buffer's, half lies behind it.
    stray(site, mapping.iova + PAGE - u64::from(BLOW / 2), gpa + PAGE, &mut evidence).await?;
    Ok(evidence)
}

/// Row 4: the device writes to a buffer that it may only read.
pub(super) async fn wrong_direction(scene: &mut Scene<'_>) -> anyhow::Result<Evidence> {
    let site = &mut scene.own;
    site.begin().await?;
    let gpa = site.allocate(1).await?;
    site.seed(gpa, PAGE).await?;
    let mapping = site.map(gpa, PAGE, Way::ToDevice).await?;
    anyhow::ensure!(site.rogue.peek(mapping.iova, BLOW).await?.is_ok(), "the device may read");
    let mut evidence = Evidence::default();
    stray(site, mapping.iova, gpa, &mut evidence).await?;
    Ok(evidence)
}

/// Row 5: an address that another device of the same driver was given.
pub(super) async fn of_another_domain(scene: &mut Scene<'_>) -> anyhow::Result<Evidence> {
    let mut other = scene.second_device().await?;
    other.begin().await?;
    let victim = other.allocate(1).await?;
    other.seed(victim, PAGE).await?;
    let mapping = other.map(victim, PAGE, Way::FromDevice).await?;
    scene.own.begin().await?;
    let mut evidence = Evidence::default();
    evidence.told(scene.own.strike(mapping.iova).await?);
    if !other.is_intact(victim, PAGE).await? {
        evidence.reached(Outcome::Succeeds);
    }
    other.end().await?;
    Ok(evidence)
}

/// Row 9: one bit of the address flips, that which tells a page from the next.
pub(super) async fn flipped_bit(scene: &mut Scene<'_>) -> anyhow::Result<Evidence> {
    let site = &mut scene.own;
    site.begin().await?;
    let three = site.allocate(3).await?;
    // The first page whose number is even: flipping the lowest bit of its number leads to the page behind it.
    let gpa = three.next_multiple_of(2 * PAGE);
    let mapping = site.map(gpa, PAGE, Way::FromDevice).await?;
    site.allowed(mapping.iova).await?;
    let mut evidence = Evidence::default();
    stray(site, mapping.iova ^ PAGE, gpa ^ PAGE, &mut evidence).await?;
    Ok(evidence)
}
