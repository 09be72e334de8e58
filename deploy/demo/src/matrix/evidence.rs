//! What an attack shows, and how it is got: a canary is put into the victim's memory, the device strikes, and the memory is read.

use std::collections::BTreeSet;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::column::WINDOW;
use super::outcome::Outcome;
use super::site::{BLOW, Mapping, PAGE, Site};

/// How long it is tried to see a window close: it is open for [`WINDOW`] at most.
const CLOSED_WITHIN: Duration = WINDOW.saturating_mul(3);

/// What an attack shows.
#[derive(Clone, Debug, Default)]
pub(crate) struct Evidence {
    /// Whether the victim was reached, and how far.
    pub(crate) reached: Option<Outcome>,
    /// What the attacker was told.
    pub(crate) told: BTreeSet<String>,
    /// How long a window was open.
    pub(crate) window_us: Option<u64>,
    /// What else was measured.
    pub(crate) notes: Vec<String>,
}

impl Evidence {
    /// Notes what the attacker was told.
    pub(crate) fn told(&mut self, reason: Option<impl Into<String>>) {
        self.told.extend(reason.map(Into::into));
    }

    pub(crate) fn reached(&mut self, outcome: Outcome) {
        self.reached = Some(outcome);
    }

    /// What became of the victim.
    pub(crate) fn outcome(&self) -> Outcome {
        match self.reached {
            Some(outcome) => outcome,
            None if self.told.iter().any(|reason| is_final(reason)) => Outcome::Refused,
            None => Outcome::Deflected,
        }
    }
}

/// Whether a reason refuses the blow itself, rather than a wrong call before it.
fn is_final(reason: &str) -> bool {
    !matches!(reason, "SIZE_MISMATCH" | "NOT_MAPPED")
}

/// Strikes at what nobody mapped, and looks at the victim's page.
pub(crate) async fn stray(
    site: &Site,
    iova: u64,
    victim: u64,
    evidence: &mut Evidence,
) -> anyhow::Result<()> {
    site.seed(victim, PAGE).await?;
    let refused = site.strike(iova).await?;
    evidence.told(refused);
    if !site.is_intact(victim, PAGE).await? {
        evidence.reached(Outcome::Succeeds);
    }
    Ok(())
}

/// Strikes beside a buffer: at `iova`, behind which `victim` lies on the buffer's page. When that lands, it is tried whether the next page
/// can be reached too.
pub(crate) async fn beside(
    site: &Site,
    iova: u64,
    victim: u64,
    next_page: (u64, u64),
) -> anyhow::Result<Evidence> {
    let mut evidence = Evidence::default();
    site.seed(victim, BLOW.into()).await?;
    evidence.told(site.strike(iova).await?);
    if site.is_intact(victim, BLOW.into()).await? {
        return Ok(evidence);
    }
    let (next_iova, next_victim) = next_page;
    site.seed(next_victim, BLOW.into()).await?;
    evidence.told(site.strike(next_iova).await?);
    let next_is_intact = site.is_intact(next_victim, BLOW.into()).await?;
    evidence.reached(if next_is_intact { Outcome::Page } else { Outcome::Succeeds });
    Ok(evidence)
}

/// Strikes at what was unmapped at `unmapped`, once and, when that lands, until a window has closed. `blow` is one try: why it was refused.
pub(crate) async fn late(
    site: &mut Site,
    mapping: &Mapping,
    unmapped: Instant,
    mut evidence: Evidence,
    blow: impl AsyncFn(&Site) -> anyhow::Result<Option<String>>,
) -> anyhow::Result<Evidence> {
    site.seed(mapping.gpa, mapping.bytes).await?;
    let refused = blow(site).await?;
    let mut last_success = unmapped.elapsed();
    evidence.told(refused);
    if site.is_intact(mapping.gpa, mapping.bytes).await? {
        return Ok(evidence);
    }
    site.end_burst().await?;
    let began = Instant::now();
    while began.elapsed() < CLOSED_WITHIN {
        if let Some(reason) = blow(site).await? {
            evidence.told(Some(reason));
            break;
        }
        last_success = unmapped.elapsed();
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    site.seed(mapping.gpa, mapping.bytes).await?;
    evidence.told(blow(site).await?);
    if site.is_intact(mapping.gpa, mapping.bytes).await? {
        evidence.reached(Outcome::Window);
        evidence.window_us = Some(last_success.as_micros() as u64);
    } else {
        evidence.reached(Outcome::Succeeds);
    }
    Ok(evidence)
}

/// Microseconds since the UNIX epoch, as the hostile device tells them.
fn now_unix_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64)
}

/// The device writes all the time while `let_go` takes the memory away from it. Afterwards `seed` writes the canary, and `is_intact` looks
/// whether it is still there.
pub(crate) async fn race(
    site: &mut Site,
    mapping: &Mapping,
    let_go: impl AsyncFnOnce(&mut Site) -> anyhow::Result<()>,
    seed: impl AsyncFn(&Site) -> anyhow::Result<()>,
    is_intact: impl AsyncFn(&Site) -> anyhow::Result<bool>,
) -> anyhow::Result<Evidence> {
    const BLOWS: u64 = 8;
    let mut evidence = Evidence::default();
    let size = mapping.bytes as u32;
    site.rogue.hammer(&[mapping.iova], size, super::site::FILL, 4).await?;
    site.rogue.hammered_until("writes to a live mapping", |counted| counted.succeeded >= BLOWS).await?;
    let_go(site).await?;
    let gone = now_unix_us();
    seed(site).await?;
    let then = site.rogue.hammered().await?.answered();
    site.rogue
        .hammered_until("writes after it was let go", |counted| counted.answered() >= then + BLOWS)
        .await?;
    if is_intact(site).await? {
        let counted = site.rogue.stop_hammer().await?;
        evidence.told.extend(counted.refused.into_keys());
        evidence.notes.push(format!("{} writes landed before", counted.succeeded));
        return Ok(evidence);
    }
    let began = Instant::now();
    let closed = |counted: &rogue::language::Counted| {
        counted.refused.values().sum::<u64>() > 0 || began.elapsed() > CLOSED_WITHIN
    };
    site.rogue.hammered_until("a refusal", closed).await?;
    seed(site).await?;
    let then = site.rogue.hammered().await?.answered();
    site.rogue
        .hammered_until("writes after the window", |counted| counted.answered() >= then + BLOWS)
        .await?;
    let is_closed = is_intact(site).await?;
    let counted = site.rogue.stop_hammer().await?;
    evidence.told.extend(counted.refused.into_keys());
    if is_closed {
        evidence.reached(Outcome::Window);
        evidence.window_us = Some(counted.last_success_unix_us.saturating_sub(gone));
    } else {
        evidence.reached(Outcome::Succeeds);
    }
    Ok(evidence)
}
