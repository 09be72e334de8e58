//! Domains: address spaces for devices.
//!
//! A domain is its second-stage tables in physical memory, an IOVA allocator, and its mappings. A mapping *is* its record in
//! physical memory; what the domain keeps beside is the way from an address to the record:
//!
//! - A DMA-API mapping of up to 512 pages lies under one leaf table (the allocator aligns it so), and the node of that table
//!   has a slot per page that names the record of the mapping beginning there. The path of every small map and unmap is one
//!   hash of the 2 MiB region and one index: constant, and local for a ring that maps in order.
//! - Everything else (fixed mappings, larger ones) lies in one tree ordered by address, which answers what overlaps a range.
//!
//! **Order of a grant:** frames pinned → record *granting* → entries → record *live* → answer. **Of a revoke:** record
//! *revoking* → entries cleared → invalidation → drain → record free, IOVA free, frames unpinned → answer (I1, I9). What is between
//! clearing and the end is kept in the domain ([`undone`]), so that a caller who forgets to finish leaks nothing past
//! [`Domain::unmap_all`].

mod dma_api;
mod domain_api;
mod grant;
mod lifecycle;
mod table;
mod undone;

use std::collections::BTreeMap;
use std::sync::Arc;

use iommu_hardware::memory::RecordIndex;
use iommu_types::errors::{LimitReached, OutOfMemory};
use iommu_types::{DomainId, Gpa, Hpa, Iova, IovaRange, Owner, Permissions, Protection, RequestId};

pub use dma_api::{DmaMap, DmaUnmap};
pub use domain_api::{MapFixed, MappingState};
pub use lifecycle::PendingDestroy;
pub use undone::{PendingUnmap, Undone};

use crate::account::OwnerAccount;
use crate::boot::Kernel;
use crate::iova::IovaAllocator;
use table::{Extent, Tables};
use undone::Unfinished;

/// An address space: tables in physical memory, an IOVA allocator, its mappings. Locked by the service.
#[derive(Debug)]
pub struct Domain {
    id: DomainId,
    account: Arc<OwnerAccount>,
    protection: Protection,
    width_bits: u8,
    tables: Tables,
    iovas: IovaAllocator,
    /// Mappings that have no slot: fixed ones and those of more than 512 pages, by first page.
    ranges: BTreeMap<u64, RangeMapping>,
    unfinished: Unfinished,
    /// Free records at hand.
    kept_records: Vec<RecordIndex>,
    counters: DomainCounters,
    /// Where the pages of the mapping at work go. Kept for its memory only.
    extents: Vec<Extent>,
    /// What the unmap at work invalidates. Kept for its memory only.
    invalidated: Vec<IovaRange>,
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
    /// Mappings whose entries are in the tables.
    pub mappings: u64,
    /// Their bytes.
    pub mapped_bytes: u64,
    /// Bytes of page tables, spare ones included.
    pub table_bytes: u64,
    /// Mappings ever made.
    pub maps: u64,
    /// Mappings ever removed.
    pub unmaps: u64,
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
    /// How it trades protection for cost.
    pub fn protection(&self) -> Protection {
        self.protection
    }
    /// Width of its addresses: 39, 48 or 57 bits.
    pub fn width_bits(&self) -> u8 {
        self.width_bits
    }
    /// What it holds and has done.
    pub fn counters(&self) -> DomainCounters {
        DomainCounters { table_bytes: self.tables.bytes(), ..self.counters }
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
        let mut found: Vec<_> = ranges.chain(self.tables.slots_from(first, limit + 1)).collect();
        found.sort_unstable_by_key(|(page, _)| *page);
        let state = |(_, index)| {
            let (_, record) = kernel.records.records().get(index);
            MappingState {
                range: IovaRange::new(Iova::new(record.iova), record.size_bytes).expect("a record of ours"),
                gpa: Gpa::new(record.gpa),
                permissions: Permissions::from_bits_truncate(record.permissions),
                request_id: RequestId(record.request_id),
            }
        };
        found.into_iter().map(state).filter(|state| state.range.base() >= from).take(limit).collect()
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
