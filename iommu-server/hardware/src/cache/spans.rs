//! What the IOTLB and the paging-structure cache have in common: entries that cover an aligned span of one
//! domain's addresses, in three sizes.
//!
//! ```text
//!  tag    63    62      47 46     45 44                        0
//!        [valid| domain   | size    | first 4 KiB page of the span ]
//! ```
//!
//! What the data word of an entry says is the cache's own affair ([`words`](super::words)).
//!
//! **Where an entry stands.** The sets are cut into as many equal shares as there are partitions (mostly one), and the number of a domain,
//! modulo the partitions, is that of its share. No entry of a domain ever stands outside, so domains of different shares cannot displace
//! each other's entries. Within a share, span numbers are cut into blocks of as many spans as it has sets. Within a block neighbouring spans stand in neighbouring sets, so a contiguous region fills all sets evenly. Each
//! block of each domain and size is turned by an offset of its own:
//!
//! ```text
//!  offset = (block * BLOCK_STEP + (domain, size) * DOMAIN_STEP) / 2^64 * sets of a share
//!  set    = (span number + offset) mod sets of a share  +  (domain mod partitions) * sets of a share
//! ```
//!
//! The two steps are those of the R2 sequence (the powers of the inverse plastic number), the two-dimensional
//! kin of Fibonacci hashing: whatever the stride between blocks, domains or both, their offsets are spread
//! evenly. It matters because allocators give every tenant the same addresses and because buffers are
//! aligned; neither may pile up in a few sets.

use std::ops::Range;
use std::sync::atomic::Ordering;

use crossbeam_utils::CachePadded;
use iommu_types::{DomainId, Generation, Iova, IovaRange};

use super::set::Sets;
use super::{CacheGeometry, Filled};
use crate::drain::{AtomicWord, Atomics, Drains};

/// Sizes of span that one cache may hold.
const SIZES: usize = 3;
/// Address bits that a tag has room for: those of a 5-level table.
const ADDRESS_BITS: u32 = 57;
const PAGE_SHIFT: u32 = 12;
const VALID: u64 = 1 << 63;
const DOMAIN_SHIFT: u32 = 47;
const SIZE_SHIFT: u32 = 45;
const PAGE_MASK: u64 = (1 << SIZE_SHIFT) - 1;
const BLOCK_STEP: u64 = 0xc13f_a9a9_02a6_328f;
const DOMAIN_STEP: u64 = 0x91e1_0da5_c79e_7b1d;

/// Spans of a range that are looked for one by one. A larger range scans the sets of its domain.
const PROBES_MAX: u64 = 64;

/// In `filled`: an entry that a plain lookup does not use.
const SPECIAL: u64 = 1 << SIZES;

/// One entry. `size` is an index into the shifts of the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Span {
    pub(super) domain: DomainId,
    pub(super) base: Iova,
    pub(super) size: usize,
    pub(super) data: u64,
}

/// A cache of spans.
pub(super) struct Spans<A: Atomics> {
    sets: Sets<A>,
    /// Offset bits of each size, smallest first. Lookups go in this order.
    shifts: [u32; SIZES],
    /// A share has 2 to the power of this many sets.
    index_bits: u32,
    /// Bit n is set once size n was filled, and [`SPECIAL`] once a special entry was. Read by every lookup, written four times at most.
    filled: CachePadded<A::Word>,
}

impl<A: Atomics> Spans<A> {
    pub(super) fn new(geometry: CacheGeometry, partitions: u16, shifts: [u32; SIZES]) -> Self {
        assert!(
            geometry.takes_partitions(partitions),
            "partitions are a power of two, of a set or more each: {partitions} of {geometry:?}"
        );
        Self {
            sets: Sets::new(geometry),
            shifts,
            index_bits: geometry.sets.trailing_zeros() - partitions.trailing_zeros(),
            filled: CachePadded::new(A::Word::new(0)),
        }
    }

    pub(super) fn capacity(&self) -> usize {
        self.sets.capacity()
    }

    /// The smallest span that covers the address.
    #[inline]
    pub(super) fn lookup(&self, domain: DomainId, iova: Iova) -> Option<Span> {
        if iova.get() >> ADDRESS_BITS != 0 {
            return None;
        }
        let filled = self.filled.load(Ordering::Relaxed);
        for (size, &shift) in self.shifts.iter().enumerate() {
            if filled >> size & 1 == 0 {
                continue;
            }
            let number = iova.get() >> shift;
            let data = self.sets.find(self.index(domain, size, number), self.tag(domain, size, number));
            if let Some(data) = data {
                return Some(Span { domain, base: Iova::new(number << shift), size, data });
            }
        }
        None
    }

    /// Puts a span in, unless an invalidation overtook its walk (I4).
    pub(super) fn fill(&self, drains: &Drains<A>, walked_under: Generation, span: Span) -> Filled {
        let number = span.base.get() >> self.shifts[span.size];
        assert!(span.base.get() >> ADDRESS_BITS == 0, "a walk checks the width first: {span:?}");
        assert!(number << self.shifts[span.size] == span.base.get(), "a span is aligned: {span:?}");
        // Before the lock, and so before the fence behind it: an invalidation whose move of the generation
        // this fill does not see, sees this.
        let bit = 1 << span.size;
        if self.filled.load(Ordering::Relaxed) & bit == 0 {
            self.filled.fetch_or(bit, Ordering::Relaxed);
        }
        let (index, tag) =
            (self.index(span.domain, span.size, number), self.tag(span.domain, span.size, number));
        self.sets.insert(index, tag, span.data, || drains.is_current(span.domain, walked_under))
    }

    /// Notes, before it is filled, that an entry is of the kind that a plain lookup does not use.
    pub(super) fn note_special(&self) {
        if !self.may_hold_special() {
            self.filled.fetch_or(SPECIAL, Ordering::Relaxed);
        }
    }

    /// Whether such an entry was ever filled.
    #[inline]
    pub(super) fn may_hold_special(&self) -> bool {
        self.filled.load(Ordering::Relaxed) & SPECIAL != 0
    }

    pub(super) fn invalidate_all(&self) {
        if self.filled.load(Ordering::Relaxed) != 0 {
            self.sets.clear_everywhere(|_, _| true);
        }
    }

    pub(super) fn invalidate_domain(&self, domain: DomainId) {
        if self.filled.load(Ordering::Relaxed) != 0 {
            self.sets.clear_among(self.share(domain), |tag, _| domain_of(tag) == domain);
        }
    }

    /// Forgets every span that shares an address with the range.
    pub(super) fn invalidate_range(&self, domain: DomainId, range: IovaRange) {
        let (first, last) = (range.base().get(), range.last().get().min((1 << ADDRESS_BITS) - 1));
        if first > last {
            return;
        }
        let filled = self.filled.load(Ordering::Relaxed);
        for (size, &shift) in self.shifts.iter().enumerate().filter(|(size, _)| filled >> size & 1 != 0) {
            let (first, last) = (first >> shift, last >> shift);
            if last - first < PROBES_MAX.min(1 << self.index_bits) {
                for number in first..=last {
                    let wanted = self.tag(domain, size, number);
                    self.sets.clear(self.index(domain, size, number), |tag, _| tag == wanted);
                }
            } else {
                let wanted = self.tag(domain, size, first)..=self.tag(domain, size, last);
                self.sets.clear_among(self.share(domain), |tag, _| wanted.contains(&tag));
            }
        }
    }

    /// All entries, sorted.
    pub(super) fn entries(&self) -> Vec<Span> {
        let mut spans: Vec<Span> = self.sets.entries().into_iter().map(from_words).collect();
        spans.sort_unstable();
        spans
    }

    /// See the module. The caches' sets take the number modulo their own.
    #[inline]
    fn index(&self, domain: DomainId, size: usize, number: u64) -> usize {
        let (block, space) =
            (number >> self.index_bits, u64::from(domain.get()) * SIZES as u64 + size as u64);
        let turn = block.wrapping_mul(BLOCK_STEP).wrapping_add(space.wrapping_mul(DOMAIN_STEP));
        // Two shifts, because one of 64 is none.
        let offset = turn >> (u64::BITS - 1 - self.index_bits) >> 1;
        let in_share = number.wrapping_add(offset) & ((1 << self.index_bits) - 1);
        (in_share | u64::from(domain.get()) << self.index_bits) as usize
    }

    /// The sets in which entries of the domain stand.
    fn share(&self, domain: DomainId) -> Range<usize> {
        let sets = 1 << self.index_bits;
        let first = (usize::from(domain.get()) << self.index_bits) & (self.sets.len() - 1);
        first..first + sets
    }

    /// Tags of one domain and size are ordered as their spans are.
    #[inline]
    fn tag(&self, domain: DomainId, size: usize, number: u64) -> u64 {
        let page = number << (self.shifts[size] - PAGE_SHIFT);
        VALID | u64::from(domain.get()) << DOMAIN_SHIFT | (size as u64) << SIZE_SHIFT | page
    }
}

fn domain_of(tag: u64) -> DomainId {
    DomainId::new((tag >> DOMAIN_SHIFT) as u16)
}

fn from_words((tag, data): (u64, u64)) -> Span {
    Span {
        domain: domain_of(tag),
        base: Iova::new((tag & PAGE_MASK) << PAGE_SHIFT),
        size: (tag >> SIZE_SHIFT & 3) as usize,
        data,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::drain::Std;

    /// Where an entry stood before there were partitions.
    fn unpartitioned(sets: u64, domain: u16, size: u64, number: u64) -> u64 {
        let index_bits = sets.trailing_zeros();
        let (block, space) = (number >> index_bits, u64::from(domain) * SIZES as u64 + size);
        let turn = block.wrapping_mul(BLOCK_STEP).wrapping_add(space.wrapping_mul(DOMAIN_STEP));
        let offset = ((u128::from(turn) * u128::from(sets)) >> 64) as u64;
        number.wrapping_add(offset) % sets
    }

    #[test]
    fn one_partition_places_as_none_does_and_a_share_places_as_a_cache_of_its_size() {
        for (sets, partitions) in [(1, 1), (64, 1), (4096, 1), (64, 64), (4096, 2), (4096, 128)] {
            let geometry = CacheGeometry { sets, ways: 4 };
            let spans: Spans<Std> = Spans::new(geometry, partitions, [12, 21, 30]);
            let share_sets = u64::from(sets) / u64::from(partitions);
            for domain in [0, 1, 7, 0x8000, 0xffff] {
                for (size, number) in [(0, 0), (0, 0x1234_5678), (1, 0xf_ffff), (2, 77), (0, (1 << 45) - 1)] {
                    let index = spans.index(DomainId::new(domain), size, number) as u64 % u64::from(sets);
                    let within = unpartitioned(share_sets, domain, size as u64, number);
                    let share = u64::from(domain % partitions);
                    assert_eq!(
                        index,
                        share * share_sets + within,
                        "{sets} {partitions} {domain} {size} {number:#x}"
                    );
                    assert!(spans.share(DomainId::new(domain)).contains(&(index as usize)));
                }
            }
        }
    }
}
