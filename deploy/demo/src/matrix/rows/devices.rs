//! Rows 19 to 22: what a device claims to be, and ways around the translation of addresses.

use anyhow::bail;
use rogue::language::{Answer, Command, Connect, Dma, Msi};
use rogue::text::{Address, Hex};

use crate::matrix::act::language::{Ask, Way};
use crate::matrix::evidence::Evidence;
use crate::matrix::outcome::Outcome;
use crate::matrix::scene::Scene;
use crate::matrix::site::{BLOW, FILL, PAGE};

/// Row 19: the attacker's agent takes the victim's address, its name, both, and, once it is in, the victim's identity. All the while it shows its own
/// certificate, the only one that it has.
pub(super) async fn another_identity(scene: &mut Scene<'_>) -> anyhow::Result<Evidence> {
    let (attacker, victim) = (&scene.attacker, &scene.victim);
    let (own, other) = (&attacker.connect, &victim.connect);
    let mut evidence = Evidence::default();
    let claims = [
        Command::Connect(Connect { address: other.address, ..own.shown_as(own) }),
        Command::Connect(Connect { name: other.name.clone(), ..own.shown_as(own) }),
        Command::Connect(other.shown_as(own)),
        Command::Hello(other.clone()),
    ];
    for claim in claims {
        if matches!(claim, Command::Hello(_)) {
            attacker.rogue.connect(own).await?;
        }
        match attacker.rogue.tell(&claim).await? {
            Answer::Ended(end) => evidence.told(Some(end.reason)),
            Answer::Connected { .. } | Answer::Well => evidence.reached(Outcome::Succeeds),
            other => bail!("{other:?}"),
        }
    }
    attacker.rogue.connect(own).await?;
    Ok(evidence)
}

/// Row 20: the device claims to have translated the address of memory itself, or asks for translations to keep.
pub(super) async fn already_translated(scene: &mut Scene<'_>) -> anyhow::Result<Evidence> {
    let site = &mut scene.own;
    site.begin().await?;
    let victim = site.allocate(1).await?;
    site.seed(victim, PAGE).await?;
    let mapping = site.map(victim, PAGE, Way::FromDevice).await?;
    let mut evidence = Evidence::default();
    for iova in [victim, mapping.iova] {
        for address_type in [1, 2] {
            let dma = Dma { address_type, ..Dma::write(iova, vec![FILL; BLOW as usize]) };
            evidence.told(site.rogue.dma(dma).await?.err());
        }
    }
    site.unmap(&mapping, true).await?;
    if !site.is_intact(victim, PAGE).await? {
        evidence.reached(Outcome::Succeeds);
    }
    Ok(evidence)
}

/// Row 21: the device writes to where another device would have its registers.
pub(super) async fn peer_to_peer(scene: &mut Scene<'_>) -> anyhow::Result<Evidence> {
    /// A usual place of registers: below the interrupt addresses, above memory.
    const REGISTERS: u64 = 0xf000_0000;
    scene.attacker.begin().await?;
    let before = scene.victim.rogue.status().await?.registers_told;
    let mut evidence = Evidence::default();
    evidence.told(scene.attacker.strike(REGISTERS).await?);
    if scene.victim.rogue.status().await?.registers_told != before {
        evidence.reached(Outcome::Succeeds);
    }
    Ok(evidence)
}

/// Row 22: the victim's own interrupt, one in compatibility format with a vector of the attacker's choice, and a write that is none.
pub(super) async fn forged_interrupts(scene: &mut Scene<'_>) -> anyhow::Result<Evidence> {
    scene.attacker.begin().await?;
    let victim = &scene.victim;
    let before = victim.actor.request(Ask::Interrupts).await?.value;
    let mut forged = vec![(0xfee0_0000, vec![0x30, 0, 0, 0])];
    if !victim.is_bare() {
        let own = victim.actor.request(Ask::Interrupt { device: victim.device() }).await?;
        forged.push((own.value, (own.further as u32).to_le_bytes().to_vec()));
        forged.push((own.value, vec![0; 8]));
    }
    let mut evidence = Evidence::default();
    let mut passed = 0;
    for (address, word) in forged {
        let msi = Command::Msi(Msi { address: Address(address), data: Hex(word) });
        match scene.attacker.rogue.tell(&msi).await? {
            Answer::Fault(fault) => evidence.told(Some(fault.reason.to_string())),
            Answer::Done { .. } => passed += 1,
            other => bail!("{other:?}"),
        }
    }
    if passed > 0 {
        let wait = async {
            while victim.actor.request(Ask::Interrupts).await?.value == before {
                tokio::time::sleep(std::time::Duration::from_millis(1)).await;
            }
            anyhow::Ok(())
        };
        // One that was let through and reached nobody is a finding too: the outcome is then another one.
        let came = tokio::time::timeout(std::time::Duration::from_secs(5), wait).await;
        evidence.reached(if came.is_ok() { Outcome::Succeeds } else { Outcome::Deflected });
    } else if victim.actor.request(Ask::Interrupts).await?.value != before {
        evidence.reached(Outcome::Succeeds);
    }
    Ok(evidence)
}
