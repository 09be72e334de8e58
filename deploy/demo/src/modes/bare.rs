//! No protection at all: a machine whose operating system never turned translation on.

use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use dma_engine::registers::*;
use guest_sdk::errors::MmioError;
use guest_sdk::{AccessWidth, BareMachine, Connection, MachineDevice, SdkError, SourceId};

use super::driver::{WRITE_BYTES, begin, canary, end, written};
use super::expected::Attack;
use super::seen::{Memory, Seen};
use crate::engine::{Ended, PATTERN};
use crate::report::Told;

/// Memory of the machine.
const MEMORY_BYTES: u64 = 2 << 20;
/// Where its operating system puts the buffer.
const BUFFER: u64 = 0x10_0000;
/// Name of its device.
const DEVICE: &str = "bare-engine";
/// Global status (VT-d 5.10 §11.4.4.2), and translation enable status in it.
const GSTS: u32 = 0x1c;
const TES: u32 = 1 << 31;
/// Fault status (§11.4.7.1): zero when nothing was recorded.
const FSTS: u32 = 0x34;
/// The agent is started when it is asked for; a command ends within milliseconds. A machine under load may need more.
const DEADLINE: Duration = Duration::from_secs(10);

/// The client of bare machines for whom the server makes a certificate by itself.
const CLIENT: &str = "bare";

/// What the parent says on the command line.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Where the server listens.
    #[arg(long)]
    server: String,
}

/// Makes the machine and attacks its memory. The machine goes with the session.
pub(crate) async fn run(options: Options) -> anyhow::Result<()> {
    let attack = Attack::NoProtection;
    begin(attack.name(), &attack.story())?;
    let client = Connection::to(&options.server).bare(CLIENT).await.context("open a session")?;
    let source_id = SourceId::at(0, 1, 0).context("a source")?;
    let devices = vec![MachineDevice { source_id, name: DEVICE.to_owned() }];
    let machine = client.create(MEMORY_BYTES, None, devices).await.context("create a machine")?;
    let address = machine.device(source_id).to_string();
    Told::NeedsAgent { name: DEVICE.to_owned(), address }.tell()?;
    let engine = Engine { machine, source_id };
    engine.connected().await?;
    ensure!(engine.machine.read32(GSTS).await? & TES == 0, "translation is on");

    let allowed = engine.write(BUFFER).await?;
    let arrived = engine.machine.read_memory(BUFFER, WRITE_BYTES.into()).await?;
    ensure!(!allowed.is_error() && arrived == written(), "the first write ended so: {allowed}");
    // There is nothing to unmap: the driver has its data and goes on using the memory.
    let let_go = Instant::now();
    engine.machine.write_memory(BUFFER, canary()).await?;
    let ended = engine.command().await?;
    let since_unmap_us = u64::try_from(let_go.elapsed().as_micros())?;
    let content = engine.machine.read_memory(BUFFER, canary().len() as u64).await?;
    ensure!(engine.machine.read32(FSTS).await? == 0, "a fault was recorded where nothing is translated");

    let expected = attack.expected();
    let seen = Seen {
        mode: None,
        granularity: None,
        memory: Memory::of(&content, &canary(), &written()),
        device: ended,
        recorded: None,
        sanitizer: None,
        invalidations: 0,
        per: expected.invalidations.1.to_owned(),
        since_unmap_us,
    };
    end(attack.name(), &expected, seen)
}

/// The engine of a bare machine, without interrupts: nobody programmed a table for them.
struct Engine {
    machine: BareMachine,
    source_id: SourceId,
}

impl Engine {
    async fn connected(&self) -> anyhow::Result<()> {
        let wait = async {
            loop {
                match self.machine.mmio_read(self.source_id, ID_VERSION, AccessWidth::Bytes4).await {
                    Ok(identity) if identity == u64::from(ID << 16 | VERSION) => return Ok(()),
                    Ok(identity) => bail!("not a dma-engine: its identity register reads {identity:#x}"),
                    Err(SdkError::Refused(MmioError::DeviceAbsent(_))) => {
                        tokio::time::sleep(Duration::from_millis(10)).await;
                    }
                    Err(error) => return Err(error).context("read the identity register"),
                }
            }
        };
        let waited = tokio::time::timeout(DEADLINE, wait).await;
        waited.with_context(|| format!("no agent connected within {DEADLINE:?}"))?
    }

    async fn write(&self, to: u64) -> anyhow::Result<Ended> {
        self.write64(DESTINATION, to).await?;
        self.write64(DATA, PATTERN).await?;
        self.write32(LENGTH, WRITE_BYTES).await?;
        self.command().await
    }

    /// Makes the write that its registers hold, and waits for its end.
    async fn command(&self) -> anyhow::Result<Ended> {
        self.write32(COMMAND, COMMAND_WRITE).await?;
        let wait = async {
            loop {
                let status = self.read32(STATUS).await?;
                if status & (STATUS_DONE | STATUS_ERROR) != 0 {
                    return anyhow::Ok(status);
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        let waited = tokio::time::timeout(DEADLINE, wait).await;
        let status = waited.with_context(|| format!("a command was not done within {DEADLINE:?}"))??;
        Ok(Ended {
            status,
            reason: self.read32(FAULT_REASON).await?,
            address: self.machine.mmio_read(self.source_id, FAULT_ADDRESS, AccessWidth::Bytes8).await?,
            bytes_done: self.read32(BYTES_DONE).await?,
        })
    }

    async fn read32(&self, offset: u64) -> anyhow::Result<u32> {
        let value = self.machine.mmio_read(self.source_id, offset, AccessWidth::Bytes4).await?;
        u32::try_from(value).context("a register of 4 bytes")
    }

    async fn write32(&self, offset: u64, value: u32) -> anyhow::Result<()> {
        let write = self.machine.mmio_write(self.source_id, offset, AccessWidth::Bytes4, value.into());
        write.await.map_err(Into::into)
    }

    async fn write64(&self, offset: u64, value: u64) -> anyhow::Result<()> {
        let write = self.machine.mmio_write(self.source_id, offset, AccessWidth::Bytes8, value);
        write.await.map_err(Into::into)
    }
}
