//! The part of the scripted server that those who look call.

use iommu_proto::pb;
use tonic::{Request, Response, Status};

use super::{Fake, Replies};

macro_rules! inspect_service {
    ($($method:ident: $request:ident => $response:ident;)*) => {
        #[tonic::async_trait]
        impl pb::inspect_service_server::InspectService for Fake {
            $(async fn $method(&self, request: Request<pb::$request>) -> Result<Response<pb::$response>, Status> {
                self.enter(stringify!($method), &request, None)?;
                self.scripted(stringify!($method))
            })*

            type DumpTablesStream = Replies<pb::DumpTablesResponse>;
            async fn dump_tables(
                &self,
                _: Request<pb::DumpTablesRequest>,
            ) -> Result<Response<Self::DumpTablesStream>, Status> {
                Err(Status::unimplemented("not scripted"))
            }
        }
    };
}

inspect_service! {
    get_topology: GetTopologyRequest => GetTopologyResponse;
    list_domains: ListDomainsRequest => ListDomainsResponse;
    list_mappings: ListMappingsRequest => ListMappingsResponse;
    dump_iotlb: DumpIotlbRequest => DumpIotlbResponse;
    get_counters: GetCountersRequest => GetCountersResponse;
    list_limits: ListLimitsRequest => ListLimitsResponse;
    explain: ExplainRequest => ExplainResponse;
}
