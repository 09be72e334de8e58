//! Looking at everything, changing nothing.

use std::sync::Arc;

use iommu_proto::limits::MESSAGE_BYTES_MAX;
use iommu_proto::model;
pub use iommu_proto::model::{
    CacheCounters, Counters, DeviceState, DomainState, DumpedIotlb, IotlbEntry, LimitState, LimitsOfOwner,
    MappingState, Mappings, OwnerState, RingCounters, Topology, WalkStep,
};
use iommu_proto::pb;
use iommu_proto::pb::inspect_service_client::InspectServiceClient;
use iommu_types::{Access, DeviceAddress, DomainId, Explanation, Iova, Owner, Pasid};
use tonic::transport::Channel;

use crate::connection::{Core, may_retry};
use crate::convert::bad_answer;
use crate::error::of_status;
use crate::{InspectError, Never, SdkError};

/// The inspection service. Observers and operators see everything; a driver sees its own devices and domains.
#[derive(Clone, Debug)]
pub struct Inspect {
    core: Arc<Core>,
}

/// An access to be explained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AccessQuestion {
    /// By which device.
    pub device: DeviceAddress,
    /// With which PASID.
    pub pasid: Option<Pasid>,
    /// At which address.
    pub iova: Iova,
    /// What is asked.
    pub access: Access,
    /// Bytes, at most 4096; 0 is a zero-length read.
    pub size_bytes: u32,
}

fn client(channel: Channel) -> InspectServiceClient<Channel> {
    InspectServiceClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX)
}

impl Inspect {
    pub(crate) fn new(core: Arc<Core>) -> Self {
        Self { core }
    }

    /// Server, memory, owners, devices, sessions.
    pub async fn topology(&self) -> Result<Topology, SdkError<Never>> {
        let answer = self
            .core
            .unary(pb::GetTopologyRequest {}, |channel, request| async move {
                client(channel).get_topology(request).await
            })
            .await?;
        Ok(answer.try_into().map_err(bad_answer)?)
    }

    /// What each owner uses of its limits, and how often each limit refused it; of one owner, or of all that the caller may see.
    pub async fn limits(&self, owner: Option<Owner>) -> Result<Vec<LimitsOfOwner>, SdkError<InspectError>> {
        let message: pb::ListLimitsRequest = model::ListLimits { owner }.into();
        let answer = self
            .core
            .unary(message, |channel, request| async move { client(channel).list_limits(request).await })
            .await?;
        Ok(model::LimitsList::try_from(answer).map_err(bad_answer)?.owners)
    }

    /// Domains with their counters; of one owner, or of all that the caller may see.
    pub async fn domains(&self, owner: Option<Owner>) -> Result<Vec<DomainState>, SdkError<InspectError>> {
        let message: pb::ListDomainsRequest = model::ListDomains { owner }.into();
        let answer = self
            .core
            .unary(message, |channel, request| async move { client(channel).list_domains(request).await })
            .await?;
        Ok(model::Domains::try_from(answer).map_err(bad_answer)?.domains)
    }

    /// Mappings of a domain that end above `from`, in the order of their addresses; at most `limit` (0: as
    /// many as fit one message). Of those that begin at `from` itself, the first `skip` are left out. `next_iova` and `next_skip` say
    /// where to go on.
    pub async fn mappings(
        &self,
        domain_id: DomainId,
        from: Iova,
        skip: u32,
        limit: u32,
    ) -> Result<Mappings, SdkError<InspectError>> {
        let message: pb::ListMappingsRequest =
            model::ListMappings { domain_id, from_iova: from, skip, limit }.into();
        let answer = self
            .core
            .unary(message, |channel, request| async move { client(channel).list_mappings(request).await })
            .await?;
        Ok(answer.try_into().map_err(bad_answer)?)
    }

    /// Every present table entry of a device, root first, raw and in words; without its page tables if so
    /// asked.
    pub async fn dump_tables(
        &self,
        device: DeviceAddress,
        without_page_tables: bool,
    ) -> Result<Vec<WalkStep>, SdkError<InspectError>> {
        // Looking changes nothing, so a dump that was cut off is begun again, once.
        match self.dump_tables_once(device, without_page_tables).await {
            Err(Cut::Lost) => {}
            Err(Cut::Failed(error)) => return Err(error),
            Ok(entries) => return Ok(entries),
        }
        self.dump_tables_once(device, without_page_tables).await.map_err(|cut| match cut {
            Cut::Lost => bad_answer("the dump was cut off twice").into(),
            Cut::Failed(error) => error,
        })
    }

    async fn dump_tables_once(
        &self,
        device: DeviceAddress,
        without_page_tables: bool,
    ) -> Result<Vec<WalkStep>, Cut> {
        let message: pb::DumpTablesRequest = model::DumpTables { device, without_page_tables }.into();
        let mut pieces = self
            .core
            .call(|channel| async move { client(channel).dump_tables(message).await })
            .await
            .map_err(Cut::Failed)?;
        let mut entries = Vec::new();
        loop {
            match pieces.message().await {
                Ok(Some(piece)) => {
                    let piece = model::DumpedTables::try_from(piece);
                    entries.extend(piece.map_err(|error| Cut::Failed(bad_answer(error).into()))?.entries);
                }
                Ok(None) => return Ok(entries),
                Err(status) if may_retry(&status) => return Err(Cut::Lost),
                Err(status) => return Err(Cut::Failed(of_status(&status))),
            }
        }
    }

    /// Content of the IOTLB, of one domain or all; at most `limit` entries (0: as many as fit one message).
    pub async fn iotlb(
        &self,
        domain_id: Option<DomainId>,
        limit: u32,
    ) -> Result<DumpedIotlb, SdkError<InspectError>> {
        let message: pb::DumpIotlbRequest = model::DumpIotlb { domain_id, limit }.into();
        let answer = self
            .core
            .unary(message, |channel, request| async move { client(channel).dump_iotlb(request).await })
            .await?;
        Ok(answer.try_into().map_err(bad_answer)?)
    }

    /// Counters of the managed unit, or of the unit of the bare machine at a segment (for its creator).
    pub async fn counters(&self, segment: Option<u16>) -> Result<Counters, SdkError<InspectError>> {
        let message: pb::GetCountersRequest = model::GetCounters { segment }.into();
        let answer = self
            .core
            .unary(message, |channel, request| async move { client(channel).get_counters(request).await })
            .await?;
        Ok(answer.try_into().map_err(bad_answer)?)
    }

    /// What would happen to one access, and why, step by step. Changes nothing and records no fault.
    pub async fn explain(&self, access: AccessQuestion) -> Result<Explanation, SdkError<InspectError>> {
        let AccessQuestion { device, pasid, iova, access, size_bytes } = access;
        let message: pb::ExplainRequest = model::Explain { device, pasid, iova, access, size_bytes }.into();
        let answer = self
            .core
            .unary(message, |channel, request| async move { client(channel).explain(request).await })
            .await?;
        Ok(model::Explained::try_from(answer).map_err(bad_answer)?.explanation)
    }
}

/// Why a dump has no end.
enum Cut {
    Lost,
    Failed(SdkError<InspectError>),
}
