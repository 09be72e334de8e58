//! Fault logs: what the unit recorded, filed by the owner of the device.
//!
//! One bounded log per owner and one for devices of nobody, each with its own count of what was overwritten: one
//! tenant cannot hide another's evidence (I7). The unit's few recording registers are emptied at every collection.

use std::collections::{BTreeMap, VecDeque};

use iommu_types::{DeviceAddress, FaultRecord, Owner};

use crate::boot::Kernel;
use crate::topology::Topology;

/// The logs of all owners.
#[derive(Debug)]
pub struct FaultLogs {
    records_per_owner: u32,
    /// Declared owners are bounded, and so are the logs.
    logs: BTreeMap<Option<Owner>, Log>,
}

#[derive(Debug, Default)]
struct Log {
    records: VecDeque<FaultRecord>,
    latest: u64,
}

impl Log {
    fn oldest(&self) -> u64 {
        self.latest - self.records.len() as u64 + 1
    }
}

impl FaultLogs {
    /// Empty logs that keep so many records each.
    pub fn new(records_per_owner: u32) -> Self {
        Self { records_per_owner, logs: BTreeMap::new() }
    }
    /// Takes what the unit has recorded and files it by the device's owner, with the domain that the device is attached to now. Returns
    /// the owners that got records.
    pub fn collect(&mut self, kernel: &Kernel, topology: &Topology, now_unix_ms: u64) -> Vec<Option<Owner>> {
        let mut owners = Vec::new();
        if !kernel.unit().faults_pending() {
            return owners;
        }
        for recorded in kernel.unit().take_faults() {
            let device = DeviceAddress { segment: 0, source_id: recorded.fault.source_id() };
            let entry = topology.device(device).ok();
            let owner = entry.and_then(|entry| entry.owner);
            self.append(FaultRecord {
                sequence: 0,
                at_unix_ms: now_unix_ms,
                owner,
                device,
                domain_id: entry.and_then(|entry| entry.domain_id),
                fault: recorded.fault,
                collapsed_count: recorded.collapsed_count,
            });
            if !owners.contains(&owner) {
                owners.push(owner);
            }
        }
        owners
    }
    fn append(&mut self, record: FaultRecord) {
        let log = self.logs.entry(record.owner).or_default();
        log.latest += 1;
        if log.records.len() >= self.records_per_owner as usize {
            log.records.pop_front();
        }
        log.records.push_back(FaultRecord { sequence: log.latest, ..record });
    }
    /// Records after `after` (sequence numbers of that owner's log), oldest first, with how many between were overwritten.
    pub fn after(&self, owner: Option<Owner>, after: u64, limit: usize) -> (Vec<FaultRecord>, u64) {
        let Some(log) = self.logs.get(&owner) else {
            return (Vec::new(), 0);
        };
        let oldest = log.oldest();
        let overwritten = (oldest - 1).saturating_sub(after);
        let skip = after.saturating_add(1).saturating_sub(oldest);
        let skip = usize::try_from(skip).unwrap_or(usize::MAX);
        (log.records.iter().skip(skip).take(limit).copied().collect(), overwritten)
    }
    /// Sequence number of the latest record; 0 when there was none.
    pub fn latest(&self, owner: Option<Owner>) -> u64 {
        self.logs.get(&owner).map_or(0, |log| log.latest)
    }
    /// How many records of an owner were overwritten by later ones of the same owner.
    pub fn overwritten(&self, owner: Option<Owner>) -> u64 {
        self.logs.get(&owner).map_or(0, |log| log.oldest() - 1)
    }
    /// Forgets the log of an owner that is no more.
    pub fn forget(&mut self, owner: Owner) {
        self.logs.remove(&Some(owner));
    }
    /// Whoever has a log.
    pub fn owners(&self) -> Vec<Option<Owner>> {
        self.logs.keys().copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use iommu_types::{Fault, FaultReason, InterruptFault, SourceId};

    fn record(owner: Option<Owner>) -> FaultRecord {
        let source_id = SourceId::new(8);
        let reason = FaultReason::IR_NOT_PRESENT;
        FaultRecord {
            sequence: 0,
            at_unix_ms: 5,
            owner,
            device: DeviceAddress { segment: 0, source_id },
            domain_id: None,
            fault: Fault::Interrupt(InterruptFault { source_id, index: None, reason }),
            collapsed_count: 0,
        }
    }

    #[test]
    fn i7_a_full_log_overwrites_its_own_oldest_records_and_no_other_log() {
        let mut logs = FaultLogs::new(3);
        let victim = Some(Owner::Vm(1));
        let noisy = Some(Owner::Vm(2));
        logs.append(record(victim));
        for _ in 0..10 {
            logs.append(record(noisy));
        }
        let sequences = |owner, after, limit| {
            let (records, overwritten) = logs.after(owner, after, limit);
            (records.iter().map(|record| record.sequence).collect::<Vec<_>>(), overwritten)
        };
        assert_eq!(sequences(victim, 0, 10), (vec![1], 0));
        assert_eq!(sequences(noisy, 0, 10), (vec![8, 9, 10], 7));
        assert_eq!(sequences(noisy, 6, 10), (vec![8, 9, 10], 1));
        assert_eq!(sequences(noisy, 8, 1), (vec![9], 0));
        assert_eq!(sequences(noisy, 10, 10), (vec![], 0));
        assert_eq!(sequences(noisy, u64::MAX, 10), (vec![], 0));
        assert_eq!(sequences(None, 0, 10), (vec![], 0));
        assert_eq!((logs.latest(noisy), logs.overwritten(noisy)), (10, 7));
        assert_eq!((logs.latest(victim), logs.overwritten(victim)), (1, 0));
        assert_eq!(logs.owners(), [victim, noisy]);
    }
}
