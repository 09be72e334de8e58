//! Row 18: numbers of rings and slots that are made up.

use anyhow::ensure;

use crate::matrix::act::language::Way;
use crate::matrix::evidence::Evidence;
use crate::matrix::outcome::Outcome;
use crate::matrix::scene::Scene;
use crate::matrix::site::PAGE;

/// A ring address: ring, slot, offset 0.
const fn at(ring: u64, slot: u64) -> u64 {
    ring << 48 | slot << 30
}

/// A ring that the device has not, a slot that the ring has not, one that is not posted, and one that is consumed.
pub(super) async fn forged(scene: &mut Scene<'_>) -> anyhow::Result<Evidence> {
    let site = &mut scene.own;
    site.begin().await?;
    let gpa = site.allocate(1).await?;
    let consumed = site.map(gpa, PAGE, Way::FromDevice).await?;
    site.allowed(consumed.iova).await?;
    site.unmap(&consumed, true).await?;
    site.seed(gpa, PAGE).await?;
    let mut evidence = Evidence::default();
    for forged in [at(200, 0), at(0, 5000), at(0, 700), at(1, 0), consumed.iova] {
        let refused = site.strike(forged).await?;
        if refused.is_none() {
            evidence.reached(Outcome::Succeeds);
            evidence.notes.push(format!("{forged:#x} was let through"));
        }
        evidence.told(refused);
    }
    ensure!(site.is_intact(gpa, PAGE).await? || evidence.reached.is_some(), "written by nobody");
    Ok(evidence)
}
