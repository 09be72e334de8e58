//! The ring replay: a driver and its NIC, through the shipping kernel floor and hardware.
//!
//! Per interrupt, in each of the two rings: the device writes (or reads) the oldest packets, buffer after buffer; the driver unmaps their
//! buffers, the last one as the end of the burst; the driver maps as many new ones. Time is simulated: a packet every 1.2 µs, which is
//! 10 Gbit/s of packets of 1,500 bytes.

use std::collections::VecDeque;

use iommu_kernel::Tick;
use iommu_types::{Direction, Gpa, GpaRange, PAGE_SIZE_BYTES};

use super::configuration::Configuration;
use super::counts::Counts;
use super::stage::{Buffer, Stage};
use super::watch::Watch;
use super::workload::Workload;
use crate::in_process::host::{Caches, LARGE};

/// Time between packets.
const PACKET_NS: u64 = 1200;
/// Room for the largest workload with a shadow of a page for every buffer, and for tables and records.
const MEMORY_BYTES: u64 = 128 << 20;
/// A receive buffer is half a page.
const RX_STRIDE_BYTES: u64 = PAGE_SIZE_BYTES / 2;
/// Transmit buffers of a kind, at least: what programs have written and the NIC has not sent.
const TX_BUFFERS_MIN: u32 = 256;

/// A driver and its NIC at work.
pub(crate) struct Replay {
    workload: Workload,
    pub(crate) stage: Stage,
    rings: [Ring; 2],
    now_ns: u64,
    /// What the device writes, and where its reads go.
    bytes: Vec<u8>,
    watch: Option<Watch>,
}

/// One ring.
struct Ring {
    number: u16,
    direction: Direction,
    /// One for each buffer of a packet.
    pools: Vec<Pool>,
    /// What is mapped, oldest first.
    live: VecDeque<Buffer>,
}

/// Buffers of one kind, used in turn.
struct Pool {
    base: Gpa,
    size_bytes: u64,
    stride_bytes: u64,
    count: u64,
    next: u64,
}

impl Pool {
    fn new(stage: &mut Stage, size_bytes: u32, stride_bytes: u64, count: u32) -> anyhow::Result<Self> {
        let memory = stage.allocate(stride_bytes * u64::from(count))?;
        let (size_bytes, count) = (size_bytes.into(), count.into());
        Ok(Self { base: memory.base(), size_bytes, stride_bytes, count, next: 0 })
    }
    fn draw(&mut self) -> GpaRange {
        let offset = self.next % self.count * self.stride_bytes;
        self.next += 1;
        let base = self.base.checked_add(offset).expect("the buffer lies in the pool");
        GpaRange::new(base, self.size_bytes).expect("a buffer of a pool does not wrap")
    }
}

impl Replay {
    /// Both rings filled and once around: what comes is the steady state.
    pub(crate) fn new(configuration: Configuration, workload: Workload) -> anyhow::Result<Self> {
        Self::prepared(configuration, workload, false)
    }
    /// The same with every promise of the mode checked at every step. Its counts are disturbed by the checks.
    pub(crate) fn watched(configuration: Configuration, workload: Workload) -> anyhow::Result<Self> {
        Self::prepared(configuration, workload, true)
    }
    fn prepared(configuration: Configuration, workload: Workload, watched: bool) -> anyhow::Result<Self> {
        let caches = Caches { iotlb: LARGE, paging: LARGE };
        let mut stage = Stage::new(MEMORY_BYTES, caches, configuration.options(workload))?;
        let Workload { profile, descriptors, burst } = workload;
        let mut receive = Vec::new();
        let mut transmit = Vec::new();
        for &bytes in profile.buffers() {
            // Headers lie in a page together, as rings of them do; the rest has half a page.
            let stride = if u64::from(bytes) * 2 > RX_STRIDE_BYTES { RX_STRIDE_BYTES } else { bytes.into() };
            receive.push(Pool::new(&mut stage, bytes, stride, descriptors + 2 * burst)?);
            transmit.push(Pool::new(&mut stage, bytes, bytes.into(), TX_BUFFERS_MIN.max(4 * burst))?);
        }
        let ring = |number, direction, pools| Ring { number, direction, pools, live: VecDeque::new() };
        let rings = [ring(0, Direction::FromDevice, receive), ring(1, Direction::ToDevice, transmit)];
        let bytes = vec![0x5a; PAGE_SIZE_BYTES as usize];
        let watch = stage.host().filter(|_| watched).map(|stage| Watch::of(stage));
        let mut replay = Self { workload, stage, rings, now_ns: 0, bytes, watch };
        replay.post(0, descriptors);
        replay.post(1, burst);
        // Once around the ring at most: that every buffer has been used is no other state than that half of them have been.
        for _ in 0..(descriptors / burst).clamp(2, 300) {
            replay.interrupt();
        }
        Ok(replay)
    }
    /// So many interrupts, and what happened per packet. A deferred queue is empty before, and after whole batches.
    pub(crate) fn counted(&mut self, interrupts: u32) -> Counts {
        if let Some(stage) = self.stage.host() {
            stage.flush();
        }
        let before = self.stage.reading();
        self.run(interrupts);
        let packets = interrupts * self.workload.packets_per_interrupt();
        Counts::between(&before, &self.stage.reading()).per(packets.into())
    }
    /// So many interrupts.
    pub(crate) fn run(&mut self, interrupts: u32) {
        for _ in 0..interrupts {
            self.interrupt();
        }
    }
    /// What the checks saw.
    pub(crate) fn seen(&self) -> &Watch {
        self.watch.as_ref().expect("the replay is watched")
    }

    fn interrupt(&mut self) {
        for number in 0..2 {
            let buffers = self.buffers(self.workload.burst);
            self.stage.use_all(self.rings[number].live.iter().take(buffers), &mut self.bytes);
        }
        for number in 0..2 {
            self.complete(number);
        }
        for number in 0..2 {
            self.post(number, self.workload.burst);
        }
        self.now_ns += PACKET_NS * u64::from(self.workload.packets_per_interrupt());
        self.stage.flush_if_due(self.now());
        if let (Some(watch), Some(stage)) = (&mut self.watch, self.stage.host()) {
            watch.time_passed(stage);
        }
    }
    /// Unmaps the oldest packets of a ring.
    fn complete(&mut self, number: usize) {
        let (now, buffers) = (self.now(), self.buffers(self.workload.burst));
        let ring = &mut self.rings[number];
        for left in (0..buffers).rev() {
            // A watched driver unmaps the newest first, so that what the device has cached is unmapped before the burst ends.
            let taken = if self.watch.is_some() { ring.live.remove(left) } else { ring.live.pop_front() };
            let buffer = taken.expect("a ring holds what it completes");
            let is_last = left == 0;
            if let (Some(watch), Some(stage)) = (&mut self.watch, self.stage.host()) {
                watch.before_unmap(stage, &buffer);
                stage.unmap(&buffer, ring.number, is_last, now);
                watch.after_unmap(stage, &buffer, is_last);
            } else {
                self.stage.unmap(&buffer, ring.number, is_last, now);
            }
        }
    }
    /// Maps so many packets more.
    fn post(&mut self, number: usize, packets: u32) {
        let now = self.now();
        let ring = &mut self.rings[number];
        for _ in 0..packets {
            for pool in &mut ring.pools {
                let buffer = self.stage.map(pool.draw(), ring.direction, ring.number, now);
                ring.live.push_back(buffer);
                if let (Some(watch), Some(stage)) = (&mut self.watch, self.stage.host()) {
                    watch.after_map(stage, &buffer);
                }
            }
        }
    }
    fn buffers(&self, packets: u32) -> usize {
        packets as usize * self.workload.profile.buffers().len()
    }
    fn now(&self) -> Tick {
        Tick(self.now_ns / 1000)
    }
}
