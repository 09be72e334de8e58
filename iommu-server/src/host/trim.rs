//! Gives back what idle domains keep for speed: cached address ranges, a bounded number at a time.

use std::sync::Arc;

use iommu_kernel::Domain;

use super::Host;
use crate::bounds;

impl Host {
    /// Trims every domain once. Returns the pages that went back.
    pub fn trim(&self) -> u64 {
        let slots = self.domains.list(|_| true);
        // One that is being destroyed gives everything back anyway.
        slots.iter().map(|slot| slot.with(Domain::trim).unwrap_or(0)).sum()
    }
}

/// Trims all domains regularly, for ever.
pub async fn trim_regularly(host: Arc<Host>) {
    let mut tick = tokio::time::interval(bounds::TRIM_INTERVAL);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let _pages = host.trim();
    }
}
