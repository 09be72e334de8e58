//! Widths of register accesses, for MMIO to a device and for the registers of a unit.

use std::fmt;

/// How many bytes a register access moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AccessWidth {
    /// One byte.
    Bytes1,
    /// Two bytes.
    Bytes2,
    /// Four bytes.
    Bytes4,
    /// Eight bytes.
    Bytes8,
}

impl AccessWidth {
    /// The width of that many bytes, or `None`.
    pub const fn from_bytes(bytes: u32) -> Option<Self> {
        match bytes {
            1 => Some(Self::Bytes1),
            2 => Some(Self::Bytes2),
            4 => Some(Self::Bytes4),
            8 => Some(Self::Bytes8),
            _ => None,
        }
    }
    /// Bytes moved.
    pub const fn bytes(self) -> u32 {
        match self {
            Self::Bytes1 => 1,
            Self::Bytes2 => 2,
            Self::Bytes4 => 4,
            Self::Bytes8 => 8,
        }
    }
    /// The bits of a value that fit the width.
    pub const fn mask(self) -> u64 {
        u64::MAX >> (64 - 8 * self.bytes())
    }
}

impl fmt::Display for AccessWidth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-byte", self.bytes())
    }
}
