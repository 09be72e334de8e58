//! What the hostile device answers.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::text::{Address, Hex};

/// What it answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "snake_case")]
pub enum Answer {
    /// The session stands.
    Connected {
        /// Of the session.
        generation: u64,
        /// Of the device.
        assignment_generation: u64,
        /// Batches in flight that are allowed.
        dma_credits: u32,
        /// Operations of a batch that are allowed.
        batch_operations_max: u32,
        /// Bytes of a batch that are allowed.
        batch_bytes_max: u32,
    },
    /// There is no session, or none any more: it was refused, or ended.
    Ended(End),
    /// The operation was done.
    Done {
        /// What it brought back.
        data: Hex,
    },
    /// The operation was refused.
    Fault(Fault),
    /// A batch was answered.
    Batch {
        /// Operations that were done.
        succeeded: u64,
        /// The first of those that were not.
        faults: Vec<Fault>,
        /// How many were refused, by reason.
        refused: BTreeMap<String, u64>,
        /// Bytes that came back.
        payload_bytes: u64,
    },
    /// Operations wait to be sent.
    Queued {
        /// How many.
        waiting: u64,
    },
    /// What a scan found.
    Scanned {
        /// Addresses that were tried.
        tried: u64,
        /// Those that answered.
        answered: u64,
        /// The first of them.
        answered_at: Vec<Address>,
        /// Where the canary was found.
        canary_at: Vec<Address>,
        /// How many were refused, by reason.
        refused: BTreeMap<String, u64>,
        /// How the session ended, when it did before all were tried.
        ended: Option<End>,
    },
    /// What many operations came to.
    Counted(Counted),
    /// Rates and latencies.
    Measured {
        /// Operations that were done.
        operations: u64,
        /// Operations that were refused.
        refused: u64,
        /// How long it took.
        elapsed_us: u64,
        /// Operations in a second.
        operations_per_second: f64,
        /// Bytes in a second.
        bytes_per_second: f64,
        /// Time from a batch to its answer: 50th, 90th, 99th and 99.9th percentile, and the longest.
        latency_us: [u64; 5],
    },
    /// What it knows of itself.
    Status(Status),
    /// It was done; there is nothing to say.
    Well,
    /// The command makes no sense, or not now.
    Wrong {
        /// Why, and what would.
        why: String,
    },
}

/// How a session ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// Stable reason, such as `IDENTITY_REFUSED`; `CONNECTION` when the transport failed, `CLOSED` when the stream just ended.
    pub reason: String,
    /// In words.
    pub message: String,
}

/// An operation that was refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// Its index in the batch.
    pub index: u32,
    /// As on the wire: a VT-d reason, or a refusal from 0x1000 on.
    pub reason: Address,
    /// First address that was not served.
    pub iova: Address,
    /// Bytes done before.
    pub done_bytes: u32,
}

/// What many operations came to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counted {
    /// Operations that were done.
    pub succeeded: u64,
    /// Operations that were refused, by reason.
    pub refused: BTreeMap<String, u64>,
    /// How long it took.
    pub elapsed_us: u64,
    /// When the last answer with a success in it came: microseconds since the UNIX epoch; 0 for never.
    pub last_success_unix_us: u64,
    /// When the first refusal came; 0 for never.
    pub first_refusal_unix_us: u64,
    /// How the session ended, when it did.
    pub ended: Option<End>,
}

impl Counted {
    /// Operations that were answered.
    pub fn answered(&self) -> u64 {
        self.succeeded + self.refused.values().sum::<u64>()
    }
}

/// What it knows of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Whether a session stands.
    pub connected: bool,
    /// How the last one ended.
    pub ended: Option<End>,
    /// The generation that is true for it: of Welcome, or of the last reset answered.
    pub assignment_generation: u64,
    /// Of the last reset told.
    pub told_generation: u64,
    /// Resets told.
    pub resets_told: u64,
    /// Tags of resets that are held.
    pub resets_held: Vec<u64>,
    /// Register accesses told.
    pub registers_told: u64,
    /// Tags of register accesses that are held.
    pub registers_held: Vec<u64>,
    /// Batches that wait to be sent.
    pub queued: u64,
    /// What hammering came to so far.
    pub hammered: Option<Counted>,
}
