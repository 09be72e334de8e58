//! The ways to run a device that are compared: the seven of the rIOMMU paper, and four modes that it has not.

use iommu_types::{BouncePool, DomainOptions, IovaAllocation, PersistentQuota, Protection, Rings};

use super::workload::Workload;

/// Room for every page of the largest workload: persistent evicts nothing, so what is measured is reuse.
const PERSISTENT_PAGES: u32 = 1 << 16;
/// Room for a shadow of a page for every buffer of the largest workload.
const BOUNCE_BYTES: u64 = 64 << 20;

/// One of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Configuration {
    /// Strict with the classic allocator.
    Strict,
    /// Strict with the cached allocator.
    StrictCached,
    /// Deferred (256 unmaps or 10 ms) with the classic allocator.
    Deferred,
    /// The same with the cached allocator.
    DeferredCached,
    /// Rings whose entries the driver writes back from its cache by hand. The code is that of [`Ring`](Self::Ring): a processor without
    /// coherent walks is modelled, by what each entry costs it.
    RingNoncoherent,
    /// Rings.
    Ring,
    /// A machine with translation off.
    None,
    /// One mapping a page, counted.
    Shared,
    /// One mapping a page, kept.
    Persistent,
    /// Shadow buffers.
    Bounce,
    /// A direct map.
    Passthrough,
}

impl Configuration {
    /// All of them: those of the paper, the dearest first, then the others.
    pub(crate) const ALL: [Self; 11] = [
        Self::Strict,
        Self::StrictCached,
        Self::Deferred,
        Self::DeferredCached,
        Self::RingNoncoherent,
        Self::Ring,
        Self::None,
        Self::Shared,
        Self::Persistent,
        Self::Bounce,
        Self::Passthrough,
    ];

    /// As figures name it; a plus stands for the cached allocator.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Strict => "strict",
            Self::StrictCached => "strict+",
            Self::Deferred => "deferred",
            Self::DeferredCached => "deferred+",
            Self::RingNoncoherent => "ring-noncoherent",
            Self::Ring => "ring",
            Self::None => "none",
            Self::Shared => "shared",
            Self::Persistent => "persistent",
            Self::Bounce => "bounce",
            Self::Passthrough => "passthrough",
        }
    }

    /// The domain that it needs for a workload; none where translation is off.
    pub(crate) fn options(self, workload: Workload) -> Option<DomainOptions> {
        let (protection, allocator) = match self {
            Self::Strict => (Protection::Strict, IovaAllocation::Classic),
            Self::StrictCached => (Protection::Strict, IovaAllocation::Cached),
            Self::Deferred => (Protection::DEFERRED, IovaAllocation::Classic),
            Self::DeferredCached => (Protection::DEFERRED, IovaAllocation::Cached),
            Self::RingNoncoherent | Self::Ring => {
                let rings = Rings { count: 2, slots: workload.buffers_per_ring() };
                (Protection::Ring(rings), IovaAllocation::Cached)
            }
            Self::None => return None,
            Self::Shared => (Protection::Shared, IovaAllocation::Cached),
            Self::Persistent => {
                let quota = PersistentQuota { pages_max: PERSISTENT_PAGES };
                (Protection::Persistent(quota), IovaAllocation::Cached)
            }
            Self::Bounce => {
                (Protection::Bounce(BouncePool { bytes_max: BOUNCE_BYTES }), IovaAllocation::Cached)
            }
            Self::Passthrough => (Protection::Passthrough, IovaAllocation::Cached),
        };
        Some(DomainOptions::new(protection).with_allocator(allocator))
    }

    /// Whether its time is its own: the non-coherent ring runs the code of the coherent one.
    pub(crate) const fn has_own_code(self) -> bool {
        !matches!(self, Self::RingNoncoherent)
    }
}
