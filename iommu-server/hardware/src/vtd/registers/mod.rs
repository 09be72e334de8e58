//! The register page: the front end of a bare unit (VT-d 5.10 §11.4).
//!
//! Every register of legacy mode with queued invalidation and interrupt remapping is here, read and written in aligned 4- or
//! 8-byte accesses. Reserved offsets read as zero and take no writes. What a command does is done by the unit's typed operations;
//! what is here is *when*: RTADDR and IRTA act only on SRTP and SIRTP, and a status bit changes only when the drain behind
//! it is done.
//!
//! A write never waits. It goes as far as it can and answers [`WriteEffect::Unfinished`] when something is left, which
//! [`RegisterFile::run_queue`] carries on from a task:
//!
//! ```text
//!   write ─► effect waits for its drain ─► run_queue: Draining(drain) ─ await ─► run_queue: effect happens, status changes
//! ```

mod command;
mod page;
mod progress;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use iommu_types::{AccessWidth, Granularity};

pub use iommu_types::errors::BadRegisterAccess;
pub use progress::{HeldDrain, QueueProgress};

use super::event::EventRegisters;
use super::queue::{QUEUE_DESCRIPTORS_PER_STEP, Queue, Step, Wait};
use super::spec::registers::{Ccmd, GlobalCommand, Gsts, Ics, Iotlb, register_set_bytes};
use super::unit::Unit;
use progress::{Front, Waiting};

/// What a register write left behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteEffect {
    /// Nothing: all it meant is done.
    Settled,
    /// Work that [`RegisterFile::run_queue`] carries on.
    Unfinished,
}

/// What happens when a drain is done.
#[derive(Clone, Copy, Debug)]
enum Effect {
    /// TES changes.
    Translation(bool),
    /// IRES changes.
    InterruptRemapping(bool),
    /// RTPS rises.
    RootTable,
    /// IRTPS rises.
    InterruptTable,
    /// ICC falls, with the granularity that was done.
    ContextCommand(Option<Granularity>),
    /// IVT falls, with the granularity that was done.
    IotlbCommand(Option<Granularity>),
    /// A wait descriptor completes.
    Wait(Wait),
    /// The queue goes on: its invalidations are drained.
    QueueGoesOn,
    /// QIES falls.
    QueueOff,
}

/// The registers of one unit.
pub struct RegisterFile {
    unit: Arc<Unit>,
    size_bytes: u32,
    state: Mutex<State>,
}

/// What the registers hold that is not the unit's own.
struct State {
    /// GSTS as software sees it.
    status: Gsts,
    /// RTADDR as written; the unit has what SRTP latched.
    root_address: u64,
    context_command: Ccmd,
    invalidate_address: u64,
    iotlb_command: Iotlb,
    /// IRTA as written; the unit has what SIRTP latched.
    interrupt_table_address: u64,
    completion: Ics,
    completion_event: EventRegisters,
    queue: Queue,
    waiting: Waiting,
}

impl RegisterFile {
    /// The registers of a unit as after a reset. A unit has at most one register file, or none when it is managed.
    pub fn new(unit: Arc<Unit>) -> Self {
        let size_bytes = register_set_bytes(unit.capabilities().fault_records);
        let state = State {
            status: GlobalCommand::new(),
            root_address: 0,
            context_command: Ccmd::new(),
            invalidate_address: 0,
            iotlb_command: Iotlb::new(),
            interrupt_table_address: 0,
            completion: Ics::new(),
            completion_event: EventRegisters::RESET,
            queue: Queue::new(),
            waiting: Waiting::new(),
        };
        Self { unit, size_bytes, state: Mutex::new(state) }
    }
    /// Bytes of the register set: one 4 KiB page, or two when there are more fault recording registers than fit one.
    pub fn size_bytes(&self) -> u32 {
        self.size_bytes
    }
    /// Reads a register.
    pub fn read(&self, offset: u64, width: AccessWidth) -> Result<u64, BadRegisterAccess> {
        let offset = self.check(offset, width)?;
        let state = self.lock();
        let low = u64::from(self.read_dword(&state, offset));
        if width == AccessWidth::Bytes4 {
            return Ok(low);
        }
        Ok(low | u64::from(self.read_dword(&state, offset + 4)) << 32)
    }
    /// Writes a register. An 8-byte write is a write of the low half, then of the high half, where the trigger bits are.
    pub fn write(
        &self,
        offset: u64,
        width: AccessWidth,
        value: u64,
    ) -> Result<WriteEffect, BadRegisterAccess> {
        let offset = self.check(offset, width)?;
        let mut state = self.lock();
        self.write_dword(&mut state, offset, value as u32);
        if width == AccessWidth::Bytes8 {
            self.write_dword(&mut state, offset + 4, (value >> 32) as u32);
        }
        Ok(match self.advance(&mut state) {
            QueueProgress::Idle if state.waiting.is_empty() => WriteEffect::Settled,
            QueueProgress::Idle | QueueProgress::More | QueueProgress::Draining(_) => WriteEffect::Unfinished,
        })
    }
    /// Carries on what register writes have begun: one bounded step.
    pub fn run_queue(&self) -> QueueProgress {
        self.advance(&mut self.lock())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
    fn check(&self, offset: u64, width: AccessWidth) -> Result<u32, BadRegisterAccess> {
        let width_bytes = width.bytes();
        let narrow = !matches!(width, AccessWidth::Bytes4 | AccessWidth::Bytes8);
        match u32::try_from(offset) {
            Ok(offset)
                if !narrow
                    && offset.is_multiple_of(width_bytes)
                    && offset.checked_add(width_bytes).is_some_and(|end| end <= self.size_bytes) =>
            {
                Ok(offset)
            }
            _ => Err(BadRegisterAccess { offset, width_bytes }),
        }
    }
    /// Effects whose drains are done, then descriptors, up to the bound of one step.
    fn advance(&self, state: &mut State) -> QueueProgress {
        let mut budget = QUEUE_DESCRIPTORS_PER_STEP;
        loop {
            match state.waiting.front() {
                Front::Due(effect) => {
                    self.apply(state, effect);
                    continue;
                }
                Front::Undrained(drain) => return QueueProgress::Draining(drain),
                Front::Lent => return QueueProgress::Idle,
                Front::Empty => {}
            }
            if budget == 0 {
                return if state.queue.has_work() { QueueProgress::More } else { QueueProgress::Idle };
            }
            budget -= 1;
            match state.queue.step(&self.unit) {
                Step::Nothing | Step::Stopped => return QueueProgress::Idle,
                Step::Taken => {}
                Step::Wait(pending, wait) => state.waiting.push(pending, Effect::Wait(wait)),
                Step::Joined(pending) => state.waiting.push(pending, Effect::QueueGoesOn),
            }
        }
    }
    fn apply(&self, state: &mut State, effect: Effect) {
        match effect {
            Effect::Translation(on) => state.status.set_translation(on),
            Effect::InterruptRemapping(on) => state.status.set_interrupt_remapping(on),
            Effect::RootTable => state.status.set_set_root_table(true),
            Effect::InterruptTable => state.status.set_set_interrupt_table(true),
            Effect::ContextCommand(done) => {
                let done = done.map_or(0, granularity_code);
                state.context_command =
                    state.context_command.with_invalidate(false).with_actual_granularity(done);
            }
            Effect::IotlbCommand(done) => {
                let done = done.map_or(0, granularity_code);
                state.iotlb_command =
                    state.iotlb_command.with_invalidate(false).with_actual_granularity(done);
            }
            Effect::Wait(wait) => self.complete_wait(state, wait),
            Effect::QueueGoesOn => {}
            Effect::QueueOff => {
                state.queue.reset();
                state.status.set_queued_invalidation(false);
            }
        }
    }
    fn complete_wait(&self, state: &mut State, wait: Wait) {
        if let Some(status) = wait.status_write {
            // A status address without memory behind it is software's mistake and reaches nobody, as an unsupported write.
            let _no_memory = self.unit.memory().store_u32(status.at, status.data);
        }
        if wait.interrupt && !state.completion.wait_complete() {
            state.completion.set_wait_complete(true);
            state.completion_event.raise(self.unit.events());
        }
    }
}

/// CAIG and IAIG.
const fn granularity_code(done: Granularity) -> u8 {
    match done {
        Granularity::Global => 1,
        Granularity::Domain => 2,
        Granularity::Device | Granularity::Page => 3,
    }
}
