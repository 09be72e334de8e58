//! Who looks at what no attacker can change: the fault log, and the counters of the unit.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use guest_sdk::{Counters, DeviceAddress, FaultFilter, FaultRecord, Observer, Owner};

/// Records are there when a DMA is answered; a machine under load may need more.
const DEADLINE: Duration = Duration::from_secs(2);

/// An observer.
pub(crate) struct Judge(Observer);

/// Where the logs ended.
pub(crate) type Mark = BTreeMap<Option<Owner>, u64>;

impl Judge {
    pub(crate) fn new(observer: Observer) -> Self {
        Self(observer)
    }

    pub(crate) async fn records(&self, device: DeviceAddress) -> anyhow::Result<Vec<FaultRecord>> {
        let filter = FaultFilter { owner: None, device: Some(device) };
        Ok(self.0.faults().list(filter, 0).await?.records)
    }

    /// Where the logs end now, as far as they hold faults of a device.
    pub(crate) async fn mark(&self, device: DeviceAddress) -> anyhow::Result<Mark> {
        let mut mark = Mark::new();
        for record in self.records(device).await? {
            let last = mark.entry(record.owner).or_default();
            *last = record.sequence.max(*last);
        }
        Ok(mark)
    }

    /// Reasons that were recorded of a device since then; waits for those that are due.
    pub(crate) async fn since(
        &self,
        device: DeviceAddress,
        mark: &Mark,
        due: &BTreeSet<String>,
    ) -> anyhow::Result<BTreeSet<String>> {
        let asked = Instant::now();
        loop {
            let new = self
                .records(device)
                .await?
                .into_iter()
                .filter(|record| record.sequence > mark.get(&record.owner).copied().unwrap_or_default());
            let logged: BTreeSet<String> =
                new.map(|record| format!("{:#x}", record.fault.reason().0)).collect();
            if due.is_subset(&logged) || asked.elapsed() > DEADLINE {
                return Ok(logged);
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Counters of the host's unit.
    pub(crate) async fn counters(&self) -> anyhow::Result<Counters> {
        Ok(self.0.inspect().counters(None).await?)
    }
}
