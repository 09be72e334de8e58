//! Virtual machines with their drivers, as tests of several tenants need them.

use std::time::Duration;

use guest_sdk::{Buffer, Direction, Driver, Hypervisor, Vm, VmOptions};
use iommu_types::{DeviceAddress, Gpa, GpaRange, PciFunction};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::device::Device;
use crate::stage::Stage;

/// Where every machine has its memory: equal addresses, other frames.
pub const MEMORY: u64 = 0x10_0000;

/// A virtual machine and its driver.
#[derive(Clone, Debug)]
pub struct Guest {
    /// As its hypervisor has it.
    pub vm: Vm,
    /// Under which name its driver is known.
    pub name: String,
    /// Its driver.
    pub driver: Driver,
}

impl Guest {
    /// Makes a virtual machine with so much memory and the usual limits, and starts its driver.
    pub async fn start(stage: &Stage, hypervisor: &Hypervisor, name: &str, memory_bytes: u64) -> Self {
        Self::start_with(stage, hypervisor, name, memory_bytes, |options| options).await
    }

    /// The same with a number or limits of its own.
    pub async fn start_with(
        stage: &Stage,
        hypervisor: &Hypervisor,
        name: &str,
        memory_bytes: u64,
        change: impl FnOnce(VmOptions) -> VmOptions,
    ) -> Self {
        let vm = hypervisor.create_vm(change(VmOptions::new(name))).await.expect("a machine");
        vm.add_memory(memory(0, memory_bytes)).await.expect("memory");
        let driver = stage.guest(name, vm.number()).await;
        Self { vm, name: name.to_owned(), driver }
    }
}

/// So much of a machine's memory, from an offset on.
pub fn memory(offset: u64, size_bytes: u64) -> GpaRange {
    GpaRange::new(Gpa::new(MEMORY + offset), size_bytes).expect("a range")
}

/// Declares a function of a hypervisor.
pub async fn declare(hypervisor: &Hypervisor, device: DeviceAddress, name: &str, function: PciFunction) {
    hypervisor.declare_function(device, name, function).await.expect("it is declared");
}

/// A pair of driver and device that goes about its work and takes no notice of anything else: map, DMA, unmap, compare.
#[derive(Debug)]
pub struct Bystander {
    stop: CancellationToken,
    working: JoinHandle<u64>,
}

/// Bytes of a bystander's buffer.
const BYSTANDER_BYTES: u64 = 8192;

impl Bystander {
    /// Gives the guest a device of its own, and begins.
    pub async fn start(stage: &Stage, hypervisor: &Hypervisor, guest: &Guest, device: DeviceAddress) -> Self {
        let name = format!("bystander-{}", guest.name);
        declare(hypervisor, device, &name, PciFunction::ISOLATED).await;
        guest.vm.assign(device).await.expect("it is assigned");
        let agent = Device::attach(&stage.server, stage.server.endpoint(), &name, device).await;
        let stop = CancellationToken::new();
        let (driver, stopped) = (guest.driver.clone(), stop.clone());
        let working = tokio::spawn(async move {
            let buffer = driver.allocate(BYSTANDER_BYTES).await.expect("memory");
            let mut rounds = 0;
            while !stopped.is_cancelled() {
                rounds += 1;
                bystander_round(&driver, device, &agent, &buffer, rounds).await;
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            rounds
        });
        Self { stop, working }
    }

    /// How many rounds it did; it panics when any of them went wrong.
    pub async fn stop(self) -> u64 {
        self.stop.cancel();
        self.working.await.expect("a bystander is not disturbed")
    }
}

async fn bystander_round(
    driver: &Driver,
    device: DeviceAddress,
    agent: &Device,
    buffer: &Buffer,
    round: u64,
) {
    let handle = driver.device(device);
    let mapping = driver.dma_map_single(&handle, buffer.range(), Direction::Bidirectional).await;
    let mapping = mapping.expect("a mapping");
    let data = round.to_le_bytes().repeat(64);
    agent.dma.write(mapping.iova(), data.clone()).await.expect("a mapped write");
    let size = u32::try_from(data.len()).expect("few bytes");
    assert_eq!(agent.dma.read(mapping.iova(), size).await.expect("a mapped read")[..], data[..]);
    mapping.unmap().await.expect("an unmap");
    assert_eq!(buffer.read(0, data.len() as u64).await.expect("a read")[..], data[..]);
}
