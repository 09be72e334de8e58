//! Faults: what was refused, by whom, and why.

use std::sync::Arc;

use iommu_proto::model;
pub use iommu_proto::model::{FaultFilter, FaultList, NewFaults};
use iommu_proto::pb;
use iommu_proto::pb::fault_service_client::FaultServiceClient;
use iommu_types::errors::NotYours;
use tonic::Streaming;
use tonic::transport::Channel;

use crate::connection::{Core, MESSAGE_BYTES_MAX};
use crate::convert::bad_answer;
use crate::subscription::{Feed, subscribe};
use crate::{SdkError, Subscription};

/// The fault logs that the caller may see.
#[derive(Clone, Debug)]
pub struct Faults {
    core: Arc<Core>,
}

fn client(channel: Channel) -> FaultServiceClient<Channel> {
    FaultServiceClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX)
}

impl Faults {
    pub(crate) fn new(core: Arc<Core>) -> Self {
        Self { core }
    }

    /// Records that are kept, oldest first; at most `limit` of them, the newest (0: as many as fit one
    /// message).
    pub async fn list(&self, filter: FaultFilter, limit: u32) -> Result<FaultList, SdkError<NotYours>> {
        let message: pb::ListFaultsRequest = model::ListFaults { filter: Some(filter), limit }.into();
        let answer = self
            .core
            .call(|channel| {
                let request = self.core.request(message);
                async move { client(channel).list(request).await }
            })
            .await?;
        Ok(answer.try_into().map_err(bad_answer)?)
    }

    /// Records kept after `resume_token` (of a [`list`](Self::list) or an earlier watch; empty: what comes
    /// from now on), then new ones as they come. Returns once the subscription stands. After a lost
    /// connection it goes on where it was; records that were overwritten meanwhile are counted in
    /// `missed_count`.
    pub async fn watch(
        &self,
        filter: FaultFilter,
        resume_token: impl Into<String>,
    ) -> Result<Subscription<NewFaults, NotYours>, SdkError<NotYours>> {
        let core = Arc::clone(&self.core);
        subscribe(FaultFeed { core, filter, resume_token: resume_token.into() }).await
    }
}

struct FaultFeed {
    core: Arc<Core>,
    filter: FaultFilter,
    /// After the records that were given last.
    resume_token: String,
}

impl Feed for FaultFeed {
    type Message = pb::WatchFaultsResponse;
    type Item = NewFaults;
    type Error = NotYours;

    async fn open(&mut self) -> Result<Streaming<Self::Message>, SdkError<NotYours>> {
        let watch = model::WatchFaults { filter: Some(self.filter), resume_token: self.resume_token.clone() };
        let message: pb::WatchFaultsRequest = watch.into();
        self.core
            .call(|channel| {
                let message = message.clone();
                async move { client(channel).watch(message).await }
            })
            .await
    }

    fn items(&mut self, message: Self::Message) -> Result<Vec<NewFaults>, String> {
        let new = NewFaults::try_from(message).map_err(|error| error.to_string())?;
        self.resume_token.clone_from(&new.resume_token);
        // The message that says that the subscription stands is of no use to the subscriber.
        let empty = new.records.is_empty() && new.missed_count == 0;
        Ok(if empty { Vec::new() } else { vec![new] })
    }

    fn resumed(&mut self) -> Option<NewFaults> {
        None
    }
}
