//! The hypervisor: virtual machines with memory and devices, and one device that it shares by copying.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, bail};
use bytes::Bytes;
use engine_driver::EngineBackend;
use guest_sdk::multiplexer::{Backend, DeviceFailure, Multiplexer, MultiplexerCounters};
use guest_sdk::{Connection, Gpa, GpaRange, Hypervisor, TenantLimits, Vm, VmOptions};
use iommu_types::DeviceAddress;

use super::actor::Options;
use super::words::{Ask, Told};
use crate::stand::{name, owner};

/// Memory of each machine.
const MEMORY_BYTES: u64 = 8 << 20;
const MEMORY_BASE: Gpa = Gpa::new(0x10_0000);
/// What a machine may do in a second that is limited.
pub(super) const LIMITED: TenantLimits = TenantLimits {
    domains: None,
    mappings: None,
    mapped_bytes: None,
    memory_bytes: None,
    interrupts: None,
    requests_per_second: Some(1000),
    dma_operations_per_second: Some(200_000),
    dma_bytes_per_second: Some(64_000_000),
};

/// The machines, and what was copied for them.
pub(super) struct Machines {
    _hypervisor: Hypervisor,
    vms: Vec<Vm>,
    shared: Option<Shared>,
}

struct Shared {
    guests: MultiplexerCounters,
    device_bytes: Arc<AtomicU64>,
}

/// Counts what goes into the driver's buffers and comes out of them.
struct Counted {
    engine: EngineBackend,
    bytes: Arc<AtomicU64>,
}

impl Backend for Counted {
    async fn transmit(&mut self, packets: &[Bytes]) -> Vec<Result<(), DeviceFailure>> {
        let bytes: usize = packets.iter().map(Bytes::len).sum();
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        self.engine.transmit(packets).await
    }
    async fn receive(&mut self, sizes: &[u32]) -> Vec<Result<Bytes, DeviceFailure>> {
        let packets = self.engine.receive(sizes).await;
        let bytes: usize = packets.iter().flatten().map(Bytes::len).sum();
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        packets
    }
}

impl Machines {
    pub(super) async fn start(options: &Options) -> anyhow::Result<Self> {
        let hypervisor = Connection::to(&options.server).hypervisor(&options.name).await;
        let hypervisor = hypervisor.context("open a session as hypervisor")?;
        let memory = GpaRange::new(MEMORY_BASE, MEMORY_BYTES)?;
        let mut vms = Vec::new();
        for (index, guest) in options.guest.iter().enumerate() {
            let (name, device) = guest.split_once('=').context("--guest is NAME=ADDRESS")?;
            let is_last = index + 1 == options.guest.len();
            let asked = VmOptions::new(name);
            let asked = if options.limited && is_last { asked.with_limits(LIMITED) } else { asked };
            let vm = hypervisor.create_vm(asked).await.context("create a machine")?;
            vm.add_memory(memory).await.context("give it memory")?;
            vm.assign(device.parse()?).await.context("assign its device")?;
            vms.push(vm);
        }
        let shared = match options.device {
            Some(device) => Some(share(&options.server, &hypervisor, device).await?),
            None => None,
        };
        Ok(Self { _hypervisor: hypervisor, vms, shared })
    }
    pub(super) fn numbers(&self) -> Vec<u32> {
        self.vms.iter().map(Vm::number).collect()
    }
    pub(super) fn answer(&self, ask: &Ask) -> anyhow::Result<Told> {
        match (ask, &self.shared) {
            (Ask::Copied, Some(shared)) => {
                let total = shared.guests.total();
                let bytes = total.bytes_copied + shared.device_bytes.load(Ordering::Relaxed);
                Ok(Told::Copied { packets: total.packets, bytes })
            }
            _ => bail!("a hypervisor does not do {ask:?}"),
        }
    }
}

/// Drives the device as the host's first driver, and lends it to the machines.
async fn share(server: &str, hypervisor: &Hypervisor, device: DeviceAddress) -> anyhow::Result<Shared> {
    let driver =
        Connection::to(server).driver(name(0), owner(0)).await.context("open a session as driver")?;
    let engine = EngineBackend::start(&driver, device).await.context("start the engine")?;
    let bytes = Arc::<AtomicU64>::default();
    let multiplexer = Multiplexer::new(hypervisor.clone(), Counted { engine, bytes: Arc::clone(&bytes) });
    let guests = multiplexer.counters();
    let listening = multiplexer.listen().await.context("serve hypercalls")?;
    tokio::spawn(async move {
        // The session of the driver is the multiplexer's.
        let _driver = driver;
        listening.run().await
    });
    Ok(Shared { guests, device_bytes: bytes })
}
