//! Reports of one domain: the latest ones, and how many there were of each class.
//!
//! Equal ones in a row are one with a count. Equal means: the same class, device, blame, mapping, kind of access and refusal. When
//! it was seen, and where in the mapping, is that of the first, so that a device that goes on and on leaves one line and
//! pushes nothing else out. Where no mapping is concerned, the address belongs to what is compared.

use std::collections::BTreeMap;

use iommu_types::{Iova, ReportClass, SanitizerReport, SeenAccess};

use crate::sequence_log::SequenceLog;

#[derive(Debug)]
pub(super) struct Log {
    reports: SequenceLog<SanitizerReport>,
    counts: BTreeMap<ReportClass, u64>,
}

fn compared(report: &SanitizerReport) -> SanitizerReport {
    let access = report.access.map(|access| match report.mapping {
        Some(_) => SeenAccess { iova: Iova::new(0), size_bytes: 0, done_bytes: 0, ..access },
        None => access,
    });
    SanitizerReport { sequence: 0, at_us: 0, age_us: None, repeats: 0, access, ..*report }
}

impl Log {
    pub(super) fn new(capacity: usize) -> Self {
        Self { reports: SequenceLog::new(capacity), counts: BTreeMap::new() }
    }
    /// Adds a report. Its `repeats` say how many further ones it stands for already.
    pub(super) fn append(&mut self, report: SanitizerReport) {
        let count = self.counts.entry(report.class).or_default();
        *count = count.saturating_add(1 + u64::from(report.repeats));
        if let Some(last) = self.reports.last_mut()
            && compared(last) == compared(&report)
        {
            last.repeats = last.repeats.saturating_add(1).saturating_add(report.repeats);
            return;
        }
        self.reports.append(|sequence| SanitizerReport { sequence, ..report });
    }
    /// Reports after a sequence number, oldest first, with how many between were overwritten or taken out.
    pub(super) fn after(&self, after: u64, limit: usize) -> (Vec<SanitizerReport>, u64) {
        self.reports.after(after, limit)
    }
    /// Takes out what is there.
    pub(super) fn drain(&mut self) -> Vec<SanitizerReport> {
        self.reports.drain()
    }
    pub(super) fn latest(&self) -> u64 {
        self.reports.latest()
    }
    pub(super) fn overwritten(&self) -> u64 {
        self.reports.overwritten()
    }
    pub(super) fn counts(&self) -> &BTreeMap<ReportClass, u64> {
        &self.counts
    }
}
