//! What host software does: domains, IOVA allocation, the DMA API and the domain API, ownership of memory, topology, fault logs.
//!
//! Plain data without I/O, clock or runtime. [`Kernel`] holds what all share and is safe to use from any thread; everything else is plain and
//! locked by the service, one lock per object. **Lock order:** topology, owner memory, domain, fault logs. Operations that need DMA to be quiet return a pending
//! value with a [`PendingDrain`](iommu_hardware::drain::PendingDrain) inside; the service awaits it with no lock held and then finishes.
// CONTRACT (kernel engineer owns this crate; the server engineer codes against these signatures in parallel)

mod contract;
pub use contract::*;
