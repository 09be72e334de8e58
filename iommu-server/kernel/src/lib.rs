//! What host software does: domains in seven protection modes, IOVA allocation, the DMA API and the domain API, the DMA sanitizer,
//! ownership of memory, topology, interrupts, fault logs.
//!
//! Plain data without I/O, clock or runtime. [`Kernel`] holds what all share and is safe to use from any thread;
//! everything else is plain and locked by the service, one lock per object. **Lock order:** topology, owner memory,
//! domain, fault logs; the locks inside [`Kernel`] and that of a sanitizer are leaves, held for a few instructions and never together.
//!
//! Operations that need DMA to be quiet return a pending value with a
//! [`PendingDrain`](iommu_hardware::drain::PendingDrain) inside; the service awaits it with no lock held and then finishes
//! ("unmapped" and "quiet" are different types).
//!
//! **Architecture invariants held here:** I1 (an unmap is answered only after [`Domain::finish_unmap`], which takes the
//! proof of a drain), I2 (entries point only at frames that the owner's memory map resolves to), I5 (attach asserts that
//! the context entry is not present), I7 (every count has a limit, per owner), and of I9 the pins: a frame is pinned
//! before an entry to it is written and unpinned after flush and drain; memory with pins is not freed, and does not leave its owner.
//!
//! **Memory that changes hands** goes in steps, with one lock at a time: [`OwnerMemory::begin_leaving`], [`Domain::revoke_memory`] in each domain of the
//! owner and its drain, [`OwnerMemory::finish_leaving`], [`Left::transfer`] or [`Left::free`], [`OwnerMemory::receive`].

mod account;
mod boot;
mod contexts;
mod domain;
mod fault_logs;
mod frames;
mod groups;
mod identifiers;
mod interrupts;
mod iova;
mod owner_memory;
mod records;
mod sanitizer;
mod sequence_log;
mod topology;

pub use account::{LimitUsage, OwnerAccount, OwnerLimits};
pub use boot::{BootError, Kernel, KernelConfig};
pub use domain::{
    DmaFunction, DmaMap, DmaSync, DmaUnmap, DmaUnmapSg, Domain, DomainCounters, Held, MapFixed, MappingState,
    PendingDestroy, PendingUnmap, SanitizerHandle, Segment, Tick, Undone, Waiting,
};
pub use fault_logs::FaultLogs;
pub use interrupts::MsiMessage;
pub use iova::{IovaAllocator, IovaCounters, IovaReplay};
pub use owner_memory::{Arrived, Leaving, Left, NotLeft, OwnerMemory, Room};
pub use sanitizer::{
    DriverCall, EventClock, GivenAddresses, MappingKind, Moment, NewMapping, RegisterWrite, Sanitizer,
    SanitizerBounds,
};
pub use sequence_log::SequenceLog;
pub use topology::{DeviceEntry, OwnerEntry, Topology};
