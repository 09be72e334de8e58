//! `DriverService.DmaStream`: batches of maps and unmaps, pipelined, in order.
//!
//! Like a device session it is one task: the transport polls for the next answer, the stream reads the next batch and carries it out under one
//! lock. Only an unmap whose DMA is not quiet is waited for, in a task of its own that finishes even when the stream is gone.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll, ready};

use futures_core::Stream;
use iommu_kernel::DmaUnmap;
use iommu_proto::framing::typed_framing_status;
use iommu_proto::model::{DmaStreamBatch, DmaStreamRequest, map_response, unmap_response};
use iommu_proto::pb;
use iommu_types::errors::{DmaMapError, DmaUnmapError};
use iommu_types::{DeviceAddress, InvalidRange, RequestId};
use tokio::task::{JoinHandle, coop};
use tonic::{Status, Streaming};

use super::{Caller, Invalid, enter, internal};
use crate::bounds;
use crate::ending::Ending;
use crate::host::Host;
use crate::host::dma::{MapAsk, settle_all};
use crate::host::domains::Unsettled;
use crate::host::owners::OwnerState;
use crate::session::driver::{ClientSession, Inside, Tenancy};
use crate::session::replay::{RequestName, Underway, Verdict, recalled};

/// Streams in turn; a number that comes again shares.
static NEXT_CLIENT: AtomicU8 = AtomicU8::new(0);

type Answer = Result<pb::DmaStreamResponse, Status>;

enum Stage {
    Reading,
    /// A batch waits for its drain, or for the first of its duplicates.
    Waiting(JoinHandle<Answer>),
    Over,
}

/// The response stream.
pub struct DmaStream {
    work: Work,
    inbound: Streaming<pb::DmaStreamRequest>,
    stage: Stage,
    /// A batch that was read while the owner is over its rate, and until when it waits. Nothing is read meanwhile.
    held: Option<(pb::DmaStreamRequest, Pin<Box<tokio::time::Sleep>>)>,
    end: Pin<Box<dyn Future<Output = Ending> + Send>>,
}

struct Work {
    host: Arc<Host>,
    owner: Arc<OwnerState>,
    tenancy: Arc<Tenancy>,
    session: Arc<ClientSession>,
    /// Which free addresses it has at hand: streams are a client's threads.
    client: u8,
    /// Reused from batch to batch.
    unmaps: Vec<DmaUnmap>,
}

impl DmaStream {
    /// A stream that waits for batches.
    pub(super) fn new(
        host: Arc<Host>,
        caller: &Caller,
        inbound: Streaming<pb::DmaStreamRequest>,
    ) -> Result<Self, Status> {
        let (session, shutdown) = (caller.session.end.wait_owned(), host.shutdown.wait_owned());
        let end = async move {
            tokio::select! {
                ending = session => ending,
                ending = shutdown => ending,
            }
        };
        let work = Work {
            host,
            owner: Arc::clone(caller.driver()?),
            tenancy: Arc::clone(caller.tenancy()?),
            session: Arc::clone(&caller.session),
            client: NEXT_CLIENT.fetch_add(1, Ordering::Relaxed),
            unmaps: Vec::new(),
        };
        Ok(Self { work, inbound, stage: Stage::Reading, held: None, end: Box::pin(end) })
    }

    fn poll_answer(&mut self, context: &mut Context<'_>) -> Poll<Option<Answer>> {
        loop {
            if let Stage::Waiting(waiting) = &mut self.stage {
                let answer = ready!(Pin::new(waiting).poll(context));
                self.stage = Stage::Reading;
                return Poll::Ready(Some(
                    answer.unwrap_or_else(|_| Err(internal("the task of a batch ended early"))),
                ));
            }
            if let Poll::Ready(ending) = self.end.as_mut().poll(context) {
                return Poll::Ready(Some(Err(ending.into_status())));
            }
            if let Some((_, until)) = &mut self.held {
                ready!(until.as_mut().poll(context));
            }
            let message = match self.held.take() {
                Some((message, _)) => message,
                None => {
                    let budget = ready!(coop::poll_proceed(context));
                    let Some(message) = ready!(Pin::new(&mut self.inbound).poll_next(context)) else {
                        return Poll::Ready(None);
                    };
                    budget.made_progress();
                    let message = match message {
                        Ok(message) => message,
                        Err(status) => return Poll::Ready(Some(Err(typed_framing_status(status)))),
                    };
                    // Answers of a stream stay in order, so what is over the rate is not refused here: it waits for its turn.
                    let wait = self.work.owner.bounds.requests.book(1);
                    if !wait.is_zero() {
                        self.held = Some((message, Box::pin(tokio::time::sleep(wait))));
                        continue;
                    }
                    message
                }
            };
            match self.work.take(message) {
                Ok(Taken::Answer(answer)) => return Poll::Ready(Some(answer)),
                Ok(Taken::Waiting(waiting)) => self.stage = Stage::Waiting(waiting),
                Err(status) => return Poll::Ready(Some(Err(status))),
            }
        }
    }
}

enum Taken {
    Answer(Answer),
    Waiting(JoinHandle<Answer>),
}

/// What reports the end of a batch to the replay window.
struct Report {
    underway: Underway<pb::DmaStreamResponse>,
    _inside: Inside,
}

impl Report {
    fn answer(self, answer: Answer) -> Answer {
        self.underway.answered(answer)
    }
}

impl Work {
    fn take(&mut self, mut wire: pb::DmaStreamRequest) -> Result<Taken, Status> {
        let header = wire.header.take();
        let digest = self.tenancy.replay.digest("DmaStream", &wire);
        wire.header = header;
        let batch = DmaStreamRequest::parse(wire, bounds::BATCH.operations_max).map_err(Invalid::status)?;
        let name = RequestName::new(batch.header, digest);
        match self.tenancy.replay.begin(name)? {
            Verdict::First => {}
            Verdict::Again(answer) => return Ok(Taken::Answer(recalled(&answer))),
            Verdict::InFlight => {
                let replay = Arc::clone(&self.tenancy.replay);
                return Ok(Taken::Waiting(tokio::spawn(async move {
                    replay.settled(name).await;
                    match replay.begin(name)? {
                        Verdict::Again(answer) => recalled(&answer),
                        Verdict::First | Verdict::InFlight => {
                            Err(internal("a batch in flight was forgotten"))
                        }
                    }
                })));
            }
        }
        let underway = Underway::new(&self.tenancy.replay, name);
        match enter(&self.session) {
            Ok(inside) => Ok(self.carry_out(batch, Report { underway, _inside: inside })),
            Err(refused) => {
                underway.abandon();
                Err(refused)
            }
        }
    }

    fn carry_out(&mut self, request: DmaStreamRequest, report: Report) -> Taken {
        let DmaStreamRequest { header, device, batch } = request;
        match batch {
            DmaStreamBatch::Map { batch: map, ring } => {
                let id = header.request_id;
                let count = map.len();
                let ask = MapAsk {
                    direction: map.direction,
                    request_id: id,
                    attributes: map.attributes,
                    ring,
                    client: self.client,
                };
                let mapped = self.host.dma_map_batch(&self.owner, device, map.ranges(), ask);
                let answer = match mapped {
                    Ok(outcomes) => map_response(id, outcomes),
                    // What is wrong with the device is wrong with each operation of the batch.
                    Err(error) => map_response(id, std::iter::repeat_n(Err::<_, DmaMapError>(error), count)),
                };
                Taken::Answer(report.answer(Ok(answer)))
            }
            DmaStreamBatch::Unmap { batch, end_of_burst } => {
                let client = self.client;
                let template = |range| DmaUnmap {
                    attributes: batch.attributes,
                    end_of_burst,
                    client,
                    ..DmaUnmap::single(range, batch.direction, header.request_id)
                };
                self.unmap(header.request_id, device, batch.ranges().map(|range| range.map(template)), report)
            }
        }
    }

    fn unmap(
        &mut self,
        id: RequestId,
        device: DeviceAddress,
        requests: impl ExactSizeIterator<Item = Result<DmaUnmap, InvalidRange>>,
        report: Report,
    ) -> Taken {
        let count = requests.len();
        self.unmaps.clear();
        let mut invalid = Vec::new();
        for (index, request) in requests.enumerate() {
            match request {
                Ok(request) => self.unmaps.push(request),
                Err(error) => invalid.push((index, error)),
            }
        }
        let unmapped = self.host.dma_unmap_batch(self.owner.owner, device, &self.unmaps);
        let (mut results, unsettled) = match unmapped {
            Ok(unmapped) => unmapped,
            Err(error) => (std::iter::repeat_n(Err(error), self.unmaps.len()).collect(), Vec::new()),
        };
        for (index, error) in invalid {
            results.insert(index, Err(DmaUnmapError::from(error)));
        }
        assert!(results.len() == count, "every operation of a batch has a result");
        let answer = unmap_response(id, results);
        if unsettled.is_empty() {
            return Taken::Answer(report.answer(Ok(answer)));
        }
        Taken::Waiting(tokio::spawn(settle(unsettled, answer, report)))
    }
}

/// Answers an unmap when it is quiet (I1).
async fn settle(unsettled: Vec<Unsettled>, answer: pb::DmaStreamResponse, report: Report) -> Answer {
    settle_all(unsettled).await;
    report.answer(Ok(answer))
}

impl Stream for DmaStream {
    type Item = Answer;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Answer>> {
        if matches!(self.stage, Stage::Over) {
            return Poll::Ready(None);
        }
        let answer = self.poll_answer(context);
        if let Poll::Ready(None | Some(Err(_))) = answer {
            self.stage = Stage::Over;
        }
        answer
    }
}
