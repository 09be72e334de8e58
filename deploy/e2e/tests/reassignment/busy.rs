//! A device that writes all the time, and late what it should have forgotten.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use iommu_e2e::raw::Door;
use iommu_e2e::raw_device::{NO_CONTEXT, RawDevice, STALE, WRITE_DENIED, identity, writes};
use iommu_e2e::stage::{Stage, eventually};
use iommu_proto::pb;
use iommu_proto::pb::device_to_server::Message as Up;
use iommu_proto::pb::server_to_device::Message as Down;
use iommu_types::DeviceAddress;
use tokio::task::JoinHandle;

/// Batches in flight.
const IN_FLIGHT: usize = 8;
/// Writes in a batch, of this many bytes each: together a page.
const WRITES: u64 = 8;
const WRITE_BYTES: u64 = 4096 / WRITES;

/// What becomes of a reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OnReset {
    /// The backlog is sent late, then the reset is answered, then the backlog is sent again and again under its old generation.
    Answer,
    /// It is never answered, and the backlog is sent for ever.
    Ignore,
    /// The backlog is sent, the connection is dropped, and another is made.
    Leave,
}

/// Where it writes, and what: words that name tenant and round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Aim {
    pub(crate) iova: u64,
    pub(crate) pattern: u64,
}

/// What was sent, which decides what may become of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sent {
    /// For the owner of now, as far as the device knows.
    Current(u64),
    /// For an earlier owner, after its reset was asked for.
    Late,
}

/// What it is told, and what came of it.
#[derive(Debug, Default)]
struct Shared {
    aim: Mutex<Option<Aim>>,
    /// The pattern that lands now, and how many writes did.
    landed: Mutex<(u64, u64)>,
    /// Refusals by their code.
    refused: Mutex<BTreeMap<u32, u64>>,
    late: AtomicU64,
    ignores: AtomicBool,
    stop: AtomicBool,
}

/// The device.
#[derive(Debug)]
pub(crate) struct Busy {
    pub(crate) address: DeviceAddress,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

struct Session {
    raw: RawDevice,
    shared: Arc<Shared>,
    on_reset: OnReset,
    in_flight: VecDeque<Sent>,
    /// Its generation, as far as it knows.
    known: u64,
    /// What was queued under an earlier generation.
    backlog: Option<(Aim, u64)>,
    turn: u64,
}

impl Busy {
    /// Connects, and has nothing to do yet.
    pub(crate) async fn start(stage: &Stage, name: &str, address: DeviceAddress, on_reset: OnReset) -> Self {
        let shared = Arc::new(Shared::default());
        shared.ignores.store(on_reset == OnReset::Ignore, Ordering::SeqCst);
        let own = identity(name, address);
        let door = Door::to(&stage.server, &own);
        let mut raw = RawDevice::claim(&door, &own, (name, address)).await.expect("it is admitted");
        let of_task = Arc::clone(&shared);
        let task = tokio::spawn(async move {
            let mut backlog = None;
            loop {
                let known = raw.welcome.assignment_generation;
                let (shared, in_flight) = (Arc::clone(&of_task), VecDeque::new());
                let session = Session { raw, shared, on_reset, in_flight, known, backlog, turn: 0 };
                match session.run().await {
                    None => return,
                    Some(left) => backlog = Some(left),
                }
                let back = RawDevice::claim(&door, &own, (&own.name, address)).await;
                raw = back.expect("it comes back");
            }
        });
        Self { address, shared, task }
    }

    /// Writes here from now on.
    pub(crate) fn aim(&self, aim: Aim) {
        *self.shared.landed.lock().expect("no panic under the lock") = (aim.pattern, 0);
        *self.shared.aim.lock().expect("no panic under the lock") = Some(aim);
    }

    /// Waits until so many of the writes that it is aimed at have landed.
    pub(crate) async fn has_landed(&self, least: u64) {
        eventually(Duration::from_secs(10), "its writes land", async || {
            assert!(!self.task.is_finished(), "the device saw what must not be");
            (self.shared.landed.lock().expect("no panic under the lock").1 >= least).then_some(())
        })
        .await;
    }

    /// How many late writes were sent and refused so far.
    pub(crate) fn late(&self) -> u64 {
        self.shared.late.load(Ordering::SeqCst)
    }

    /// Waits until so many more late writes were refused.
    pub(crate) async fn is_late(&self, more: u64) {
        let before = self.late();
        eventually(Duration::from_secs(10), "late writes are refused", async || {
            assert!(!self.task.is_finished(), "a late write was not refused as it must be");
            (self.late() >= before + more).then_some(())
        })
        .await;
    }

    /// It answers resets from now on, the latest that it ignored too.
    pub(crate) fn relent(&self) {
        self.shared.ignores.store(false, Ordering::SeqCst);
    }

    /// Stops it; gives its refusals by their code.
    pub(crate) async fn stop(self) -> BTreeMap<u32, u64> {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.task.await.expect("the device saw nothing that must not be");
        let refused = self.shared.refused.lock().expect("no panic under the lock");
        refused.clone()
    }
}

fn batch_of(aim: Aim, generation: Option<u64>) -> pb::DmaBatch {
    let at: Vec<u64> = (0..WRITES).map(|index| aim.iova + index * WRITE_BYTES).collect();
    let words = usize::try_from(WRITE_BYTES / 8).expect("few");
    pb::DmaBatch {
        assignment_generation: generation,
        ..writes(&at, &aim.pattern.to_le_bytes().repeat(words))
    }
}

impl Session {
    /// Runs until it is stopped (`None`) or leaves with a backlog.
    async fn run(mut self) -> Option<(Aim, u64)> {
        let mut ignored = None;
        loop {
            let stops = self.shared.stop.load(Ordering::SeqCst);
            if stops && self.in_flight.is_empty() {
                return None;
            }
            if let Some(reset) = ignored
                && !self.shared.ignores.load(Ordering::SeqCst)
            {
                self.answer(reset).await;
                ignored = None;
            }
            while !stops && self.in_flight.len() < IN_FLIGHT {
                if !self.write(ignored.as_ref()).await {
                    break;
                }
            }
            let heard = tokio::select! {
                heard = self.raw.hear() => heard.expect("the session stands"),
                () = tokio::time::sleep(Duration::from_millis(1)) => continue,
            };
            match heard {
                Down::Dma(completions) => self.judge(&completions),
                Down::Reset(reset) => {
                    self.be_late(&reset).await;
                    match self.on_reset {
                        OnReset::Leave if self.backlog.is_some() => return self.backlog,
                        OnReset::Ignore if self.shared.ignores.load(Ordering::SeqCst) => {
                            ignored = Some(reset)
                        }
                        OnReset::Answer | OnReset::Ignore | OnReset::Leave => self.answer(reset).await,
                    }
                }
                other => panic!("a completion or a reset was expected, not {other:?}"),
            }
        }
    }

    /// Writes the next batch; `false` when there is none.
    async fn write(&mut self, ignored: Option<&pb::Reset>) -> bool {
        self.turn += 1;
        if let Some((aim, generation)) = self.backlog
            && (self.turn.is_multiple_of(2) || ignored.is_some())
        {
            // Under the generation of then; a device that did not say that it was reset may claim whatever it likes.
            let claimed = match (ignored, self.turn % 3) {
                (Some(_), 0) => None,
                (Some(reset), 1) => Some(reset.assignment_generation),
                _ => Some(generation),
            };
            self.send(batch_of(aim, claimed), Sent::Late).await;
            return true;
        }
        let aim = *self.shared.aim.lock().expect("no panic under the lock");
        let Some(aim) = aim else { return false };
        let claimed = self.turn.is_multiple_of(3).then_some(self.known);
        self.send(batch_of(aim, claimed), Sent::Current(aim.pattern)).await;
        true
    }

    async fn send(&mut self, batch: pb::DmaBatch, sent: Sent) {
        self.raw.send(batch).await;
        self.in_flight.push_back(sent);
    }

    /// A reset was asked for: what was queued for the owner before becomes the backlog, and is sent with every claim there is.
    async fn be_late(&mut self, reset: &pb::Reset) {
        let aim = self.shared.aim.lock().expect("no panic under the lock").take();
        if let Some(aim) = aim {
            self.backlog = Some((aim, self.known));
        }
        let Some((aim, generation)) = self.backlog else { return };
        for claimed in [None, Some(generation), Some(reset.assignment_generation), Some(u64::MAX), Some(0)] {
            self.send(batch_of(aim, claimed), Sent::Late).await;
        }
    }

    async fn answer(&mut self, reset: pb::Reset) {
        self.known = reset.assignment_generation;
        self.raw.say(Up::ResetDone(pb::ResetDone { tag: reset.tag })).await;
    }

    /// Checks what became of the oldest batch.
    fn judge(&mut self, completions: &pb::DmaCompletions) {
        let sent = self.in_flight.pop_front().expect("answers are to batches");
        let refusals = completions.fault_reason.len() as u64;
        {
            let mut refused = self.shared.refused.lock().expect("no panic under the lock");
            completions.fault_reason.iter().for_each(|code| *refused.entry(*code).or_default() += 1);
        }
        let codes = &completions.fault_reason;
        match sent {
            Sent::Late => {
                let all_stale = codes.iter().all(|code| *code == STALE);
                assert!(refusals == WRITES && all_stale, "a late write was not refused as stale: {codes:x?}");
                self.shared.late.fetch_add(refusals, Ordering::SeqCst);
            }
            Sent::Current(pattern) => {
                let is_moving = |code: &u32| [NO_CONTEXT, STALE, WRITE_DENIED].contains(code);
                assert!(codes.iter().all(is_moving), "refused for another reason: {codes:x?}");
                let mut landed = self.shared.landed.lock().expect("no panic under the lock");
                if landed.0 == pattern {
                    landed.1 += WRITES - refusals;
                }
            }
        }
    }
}
