//! Byte extents of partial pages: an extension of ours to second-stage tables, for mappings that are granted byte by byte.
//!
//! VT-d opens whole pages. A leaf of a 4 KiB page whose ignored bit 52 is set (`partial_page` of [`SecondStageEntry`]) opens only a
//! part of its page, and which part stands in an *extent table*: the frame after the leaf's table, with one word for each entry.
//!
//! ```text
//!  table + 0     table + 4096
//!  |512 leaves   |512 extents, in the same order |
//!
//!   63 62                     24 23          12 11           0
//!  |V | zero                    | last byte    | first byte   |
//! ```
//!
//! The last byte is inclusive, so that every part of a page can be said. A word that is not valid, or that says nonsense, opens nothing.
//!
//! Leaf and extent are two words, so software writes the extent before the leaf that points to it. A walk reads the leaf, the extent and
//! the leaf again: where it has changed, the extent may be that of another mapping, and the walk begins again.
//!
//! [`SecondStageEntry`]: super::pte::SecondStageEntry

use std::fmt;

use iommu_types::{Hpa, Iova, IovaRange, PAGE_SIZE_BYTES};

use super::pte::entry_address;

const VALID: u64 = 1 << 63;
const LAST_SHIFT: u32 = 12;
const OFFSET_MASK: u64 = PAGE_SIZE_BYTES - 1;

/// The part of a page that is open: one byte at least.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteExtent {
    first: u16,
    last: u16,
}

impl ByteExtent {
    /// From the first byte to the last, which is inclusive; `None` unless `first <= last <= 4095`.
    #[inline]
    pub const fn new(first: u16, last: u16) -> Option<Self> {
        if first <= last && last as u64 <= OFFSET_MASK { Some(Self { first, last }) } else { None }
    }
    /// All of a page: what a leaf opens that is not partial.
    pub const WHOLE: Self = Self { first: 0, last: OFFSET_MASK as u16 };

    /// The part of a page that lies in a range, of which the page holds a byte.
    pub fn of_page(range: IovaRange, page: u64) -> Self {
        let is_in = |at: Iova| (at.page_number() == page).then(|| at.page_offset() as u16);
        let first = is_in(range.base()).unwrap_or(Self::WHOLE.first);
        let last = is_in(range.last()).unwrap_or(Self::WHOLE.last);
        Self { first, last }
    }
    /// The smallest extent that holds both.
    pub fn hull(self, other: Self) -> Self {
        Self { first: self.first.min(other.first), last: self.last.max(other.last) }
    }
    /// Offset of the first byte.
    #[inline]
    pub const fn first(self) -> u16 {
        self.first
    }
    /// Offset of the last byte, which is inclusive.
    #[inline]
    pub const fn last(self) -> u16 {
        self.last
    }
    /// The word of an extent table.
    #[inline]
    pub const fn into_word(self) -> u64 {
        VALID | (self.last as u64) << LAST_SHIFT | self.first as u64
    }
    /// What a word of an extent table opens: nothing when it is not valid, ends before it begins, or has other bits set.
    #[inline]
    pub const fn from_word(word: u64) -> Option<Self> {
        if word & VALID == 0 || (word & !VALID) >> (2 * LAST_SHIFT) != 0 {
            return None;
        }
        Self::new((word & OFFSET_MASK) as u16, (word >> LAST_SHIFT & OFFSET_MASK) as u16)
    }
    /// Whether all of an access lies inside. One of no bytes must begin inside.
    #[inline]
    pub const fn admits(self, page_offset: u64, size_bytes: u32) -> bool {
        // Neither overflows: an offset has 12 bits, a size 32.
        let last = (page_offset & OFFSET_MASK) + (size_bytes as u64).saturating_sub(1);
        self.first as u64 <= page_offset & OFFSET_MASK && last <= self.last as u64
    }
}

impl fmt::Display for ByteExtent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "bytes {:#05x} to {:#05x}", self.first, self.last)
    }
}

/// Where the extent of an address lies, by the level-1 table that holds its leaf; `None` when that is beyond 64 bits.
#[inline]
pub const fn extent_address(table: Hpa, iova: Iova) -> Option<Hpa> {
    match table.checked_add(PAGE_SIZE_BYTES) {
        Some(extents) => entry_address(extents, iova, 1),
        None => None,
    }
}
