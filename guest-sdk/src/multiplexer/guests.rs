//! The memory of the guests: whose a range is, and copies in and out.

use std::collections::HashMap;

use bytes::Bytes;
use iommu_types::GpaRange;
use iommu_types::errors::MemoryError;
use tokio::task::JoinSet;

use super::codec::{Ended, Entry};
use crate::page_runs::PageRuns;
use crate::{Hypervisor, Never, SdkError};

/// Copies of one batch that are under way at once: enough to hide a round trip, and few beside a connection's 4 MiB.
const COPIES_MAX: usize = 16;

/// The guests of a hypervisor, with what is known of their memory. That may be old; the server decides when it is copied.
#[derive(Debug)]
pub(super) struct Guests {
    hypervisor: Hypervisor,
    known: HashMap<u32, PageRuns>,
}

impl Guests {
    pub(super) fn new(hypervisor: Hypervisor) -> Self {
        Self { hypervisor, known: HashMap::new() }
    }

    /// Which of the entries are refused: those whose range is not all the guest's own memory. What is not known yet is asked for once.
    pub(super) async fn own(&mut self, guest: u32, entries: &[Entry]) -> Vec<Option<Ended>> {
        let covered = |guests: &Self, entry: &Entry| {
            guests.known.get(&guest).is_some_and(|memory| memory.cover(entry.range))
        };
        if !entries.iter().all(|entry| covered(self, entry))
            && let Err(error) = self.learn().await
        {
            tracing::warn!(vm = guest, %error, "the memory of guests is not known");
            return vec![Some(Ended::MemoryFailed); entries.len()];
        }
        entries.iter().map(|entry| (!covered(self, entry)).then_some(Ended::NotYours)).collect()
    }

    async fn learn(&mut self) -> Result<(), SdkError<Never>> {
        let vms = self.hypervisor.vms().await?;
        let memory = vms.into_iter().map(|vm| {
            // The server gives whole pages that make ranges; what is neither is nobody's.
            let regions =
                vm.memory.iter().filter_map(|region| GpaRange::new(region.gpa, region.size_bytes).ok());
            (vm.number, PageRuns::of(&regions.collect::<Vec<_>>()))
        });
        self.known = memory.collect();
        Ok(())
    }

    /// Reads every entry's range.
    pub(super) async fn read(&self, guest: u32, entries: &[Entry]) -> Vec<Result<Bytes, Ended>> {
        let memory = self.hypervisor.memory(guest);
        let copies = entries.iter().map(|entry| {
            let (memory, range) = (memory.clone(), entry.range);
            async move { memory.read(range.base(), range.size_bytes()).await.map_err(memory_failed) }
        });
        some_at_once(copies.collect()).await
    }

    /// Writes every packet that there is to its entry's range.
    pub(super) async fn write(
        &self,
        guest: u32,
        entries: &[Entry],
        packets: Vec<Result<Bytes, Ended>>,
    ) -> Vec<Ended> {
        let memory = self.hypervisor.memory(guest);
        let copies = entries.iter().zip(packets).map(|(entry, packet)| {
            let (memory, gpa) = (memory.clone(), entry.range.base());
            async move {
                let packet = packet?;
                let bytes = packet.len() as u32;
                if bytes > 0 {
                    memory.write(gpa, packet).await.map_err(memory_failed)?;
                }
                Ok(Ended::Done { bytes })
            }
        });
        let written = some_at_once(copies.collect()).await;
        written.into_iter().map(|written| written.unwrap_or_else(|ended| ended)).collect()
    }
}

fn memory_failed(error: SdkError<MemoryError>) -> Ended {
    match error {
        // It has gone since it was listed.
        SdkError::Refused(
            MemoryError::NotOwned(_) | MemoryError::UnknownOwner(_) | MemoryError::NotYours(_),
        ) => Ended::NotYours,
        error => {
            tracing::debug!(%error, "a guest's memory was not copied");
            Ended::MemoryFailed
        }
    }
}

/// The results in order; so many under way at once.
async fn some_at_once<T, F>(work: Vec<F>) -> Vec<Result<T, Ended>>
where
    T: Send + 'static,
    F: Future<Output = Result<T, Ended>> + Send + 'static,
{
    let mut results = Vec::new();
    let mut running = JoinSet::new();
    let take = |results: &mut Vec<Result<T, Ended>>, joined: Result<(usize, Result<T, Ended>), _>| {
        if let Ok((index, result)) = joined
            && let Some(place) = results.get_mut(index)
        {
            *place = result;
        }
    };
    for (index, work) in work.into_iter().enumerate() {
        if running.len() >= COPIES_MAX
            && let Some(joined) = running.join_next().await
        {
            take(&mut results, joined);
        }
        // What a task that panics leaves behind.
        results.push(Err(Ended::MemoryFailed));
        running.spawn(async move { (index, work.await) });
    }
    while let Some(joined) = running.join_next().await {
        take(&mut results, joined);
    }
    results
}
