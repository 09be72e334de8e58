//! The VT-d unit in legacy mode (VT-d 5.10).
//!
//! [`spec`] holds bits, [`walk`] and [`interrupt`] are free functions over tables in memory, and everything with state is
//! here: the [`Unit`] with its typed operations, the [`Port`]s of devices, the fault log. A *managed* unit is driven by those
//! operations directly; a *bare* one by the same operations behind a [`RegisterFile`] and its invalidation queue.
//!
//! **Architecture invariant:** there is one translation path ([`Burst::translate`]), one walk and one order of
//! invalidation ([`Unit::invalidate`]); the two kinds of unit share all three.

mod counters;
mod event;
mod explain;
mod fault_log;
pub mod interrupt;
mod miss;
mod port;
mod queue;
mod registers;
pub mod spec;
mod unit;
pub mod walk;

pub(crate) use counters::RingTally;
pub use counters::{CacheCounters, Counters, RingCounters};
pub use event::{EventMessage, EventSink};
pub use fault_log::RecordedFault;
pub(crate) use port::refusal;
pub use port::{BURST_BYTES_MAX, BURST_OPERATIONS_MAX, Burst, Lent, Port, Request};
pub use queue::QUEUE_DESCRIPTORS_PER_STEP;
pub use registers::{BadRegisterAccess, HeldDrain, QueueProgress, RegisterFile, WriteEffect};
pub use unit::{PortsExhausted, Unit, UnitConfig};
