//! The fault logs and whoever watches them.

use std::sync::Arc;

use iommu_kernel::FaultLogs;
use iommu_types::{FaultRecord, Owner};
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::bounds;
use crate::host::Host;
use crate::telemetry::now_unix_ms;

/// Bounded logs per owner, and a bell that rings when something is filed.
pub struct FaultHub {
    logs: Mutex<FaultLogs>,
    bell: watch::Sender<u64>,
}

impl std::fmt::Debug for FaultHub {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FaultHub").finish_non_exhaustive()
    }
}

/// Records of some logs, and how many are missing.
#[derive(Debug, Default)]
pub struct Batch {
    /// Oldest first.
    pub records: Vec<FaultRecord>,
    /// Overwritten before they could be read.
    pub missed: u64,
}

impl Default for FaultHub {
    fn default() -> Self {
        let logs = Mutex::new(FaultLogs::new(bounds::FAULT_RECORDS_PER_OWNER));
        Self { logs, bell: watch::Sender::new(0) }
    }
}

impl FaultHub {
    /// Files what the managed unit has recorded. Cheap when there is nothing.
    pub fn collect(&self, host: &Host) {
        if !host.kernel.unit().faults_pending() {
            return;
        }
        let filed = {
            // Lock order: topology before fault logs.
            let topology = host.topology.read();
            self.logs.lock().collect(&host.kernel, &topology, now_unix_ms())
        };
        if !filed.is_empty() {
            self.bell.send_modify(|count| *count += 1);
        }
    }
    /// Forgets the log of an owner that is no more.
    pub fn forget(&self, owner: Owner) {
        self.logs.lock().forget(owner);
    }
    /// Rings when something was filed.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.bell.subscribe()
    }
    /// Records of one log after a sequence number.
    pub fn after(&self, owner: Option<Owner>, after: u64, limit: usize) -> Batch {
        let (records, missed) = self.logs.lock().after(owner, after, limit);
        Batch { records, missed }
    }
    /// The newest sequence number of a log.
    pub fn latest(&self, owner: Option<Owner>) -> u64 {
        self.logs.lock().latest(owner)
    }
    /// Records that a log has lost to overflow.
    pub fn overwritten(&self, owner: Option<Owner>) -> u64 {
        self.logs.lock().overwritten(owner)
    }
    /// All logs there are, in order.
    pub fn owners(&self) -> Vec<Option<Owner>> {
        let mut owners = self.logs.lock().owners();
        owners.sort();
        owners
    }
}

/// Collects now and then what no batch collected: the first fault of a device that went away in the middle.
pub async fn collect_regularly(host: Arc<Host>) {
    let mut tick = tokio::time::interval(bounds::WATCHDOG_TICK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        host.faults.collect(&host);
    }
}
