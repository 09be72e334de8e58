//! Register accesses on their way to a device and back.
//!
//! A device says how many it takes at once (credits). A call holds a credit from before it is queued until the device has answered, even
//! when the caller has long given up: what a device still has to answer counts against it, not against us.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use iommu_proto::model::{MmioAccess, MmioRequest};
use iommu_proto::pb;
use iommu_types::DeviceAddress;
use iommu_types::errors::{DeviceAbsent, DeviceTimeout, LimitReached, MmioError, MmioRefused};
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use super::mailbox::Mailbox;
use crate::bounds;

type Outcome = Result<u64, String>;

#[derive(Debug)]
struct Pending {
    reply: oneshot::Sender<Outcome>,
    _credit: OwnedSemaphorePermit,
}

/// Lets a caller access registers; void from the next [`MmioPort::expel`] on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ticket(u64);

/// The accesses of one session that are under way.
#[derive(Debug)]
pub(crate) struct MmioPort {
    device: DeviceAddress,
    credits: Arc<Semaphore>,
    waiting: AtomicUsize,
    next_tag: AtomicU64,
    /// How often callers were expelled. Written under the lock of `pending`.
    expelled: AtomicU64,
    /// `None` once the session has ended.
    pending: Mutex<Option<HashMap<u64, Pending>>>,
}

/// Takes the request back if the caller goes away before it was sent.
struct Withdraw<'a> {
    port: &'a MmioPort,
    mailbox: &'a Mailbox,
    tag: u64,
}

impl Drop for Withdraw<'_> {
    fn drop(&mut self) {
        if self.mailbox.withdraw_mmio(self.tag)
            && let Some(pending) = self.port.pending.lock().as_mut()
        {
            pending.remove(&self.tag);
        }
    }
}

struct Waiting<'a>(&'a AtomicUsize);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl MmioPort {
    pub(crate) fn new(device: DeviceAddress, credits: u32) -> Self {
        Self {
            device,
            credits: Arc::new(Semaphore::new(credits as usize)),
            waiting: AtomicUsize::new(0),
            next_tag: AtomicU64::new(1),
            expelled: AtomicU64::new(0),
            pending: Mutex::new(Some(HashMap::new())),
        }
    }

    /// Taken before it is asked whether the caller may access the device. Whoever takes the device away says so first and expels then, so
    /// an access that waited for a credit meanwhile does not reach a device that is another's.
    pub(crate) fn ticket(&self) -> Ticket {
        Ticket(self.expelled.load(Ordering::Acquire))
    }
    /// Accesses that are not in the mailbox yet never will be.
    pub(crate) fn expel(&self) {
        let _pending = self.pending.lock();
        self.expelled.fetch_add(1, Ordering::AcqRel);
    }

    /// Sends the access and waits for the answer, at most [`bounds::MMIO_TIMEOUT`] in all.
    pub(crate) async fn call(
        &self,
        mailbox: &Mailbox,
        ticket: Ticket,
        access: MmioAccess,
    ) -> Result<u64, MmioError> {
        let call = self.call_untimed(mailbox, ticket, access);
        match tokio::time::timeout(bounds::MMIO_TIMEOUT, call).await {
            Ok(outcome) => outcome,
            Err(_) => {
                let waited_ms = bounds::MMIO_TIMEOUT.as_millis() as u64;
                Err(DeviceTimeout { device: self.device, waited_ms }.into())
            }
        }
    }

    async fn call_untimed(
        &self,
        mailbox: &Mailbox,
        ticket: Ticket,
        access: MmioAccess,
    ) -> Result<u64, MmioError> {
        let absent = || MmioError::from(DeviceAbsent { device: self.device });
        let credit = self.credit().await?;
        let tag = self.next_tag.fetch_add(1, Ordering::Relaxed);
        let (reply, answer) = oneshot::channel();
        {
            let mut pending = self.pending.lock();
            if self.ticket() != ticket {
                return Err(absent());
            }
            pending.as_mut().ok_or_else(absent)?.insert(tag, Pending { reply, _credit: credit });
            // Under the lock, so that a reset that follows an expulsion is behind it.
            mailbox.push(pb::server_to_device::Message::Mmio(MmioRequest { tag, access }.into()));
        }
        let withdraw = Withdraw { port: self, mailbox, tag };
        let outcome = answer.await;
        std::mem::forget(withdraw);
        match outcome {
            Ok(Ok(value)) => Ok(value & access.width.mask()),
            Ok(Err(why)) => Err(MmioRefused { device: self.device, offset: access.offset, why }.into()),
            Err(_) => Err(absent()),
        }
    }

    async fn credit(&self) -> Result<OwnedSemaphorePermit, MmioError> {
        if let Ok(credit) = Arc::clone(&self.credits).try_acquire_owned() {
            return Ok(credit);
        }
        let before = self.waiting.fetch_add(1, Ordering::Relaxed);
        let _waiting = Waiting(&self.waiting);
        if before >= bounds::MMIO_WAITING_MAX {
            let limit = "mmio_waiting_per_device".to_owned();
            return Err(LimitReached { limit, allowed: bounds::MMIO_WAITING_MAX as u64 }.into());
        }
        let credit = Arc::clone(&self.credits).acquire_owned().await;
        credit.map_err(|_| DeviceAbsent { device: self.device }.into())
    }

    /// The device's answer; `false` when nothing with this tag is outstanding.
    pub(crate) fn complete(&self, tag: u64, outcome: Outcome) -> bool {
        let pending = self.pending.lock().as_mut().and_then(|pending| pending.remove(&tag));
        // The caller may have given up; the credit returns all the same.
        pending.map(|pending| pending.reply.send(outcome)).is_some()
    }

    /// Every call under way, and every later one, finds the device absent.
    pub(crate) fn close(&self) {
        self.credits.close();
        self.pending.lock().take();
    }
}
