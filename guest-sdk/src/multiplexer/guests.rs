//! The memory of the guests: whose a range is, and copies in and out.

use std::collections::{HashMap, hash_map};
use std::time::{Duration, Instant};

use bytes::Bytes;
use iommu_types::GpaRange;
use iommu_types::errors::MemoryError;
use tokio::task::JoinSet;

use super::awaited::Awaited;
use super::codec::{Ended, Entry};
use crate::page_runs::PageRuns;
use crate::{Hypervisor, Never, SdkError};

/// Copies of one batch that are under way at once: enough to hide a round trip, and few beside a connection's 4 MiB.
const COPIES_MAX: usize = 16;
/// How often one guest may have the memory of machines asked for.
const ASK_AGAIN: Duration = Duration::from_millis(100);

/// The guests of a hypervisor, with what is known of their memory. That may be old; the server decides when it is copied.
#[derive(Debug)]
pub(super) struct Guests {
    hypervisor: Hypervisor,
    known: HashMap<u32, PageRuns>,
    asked: Asked,
}

/// When each guest has had the memory of all asked for: one that names what it does not have must not have the server list all machines each time.
#[derive(Debug, Default)]
struct Asked(HashMap<u32, Instant>);

impl Asked {
    fn may(&mut self, guest: u32, now: Instant) -> bool {
        self.0.retain(|_, asked| now.duration_since(*asked) < ASK_AGAIN);
        match self.0.entry(guest) {
            hash_map::Entry::Occupied(_) => false,
            hash_map::Entry::Vacant(place) => {
                place.insert(now);
                true
            }
        }
    }
}

impl Guests {
    pub(super) fn new(hypervisor: Hypervisor) -> Self {
        Self { hypervisor, known: HashMap::new(), asked: Asked::default() }
    }

    /// Which of the entries are refused: those whose range is not all the guest's own memory. What is not known yet is asked
    /// for, at most once in [`ASK_AGAIN`] for each guest: memory that a guest was given right after it had named what it did not have is its own a moment later.
    pub(super) async fn own(&mut self, guest: u32, entries: &[Entry]) -> Vec<Option<Ended>> {
        let covered = |guests: &Self, entry: &Entry| {
            guests.known.get(&guest).is_some_and(|memory| memory.cover(entry.range))
        };
        let mut refused = Ended::NotYours;
        if !entries.iter().all(|entry| covered(self, entry))
            && self.asked.may(guest, Instant::now())
            && let Err(error) = self.learn().await
        {
            tracing::warn!(vm = guest, %error, "the memory of guests is not known");
            refused = Ended::MemoryFailed;
        }
        entries.iter().map(|entry| (!covered(self, entry)).then_some(refused)).collect()
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

    /// Writes every packet that there is to its entry's range, once and while somebody waits for it.
    pub(super) async fn write(
        &self,
        guest: u32,
        entries: &[Entry],
        packets: Vec<Result<Bytes, Ended>>,
        awaited: &Awaited,
    ) -> Vec<Ended> {
        let memory = self.hypervisor.memory(guest);
        let copies = entries.iter().zip(packets).map(|(entry, packet)| {
            let (memory, gpa, awaited) = (memory.clone(), entry.range.base(), awaited.clone());
            async move {
                let packet = packet?;
                let bytes = packet.len() as u32;
                // The device may have taken its time, and so may the copies before this one.
                if awaited.over().is_some() {
                    return Err(Ended::MemoryFailed);
                }
                if bytes > 0 {
                    memory.write_once(gpa, packet).await.map_err(memory_failed)?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn i7_a_guest_has_memory_asked_for_once_in_a_while_and_keeps_no_other_from_it() {
        let (mut asked, start) = (Asked::default(), Instant::now());
        let rows = [
            (1, 0, true),
            (1, 1, false),
            (2, 1, true),
            (1, 99, false),
            (1, 100, true),
            (1, 150, false),
            (2, 101, true),
        ];
        for (guest, at_ms, may) in rows {
            assert_eq!(
                asked.may(guest, start + Duration::from_millis(at_ms)),
                may,
                "vm:{guest} at {at_ms} ms"
            );
        }
        assert!(asked.may(3, start + ASK_AGAIN * 9) && asked.0.len() == 1, "what is long ago is forgotten");
    }
}
