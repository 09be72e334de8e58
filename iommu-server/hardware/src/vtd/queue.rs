//! The invalidation queue: descriptors in memory, fetched between head and tail (VT-d 5.10 §6.5.2).
//!
//! The head moves when a descriptor has been taken. At a bad one it stays: IQE is set, IQERCD says why, and nothing is
//! fetched until software clears IQE, which fetches the same place again.
//!
//! **Architecture invariant (I1):** a wait descriptor completes only after the drains of every invalidation before it.

use iommu_types::Hpa;

use super::spec::invalidation::{Descriptor, QueueError, StatusWrite};
use super::spec::registers::Iqa;
use super::unit::Unit;
use super::walk::RootMode;
use crate::drain::PendingDrain;

/// Descriptors that one step takes at most, because a step runs inside somebody's register write: 64 invalidations are
/// some tens of microseconds, and Linux submits at most 16 at once.
pub const QUEUE_DESCRIPTORS_PER_STEP: u32 = 64;

/// Invalidations whose drains are joined before the queue waits for them by itself, so that a queue without wait
/// descriptors keeps a bounded number of drains.
const DRAINS_JOINED_MAX: u32 = 64;

/// What one step of the queue came to.
pub(super) enum Step {
    /// There is nothing to take: empty, off, or stopped at an error.
    Nothing,
    /// A descriptor was taken.
    Taken,
    /// A wait descriptor was taken; it completes when the drain does.
    Wait(PendingDrain, Wait),
    /// Many invalidations are not drained yet; go on when they are.
    Joined(PendingDrain),
    /// The queue has stopped at an error.
    Stopped,
}

/// What a wait descriptor does when it completes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wait {
    pub(super) interrupt: bool,
    pub(super) status_write: Option<StatusWrite>,
}

/// The queue of one register file.
pub(super) struct Queue {
    address: Iqa,
    head_bytes: u64,
    tail_bytes: u64,
    running: bool,
    error: Option<QueueError>,
    /// The drains of the invalidations since the last wait descriptor.
    drains: PendingDrain,
    drains_joined_count: u32,
}

impl Queue {
    const POINTER_BITS: u64 = 0x7_fff0;

    pub(super) fn new() -> Self {
        Self {
            address: Iqa::new(),
            head_bytes: 0,
            tail_bytes: 0,
            running: false,
            error: None,
            drains: PendingDrain::none(),
            drains_joined_count: 0,
        }
    }
    pub(super) fn head(&self) -> u64 {
        self.head_bytes
    }
    pub(super) fn tail(&self) -> u64 {
        self.tail_bytes
    }
    pub(super) fn set_tail(&mut self, register: u64) {
        self.tail_bytes = register & Self::POINTER_BITS;
    }
    pub(super) fn address(&self) -> u64 {
        self.address.into_bits()
    }
    /// Software may move the queue only while it is off.
    pub(super) fn set_address(&mut self, register: u64) {
        if !self.running {
            let written = Iqa::from_bits(register);
            self.address =
                Iqa::new().with_frame(written.frame()).with_wide(written.wide()).with_size(written.size());
        }
    }
    /// IQEI, 0 while there is no error.
    pub(super) fn error_code(&self) -> u8 {
        self.error.map_or(0, |error| error.0)
    }
    /// IQE was cleared: the fetch goes on, at the descriptor where it stopped.
    pub(super) fn clear_error(&mut self) {
        self.error = None;
    }
    pub(super) fn start(&mut self) {
        self.running = true;
    }
    /// No more descriptors are taken. The queue is off when what was taken has drained: then call [`reset`](Self::reset).
    pub(super) fn stop(&mut self) -> PendingDrain {
        self.running = false;
        self.take_drains()
    }
    /// QIE has gone off: the head starts over.
    pub(super) fn reset(&mut self) {
        self.head_bytes = 0;
    }
    /// Whether a step would do something.
    pub(super) fn has_work(&self) -> bool {
        self.running && self.error.is_none() && self.head_bytes != self.tail_bytes
    }
    /// Takes one descriptor and carries it out.
    pub(super) fn step(&mut self, unit: &Unit) -> Step {
        if !self.has_work() {
            return Step::Nothing;
        }
        let descriptor = match self.fetch(unit) {
            Ok(descriptor) => descriptor,
            Err(error) => {
                self.error = Some(error);
                unit.faults.set_queue_error(unit.events());
                return Step::Stopped;
            }
        };
        self.head_bytes = (self.head_bytes + self.address.descriptor_bytes()) % self.address.bytes();
        match descriptor {
            Descriptor::Invalidate(what) => self.join(unit.invalidate(what)),
            // What follows waits for every wait descriptor, so a fence (FN) asks for nothing more.
            Descriptor::Wait { interrupt, status_write, fence: _ } => {
                Step::Wait(self.take_drains(), Wait { interrupt, status_write })
            }
        }
    }

    fn fetch(&self, unit: &Unit) -> Result<Descriptor, QueueError> {
        // No other table mode is built, so none is valid.
        if unit.root_table().mode != RootMode::Legacy {
            return Err(QueueError::TABLE_MODE);
        }
        if self.tail_bytes >= self.address.bytes() {
            return Err(QueueError::TAIL_BEYOND_QUEUE);
        }
        if !self.tail_bytes.is_multiple_of(self.address.descriptor_bytes()) {
            return Err(QueueError::TAIL_MISALIGNED);
        }
        let load = |offset_bytes: u64| {
            Hpa::new(self.address.frame() << 12)
                .checked_add(self.head_bytes + offset_bytes)
                .and_then(|at| unit.memory().load_u128(at).ok())
                .ok_or(QueueError::FETCH)
        };
        let high = if self.address.wide() { Some(load(16)?) } else { None };
        Descriptor::decode(load(0)?, high, unit.capabilities())
    }
    fn join(&mut self, pending: PendingDrain) -> Step {
        let joined = self.take_drains_keeping_count().and(pending);
        match joined.try_complete() {
            Ok(_drained) => self.drains_joined_count = 0,
            Err(pending) => {
                self.drains = pending;
                self.drains_joined_count += 1;
            }
        }
        if self.drains_joined_count < DRAINS_JOINED_MAX {
            return Step::Taken;
        }
        Step::Joined(self.take_drains())
    }
    fn take_drains(&mut self) -> PendingDrain {
        self.drains_joined_count = 0;
        self.take_drains_keeping_count()
    }
    fn take_drains_keeping_count(&mut self) -> PendingDrain {
        std::mem::replace(&mut self.drains, PendingDrain::none())
    }
}
