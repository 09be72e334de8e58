//! A real server on loopback, and raw clients made from the schema alone.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses its part of the support")]

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use iommu_proto::errors::reason_of;
use iommu_proto::pb;
use iommu_proto::pb::admin_service_client::AdminServiceClient;
use iommu_proto::pb::bare_machine_service_client::BareMachineServiceClient;
use iommu_proto::pb::device_service_client::DeviceServiceClient;
use iommu_proto::pb::driver_service_client::DriverServiceClient;
use iommu_proto::pb::fault_service_client::FaultServiceClient;
use iommu_proto::pb::hypervisor_service_client::HypervisorServiceClient;
use iommu_proto::pb::inspect_service_client::InspectServiceClient;
use iommu_proto::pb::memory_service_client::MemoryServiceClient;
use iommu_proto::pb::sanitizer_service_client::SanitizerServiceClient;
use iommu_proto::pb::session_service_client::SessionServiceClient;
use iommu_server::cli::ServeArgs;
use iommu_server::config::Config;
use iommu_server::server::Server;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Status, Streaming};

pub const PAGE: u64 = 4096;
/// Long enough for anything that should happen, short enough for a test that fails.
pub const SOON: Duration = Duration::from_secs(10);

pub fn config(change: impl FnOnce(&mut ServeArgs)) -> Config {
    let mut args = ServeArgs {
        insecure_plaintext: true,
        listen: vec!["127.0.0.1:0".parse().unwrap()],
        memory: Some("64MiB".to_owned()),
        grace: Some("200ms".to_owned()),
        admin: Some("off".to_owned()),
        ..ServeArgs::default()
    };
    change(&mut args);
    Config::from_args(args).unwrap()
}

pub async fn server() -> Server {
    server_with(|_| {}).await
}

pub async fn server_with(change: impl FnOnce(&mut ServeArgs)) -> Server {
    Server::start(config(change)).await.unwrap()
}

/// A connection of its own.
pub async fn connect(server: &Server) -> Channel {
    let address = server.listen[0];
    Endpoint::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap()
}

pub fn device(source: u32) -> pb::DeviceAddress {
    pb::DeviceAddress { segment: 0, source_id: source }
}
/// 00:01.0, of driver:0.
pub const ENGINE0: u32 = 0x08;
/// 00:02.0, of driver:1.
pub const ENGINE1: u32 = 0x10;
/// 00:03.0, of nobody.
pub const ENGINE2: u32 = 0x18;

/// A mode with what is usual beside it.
pub fn mode(protection: pb::Protection) -> pb::DomainOptions {
    pb::DomainOptions { protection: protection.into(), ..Default::default() }
}
pub fn deferred(batch: u32, interval_ms: u32) -> pb::DomainOptions {
    let parameters = pb::domain_options::Parameters::Deferred(pb::Deferral { batch, interval_ms });
    pb::DomainOptions { parameters: Some(parameters), ..mode(pb::Protection::Deferred) }
}

pub fn owner(number: u32) -> pb::Owner {
    pb::Owner { kind: Some(pb::owner::Kind::Driver(number)) }
}

pub fn reason(status: &Status) -> String {
    reason_of(status).unwrap_or_else(|| panic!("no typed error: {status:?}"))
}

pub fn refused<T: std::fmt::Debug>(result: Result<T, Status>) -> String {
    reason(&result.expect_err("must be refused"))
}

/// Tries until it holds.
pub async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let tried = async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(tokio::time::timeout(SOON, tried).await.is_ok(), "{what}");
}

pub fn open_request(name: &str, role: pb::open_request::Role) -> pb::OpenRequest {
    pb::OpenRequest {
        schema_version: 1,
        name: name.to_owned(),
        role: Some(role),
        resume_token: bytes::Bytes::new(),
    }
}

pub async fn open(channel: &Channel, request: pb::OpenRequest) -> Result<pb::OpenResponse, Status> {
    SessionServiceClient::new(channel.clone()).open(request).await.map(tonic::Response::into_inner)
}

pub fn driver_role(number: u32) -> pb::open_request::Role {
    pb::open_request::Role::Driver(pb::DriverRole { owner: Some(owner(number)) })
}

/// A driver with its session.
pub struct Driver {
    pub channel: Channel,
    pub client: DriverServiceClient<Channel>,
    pub opened: pb::OpenResponse,
    next: AtomicU64,
}

impl Driver {
    pub async fn open(server: &Server, number: u32) -> Self {
        let channel = connect(server).await;
        let request = open_request(&format!("driver{number}"), driver_role(number));
        let opened = open(&channel, request).await.unwrap();
        Self::on(channel, opened)
    }
    pub fn on(channel: Channel, opened: pb::OpenResponse) -> Self {
        let client = DriverServiceClient::new(channel.clone());
        Self { channel, client, opened, next: AtomicU64::new(1) }
    }
    pub fn header(&self) -> Option<pb::RequestHeader> {
        let request_id = self.next.fetch_add(1, Ordering::Relaxed);
        Some(pb::RequestHeader { request_id, acknowledged_through: 0 })
    }
    pub fn client(&self) -> DriverServiceClient<Channel> {
        self.client.clone()
    }
    pub fn memory(&self) -> MemoryServiceClient<Channel> {
        MemoryServiceClient::new(self.channel.clone())
    }
    pub async fn buffer(&self, size_bytes: u64) -> u64 {
        let request = pb::AllocateBufferRequest { header: self.header(), size_bytes };
        self.client().allocate_buffer(request).await.unwrap().into_inner().gpa
    }
    pub async fn map(&self, source: u32, gpa: u64, size_bytes: u64) -> Result<u64, Status> {
        let request = pb::DmaMapRequest { device: Some(device(source)), ..self.map_request(gpa, size_bytes) };
        self.dma_map(request).await
    }
    pub async fn unmap(&self, source: u32, iova: u64, size_bytes: u64) -> Result<(), Status> {
        let request =
            pb::DmaUnmapRequest { device: Some(device(source)), ..self.unmap_request(iova, size_bytes) };
        self.dma_unmap(request).await
    }
    /// For engine 0, both ways.
    pub fn map_request(&self, gpa: u64, size_bytes: u64) -> pb::DmaMapRequest {
        let (header, device) = (self.header(), Some(device(ENGINE0)));
        let direction = pb::Direction::Bidirectional.into();
        pb::DmaMapRequest { header, device, gpa, size_bytes, direction, attributes: None, ring: 0 }
    }
    pub async fn dma_map(&self, request: pb::DmaMapRequest) -> Result<u64, Status> {
        self.client().dma_map(request).await.map(|mapped| mapped.into_inner().iova)
    }
    /// For engine 0, both ways.
    pub fn unmap_request(&self, iova: u64, size_bytes: u64) -> pb::DmaUnmapRequest {
        let (header, device) = (self.header(), Some(device(ENGINE0)));
        let direction = pb::Direction::Bidirectional.into();
        let (attributes, end_of_burst) = (None, None);
        pb::DmaUnmapRequest { header, device, iova, size_bytes, direction, attributes, end_of_burst }
    }
    pub async fn dma_unmap(&self, request: pb::DmaUnmapRequest) -> Result<(), Status> {
        self.client().dma_unmap(request).await.map(|_| ())
    }
    /// Several pieces for engine 0, both ways: address and size of each segment.
    pub async fn map_sg(&self, pieces: &[(u64, u64)]) -> Result<Vec<(u64, u64)>, Status> {
        let request = pb::DmaMapSgRequest {
            header: self.header(),
            device: Some(device(ENGINE0)),
            gpa: pieces.iter().map(|piece| piece.0).collect(),
            size_bytes: pieces.iter().map(|piece| piece.1).collect(),
            direction: pb::Direction::Bidirectional.into(),
            attributes: None,
            ring: 0,
        };
        let mapped = self.client().dma_map_sg(request).await?.into_inner();
        Ok(mapped.iova.into_iter().zip(mapped.size_bytes).collect())
    }
    pub async fn unmap_sg(&self, iova: u64, elements: u32) -> Result<(), Status> {
        let request = pb::DmaUnmapSgRequest {
            header: self.header(),
            device: Some(device(ENGINE0)),
            iova,
            elements,
            direction: pb::Direction::Bidirectional.into(),
            attributes: None,
            end_of_burst: None,
        };
        self.client().dma_unmap_sg(request).await.map(|_| ())
    }
    pub async fn sync(&self, iova: u64, size_bytes: u64, sync_for: pb::SyncFor) -> Result<(), Status> {
        let request = pb::DmaSyncRequest {
            header: self.header(),
            device: Some(device(ENGINE0)),
            iova,
            size_bytes,
            direction: pb::Direction::Bidirectional.into(),
            sync_for: sync_for.into(),
        };
        self.client().dma_sync(request).await.map(|_| ())
    }
    /// Limits of engine 0: address bits, and bytes of a segment.
    pub async fn limit(
        &self,
        mask_bits: Option<u32>,
        segment_bytes_max: Option<u64>,
    ) -> Result<pb::SetDmaLimitsResponse, Status> {
        let (header, device) = (self.header(), Some(device(ENGINE0)));
        let segment_boundary_mask = None;
        let request =
            pb::SetDmaLimitsRequest { header, device, mask_bits, segment_bytes_max, segment_boundary_mask };
        self.client().set_dma_limits(request).await.map(tonic::Response::into_inner)
    }
    pub async fn coherent(&self, size_bytes: u64) -> Result<pb::AllocateCoherentResponse, Status> {
        let (header, device) = (self.header(), Some(device(ENGINE0)));
        let request = pb::AllocateCoherentRequest { header, device, size_bytes };
        self.client().allocate_coherent(request).await.map(tonic::Response::into_inner)
    }
    pub async fn free_coherent(&self, memory: pb::AllocateCoherentResponse) -> Result<(), Status> {
        let (header, device) = (self.header(), Some(device(ENGINE0)));
        let pb::AllocateCoherentResponse { gpa, iova, .. } = memory;
        let request = pb::FreeCoherentRequest { header, device, gpa, iova };
        self.client().free_coherent(request).await.map(|_| ())
    }
    /// A domain to which engine 0 is attached.
    pub async fn domain(&self, options: pb::DomainOptions) -> u32 {
        let id = self.create_domain(options).await.unwrap();
        self.attach(ENGINE0, Some(id)).await.unwrap();
        id
    }
    pub async fn domain_state(&self, id: u32) -> pb::DomainState {
        let list = inspect(&self.channel).list_domains(pb::ListDomainsRequest { owner: None }).await;
        let domains = list.unwrap().into_inner().domains;
        domains.into_iter().find(|state| state.domain_id == id).unwrap()
    }
    pub async fn free(&self, gpa: u64) -> Result<(), Status> {
        let request = pb::FreeBufferRequest { header: self.header(), gpa };
        self.client().free_buffer(request).await.map(|_| ())
    }
    pub async fn create_domain(&self, options: pb::DomainOptions) -> Result<u32, Status> {
        let request = pb::CreateDomainRequest { header: self.header(), options: Some(options) };
        self.client().create_domain(request).await.map(|created| created.into_inner().domain_id)
    }
    pub async fn destroy(&self, domain_id: u32) -> Result<(), Status> {
        let request = pb::DestroyDomainRequest { header: self.header(), domain_id };
        self.client().destroy_domain(request).await.map(|_| ())
    }
    pub async fn attach(&self, source: u32, domain_id: Option<u32>) -> Result<u32, Status> {
        let request =
            pb::AttachDeviceRequest { header: self.header(), device: Some(device(source)), domain_id };
        self.client().attach_device(request).await.map(|attached| attached.into_inner().domain_id)
    }
    pub async fn detach(&self, source: u32) -> Result<(), Status> {
        let request = pb::DetachDeviceRequest { header: self.header(), device: Some(device(source)) };
        self.client().detach_device(request).await.map(|_| ())
    }
    pub async fn write(&self, gpa: u64, data: &[u8]) {
        let data = bytes::Bytes::copy_from_slice(data);
        let request = pb::MemoryWriteRequest { owner: None, gpa, data };
        self.memory().write(request).await.unwrap();
    }
    pub async fn read(&self, gpa: u64, size_bytes: u64) -> bytes::Bytes {
        let request = pb::MemoryReadRequest { owner: None, gpa, size_bytes };
        self.memory().read(request).await.unwrap().into_inner().data
    }
}

pub async fn session(server: &Server, name: &str, role: pb::open_request::Role) -> Channel {
    let channel = connect(server).await;
    open(&channel, open_request(name, role)).await.unwrap();
    channel
}
pub async fn operator(server: &Server) -> Channel {
    session(server, "operator", pb::open_request::Role::Operator(pb::OperatorRole {})).await
}
pub async fn observer(server: &Server) -> Channel {
    session(server, "observer", pb::open_request::Role::Observer(pb::ObserverRole {})).await
}
pub async fn bare(server: &Server, name: &str) -> BareMachineServiceClient<Channel> {
    let channel = session(server, name, pb::open_request::Role::Bare(pb::BareRole {})).await;
    BareMachineServiceClient::new(channel)
}
/// A hypervisor with its session.
pub struct Hypervisor {
    pub channel: Channel,
    next: AtomicU64,
}

impl Hypervisor {
    pub async fn open(server: &Server, name: &str) -> Self {
        let role = pb::open_request::Role::Hypervisor(pb::HypervisorRole {});
        Self { channel: session(server, name, role).await, next: AtomicU64::new(1) }
    }
    pub fn client(&self) -> HypervisorServiceClient<Channel> {
        HypervisorServiceClient::new(self.channel.clone())
    }
    pub fn header(&self) -> Option<pb::RequestHeader> {
        let request_id = self.next.fetch_add(1, Ordering::Relaxed);
        Some(pb::RequestHeader { request_id, acknowledged_through: 0 })
    }
    pub async fn create(&self, name: &str, number: Option<u32>) -> Result<u32, Status> {
        self.create_with(name, number, None).await
    }
    pub async fn create_with(
        &self,
        name: &str,
        number: Option<u32>,
        limits: Option<pb::TenantLimits>,
    ) -> Result<u32, Status> {
        let request = pb::CreateVmRequest { header: self.header(), name: name.to_owned(), number, limits };
        self.client().create_vm(request).await.map(|created| created.into_inner().number)
    }
    pub async fn destroy(&self, vm: u32) -> Result<(), Status> {
        self.client().destroy_vm(pb::DestroyVmRequest { header: self.header(), vm }).await.map(drop)
    }
    pub async fn vms(&self) -> Vec<pb::VmState> {
        self.client().list_vms(pb::ListVmsRequest {}).await.unwrap().into_inner().vms
    }
    pub async fn add(&self, vm: u32, gpa: u64, pages: u64) -> Result<(), Status> {
        let request = pb::AddMemoryRequest { header: self.header(), vm, gpa, size_bytes: pages * PAGE };
        self.client().add_memory(request).await.map(drop)
    }
    pub async fn remove(&self, vm: u32, gpa: u64, pages: u64, how: pb::Revocation) -> Result<u64, Status> {
        let wait_ms = if how == pb::Revocation::Wait { 5_000 } else { 0 };
        let request = pb::RemoveMemoryRequest {
            header: self.header(),
            vm,
            gpa,
            size_bytes: pages * PAGE,
            how: how.into(),
            wait_ms,
        };
        self.client().remove_memory(request).await.map(|removed| removed.into_inner().revoked_mappings)
    }
    /// Moves pages to the same address of another virtual machine.
    pub async fn hand_over(&self, from_vm: u32, to_vm: u32, gpa: u64, pages: u64) -> Result<u64, Status> {
        let request = pb::MoveMemoryRequest {
            header: self.header(),
            from_vm,
            from_gpa: gpa,
            size_bytes: pages * PAGE,
            to_vm,
            to_gpa: gpa,
            how: pb::Revocation::Revoke.into(),
            wait_ms: 0,
        };
        self.client().move_memory(request).await.map(|moved| moved.into_inner().revoked_mappings)
    }
    pub async fn assign(&self, source: u32, vm: u32) -> Result<Vec<pb::DeviceAddress>, Status> {
        let request = pb::AssignGroupRequest { header: self.header(), device: Some(device(source)), vm };
        self.client().assign_group(request).await.map(|assigned| assigned.into_inner().functions)
    }
    pub async fn release(&self, source: u32) -> Result<(), Status> {
        let request = pb::ReleaseGroupRequest { header: self.header(), device: Some(device(source)) };
        self.client().release_group(request).await.map(drop)
    }
    pub async fn declare(&self, source: u32, name: &str, function: pb::PciFunction) -> Result<(), Status> {
        let request = pb::DeclareFunctionRequest {
            header: self.header(),
            device: Some(device(source)),
            name: name.to_owned(),
            function: Some(function),
        };
        self.client().declare_function(request).await.map(drop)
    }
    pub async fn functions(&self) -> Vec<pb::FunctionState> {
        self.client().list_functions(pb::ListFunctionsRequest {}).await.unwrap().into_inner().functions
    }
    pub async fn read(&self, vm: u32, gpa: u64, size_bytes: u64) -> Result<bytes::Bytes, Status> {
        let owner = Some(vm_owner(vm));
        let request = pb::MemoryReadRequest { owner, gpa, size_bytes };
        MemoryServiceClient::new(self.channel.clone()).read(request).await.map(|read| read.into_inner().data)
    }
    /// The driver of one of its virtual machines.
    pub async fn guest(&self, server: &Server, vm: u32, name: &str) -> Driver {
        let channel = connect(server).await;
        let role = pb::open_request::Role::Driver(pb::DriverRole { owner: Some(vm_owner(vm)) });
        let opened = open(&channel, open_request(name, role)).await.unwrap();
        Driver::on(channel, opened)
    }
}

pub fn vm_owner(number: u32) -> pb::Owner {
    pb::Owner { kind: Some(pb::owner::Kind::Vm(number)) }
}

pub fn admin(channel: &Channel) -> AdminServiceClient<Channel> {
    AdminServiceClient::new(channel.clone())
}
pub fn inspect(channel: &Channel) -> InspectServiceClient<Channel> {
    InspectServiceClient::new(channel.clone())
}
pub fn reports(channel: &Channel) -> SanitizerServiceClient<Channel> {
    SanitizerServiceClient::new(channel.clone())
}
pub fn faults(channel: &Channel) -> FaultServiceClient<Channel> {
    FaultServiceClient::new(channel.clone())
}

/// An agent that speaks raw messages.
pub struct Agent {
    pub up: mpsc::Sender<pb::DeviceToServer>,
    pub down: Streaming<pb::ServerToDevice>,
    pub next_tag: u64,
    pub channel: Channel,
}

pub type Up = pb::device_to_server::Message;
pub type Down = pb::server_to_device::Message;

pub fn hello(address: pb::DeviceAddress, name: &str) -> pb::Hello {
    pb::Hello { schema_version: 1, name: name.to_owned(), address: Some(address), mmio_credits: 16 }
}

impl Agent {
    /// A stream on which nothing was said yet.
    pub async fn silent_on(channel: Channel) -> Self {
        let (up, messages) = mpsc::channel(64);
        let down = DeviceServiceClient::new(channel.clone())
            .max_decoding_message_size(8 << 20)
            .attach(ReceiverStream::new(messages))
            .await
            .unwrap()
            .into_inner();
        Self { up, down, next_tag: 0, channel }
    }
    pub async fn silent(server: &Server) -> Self {
        Self::silent_on(connect(server).await).await
    }
    /// Says Hello and gives what came back.
    pub async fn greet(&mut self, hello: pb::Hello) -> Result<pb::Welcome, Status> {
        self.send(Up::Hello(hello)).await;
        match self.receive().await? {
            Down::Welcome(welcome) => Ok(welcome),
            other => panic!("no Welcome: {other:?}"),
        }
    }
    pub async fn attach(server: &Server, source: u32) -> Self {
        Self::attach_at(server, device(source), &format!("engine{}", (source >> 3) - 1)).await
    }
    pub async fn attach_at(server: &Server, address: pb::DeviceAddress, name: &str) -> Self {
        let mut agent = Self::silent(server).await;
        agent.greet(hello(address, name)).await.unwrap();
        agent
    }
    pub async fn send(&self, message: Up) {
        // A stream that the server ended takes nothing; what it says comes from `receive`.
        let _ended = self.up.send(pb::DeviceToServer { message: Some(message) }).await;
    }
    pub async fn receive(&mut self) -> Result<Down, Status> {
        let message = tokio::time::timeout(SOON, self.down.message()).await.expect("nothing came")?;
        Ok(message.expect("the stream ended").message.expect("a message without content"))
    }
    /// Until the stream ends with a status.
    pub async fn ending(&mut self) -> String {
        loop {
            match tokio::time::timeout(SOON, self.down.message()).await.expect("the stream does not end") {
                Ok(Some(_)) => {}
                Ok(None) => panic!("the stream ended without a status"),
                Err(status) => return reason(&status),
            }
        }
    }
    pub async fn batch(&mut self, batch: pb::DmaBatch) -> pb::DmaCompletions {
        self.send(Up::Dma(batch)).await;
        loop {
            match self.receive().await.unwrap() {
                Down::Dma(completions) => return completions,
                Down::Reset(reset) => self.send(Up::ResetDone(pb::ResetDone { tag: reset.tag })).await,
                other => panic!("no completions: {other:?}"),
            }
        }
    }
    pub async fn read(&mut self, iova: u64, size: u32) -> Result<bytes::Bytes, u32> {
        let answer = self.batch(read_batch(&[iova], size)).await;
        answer.fault_reason.first().map_or(Ok(answer.payload), |reason| Err(*reason))
    }
    pub async fn write(&mut self, iova: u64, data: &[u8]) -> Result<(), u32> {
        let answer = self.batch(write_batch(iova, data)).await;
        answer.fault_reason.first().map_or(Ok(()), |reason| Err(*reason))
    }
}

pub fn read_batch(iova: &[u64], size: u32) -> pb::DmaBatch {
    pb::DmaBatch { iova: iova.to_vec(), size_bytes: vec![size], ..Default::default() }
}
pub fn write_batch(iova: u64, data: &[u8]) -> pb::DmaBatch {
    pb::DmaBatch {
        iova: vec![iova],
        size_bytes: vec![data.len() as u32],
        kind: bytes::Bytes::from_static(&[1]),
        payload: bytes::Bytes::copy_from_slice(data),
        ..Default::default()
    }
}

/// What a scrape shows.
pub fn metrics(server: &Server) -> String {
    let mut text = String::new();
    let registry = iommu_server::metrics::registry(&server.host);
    prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
    text
}

/// A driver with a mapped buffer of whole pages and its agent.
pub async fn mapped(server: &Server, pages: u64) -> (Driver, Agent, u64, u64) {
    let driver = Driver::open(server, 0).await;
    let agent = Agent::attach(server, ENGINE0).await;
    let gpa = driver.buffer(pages * PAGE).await;
    let iova = driver.map(ENGINE0, gpa, pages * PAGE).await.unwrap();
    (driver, agent, gpa, iova)
}

pub async fn topology(channel: &Channel) -> pb::GetTopologyResponse {
    inspect(channel).get_topology(pb::GetTopologyRequest {}).await.unwrap().into_inner()
}

pub async fn device_state(channel: &Channel, source: u32) -> pb::DeviceState {
    let devices = topology(channel).await.devices;
    devices.into_iter().find(|state| state.device == Some(device(source))).unwrap()
}
