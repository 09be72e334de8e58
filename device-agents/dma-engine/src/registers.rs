//! The register block: BAR 0, little endian.
//!
//! | offset | bytes | name | access | meaning |
//! | ------ | ----- | ---- | ------ | ------- |
//! | `0x00` | 4 | [`ID_VERSION`] | RO | [`ID`] in bits 31:16, [`VERSION`] in bits 15:0 |
//! | `0x04` | 4 | [`CONTROL`] | RW | write [`CONTROL_RESET`] to return to the state after power-on; reads 0 |
//! | `0x08` | 4 | [`STATUS`] | RO, W1C | [`STATUS_BUSY`], [`STATUS_DONE`] (W1C), [`STATUS_ERROR`] (W1C), [`STATUS_RING`], [`STATUS_MSI_FAILED`] (W1C) |
//! | `0x10` | 8 | [`SOURCE`] | RW | address to read from |
//! | `0x18` | 8 | [`DESTINATION`] | RW | address to write to |
//! | `0x20` | 4 | [`LENGTH`] | RW | bytes |
//! | `0x24` | 4 | [`COMMAND`] | RW | writing starts: [`COMMAND_COPY`], [`COMMAND_FILL`], [`COMMAND_READ`], [`COMMAND_WRITE`], [`COMMAND_INTERRUPT`], [`COMMAND_FETCH_ADD`]; reads as the last one; refused while busy |
//! | `0x28` | 8 | [`FAULT_ADDRESS`] | RO | first address that was not served |
//! | `0x30` | 4 | [`FAULT_REASON`] | RO | 0 none; 1 to 0xff VT-d's fault reason; from 0x1000 a refusal ([`REASON_FENCED`] …); from 0x2000 the engine's own ([`REASON_SESSION_LOST`] …) |
//! | `0x34` | 4 | [`BYTES_DONE`] | RO | bytes of the command that were done |
//! | `0x38` | 8 | [`DATA`] | RW | pattern of FILL and WRITE, operand of FETCH_ADD; first 8 bytes that READ read, old value of FETCH_ADD |
//! | `0x40` | 8 | [`MSI_ADDRESS`] | RW | address of the interrupt: FEEx_xxxx |
//! | `0x48` | 4 | [`MSI_DATA`] | RW | data of the interrupt |
//! | `0x4c` | 4 | [`MSI_ENABLE`] | RW | bit 0: interrupt at the end of each command and of each burst |
//! | `0x80` | 8 | [`RING_BASE`] | RW | address of descriptor 0; refused while the ring is enabled |
//! | `0x88` | 4 | [`RING_SIZE`] | RW | descriptors in the ring, 2 to [`RING_SIZE_MAX`]; refused while the ring is enabled |
//! | `0x8c` | 4 | [`RING_CONTROL`] | RW | [`RING_ENABLE`], [`RING_WRITE_BACK`], burst in bits 15:8 (0 means 1) up to [`RING_BURST_MAX`]; enabling sets head and tail to 0 |
//! | `0x90` | 4 | [`RING_HEAD`] | RO | the descriptor that the device takes next |
//! | `0x94` | 4 | [`RING_TAIL`] | RW | doorbell: the first descriptor that is not the device's; below the size |
//! | `0x98` | 4 | [`RING_PACKETS`] | RO | packets written since the ring was enabled: the sequence number of the next one |
//! | `0x9c` | 4 | [`PACKET_BYTES`] | RW | bytes of a packet, 1 to [`PACKET_BYTES_MAX`]; one larger than its buffer is cut to it |
//!
//! Registers are accessed with their own width; those of 8 bytes also in two halves of 4. Anything else is
//! refused in words. Starting a command clears DONE, ERROR, MSI_FAILED and the fault registers.
//!
//! What the commands do:
//!
//! | command | effect |
//! | ------- | ------ |
//! | COPY | reads LENGTH bytes at SOURCE and writes them at DESTINATION, in chunks of 256 KiB of which the next is read while one is written; where the two overlap, the result is undefined |
//! | FILL | writes LENGTH bytes of DATA, repeated, at DESTINATION |
//! | READ | one read of LENGTH bytes at SOURCE (0: a zero-length read); the first 8 go to DATA |
//! | WRITE | one write of LENGTH bytes of DATA, repeated, at DESTINATION |
//! | INTERRUPT | one write of MSI_DATA to MSI_ADDRESS, whatever MSI_ENABLE says |
//! | FETCH_ADD | one AtomicOp of LENGTH (4 or 8) bytes at DESTINATION that adds DATA |

use iommu_types::{AccessWidth, DmaFault, Refusal};

/// Identity of the device, in bits 31:16 of [`ID_VERSION`].
pub const ID: u32 = 0xd3a0;
/// Version of the register block, in bits 15:0 of [`ID_VERSION`].
pub const VERSION: u32 = 1;

/// Offset: identity and version.
pub const ID_VERSION: u64 = 0x00;
/// Offset: control.
pub const CONTROL: u64 = 0x04;
/// Offset: status.
pub const STATUS: u64 = 0x08;
/// Offset: address to read from.
pub const SOURCE: u64 = 0x10;
/// Offset: address to write to.
pub const DESTINATION: u64 = 0x18;
/// Offset: bytes.
pub const LENGTH: u64 = 0x20;
/// Offset: command.
pub const COMMAND: u64 = 0x24;
/// Offset: first address that was not served.
pub const FAULT_ADDRESS: u64 = 0x28;
/// Offset: why.
pub const FAULT_REASON: u64 = 0x30;
/// Offset: bytes of the command that were done.
pub const BYTES_DONE: u64 = 0x34;
/// Offset: pattern, operand, or what was read.
pub const DATA: u64 = 0x38;
/// Offset: address of the interrupt.
pub const MSI_ADDRESS: u64 = 0x40;
/// Offset: data of the interrupt.
pub const MSI_DATA: u64 = 0x48;
/// Offset: whether commands and bursts end with an interrupt.
pub const MSI_ENABLE: u64 = 0x4c;
/// Offset: address of descriptor 0.
pub const RING_BASE: u64 = 0x80;
/// Offset: descriptors in the ring.
pub const RING_SIZE: u64 = 0x88;
/// Offset: ring control.
pub const RING_CONTROL: u64 = 0x8c;
/// Offset: the descriptor that the device takes next.
pub const RING_HEAD: u64 = 0x90;
/// Offset: the first descriptor that is not the device's (doorbell).
pub const RING_TAIL: u64 = 0x94;
/// Offset: packets written since the ring was enabled.
pub const RING_PACKETS: u64 = 0x98;
/// Offset: bytes of a packet.
pub const PACKET_BYTES: u64 = 0x9c;

/// CONTROL: back to the state after power-on.
pub const CONTROL_RESET: u32 = 1 << 0;

/// STATUS: a command runs.
pub const STATUS_BUSY: u32 = 1 << 0;
/// STATUS: the last command has ended well.
pub const STATUS_DONE: u32 = 1 << 1;
/// STATUS: the last command, or a packet of the ring, was refused; see the fault registers.
pub const STATUS_ERROR: u32 = 1 << 2;
/// STATUS: the ring has descriptors that are not done.
pub const STATUS_RING: u32 = 1 << 3;
/// STATUS: an interrupt was refused; see the fault registers.
pub const STATUS_MSI_FAILED: u32 = 1 << 4;

/// COMMAND: copy.
pub const COMMAND_COPY: u32 = 1;
/// COMMAND: fill with a pattern.
pub const COMMAND_FILL: u32 = 2;
/// COMMAND: a single read.
pub const COMMAND_READ: u32 = 3;
/// COMMAND: a single write.
pub const COMMAND_WRITE: u32 = 4;
/// COMMAND: an interrupt.
pub const COMMAND_INTERRUPT: u32 = 5;
/// COMMAND: a single FetchAdd AtomicOp.
pub const COMMAND_FETCH_ADD: u32 = 6;

/// RING_CONTROL: the ring runs.
pub const RING_ENABLE: u32 = 1 << 0;
/// RING_CONTROL: completions are written into the descriptors.
pub const RING_WRITE_BACK: u32 = 1 << 1;
/// RING_CONTROL: where the burst size begins.
pub const RING_BURST_SHIFT: u32 = 8;
/// Most packets in a burst.
pub const RING_BURST_MAX: u32 = 128;
/// Most descriptors in a ring.
pub const RING_SIZE_MAX: u32 = 4096;
/// Largest packet in bytes; a burst of them stays below the largest batch of the wire (2 MiB).
pub const PACKET_BYTES_MAX: u32 = 9216;
/// Size of a packet after power-on, in bytes.
pub const PACKET_BYTES_AT_POWER_ON: u32 = 1500;
const _: () = assert!(RING_BURST_MAX * PACKET_BYTES_MAX <= 2 << 20);

/// Largest single write that WRITE makes, in bytes: the largest batch of the wire.
pub const SINGLE_BYTES_MAX: u32 = 2 << 20;

/// FAULT_REASON: a newer session of the device has fenced this one.
pub const REASON_FENCED: u32 = 0x1000;
/// FAULT_REASON: the operation belongs to an earlier assignment of the device.
pub const REASON_STALE_GENERATION: u32 = 0x1001;
/// FAULT_REASON: over a limit of the session.
pub const REASON_OVER_LIMIT: u32 = 0x1002;
/// FAULT_REASON: the operation is malformed, such as an atomic that is not aligned.
pub const REASON_MALFORMED: u32 = 0x1003;
/// FAULT_REASON: the address leads to no memory.
pub const REASON_NO_MEMORY: u32 = 0x1004;
/// FAULT_REASON: over `dma_operations_per_second` of the owner.
pub const REASON_OVER_OPERATION_RATE: u32 = 0x1005;
/// FAULT_REASON: over `dma_bytes_per_second` of the owner.
pub const REASON_OVER_BYTE_RATE: u32 = 0x1006;
/// FAULT_REASON: a refusal that this version does not know.
pub const REASON_UNKNOWN_REFUSAL: u32 = 0x1fff;
/// FAULT_REASON: the session was lost; whether the operation happened is unknown.
pub const REASON_SESSION_LOST: u32 = 0x2000;
/// FAULT_REASON: the device was reset in the middle.
pub const REASON_RESET: u32 = 0x2001;
/// FAULT_REASON: the range wraps around the end of the address space.
pub const REASON_WRAPS: u32 = 0x2002;
/// FAULT_REASON: the descriptor is not [`VALID`](crate::ring::FLAG_VALID), or its buffer has no bytes.
pub const REASON_BAD_DESCRIPTOR: u32 = 0x2003;

/// The code that FAULT_REASON shows for a fault.
pub const fn reason_code(fault: &DmaFault) -> u32 {
    match fault.reason {
        Ok(reason) => reason.0 as u32,
        Err(Refusal::Fenced) => REASON_FENCED,
        Err(Refusal::StaleGeneration) => REASON_STALE_GENERATION,
        Err(Refusal::OverLimit) => REASON_OVER_LIMIT,
        Err(Refusal::Malformed) => REASON_MALFORMED,
        Err(Refusal::NoMemory) => REASON_NO_MEMORY,
        Err(Refusal::OverOperationRate) => REASON_OVER_OPERATION_RATE,
        Err(Refusal::OverByteRate) => REASON_OVER_BYTE_RATE,
        Err(Refusal::Unknown(_)) => REASON_UNKNOWN_REFUSAL,
    }
}

/// What a register is, for checking accesses.
pub(crate) struct Specification {
    pub(crate) offset: u64,
    pub(crate) width: AccessWidth,
    pub(crate) name: &'static str,
    pub(crate) writable: bool,
}

const fn register(offset: u64, width: AccessWidth, name: &'static str, writable: bool) -> Specification {
    Specification { offset, width, name, writable }
}

/// Every register, in the order of their offsets.
pub(crate) const ALL: &[Specification] = {
    use AccessWidth::{Bytes4, Bytes8};
    &[
        register(ID_VERSION, Bytes4, "ID_VERSION", false),
        register(CONTROL, Bytes4, "CONTROL", true),
        register(STATUS, Bytes4, "STATUS", true),
        register(SOURCE, Bytes8, "SOURCE", true),
        register(DESTINATION, Bytes8, "DESTINATION", true),
        register(LENGTH, Bytes4, "LENGTH", true),
        register(COMMAND, Bytes4, "COMMAND", true),
        register(FAULT_ADDRESS, Bytes8, "FAULT_ADDRESS", false),
        register(FAULT_REASON, Bytes4, "FAULT_REASON", false),
        register(BYTES_DONE, Bytes4, "BYTES_DONE", false),
        register(DATA, Bytes8, "DATA", true),
        register(MSI_ADDRESS, Bytes8, "MSI_ADDRESS", true),
        register(MSI_DATA, Bytes4, "MSI_DATA", true),
        register(MSI_ENABLE, Bytes4, "MSI_ENABLE", true),
        register(RING_BASE, Bytes8, "RING_BASE", true),
        register(RING_SIZE, Bytes4, "RING_SIZE", true),
        register(RING_CONTROL, Bytes4, "RING_CONTROL", true),
        register(RING_HEAD, Bytes4, "RING_HEAD", false),
        register(RING_TAIL, Bytes4, "RING_TAIL", true),
        register(RING_PACKETS, Bytes4, "RING_PACKETS", false),
        register(PACKET_BYTES, Bytes4, "PACKET_BYTES", true),
    ]
};
