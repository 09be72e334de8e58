//! The server put together: services, layers, transport, and what runs beside them.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use iommu_proto::framing::framing_layer;
use iommu_proto::pb::admin_service_server::AdminServiceServer;
use iommu_proto::pb::bare_machine_service_server::BareMachineServiceServer;
use iommu_proto::pb::device_service_server::DeviceServiceServer;
use iommu_proto::pb::driver_service_server::DriverServiceServer;
use iommu_proto::pb::fault_service_server::FaultServiceServer;
use iommu_proto::pb::hypervisor_service_server::HypervisorServiceServer;
use iommu_proto::pb::inspect_service_server::InspectServiceServer;
use iommu_proto::pb::memory_service_server::MemoryServiceServer;
use iommu_proto::pb::sanitizer_service_server::SanitizerServiceServer;
use iommu_proto::pb::session_service_server::SessionServiceServer;
use iommu_proto::{DESCRIPTOR, limits};
use prost::Message;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::service::Routes;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use crate::bounds;
use crate::config::Config;
use crate::connection::Connection;
use crate::host::faults::collect_regularly;
use crate::host::trim::trim_regularly;
use crate::host::{Host, StartError};
use crate::layers::gate::GateLayer;
use crate::layers::limits::LimitLayer;
use crate::layers::observe::ObserveLayer;
use crate::listen::{BindError, Entrance, Listeners, UnixUsers};
use crate::services::admin::Admin;
use crate::services::bare::BareMachines;
use crate::services::device::DeviceSessions;
use crate::services::driver::Drivers;
use crate::services::fault::Faults;
use crate::services::hypervisor::HypervisorCalls;
use crate::services::inspect::Inspect;
use crate::services::memory::Memory;
use crate::services::sanitizer::Sanitizers;
use crate::services::session::Sessions;

/// The services of the schema.
pub const SERVICES: [&str; 10] = [
    "iommu.v1.SessionService",
    "iommu.v1.DeviceService",
    "iommu.v1.DriverService",
    "iommu.v1.HypervisorService",
    "iommu.v1.BareMachineService",
    "iommu.v1.MemoryService",
    "iommu.v1.FaultService",
    "iommu.v1.SanitizerService",
    "iommu.v1.InspectService",
    "iommu.v1.AdminService",
];

/// Service and name of every method of the schema, and of health checks.
pub fn methods() -> &'static [(String, String)] {
    static METHODS: OnceLock<Vec<(String, String)>> = OnceLock::new();
    METHODS.get_or_init(|| {
        let schema = prost_types::FileDescriptorSet::decode(DESCRIPTOR);
        let schema = schema.expect("the checked-in descriptor decodes; a test of iommu-proto holds it fresh");
        let mut methods = Vec::new();
        for file in &schema.file {
            for service in &file.service {
                let name = format!("{}.{}", file.package(), service.name());
                methods.extend(service.method.iter().map(|method| (name.clone(), method.name().to_owned())));
            }
        }
        for method in ["Check", "Watch"] {
            methods.push(("grpc.health.v1.Health".to_owned(), method.to_owned()));
        }
        methods
    })
}

/// Why the server did not come up.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// An address.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The host.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The thread for handshakes.
    #[error("no thread for handshakes: {0}")]
    Handshakes(io::Error),
    /// The reflection service does not take our schema.
    #[error("reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
}

/// A server that runs.
#[derive(Debug)]
pub struct Server {
    /// The host.
    pub host: Arc<Host>,
    /// TCP addresses as they came out.
    pub listen: Vec<SocketAddr>,
    /// UNIX sockets.
    pub unix: Vec<PathBuf>,
    pub(crate) health: HealthReporter,
    pub(crate) transport: JoinHandle<Result<(), tonic::transport::Error>>,
    pub(crate) background: Vec<JoinHandle<()>>,
}

macro_rules! sized {
    ($service:expr) => {
        $service
            .max_decoding_message_size(limits::MESSAGE_BYTES_MAX)
            .max_encoding_message_size(limits::MESSAGE_BYTES_MAX)
    };
}

fn routes(host: &Arc<Host>) -> Result<(Routes, HealthReporter), ServerError> {
    let (health, health_service) = tonic_health::server::health_reporter();
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(DESCRIPTOR)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let shared = || Arc::clone(host);
    let routes = Routes::new(health_service)
        .add_service(reflection().build_v1()?)
        .add_service(reflection().build_v1alpha()?)
        .add_service(sized!(SessionServiceServer::new(Sessions { host: shared() })))
        .add_service(sized!(DeviceServiceServer::new(DeviceSessions { host: shared() })))
        .add_service(sized!(DriverServiceServer::new(Drivers { host: shared() })))
        .add_service(sized!(HypervisorServiceServer::new(HypervisorCalls { host: shared() })))
        .add_service(sized!(BareMachineServiceServer::new(BareMachines { host: shared() })))
        .add_service(sized!(MemoryServiceServer::new(Memory { host: shared() })))
        .add_service(sized!(FaultServiceServer::new(Faults { host: shared() })))
        .add_service(sized!(SanitizerServiceServer::new(Sanitizers { host: shared() })))
        .add_service(sized!(InspectServiceServer::new(Inspect { host: shared() })))
        .add_service(sized!(AdminServiceServer::new(Admin { host: shared() })));
    Ok((routes.prepare(), health))
}

/// HTTP/2 as this server speaks it: windows, frames, keepalive and what a peer may do. The echo of the measurements speaks it too.
pub fn transport(keepalive: Duration) -> tonic::transport::Server {
    tonic::transport::Server::builder()
        .initial_stream_window_size(bounds::STREAM_WINDOW_BYTES)
        .initial_connection_window_size(bounds::CONNECTION_WINDOW_BYTES)
        .max_frame_size(bounds::FRAME_BYTES_MAX)
        .max_concurrent_streams(bounds::STREAMS_PER_CONNECTION_MAX)
        .http2_max_header_list_size(bounds::HEADER_BYTES_MAX)
        .http2_keepalive_interval(Some(keepalive))
        .http2_keepalive_timeout(Some(keepalive))
        .http2_max_pending_accept_reset_streams(Some(bounds::PENDING_RESETS_MAX))
        .http2_max_local_error_reset_streams(Some(bounds::LOCAL_RESETS_MAX))
}

/// Serves until the shutdown signal and the last connection.
async fn serve(
    host: Arc<Host>,
    routes: Routes,
    connections: ReceiverStream<io::Result<Connection>>,
) -> Result<(), tonic::transport::Error> {
    let shutdown = host.shutdown.wait_owned();
    let observe = ObserveLayer { metrics: Arc::clone(&host.metrics) };
    transport(host.config.keepalive)
        .layer(observe)
        .layer(LimitLayer::default())
        .layer(framing_layer())
        .layer(GateLayer { host })
        .add_routes(routes)
        .serve_with_incoming_shutdown(connections, async move {
            shutdown.await;
        })
        .await
}

impl Server {
    /// Binds, starts the host, and serves.
    pub async fn start(config: Config) -> Result<Self, ServerError> {
        let listeners = Listeners::bind(&config).await?;
        let host = Host::start(config).await?;
        Self::serve(host, listeners).await
    }

    /// Serves a host on sockets that are bound.
    pub async fn serve(host: Arc<Host>, listeners: Listeners) -> Result<Self, ServerError> {
        let (routes, health) = routes(&host)?;
        for service in SERVICES {
            health.set_service_status(service, ServingStatus::Serving).await;
        }
        let (listen, unix) = (listeners.tcp_addresses(), listeners.unix_paths());
        let entrance = Entrance {
            tls: host.tls.clone(),
            users: UnixUsers::with(&host.config.unix_uids),
            metrics: Arc::clone(&host.metrics),
        };
        let connections = listeners
            .accept(&host.connections, &host.shutdown, &entrance)
            .map_err(ServerError::Handshakes)?;
        let transport = tokio::spawn(serve(Arc::clone(&host), routes, connections));
        let mut background = vec![
            tokio::spawn(Arc::clone(&host.watchdog).run()),
            tokio::spawn(collect_regularly(Arc::clone(&host))),
            tokio::spawn(trim_regularly(Arc::clone(&host))),
        ];
        background.extend(
            host.tls.clone().map(|tls| tokio::spawn(crate::tls::reload::run(Arc::clone(&host), tls))),
        );
        Ok(Self { host, listen, unix, health, transport, background })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_of_services_is_that_of_the_schema() {
        let mut named: Vec<&str> = methods()
            .iter()
            .map(|(service, _)| service.as_str())
            .filter(|service| service.starts_with("iommu."))
            .collect();
        named.dedup();
        named.sort_unstable();
        let mut listed = SERVICES;
        listed.sort_unstable();
        assert_eq!(named, listed);
    }
}
