//! How a domain trades protection for cost.
//!
//! A mode says how long a mapping lives and what becomes of the translations made from it; the IOVA allocator and the granularity are
//! choices beside it. All are made when a domain is created and never change after that.

use std::fmt;

use crate::errors::InvalidField;

/// The life of a mapping and of the translations made from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Protection {
    /// A direct map of all memory of the owner: what the owner has is always open, what others have never is.
    Passthrough,
    /// One DMA buffer, one mapping; every unmap is answered after invalidation and drain. No stale window (I1).
    Strict,
    /// An unmap is answered at once; a batch of them is invalidated together. Until then, devices may use stale translations, and
    /// neither address nor frame is used again.
    Deferred(Deferral),
    /// One mapping per page, counted: removed, invalidated and drained when its last user unmaps.
    Shared,
    /// One mapping per page, kept after its last unmap for the next map, and evicted least recently used.
    Persistent(PersistentQuota),
    /// The device sees only permanent shadow buffers; data is copied at map, unmap and sync.
    Bounce(BouncePool),
    /// The flat tables of rIOMMU: a mapping is one slot of a ring, invalidated once per ring at the end of a burst.
    Ring(Rings),
}

/// When a deferred domain invalidates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Deferral {
    /// So many unmaps are invalidated together at most.
    pub batch: u32,
    /// No unmap waits longer than this, in milliseconds.
    pub interval_ms: u32,
}

/// How much a persistent domain keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PersistentQuota {
    /// Pages that are mapped at once at most, in use or not.
    pub pages_max: u32,
}

/// How much a bounce domain may take for shadow buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BouncePool {
    /// Bytes of shadow buffers at most. They count as page tables of the owner do (`table_bytes_per_owner`).
    pub bytes_max: u64,
}

/// The rings of a device behind an rIOMMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Rings {
    /// Rings for streaming mappings, numbered from 0. One more, after them, holds coherent memory.
    pub count: u16,
    /// Slots of each.
    pub slots: u32,
}

impl Protection {
    /// Deferred as Linux does it: 256 unmaps or 10 ms.
    pub const DEFERRED: Self = Self::Deferred(Deferral { batch: 256, interval_ms: 10 });
    /// Persistent with room for 16 MiB.
    pub const PERSISTENT: Self = Self::Persistent(PersistentQuota { pages_max: 4096 });
    /// Bounce with 16 MiB of shadow buffers at most.
    pub const BOUNCE: Self = Self::Bounce(BouncePool { bytes_max: 16 << 20 });
    /// Two rings (receive and transmit) of 1,024 slots.
    pub const RING: Self = Self::Ring(Rings { count: 2, slots: 1024 });

    /// Every mode, with its usual parameters.
    pub const ALL: [Self; 7] = [
        Self::Passthrough,
        Self::Strict,
        Self::DEFERRED,
        Self::Shared,
        Self::PERSISTENT,
        Self::BOUNCE,
        Self::RING,
    ];

    /// The mode without its parameters: `deferred`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Passthrough => "passthrough",
            Self::Strict => "strict",
            Self::Deferred(_) => "deferred",
            Self::Shared => "shared",
            Self::Persistent(_) => "persistent",
            Self::Bounce(_) => "bounce",
            Self::Ring(_) => "ring",
        }
    }
    /// Whether the device's addresses are the owner's guest-physical ones.
    pub const fn is_identity(self) -> bool {
        matches!(self, Self::Passthrough | Self::Shared | Self::Persistent(_))
    }
    /// The granularity that it has when none is asked for.
    pub const fn usual_granularity(self) -> MappingGranularity {
        match self {
            Self::Ring(_) => MappingGranularity::Byte,
            _ => MappingGranularity::Page,
        }
    }

    fn check(self) -> Result<(), InvalidField> {
        let within = |field: &str, value: u64, min: u64, max: u64| {
            if (min..=max).contains(&value) {
                return Ok(());
            }
            Err(refused(field, format!("is {value}, and must be between {min} and {max}")))
        };
        match self {
            Self::Passthrough | Self::Strict | Self::Shared => Ok(()),
            Self::Deferred(Deferral { batch, interval_ms }) => {
                within("deferred.batch", batch.into(), 1, DEFERRED_BATCH_MAX.into())?;
                within("deferred.interval_ms", interval_ms.into(), 1, DEFERRED_INTERVAL_MS_MAX.into())
            }
            Self::Persistent(PersistentQuota { pages_max }) => {
                within("persistent.pages_max", pages_max.into(), 1, PERSISTENT_PAGES_MAX.into())
            }
            Self::Bounce(BouncePool { bytes_max }) => {
                within("bounce.bytes_max", bytes_max, BOUNCE_BYTES_MIN, BOUNCE_BYTES_MAX)
            }
            Self::Ring(Rings { count, slots }) => {
                within("ring.count", count.into(), 1, RINGS_MAX.into())?;
                within("ring.slots", slots.into(), RING_SLOTS_MIN.into(), RING_SLOTS_MAX.into())
            }
        }
    }
}

/// Unmaps that may wait together: Linux's "single" flush queue has 32,768, and more would only delay.
pub const DEFERRED_BATCH_MAX: u32 = 32_768;
/// The longest stale window that may be asked for: ten times Linux's longest.
pub const DEFERRED_INTERVAL_MS_MAX: u32 = 10_000;
/// 4 GiB: more than one owner of a usual host has.
pub const PERSISTENT_PAGES_MAX: u32 = 1 << 20;
/// One shadow of the largest size class.
pub const BOUNCE_BYTES_MIN: u64 = 1 << 20;
/// As much as one owner may map at once on a usual host.
pub const BOUNCE_BYTES_MAX: u64 = 1 << 30;
/// Queue pairs of a large NIC.
pub const RINGS_MAX: u16 = 256;
/// With one slot, nothing could be mapped while the slot before is not flushed.
pub const RING_SLOTS_MIN: u32 = 2;
/// A ring is one contiguous table: 1 MiB.
pub const RING_SLOTS_MAX: u32 = 1 << 16;

/// Widths of 3, 4 and 5 levels of tables.
const WIDTHS: [u8; 3] = [39, 48, 57];

fn refused(field: &str, why: impl Into<String>) -> InvalidField {
    InvalidField { field: field.to_owned(), why: why.into() }
}

impl fmt::Display for Protection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())?;
        match self {
            Self::Passthrough | Self::Strict | Self::Shared => Ok(()),
            Self::Deferred(Deferral { batch, interval_ms }) => write!(f, " ({batch} or {interval_ms} ms)"),
            Self::Persistent(PersistentQuota { pages_max }) => write!(f, " ({pages_max} pages)"),
            Self::Bounce(BouncePool { bytes_max }) => write!(f, " ({bytes_max} bytes)"),
            Self::Ring(Rings { count, slots }) => write!(f, " ({count} x {slots})"),
        }
    }
}

/// The smallest piece of memory that a mapping opens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MappingGranularity {
    /// Whole 4 KiB pages: neighbours of a buffer on its pages are open too.
    Page,
    /// Exactly the bytes that were mapped. In shared and persistent domains a page is one mapping of all its users: from the first byte of
    /// any of them to the last.
    Byte,
}

impl fmt::Display for MappingGranularity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Page => "page",
            Self::Byte => "byte",
        })
    }
}

/// How a domain finds free I/O virtual addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IovaAllocation {
    /// From the top down through a tree of what is allocated, with one cached node, as Linux did until 4.6: linear in what is live.
    Classic,
    /// Size classes with magazines in front of the tree: constant.
    Cached,
}

impl fmt::Display for IovaAllocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Classic => "classic",
            Self::Cached => "cached",
        })
    }
}

/// When cached page tables are forgotten.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WalkCachePolicy {
    /// Only when a table is reclaimed, which is when it must be (F&S, SOSP'24 §3).
    OnReclaim,
    /// With every invalidation of a mapping, as Linux does.
    OnEveryUnmap,
}

impl fmt::Display for WalkCachePolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OnReclaim => "on-reclaim",
            Self::OnEveryUnmap => "on-every-unmap",
        })
    }
}

/// What is chosen when a domain is created. Made only by [`new`](Self::new) and the methods that follow it, and checked by
/// [`check`](Self::check) before a domain is made of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DomainOptions {
    /// The life of mappings.
    pub protection: Protection,
    /// The smallest piece that a mapping opens.
    pub granularity: MappingGranularity,
    /// How free addresses are found. Of no account where the mode allocates none.
    pub allocator: IovaAllocation,
    /// When cached page tables are forgotten.
    pub walk_cache: WalkCachePolicy,
    /// Width of addresses in bits: 39, 48 or 57. The addresses of a ring domain have 64 whatever this says.
    pub width_bits: u8,
    /// Whether the DMA sanitizer looks at the domain.
    pub sanitizer: bool,
}

impl DomainOptions {
    /// The mode with what is usual beside it: cached allocator, 48 bits, no sanitizer.
    pub const fn new(protection: Protection) -> Self {
        Self {
            protection,
            granularity: protection.usual_granularity(),
            allocator: IovaAllocation::Cached,
            walk_cache: WalkCachePolicy::OnReclaim,
            width_bits: 48,
            sanitizer: false,
        }
    }
    /// The same with another granularity.
    pub const fn with_granularity(self, granularity: MappingGranularity) -> Self {
        Self { granularity, ..self }
    }
    /// The same with another allocator.
    pub const fn with_allocator(self, allocator: IovaAllocation) -> Self {
        Self { allocator, ..self }
    }
    /// The same with another width.
    pub const fn with_width(self, width_bits: u8) -> Self {
        Self { width_bits, ..self }
    }
    /// The same with the sanitizer on or off.
    pub const fn with_sanitizer(self, sanitizer: bool) -> Self {
        Self { sanitizer, ..self }
    }
    /// The same with another policy for cached page tables.
    pub const fn with_walk_cache(self, walk_cache: WalkCachePolicy) -> Self {
        Self { walk_cache, ..self }
    }
    /// Whether these choices make sense together; the error names the field and the remedy.
    pub fn check(&self) -> Result<(), InvalidField> {
        use MappingGranularity::{Byte, Page};
        self.protection.check()?;
        if !WIDTHS.contains(&self.width_bits) {
            let why = format!("{} is not a width; use 39, 48 or 57", self.width_bits);
            return Err(refused("width_bits", why));
        }
        match (self.protection, self.granularity) {
            (Protection::Passthrough, Byte) => Err(refused(
                "granularity",
                "passthrough opens all memory of the owner, so byte has no meaning; use page, or another mode",
            )),
            (Protection::Bounce(_), Byte) => Err(refused(
                "granularity",
                "bounce shows the device no byte of the owner's pages, so byte adds nothing; use page",
            )),
            (Protection::Ring(_), Page) => Err(refused(
                "granularity",
                "the slots of a ring have bases and sizes in bytes, so page has no meaning; use byte",
            )),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(options: DomainOptions, refused: Option<&str>) {
        let field = options.check().err().map(|error| error.field);
        assert_eq!(field.as_deref(), refused, "{options:?}");
    }

    #[test]
    fn every_mode_makes_sense_as_it_usually_is() {
        for protection in Protection::ALL {
            check(DomainOptions::new(protection), None);
        }
    }

    #[test]
    fn combinations_without_a_meaning_are_refused() {
        use MappingGranularity::{Byte, Page};
        for (protection, byte, page) in [
            (Protection::Passthrough, Some("granularity"), None),
            (Protection::Strict, None, None),
            (Protection::DEFERRED, None, None),
            (Protection::Shared, None, None),
            (Protection::PERSISTENT, None, None),
            (Protection::BOUNCE, Some("granularity"), None),
            (Protection::RING, None, Some("granularity")),
        ] {
            check(DomainOptions::new(protection).with_granularity(Byte), byte);
            check(DomainOptions::new(protection).with_granularity(Page), page);
        }
    }

    #[test]
    fn widths_are_those_of_whole_levels() {
        for width_bits in 0..=u8::MAX {
            let refused = (![39, 48, 57].contains(&width_bits)).then_some("width_bits");
            check(DomainOptions::new(Protection::Strict).with_width(width_bits), refused);
        }
    }

    #[test]
    fn parameters_have_bounds_and_the_error_names_them() {
        let deferred = |batch, interval_ms| Protection::Deferred(Deferral { batch, interval_ms });
        let ring = |count, slots| Protection::Ring(Rings { count, slots });
        for (protection, refused) in [
            (deferred(0, 10), Some("deferred.batch")),
            (deferred(DEFERRED_BATCH_MAX, 1), None),
            (deferred(DEFERRED_BATCH_MAX + 1, 10), Some("deferred.batch")),
            (deferred(1, 0), Some("deferred.interval_ms")),
            (deferred(1, DEFERRED_INTERVAL_MS_MAX + 1), Some("deferred.interval_ms")),
            (Protection::Persistent(PersistentQuota { pages_max: 0 }), Some("persistent.pages_max")),
            (Protection::Bounce(BouncePool { bytes_max: 4096 }), Some("bounce.bytes_max")),
            (Protection::Bounce(BouncePool { bytes_max: u64::MAX }), Some("bounce.bytes_max")),
            (ring(0, 16), Some("ring.count")),
            (ring(1, 1), Some("ring.slots")),
            (ring(RINGS_MAX, RING_SLOTS_MAX), None),
            (ring(RINGS_MAX + 1, 2), Some("ring.count")),
            (ring(1, RING_SLOTS_MAX + 1), Some("ring.slots")),
        ] {
            check(DomainOptions::new(protection), refused);
        }
    }
}
