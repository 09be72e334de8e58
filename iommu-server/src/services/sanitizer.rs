//! `SanitizerService`: misuse that hardware cannot see.

use std::sync::Arc;

use iommu_proto::errors::WireError;
use iommu_proto::model::{ListReports, NewReports, ReportList, SanitizerFilter, WatchReports};
use iommu_proto::pb;
use iommu_proto::pb::sanitizer_service_server::SanitizerService;
use iommu_types::{DomainId, Owner, SanitizerReport};
use tonic::{Request, Response, Status};

use super::driver::watcher;
use super::feed::{Feed, Look, feed, follow};
use super::log_token::Positions;
use super::scope::Scope;
use super::{Caller, parse};
use crate::bounds;
use crate::host::Host;

/// The service.
#[derive(Clone, Debug)]
pub struct Sanitizers {
    /// The host.
    pub host: Arc<Host>,
}

/// Which logs a caller reads, and which of their reports.
#[derive(Clone, Debug)]
struct View {
    host: Arc<Host>,
    scope: Scope,
    filter: SanitizerFilter,
}

impl View {
    fn new(host: &Arc<Host>, caller: &Caller, filter: Option<SanitizerFilter>) -> Result<Self, Status> {
        let filter = filter.unwrap_or_default();
        let scope = Scope::of(caller, filter.owner, "the reports on").map_err(WireError::into_status)?;
        let view = Self { host: Arc::clone(host), scope, filter };
        if let Some(domain_id) = filter.domain_id {
            view.must_know(caller, domain_id)?;
        }
        if let (false, Some(device)) = (caller.sees_all(), filter.device) {
            let entry_owner = host.topology.read().device(device).ok().and_then(|entry| entry.owner);
            caller.must_see(entry_owner, device).map_err(WireError::into_status)?;
        }
        Ok(view)
    }
    /// A domain is there, or was and has left reports.
    fn must_know(&self, caller: &Caller, domain_id: DomainId) -> Result<(), Status> {
        if self.logs().iter().any(|log| self.host.reports.domains(*log).contains(&domain_id)) {
            return Ok(());
        }
        let slot = self.host.domains.get(domain_id).map_err(WireError::into_status)?;
        caller.must_see(Some(slot.owner), format!("domain {domain_id}")).map_err(WireError::into_status)
    }
    fn logs(&self) -> Vec<Owner> {
        let all = self.host.reports.owners().into_iter().map(Some);
        self.scope.among(all).into_iter().flatten().collect()
    }
    fn wants(&self, report: &SanitizerReport) -> bool {
        self.filter.domain_id.is_none_or(|id| id == report.domain_id)
            && self.filter.device.is_none_or(|device| Some(device) == report.device)
    }
    /// Where a log ends, if it is one of these.
    fn latest(&self, log: Option<Owner>) -> Option<u64> {
        let log = log.filter(|log| self.scope.has(Some(*log)))?;
        Some(self.host.reports.latest(log))
    }
    /// Where all logs end now.
    fn end(&self) -> Positions {
        let mut positions = Positions::default();
        for log in self.logs() {
            positions.set(Some(log), self.host.reports.latest(log));
        }
        positions
    }
    /// At most one message of reports after `positions`, which move on.
    fn look(&self, positions: &mut Positions) -> Look<pb::WatchReportsResponse> {
        let mut reports = Vec::new();
        let mut missed_count = 0;
        let mut moved = false;
        for log in self.logs() {
            let room = bounds::ITEMS_PER_MESSAGE_MAX - reports.len();
            if room == 0 {
                break;
            }
            let batch = self.host.reports.after(log, positions.of(Some(log)), room);
            missed_count += batch.missed;
            if let Some(last) = batch.reports.last() {
                positions.set(Some(log), last.sequence);
                moved = true;
            }
            reports.extend(batch.reports.into_iter().filter(|report| self.wants(report)));
        }
        if !moved {
            return Look::Nothing;
        }
        if reports.is_empty() && missed_count == 0 {
            return Look::Unwanted;
        }
        let resume_token = positions.write(self.host.run_id);
        Look::New(NewReports { reports, missed_count, resume_token }.into())
    }
    /// What is kept: after a sequence number the oldest, in their order; else the newest.
    fn kept(&self, after_sequence: Option<u64>, limit: usize) -> Vec<SanitizerReport> {
        let mut reports = Vec::new();
        for log in self.logs() {
            let all = bounds::SANITIZER_REPORTS_PER_OWNER;
            let batch = self.host.reports.after(log, after_sequence.unwrap_or(0), all);
            reports.extend(batch.reports.into_iter().filter(|report| self.wants(report)));
        }
        match after_sequence {
            Some(_) => {
                // One pages through one log, whose order is that of its numbers.
                reports.sort_by_key(|report| (report.sequence, report.owner));
                reports.truncate(limit);
            }
            None => {
                reports.sort_by_key(|report| (report.at_us, report.owner, report.sequence));
                reports.drain(..reports.len().saturating_sub(limit));
            }
        }
        reports
    }
}

#[tonic::async_trait]
impl SanitizerService for Sanitizers {
    async fn list_reports(
        &self,
        request: Request<pb::ListReportsRequest>,
    ) -> Result<Response<pb::ListReportsResponse>, Status> {
        let caller = Caller::of(&request)?;
        let ListReports { filter, after_sequence, limit } = parse(request.into_inner())?;
        let view = View::new(&self.host, &caller, filter)?;
        let resume_token = view.end().write(self.host.run_id);
        let limit = match limit as usize {
            0 => bounds::ITEMS_PER_MESSAGE_MAX,
            limit => limit.min(bounds::ITEMS_PER_MESSAGE_MAX),
        };
        let reports = view.kept(after_sequence, limit);
        let overwritten_count = view.logs().into_iter().map(|log| self.host.reports.overwritten(log)).sum();
        Ok(Response::new(ReportList { reports, overwritten_count, resume_token }.into()))
    }

    type WatchStream = Feed<pb::WatchReportsResponse>;

    async fn watch(
        &self,
        request: Request<pb::WatchReportsRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let caller = Caller::of(&request)?;
        let place = watcher(&caller)?;
        let WatchReports { filter, resume_token } = parse(request.into_inner())?;
        let view = View::new(&self.host, &caller, filter)?;
        let bell = self.host.reports.subscribe();
        let mut positions = match resume_token.as_str() {
            "" => view.end(),
            token => Positions::read(token, self.host.run_id, |log| view.latest(log))
                .map_err(WireError::into_status)?,
        };
        let stream = feed(&self.host, &caller, Some(place), |sender| async move {
            let resume_token = positions.write(view.host.run_id);
            let first = pb::WatchReportsResponse { resume_token, ..Default::default() };
            sender.send(Ok(first)).await?;
            follow(bell, || view.look(&mut positions), |message| sender.send(Ok(message))).await
        });
        Ok(Response::new(stream))
    }
}
