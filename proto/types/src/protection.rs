//! How a domain trades protection for cost.

use std::fmt;

/// The life of a mapping and of the translations made from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Protection {
    /// One DMA buffer, one mapping; every unmap is answered after invalidation and drain. No stale window (I1).
    Strict,
}

impl fmt::Display for Protection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Strict => "strict",
        })
    }
}
