//! The IOTLB: translations that were walked before.

use iommu_types::{DomainId, Generation, Hpa, Iova, IovaRange, PageSize, Permissions};

use super::spans::{Span, Spans};
use super::{CacheGeometry, Filled};
use crate::drain::{Atomics, Drains, Std};

/// A translation as it is cached: a page of a domain, where it leads, and the AND of the permissions on the
/// way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IotlbEntry {
    /// The domain that the page belongs to.
    pub domain_id: DomainId,
    /// First address of the page.
    pub iova: Iova,
    /// Size of the page.
    pub size: PageSize,
    /// First address that the page leads to.
    pub hpa: Hpa,
    /// What the page allows.
    pub permissions: Permissions,
}

/// Translations, keyed by domain, page and size.
pub struct Iotlb<A: Atomics = Std> {
    spans: Spans<A>,
}

impl<A: Atomics> Iotlb<A> {
    /// An empty IOTLB. Panics on an [impossible geometry](CacheGeometry::is_possible).
    pub fn new(geometry: CacheGeometry) -> Self {
        Self { spans: Spans::new(geometry, PageSize::ALL.map(PageSize::shift)) }
    }

    /// The entry that covers the address, whatever its permissions: the smallest page first. Takes no lock
    /// and writes nothing.
    #[inline]
    pub fn lookup(&self, domain: DomainId, iova: Iova) -> Option<IotlbEntry> {
        self.spans.lookup(domain, iova).map(from_span)
    }

    /// Puts an entry in, unless an invalidation overtook the walk that found it (I4). `walked_under` is what
    /// [`Drains::generation`] said before the walk began.
    pub fn fill(&self, drains: &Drains<A>, walked_under: Generation, entry: IotlbEntry) -> Filled {
        let span = Span {
            domain: entry.domain_id,
            base: entry.iova,
            size: usize::from(entry.size.leaf_level() - 1),
            target: entry.hpa,
            permissions: entry.permissions.bits(),
        };
        self.spans.fill(drains, walked_under, span)
    }

    /// Forgets everything. As for every invalidation, the generation was moved before
    /// ([`Drains::move_generation`]).
    pub fn invalidate_all(&self) {
        self.spans.invalidate_all();
    }

    /// Forgets the translations of a domain.
    pub fn invalidate_domain(&self, domain: DomainId) {
        self.spans.invalidate_domain(domain);
    }

    /// Forgets the pages of a domain, of any size, that share an address with the range.
    pub fn invalidate_range(&self, domain: DomainId, range: IovaRange) {
        self.spans.invalidate_range(domain, range);
    }

    /// What is cached now, sorted by domain, address and size.
    pub fn entries(&self) -> Vec<IotlbEntry> {
        self.spans.entries().into_iter().map(from_span).collect()
    }

    /// How many entries there is room for.
    pub fn capacity(&self) -> usize {
        self.spans.capacity()
    }
}

#[inline]
fn from_span(span: Span) -> IotlbEntry {
    IotlbEntry {
        domain_id: span.domain,
        iova: span.base,
        size: PageSize::ALL[span.size],
        hpa: span.target,
        permissions: Permissions::from_bits_truncate(span.permissions),
    }
}
