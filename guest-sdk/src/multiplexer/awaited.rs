//! Whether somebody still waits for the answer to a batch.

use std::time::{Duration, Instant};

use crate::Hypercall;
use crate::hypervisor::Standing;

/// For how long an answer is of use. After that the guest has been told that there is none: it may ask again, and may use the memory for something else,
/// so that no packet may be sent twice or be written late.
#[derive(Clone, Debug)]
pub(super) struct Awaited {
    until: Instant,
    standing: Standing,
}

impl Awaited {
    pub(super) fn new(call: &Hypercall, longest_wait: Duration) -> Self {
        Self { until: Instant::now() + longest_wait, standing: call.standing().clone() }
    }

    /// Why nobody waits any more.
    pub(super) fn over(&self) -> Option<&'static str> {
        if self.standing.is_lost() {
            return Some("the stream of the hypercall was lost");
        }
        (Instant::now() >= self.until).then_some("the batch waited for too long")
    }
}
