//! `SessionService`: who a peer is.

use std::sync::Arc;

use iommu_proto::errors::WireError;
use iommu_proto::model::{self, Limits};
use iommu_proto::pb::session_service_server::SessionService;
use iommu_proto::{limits, pb};
use iommu_types::Generation;
use iommu_types::errors::VersionMismatch;
use tonic::{Request, Response, Status};

use super::{internal, parse};
use crate::bounds;
use crate::connection::ConnectionHandle;
use crate::host::Host;
use crate::session::open::{Opened, open};
use crate::telemetry::warn_limited;

/// The service.
#[derive(Clone, Debug)]
pub struct Sessions {
    /// The host.
    pub host: Arc<Host>,
}

impl Sessions {
    async fn open_session(
        &self,
        connection: &ConnectionHandle,
        request: pb::OpenRequest,
    ) -> Result<Opened, Status> {
        // Before anything else is read: what a peer of another version means by its fields is not known.
        if request.schema_version != limits::SCHEMA_VERSION {
            let (server, peer) = (limits::SCHEMA_VERSION, request.schema_version);
            return Err(VersionMismatch { server, peer }.into_status());
        }
        open(&self.host, connection, parse(request)?).await
    }
}

/// The connection of a request.
pub(crate) fn connection<T>(request: &Request<T>) -> Result<ConnectionHandle, Status> {
    let connection = request.extensions().get::<ConnectionHandle>().cloned();
    connection.ok_or_else(|| internal("a request came over no connection"))
}

#[tonic::async_trait]
impl SessionService for Sessions {
    async fn open(&self, request: Request<pb::OpenRequest>) -> Result<Response<pb::OpenResponse>, Status> {
        let connection = connection(&request)?;
        let opened = self.open_session(&connection, request.into_inner()).await.inspect_err(|status| {
            warn_limited!(peer = %connection.peer(), reason = status.message(), "session refused");
        })?;
        let answer = model::Opened {
            schema_version: limits::SCHEMA_VERSION,
            generation: Generation(opened.session.generation),
            resume_token: opened.token,
            resumed: opened.resumed,
            grace_ms: self.host.config.grace.as_millis() as u64,
            limits: Limits {
                message_bytes_max: limits::MESSAGE_BYTES_MAX as u32,
                batch_operations_max: bounds::BATCH.operations_max,
                batch_bytes_max: bounds::BATCH.bytes_max,
                request_window: bounds::REQUEST_WINDOW as u32,
            },
        };
        Ok(Response::new(answer.into()))
    }
}
