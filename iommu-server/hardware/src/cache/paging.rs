//! The paging-structure cache: tables that walks passed through, so that the next walk may begin deeper.

use iommu_types::{DomainId, Generation, Hpa, Iova, IovaRange, Permissions};

use super::spans::{Span, Spans};
use super::{CacheGeometry, Filled, words};
use crate::drain::{Atomics, Drains, Std};

/// Offset bits of what a table of level 1, 2 or 3 covers: 2 MiB, 1 GiB, 512 GiB.
const COVERED_SHIFTS: [u32; 3] = [21, 30, 39];

/// A table of a domain, and the AND of the permissions on the way to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PagingEntry {
    /// The domain that the table belongs to.
    pub domain_id: DomainId,
    /// First address that the table covers.
    pub iova: Iova,
    /// Level of the table: 1, 2 or 3.
    pub level: u8,
    /// Where the table is.
    pub table: Hpa,
    /// What the entries above the table allow.
    pub permissions: Permissions,
}

/// Tables, keyed by domain, covered addresses and level.
pub struct PagingStructureCache<A: Atomics = Std> {
    spans: Spans<A>,
}

impl<A: Atomics> PagingStructureCache<A> {
    /// An empty cache. Panics on an [impossible geometry](CacheGeometry::is_possible).
    pub fn new(geometry: CacheGeometry) -> Self {
        Self { spans: Spans::new(geometry, 1, COVERED_SHIFTS) }
    }

    /// The deepest table known for the address: level 1 first.
    #[inline]
    pub fn lookup(&self, domain: DomainId, iova: Iova) -> Option<PagingEntry> {
        self.spans.lookup(domain, iova).map(from_span)
    }

    /// Puts a table in, unless an invalidation overtook the walk that passed it (I4). `walked_under` is what
    /// [`Drains::generation`] said before the walk began.
    pub fn fill(&self, drains: &Drains<A>, walked_under: Generation, entry: PagingEntry) -> Filled {
        assert!((1..=3).contains(&entry.level), "only tables of levels 1 to 3 are cached: {entry:?}");
        let span = Span {
            domain: entry.domain_id,
            base: entry.iova,
            size: usize::from(entry.level - 1),
            data: words::whole(entry.table, entry.permissions),
        };
        self.spans.fill(drains, walked_under, span)
    }

    /// Forgets everything. As for every invalidation, the generation was moved before
    /// ([`Drains::move_generation`]).
    pub fn invalidate_all(&self) {
        self.spans.invalidate_all();
    }

    /// Forgets the tables of a domain.
    pub fn invalidate_domain(&self, domain: DomainId) {
        self.spans.invalidate_domain(domain);
    }

    /// Forgets the tables of a domain that cover an address of the range.
    pub fn invalidate_range(&self, domain: DomainId, range: IovaRange) {
        self.spans.invalidate_range(domain, range);
    }

    /// What is cached now, sorted by domain, address and level.
    pub fn entries(&self) -> Vec<PagingEntry> {
        self.spans.entries().into_iter().map(from_span).collect()
    }
}

#[inline]
fn from_span(span: Span) -> PagingEntry {
    PagingEntry {
        domain_id: span.domain,
        iova: span.base,
        level: span.size as u8 + 1,
        table: words::whole_target(span.data),
        permissions: words::whole_permissions(span.data),
    }
}
