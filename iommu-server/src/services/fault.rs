//! `FaultService`: what was refused.

use std::sync::Arc;

use iommu_proto::errors::WireError;
use iommu_proto::model::{FaultFilter, FaultList, ListFaults, NewFaults, WatchFaults};
use iommu_proto::pb;
use iommu_proto::pb::fault_service_server::FaultService;
use iommu_types::errors::NotYours;
use iommu_types::{FaultRecord, Owner};
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
pub struct Faults {
    /// The host.
    pub host: Arc<Host>,
}

/// Which logs a caller reads, and which of their records.
#[derive(Clone, Debug)]
struct View {
    host: Arc<Host>,
    scope: Scope,
    filter: FaultFilter,
}

impl View {
    fn new(host: &Arc<Host>, caller: &Caller, filter: Option<FaultFilter>) -> Result<Self, NotYours> {
        let filter = filter.unwrap_or_default();
        let scope = Scope::of(caller, filter.owner, "the fault log of")?;
        if let (false, Some(device)) = (caller.sees_all(), filter.device) {
            let entry_owner = host.topology.read().device(device).ok().and_then(|entry| entry.owner);
            caller.must_see(entry_owner, device)?;
        }
        Ok(Self { host: Arc::clone(host), scope, filter })
    }
    fn logs(&self) -> Vec<Option<Owner>> {
        self.scope.among(self.host.faults.owners())
    }
    fn wants(&self, record: &FaultRecord) -> bool {
        self.filter.device.is_none_or(|device| device == record.device)
    }
    /// Where a log ends, if it is one of these.
    fn latest(&self, log: Option<Owner>) -> Option<u64> {
        self.scope.has(log).then(|| self.host.faults.latest(log))
    }
    /// Where all logs end now.
    fn end(&self) -> Positions {
        let mut positions = Positions::default();
        for log in self.logs() {
            positions.set(log, self.host.faults.latest(log));
        }
        positions
    }
    /// At most one message of records after `positions`, which move on.
    fn look(&self, positions: &mut Positions) -> Look<pb::WatchFaultsResponse> {
        let mut records = Vec::new();
        let mut missed_count = 0;
        let mut moved = false;
        for log in self.logs() {
            let room = bounds::ITEMS_PER_MESSAGE_MAX - records.len();
            if room == 0 {
                break;
            }
            let batch = self.host.faults.after(log, positions.of(log), room);
            missed_count += batch.missed;
            if let Some(last) = batch.records.last() {
                positions.set(log, last.sequence);
                moved = true;
            }
            records.extend(batch.records.into_iter().filter(|record| self.wants(record)));
        }
        if !moved {
            return Look::Nothing;
        }
        if records.is_empty() && missed_count == 0 {
            return Look::Unwanted;
        }
        let resume_token = positions.write(self.host.run_id);
        Look::New(NewFaults { records, missed_count, resume_token }.into())
    }
}

#[tonic::async_trait]
impl FaultService for Faults {
    async fn list(
        &self,
        request: Request<pb::ListFaultsRequest>,
    ) -> Result<Response<pb::ListFaultsResponse>, Status> {
        let caller = Caller::of(&request)?;
        let ListFaults { filter, limit } = parse(request.into_inner())?;
        let view = View::new(&self.host, &caller, filter).map_err(WireError::into_status)?;
        self.host.faults.collect(&self.host);
        let end = view.end();
        let mut records = Vec::new();
        let mut overwritten_count = 0;
        for log in view.logs() {
            let kept = bounds::FAULT_RECORDS_PER_OWNER as usize;
            let batch = self.host.faults.after(log, 0, kept);
            records.extend(batch.records.into_iter().filter(|record| view.wants(record)));
            overwritten_count += self.host.faults.overwritten(log);
        }
        records.sort_by_key(|record| (record.at_unix_ms, record.owner, record.sequence));
        let limit = match limit as usize {
            0 => bounds::ITEMS_PER_MESSAGE_MAX,
            limit => limit.min(bounds::ITEMS_PER_MESSAGE_MAX),
        };
        records.drain(..records.len().saturating_sub(limit));
        let list = FaultList {
            records,
            overwritten_count,
            // A figure of all tenants together (I7).
            unit_overflow_count: if caller.sees_all() {
                self.host.kernel.unit().counters().faults_overflowed
            } else {
                0
            },
            resume_token: end.write(self.host.run_id),
        };
        Ok(Response::new(list.into()))
    }

    type WatchStream = Feed<pb::WatchFaultsResponse>;

    async fn watch(
        &self,
        request: Request<pb::WatchFaultsRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let caller = Caller::of(&request)?;
        let place = watcher(&caller)?;
        let WatchFaults { filter, resume_token } = parse(request.into_inner())?;
        let view = View::new(&self.host, &caller, filter).map_err(WireError::into_status)?;
        let bell = self.host.faults.subscribe();
        let mut positions = match resume_token.as_str() {
            "" => view.end(),
            token => Positions::read(token, self.host.run_id, |log| view.latest(log))
                .map_err(WireError::into_status)?,
        };
        let stream = feed(&self.host, &caller, Some(place), |sender| async move {
            let resume_token = positions.write(view.host.run_id);
            let first = pb::WatchFaultsResponse { resume_token, ..Default::default() };
            sender.send(Ok(first)).await?;
            follow(bell, || view.look(&mut positions), |message| sender.send(Ok(message))).await
        });
        Ok(Response::new(stream))
    }
}
