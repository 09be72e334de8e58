//! A driver, a device, a hypervisor or its guest that is a process of its own, so that it can be stopped and killed.
//!
//! ```text
//! e2e-driver driver ENDPOINT NUMBER                  maps a buffer for its device, says where, and stays
//! e2e-driver device ENDPOINT NUMBER IOVA BYTES       writes and reads there without end, several batches in flight
//! e2e-driver hypervisor ENDPOINT NAME GUEST DEVICE   makes a machine with memory and this device, says its number, and stays
//! e2e-driver guest ENDPOINT NAME VM DEVICE           maps memory of its machine for the device, says where, and stays
//! ```
//!
//! What it has to say it prints as lines of JSON.

use std::collections::VecDeque;
use std::io::Write as _;
use std::time::Duration;

use anyhow::{Context as _, bail};
use device_runtime::{Agent, Batch, DeviceModel, Dma, MmioRefusal, Register, Ticket};
use guest_sdk::{Connection, Direction, DomainOptions, Protection, VmOptions};
use iommu_e2e::guests::memory;
use iommu_e2e::stage::{address, owner};
use iommu_types::{DeviceAddress, Iova, Owner, Permissions};
use serde_json::{Value, json};

/// Bytes of the buffer that the driver maps.
const BUFFER_BYTES: u64 = 64 << 10;
/// Batches that the device keeps in flight: one that ends leaves others in the middle.
const IN_FLIGHT: usize = 8;
/// Operations in a batch.
const OPERATIONS: usize = 64;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["driver", endpoint, number] => drive(endpoint, number.parse()?).await,
        ["device", endpoint, number, iova, size_bytes] => {
            let iova = Iova::new(iova.parse().context("IOVA")?);
            play(endpoint, number.parse()?, iova, size_bytes.parse().context("BYTES")?).await
        }
        ["hypervisor", endpoint, name, guest, device] => own(endpoint, name, guest, device.parse()?).await,
        ["guest", endpoint, name, vm, device] => live_in(endpoint, name, vm.parse()?, device.parse()?).await,
        _ => bail!("see the head of this program's source for its arguments"),
    }
}

fn say(value: &Value) -> anyhow::Result<()> {
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{value}")?;
    stdout.flush().context("say it")
}

async fn drive(endpoint: &str, number: u32) -> anyhow::Result<()> {
    let driver = Connection::to(endpoint).driver(format!("driver{number}"), owner(number)).await?;
    let device = driver.device(address(number));
    let buffer = driver.allocate(BUFFER_BYTES).await?;
    buffer.write(0, vec![0x5a; 4096]).await?;
    let mapping = driver.dma_map_single(&device, buffer.range(), Direction::Bidirectional).await?;
    let coherent = driver.dma_alloc_coherent(&device, 4096).await?;
    let domain = driver.create_domain(DomainOptions::new(Protection::Strict)).await?;
    domain.map(Iova::new(0x10_0000), buffer.gpa(), 4096, Permissions::READ).await?;
    say(&json!({
        "iova": mapping.iova().get(),
        "coherent": coherent.iova().get(),
        "gpa": buffer.gpa().get(),
        "domain": domain.id().get(),
    }))?;
    // Everything stays held until the process is killed.
    std::future::pending().await
}

async fn own(endpoint: &str, name: &str, guest: &str, device: DeviceAddress) -> anyhow::Result<()> {
    let hypervisor = Connection::to(endpoint).hypervisor(name).await?;
    let vm = hypervisor.create_vm(VmOptions::new(guest)).await?;
    vm.add_memory(memory(0, BUFFER_BYTES)).await?;
    vm.assign(device).await?;
    say(&json!({ "vm": vm.number() }))?;
    std::future::pending().await
}

async fn live_in(endpoint: &str, name: &str, vm: u32, device: DeviceAddress) -> anyhow::Result<()> {
    let driver = Connection::to(endpoint).driver(name, Owner::Vm(vm)).await?;
    let (buffer, marked) = (driver.allocate(4 * 4096).await?, driver.allocate(4096).await?);
    marked.write(0, vec![0x5a; 4096]).await?;
    let handle = driver.device(device);
    let mapping = driver.dma_map_single(&handle, buffer.range(), Direction::Bidirectional).await?;
    let domain = driver.create_domain(DomainOptions::new(Protection::Strict)).await?;
    domain.map(Iova::new(0x10_0000), marked.gpa(), 4096, Permissions::READ).await?;
    say(&json!({ "iova": mapping.iova().get(), "gpa": marked.gpa().get() }))?;
    std::future::pending().await
}

struct Hammer {
    iova: Iova,
    size_bytes: usize,
}

impl Hammer {
    async fn submit(&self, dma: &Dma, round: u64) -> Result<Ticket, device_runtime::DmaError> {
        let mut batch = Batch::with_capacity(OPERATIONS);
        for _ in 0..OPERATIONS / 2 {
            batch.write(self.iova, vec![round as u8; self.size_bytes]);
            batch.read(self.iova, u32::try_from(self.size_bytes).expect("a small size"));
        }
        dma.submit(batch).await
    }
}

impl DeviceModel for Hammer {
    async fn mmio_read(&self, _register: Register, _dma: &Dma) -> Result<u64, MmioRefusal> {
        Ok(self.iova.get())
    }
    async fn mmio_write(&self, _register: Register, _value: u64, _dma: &Dma) -> Result<(), MmioRefusal> {
        Ok(())
    }
    async fn reset(&self) {}
    async fn run(&self, dma: Dma) {
        let mut round = 0u64;
        let mut waiting = VecDeque::new();
        while dma.connected().await.is_some() {
            round += 1;
            match self.submit(&dma, round).await {
                Ok(ticket) => waiting.push_back(ticket),
                Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
            }
            if waiting.len() >= IN_FLIGHT
                && let Some(oldest) = waiting.pop_front()
            {
                // A lost session shows in the next submission.
                let _ = oldest.await;
            }
        }
    }
}

async fn play(endpoint: &str, number: u32, iova: Iova, size_bytes: usize) -> anyhow::Result<()> {
    let agent = Agent::builder(endpoint, format!("engine{number}"), address(number)).build();
    let mut state = agent.dma().watch();
    tokio::spawn(async move {
        while state.changed().await.is_ok() {
            let told = json!({ "session": format!("{:?}", *state.borrow()) });
            if say(&told).is_err() {
                return;
            }
        }
    });
    agent.run(Hammer { iova, size_bytes }).await.map_err(Into::into)
}
