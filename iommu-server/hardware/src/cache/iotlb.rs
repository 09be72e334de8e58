//! The IOTLB: translations that were walked before.

use iommu_types::{Access, DomainId, Generation, Hpa, Iova, IovaRange, PageSize, Permissions};

use super::spans::{Span, Spans};
use super::{CacheGeometry, Filled, words};
use crate::drain::{Atomics, Drains, Std};
use crate::vtd::spec::extent::ByteExtent;

/// A translation as it is cached: a page of a domain, where it leads, the AND of the permissions on the way, and which part of it is
/// open.
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
    /// The part of the page that is open; `None` when all of it is.
    pub extent: Option<ByteExtent>,
}

impl IotlbEntry {
    /// Whether the entry, which covers the address, suffices for an access there.
    pub fn allows(&self, iova: Iova, access: Access, size_bytes: u32) -> bool {
        let is_open = |extent: ByteExtent| extent.admits(iova.page_offset(), size_bytes);
        self.permissions.allow(access) && self.extent.is_none_or(is_open)
    }
}

/// Translations, keyed by domain, page and size.
pub struct Iotlb<A: Atomics = Std> {
    spans: Spans<A>,
}

impl<A: Atomics> Iotlb<A> {
    /// An empty IOTLB that all domains share. Panics on an [impossible geometry](CacheGeometry::is_possible).
    pub fn new(geometry: CacheGeometry) -> Self {
        Self::partitioned(geometry, 1)
    }

    /// An empty IOTLB in which a domain has the share of the sets that its number says, modulo the partitions: domains of different shares
    /// never displace each other's entries. Panics on [impossible partitions](CacheGeometry::takes_partitions).
    pub fn partitioned(geometry: CacheGeometry, partitions: u16) -> Self {
        Self { spans: Spans::new(geometry, partitions, PageSize::ALL.map(PageSize::shift)) }
    }

    /// Where an access goes that a cached page allows *as a whole*: the hot path. A partial page, whatever is open of it, answers only to
    /// [`lookup`](Self::lookup). Takes no lock and writes nothing.
    #[inline]
    pub fn hit_whole_page(&self, domain: DomainId, iova: Iova, access: Access) -> Option<Hpa> {
        let span = self.spans.lookup(domain, iova)?;
        let offset = iova.get() & (PageSize::ALL[span.size].bytes() - 1);
        words::whole_permissions(span.data)
            .allow(access)
            .then(|| Hpa::new(words::whole_target(span.data).get() | offset))
    }

    /// The entry that covers the address, whatever it allows: the smallest page first. Takes no lock and writes nothing.
    pub fn lookup(&self, domain: DomainId, iova: Iova) -> Option<IotlbEntry> {
        self.spans.lookup(domain, iova).map(from_span)
    }

    /// Puts an entry in, unless an invalidation overtook the walk that found it (I4). `walked_under` is what
    /// [`Drains::generation`] said before the walk began.
    pub fn fill(&self, drains: &Drains<A>, walked_under: Generation, entry: IotlbEntry) -> Filled {
        let data = match entry.extent {
            None => words::whole(entry.hpa, entry.permissions),
            Some(extent) => {
                assert!(entry.size == PageSize::Size4K, "only the smallest pages are partial: {entry:?}");
                self.spans.note_special();
                words::partial(entry.hpa, entry.permissions, extent)
            }
        };
        let size = usize::from(entry.size.leaf_level() - 1);
        let span = Span { domain: entry.domain_id, base: entry.iova, size, data };
        self.spans.fill(drains, walked_under, span)
    }

    /// Whether a partial page was ever filled: until then a miss need not look for one.
    #[inline]
    pub fn may_hold_partial(&self) -> bool {
        self.spans.may_hold_special()
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

fn from_span(span: Span) -> IotlbEntry {
    let (hpa, permissions, extent) = words::decode(span.data);
    IotlbEntry {
        domain_id: span.domain,
        iova: span.base,
        size: PageSize::ALL[span.size],
        hpa,
        permissions,
        extent,
    }
}
