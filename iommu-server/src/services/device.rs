//! `DeviceService`: the stream of a device.

use std::sync::Arc;

use iommu_proto::pb;
use iommu_proto::pb::device_service_server::DeviceService;
use tonic::{Request, Response, Status, Streaming};

use super::session::connection;
use crate::host::Host;
use crate::session::DeviceStream;

/// The service.
#[derive(Clone, Debug)]
pub struct DeviceSessions {
    /// The host.
    pub host: Arc<Host>,
}

#[tonic::async_trait]
impl DeviceService for DeviceSessions {
    type AttachStream = DeviceStream;

    async fn attach(
        &self,
        request: Request<Streaming<pb::DeviceToServer>>,
    ) -> Result<Response<DeviceStream>, Status> {
        let connection = connection(&request)?;
        Ok(Response::new(DeviceStream::new(Arc::clone(&self.host), connection, request.into_inner())))
    }
}
