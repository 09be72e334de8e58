//! Reports of one domain: the latest ones, and how many there were of each class.
//!
//! Equal ones in a row are one with a count. Equal means: the same class, device, blame, mapping, kind of access and refusal. When
//! it was seen, and where in the mapping, is that of the first, so that a device that goes on and on leaves one line and
//! pushes nothing else out. Where no mapping is concerned, the address belongs to what is compared.

use std::collections::{BTreeMap, VecDeque};

use iommu_types::{Iova, ReportClass, SanitizerReport, SeenAccess};

#[derive(Debug)]
pub(super) struct Log {
    capacity: usize,
    reports: VecDeque<SanitizerReport>,
    latest: u64,
    overwritten: u64,
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
        Self {
            capacity: capacity.max(1),
            reports: VecDeque::new(),
            latest: 0,
            overwritten: 0,
            counts: BTreeMap::new(),
        }
    }
    /// Adds a report. Its `repeats` say how many further ones it stands for already.
    pub(super) fn append(&mut self, report: SanitizerReport) {
        let count = self.counts.entry(report.class).or_default();
        *count = count.saturating_add(1 + u64::from(report.repeats));
        if let Some(last) = self.reports.back_mut()
            && compared(last) == compared(&report)
        {
            last.repeats = last.repeats.saturating_add(1).saturating_add(report.repeats);
            return;
        }
        if self.reports.len() >= self.capacity {
            self.reports.pop_front();
            self.overwritten += 1;
        }
        self.latest += 1;
        self.reports.push_back(SanitizerReport { sequence: self.latest, ..report });
    }
    /// Reports after a sequence number, oldest first, with how many between were overwritten.
    pub(super) fn after(&self, after: u64, limit: usize) -> (Vec<SanitizerReport>, u64) {
        // What was taken out is not lost.
        let before_oldest = self.latest - self.reports.len() as u64;
        let overwritten = before_oldest.saturating_sub(after);
        let skip = usize::try_from(after.saturating_sub(before_oldest)).unwrap_or(usize::MAX);
        (self.reports.iter().skip(skip).take(limit).copied().collect(), overwritten)
    }
    /// Takes out what is there.
    pub(super) fn drain(&mut self) -> Vec<SanitizerReport> {
        self.reports.drain(..).collect()
    }
    pub(super) fn latest(&self) -> u64 {
        self.latest
    }
    pub(super) fn overwritten(&self) -> u64 {
        self.overwritten
    }
    pub(super) fn counts(&self) -> &BTreeMap<ReportClass, u64> {
        &self.counts
    }
}
