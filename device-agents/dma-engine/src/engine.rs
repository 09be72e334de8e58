//! The engine: registers on one side, the bus on the other, and one worker between them.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use device_runtime::{DeviceModel, Dma, MmioRefusal, Register};
use tokio::sync::Notify;

use crate::bus::Bus;
use crate::command::{Progress, carry_out};
use crate::registers::*;
use crate::ring::{Burst, receive};
use crate::state::{Command, Effect, Failure, Msi, Ring, State};

/// A copy engine. It works while [`serve`](Self::serve) runs; as a [`DeviceModel`] the runtime does that.
#[derive(Debug)]
pub struct Engine {
    state: Mutex<State>,
    /// There may be work.
    work: Notify,
    /// Held while a command or burst is on the bus; a reset waits for it.
    bus_in_use: tokio::sync::Mutex<()>,
    /// Counts resets: work that was begun under an earlier number is not continued.
    resets: AtomicU64,
}

impl Default for Engine {
    fn default() -> Self {
        Self::new()
    }
}

impl Engine {
    /// An engine as after power-on.
    pub fn new() -> Self {
        Self {
            state: Mutex::new(State::at_power_on()),
            work: Notify::new(),
            bus_in_use: tokio::sync::Mutex::new(()),
            resets: AtomicU64::new(0),
        }
    }

    /// Reads a register.
    pub fn read_register(&self, register: Register) -> Result<u64, MmioRefusal> {
        self.state().read(register)
    }

    /// Writes a register. Waits only for a reset.
    pub async fn write_register(&self, register: Register, value: u64) -> Result<(), MmioRefusal> {
        let effect = self.state().write(register, value)?;
        match effect {
            Effect::None => {}
            Effect::Work => self.work.notify_one(),
            Effect::Reset => self.power_on().await,
        }
        Ok(())
    }

    /// Does what the registers ask for, for ever.
    pub async fn serve(&self, bus: &impl Bus) {
        loop {
            while self.work_once(bus).await {}
            self.work.notified().await;
        }
    }

    /// Does one command or one burst; `false` when there is nothing to do.
    pub async fn work_once(&self, bus: &impl Bus) -> bool {
        let _bus = self.bus_in_use.lock().await;
        let resets = self.resets.load(Ordering::Acquire);
        let alive = || self.resets.load(Ordering::Acquire) == resets;
        let (command, msi, ring) = {
            let mut state = self.state();
            (state.pending.take(), state.msi(), state.ring)
        };
        let msi = if let Some(command) = command {
            let (progress, outcome) = carry_out(bus, command, msi, alive).await;
            self.command_ended(command, progress, outcome)
        } else if ring.has_work() {
            let burst = receive(bus, ring).await;
            self.burst_ended(ring, burst)
        } else {
            return false;
        };
        if let Some(msi) = msi.filter(|_| alive()) {
            self.interrupt(bus, msi).await;
        }
        true
    }

    /// Shows in the registers how a command ended, and says where to interrupt.
    fn command_ended(
        &self,
        command: Command,
        progress: Progress,
        outcome: Result<(), Failure>,
    ) -> Option<Msi> {
        let mut state = self.state();
        state.bytes_done = progress.bytes_done;
        if let Some(value) = progress.data {
            state.data = value;
        }
        state.status &= !STATUS_BUSY;
        match outcome {
            Ok(()) => state.status |= STATUS_DONE,
            Err(failure) => state.failed(failure),
        }
        state.msi_enabled().filter(|_| command.code != COMMAND_INTERRUPT)
    }

    /// Shows in the registers what a burst of `ring` did, and says where to interrupt.
    fn burst_ended(&self, ring: Ring, burst: Burst) -> Option<Msi> {
        let mut state = self.state();
        if state.ring.enablings == ring.enablings {
            state.ring.head = (ring.head + burst.descriptors) % ring.size;
            state.ring.packets = ring.packets.wrapping_add(burst.packets);
            if burst.broken {
                state.ring.control &= !RING_ENABLE;
            }
        }
        if let Some(failure) = burst.failure {
            state.failed(failure);
        }
        state.msi_enabled()
    }

    async fn interrupt(&self, bus: &impl Bus, msi: Msi) {
        if let Err(error) = bus.msi(msi.address, msi.data).await {
            let mut state = self.state();
            state.failed(Failure::of(error, msi.address.get()));
            state.status |= STATUS_MSI_FAILED;
        }
    }

    /// Waits until nothing of the engine is on the bus, and sets every register to its value after power-on.
    async fn power_on(&self) {
        self.resets.fetch_add(1, Ordering::AcqRel);
        let _bus = self.bus_in_use.lock().await;
        *self.state() = State::at_power_on();
    }

    /// A panic while the lock was held leaves registers that are still registers.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DeviceModel for Engine {
    async fn mmio_read(&self, register: Register, _: &Dma) -> Result<u64, MmioRefusal> {
        self.read_register(register)
    }

    async fn mmio_write(&self, register: Register, value: u64, _: &Dma) -> Result<(), MmioRefusal> {
        self.write_register(register, value).await
    }

    async fn reset(&self) {
        self.power_on().await;
    }

    async fn run(&self, dma: Dma) {
        self.serve(&dma).await;
    }
}
