//! Fault logs: what the unit recorded, filed by the owner of the device.
//!
//! One bounded log per owner and one for devices of nobody, each with its own count of what was overwritten: one
//! tenant cannot hide another's evidence (I7). The unit's few recording registers are emptied at every collection.

use std::collections::BTreeMap;

use iommu_types::{DeviceAddress, FaultRecord, Owner};

use crate::boot::Kernel;
use crate::sequence_log::SequenceLog;
use crate::topology::Topology;

/// The logs of all owners.
#[derive(Debug)]
pub struct FaultLogs {
    records_per_owner: u32,
    /// Declared owners are bounded, and so are the logs.
    logs: BTreeMap<Option<Owner>, SequenceLog<FaultRecord>>,
    /// The highest number of a log that was forgotten: later logs go on after it, so that who watches a number of an owner that comes again
    /// misses nothing.
    forgotten_latest: u64,
}

impl FaultLogs {
    /// Empty logs that keep so many records each.
    pub fn new(records_per_owner: u32) -> Self {
        Self { records_per_owner, logs: BTreeMap::new(), forgotten_latest: 0 }
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
        let empty = || SequenceLog::after_another(self.records_per_owner as usize, self.forgotten_latest);
        let log = self.logs.entry(record.owner).or_insert_with(empty);
        log.append(|sequence| FaultRecord { sequence, ..record });
    }
    /// Forgets the records of an owner that is gone, so that the next one of that number does not see them. Devices that it had leave nothing
    /// behind with their next owner: a record is of whoever had the device when it was [collected](Self::collect), so it is to be collected before
    /// a device changes hands.
    pub fn forget(&mut self, owner: Owner) {
        if let Some(log) = self.logs.remove(&Some(owner)) {
            self.forgotten_latest = self.forgotten_latest.max(log.latest());
        }
    }
    /// Records after `after` (sequence numbers of that owner's log), oldest first, with how many between were overwritten.
    pub fn after(&self, owner: Option<Owner>, after: u64, limit: usize) -> (Vec<FaultRecord>, u64) {
        self.logs.get(&owner).map_or_else(Default::default, |log| log.after(after, limit))
    }
    /// Sequence number of the latest record; 0 when there was none.
    pub fn latest(&self, owner: Option<Owner>) -> u64 {
        self.logs.get(&owner).map_or(0, SequenceLog::latest)
    }
    /// How many records of an owner were overwritten by later ones of the same owner.
    pub fn overwritten(&self, owner: Option<Owner>) -> u64 {
        self.logs.get(&owner).map_or(0, SequenceLog::overwritten)
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

    #[test]
    fn an_owner_that_is_gone_leaves_no_records_to_the_next_of_its_number() {
        let mut logs = FaultLogs::new(3);
        let (gone, other) = (Owner::Vm(1), Owner::Vm(2));
        for owner in [gone, other, gone] {
            logs.append(record(Some(owner)));
        }
        logs.forget(gone);
        assert_eq!(logs.owners(), [Some(other)]);
        assert_eq!((logs.after(Some(gone), 0, 10), logs.latest(Some(gone))), ((vec![], 0), 0));
        logs.append(record(Some(gone)));
        assert_eq!(
            logs.latest(Some(gone)),
            3,
            "numbers go on, so that a watcher of the number misses nothing"
        );
        let (records, missed) = logs.after(Some(gone), 2, 10);
        assert_eq!((records.len(), missed), (1, 0));
        assert_eq!(logs.after(Some(gone), 0, 10).1, 0, "what was the other's is not missed");
        assert_eq!(logs.latest(Some(other)), 1);
    }
}
