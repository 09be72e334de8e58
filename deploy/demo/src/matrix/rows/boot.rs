//! Row 31: before anybody protects anything.

use crate::matrix::act::language::Ask;
use crate::matrix::evidence::Evidence;
use crate::matrix::outcome::Outcome;
use crate::matrix::scene::Scene;
use crate::matrix::site::PAGE;

/// A device that is attached to nothing, at the start of a server and after a restart; and one that was detached from a domain of the column.
pub(super) async fn before_and_after(scene: &mut Scene<'_>) -> anyhow::Result<Evidence> {
    let mut evidence = Evidence::default();
    let site = &mut scene.attacker;
    site.begin().await?;
    let gpa = site.allocate(1).await?;
    site.seed(gpa, PAGE).await?;
    if site.is_bare() {
        evidence.told(site.strike(gpa).await?);
    } else {
        let mapping = site.map(gpa, PAGE, crate::matrix::act::language::Way::FromDevice).await?;
        site.actor.request(Ask::Detach { device: site.device() }).await?;
        evidence.told(site.strike(mapping.iova).await?);
        evidence.told(site.strike(gpa).await?);
    }
    if !site.is_intact(gpa, PAGE).await? {
        evidence.reached(Outcome::Succeeds);
    }
    if !scene.attacker.is_bare() {
        for refused in scene.stage.restarts().await? {
            if refused.is_none() {
                evidence.reached(Outcome::Succeeds);
                evidence.notes.push("let through right after a start".to_owned());
            }
            evidence.told(refused);
        }
    }
    Ok(evidence)
}
