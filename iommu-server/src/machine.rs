//! Bare machines: a PCI segment, memory from address 0, one unit driven through its registers, and devices behind it.
//!
//! A machine shares nothing with the host or with another machine but the process, so nonsense in its tables reaches nobody else.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Weak};

use dashmap::DashMap;
use iommu_hardware::bare::{BareMachine, BareMachineError};
use iommu_hardware::memory::PhysicalMemory;
use iommu_hardware::vtd::{EventMessage, EventSink, QueueProgress, Unit, WriteEffect};
use iommu_proto::model::{CreateMachine, MachineDevice, bad_capabilities};
use iommu_types::errors::{CreateMachineError, InvalidField, LimitReached, OutOfMemory, UnknownMachine};
use iommu_types::{AccessWidth, Capabilities, DeviceAddress};
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::bounds;
use crate::host::Host;
use crate::host::devices::{DeviceState, Home};
use crate::interrupts::{InterruptFeed, Signal};
use crate::session::driver::Seat;

/// Interrupts of a machine's devices and event messages of its unit, for its creator.
#[derive(Debug)]
struct Events(Weak<InterruptFeed>);

impl EventSink for Events {
    fn deliver(&self, message: EventMessage) {
        if let Some(feed) = self.0.upgrade() {
            feed.deliver(Signal::Event(message));
        }
    }
}

/// A bare machine.
pub struct Machine {
    /// Its segment, which names it.
    pub segment: u16,
    /// The devices behind the unit.
    pub devices: Vec<MachineDevice>,
    /// Interrupts and event messages.
    pub interrupts: Arc<InterruptFeed>,
    bare: BareMachine,
    begun: Notify,
    gone: CancellationToken,
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Machine").field("segment", &self.segment).finish_non_exhaustive()
    }
}

impl Machine {
    /// Its memory.
    pub fn memory(&self) -> &Arc<PhysicalMemory> {
        self.bare.memory()
    }
    /// Its unit.
    pub fn unit(&self) -> &Arc<Unit> {
        self.bare.unit()
    }
    /// Reads a register.
    pub fn read_register(
        &self,
        offset: u32,
        width: AccessWidth,
    ) -> Result<u64, iommu_types::errors::BadRegisterAccess> {
        let bad = |_| iommu_types::errors::BadRegisterAccess {
            offset: u64::from(offset),
            width_bytes: width.bytes(),
        };
        self.bare.registers().read(u64::from(offset), width).map_err(bad)
    }
    /// Writes a register. What it begins and cannot finish at once goes on in the machine's own task.
    pub fn write_register(
        &self,
        offset: u32,
        width: AccessWidth,
        value: u64,
    ) -> Result<(), iommu_types::errors::BadRegisterAccess> {
        let bad = |_| iommu_types::errors::BadRegisterAccess {
            offset: u64::from(offset),
            width_bytes: width.bytes(),
        };
        match self.bare.registers().write(u64::from(offset), width, value).map_err(bad)? {
            WriteEffect::Settled => {}
            WriteEffect::Unfinished => self.begun.notify_one(),
        }
        Ok(())
    }
    /// Carries on what register writes have begun, in bounded steps, until the machine is gone.
    async fn run(self: Arc<Self>) {
        loop {
            match self.bare.registers().run_queue() {
                QueueProgress::Idle => {
                    tokio::select! {
                        () = self.gone.cancelled() => return,
                        () = self.begun.notified() => {}
                    }
                }
                QueueProgress::More => tokio::task::yield_now().await,
                QueueProgress::Draining(drain) => drain.await,
            }
            if self.gone.is_cancelled() {
                return;
            }
        }
    }
    /// Resolves when it is destroyed.
    pub async fn wait_gone(&self) {
        self.gone.cancelled().await;
    }
    /// The addresses of its devices.
    pub fn addresses(&self) -> impl Iterator<Item = DeviceAddress> + '_ {
        self.devices.iter().map(|device| DeviceAddress::new(self.segment, device.source_id))
    }
}

/// A client of bare machines.
#[derive(Debug)]
pub struct BareClient {
    /// Its name.
    pub name: String,
    /// Its session.
    pub seat: Seat,
    machines: Mutex<BTreeMap<u16, Arc<Machine>>>,
    reserved: Mutex<Reserved>,
}

/// What a client's machines take, those included that are being made.
#[derive(Debug, Default)]
struct Reserved {
    machines: usize,
    memory_bytes: u64,
}

impl BareClient {
    fn new(name: String) -> Self {
        Self { name, seat: Seat::new(), machines: Mutex::default(), reserved: Mutex::default() }
    }
    /// Its machines by segment.
    pub fn machines(&self) -> Vec<Arc<Machine>> {
        self.machines.lock().values().cloned().collect()
    }
    /// Whether the machine is its own.
    pub fn owns(&self, segment: u16) -> bool {
        self.machines.lock().contains_key(&segment)
    }
    fn is_empty(&self) -> bool {
        self.machines.lock().is_empty()
    }
}

/// All bare machines and their clients.
#[derive(Debug, Default)]
pub struct Machines {
    by_segment: DashMap<u16, Arc<Machine>>,
    clients: Mutex<BTreeMap<String, Arc<BareClient>>>,
    segments: Mutex<Segments>,
}

/// Which segments are taken, by machines that are being made too.
#[derive(Debug, Default)]
struct Segments {
    latest: u16,
    taken: BTreeSet<u16>,
}

fn limit(name: &str, allowed: u64) -> LimitReached {
    LimitReached { limit: name.to_owned(), allowed }
}

impl Machines {
    /// The client of that name; names are bounded, and one that nobody uses any more makes room.
    pub fn client(&self, name: &str) -> Result<Arc<BareClient>, LimitReached> {
        let mut clients = self.clients.lock();
        if let Some(client) = clients.get(name) {
            return Ok(Arc::clone(client));
        }
        if clients.len() >= bounds::BARE_CLIENTS_MAX {
            clients.retain(|_, client| {
                Arc::strong_count(client) > 1 || client.seat.connected().is_some() || !client.is_empty()
            });
        }
        if clients.len() >= bounds::BARE_CLIENTS_MAX {
            return Err(limit("bare_clients", bounds::BARE_CLIENTS_MAX as u64));
        }
        let client = Arc::new(BareClient::new(name.to_owned()));
        clients.insert(name.to_owned(), Arc::clone(&client));
        Ok(client)
    }
    /// All clients.
    pub fn clients(&self) -> Vec<Arc<BareClient>> {
        self.clients.lock().values().cloned().collect()
    }
    /// The machine at a segment.
    pub fn get(&self, segment: u16) -> Result<Arc<Machine>, UnknownMachine> {
        self.by_segment.get(&segment).map(|entry| Arc::clone(entry.value())).ok_or(UnknownMachine { segment })
    }
    /// How many there are.
    pub fn count(&self) -> usize {
        self.by_segment.len()
    }

    /// Takes a segment that no machine has. Segments come round, so that a name is not reused at once.
    fn reserve_segment(&self) -> Result<u16, LimitReached> {
        let mut segments = self.segments.lock();
        if segments.taken.len() >= bounds::MACHINES_MAX {
            return Err(limit("machines", bounds::MACHINES_MAX as u64));
        }
        loop {
            segments.latest = segments.latest.checked_add(1).unwrap_or(1);
            let segment = segments.latest;
            if segments.taken.insert(segment) {
                return Ok(segment);
            }
        }
    }

    /// Makes a machine for a client.
    pub fn create(
        &self,
        host: &Host,
        client: &BareClient,
        wanted: CreateMachine,
    ) -> Result<Arc<Machine>, CreateMachineError> {
        check(&wanted)?;
        let capabilities = wanted.capabilities.unwrap_or(Capabilities::FULL);
        capabilities.validate().map_err(bad_capabilities)?;
        client.reserve(wanted.memory_bytes)?;
        let made = self.make(host, client, wanted.memory_bytes, capabilities, wanted.devices);
        if made.is_err() {
            client.release(wanted.memory_bytes);
        }
        made
    }

    fn make(
        &self,
        host: &Host,
        client: &BareClient,
        memory_bytes: u64,
        capabilities: Capabilities,
        devices: Vec<MachineDevice>,
    ) -> Result<Arc<Machine>, CreateMachineError> {
        let interrupts = Arc::new(InterruptFeed::new());
        let ports = devices.len().saturating_mul(2).max(4) as u16; // a session and the one that fences it
        let events = Arc::new(Events(Arc::downgrade(&interrupts)));
        let bare =
            BareMachine::new(memory_bytes, capabilities, ports, events).map_err(|error| match error {
                BareMachineError::Capabilities(error) => bad_capabilities(error),
                BareMachineError::Memory(_) => OutOfMemory { size_bytes: memory_bytes }.into(),
            })?;
        let segment = self.reserve_segment()?;
        let machine = Arc::new(Machine {
            segment,
            devices,
            interrupts,
            bare,
            begun: Notify::new(),
            gone: CancellationToken::new(),
        });
        self.by_segment.insert(segment, Arc::clone(&machine));
        for device in &machine.devices {
            let address = DeviceAddress::new(segment, device.source_id);
            let home = Home::Machine(Arc::clone(&machine));
            host.devices.insert(Arc::new(DeviceState::new(address, device.name.clone(), home)));
        }
        client.machines.lock().insert(segment, Arc::clone(&machine));
        tokio::spawn(Arc::clone(&machine).run());
        tracing::info!(client = %client.name, segment, memory_bytes, "bare machine created");
        Ok(machine)
    }

    /// Ends the sessions of a machine's devices and forgets it.
    pub fn destroy(&self, host: &Host, client: &BareClient, segment: u16) -> Result<(), UnknownMachine> {
        let machine = client.machines.lock().remove(&segment).ok_or(UnknownMachine { segment })?;
        for address in machine.addresses() {
            if let Some(device) = host.devices.remove(address) {
                device.remove();
            }
        }
        machine.gone.cancel();
        self.by_segment.remove(&segment);
        self.segments.lock().taken.remove(&segment);
        client.release(machine.memory().size_bytes());
        tracing::info!(client = %client.name, segment, "bare machine destroyed");
        Ok(())
    }

    /// Destroys everything of a client.
    pub async fn reclaim_client(&self, host: &Host, client: &BareClient, why: &str) {
        let machines = client.machines();
        for machine in &machines {
            // One that is gone already was destroyed by its client meanwhile.
            let _gone = self.destroy(host, client, machine.segment);
        }
        tracing::info!(client = %client.name, machines = machines.len(), reason = why, "bare-machine client reclaimed");
    }
}

impl BareClient {
    fn reserve(&self, bytes: u64) -> Result<(), LimitReached> {
        let mut reserved = self.reserved.lock();
        if reserved.machines >= bounds::MACHINES_PER_CLIENT_MAX {
            return Err(limit("machines_per_client", bounds::MACHINES_PER_CLIENT_MAX as u64));
        }
        let allowed = bounds::MACHINE_MEMORY_PER_CLIENT_BYTES_MAX;
        let sum = reserved.memory_bytes.checked_add(bytes).filter(|sum| *sum <= allowed);
        let sum = sum.ok_or_else(|| limit("machine_memory_bytes_per_client", allowed))?;
        *reserved = Reserved { machines: reserved.machines + 1, memory_bytes: sum };
        Ok(())
    }
    fn release(&self, bytes: u64) {
        let mut reserved = self.reserved.lock();
        reserved.machines -= 1;
        reserved.memory_bytes -= bytes;
    }
}

fn check(wanted: &CreateMachine) -> Result<(), CreateMachineError> {
    if wanted.memory_bytes > bounds::MACHINE_MEMORY_BYTES_MAX {
        return Err(limit("machine_memory_bytes", bounds::MACHINE_MEMORY_BYTES_MAX).into());
    }
    if wanted.devices.len() > bounds::MACHINE_DEVICES_MAX {
        return Err(limit("machine_devices", bounds::MACHINE_DEVICES_MAX as u64).into());
    }
    for (index, device) in wanted.devices.iter().enumerate() {
        if wanted.devices[..index].iter().any(|before| before.source_id == device.source_id) {
            let why = format!("{} is declared twice", device.source_id);
            return Err(InvalidField { field: format!("devices[{index}].source_id"), why }.into());
        }
    }
    Ok(())
}
