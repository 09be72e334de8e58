//! An operating system for a bare machine, in as few words as it takes: tables in memory, registers, the queue.
//!
//! Names and bits are those of VT-d 5.10 chapters 9 and 11.

use std::time::Duration;

use bytes::Bytes;
use guest_sdk::BareMachine;
use iommu_types::SourceId;

use crate::stage::eventually;

/// Global command.
pub const GCMD: u32 = 0x18;
/// Global status.
pub const GSTS: u32 = 0x1c;
/// Root table address.
pub const RTADDR: u32 = 0x20;
/// Fault status.
pub const FSTS: u32 = 0x34;
/// Fault event control.
pub const FECTL: u32 = 0x38;
/// Fault event data.
pub const FEDATA: u32 = 0x3c;
/// Fault event address.
pub const FEADDR: u32 = 0x40;
/// Capabilities.
pub const CAP: u32 = 0x08;
/// Queue head.
pub const IQH: u32 = 0x80;
/// Queue tail.
pub const IQT: u32 = 0x88;
/// Queue address.
pub const IQA: u32 = 0x90;
/// Interrupt remapping table address.
pub const IRTA: u32 = 0xb8;

/// Translation enable.
pub const TE: u32 = 1 << 31;
/// Set root table pointer.
pub const SRTP: u32 = 1 << 30;
/// Queued invalidation enable.
pub const QIE: u32 = 1 << 26;
/// Interrupt remapping enable.
pub const IRE: u32 = 1 << 25;
/// Set interrupt remapping table pointer.
pub const SIRTP: u32 = 1 << 24;

/// Read permission of a second-stage entry.
pub const READ: u64 = 1;
/// Write permission of a second-stage entry.
pub const WRITE: u64 = 2;

const ROOT: u64 = 0x1000;
const CONTEXT: u64 = 0x2000;
const LEVEL_4: u64 = 0x3000;
const LEVEL_3: u64 = 0x4000;
const LEVEL_2: u64 = 0x5000;
const LEVEL_1: u64 = 0x6000;
const QUEUE: u64 = 0x8000;
const INTERRUPT_TABLE: u64 = 0x9000;
const STATUS: u64 = 0xa000;
/// Entries in the queue: one page of descriptors of 16 bytes.
const QUEUE_ENTRIES: u64 = 256;
/// The domain of the one device.
const DOMAIN: u64 = 7;
/// 48 bits, 4 levels, as in a context entry.
const ADDRESS_WIDTH_48: u64 = 2;

/// The operating system of a machine with one device on bus 0.
#[derive(Debug)]
pub struct System {
    /// Its machine.
    pub machine: BareMachine,
    device: SourceId,
    /// Of the queue, in descriptors.
    tail: u64,
    waits: u32,
}

impl System {
    /// An operating system that has not done anything yet.
    pub fn new(machine: BareMachine, device: SourceId) -> Self {
        Self { machine, device, tail: 0, waits: 0 }
    }

    /// Writes an entry of one or two 8-byte words.
    pub async fn entry(&self, at: u64, words: &[u64]) {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.machine.write_memory(at, bytes).await.expect("an entry lies in memory");
    }

    /// Writes memory.
    pub async fn poke(&self, at: u64, bytes: impl Into<Bytes>) {
        self.machine.write_memory(at, bytes).await.expect("memory is writable");
    }

    /// Reads memory.
    pub async fn peek(&self, at: u64, size_bytes: u64) -> Bytes {
        self.machine.read_memory(at, size_bytes).await.expect("memory is readable")
    }

    /// Maps page number `page` (below 512) to a frame.
    pub async fn map(&self, page: u64, frame: u64, permissions: u64) {
        self.entry(LEVEL_1 + 8 * page, &[frame | permissions]).await;
    }

    /// Writes root, context and upper tables for the device.
    pub async fn write_tables(&self) {
        let devfn = u64::from(self.device.devfn());
        self.entry(ROOT, &[CONTEXT | 1, 0]).await;
        self.entry(CONTEXT + 16 * devfn, &[LEVEL_4 | 1, (DOMAIN << 8) | ADDRESS_WIDTH_48]).await;
        self.entry(LEVEL_4, &[LEVEL_3 | READ | WRITE]).await;
        self.entry(LEVEL_3, &[LEVEL_2 | READ | WRITE]).await;
        self.entry(LEVEL_2, &[LEVEL_1 | READ | WRITE]).await;
    }

    /// Gives a command as software must: all status bits that hold, and one change; then waits for its status.
    pub async fn command(&self, bit: u32) {
        let status = self.machine.read32(GSTS).await.expect("GSTS");
        self.machine.write32(GCMD, (status & 0x96ff_ffff) | bit).await.expect("GCMD");
        eventually(Duration::from_secs(5), &format!("GSTS shows {bit:#x}"), async || {
            (self.machine.read32(GSTS).await.expect("GSTS") & bit != 0).then_some(())
        })
        .await;
    }

    /// Latches the root table, starts the queue, invalidates everything, and turns translation on.
    pub async fn start_translation(&mut self) {
        self.machine.write64(RTADDR, ROOT).await.expect("RTADDR");
        self.command(SRTP).await;
        self.machine.write64(IQA, QUEUE).await.expect("IQA");
        self.machine.write64(IQT, 0).await.expect("IQT");
        self.command(QIE).await;
        self.invalidate(&[[1 | (1 << 4), 0], [2 | (1 << 4), 0]]).await;
        self.command(TE).await;
    }

    /// Invalidates one page of the device's domain.
    pub async fn invalidate_page(&mut self, iova: u64) {
        self.invalidate(&[[2 | (3 << 4) | (DOMAIN << 16), iova & !0xfff]]).await;
    }

    /// Queues descriptors and a wait descriptor behind them, and waits for its status in memory.
    pub async fn invalidate(&mut self, descriptors: &[[u64; 2]]) {
        self.waits += 1;
        // A wait descriptor that writes its status data to its status address.
        let wait = [5 | (1 << 5) | (u64::from(self.waits) << 32), STATUS];
        for descriptor in descriptors.iter().chain([&wait]) {
            self.entry(QUEUE + 16 * self.tail, descriptor).await;
            self.tail = (self.tail + 1) % QUEUE_ENTRIES;
        }
        self.machine.write64(IQT, self.tail * 16).await.expect("IQT");
        let expected = self.waits.to_le_bytes();
        eventually(Duration::from_secs(5), "the wait descriptor completes", async || {
            (self.peek(STATUS, 4).await[..] == expected).then_some(())
        })
        .await;
    }

    /// Writes an interrupt remapping entry for the device, latches the table, and turns remapping on.
    pub async fn start_interrupt_remapping(&mut self, index: u64, vector: u8, destination: u8) {
        let low = 1 | (u64::from(vector) << 16) | (u64::from(destination) << 40);
        // SVT 01: the requester must be exactly the device.
        let high = u64::from(self.device.get()) | (1 << 18);
        self.entry(INTERRUPT_TABLE + 16 * index, &[low, high]).await;
        // 2^(7+1) entries of 16 bytes: one page.
        self.machine.write64(IRTA, INTERRUPT_TABLE | 7).await.expect("IRTA");
        self.command(SIRTP).await;
        // Global invalidation of the interrupt entry cache.
        self.invalidate(&[[4, 0]]).await;
        self.command(IRE).await;
    }

    /// The fault recording register with this number: its two words.
    pub async fn fault_record(&self, number: u32) -> [u64; 2] {
        let cap = self.machine.read64(CAP).await.expect("CAP");
        let offset = u32::try_from((cap >> 24) & 0x3ff).expect("ten bits") * 16 + number * 16;
        let low = self.machine.read64(offset).await.expect("FRCD");
        [low, self.machine.read64(offset + 8).await.expect("FRCD")]
    }
}

/// Address of an interrupt message in remappable format for an index below 32,768.
pub fn message_address(index: u64) -> u64 {
    0xfee0_0000 | (index << 5) | (1 << 4)
}
