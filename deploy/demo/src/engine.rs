//! The driver of `dma-engine`: what its registers are told, and what they say.

use std::fmt;
use std::time::Duration;

use anyhow::{Context, bail};
use dma_engine::registers::*;
use guest_sdk::errors::MmioError;
use guest_sdk::{DeviceHandle, InterruptEvent, Iova, MsiVector, SdkError, Subscription};
use serde::{Deserialize, Serialize};

/// A command ends within milliseconds; a machine under load may need more.
const COMMAND_DEADLINE: Duration = Duration::from_secs(10);
/// What the engine writes.
pub(crate) const PATTERN: u64 = 0x6666_6666_6666_6666;
/// The agent connects by itself; this is how long it may take.
const AGENT_DEADLINE: Duration = Duration::from_secs(10);

/// How a command ended, as the registers say it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Ended {
    /// STATUS.
    pub(crate) status: u32,
    /// FAULT_REASON; 0 when all went well.
    pub(crate) reason: u32,
    /// FAULT_ADDRESS.
    pub(crate) address: u64,
    /// BYTES_DONE.
    pub(crate) bytes_done: u32,
}

impl Ended {
    /// Whether the command was refused.
    pub(crate) fn is_error(&self) -> bool {
        self.status & STATUS_ERROR != 0
    }
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_error() {
            return write!(
                f,
                "ERROR, reason {:#x} at {:#x}, {} bytes done",
                self.reason, self.address, self.bytes_done
            );
        }
        write!(f, "DONE, {} bytes", self.bytes_done)
    }
}

/// A `dma-engine` whose interrupt is programmed.
pub(crate) struct Engine {
    device: DeviceHandle,
    interrupts: Subscription<InterruptEvent, guest_sdk::Never>,
    /// The interrupt that it raises.
    pub(crate) vector: MsiVector,
}

impl Engine {
    /// Waits for the agent, checks what it is, and programs its interrupt.
    pub(crate) async fn start(driver: &guest_sdk::Driver, device: DeviceHandle) -> anyhow::Result<Self> {
        let identity = wait_for_agent(&device).await?;
        if identity != ID << 16 | VERSION {
            bail!("{} is not a dma-engine: its identity register reads {identity:#x}", device.address());
        }
        device.write32(CONTROL, CONTROL_RESET).await.context("reset the engine")?;
        let interrupts = driver.watch_interrupts().await.context("watch interrupts")?;
        let vector = device.allocate_interrupt().await.context("allocate an interrupt")?;
        device.write64(MSI_ADDRESS, vector.address.get()).await?;
        device.write32(MSI_DATA, vector.data).await?;
        device.write32(MSI_ENABLE, 1).await?;
        Ok(Self { device, interrupts, vector })
    }

    /// The device.
    pub(crate) fn device(&self) -> &DeviceHandle {
        &self.device
    }

    /// Copies.
    pub(crate) async fn copy(&mut self, from: Iova, to: Iova, bytes: u32) -> anyhow::Result<Ended> {
        self.device.write64(SOURCE, from.get()).await?;
        self.device.write64(DESTINATION, to.get()).await?;
        self.command(COMMAND_COPY, bytes).await
    }

    /// Makes one write of `bytes` bytes of [`PATTERN`].
    pub(crate) async fn write(&mut self, to: Iova, bytes: u32) -> anyhow::Result<Ended> {
        self.device.write64(DESTINATION, to.get()).await?;
        self.device.write64(DATA, PATTERN).await?;
        self.command(COMMAND_WRITE, bytes).await
    }

    /// Makes the last write once more: the address is the one that its registers still hold.
    pub(crate) async fn write_again(&mut self) -> anyhow::Result<Ended> {
        self.device.write32(COMMAND, COMMAND_WRITE).await?;
        self.interrupted().await?;
        self.ended().await
    }

    /// Adds to the 8 bytes at an address (FetchAdd).
    pub(crate) async fn add(&mut self, to: Iova, operand: u64) -> anyhow::Result<Ended> {
        self.device.write64(DESTINATION, to.get()).await?;
        self.device.write64(DATA, operand).await?;
        self.command(COMMAND_FETCH_ADD, 8).await
    }

    /// Receives one packet of `bytes` bytes through the first descriptor of a ring.
    pub(crate) async fn receive_one(&mut self, ring: Iova, bytes: u32) -> anyhow::Result<Ended> {
        self.device.write64(RING_BASE, ring.get()).await?;
        self.device.write32(RING_SIZE, 2).await?;
        self.device.write32(PACKET_BYTES, bytes).await?;
        self.device.write32(RING_CONTROL, RING_ENABLE | 1 << RING_BURST_SHIFT).await?;
        self.device.write32(RING_TAIL, 1).await?;
        self.interrupted().await?;
        let ended = self.ended().await?;
        let received = self.device.read32(RING_PACKETS).await?;
        self.device.write32(RING_CONTROL, 0).await?;
        // BYTES_DONE is the last command's.
        Ok(Ended { bytes_done: received.saturating_mul(bytes), ..ended })
    }

    /// Makes one read of `bytes` bytes.
    pub(crate) async fn read(&mut self, from: Iova, bytes: u32) -> anyhow::Result<Ended> {
        self.device.write64(SOURCE, from.get()).await?;
        self.command(COMMAND_READ, bytes).await
    }

    /// Raises the interrupt and nothing else.
    pub(crate) async fn interrupt(&mut self) -> anyhow::Result<Ended> {
        self.command(COMMAND_INTERRUPT, 0).await
    }

    /// Starts a command, waits for its interrupt, and reads how it ended.
    async fn command(&mut self, command: u32, bytes: u32) -> anyhow::Result<Ended> {
        self.device.write32(LENGTH, bytes).await?;
        self.device.write32(COMMAND, command).await?;
        self.interrupted().await?;
        self.ended().await
    }

    /// Waits for an interrupt of this engine.
    pub(crate) async fn interrupted(&mut self) -> anyhow::Result<()> {
        let wait = async {
            loop {
                match self.interrupts.next().await {
                    Some(Ok(InterruptEvent::Raised(interrupt)))
                        if interrupt.device == self.device.address()
                            && interrupt.vector == self.vector.vector =>
                    {
                        return Ok(());
                    }
                    Some(Ok(_)) => {}
                    Some(Err(error)) => return Err(error).context("watch interrupts"),
                    None => bail!("the subscription to interrupts ended"),
                }
            }
        };
        tokio::time::timeout(COMMAND_DEADLINE, wait)
            .await
            .map_err(|_| anyhow::anyhow!("no interrupt came within {COMMAND_DEADLINE:?}"))?
    }

    /// How the last command ended, as the registers say.
    pub(crate) async fn ended(&self) -> anyhow::Result<Ended> {
        Ok(Ended {
            status: self.device.read32(STATUS).await?,
            reason: self.device.read32(FAULT_REASON).await?,
            address: self.device.read64(FAULT_ADDRESS).await?,
            bytes_done: self.device.read32(BYTES_DONE).await?,
        })
    }
}

async fn wait_for_agent(device: &DeviceHandle) -> anyhow::Result<u32> {
    let wait = async {
        loop {
            match device.read32(ID_VERSION).await {
                Ok(identity) => return Ok(identity),
                Err(SdkError::Refused(MmioError::DeviceAbsent(_))) => {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                Err(error) => return Err(error).context("read the identity register"),
            }
        }
    };
    tokio::time::timeout(AGENT_DEADLINE, wait).await.map_err(|_| {
        anyhow::anyhow!("no agent connected for {} within {AGENT_DEADLINE:?}", device.address())
    })?
}
