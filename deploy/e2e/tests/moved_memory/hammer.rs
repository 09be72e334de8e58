//! A device that writes into several mappings at once, without end.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use device_runtime::{Batch, Dma};
use iommu_e2e::stage::eventually;
use iommu_types::{FaultReason, Iova};
use tokio::task::JoinHandle;

/// Batches in flight.
const LANES: usize = 2;
/// Bytes of a write.
const WRITE_BYTES: usize = 64;

/// What refusals of a device are for, when it has lost its memory.
const REASONS: [FaultReason; 3] =
    [FaultReason::WRITE_DENIED, FaultReason::RING_SLOT_INVALID, FaultReason::CONTEXT_NOT_PRESENT];

/// Where it writes, and what.
#[derive(Clone, Debug, Default)]
pub(crate) struct Aim {
    pub(crate) iovas: Vec<Iova>,
    pub(crate) pattern: u64,
    /// Whether nothing that is sent from now on may succeed.
    pub(crate) is_dead: bool,
}

/// Places that it writes to at once, at most.
const PLACES_MAX: usize = 12;

impl Aim {
    /// One more place, unless there are many.
    pub(crate) fn add(&mut self, iova: Iova) {
        if self.iovas.len() < PLACES_MAX {
            self.iovas.push(iova);
        }
    }
}

#[derive(Debug, Default)]
struct Shared {
    aim: Mutex<Aim>,
    landed: AtomicU64,
    refused: AtomicU64,
    /// Rounds of the lanes, resting or not.
    turns: [AtomicU64; LANES],
}

/// The device.
#[derive(Debug)]
pub(crate) struct Hammer {
    shared: Arc<Shared>,
    lanes: Vec<JoinHandle<()>>,
}

impl Hammer {
    pub(crate) fn start(dma: &Dma) -> Self {
        let shared = Arc::<Shared>::default();
        let lane = |lane: usize| tokio::spawn(run(dma.clone(), Arc::clone(&shared), lane));
        let lanes = (0..LANES).map(lane).collect();
        Self { shared, lanes }
    }

    /// Changes where it writes.
    pub(crate) fn change(&self, change: impl FnOnce(&mut Aim)) {
        change(&mut self.shared.aim.lock().expect("no panic under the lock"));
    }

    fn is_well(&self) {
        let broken = self.lanes.iter().any(JoinHandle::is_finished);
        assert!(!broken, "the device saw what must not be");
    }

    async fn grows(&self, what: &str, counter: &AtomicU64, by: u64) {
        let before = counter.load(Ordering::SeqCst);
        eventually(Duration::from_secs(10), what, async || {
            self.is_well();
            (counter.load(Ordering::SeqCst) >= before + by).then_some(())
        })
        .await;
    }

    /// Waits until so many more of its writes have landed.
    pub(crate) async fn lands(&self, more: u64) {
        self.grows("its writes land", &self.shared.landed, more).await;
    }

    /// Waits until it has sent and heard of so many more batches.
    pub(crate) async fn attempts(&self, more: u64) {
        self.grows("it goes on", &self.shared.turns[0], more).await;
    }

    /// Has it write nowhere, and returns when nothing is in flight.
    pub(crate) async fn rest(&self) {
        self.change(|aim| *aim = Aim::default());
        for turns in &self.shared.turns {
            // The first may have begun before; the second began after.
            self.grows("it rests", turns, 2).await;
        }
    }

    /// How many writes landed and were refused.
    pub(crate) fn stop(&self) -> (u64, u64) {
        self.is_well();
        self.lanes.iter().for_each(JoinHandle::abort);
        (self.shared.landed.load(Ordering::SeqCst), self.shared.refused.load(Ordering::SeqCst))
    }
}

async fn run(dma: Dma, shared: Arc<Shared>, lane: usize) {
    loop {
        let aim = shared.aim.lock().expect("no panic under the lock").clone();
        if aim.iovas.is_empty() {
            tokio::time::sleep(Duration::from_micros(200)).await;
            shared.turns[lane].fetch_add(1, Ordering::SeqCst);
            continue;
        }
        let mut batch = Batch::with_capacity(aim.iovas.len() * 4);
        for iova in &aim.iovas {
            for offset in [0, 1024, 2048, 4096 - WRITE_BYTES as u64] {
                let at = iova.checked_add(offset).expect("inside the page");
                batch.write(at, aim.pattern.to_le_bytes().repeat(WRITE_BYTES / 8));
            }
        }
        let writes = batch.len() as u64;
        let completed = dma.execute(batch).await.expect("the session stands");
        let faults = completed.faults().len() as u64;
        assert!(
            !aim.is_dead || faults == writes,
            "I9: {} of {writes} writes landed after the memory was gone",
            writes - faults
        );
        for (_, fault) in completed.faults() {
            assert!(fault.reason.is_ok_and(|reason| REASONS.contains(&reason)), "{fault:?}");
        }
        shared.landed.fetch_add(writes - faults, Ordering::SeqCst);
        shared.refused.fetch_add(faults, Ordering::SeqCst);
        shared.turns[lane].fetch_add(1, Ordering::SeqCst);
    }
}
