//! Map and unmap in batches over one stream, many batches in flight.
//!
//! A task owns the stream and keeps every batch until it is answered. When the connection is lost it opens
//! the stream again and sends the unanswered batches once more, with the same request IDs, so that none is
//! carried out twice.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use iommu_proto::model::{map_outcomes, unmap_outcomes};
use iommu_proto::pb;
use iommu_proto::pb::dma_stream_request::Batch as WireBatch;
use iommu_proto::pb::driver_service_client::DriverServiceClient;
use iommu_types::errors::{DmaMapError, DmaUnmapError, InvalidField, LimitReached};
use iommu_types::{DeviceAddress, Direction, DmaAttributes, GpaRange, Iova};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::Streaming;
use tonic::transport::Channel;

use crate::connection::{RETRY_FIRST, RETRY_LONGEST, may_retry};
use crate::driver::{DriverCore, client};
use crate::error::of_status;
use crate::requests::RequestInFlight;
use crate::{MapOptions, Never, SdkError, TransportError, UnmapOptions};

/// The client of DriverService.
pub(crate) type Client = DriverServiceClient<Channel>;

type Answer<T, E> = Result<Vec<Result<T, E>>, SdkError<Never>>;

/// A stream of map and unmap batches of one device. Batches are answered in the order of their submission;
/// drop it when all tickets have been awaited.
#[derive(Debug)]
pub struct DmaStream {
    driver: Arc<DriverCore>,
    device: DeviceAddress,
    batches: mpsc::UnboundedSender<Pending>,
}

/// Maps on their way: awaiting it gives the address of each, or why it was refused, in order.
#[derive(Debug)]
#[must_use = "mappings whose addresses nobody awaits cannot be unmapped"]
pub struct MapTicket(oneshot::Receiver<Answer<Iova, DmaMapError>>);

/// Unmaps on their way: awaiting it tells when all are unmapped (and in a strict domain drained, I1), and which were refused.
#[derive(Debug)]
#[must_use = "an unmap is done only when it is answered"]
pub struct UnmapTicket(oneshot::Receiver<Answer<(), DmaUnmapError>>);

fn ended<T>() -> Result<T, SdkError<Never>> {
    Err(TransportError::BadAnswer("the stream ended before its answer".into()).into())
}

impl Future for MapTicket {
    type Output = Answer<Iova, DmaMapError>;
    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(context).map(|answer| answer.unwrap_or_else(|_| ended()))
    }
}

impl Future for UnmapTicket {
    type Output = Answer<(), DmaUnmapError>;
    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(context).map(|answer| answer.unwrap_or_else(|_| ended()))
    }
}

/// A batch that is not answered yet.
#[derive(Debug)]
struct Pending {
    request: RequestInFlight,
    message: pb::DmaStreamRequest,
    operations: usize,
    reply: Reply,
}

#[derive(Debug)]
enum Reply {
    Map(oneshot::Sender<Answer<Iova, DmaMapError>>),
    Unmap(oneshot::Sender<Answer<(), DmaUnmapError>>),
}

impl DmaStream {
    pub(crate) fn new(driver: Arc<DriverCore>, device: DeviceAddress) -> Self {
        // Unbounded is bounded here: a batch needs a request ID, and those have a window.
        let (batches, queue) = mpsc::unbounded_channel();
        tokio::spawn(pump(Arc::clone(&driver), queue));
        Self { driver, device, batches }
    }

    /// Sends a batch of maps, all of one direction; at most `batch_operations_max` of them. Waits only while
    /// the window of request IDs is full. Sizes of 4 GiB and more need
    /// [`Driver::dma_map_single`](crate::Driver::dma_map_single).
    pub async fn map(&self, memory: &[GpaRange], direction: Direction) -> Result<MapTicket, SdkError<Never>> {
        self.map_with(memory, direction, MapOptions::default()).await
    }

    /// The same with attributes and ring, for all of the batch.
    pub async fn map_with(
        &self,
        memory: &[GpaRange],
        direction: Direction,
        options: MapOptions,
    ) -> Result<MapTicket, SdkError<Never>> {
        let sizes = memory.iter().map(|range| size(range.size_bytes())).collect::<Result<_, _>>()?;
        let batch = WireBatch::Map(pb::DmaMapBatch {
            gpa: memory.iter().map(|range| range.base().get()).collect(),
            size_bytes: equal_or_each(sizes),
            direction: wire_direction(direction),
            attributes: wire_attributes(options.attributes),
            ring: options.ring.into(),
        });
        let (reply, ticket) = oneshot::channel();
        self.send(batch, memory.len(), Reply::Map(reply)).await?;
        Ok(MapTicket(ticket))
    }

    /// Sends a batch of unmaps: the address and size of each mapping, all of one direction. One drain for all
    /// of them, and in a ring domain one burst.
    pub async fn unmap(
        &self,
        mappings: &[(Iova, u64)],
        direction: Direction,
    ) -> Result<UnmapTicket, SdkError<Never>> {
        self.unmap_with(mappings, direction, UnmapOptions::default()).await
    }

    /// The same with attributes, and with the choice to let the burst go on into the next batch.
    pub async fn unmap_with(
        &self,
        mappings: &[(Iova, u64)],
        direction: Direction,
        options: UnmapOptions,
    ) -> Result<UnmapTicket, SdkError<Never>> {
        let sizes = mappings.iter().map(|&(_, size_bytes)| size(size_bytes)).collect::<Result<_, _>>()?;
        let batch = WireBatch::Unmap(pb::DmaUnmapBatch {
            iova: mappings.iter().map(|(iova, _)| iova.get()).collect(),
            size_bytes: equal_or_each(sizes),
            direction: wire_direction(direction),
            attributes: wire_attributes(options.attributes),
            // Absent is true.
            end_of_burst: (!options.end_of_burst).then_some(false),
        });
        let (reply, ticket) = oneshot::channel();
        self.send(batch, mappings.len(), Reply::Unmap(reply)).await?;
        Ok(UnmapTicket(ticket))
    }

    async fn send(&self, batch: WireBatch, operations: usize, reply: Reply) -> Result<(), SdkError<Never>> {
        let allowed = u64::from(self.driver.core.limits().batch_operations_max);
        if operations as u64 > allowed {
            return Err(SdkError::Call(
                LimitReached { limit: "batch_operations_max".into(), allowed }.into(),
            ));
        }
        let request = self.driver.requests.begin().await;
        let message = pb::DmaStreamRequest {
            header: Some(request.header().into()),
            device: Some(self.device.into()),
            batch: Some(batch),
        };
        self.batches.send(Pending { request, message, operations, reply }).or_else(|_| ended())
    }
}

/// One size for all when they are equal, as the schema allows.
fn equal_or_each(sizes: Vec<u32>) -> Vec<u32> {
    match sizes.split_first() {
        Some((first, rest)) if rest.iter().all(|size| size == first) => vec![*first],
        _ => sizes,
    }
}

fn size(size_bytes: u64) -> Result<u32, SdkError<Never>> {
    let limit = || LimitReached { limit: "dma_stream_size_bytes".into(), allowed: u64::from(u32::MAX) };
    u32::try_from(size_bytes).map_err(|_| SdkError::Call(limit().into()))
}

fn wire_attributes(attributes: DmaAttributes) -> Option<pb::DmaAttributes> {
    let DmaAttributes { skip_cpu_sync, resource } = attributes;
    (attributes != DmaAttributes::NONE).then_some(pb::DmaAttributes { skip_cpu_sync, resource })
}

fn wire_direction(direction: Direction) -> i32 {
    match direction {
        Direction::Bidirectional => pb::Direction::Bidirectional,
        Direction::ToDevice => pb::Direction::ToDevice,
        Direction::FromDevice => pb::Direction::FromDevice,
    }
    .into()
}

/// Carries batches for as long as somebody can submit them or waits for an answer.
async fn pump(driver: Arc<DriverCore>, mut queue: mpsc::UnboundedReceiver<Pending>) {
    let mut unanswered = VecDeque::new();
    // No delay while streams answer; a server that takes them and ends them at once is not asked in a hot loop.
    let mut delay = Duration::ZERO;
    loop {
        tokio::time::sleep(delay).await;
        if unanswered.is_empty() {
            match queue.recv().await {
                Some(batch) => unanswered.push_back(batch),
                None => return,
            }
        }
        let error = match open(&driver).await {
            Ok((outbound, inbound)) => match carry(outbound, inbound, &mut queue, &mut unanswered).await {
                Carried::Finished => return,
                Carried::Lost { answered: true } => {
                    delay = Duration::ZERO;
                    continue;
                }
                Carried::Lost { answered: false } => {
                    delay = (delay * 2).clamp(RETRY_FIRST, RETRY_LONGEST);
                    continue;
                }
                Carried::Failed(error) => error,
            },
            Err(error) => error,
        };
        delay = Duration::ZERO;
        for batch in unanswered.drain(..) {
            batch.fail(error.clone());
        }
    }
}

type Outbound = mpsc::UnboundedSender<pb::DmaStreamRequest>;

async fn open(driver: &DriverCore) -> Result<(Outbound, Streaming<pb::DmaStreamResponse>), SdkError<Never>> {
    let outbound = Mutex::new(None);
    let inbound = driver
        .core
        .call(|channel| {
            let (sender, messages) = mpsc::unbounded_channel();
            *outbound.lock().unwrap_or_else(PoisonError::into_inner) = Some(sender);
            async move { client(channel).dma_stream(UnboundedReceiverStream::new(messages)).await }
        })
        .await?;
    let outbound = outbound.into_inner().unwrap_or_else(PoisonError::into_inner);
    Ok((outbound.expect("every attempt leaves its sender"), inbound))
}

/// Why carrying over one stream ended.
enum Carried {
    /// Nobody submits any more and everything is answered.
    Finished,
    /// The stream is lost; the unanswered go over the next one.
    Lost {
        /// Whether it carried an answer before.
        answered: bool,
    },
    /// It makes no sense to go on with what is unanswered.
    Failed(SdkError<Never>),
}

async fn carry(
    outbound: Outbound,
    mut inbound: Streaming<pb::DmaStreamResponse>,
    queue: &mut mpsc::UnboundedReceiver<Pending>,
    unanswered: &mut VecDeque<Pending>,
) -> Carried {
    for batch in unanswered.iter() {
        if outbound.send(batch.message.clone()).is_err() {
            return Carried::Lost { answered: false };
        }
    }
    let (mut open, mut answered) = (true, false);
    while open || !unanswered.is_empty() {
        tokio::select! {
            batch = queue.recv(), if open => match batch {
                Some(batch) => {
                    let sent = outbound.send(batch.message.clone());
                    unanswered.push_back(batch);
                    if sent.is_err() {
                        return Carried::Lost { answered };
                    }
                }
                None => open = false,
            },
            answer = inbound.message() => match answer {
                Ok(Some(answer)) => {
                    if let Err(why) = settle(unanswered, answer) {
                        return Carried::Failed(TransportError::BadAnswer(why).into());
                    }
                    answered = true;
                }
                Ok(None) => return Carried::Lost { answered },
                Err(status) if may_retry(&status) => return Carried::Lost { answered },
                Err(status) => return Carried::Failed(of_status(&status)),
            },
        }
    }
    Carried::Finished
}

/// Gives an answer to the oldest batch. `Err` says which rule of the schema it breaks.
fn settle(unanswered: &mut VecDeque<Pending>, answer: pb::DmaStreamResponse) -> Result<(), String> {
    let oldest = unanswered.front().ok_or("an answer while no batch is unanswered")?;
    if answer.request_id != oldest.request.id() {
        return Err(format!("request_id: {} where {} is next", answer.request_id, oldest.request.id()));
    }
    let Some(oldest) = unanswered.pop_front() else { return Ok(()) };
    let broken = |error: InvalidField| error.to_string();
    // Whoever submitted may have stopped waiting; that is theirs to decide.
    match oldest.reply {
        Reply::Map(reply) => drop(reply.send(Ok(map_outcomes(answer, oldest.operations).map_err(broken)?))),
        Reply::Unmap(reply) => {
            drop(reply.send(Ok(unmap_outcomes(answer, oldest.operations).map_err(broken)?)))
        }
    }
    Ok(())
}

impl Pending {
    fn fail(self, error: SdkError<Never>) {
        // Whoever submitted may have stopped waiting; that is theirs to decide.
        match self.reply {
            Reply::Map(reply) => drop(reply.send(Err(error))),
            Reply::Unmap(reply) => drop(reply.send(Err(error))),
        }
    }
}
