//! Many operations: a hammer in the background, floods, and a steady load for measurements.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use hdrhistogram::Histogram;
use iommu_proto::pb;
use tokio::sync::oneshot;

use crate::bounds::{
    BATCH_BYTES_MAX, FLOOD_BATCHES_MAX, HAMMERED_MAX, IN_FLIGHT_MAX, OPERATIONS_MAX, RUN_MAX,
};
use crate::device::{Device, Stopped, wrong};
use crate::execute::count;
use crate::language::{Answer, Claim, Counted, End, Flood, Hammer, Kind, Steady};
use crate::stream::{Shared, lock};

/// Microseconds since the UNIX epoch, by which two processes of one machine can compare.
fn now_unix_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64)
}

/// Adds the answer to a batch of so many operations.
fn add(counted: &mut Counted, operations: u64, completions: &pb::DmaCompletions) {
    let refusals = count(completions, &mut counted.refused).min(operations);
    counted.succeeded += operations - refusals;
    let now = now_unix_us();
    if refusals < operations {
        counted.last_success_unix_us = now;
    }
    if refusals > 0 && counted.first_refusal_unix_us == 0 {
        counted.first_refusal_unix_us = now;
    }
}

/// Batches that follow each other, some in flight.
struct Pipeline {
    shared: Arc<Shared>,
    in_flight: VecDeque<(Instant, u64, oneshot::Receiver<pb::DmaCompletions>)>,
    depth: usize,
}

impl Pipeline {
    fn new(shared: Arc<Shared>, depth: usize) -> Self {
        Self { shared, in_flight: VecDeque::new(), depth: depth.clamp(1, IN_FLIGHT_MAX) }
    }

    /// Sends a batch; first takes the oldest answer when the pipeline is full.
    async fn push(
        &mut self,
        batch: pb::DmaBatch,
        took: impl FnMut(Instant, u64, pb::DmaCompletions),
    ) -> Result<(), End> {
        if self.in_flight.len() == self.depth {
            self.pop(took).await?;
        }
        let operations = batch.iova.len() as u64;
        self.in_flight.push_back((Instant::now(), operations, self.shared.submit(batch).await?));
        Ok(())
    }

    /// Takes the oldest answer; `false` when none is due.
    async fn pop(&mut self, mut took: impl FnMut(Instant, u64, pb::DmaCompletions)) -> Result<bool, End> {
        let Some((sent, operations, answer)) = self.in_flight.pop_front() else { return Ok(false) };
        took(sent, operations, self.shared.answer(answer).await?);
        Ok(true)
    }
}

/// A hammer that swings.
#[derive(Debug)]
pub(crate) struct Hammering {
    stop: Arc<AtomicBool>,
    so_far: Arc<Mutex<Counted>>,
    task: tokio::task::JoinHandle<()>,
}

impl Hammering {
    pub(crate) fn start(
        shared: Arc<Shared>,
        hammer: Hammer,
        generation: Option<u64>,
    ) -> Result<Self, Stopped> {
        let bytes = (hammer.size as usize).saturating_mul(hammer.iova.len());
        if hammer.iova.is_empty() || hammer.iova.len() > HAMMERED_MAX || bytes > BATCH_BYTES_MAX || bytes == 0
        {
            return wrong(format!(
                "iova, size: 1 to {HAMMERED_MAX} addresses and {BATCH_BYTES_MAX} bytes in all"
            ));
        }
        let batch = pb::DmaBatch {
            iova: hammer.iova.iter().map(|iova| iova.0).collect(),
            size_bytes: vec![hammer.size],
            kind: vec![Kind::Write.code()].into(),
            payload: Bytes::from(vec![hammer.fill; bytes]),
            assignment_generation: generation,
            ..pb::DmaBatch::default()
        };
        let (stop, so_far) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Counted::default())));
        let task =
            tokio::spawn(swing(shared, batch, hammer.in_flight, Arc::clone(&stop), Arc::clone(&so_far)));
        Ok(Self { stop, so_far, task })
    }

    pub(crate) fn so_far(&self) -> Counted {
        lock(&self.so_far).clone()
    }

    /// Swings no more, waits for what is in flight, and tells.
    pub(crate) async fn stop(self) -> Counted {
        self.stop.store(true, Ordering::Relaxed);
        // It ends by itself: every answer has a deadline.
        let _ = self.task.await;
        lock(&self.so_far).clone()
    }

    pub(crate) fn abandon(self) {
        self.task.abort();
    }
}

async fn swing(
    shared: Arc<Shared>,
    batch: pb::DmaBatch,
    depth: usize,
    stop: Arc<AtomicBool>,
    so_far: Arc<Mutex<Counted>>,
) {
    let started = Instant::now();
    let mut pipeline = Pipeline::new(shared, depth);
    let took = |_: Instant, operations: u64, completions: pb::DmaCompletions| {
        let mut counted = lock(&so_far);
        add(&mut counted, operations, &completions);
        counted.elapsed_us = started.elapsed().as_micros() as u64;
    };
    let swung = async {
        while !stop.load(Ordering::Relaxed) && started.elapsed() < RUN_MAX {
            pipeline.push(batch.clone(), took).await?;
        }
        while pipeline.pop(took).await? {}
        Ok(())
    };
    let ended: Result<(), End> = swung.await;
    lock(&so_far).ended = ended.err();
}

impl Device {
    /// As fast as it goes.
    pub(crate) async fn flood(&mut self, flood: &Flood) -> Result<Counted, Stopped> {
        let batch_bytes = batch_bytes(flood.operations, flood.size)?;
        if flood.batches == 0 || flood.batches > FLOOD_BATCHES_MAX {
            return wrong(format!("batches: 1 to {FLOOD_BATCHES_MAX}"));
        }
        let stream = self.stream()?;
        let depth = flood.in_flight.unwrap_or(stream.welcome.dma_credits as usize);
        let mut pipeline = Pipeline::new(stream.shared(), depth);
        let generation = self.generation(Claim::Current)?;
        let payload = payload(flood.kind, batch_bytes);
        let started = Instant::now();
        let mut counted = Counted::default();
        let mut next = 0;
        let flooded = async {
            for _ in 0..flood.batches {
                let iova = (0..flood.operations).map(|_| {
                    let n = if flood.span == 0 { next } else { next % flood.span };
                    next += 1;
                    flood.iova.0.wrapping_add(n.wrapping_mul(flood.stride.0))
                });
                let batch = batch(flood.kind, iova.collect(), flood.size, payload.clone(), generation);
                pipeline
                    .push(batch, |_, operations, completions| add(&mut counted, operations, &completions))
                    .await?;
            }
            while pipeline
                .pop(|_, operations, completions| add(&mut counted, operations, &completions))
                .await?
            {}
            Ok(())
        };
        let ended: Result<(), End> = flooded.await;
        counted.ended = ended.err();
        counted.elapsed_us = started.elapsed().as_micros() as u64;
        Ok(counted)
    }

    /// Closed loop, with latencies.
    pub(crate) async fn steady(&mut self, steady: &Steady) -> Result<Answer, Stopped> {
        let batch_bytes = batch_bytes(steady.operations, steady.size)?;
        let run = Duration::from_millis(steady.milliseconds);
        if run > RUN_MAX || steady.size == 0 || steady.span < u64::from(steady.size) {
            return wrong(format!(
                "milliseconds, size, span: at most {RUN_MAX:?}, at least 1, and room for one operation"
            ));
        }
        let slots = steady.span / u64::from(steady.size);
        let generation = self.generation(Claim::Current)?;
        let mut pipeline = Pipeline::new(self.stream()?.shared(), steady.in_flight);
        let payload = payload(steady.kind, batch_bytes);
        let mut latencies = Histogram::<u64>::new(3).map_err(|error| Stopped::Wrong(error.to_string()))?;
        let (mut counted, mut next, started) = (Counted::default(), 0, Instant::now());
        let mut took = |sent: Instant, operations: u64, completions: pb::DmaCompletions| {
            latencies.saturating_record(sent.elapsed().as_micros() as u64);
            add(&mut counted, operations, &completions);
        };
        while started.elapsed() < run {
            let iova = (0..steady.operations).map(|_| {
                next = (next + 1) % slots;
                steady.iova.0.wrapping_add(next * u64::from(steady.size))
            });
            let batch = batch(steady.kind, iova.collect(), steady.size, payload.clone(), generation);
            pipeline.push(batch, &mut took).await?;
        }
        while pipeline.pop(&mut took).await? {}
        let elapsed = started.elapsed();
        let per_second = counted.succeeded as f64 / elapsed.as_secs_f64();
        Ok(Answer::Measured {
            operations: counted.succeeded,
            refused: counted.refused.values().sum(),
            elapsed_us: elapsed.as_micros() as u64,
            operations_per_second: per_second,
            bytes_per_second: per_second * f64::from(steady.size),
            latency_us: [0.5, 0.9, 0.99, 0.999, 1.0].map(|quantile| latencies.value_at_quantile(quantile)),
        })
    }
}

/// The bytes of a batch of so many operations of this size, when it may be made.
fn batch_bytes(operations: u32, size: u32) -> Result<u64, Stopped> {
    let bytes = u64::from(size) * u64::from(operations);
    if operations == 0 || operations as usize > OPERATIONS_MAX || bytes > BATCH_BYTES_MAX as u64 {
        return wrong(format!("operations, size: 1 to {OPERATIONS_MAX} and {BATCH_BYTES_MAX} bytes a batch"));
    }
    Ok(bytes)
}

fn payload(kind: Kind, batch_bytes: u64) -> Bytes {
    match kind {
        Kind::Read => Bytes::new(),
        Kind::Cas => Bytes::from(vec![0x66; 2 * batch_bytes as usize]),
        _ => Bytes::from(vec![0x66; batch_bytes as usize]),
    }
}

/// Operations of one kind and size.
pub(crate) fn batch(
    kind: Kind,
    iova: Vec<u64>,
    size: u32,
    payload: Bytes,
    generation: Option<u64>,
) -> pb::DmaBatch {
    pb::DmaBatch {
        iova,
        size_bytes: vec![size],
        kind: vec![kind.code()].into(),
        payload,
        assignment_generation: generation,
        ..pb::DmaBatch::default()
    }
}
