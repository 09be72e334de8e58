//! Async clients of the IOMMU: [`Driver`] (DMA API and domain API), [`Hypervisor`] (virtual machines), [`Observer`],
//! [`Operator`], [`BareClient`].
//!
//! Every client begins with a [`Connection`], which says who it is; what it is allowed follows from that. A
//! lost connection is opened again by itself, with the same session as long as the server's grace lasts.
//! Mutating calls carry request IDs and are retried with the same ID, so that a retry never does a thing
//! twice.
//!
//! A driver in short (`examples/map_a_buffer.rs` is the same with a device that copies):
//!
//! ```no_run
//! use guest_sdk::{Connection, Direction, Owner};
//!
//! # async fn run() -> Result<(), Box<dyn std::error::Error>> {
//! let driver = Connection::to("https://127.0.0.1:7450").driver("net-driver", Owner::Driver(1)).await?;
//! let device = driver.device("0000:00:05.0".parse()?);
//! let buffer = driver.allocate(4096).await?;
//! buffer.write(0, &b"hello"[..]).await?;
//! let mapping = driver.dma_map_single(&device, buffer.range(), Direction::ToDevice).await?;
//! // … give mapping.iova() to the device, wait for it …
//! mapping.unmap().await?; // answered after invalidation and drain (strict); `mapping` is gone
//! # Ok(())
//! # }
//! ```
//!
//! How a mapping lives, and what its unmap promises, is the domain's choice: [`Driver::create_domain`] takes [`DomainOptions`] with one of
//! seven [`Protection`] modes. A device that is not attached elsewhere is in its owner's default domain. What the modes cannot refuse, such
//! as a use after unmap in a deferred domain, the sanitizer of the domain reports ([`Driver::sanitizer`]).
//!
//! Sizes are in bytes, addresses are typed by their space ([`Gpa`] for the owner's memory, [`Iova`] for the
//! device's view). Every call ends with an [`SdkError`]: the operation's own refusal (an enum of
//! [`iommu_types::errors`]), an error that can befall any call, or no answer within the deadline.

mod admin;
mod bare;
mod buffer;
mod connection;
mod convert;
mod dma;
mod dma_pool;
mod dma_stream;
mod domain;
mod driver;
mod error;
mod faults;
mod guest;
mod guest_memory;
mod handle;
mod hypervisor;
mod inspect;
mod interrupts;
mod mapping;
mod memory;
mod mmio;
pub mod multiplexer;
mod page_runs;
mod requests;
mod roles;
mod sanitizer;
mod sg;
mod subscription;

pub use admin::{Admin, Peer};
pub use bare::{BareClient, BareMachine, EventMessage, Machine, MachineDevice, MachineInterrupt};
pub use buffer::Buffer;
pub use connection::SessionLimits;
pub use dma::{MapOptions, UnmapOptions};
pub use dma_pool::{DestroyPoolError, DmaPool, PoolBlock};
pub use dma_stream::{DmaStream, MapTicket, UnmapTicket};
pub use domain::Domain;
pub use driver::{Driver, LeakReport};
pub use error::{Never, SdkError, TransportError};
pub use faults::{FaultFilter, FaultList, Faults, NewFaults};
pub use handle::DeviceHandle;
pub use hypervisor::{
    FunctionState, Hypercall, Hypercalls, Hypervisor, MemoryRegion, Revocation, SavedSession, TenantLimits,
    Vm, VmOptions, VmState,
};
pub use inspect::{
    AccessQuestion, CacheCounters, Counters, DeviceState, DomainState, DumpedIotlb, Inspect, IotlbEntry,
    LimitState, LimitsOfOwner, MappingState, Mappings, OwnerState, RingCounters, Topology, WalkStep,
};
pub use interrupts::{Interrupt, InterruptEvent, MsiVector};
pub use iommu_proto::channel::{BadEndpoint, DEFAULT_ENDPOINT};
pub use iommu_proto::credentials::{CredentialError, Credentials, Refused, default_directory};
pub use iommu_types::errors::InspectError;
pub use iommu_types::{
    Access, AccessWidth, Blame, BouncePool, Capabilities, Deferral, DeviceAddress, Direction, DmaAttributes,
    DmaLimits, DomainId, DomainOptions, Explanation, FaultRecord, FunctionKind, Gpa, GpaRange, Iova,
    IovaAllocation, IovaRange, MappingGranularity, MappingLife, Owner, PciFunction, Permissions,
    PersistentQuota, Protection, ReportClass, RequestId, Rings, SanitizerReport, SeenAccess, SourceId,
    Violation, WalkCachePolicy, errors,
};
pub use mapping::{Coherent, DMA_MAPPING_ERROR, DmaMapping};
pub use memory::Memory;
pub use roles::{Connection, Observer, Operator};
pub use sanitizer::{NewReports, ReportList, Sanitizer, SanitizerFilter};
pub use sg::DmaSgMapping;
pub use subscription::Subscription;
