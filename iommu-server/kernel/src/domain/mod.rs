//! Domains: address spaces for devices.
//!
//! A domain is its translation tables in physical memory, an IOVA allocator, and its mappings. A mapping *is* its record in
//! physical memory; what the domain keeps beside is the way from an address to the record:
//!
//! - A DMA-API mapping of up to 512 pages at an allocated address lies under one leaf table (the allocator aligns it so), and the node of
//!   that table has a slot per page that names the record of the mapping beginning there. The path of every small map and unmap is one
//!   hash of the 2 MiB region and one index: constant, and local for a ring that maps in order.
//! - Fixed mappings and larger ones lie in one tree ordered by address, which answers what overlaps a range.
//! - Where the mode hands out addresses that are open anyway ([`identity`], [`bounce`]), mappings lie in a [`ledger`] of their own.
//! - A ring domain ([`ring`]) finds them by ring and slot.
//!
//! What differs between the modes of [`Protection`] is in [`Mode`] and the module of each; grant, revoke, flush and release are common.
//!
//! **Order of a grant:** frames pinned → record *granting* → entries → record *live* → answer. **Of a revoke:** record
//! *revoking* → entries cleared → invalidation → drain → record free, IOVA free, frames unpinned (I9); strict domains answer then (I1),
//! others as their mode says. What is between clearing and the end is kept in the domain ([`undone`]), so that a caller who forgets to
//! finish leaks nothing past [`Domain::unmap_all`].

mod bounce;
mod direct;
mod dma_api;
mod domain_api;
mod find;
mod flush;
mod grant;
mod identity;
mod ledger;
mod lifecycle;
mod request;
mod revoke;
mod ring;
mod scatter;
mod sync;
mod table;
mod undone;
mod watch;

use std::collections::BTreeMap;
use std::sync::Arc;

use iommu_hardware::memory::RecordIndex;
use iommu_types::errors::{DmaLimitsError, LimitReached, ModeRefuses, OutOfMemory};
use iommu_types::{
    DmaLimits, DomainId, DomainOptions, Gpa, Hpa, Iova, IovaRange, Owner, Permissions, Protection, RequestId,
    SourceId,
};

pub use domain_api::{MapFixed, MappingState};
pub use find::Held;
pub use flush::Waiting;
pub use lifecycle::PendingDestroy;
pub use request::{DmaFunction, DmaMap, DmaUnmap, Segment, Tick};
pub use scatter::DmaUnmapSg;
pub use sync::DmaSync;
pub use undone::{PendingUnmap, Undone};
pub use watch::SanitizerHandle;

use crate::account::OwnerAccount;
use crate::boot::Kernel;
use crate::iova::{IovaAllocator, IovaCounters};
use bounce::Shadows;
use flush::FlushQueue;
use identity::IdentityPages;
use ledger::Ledger;
use ring::RingTables;
use scatter::Groups;
use table::{Extent, Tables};
use undone::Unfinished;

/// An address space: tables in physical memory, an IOVA allocator, its mappings. Locked by the service.
#[derive(Debug)]
pub struct Domain {
    id: DomainId,
    account: Arc<OwnerAccount>,
    options: DomainOptions,
    limits: DmaLimits,
    mode: Mode,
    tables: Tables,
    iovas: IovaAllocator,
    /// Mappings that have no slot: fixed ones and those of more than 512 pages, by first page.
    ranges: BTreeMap<u64, RangeMapping>,
    /// Mappings at addresses that are open anyway.
    ledger: Ledger,
    /// Scatter-gather mappings.
    groups: Groups,
    unfinished: Unfinished,
    /// Unmaps that a map began, to be settled by the caller: pages evicted, shadow buffers given up, a map taken back.
    evicted: Vec<PendingUnmap>,
    /// Free records at hand.
    kept_records: Vec<RecordIndex>,
    counters: DomainCounters,
    /// Where the pages of the mapping at work go. Kept for its memory only.
    extents: Vec<Extent>,
    /// What the unmap at work invalidates. Kept for its memory only.
    invalidated: Vec<IovaRange>,
    /// Looks for misuse; only in domains that were created so.
    sanitizer: Option<SanitizerHandle>,
    /// The sources behind the ring unit that use the domain's rings.
    ring_sources: Vec<SourceId>,
}

/// What a protection mode keeps.
#[derive(Debug)]
enum Mode {
    /// Strict: nothing. Addresses are allocated, and an unmap is settled at once.
    Strict,
    /// Deferred: what waits to be invalidated.
    Deferred(FlushQueue),
    /// Passthrough: the direct map lies among the fixed mappings.
    Passthrough,
    /// Shared and persistent: the pages that are open.
    Identity(IdentityPages),
    /// Bounce: shadow buffers.
    Bounce(Shadows),
    /// Ring: flat tables.
    Ring(RingTables),
}

/// A mapping in the tree.
#[derive(Clone, Copy, Debug)]
struct RangeMapping {
    pages: u64,
    record: RecordIndex,
    is_fixed: bool,
}

/// What a domain holds and has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DomainCounters {
    /// Mappings that are live: of the DMA API, fixed ones, a direct map's, shadow buffers.
    pub mappings: u64,
    /// Their bytes.
    pub mapped_bytes: u64,
    /// Bytes of page tables or ring tables, spare ones included.
    pub table_bytes: u64,
    /// Mappings ever made.
    pub maps: u64,
    /// Mappings ever removed.
    pub unmaps: u64,
    /// Invalidations that the domain asked the unit for; one for many ranges counts once.
    pub invalidations: u64,
    /// Of them those that flushed a deferred queue.
    pub flushes: u64,
    /// Table entries written or cleared.
    pub entry_writes: u64,
    /// Page tables put in place.
    pub tables_built: u64,
    /// Page tables taken away.
    pub tables_reclaimed: u64,
    /// Persistent: maps that found their page open.
    pub reused_pages: u64,
    /// Persistent: pages evicted.
    pub evictions: u64,
    /// Persistent: pages open that nobody uses.
    pub idle_pages: u64,
    /// Bounce: bytes of shadow buffers.
    pub shadow_bytes: u64,
    /// Bounce: bytes copied from and to shadow buffers.
    pub copied_bytes: u64,
}

impl DomainCounters {
    /// A mapping is gone from the tables.
    fn revoked(&mut self, size_bytes: u64) {
        self.mappings -= 1;
        self.mapped_bytes -= size_bytes;
        self.unmaps += 1;
    }
}

impl Domain {
    /// Identifier, as it stands in context entries and cache tags.
    pub fn id(&self) -> DomainId {
        self.id
    }
    /// Whose domain it is.
    pub fn owner(&self) -> Owner {
        self.account.owner()
    }
    /// What was chosen when it was created.
    pub fn options(&self) -> DomainOptions {
        self.options
    }
    /// How it trades protection for cost.
    pub fn protection(&self) -> Protection {
        self.options.protection
    }
    /// Width of its addresses: 39, 48 or 57 bits.
    pub fn width_bits(&self) -> u8 {
        self.options.width_bits
    }
    /// Whether a source behind the ring unit uses the domain's rings. It does as long as nobody changes the domain.
    pub fn has_ring_source(&self, source: SourceId) -> bool {
        self.ring_sources.contains(&source)
    }
    /// What its devices can address.
    pub fn limits(&self) -> DmaLimits {
        self.limits
    }
    /// Says what its devices can address; holds for mappings from now on.
    pub fn set_limits(&mut self, limits: DmaLimits) -> Result<(), DmaLimitsError> {
        limits.check()?;
        if matches!(self.mode, Mode::Ring(_)) && limits.mask_bits < 64 {
            let why =
                "has addresses of 64 bits: give the device a mask of 64, or use another mode".to_owned();
            return Err(ModeRefuses { mode: self.protection().name().to_owned(), why }.into());
        }
        self.limits = limits;
        Ok(())
    }
    /// What it holds and has done.
    pub fn counters(&self) -> DomainCounters {
        let tables = self.tables.counters();
        let mut counters = DomainCounters {
            table_bytes: self.tables.bytes(),
            tables_built: tables.tables_built,
            tables_reclaimed: tables.tables_reclaimed,
            ..self.counters
        };
        counters.entry_writes += tables.entry_writes;
        match &self.mode {
            Mode::Strict | Mode::Deferred(_) | Mode::Passthrough => {}
            Mode::Identity(pages) => counters.idle_pages = pages.idle_count(),
            Mode::Bounce(shadows) => counters.shadow_bytes = shadows.bytes(),
            Mode::Ring(rings) => counters.table_bytes = rings.table_bytes(),
        }
        counters
    }
    /// What its allocator holds and has done.
    pub fn iova_counters(&self) -> IovaCounters {
        self.iovas.counters()
    }
    /// Gives free addresses that are kept at hand for too long back to the tree; to be called now and then.
    pub fn trim(&mut self) -> u64 {
        self.iovas.trim()
    }
    /// Unmaps that maps began: each is to be awaited and finished.
    pub fn take_evicted(&mut self) -> Vec<PendingUnmap> {
        std::mem::take(&mut self.evicted)
    }
    /// The top-level table and the number of levels, as a context entry holds them.
    pub(crate) fn top_table(&self) -> (Hpa, u8) {
        self.tables.top()
    }
    /// The domain's mappings that begin at `from` or after, by address, `limit` at most.
    pub fn mappings(&self, kernel: &Kernel, from: Iova, limit: usize) -> Vec<MappingState> {
        let first = from.page_number();
        let ranges =
            self.ranges.range(first..).take(limit + 1).map(|(page, mapping)| (*page, mapping.record));
        let slots = self.tables.slots_from(first, limit + 1);
        let ledger = self.ledger.from(from).take(limit + 1);
        let mut found: Vec<(u64, RecordIndex)> = ranges.chain(slots).chain(ledger).collect();
        if let Mode::Ring(rings) = &self.mode {
            found.extend(rings.live_from(from).take(limit + 1));
        }
        let state = |(_, index)| {
            let (_, record) = kernel.records.records().get(index);
            MappingState {
                range: IovaRange::new(Iova::new(record.iova), record.size_bytes).expect("a record of ours"),
                gpa: Gpa::new(record.gpa),
                permissions: Permissions::from_bits_truncate(record.permissions),
                request_id: RequestId(record.request_id),
            }
        };
        let mut found: Vec<_> = found.into_iter().map(state).collect();
        found.retain(|state| state.range.base() >= from);
        // Many may begin at one address. They stay in the order in which they are kept, so that who looks again finds it as it was.
        found.sort_by_key(|state| state.range.base());
        found.truncate(limit);
        found
    }
}

/// What a map runs out of: a limit, or memory for tables.
enum Shortage {
    Limit(LimitReached),
    Memory(OutOfMemory),
}

macro_rules! shortage_into {
    ($($error:ident),*) => { $(
        impl From<Shortage> for iommu_types::errors::$error {
            fn from(shortage: Shortage) -> Self {
                match shortage {
                    Shortage::Limit(limit) => limit.into(),
                    Shortage::Memory(memory) => memory.into(),
                }
            }
        }
    )* };
}
shortage_into!(DmaMapError, MapError);

impl From<LimitReached> for Shortage {
    fn from(limit: LimitReached) -> Self {
        Self::Limit(limit)
    }
}

impl From<OutOfMemory> for Shortage {
    fn from(memory: OutOfMemory) -> Self {
        Self::Memory(memory)
    }
}
