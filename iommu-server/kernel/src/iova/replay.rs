//! The load that tells the allocators apart, as a generator: a ring of receive buffers and one of transmit buffers.
//!
//! Per packet the oldest receive buffer, one page, is unmapped and a new one mapped; a transmit buffer of 1, 1, 2
//! or 16 pages in turn is mapped, and the oldest of 64 unmapped (EiovaR's workload, protection.md §2
//! "Reproduction"). Nothing is random, so the counts are the same on every machine; the bench crate takes its wall
//! clock from the same steps.

use std::collections::VecDeque;

use iommu_types::IovaAllocation;

use super::{IovaAllocator, IovaCounters};

/// Pages of the transmit buffers, in turn.
const TX_PAGES: [u64; 4] = [1, 1, 2, 16];
/// Transmit buffers on their way at once.
const TX_LIVE: usize = 64;
/// A client each for the two queues.
const RX: u8 = 0;
const TX: u8 = 1;

/// Two rings over an allocator of a 48-bit domain with a device of any mask.
#[derive(Debug)]
pub struct IovaReplay {
    iovas: IovaAllocator,
    rx: VecDeque<u64>,
    tx: VecDeque<(u64, u64)>,
    sizes: std::iter::Cycle<std::array::IntoIter<u64, 4>>,
}

impl IovaReplay {
    /// A receive ring of `rx_live` pages, mapped, and an empty transmit ring.
    pub fn new(kind: IovaAllocation, rx_live: u32) -> Self {
        let sizes = TX_PAGES.into_iter().cycle();
        let iovas = IovaAllocator::new(kind, 48);
        let mut replay = Self { iovas, rx: VecDeque::new(), tx: VecDeque::new(), sizes };
        for _ in 0..rx_live {
            replay.post_rx();
        }
        replay
    }
    /// So many packets, one received and one sent each: two allocations, and two frees once the transmit ring is
    /// full.
    pub fn run(&mut self, packets: u64) {
        for _ in 0..packets {
            if let Some(first) = self.rx.pop_front() {
                self.iovas.free(first, 1, RX);
                self.post_rx();
            }
            if self.tx.len() == TX_LIVE {
                let (first, pages) = self.tx.pop_front().expect("the ring is full");
                self.iovas.free(first, pages, TX);
            }
            let pages = self.sizes.next().expect("sizes repeat");
            let first = self.iovas.allocate(pages, u64::MAX, TX).expect("48 bits are enough");
            self.tx.push_back((first, pages));
        }
    }
    /// The steady state in one number: nodes that `packets` packets look at, in allocations and frees, per
    /// allocation. The rings are turned once before.
    pub fn visits_per_allocation(&mut self, packets: u64) -> f64 {
        self.run((self.rx.len().max(TX_LIVE)) as u64);
        let before = self.iovas.counters();
        self.run(packets);
        let after = self.iovas.counters();
        (after.visits - before.visits) as f64 / (after.allocations - before.allocations) as f64
    }
    /// Of the allocator.
    pub fn counters(&self) -> IovaCounters {
        self.iovas.counters()
    }
    fn post_rx(&mut self) {
        let first = self.iovas.allocate(1, u64::MAX, RX).expect("48 bits are enough");
        self.rx.push_back(first);
    }
}
