//! The vocabulary of the IOMMU: addresses, ranges, identities, permissions, faults, errors.
//!
//! Every crate of the workspace speaks in these types, and none of them knows how it travels or where it is
//! kept. A number that means something has a type of its own; address spaces do not convert into each other,
//! and arithmetic is checked. Names are those of VT-d, PCIe and Linux.

mod access;
mod address;
mod bare;
mod device;
mod dma;
pub mod errors;
mod explain;
mod fault;
mod function;
mod identity;
mod identity_uri;
mod invalidation;
mod protection;
mod range;
mod register;
mod sanitizer;

pub use access::{Access, AddressType, AtomicOperation, Direction, Permissions};
pub use address::{Address, Gpa, Hpa, Iova, PAGE_SIZE_BYTES, PageSize};
pub use bare::{AddressWidths, Capabilities, InvalidCapabilities};
pub use device::{DeviceAddress, DomainId, ParseAddressError, Pasid, SourceId};
pub use dma::{
    DMA_MASK_BITS_MAX, DMA_MASK_BITS_MIN, DmaAttributes, DmaLimits, SEGMENT_BOUNDARY_MASK_MIN, SyncFor,
};
pub use explain::{CacheState, Explanation, Outcome, Step, Structure, Translation};
pub use fault::{DmaFault, Fault, FaultReason, FaultRecord, InterruptFault, Refusal, TranslationFault};
pub use function::{FunctionKind, PciFunction};
pub use identity::{Generation, Identity, Owner, ParseOwnerError, RequestId, Role};
pub use identity_uri::{
    AUTHORITY_FILE, NAME_BYTES_MAX, ParseIdentityError, TRUST_DOMAIN, UnfitName, is_name,
};
pub use invalidation::{FunctionMask, Granularity, Invalidation};
pub use protection::{
    BOUNCE_BYTES_MAX, BOUNCE_BYTES_MIN, BouncePool, DEFERRED_BATCH_MAX, DEFERRED_INTERVAL_MS_MAX, Deferral,
    DomainOptions, IovaAllocation, MappingGranularity, PERSISTENT_PAGES_MAX, PersistentQuota, Protection,
    RING_SLOTS_MAX, RING_SLOTS_MIN, RINGS_MAX, Rings, WalkCachePolicy,
};
pub use range::{AddressRange, GpaRange, HpaRange, InvalidRange, IovaRange};
pub use register::AccessWidth;
pub use sanitizer::{Blame, MappingLife, ReportClass, SanitizerReport, SeenAccess, Violation};
