//! A scripted server: it opens sessions, keeps what was asked, and answers as the test said.

#![allow(dead_code, reason = "each test file uses its part")]

mod hypervisor;
mod inspect;

use std::any::Any;
use std::collections::{HashMap, HashSet, VecDeque};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use bytes::Bytes;
use guest_sdk::{Connection, Driver, Hypervisor, Owner};
use iommu_proto::errors::WireError;
use iommu_proto::pb;
use iommu_types::errors::SessionRequired;
use tokio::sync::Semaphore;
use tokio_stream::{Stream, StreamExt};
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status, Streaming};

const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("{what} did not come"))
}

#[derive(Clone, Default)]
pub(crate) struct Fake {
    state: Arc<Mutex<State>>,
}

/// An answer of the type of its method, or a refusal.
type Answer = Result<Box<dyn Any + Send>, Status>;

#[derive(Default)]
pub(crate) struct State {
    /// Method and request ID (0 for those without) of every call that got past the session check.
    pub(crate) calls: Vec<(&'static str, u64)>,
    /// The watermark of each call with a header.
    pub(crate) acknowledged: Vec<u64>,
    answers: HashMap<&'static str, VecDeque<Answer>>,
    /// Methods whose calls wait for a permit each before they are answered, where that is looked at.
    pub(crate) gates: HashMap<&'static str, Arc<Semaphore>>,
    /// Connections with a session.
    sessions: HashSet<SocketAddr>,
    /// Every Open.
    pub(crate) opens: Vec<pb::OpenRequest>,
    /// Whether a session is resumed when its token is given.
    pub(crate) forgets_state: bool,
    /// What Open is refused with, next.
    pub(crate) open_refusals: VecDeque<Status>,
    /// Answers of the DMA stream, by batch: how often the stream breaks instead.
    pub(crate) stream_breaks: usize,
    /// Errors of the next batch of the DMA stream.
    pub(crate) stream_errors: Vec<pb::OperationError>,
    /// The streams of WatchInterrupts, one after the other.
    pub(crate) interrupts: VecDeque<Vec<Result<pb::WatchInterruptsResponse, Status>>>,
    /// The streams of FaultService.Watch, one after the other, and the tokens that they were asked with.
    pub(crate) faults: VecDeque<Vec<Result<pb::WatchFaultsResponse, Status>>>,
    pub(crate) fault_tokens: Vec<String>,
    /// The same of SanitizerService.Watch.
    pub(crate) reports: VecDeque<Vec<Result<pb::WatchReportsResponse, Status>>>,
    pub(crate) report_tokens: Vec<String>,
    /// Every message that was asked with, for those who ask what was sent.
    sent: Vec<Box<dyn Any + Send>>,
    /// The streams of ServeHypercalls, one after the other, and every answer that was given.
    pub(crate) hypercalls: VecDeque<Vec<Result<pb::ServeHypercallsResponse, Status>>>,
    pub(crate) hypercall_answers: Vec<pb::ServeHypercallsRequest>,
    /// Ends the stream of ServeHypercalls that stands, as a server that goes.
    pub(crate) hypercalls_end: Arc<tokio::sync::Notify>,
    /// How the next writes of memory fail.
    pub(crate) write_failures: VecDeque<Status>,
    /// Bytes of a memory.
    pub(crate) memory: Vec<u8>,
}

pub(crate) const BATCH_BYTES_MAX: u32 = 1024;

impl Fake {
    /// Starts serving; gives the endpoint.
    pub(crate) async fn start(&self) -> String {
        let incoming = TcpIncoming::bind("127.0.0.1:0".parse().unwrap()).unwrap().with_nodelay(Some(true));
        let address = incoming.local_addr().unwrap();
        let server = tonic::transport::Server::builder()
            .add_service(pb::session_service_server::SessionServiceServer::new(self.clone()))
            .add_service(pb::driver_service_server::DriverServiceServer::new(self.clone()))
            .add_service(pb::hypervisor_service_server::HypervisorServiceServer::new(self.clone()))
            .add_service(pb::inspect_service_server::InspectServiceServer::new(self.clone()))
            .add_service(pb::memory_service_server::MemoryServiceServer::new(self.clone()))
            .add_service(pb::fault_service_server::FaultServiceServer::new(self.clone()))
            .add_service(pb::sanitizer_service_server::SanitizerServiceServer::new(self.clone()));
        tokio::spawn(server.serve_with_incoming(incoming));
        format!("http://{address}")
    }

    /// A driver that has opened its session.
    pub(crate) async fn driver(&self) -> Driver {
        let connection = Connection::to(self.start().await).deadline(Duration::from_secs(5));
        connection.driver("net-driver", Owner::Driver(1)).await.expect("the fake opens sessions")
    }

    /// A hypervisor that has opened its session.
    pub(crate) async fn hypervisor(&self) -> Hypervisor {
        let connection = Connection::to(self.start().await).deadline(Duration::from_secs(5));
        connection.hypervisor("hv0").await.expect("the fake opens sessions")
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// What the next call of a method that is not yet scripted is answered with.
    pub(crate) fn answer(&self, method: &'static str, answer: impl Any + Send) -> &Self {
        self.state().answers.entry(method).or_default().push_back(Ok(Box::new(answer)));
        self
    }

    pub(crate) fn refuse(&self, method: &'static str, error: impl WireError) -> &Self {
        self.fail(method, error.into_status())
    }

    pub(crate) fn fail(&self, method: &'static str, status: Status) -> &Self {
        self.state().answers.entry(method).or_default().push_back(Err(status));
        self
    }

    /// Forgets every session, as a server that has seen the connections go.
    pub(crate) fn lose_sessions(&self) {
        self.state().sessions.clear();
    }

    pub(crate) fn calls(&self, method: &str) -> Vec<u64> {
        self.state().calls.iter().filter(|(name, _)| *name == method).map(|&(_, id)| id).collect()
    }

    /// The messages of one type that were sent, in order.
    pub(crate) fn sent<M: Clone + 'static>(&self) -> Vec<M> {
        self.state().sent.iter().filter_map(|message| message.downcast_ref::<M>()).cloned().collect()
    }

    fn keep<M: Clone + Send + 'static>(&self, message: &M) {
        self.state().sent.push(Box::new(message.clone()));
    }

    fn enter<M>(
        &self,
        method: &'static str,
        request: &Request<M>,
        header: Option<&pb::RequestHeader>,
    ) -> Result<(), Status> {
        let mut state = self.state();
        let peer = request.remote_addr().expect("TCP has addresses");
        if !state.sessions.contains(&peer) {
            return Err(SessionRequired {}.into_status());
        }
        state.calls.push((method, header.map_or(0, |header| header.request_id)));
        if let Some(header) = header {
            state.acknowledged.push(header.acknowledged_through);
        }
        Ok(())
    }

    async fn held(&self, method: &'static str) {
        let gate = self.state().gates.get(method).cloned();
        if let Some(gate) = gate {
            gate.acquire().await.expect("open").forget();
        }
    }

    fn scripted<T: Any>(&self, method: &'static str) -> Result<Response<T>, Status> {
        let next = self.state().answers.get_mut(method).and_then(VecDeque::pop_front);
        let answer = next.unwrap_or_else(|| panic!("{method} is not scripted"))?;
        Ok(Response::new(*answer.downcast::<T>().expect("scripted with an answer of its method")))
    }
}

#[tonic::async_trait]
impl pb::session_service_server::SessionService for Fake {
    async fn open(&self, request: Request<pb::OpenRequest>) -> Result<Response<pb::OpenResponse>, Status> {
        let peer = request.remote_addr().expect("TCP has addresses");
        let mut state = self.state();
        if let Some(refusal) = state.open_refusals.pop_front() {
            return Err(refusal);
        }
        let open = request.into_inner();
        let resumed = !open.resume_token.is_empty() && !state.forgets_state;
        state.opens.push(open);
        state.sessions.insert(peer);
        let generation = state.opens.len() as u64;
        Ok(Response::new(pb::OpenResponse {
            schema_version: 1,
            generation,
            resume_token: Bytes::from(vec![generation as u8; 16]),
            resumed,
            grace_ms: 5000,
            limits: Some(pb::Limits {
                message_bytes_max: 1 << 20,
                batch_operations_max: 8,
                batch_bytes_max: BATCH_BYTES_MAX,
                request_window: 4,
            }),
        }))
    }
}

type Replies<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// What is scripted, and then silence.
fn script<T: Send + 'static>(items: Vec<Result<T, Status>>) -> Replies<T> {
    Box::pin(tokio_stream::iter(items).chain(tokio_stream::pending()))
}

macro_rules! driver_service {
    ($($method:ident: $request:ident => $response:ident;)* ; $($plain:ident: $plain_request:ident => $plain_response:ident;)*) => {
        #[tonic::async_trait]
        impl pb::driver_service_server::DriverService for Fake {
            $(async fn $method(&self, request: Request<pb::$request>) -> Result<Response<pb::$response>, Status> {
                self.enter(stringify!($method), &request, request.get_ref().header.as_ref())?;
                self.keep(request.get_ref());
                self.scripted(stringify!($method))
            })*
            $(async fn $plain(&self, request: Request<pb::$plain_request>) -> Result<Response<pb::$plain_response>, Status> {
                self.enter(stringify!($plain), &request, None)?;
                self.keep(request.get_ref());
                self.scripted(stringify!($plain))
            })*

            type DmaStreamStream = Replies<pb::DmaStreamResponse>;
            async fn dma_stream(
                &self,
                request: Request<Streaming<pb::DmaStreamRequest>>,
            ) -> Result<Response<Self::DmaStreamStream>, Status> {
                self.enter("dma_stream", &request, None)?;
                let fake = self.clone();
                let answers = request.into_inner().map(move |batch| fake.answer_batch(batch?));
                Ok(Response::new(Box::pin(answers)))
            }

            type WatchInterruptsStream = Replies<pb::WatchInterruptsResponse>;
            async fn watch_interrupts(
                &self,
                request: Request<pb::WatchInterruptsRequest>,
            ) -> Result<Response<Self::WatchInterruptsStream>, Status> {
                self.enter("watch_interrupts", &request, None)?;
                Ok(Response::new(script(self.state().interrupts.pop_front().unwrap_or_default())))
            }
        }
    };
}

driver_service! {
    allocate_buffer: AllocateBufferRequest => AllocateBufferResponse;
    free_buffer: FreeBufferRequest => FreeBufferResponse;
    dma_map: DmaMapRequest => DmaMapResponse;
    dma_unmap: DmaUnmapRequest => DmaUnmapResponse;
    dma_map_sg: DmaMapSgRequest => DmaMapSgResponse;
    dma_unmap_sg: DmaUnmapSgRequest => DmaUnmapSgResponse;
    dma_sync: DmaSyncRequest => DmaSyncResponse;
    set_dma_limits: SetDmaLimitsRequest => SetDmaLimitsResponse;
    allocate_coherent: AllocateCoherentRequest => AllocateCoherentResponse;
    free_coherent: FreeCoherentRequest => FreeCoherentResponse;
    create_domain: CreateDomainRequest => CreateDomainResponse;
    destroy_domain: DestroyDomainRequest => DestroyDomainResponse;
    attach_device: AttachDeviceRequest => AttachDeviceResponse;
    detach_device: DetachDeviceRequest => DetachDeviceResponse;
    map: MapRequest => MapResponse;
    unmap: UnmapRequest => UnmapResponse;
    allocate_interrupt: AllocateInterruptRequest => AllocateInterruptResponse;
    ;
    mmio_read: MmioReadRequest => MmioReadResponse;
    mmio_write: MmioWriteRequest => MmioWriteResponse;
    list_memory: ListMemoryRequest => ListMemoryResponse;
    hypercall: HypercallRequest => HypercallResponse;
}

impl Fake {
    fn answer_batch(&self, batch: pb::DmaStreamRequest) -> Result<pb::DmaStreamResponse, Status> {
        self.keep(&batch);
        let mut state = self.state();
        let request_id = batch.header.expect("a header").request_id;
        state.calls.push(("dma_stream_batch", request_id));
        if state.stream_breaks > 0 {
            state.stream_breaks -= 1;
            return Err(Status::unavailable("the stream breaks"));
        }
        let errors = std::mem::take(&mut state.stream_errors);
        let failed = |index: usize| errors.iter().any(|error| error.index as usize == index);
        let iova = match batch.batch.expect("a batch") {
            pb::dma_stream_request::Batch::Map(map) => (map.gpa.iter().enumerate())
                .map(|(index, gpa)| if failed(index) { u64::MAX } else { gpa + 0x1000_0000 })
                .collect(),
            pb::dma_stream_request::Batch::Unmap(_) => Vec::new(),
        };
        Ok(pb::DmaStreamResponse { request_id, iova, errors })
    }
}

#[tonic::async_trait]
impl pb::memory_service_server::MemoryService for Fake {
    async fn read(
        &self,
        request: Request<pb::MemoryReadRequest>,
    ) -> Result<Response<pb::MemoryReadResponse>, Status> {
        self.enter("read", &request, None)?;
        let pb::MemoryReadRequest { gpa, size_bytes, .. } = request.into_inner();
        assert!(size_bytes <= BATCH_BYTES_MAX.into());
        let data = self.state().memory[gpa as usize..][..size_bytes as usize].to_vec().into();
        Ok(Response::new(pb::MemoryReadResponse { data }))
    }
    async fn write(
        &self,
        request: Request<pb::MemoryWriteRequest>,
    ) -> Result<Response<pb::MemoryWriteResponse>, Status> {
        self.enter("write", &request, None)?;
        if let Some(failure) = self.state().write_failures.pop_front() {
            return Err(failure);
        }
        let written_bytes = self.put(request.into_inner());
        Ok(Response::new(pb::MemoryWriteResponse { written_bytes }))
    }
    type ReadBulkStream = Replies<pb::MemoryReadResponse>;
    async fn read_bulk(
        &self,
        request: Request<pb::MemoryReadRequest>,
    ) -> Result<Response<Self::ReadBulkStream>, Status> {
        self.enter("read_bulk", &request, None)?;
        let pb::MemoryReadRequest { gpa, size_bytes, .. } = request.into_inner();
        let data = self.state().memory[gpa as usize..][..size_bytes as usize].to_vec();
        let pieces = data.chunks(700).map(|piece| Ok(pb::MemoryReadResponse { data: piece.to_vec().into() }));
        Ok(Response::new(Box::pin(tokio_stream::iter(pieces.collect::<Vec<_>>()))))
    }
    async fn write_bulk(
        &self,
        request: Request<Streaming<pb::MemoryWriteRequest>>,
    ) -> Result<Response<pb::MemoryWriteResponse>, Status> {
        self.enter("write_bulk", &request, None)?;
        let mut pieces = request.into_inner();
        let mut written_bytes = 0;
        while let Some(piece) = pieces.message().await? {
            written_bytes += self.put(piece);
        }
        Ok(Response::new(pb::MemoryWriteResponse { written_bytes }))
    }
}

impl Fake {
    fn put(&self, write: pb::MemoryWriteRequest) -> u64 {
        assert!(write.data.len() <= BATCH_BYTES_MAX as usize);
        self.state().memory[write.gpa as usize..][..write.data.len()].copy_from_slice(&write.data);
        write.data.len() as u64
    }
}

#[tonic::async_trait]
impl pb::fault_service_server::FaultService for Fake {
    async fn list(
        &self,
        request: Request<pb::ListFaultsRequest>,
    ) -> Result<Response<pb::ListFaultsResponse>, Status> {
        self.enter("list", &request, None)?;
        self.scripted("list")
    }
    type WatchStream = Replies<pb::WatchFaultsResponse>;
    async fn watch(
        &self,
        request: Request<pb::WatchFaultsRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        self.enter("watch", &request, None)?;
        let mut state = self.state();
        state.fault_tokens.push(request.into_inner().resume_token);
        Ok(Response::new(script(state.faults.pop_front().unwrap_or_default())))
    }
}

#[tonic::async_trait]
impl pb::sanitizer_service_server::SanitizerService for Fake {
    async fn list_reports(
        &self,
        request: Request<pb::ListReportsRequest>,
    ) -> Result<Response<pb::ListReportsResponse>, Status> {
        self.enter("list_reports", &request, None)?;
        self.keep(request.get_ref());
        self.scripted("list_reports")
    }
    type WatchStream = Replies<pb::WatchReportsResponse>;
    async fn watch(
        &self,
        request: Request<pb::WatchReportsRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        self.enter("watch_reports", &request, None)?;
        let mut state = self.state();
        state.report_tokens.push(request.into_inner().resume_token);
        Ok(Response::new(script(state.reports.pop_front().unwrap_or_default())))
    }
}
