//! The driver of a neighbour: requests at a pace or as many as it can, subscriptions, and connections that come and go.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use guest_sdk::{Buffer, DeviceHandle, Direction, Driver, FaultFilter};
use iommu_proto::channel::Dial;
use iommu_proto::credentials::Credentials;
use iommu_types::{GpaRange, Identity, PAGE_SIZE_BYTES, Role};
use tokio::task::JoinSet;

use super::words::{Requests, RequestsDone};

/// Mappings in a batch of a stream.
const BATCH: u64 = 64;
/// Limits that a request can meet, as their refusals name them.
const LIMITS: [&str; 4] =
    ["requests_per_second", "calls_per_owner", "watchers_per_owner", "watchers_per_connection"];

/// Counted by all tasks together.
#[derive(Debug, Default)]
struct Counts {
    answered: AtomicU64,
    connections: AtomicU64,
    refused: Mutex<BTreeMap<String, u64>>,
}

impl Counts {
    fn refused(&self, error: &dyn std::fmt::Display) {
        let told = error.to_string();
        let name = LIMITS.iter().find(|limit| told.contains(**limit)).map_or(told.as_str(), |limit| limit);
        let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        *refused.entry(name.to_owned()).or_default() += 1;
    }
}

/// When the next one of `among` tasks is due, that together do so many in a second.
struct Pace {
    every: Option<Duration>,
    next: Instant,
}

impl Pace {
    fn new(per_second: Option<u32>, among: usize) -> Self {
        let every =
            per_second.map(|per_second| Duration::from_secs_f64(among as f64 / f64::from(per_second)));
        Self { every, next: Instant::now() }
    }
    async fn wait(&mut self) {
        if let Some(every) = self.every {
            self.next += every;
            tokio::time::sleep_until(self.next.into()).await;
        }
    }
}

/// Does what is asked, with at least [`BATCH`] pages in `buffer`, and tells what came of it.
pub(super) async fn run(
    server: &str,
    name: &str,
    driver: &Driver,
    device: &DeviceHandle,
    buffer: &Buffer,
    asked: Requests,
) -> anyhow::Result<RequestsDone> {
    let counts = Arc::<Counts>::default();
    let begun = Instant::now();
    let until = begun + Duration::from_millis(asked.milliseconds);
    let among = asked.calls + asked.streams;
    let mut tasks = JoinSet::new();
    for _ in 0..asked.calls {
        let (driver, counts, gpa) = (driver.clone(), Arc::clone(&counts), buffer.gpa());
        let mut pace = Pace::new(asked.per_second, among);
        tasks.spawn(async move {
            while Instant::now() < until {
                pace.wait().await;
                match driver.memory().read(gpa, 8).await {
                    Ok(_) => drop(counts.answered.fetch_add(1, Ordering::Relaxed)),
                    Err(error) => counts.refused(&error),
                }
            }
        });
    }
    let pages = pages(buffer)?;
    for _ in 0..asked.streams {
        let (driver, device, counts) = (driver.clone(), device.clone(), Arc::clone(&counts));
        let (pages, pace) = (pages.clone(), Pace::new(asked.per_second, among));
        tasks.spawn(async move {
            if let Err(error) = map_and_unmap(&driver, &device, &counts, &pages, pace, until).await {
                counts.refused(&format!("{error:#}"));
            }
        });
    }
    let role = Role::Driver(driver.owner());
    let identity = Identity { name: name.to_owned(), role };
    let dial = Dial::to(server, &Credentials::from_default_directory(), &identity)?;
    for _ in 0..asked.connections {
        let (dial, counts) = (dial.clone(), Arc::clone(&counts));
        tasks.spawn(async move {
            while Instant::now() < until {
                match dial.connect().await {
                    Ok(_) => drop(counts.connections.fetch_add(1, Ordering::Relaxed)),
                    Err(error) => counts.refused(&error),
                }
            }
        });
    }
    let watchers = watch(driver, &counts, asked.watchers, until).await;
    while let Some(ended) = tasks.join_next().await {
        ended.context("a task panicked")?;
    }
    let refused = counts.refused.lock().unwrap_or_else(PoisonError::into_inner).clone();
    Ok(RequestsDone {
        answered: counts.answered.load(Ordering::Relaxed),
        refused,
        watchers,
        connections: counts.connections.load(Ordering::Relaxed),
        seconds: begun.elapsed().as_secs_f64(),
    })
}

fn pages(buffer: &Buffer) -> anyhow::Result<Vec<GpaRange>> {
    let page = |index| buffer.slice(index * PAGE_SIZE_BYTES, PAGE_SIZE_BYTES);
    (0..BATCH).map(|index| page(index).map_err(Into::into)).collect()
}

/// Map and unmap batches over one stream.
async fn map_and_unmap(
    driver: &Driver,
    device: &DeviceHandle,
    counts: &Counts,
    pages: &[GpaRange],
    mut pace: Pace,
    until: Instant,
) -> anyhow::Result<()> {
    let stream = driver.dma_stream(device);
    while Instant::now() < until {
        pace.wait().await;
        let mapped = stream.map(pages, Direction::FromDevice).await?.await?;
        let mappings: Vec<_> = mapped.into_iter().flatten().map(|iova| (iova, PAGE_SIZE_BYTES)).collect();
        pace.wait().await;
        drop(stream.unmap(&mappings, Direction::FromDevice).await?.await?);
        counts.answered.fetch_add(2, Ordering::Relaxed);
    }
    Ok(())
}

/// Subscribes to faults as often as it is let, and reads what comes until then. Gives how many subscriptions there were.
async fn watch(driver: &Driver, counts: &Counts, wanted: usize, until: Instant) -> u64 {
    let mut watching = JoinSet::new();
    for _ in 0..wanted {
        match driver.faults().watch(FaultFilter { owner: None, device: None }, "").await {
            Ok(mut faults) => drop(watching.spawn(async move {
                let reading = async { while let Some(Ok(_)) = faults.next().await {} };
                let _over = tokio::time::timeout_at(until.into(), reading).await;
            })),
            Err(error) => counts.refused(&error),
        }
    }
    let count = watching.len() as u64;
    while watching.join_next().await.is_some() {}
    count
}
