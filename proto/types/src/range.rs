//! Ranges of addresses: never empty, never wrapping, with inclusive ends.
//!
//! Both conditions are checked once, in the constructor. Ends are inclusive so that the last page of a space can be
//! named (as in the virtio-iommu contract).

use std::fmt;
use std::num::NonZeroU64;

use crate::{Address, Gpa, Hpa, Iova};

/// Why a base and a size do not make a range. Numbers, not addresses: the space is named in `space`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidRange {
    /// The size is zero.
    #[error("range at {space}:{base:#x} is empty; its size must be at least one byte")]
    Empty {
        /// The address space.
        space: &'static str,
        /// First address asked for.
        base: u64,
    },
    /// The last address does not fit 64 bits.
    #[error("range at {space}:{base:#x} of {size_bytes:#x} bytes wraps around the end of the address space")]
    Wraps {
        /// The address space.
        space: &'static str,
        /// First address asked for.
        base: u64,
        /// Size asked for, in bytes.
        size_bytes: u64,
    },
}

/// A non-empty run of addresses that does not wrap.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct AddressRange<A> {
    base: A,
    size_bytes: NonZeroU64,
}

/// A range of I/O virtual addresses.
pub type IovaRange = AddressRange<Iova>;
/// A range of guest-physical addresses.
pub type GpaRange = AddressRange<Gpa>;
/// A range of host-physical addresses.
pub type HpaRange = AddressRange<Hpa>;

impl<A: Address> AddressRange<A> {
    /// The range of `size_bytes` bytes from `base`.
    pub fn new(base: A, size_bytes: u64) -> Result<Self, InvalidRange> {
        let raw = base.as_u64();
        let size = NonZeroU64::new(size_bytes).ok_or(InvalidRange::Empty { space: A::SPACE, base: raw })?;
        raw.checked_add(size_bytes - 1).ok_or(InvalidRange::Wraps {
            space: A::SPACE,
            base: raw,
            size_bytes,
        })?;
        Ok(Self { base, size_bytes: size })
    }
    /// First address.
    pub fn base(self) -> A {
        self.base
    }
    /// Last address, inclusive.
    pub fn last(self) -> A {
        A::from_u64(self.base.as_u64() + (self.size_bytes.get() - 1))
    }
    /// Bytes in the range; at least one.
    pub fn size_bytes(self) -> u64 {
        self.size_bytes.get()
    }
    /// Whether `address` lies inside.
    pub fn contains(self, address: A) -> bool {
        self.base <= address && address <= self.last()
    }
    /// Whether every address of `other` lies inside.
    pub fn covers(self, other: Self) -> bool {
        self.base <= other.base && other.last() <= self.last()
    }
    /// Whether the two share an address.
    pub fn overlaps(self, other: Self) -> bool {
        self.base <= other.last() && other.base <= self.last()
    }
    /// Whether base and size are multiples of `alignment_bytes`, a power of two.
    pub fn is_aligned(self, alignment_bytes: u64) -> bool {
        (self.base.as_u64() | self.size_bytes.get()) & (alignment_bytes - 1) == 0
    }
    /// How many 4 KiB pages the range touches.
    pub fn pages_touched(self) -> u64 {
        (self.last().as_u64() >> 12) - (self.base.as_u64() >> 12) + 1
    }
}

impl<A: Address> fmt::Display for AddressRange<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..={:#x}", self.base, self.last().as_u64())
    }
}

impl<A: Address> fmt::Debug for AddressRange<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
