//! What the measurement asks its peers and what they tell: one line of JSON each, on standard input and output.

use std::collections::BTreeMap;
use std::time::Duration;

use iommu_types::{DomainOptions, Protection, Rings};
use serde::{Deserialize, Serialize};

/// Packets that a guest has under way: it asks for the next batch when all of these are done.
pub(super) const BATCH: u32 = 128;
/// Slots of a ring: a batch is invalidated while the next one is mapped.
const RING_SLOTS: u32 = 2 * BATCH;

/// How a device that is assigned to a guest is protected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Mode {
    Strict,
    Deferred,
    Ring,
    /// A direct map of all memory of the guest.
    Passthrough,
}

impl Mode {
    pub(super) const ALL: [Self; 4] = [Self::Strict, Self::Deferred, Self::Ring, Self::Passthrough];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Strict => "strict",
            Self::Deferred => "deferred",
            Self::Ring => "ring",
            Self::Passthrough => "passthrough",
        }
    }
    pub(super) const fn options(self) -> DomainOptions {
        DomainOptions::new(match self {
            Self::Strict => Protection::Strict,
            Self::Deferred => Protection::DEFERRED,
            Self::Ring => Protection::Ring(Rings { count: 2, slots: RING_SLOTS }),
            Self::Passthrough => Protection::Passthrough,
        })
    }
}

/// Packets to receive.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Work {
    pub(super) packet_bytes: u32,
    pub(super) milliseconds: u64,
}

impl Work {
    pub(super) const fn duration(self) -> Duration {
        Duration::from_millis(self.milliseconds)
    }
}

/// One batch of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Shape {
    pub(super) operations: u32,
    pub(super) size_bytes: u32,
    /// How many of them go where nothing is mapped.
    pub(super) strays: u32,
}

/// DMA to do: these batches in turn.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct DmaWork {
    pub(super) iova: u64,
    pub(super) mapped_bytes: u64,
    pub(super) shapes: Vec<Shape>,
    pub(super) in_flight: usize,
    /// Operations in a second, if it holds itself back.
    pub(super) operations_per_second: Option<u32>,
    pub(super) milliseconds: u64,
}

/// What came of it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct DmaDone {
    /// Operations that were carried out.
    pub(super) operations: u64,
    /// Operations that went where nothing is mapped and were carried out, which is to say: faulted.
    pub(super) faults: u64,
    /// Those that were refused, by the name of the limit (or the code of another refusal).
    pub(super) refused: BTreeMap<String, u64>,
    pub(super) seconds: f64,
    /// Of whole batches.
    pub(super) p50_us: f64,
    pub(super) p99_us: f64,
}

/// What the driver of a neighbour does.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(super) struct Requests {
    /// Calls under way at once.
    pub(super) calls: usize,
    /// Streams of map and unmap batches.
    pub(super) streams: usize,
    /// In a second, of both kinds together, if it holds itself back.
    pub(super) per_second: Option<u32>,
    /// Subscriptions that it tries to have.
    pub(super) watchers: usize,
    /// TLS connections that it makes and drops, at once.
    pub(super) connections: usize,
    pub(super) milliseconds: u64,
}

/// What came of it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct RequestsDone {
    /// Requests that were answered.
    pub(super) answered: u64,
    /// Those that were refused, by the name of the limit.
    pub(super) refused: BTreeMap<String, u64>,
    pub(super) watchers: u64,
    pub(super) connections: u64,
    /// Until the last answer, which comes late to what is refused.
    pub(super) seconds: f64,
}

/// What a peer is asked.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Ask {
    /// A guest: packets through its own device.
    Direct { mode: Mode, work: Work },
    /// A guest: packets through the hypervisor's.
    Multiplexed { work: Work },
    /// A hypervisor: what it has copied.
    Copied,
    /// A guest: a buffer, mapped for its device for good.
    Map { size_bytes: u64 },
    /// A guest: its fault log after a place in it.
    Faults { after: String },
    /// A guest: requests.
    Requests(Requests),
    /// A device.
    Dma(DmaWork),
}

/// What it tells.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Told {
    /// It can be asked. A hypervisor tells the numbers of its virtual machines.
    Ready {
        vms: Vec<u32>,
    },
    Packets {
        packets: u64,
        copied_bytes: u64,
        seconds: f64,
    },
    Copied {
        packets: u64,
        bytes: u64,
    },
    Mapped {
        iova: u64,
    },
    Faults {
        recorded: u64,
        missed: u64,
        end: String,
    },
    Requests(RequestsDone),
    Dma(DmaDone),
    Failed {
        why: String,
    },
}
