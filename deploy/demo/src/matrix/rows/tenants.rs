//! Rows 23 to 25: memory and devices of another tenant, now or later.

use anyhow::{bail, ensure};
use rogue::language::{Answer, Behave, Claim, Command, Dma, Obedience};
use rogue::text::Address;

use crate::matrix::act::language::{Ask, Way};
use crate::matrix::column::Column;
use crate::matrix::evidence::{Evidence, race};
use crate::matrix::outcome::Outcome;
use crate::matrix::scene::{GUEST_MEMORY, Scene, VICTIM_MEMORY};
use crate::matrix::site::{BLOW, FILL, PAGE, Site};

/// Row 23: a guest asks for a mapping of another guest's memory, and gives its device the address all the same.
pub(super) async fn not_owned(scene: &mut Scene<'_>) -> anyhow::Result<Evidence> {
    let victim = scene.victim.allocate(1).await?;
    scene.victim.seed(victim, PAGE).await?;
    let site = &mut scene.attacker;
    site.begin().await?;
    let mut evidence = Evidence::default();
    let refused = site.try_map(victim, PAGE, Way::FromDevice).await?.err();
    evidence.told(refused.map(|refused| refused.reason));
    evidence.told(site.strike(victim).await?);
    if !scene.victim.is_intact(victim, PAGE).await? {
        evidence.reached(Outcome::Succeeds);
    }
    Ok(evidence)
}

/// The lecture's V2 between tenants: a guest's device looks through all addresses for another guest's secret.
pub(super) async fn scanned(scene: &mut Scene<'_>) -> anyhow::Result<Evidence> {
    const SECRET: &[u8; 16] = b"another's secret";
    let victim = scene.victim.allocate(1).await?;
    scene.victim.write(victim, SECRET).await?;
    let site = &mut scene.attacker;
    site.begin().await?;
    let gpa = site.allocate(1).await?;
    let mapping = site.map(gpa, PAGE, Way::ToDevice).await?;
    let around = 1024 * PAGE;
    let mut evidence = Evidence::default();
    for at in [mapping.iova, gpa, victim] {
        let scanned =
            site.rogue.scan(at.saturating_sub(around), at.saturating_add(around), PAGE, SECRET).await?;
        evidence.told.extend(scanned.refused);
        if scanned.found {
            evidence.reached(Outcome::Succeeds);
        }
    }
    Ok(evidence)
}

/// Row 24: memory moves from one guest to another while the first one's device writes to it without a pause.
pub(super) async fn moved_while_mapped(scene: &mut Scene<'_>) -> anyhow::Result<Evidence> {
    let (gpa, to_gpa) = if scene.attacker.is_bare() {
        let gpa = scene.attacker.allocate(1).await?;
        (gpa, gpa)
    } else {
        scene.page_to_move()
    };
    scene.attacker.begin().await?;
    let mapping = scene.attacker.map(gpa, PAGE, Way::FromDevice).await?;
    let mut told = Vec::new();
    let (hypervisor, victim) = (scene.hypervisor.clone(), scene.victim.clone());
    let move_memory = |revoke| Ask::MoveMemory {
        from: GUEST_MEMORY.0,
        gpa: Address(gpa),
        bytes: PAGE,
        to: VICTIM_MEMORY.0,
        to_gpa: Address(to_gpa),
        revoke,
    };
    let let_go = async |_: &mut Site| {
        if let Some(hypervisor) = &hypervisor {
            let refused = hypervisor.attempt(move_memory(false)).await?.err();
            told.extend(refused.map(|refused| refused.reason));
            let moved = hypervisor.attempt(move_memory(true)).await?;
            ensure!(moved.is_ok(), "memory is not revoked: {moved:?}");
        }
        Ok(())
    };
    let seed = async |_: &Site| victim.seed(to_gpa, PAGE).await;
    let is_intact = async |_: &Site| victim.is_intact(to_gpa, PAGE).await;
    let mut evidence = race(&mut scene.attacker, &mapping, let_go, seed, is_intact).await?;
    if evidence.reached.is_none() && evidence.told.is_empty() {
        // The first move was refused, the second was not; the device was told nothing.
        evidence.reached(Outcome::Deflected);
    }
    evidence.told.extend(told);
    Ok(evidence)
}

/// Row 25: what the device queued for its old owner goes out when it has a new one.
pub(super) async fn late_dma(scene: &mut Scene<'_>) -> anyhow::Result<Evidence> {
    let site = &mut scene.attacker;
    site.begin().await?;
    let gpa = site.allocate(1).await?;
    let mapping = site.map(gpa, PAGE, Way::FromDevice).await?;
    site.allowed(mapping.iova).await?;
    let later = Dma { later: true, ..Dma::write(mapping.iova, vec![FILL; BLOW as usize]) };
    let rogue = site.rogue.clone();
    for _ in 0..2 {
        rogue.tell(&Command::Dma(later.clone())).await?;
    }
    let mut evidence = Evidence::default();
    if site.is_bare() {
        // The next tenant has its data where the last one had its buffer.
        scene.victim.seed(gpa, PAGE).await?;
        evidence.told.extend(release(&rogue).await?);
        if !scene.victim.is_intact(gpa, PAGE).await? {
            evidence.reached(Outcome::Succeeds);
        }
        return Ok(evidence);
    }
    let device = site.device();
    rogue.tell(&Command::Behave(Behave { resets: Obedience::Hold, ..Behave::default() })).await?;
    let before = rogue.status().await?.resets_told;
    let hypervisor = scene.hypervisor()?;
    let assign = hypervisor.request(Ask::Assign { device: device.clone(), vm: VICTIM_MEMORY.0 });
    let during = async {
        scene.attacker.reset_told(before).await?;
        // Between the reset and its answer: what is new is refused as well.
        let now = Dma { later: false, generation: Claim::Told, ..later.clone() };
        let refused = rogue.dma(now).await?.err();
        rogue.tell(&Command::Behave(Behave::default())).await?;
        rogue.tell(&Command::ResetDone(Default::default())).await?;
        anyhow::Ok(refused)
    };
    let (assigned, refused) = tokio::join!(assign, during);
    assigned?;
    evidence.told(refused?);

    // The new owner has a buffer at the very address.
    let mut heir = scene.victim.clone();
    heir.connect = scene.attacker.connect.clone();
    heir.rogue = rogue.clone();
    heir.begin().await?;
    let victim = heir.allocate(1).await?;
    heir.seed(victim, PAGE).await?;
    let inherited = heir.map(victim, PAGE, Way::FromDevice).await?;
    let same = if inherited.iova == mapping.iova { "at the very address" } else { "at another address" };
    evidence.notes.push(format!("the new owner has a buffer {same}"));
    evidence.told.extend(release(&rogue).await?);
    for generation in [Claim::Welcome, Claim::Ahead(-1), Claim::Ahead(1), Claim::Ahead(1000)] {
        let dma = Dma { later: false, generation, iova: Address(inherited.iova), ..later.clone() };
        let refused = rogue.dma(dma).await?.err();
        if refused.is_none() {
            evidence.reached(Outcome::Succeeds);
            evidence.notes.push(format!("let through under {generation:?}"));
        }
        evidence.told(refused);
    }
    heir.unmap(&inherited, true).await?;
    if !heir.is_intact(victim, PAGE).await? {
        evidence.reached(Outcome::Succeeds);
    }
    heir.end().await?;
    let back = Ask::Assign { device, vm: GUEST_MEMORY.0 };
    if scene.attacker.column == Column::Strict {
        // Once, since the server waits for it: a reset that is never answered, and the device goes on.
        rogue.tell(&Command::Behave(Behave { resets: Obedience::Hold, ..Behave::default() })).await?;
        hypervisor.request(back).await?;
        for generation in [Claim::Current, Claim::Told, Claim::Absent] {
            evidence.told(rogue.dma(Dma { later: false, generation, ..later.clone() }).await?.err());
        }
        rogue.tell(&Command::Behave(Behave::default())).await?;
        rogue.connect(&scene.attacker.connect).await?;
    } else {
        hypervisor.request(back).await?;
    }
    Ok(evidence)
}

/// Sends what was queued: why it was refused.
async fn release(rogue: &crate::matrix::actor::Actor) -> anyhow::Result<Vec<String>> {
    match rogue.tell(&Command::Release).await? {
        Answer::Batch { refused, .. } => Ok(refused.into_keys().collect()),
        other => bail!("{other:?}"),
    }
}
