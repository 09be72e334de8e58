//! Addresses, one type per space.
//!
//! An I/O virtual address, a guest-physical address and a host-physical address are all 64-bit numbers, and mixing
//! them up is the bug this product exists to catch; so they do not convert, and there is no `+`.

use std::fmt;

/// Bytes in the smallest page (VT-d 5.10 §3.6: 4 KiB).
pub const PAGE_SIZE_BYTES: u64 = 4096;

/// What every address space has in common: a 64-bit number with checked arithmetic.
pub trait Address: Copy + Ord + fmt::Debug + fmt::Display {
    /// The address with this number.
    fn from_u64(raw: u64) -> Self;
    /// The number of this address.
    fn as_u64(self) -> u64;
    /// The name of the space, as it is printed before an address (`iova`, `gpa`, `hpa`).
    const SPACE: &'static str;
}

macro_rules! address {
    ($(#[$doc:meta])* $name:ident, $space:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(transparent)]
        pub struct $name(u64);

        impl $name {
            /// The address with this number.
            pub const fn new(raw: u64) -> Self {
                Self(raw)
            }
            /// The number of this address.
            pub const fn get(self) -> u64 {
                self.0
            }
            /// This address moved up, or `None` when the sum does not fit 64 bits.
            pub const fn checked_add(self, offset_bytes: u64) -> Option<Self> {
                match self.0.checked_add(offset_bytes) {
                    Some(raw) => Some(Self(raw)),
                    None => None,
                }
            }
            /// How far this address lies above `base`, or `None` when it lies below.
            pub const fn offset_from(self, base: Self) -> Option<u64> {
                self.0.checked_sub(base.0)
            }
            /// Bytes between the start of the 4 KiB page and this address.
            pub const fn page_offset(self) -> u64 {
                self.0 % PAGE_SIZE_BYTES
            }
            /// The start of the 4 KiB page that holds this address.
            pub const fn page_base(self) -> Self {
                Self(self.0 & !(PAGE_SIZE_BYTES - 1))
            }
            /// The number of the 4 KiB page that holds this address.
            pub const fn page_number(self) -> u64 {
                self.0 / PAGE_SIZE_BYTES
            }
            /// Whether this address is a multiple of `alignment_bytes`, a power of two.
            pub const fn is_aligned(self, alignment_bytes: u64) -> bool {
                self.0 & (alignment_bytes - 1) == 0
            }
        }

        impl Address for $name {
            fn from_u64(raw: u64) -> Self {
                Self(raw)
            }
            fn as_u64(self) -> u64 {
                self.0
            }
            const SPACE: &'static str = $space;
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($space, ":{:#x}"), self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
    };
}

address! {
    /// I/O virtual address: what a device puts on the bus.
    Iova, "iova"
}
address! {
    /// Guest-physical address: what an owner (a driver or a VM) calls its own memory.
    Gpa, "gpa"
}
address! {
    /// Host-physical address: where a byte really is. Only operators ever see one.
    Hpa, "hpa"
}

/// The page sizes of VT-d second-stage tables (VT-d 5.10 §3.7).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PageSize {
    /// 4 KiB, a leaf at level 1.
    Size4K,
    /// 2 MiB, a leaf at level 2.
    Size2M,
    /// 1 GiB, a leaf at level 3.
    Size1G,
}

impl PageSize {
    /// Every size, smallest first.
    pub const ALL: [Self; 3] = [Self::Size4K, Self::Size2M, Self::Size1G];

    /// Bytes in such a page.
    pub const fn bytes(self) -> u64 {
        1 << self.shift()
    }
    /// Number of offset bits in such a page: 12, 21 or 30.
    pub const fn shift(self) -> u32 {
        match self {
            Self::Size4K => 12,
            Self::Size2M => 21,
            Self::Size1G => 30,
        }
    }
    /// The table level at which a leaf of this size stands: 1, 2 or 3.
    pub const fn leaf_level(self) -> u8 {
        match self {
            Self::Size4K => 1,
            Self::Size2M => 2,
            Self::Size1G => 3,
        }
    }
    /// The size of a leaf at `level`, or `None` where no leaf can stand.
    pub const fn at_level(level: u8) -> Option<Self> {
        match level {
            1 => Some(Self::Size4K),
            2 => Some(Self::Size2M),
            3 => Some(Self::Size1G),
            _ => None,
        }
    }
}

impl fmt::Display for PageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Size4K => "4 KiB",
            Self::Size2M => "2 MiB",
            Self::Size1G => "1 GiB",
        })
    }
}
