//! Reports of the DMA sanitizer: misuse that hardware cannot see, with the life of the mapping and whom to blame.

use std::sync::Arc;

use iommu_proto::limits::MESSAGE_BYTES_MAX;
use iommu_proto::model;
pub use iommu_proto::model::{NewReports, ReportList, SanitizerFilter};
use iommu_proto::pb;
use iommu_proto::pb::sanitizer_service_client::SanitizerServiceClient;
use tonic::Streaming;
use tonic::transport::Channel;

use crate::connection::Core;
use crate::convert::bad_answer;
use crate::subscription::{Feed, subscribe};
use crate::{InspectError, SdkError, Subscription};

/// The reports that the caller may see. Only domains that were created with the sanitizer have some.
#[derive(Clone, Debug)]
pub struct Sanitizer {
    core: Arc<Core>,
}

fn client(channel: Channel) -> SanitizerServiceClient<Channel> {
    SanitizerServiceClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX)
}

impl Sanitizer {
    pub(crate) fn new(core: Arc<Core>) -> Self {
        Self { core }
    }

    /// Reports that are kept, oldest first; at most `limit` of them, the newest (0: as many as fit one
    /// message).
    pub async fn list(
        &self,
        filter: SanitizerFilter,
        limit: u32,
    ) -> Result<ReportList, SdkError<InspectError>> {
        self.ask(model::ListReports { filter: Some(filter), after_sequence: None, limit }).await
    }

    /// Reports with a larger sequence than `sequence`, oldest first; at most `limit` of them, the oldest, so that one can page on.
    /// Sequences count per owner, so the filter should name one.
    pub async fn list_after(
        &self,
        filter: SanitizerFilter,
        sequence: u64,
        limit: u32,
    ) -> Result<ReportList, SdkError<InspectError>> {
        self.ask(model::ListReports { filter: Some(filter), after_sequence: Some(sequence), limit }).await
    }

    async fn ask(&self, list: model::ListReports) -> Result<ReportList, SdkError<InspectError>> {
        let message: pb::ListReportsRequest = list.into();
        let answer = self
            .core
            .unary(message, |channel, request| async move { client(channel).list_reports(request).await })
            .await?;
        Ok(answer.try_into().map_err(bad_answer)?)
    }

    /// Reports kept after `resume_token` (of a [`list`](Self::list) or an earlier watch; empty: what comes
    /// from now on), then new ones as they come. Returns once the subscription stands. After a lost
    /// connection it goes on where it was; reports that were overwritten meanwhile are counted in
    /// `missed_count`.
    pub async fn watch(
        &self,
        filter: SanitizerFilter,
        resume_token: impl Into<String>,
    ) -> Result<Subscription<NewReports, InspectError>, SdkError<InspectError>> {
        let core = Arc::clone(&self.core);
        subscribe(ReportFeed { core, filter, resume_token: resume_token.into() }).await
    }
}

struct ReportFeed {
    core: Arc<Core>,
    filter: SanitizerFilter,
    /// After the reports that were given last.
    resume_token: String,
}

impl Feed for ReportFeed {
    type Message = pb::WatchReportsResponse;
    type Item = NewReports;
    type Error = InspectError;

    async fn open(&mut self) -> Result<Streaming<Self::Message>, SdkError<InspectError>> {
        let resume_token = self.resume_token.clone();
        let message: pb::WatchReportsRequest =
            model::WatchReports { filter: Some(self.filter), resume_token }.into();
        self.core
            .call(|channel| {
                let message = message.clone();
                async move { client(channel).watch(message).await }
            })
            .await
    }

    fn items(&mut self, message: Self::Message) -> Result<Vec<NewReports>, String> {
        let new = NewReports::try_from(message).map_err(|error| error.to_string())?;
        self.resume_token.clone_from(&new.resume_token);
        // The message that says that the subscription stands is of no use to the subscriber.
        let empty = new.reports.is_empty() && new.missed_count == 0;
        Ok(if empty { Vec::new() } else { vec![new] })
    }
}
