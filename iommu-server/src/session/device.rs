//! The session of a device as the rest of the server sees it: where MMIO and resets go in, and where it is ended.
//!
//! The stream itself ([`DeviceStream`](super::DeviceStream)) runs inside the task of its HTTP/2 stream and owns the port.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use crossbeam_utils::CachePadded;
use iommu_proto::model::MmioAccess;
use iommu_proto::pb;
use iommu_types::DeviceAddress;
use iommu_types::errors::MmioError;
use tokio::sync::watch;

use super::mailbox::Mailbox;
use super::mmio::{MmioPort, Ticket};
use crate::bounds;
use crate::connection::ConnectionHandle;
use crate::ending::Ending;
use crate::telemetry::warn_limited;

/// Whether the stream's last message has left the server. The transport asks a stream for its next message only when it has
/// room, so being asked again after the last message is the sign that it left.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    /// Counts polls; a number that stands still is a stream that is not asked.
    polls: AtomicU64,
    phase: AtomicU8,
}

const IDLE: u8 = 0;
/// A message was handed out.
const HANDED_OUT: u8 = 1;
/// Nothing more was there when asked in the same breath: the message is being written.
const WRITING: u8 = 2;

impl Progress {
    /// The stream is asked for a message. Only its own task calls this, so plain loads and stores will do.
    pub(crate) fn polled(&self) {
        self.polls.store(self.polls.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
    }
    pub(crate) fn handed_out(&self) {
        self.phase.store(HANDED_OUT, Ordering::Relaxed);
    }
    pub(crate) fn nothing(&self) {
        let next = if self.phase.load(Ordering::Relaxed) == HANDED_OUT { WRITING } else { IDLE };
        self.phase.store(next, Ordering::Relaxed);
    }
    pub(crate) fn polls(&self) -> u64 {
        self.polls.load(Ordering::Relaxed)
    }
    pub(crate) fn is_idle(&self) -> bool {
        self.phase.load(Ordering::Relaxed) == IDLE
    }
}

/// A live session of a device.
#[derive(Debug)]
pub struct DeviceSession {
    /// Whose.
    pub address: DeviceAddress,
    /// The how manieth session of that device.
    pub generation: u64,
    pub(crate) progress: CachePadded<Progress>,
    pub(crate) mailbox: Mailbox,
    pub(crate) mmio: MmioPort,
    /// Tag of the latest reset, which is the generation that it told.
    resets_asked: AtomicU64,
    /// The device's generation as far as the device knows: of Welcome, then of the latest reset that it answered. DMA that comes before is of the
    /// one before, as the stream keeps its order.
    acknowledged: AtomicU64,
    /// The latest that was answered; all of them once the session is over.
    resets_done: watch::Sender<u64>,
    ending: OnceLock<Ending>,
    /// Held while a batch is carried out. Only a session that has ended is waited for.
    pub(crate) executing: Arc<tokio::sync::Mutex<()>>,
    gone: AtomicBool,
    connection: ConnectionHandle,
}

impl DeviceSession {
    pub(crate) fn new(
        address: DeviceAddress,
        generation: u64,
        assignment: u64,
        mmio_credits: u32,
        connection: ConnectionHandle,
    ) -> Arc<Self> {
        Arc::new(Self {
            address,
            generation,
            progress: CachePadded::default(),
            mailbox: Mailbox::default(),
            mmio: MmioPort::new(address, mmio_credits),
            resets_asked: AtomicU64::new(assignment),
            acknowledged: AtomicU64::new(assignment),
            resets_done: watch::Sender::new(0),
            ending: OnceLock::new(),
            executing: Arc::default(),
            gone: AtomicBool::new(false),
            connection,
        })
    }
    /// A register access by somebody who was found to be allowed to after the ticket was taken.
    pub(crate) async fn mmio(&self, ticket: Ticket, access: MmioAccess) -> Result<u64, MmioError> {
        self.mmio.call(&self.mailbox, ticket, access).await
    }
    /// Resolves when the batch is over that was being carried out when the session ended: no DMA of it comes after.
    pub(crate) fn quiet(&self) -> impl Future<Output = ()> + Send + 'static {
        let executing = Arc::clone(&self.executing);
        async move { drop(executing.lock().await) }
    }
    /// The generation of the device that it knows of.
    pub(crate) fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Ordering::Acquire)
    }
    /// Asks the device to forget everything, tells it its next generation, and waits until it says that it did, at most [`bounds::RESET_TIMEOUT`]. A device that
    /// does not say so is not trusted to have done it; until it does, all its DMA is refused as stale. Register accesses that wait for a credit are
    /// refused: they are meant for the device as it was. Returns whether it said so.
    pub async fn reset(&self, assignment: u64) -> bool {
        let tag = assignment;
        self.resets_asked.fetch_max(tag, Ordering::Relaxed);
        let mut done = self.resets_done.subscribe();
        self.mmio.expel();
        self.mailbox.withdraw_resets();
        self.mailbox
            .push(pb::server_to_device::Message::Reset(pb::Reset { tag, assignment_generation: assignment }));
        if self.acknowledged().saturating_add(1) < assignment {
            // It has not answered the reset before either, so it is not waited for again; all its DMA is stale already.
            return false;
        }
        let answered = done.wait_for(|done| *done >= tag);
        match tokio::time::timeout(bounds::RESET_TIMEOUT, answered).await {
            // At the end of a session nobody waits any more, and nothing was said.
            Ok(done) => done.is_ok_and(|done| *done != u64::MAX),
            Err(_) => {
                warn_limited!(device = %self.address, generation = self.generation, "device not reset in time");
                false
            }
        }
    }
    /// The device says that it was reset; `false` when nobody asked.
    pub(crate) fn reset_done(&self, tag: u64) -> bool {
        let asked = self.resets_asked.load(Ordering::Relaxed);
        if tag <= self.acknowledged() || tag > asked {
            return false;
        }
        self.acknowledged.store(tag, Ordering::Release);
        self.resets_done.send_modify(|done| *done = tag.max(*done));
        true
    }
    /// Ends it; `true` when this call did. No batch of it begins from now on; for one under way see `quiet`.
    pub fn end(&self, why: Ending) -> bool {
        let label = why.label();
        if self.ending.set(why).is_err() {
            return false;
        }
        self.close();
        self.mailbox.wake();
        warn_limited!(device = %self.address, generation = self.generation, reason = label, "device session ended");
        true
    }
    /// Nobody waits for the device any more.
    fn close(&self) {
        self.mmio.close();
        self.resets_done.send_modify(|done| *done = u64::MAX);
    }
    /// Why it ended, when it did.
    pub fn ended(&self) -> Option<&Ending> {
        self.ending.get()
    }
    /// The stream is gone.
    pub(crate) fn leave(&self) {
        self.close();
        self.gone.store(true, Ordering::Release);
    }
    pub(crate) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }
    /// Whether something is to be sent or being written.
    pub(crate) fn is_sending(&self) -> bool {
        !self.progress.is_idle() || self.mailbox.is_waiting()
    }
    /// Whether it stands on that connection.
    pub(crate) fn is_on(&self, connection: &ConnectionHandle) -> bool {
        self.connection.is(connection)
    }
    /// Cuts the connection of a peer that does not even read why its session ended.
    pub(crate) fn cut(&self) {
        self.connection.cut();
    }
}
