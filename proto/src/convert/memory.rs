//! `memory.proto`: memory as the CPU sees it.

use bytes::Bytes;
use iommu_types::{Gpa, GpaRange, Owner};

use super::driver::InvalidRequest;
use super::{Field, parse};
use crate::pb;

/// Memory to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryRead {
    /// Whose; `None` for the caller's own.
    pub owner: Option<Owner>,
    /// Which bytes.
    pub range: GpaRange,
}

impl TryFrom<pb::MemoryReadRequest> for MemoryRead {
    type Error = InvalidRequest;
    fn try_from(wire: pb::MemoryReadRequest) -> Result<Self, InvalidRequest> {
        let range = GpaRange::new(Gpa::new(wire.gpa), wire.size_bytes)?;
        Ok(Self { owner: parse("owner", wire.owner)?, range })
    }
}
impl From<MemoryRead> for pb::MemoryReadRequest {
    fn from(read: MemoryRead) -> Self {
        let (gpa, size_bytes) = (read.range.base().get(), read.range.size_bytes());
        Self { owner: read.owner.write(), gpa, size_bytes }
    }
}

/// Memory to write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryWrite {
    /// Whose; `None` for the caller's own.
    pub owner: Option<Owner>,
    /// Where; exactly as large as the data.
    range: GpaRange,
    /// The bytes.
    data: Bytes,
}

impl MemoryWrite {
    /// Writes `data` from `gpa` on.
    pub fn new(owner: Option<Owner>, gpa: Gpa, data: Bytes) -> Result<Self, InvalidRequest> {
        Ok(Self { owner, range: GpaRange::new(gpa, data.len() as u64)?, data })
    }
    /// Where; exactly as large as the data.
    pub const fn range(&self) -> GpaRange {
        self.range
    }
    /// The bytes.
    pub const fn data(&self) -> &Bytes {
        &self.data
    }
}

impl TryFrom<pb::MemoryWriteRequest> for MemoryWrite {
    type Error = InvalidRequest;
    fn try_from(wire: pb::MemoryWriteRequest) -> Result<Self, InvalidRequest> {
        Self::new(parse("owner", wire.owner)?, Gpa::new(wire.gpa), wire.data)
    }
}
impl From<MemoryWrite> for pb::MemoryWriteRequest {
    fn from(write: MemoryWrite) -> Self {
        Self { owner: write.owner.write(), gpa: write.range.base().get(), data: write.data }
    }
}
