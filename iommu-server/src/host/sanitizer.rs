//! What the sanitizers of all domains report, and whoever watches that.
//!
//! A sanitizer keeps its reports until they are taken; they are taken after every batch and call that may have caused one, and filed
//! here in one bounded log per owner, with sequence numbers of that log. Readers take what they want from the logs; nobody waits for
//! them.
//!
//! **Promises** (I7): one owner's reports never push out another's; equal ones in a row of one domain take one place; what was
//! overwritten is counted.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use iommu_kernel::SanitizerHandle;
use iommu_types::{DomainId, Iova, Owner, ReportClass, SanitizerReport, SeenAccess};
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::bounds;

/// A domain that has a sanitizer.
#[derive(Clone, Debug)]
pub struct WatchedDomain {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    handle: SanitizerHandle,
    hub: Arc<SanitizerHub>,
    /// Sequence number, in the sanitizer's own log, of the last report that was taken. Locked from the taking to the filing, so that
    /// reports are filed in their order.
    taken: Mutex<u64>,
}

impl WatchedDomain {
    /// A domain with this sanitizer, whose reports go to `hub`.
    pub fn new(handle: SanitizerHandle, hub: Arc<SanitizerHub>) -> Self {
        Self { shared: Arc::new(Shared { handle, hub, taken: Mutex::new(0) }) }
    }
    /// Its sanitizer.
    pub fn handle(&self) -> &SanitizerHandle {
        &self.shared.handle
    }
    /// Files what the sanitizer has reported since it was asked last. Two locks and no more when that is nothing.
    pub fn file(&self) {
        let Shared { handle, hub, taken } = &*self.shared;
        let mut taken = taken.lock();
        let reports = handle.drain_reports();
        let (Some(first), Some(last)) = (reports.first(), reports.last()) else { return };
        let lost = first.sequence.saturating_sub(*taken + 1);
        *taken = last.sequence;
        hub.file(reports, lost);
    }
}

/// Bounded logs per owner, and a bell that rings when something is filed.
#[derive(Debug)]
pub struct SanitizerHub {
    logs: Mutex<Logs>,
    bell: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Logs {
    by_owner: BTreeMap<Owner, Log>,
    /// How often each class was reported, repeats included.
    counts: BTreeMap<ReportClass, u64>,
    /// The highest number of a log that was forgotten; later logs go on after it.
    forgotten_latest: u64,
}

impl Logs {
    fn of(&mut self, owner: Owner) -> &mut Log {
        let began_after = self.forgotten_latest;
        self.by_owner.entry(owner).or_insert_with(|| Log {
            began_after,
            latest: began_after,
            ..Log::default()
        })
    }
}

#[derive(Debug, Default)]
struct Log {
    /// In the order of their sequence numbers, in which there are holes where reports were lost before they got here.
    reports: VecDeque<SanitizerReport>,
    latest: u64,
    /// Sequence number before the first report.
    began_after: u64,
    /// The latest report of each domain that has one here.
    latest_of: BTreeMap<DomainId, u64>,
}

/// Reports of a log, and how many are missing.
#[derive(Debug, Default)]
pub struct Reports {
    /// Oldest first.
    pub reports: Vec<SanitizerReport>,
    /// Overwritten before they could be read.
    pub missed: u64,
}

/// What is compared to see whether a report says the same as another; as in the sanitizer's own log.
fn compared(report: &SanitizerReport) -> SanitizerReport {
    let access = report.access.map(|access| match report.mapping {
        Some(_) => SeenAccess { iova: Iova::new(0), size_bytes: 0, done_bytes: 0, ..access },
        None => access,
    });
    SanitizerReport { sequence: 0, at_us: 0, age_us: None, repeats: 0, access, ..*report }
}

impl Log {
    /// Where the reports after a sequence number begin.
    fn index_after(&self, sequence: u64) -> usize {
        self.reports.partition_point(|report| report.sequence <= sequence)
    }
    /// The latest report of a domain, if it is still here.
    fn latest_of(&mut self, domain_id: DomainId) -> Option<&mut SanitizerReport> {
        let sequence = *self.latest_of.get(&domain_id)?;
        let index = self.index_after(sequence).checked_sub(1)?;
        self.reports.get_mut(index)
    }
    fn append(&mut self, report: SanitizerReport) {
        if let Some(before) = self.latest_of(report.domain_id)
            && compared(before) == compared(&report)
        {
            before.repeats = before.repeats.saturating_add(1).saturating_add(report.repeats);
            return;
        }
        if self.reports.len() >= bounds::SANITIZER_REPORTS_PER_OWNER
            && let Some(oldest) = self.reports.pop_front()
            && self.latest_of.get(&oldest.domain_id) == Some(&oldest.sequence)
        {
            self.latest_of.remove(&oldest.domain_id);
        }
        self.latest += 1;
        self.latest_of.insert(report.domain_id, self.latest);
        self.reports.push_back(SanitizerReport { sequence: self.latest, ..report });
    }
    fn after(&self, after: u64, limit: usize) -> Reports {
        let from = self.index_after(after);
        let reports: Vec<_> = self.reports.iter().skip(from).take(limit).copied().collect();
        let through = reports.last().map_or(after, |last| last.sequence);
        let missed = (through - after.max(self.began_after).min(through)) - reports.len() as u64;
        Reports { reports, missed }
    }
    fn overwritten(&self) -> u64 {
        self.latest - self.began_after - self.reports.len() as u64
    }
}

impl Default for SanitizerHub {
    fn default() -> Self {
        Self { logs: Mutex::default(), bell: watch::Sender::new(0) }
    }
}

impl SanitizerHub {
    /// Forgets the log of an owner that is no more.
    pub fn forget(&self, owner: Owner) {
        let mut logs = self.logs.lock();
        if let Some(log) = logs.by_owner.remove(&owner) {
            logs.forgotten_latest = logs.forgotten_latest.max(log.latest);
        }
    }
    /// Files reports of one domain, before which `lost` others were overwritten.
    fn file(&self, reports: Vec<SanitizerReport>, lost: u64) {
        {
            let mut logs = self.logs.lock();
            if let Some(first) = reports.first() {
                logs.of(first.owner).latest += lost;
            }
            for report in reports {
                let count = logs.counts.entry(report.class).or_default();
                *count = count.saturating_add(1 + u64::from(report.repeats));
                logs.of(report.owner).append(report);
            }
        }
        self.bell.send_modify(|count| *count += 1);
    }
    /// Rings when something was filed.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.bell.subscribe()
    }
    /// Reports of one log after a sequence number.
    pub fn after(&self, owner: Owner, after: u64, limit: usize) -> Reports {
        let logs = self.logs.lock();
        logs.by_owner.get(&owner).map(|log| log.after(after, limit)).unwrap_or_default()
    }
    /// The newest sequence number of a log.
    pub fn latest(&self, owner: Owner) -> u64 {
        self.logs.lock().by_owner.get(&owner).map_or(0, |log| log.latest)
    }
    /// Reports that a log has lost to overflow.
    pub fn overwritten(&self, owner: Owner) -> u64 {
        self.logs.lock().by_owner.get(&owner).map_or(0, Log::overwritten)
    }
    /// All logs there are, in order.
    pub fn owners(&self) -> Vec<Owner> {
        self.logs.lock().by_owner.keys().copied().collect()
    }
    /// The domains of which a log holds reports.
    pub fn domains(&self, owner: Owner) -> BTreeSet<DomainId> {
        let logs = self.logs.lock();
        logs.by_owner.get(&owner).map(|log| log.latest_of.keys().copied().collect()).unwrap_or_default()
    }
    /// How often each class was reported, repeats included.
    pub fn counts(&self) -> BTreeMap<ReportClass, u64> {
        self.logs.lock().counts.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use iommu_types::{Blame, RequestId};

    const OWNER: Owner = Owner::Driver(0);

    fn report(domain: u16, class: ReportClass, id: u64) -> SanitizerReport {
        SanitizerReport {
            sequence: 1,
            at_us: id,
            owner: OWNER,
            domain_id: DomainId::new(domain),
            device: None,
            class,
            violation: None,
            blame: Blame::Driver,
            access: None,
            mapping: None,
            request_id: Some(RequestId(id)),
            age_us: None,
            repeats: 0,
        }
    }

    fn shown(hub: &SanitizerHub) -> Vec<(u64, u16, u32)> {
        let of = |report: &SanitizerReport| (report.sequence, report.domain_id.get(), report.repeats);
        hub.after(OWNER, 0, usize::MAX).reports.iter().map(of).collect()
    }

    #[test]
    fn equal_reports_in_a_row_of_a_domain_are_one_whatever_others_report_meanwhile() {
        use ReportClass::{Leak, Overrun};
        let hub = SanitizerHub::default();
        for (domain, class) in [(1, Leak), (2, Leak), (1, Leak), (2, Leak), (1, Overrun), (1, Leak)] {
            hub.file(vec![report(domain, class, 5)], 0);
        }
        assert_eq!(shown(&hub), [(1, 1, 1), (2, 2, 1), (3, 1, 0), (4, 1, 0)]);
        assert_eq!(hub.counts().get(&Leak), Some(&5));
        assert_eq!(hub.overwritten(OWNER), 0);
    }

    #[test]
    fn i7_a_log_is_bounded_and_says_what_is_missing() {
        let hub = SanitizerHub::default();
        let kept = bounds::SANITIZER_REPORTS_PER_OWNER as u64;
        for id in 0..kept + 10 {
            hub.file(vec![report(1, ReportClass::Leak, id)], 0);
        }
        assert_eq!((hub.latest(OWNER), hub.overwritten(OWNER)), (kept + 10, 10));
        let batch = hub.after(OWNER, 4, 3);
        assert_eq!((batch.reports[0].sequence, batch.reports.len(), batch.missed), (11, 3, 6));
        assert_eq!(hub.after(Owner::Driver(1), 0, 3).reports, []);
        assert_eq!(hub.domains(OWNER).len(), 1);
    }

    #[test]
    fn i7_what_was_lost_before_it_was_filed_is_counted_too() {
        let hub = SanitizerHub::default();
        hub.file(vec![report(1, ReportClass::Leak, 1)], 0);
        hub.file(vec![report(1, ReportClass::Overlap, 2)], 3);
        assert_eq!((hub.latest(OWNER), hub.overwritten(OWNER)), (5, 3));
        let batch = hub.after(OWNER, 1, 9);
        assert_eq!((batch.reports.len(), batch.missed), (1, 3));
        hub.file(vec![report(1, ReportClass::Overlap, 2)], 0);
        assert_eq!(shown(&hub), [(1, 1, 0), (5, 1, 1)]);
    }
}
