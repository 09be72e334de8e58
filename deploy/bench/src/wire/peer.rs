//! The peers of the server in this process: devices that do nothing by themselves, and the driver of their buffers.

use std::time::Duration;

use anyhow::{Context, ensure};
use device_runtime::{Agent, DeviceModel, Dma, EndReason, MmioRefusal, Register};
use guest_sdk::{Buffer, Connection, Credentials, Direction, DmaMapping, Driver};
use iommu_types::Iova;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::stand::{address, name, owner};

/// How long anything may take before it counts as broken.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// A device without registers; its DMA comes from outside.
pub(crate) struct Nothing;

impl DeviceModel for Nothing {
    async fn mmio_read(&self, _register: Register, _dma: &Dma) -> Result<u64, MmioRefusal> {
        Err(MmioRefusal::new("this device has no registers"))
    }
    async fn mmio_write(&self, _register: Register, _value: u64, _dma: &Dma) -> Result<(), MmioRefusal> {
        Err(MmioRefusal::new("this device has no registers"))
    }
    async fn reset(&self) {}
}

/// A device with a session.
#[derive(Debug)]
pub(crate) struct Device {
    /// For its DMA.
    pub(crate) dma: Dma,
    stop: CancellationToken,
    running: JoinHandle<Result<(), EndReason>>,
}

impl Device {
    /// Connects device number `peer`.
    pub(crate) async fn connect(endpoint: &str, peer: u16) -> anyhow::Result<Self> {
        Self::connect_with(endpoint, peer, Credentials::from_default_directory()).await
    }

    /// The same with certificates from elsewhere.
    pub(crate) async fn connect_with(
        endpoint: &str,
        peer: u16,
        credentials: Credentials,
    ) -> anyhow::Result<Self> {
        let stop = CancellationToken::new();
        let agent = Agent::builder(endpoint, name(peer), address(peer)).credentials(credentials);
        let agent = agent.stop_on(stop.clone()).build();
        let dma = agent.dma();
        let running = tokio::spawn(async move { agent.run(Nothing).await });
        let connected = tokio::time::timeout(PATIENCE, dma.connected()).await;
        let connected = connected.with_context(|| format!("device {peer} got no session at {endpoint}"))?;
        ensure!(connected.is_some(), "device {peer} was refused at {endpoint}");
        Ok(Self { dma, stop, running })
    }

    /// Ends its session.
    pub(crate) async fn leave(self) -> anyhow::Result<()> {
        self.stop.cancel();
        let ended = tokio::time::timeout(PATIENCE, self.running).await.context("a device does not end")?;
        ended.context("a device panicked")?.context("the session of a device was lost")
    }
}

/// What a device reads and writes: buffers of the driver, each mapped for it.
#[derive(Debug)]
pub(crate) struct WorkingSet {
    /// Where the mappings begin, for the device.
    pub(crate) iovas: Vec<Iova>,
    mappings: Vec<DmaMapping>,
    _buffer: Buffer,
}

impl WorkingSet {
    /// `count` mappings of `size_bytes` each for device number `peer`, filled with a pattern so that every page is there.
    pub(crate) async fn map(driver: &Driver, peer: u16, count: u64, size_bytes: u64) -> anyhow::Result<Self> {
        let buffer = driver.allocate(count * size_bytes).await.context("allocate the working set")?;
        let pattern = vec![0x5a; usize::try_from(size_bytes)?];
        let device = driver.device(address(peer));
        let mut mappings = Vec::new();
        for index in 0..count {
            buffer.write(index * size_bytes, pattern.clone()).await.context("fill the working set")?;
            let range = buffer.slice(index * size_bytes, size_bytes)?;
            let mapping = driver.dma_map_single(&device, range, Direction::Bidirectional).await;
            mappings.push(mapping.context("map the working set")?);
        }
        Ok(Self { iovas: mappings.iter().map(DmaMapping::iova).collect(), mappings, _buffer: buffer })
    }

    /// Unmaps it; the memory goes with the driver.
    pub(crate) async fn unmap(self) -> anyhow::Result<()> {
        for mapping in self.mappings {
            mapping.unmap().await.context("unmap the working set")?;
        }
        Ok(())
    }
}

/// Driver number `peer`.
pub(crate) async fn driver(endpoint: &str, peer: u16) -> anyhow::Result<Driver> {
    let connection = Connection::to(endpoint).driver(name(peer), owner(peer));
    let connected = tokio::time::timeout(PATIENCE, connection).await.context("the driver got no session")?;
    connected.with_context(|| format!("driver {peer} was refused"))
}
