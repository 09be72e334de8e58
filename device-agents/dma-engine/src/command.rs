//! The commands: what each does on the bus.

use bytes::Bytes;
use device_runtime::AtomicValue;
use iommu_types::Iova;

use crate::bus::Bus;
use crate::pattern;
use crate::registers::*;
use crate::state::{Command, Failure, Msi};

/// Bytes that are copied or filled at once, where the bus takes so many; two of these are in memory at a time.
const CHUNK_BYTES: u32 = 256 << 10;

/// The chunk for a bus: a multiple of the fill pattern.
fn chunk_bytes(bus: &impl Bus) -> u32 {
    CHUNK_BYTES.min(bus.operation_bytes_max()) & !7
}

/// How far a command has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Progress {
    /// Bytes done.
    pub(crate) bytes_done: u32,
    /// What DATA reads as afterwards, when the command says something there.
    pub(crate) data: Option<u64>,
}

/// Carries a command out. The progress is true whether it succeeds or not. `alive` says whether to go on; it
/// is asked before every chunk.
pub(crate) async fn carry_out(
    bus: &impl Bus,
    command: Command,
    msi: Msi,
    alive: impl Fn() -> bool + Sync,
) -> (Progress, Result<(), Failure>) {
    let mut progress = Progress::default();
    let outcome = match command.code {
        COMMAND_COPY => copy(bus, command, &alive, &mut progress).await,
        COMMAND_FILL => fill(bus, command, &alive, &mut progress).await,
        COMMAND_READ => read(bus, command, &mut progress).await,
        COMMAND_WRITE => write(bus, command, &mut progress).await,
        COMMAND_FETCH_ADD => fetch_add(bus, command, &mut progress).await,
        COMMAND_INTERRUPT => {
            bus.msi(msi.address, msi.data).await.map_err(|error| Failure::of(error, msi.address.get()))
        }
        other => unreachable!("the register file admits no command {other}"),
    };
    (progress, outcome)
}

/// The address `offset` bytes into the range of a command.
fn at(base: u64, offset: u32) -> Result<Iova, Failure> {
    let wraps = Failure { address: base, reason: REASON_WRAPS };
    Iova::new(base).checked_add(u64::from(offset)).ok_or(wraps)
}

/// The bytes of a failed operation that were done, added to those before it.
fn partly(done: u32, error: device_runtime::DmaError) -> u32 {
    match error {
        device_runtime::DmaError::Fault(fault) => done.saturating_add(fault.done_bytes),
        _ => done,
    }
}

fn go_on(alive: &impl Fn() -> bool, address: u64) -> Result<(), Failure> {
    if alive() { Ok(()) } else { Err(Failure { address, reason: REASON_RESET }) }
}

/// Copies chunk by chunk, reading the next while one is written.
async fn copy(
    bus: &impl Bus,
    command: Command,
    alive: &impl Fn() -> bool,
    progress: &mut Progress,
) -> Result<(), Failure> {
    let Command { source, destination, length, .. } = command;
    let largest = chunk_bytes(bus);
    let read_chunk = |offset: u32| async move {
        let size = largest.min(length.saturating_sub(offset));
        if size == 0 {
            return Ok(Bytes::new());
        }
        let from = at(source, offset)?;
        bus.read(from, size).await.map_err(|error| Failure::of(error, from.get()))
    };
    let mut chunk = read_chunk(0).await?;
    while !chunk.is_empty() {
        go_on(alive, destination)?;
        let offset = progress.bytes_done;
        let to = at(destination, offset)?;
        // The end of a chunk lies within `length`.
        let behind = offset + chunk.len() as u32;
        let (written, next) = tokio::join!(bus.write(to, chunk), read_chunk(behind));
        match written {
            Ok(()) => progress.bytes_done = behind,
            Err(error) => {
                progress.bytes_done = partly(offset, error);
                return Err(Failure::of(error, to.get()));
            }
        }
        chunk = next?;
    }
    Ok(())
}

async fn fill(
    bus: &impl Bus,
    command: Command,
    alive: &impl Fn() -> bool,
    progress: &mut Progress,
) -> Result<(), Failure> {
    // Chunks are a multiple of the pattern, so one serves for all.
    let largest = chunk_bytes(bus);
    let content = pattern::fill(command.data, largest.min(command.length) as usize);
    while progress.bytes_done < command.length {
        let offset = progress.bytes_done;
        let to = at(command.destination, offset)?;
        go_on(alive, to.get())?;
        let size = largest.min(command.length - offset);
        if let Err(error) = bus.write(to, content.slice(..size as usize)).await {
            progress.bytes_done = partly(offset, error);
            return Err(Failure::of(error, to.get()));
        }
        progress.bytes_done = offset + size;
    }
    Ok(())
}

async fn read(bus: &impl Bus, command: Command, progress: &mut Progress) -> Result<(), Failure> {
    match bus.read(Iova::new(command.source), command.length).await {
        Ok(content) => {
            let mut first = [0; 8];
            let size = content.len().min(8);
            first[..size].copy_from_slice(&content[..size]);
            *progress = Progress { bytes_done: command.length, data: Some(u64::from_le_bytes(first)) };
            Ok(())
        }
        Err(error) => {
            progress.bytes_done = partly(0, error);
            Err(Failure::of(error, command.source))
        }
    }
}

async fn write(bus: &impl Bus, command: Command, progress: &mut Progress) -> Result<(), Failure> {
    if command.length > SINGLE_BYTES_MAX {
        return Err(Failure { address: command.destination, reason: REASON_OVER_LIMIT });
    }
    let content = pattern::fill(command.data, command.length as usize);
    match bus.write(Iova::new(command.destination), content).await {
        Ok(()) => {
            progress.bytes_done = command.length;
            Ok(())
        }
        Err(error) => {
            progress.bytes_done = partly(0, error);
            Err(Failure::of(error, command.destination))
        }
    }
}

async fn fetch_add(bus: &impl Bus, command: Command, progress: &mut Progress) -> Result<(), Failure> {
    let operand = if command.length == 4 {
        // The low half is the operand.
        AtomicValue::U32(command.data as u32)
    } else {
        AtomicValue::U64(command.data)
    };
    let old = bus.fetch_add(Iova::new(command.destination), operand).await;
    match old.map_err(|error| Failure::of(error, command.destination))? {
        AtomicValue::U32(old) => progress.data = Some(old.into()),
        AtomicValue::U64(old) => progress.data = Some(old),
        AtomicValue::U128(_) => unreachable!("an operand of 4 or 8 bytes has an old value of that size"),
    }
    progress.bytes_done = command.length;
    Ok(())
}
