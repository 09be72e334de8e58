//! A `dma-engine` as the device behind a [`Multiplexer`](guest_sdk::multiplexer::Multiplexer).
//!
//! Its driver has two areas of coherent memory, one that the engine reads and one that it writes; they are mapped once. A batch of packets lies in one piece, so a
//! batch is one command and one interrupt, however many packets it has. Transmitting reads them (READ); receiving writes a pattern (WRITE).

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use dma_engine::registers::*;
use guest_sdk::errors::{DmaMapError, InterruptError, MemoryError, MmioError};
use guest_sdk::multiplexer::{BATCH_BYTES_MAX, Backend, DeviceFailure};
use guest_sdk::{
    Coherent, DeviceAddress, DeviceHandle, Driver, InterruptEvent, MsiVector, Never, SdkError, Subscription,
};

/// A command ends within milliseconds; a machine under load may need more. It is below the 10 s after which a hypercall is given up.
const COMMAND_DEADLINE: Duration = Duration::from_secs(5);
/// What received packets are made of.
pub const PATTERN: u64 = 0x7878_7878_7878_7878;

// A batch is one operation of the engine.
const _: () = assert!(BATCH_BYTES_MAX <= SINGLE_BYTES_MAX);

/// Why the engine was not started, or did not do as it was told.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// Another device.
    #[error("{device} is not a dma-engine: its identity register reads {identity:#x}")]
    NotAnEngine {
        /// Which.
        device: DeviceAddress,
        /// What it says.
        identity: u32,
    },
    /// No coherent memory.
    #[error("coherent memory: {0}")]
    Coherent(#[from] SdkError<DmaMapError>),
    /// Its memory was not read or written.
    #[error("its buffers: {0}")]
    Memory(#[from] SdkError<MemoryError>),
    /// Its registers were not read or written.
    #[error("its registers: {0}")]
    Registers(#[from] SdkError<MmioError>),
    /// It has no interrupt.
    #[error("its interrupt: {0}")]
    Interrupt(#[from] SdkError<InterruptError>),
    /// Its interrupts are not told any more.
    #[error("its interrupts are not told: {}", .0.as_ref().map_or("the subscription ended".to_owned(), ToString::to_string))]
    Interrupts(Option<SdkError<Never>>),
    /// It did not end a command.
    #[error("no command ended within {COMMAND_DEADLINE:?}")]
    Deadline,
}

/// An engine whose interrupt and buffers are programmed.
#[derive(Debug)]
pub struct EngineBackend {
    device: DeviceHandle,
    interrupts: Subscription<InterruptEvent, Never>,
    vector: MsiVector,
    /// The engine reads here.
    sent: Coherent,
    /// The engine writes here.
    received: Coherent,
    /// Whether the registers hold what [`program`](Self::program) wrote; not after a command that did not end.
    programmed: bool,
}

/// How a command ended.
struct Ended {
    bytes_done: u32,
    failure: Option<DeviceFailure>,
}

impl EngineBackend {
    /// Starts the engine at `device` of a driver of the host; its agent must be connected. The buffers are the session's, and go with it.
    pub async fn start(driver: &Driver, device: DeviceAddress) -> Result<Self, EngineError> {
        let device = driver.device(device);
        let identity = device.read32(ID_VERSION).await?;
        if identity != ID << 16 | VERSION {
            return Err(EngineError::NotAnEngine { device: device.address(), identity });
        }
        let interrupts =
            driver.watch_interrupts().await.map_err(|error| EngineError::Interrupts(Some(error)))?;
        let vector = device.allocate_interrupt().await?;
        let sent = driver.dma_alloc_coherent(&device, BATCH_BYTES_MAX.into()).await?;
        let received = driver.dma_alloc_coherent(&device, BATCH_BYTES_MAX.into()).await?;
        let mut backend = Self { device, interrupts, vector, sent, received, programmed: false };
        backend.program().await?;
        Ok(backend)
    }

    /// Writes what stays the same from command to command, where it may not be there.
    async fn program(&mut self) -> Result<(), EngineError> {
        if self.programmed {
            return Ok(());
        }
        self.device.write32(CONTROL, CONTROL_RESET).await?;
        self.device.write64(MSI_ADDRESS, self.vector.address.get()).await?;
        self.device.write32(MSI_DATA, self.vector.data).await?;
        self.device.write32(MSI_ENABLE, 1).await?;
        self.device.write64(SOURCE, self.sent.iova().get()).await?;
        self.device.write64(DESTINATION, self.received.iova().get()).await?;
        self.programmed = true;
        Ok(())
    }

    /// Starts a command and waits until it has ended.
    async fn command(&mut self, command: u32, bytes: u32) -> Result<Ended, EngineError> {
        // Until the command has ended well, nobody knows what the registers hold.
        self.programmed = false;
        self.device.write32(LENGTH, bytes).await?;
        self.device.write32(COMMAND, command).await?;
        let ended = tokio::time::timeout(COMMAND_DEADLINE, self.ended()).await;
        let status = ended.map_err(|_| EngineError::Deadline)??;
        self.programmed = true;
        if status & STATUS_ERROR == 0 {
            return Ok(Ended { bytes_done: bytes, failure: None });
        }
        let reason = self.device.read32(FAULT_REASON).await?;
        let address = self.device.read64(FAULT_ADDRESS).await?;
        let bytes_done = self.device.read32(BYTES_DONE).await?.min(bytes);
        let why = format!("reason {reason:#x} at {address:#x}");
        Ok(Ended { bytes_done, failure: Some(DeviceFailure::new(why)) })
    }

    /// Waits for the end of a command; gives STATUS. An interrupt may be one of an earlier command.
    async fn ended(&mut self) -> Result<u32, EngineError> {
        loop {
            match self.interrupts.next().await {
                Some(Ok(InterruptEvent::Raised(interrupt)))
                    if interrupt.device != self.device.address()
                        || interrupt.vector != self.vector.vector => {}
                // After a gap the interrupt may have been missed, so the device is looked at as well.
                Some(Ok(InterruptEvent::Raised(_) | InterruptEvent::Gap)) => {
                    let status = self.device.read32(STATUS).await?;
                    if status & STATUS_BUSY == 0 && status & (STATUS_DONE | STATUS_ERROR) != 0 {
                        return Ok(status);
                    }
                }
                Some(Err(error)) => return Err(EngineError::Interrupts(Some(error))),
                None => return Err(EngineError::Interrupts(None)),
            }
        }
    }

    async fn send(&mut self, packets: &[Bytes]) -> Result<Ended, EngineError> {
        self.program().await?;
        let mut together = BytesMut::with_capacity(packets.iter().map(Bytes::len).sum());
        packets.iter().for_each(|packet| together.extend_from_slice(packet));
        let bytes = together.len() as u32;
        self.sent.memory().write(self.sent.range().base(), together).await?;
        self.command(COMMAND_READ, bytes).await
    }

    /// What the engine wrote, and how the command ended.
    async fn take(&mut self, bytes: u32) -> Result<(Bytes, Ended), EngineError> {
        self.program().await?;
        // READ leaves the first bytes that it read in this register, and those are another guest's.
        self.device.write64(DATA, PATTERN).await?;
        let ended = self.command(COMMAND_WRITE, bytes).await?;
        let written = match ended.bytes_done {
            0 => Bytes::new(),
            bytes => self.received.memory().read(self.received.range().base(), bytes.into()).await?,
        };
        Ok((written, ended))
    }
}

fn failed(error: &EngineError) -> DeviceFailure {
    match error {
        EngineError::Deadline => DeviceFailure::timeout(error.to_string()),
        _ => DeviceFailure::new(error.to_string()),
    }
}

/// Where each of these sizes ends when they lie in one piece.
fn ends(sizes: impl Iterator<Item = u32>) -> impl Iterator<Item = u32> {
    sizes.scan(0, |end, size| {
        *end += size;
        Some(*end)
    })
}

fn why(ended: &Ended) -> DeviceFailure {
    ended.failure.clone().unwrap_or_else(|| DeviceFailure::new("it was not reached"))
}

impl Backend for EngineBackend {
    async fn transmit(&mut self, packets: &[Bytes]) -> Vec<Result<(), DeviceFailure>> {
        match self.send(packets).await {
            Err(error) => vec![Err(failed(&error)); packets.len()],
            Ok(ended) => ends(packets.iter().map(|packet| packet.len() as u32))
                .map(|end| if end <= ended.bytes_done { Ok(()) } else { Err(why(&ended)) })
                .collect(),
        }
    }

    async fn receive(&mut self, sizes: &[u32]) -> Vec<Result<Bytes, DeviceFailure>> {
        match self.take(sizes.iter().sum()).await {
            Err(error) => vec![Err(failed(&error)); sizes.len()],
            Ok((written, ended)) => ends(sizes.iter().copied())
                .zip(sizes)
                .map(|(end, size)| match end <= ended.bytes_done {
                    // Only what this command wrote: the rest of the buffer is what earlier ones left.
                    true => Ok(written.slice((end - size) as usize..end as usize)),
                    false => Err(why(&ended)),
                })
                .collect(),
        }
    }
}
