//! One mapping as the sanitizer knows it.

use iommu_types::{Access, Direction, Gpa, IovaRange, MappingLife, Permissions, RequestId};

use crate::domain::DmaFunction;

/// By which function a mapping was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum MappingKind {
    /// One buffer (`dma_map_single`, `_page`, `_resource`).
    Single,
    /// Segments that were merged into one mapping (`dma_map_sg`).
    ScatterGather,
    /// Memory shared with the device for long (`dma_alloc_coherent`, a pool of it).
    Coherent,
    /// At an address that the client chose (the domain API).
    Fixed,
}

impl MappingKind {
    /// Whether it is made for one transfer.
    pub(super) const fn is_streaming(self) -> bool {
        matches!(self, Self::Single | Self::ScatterGather)
    }
}

impl From<DmaFunction> for MappingKind {
    fn from(function: DmaFunction) -> Self {
        match function {
            DmaFunction::Single => Self::Single,
            DmaFunction::ScatterGather => Self::ScatterGather,
            DmaFunction::Coherent => Self::Coherent,
        }
    }
}

/// A mapping that was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewMapping {
    /// Its addresses: exactly the bytes asked for, not rounded to pages.
    pub range: IovaRange,
    /// Memory behind the first of them.
    pub gpa: Gpa,
    /// Which way data flows.
    pub direction: Direction,
    /// By which function.
    pub kind: MappingKind,
}

/// A mapping, alive or dead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mapping {
    /// Counts births: the newer of two has the larger number.
    pub(super) number: u64,
    pub(super) kind: MappingKind,
    /// Order of its death.
    pub(super) died: Option<u64>,
    /// How often one like it died by force, because its memory was taken back, and was not unmapped by its driver since.
    pub(super) unmaps_owed: u32,
    pub(super) life: MappingLife,
    /// Bytes of memory that lie behind each other from the first.
    memory_bytes: u64,
}

impl Mapping {
    pub(super) fn new(number: u64, mapping: NewMapping, born_at_us: u64, born_by: RequestId) -> Self {
        let NewMapping { range, gpa, direction, kind } = mapping;
        let life = MappingLife {
            iova: range.base(),
            size_bytes: range.size_bytes(),
            gpa,
            direction,
            coherent: kind == MappingKind::Coherent,
            born_at_us,
            born_by,
            death: None,
        };
        Self { number, kind, died: None, unmaps_owed: 0, life, memory_bytes: range.size_bytes() }
    }
    /// The same, where only so many bytes lie behind each other in memory.
    pub(super) fn with_memory(self, memory_bytes: u64) -> Self {
        Self { memory_bytes, ..self }
    }
    /// The same, with so many unmaps owed.
    pub(super) fn with_unmaps_owed(self, unmaps_owed: u32) -> Self {
        Self { unmaps_owed, ..self }
    }
    /// Whether it is gone without its driver having done anything.
    pub(super) fn is_revoked(&self) -> bool {
        self.unmaps_owed > 0
    }
    /// First address.
    pub(super) fn first(&self) -> u64 {
        self.life.iova.get()
    }
    /// Last address.
    pub(super) fn last(&self) -> u64 {
        // A range is not empty and does not wrap.
        self.first() + (self.life.size_bytes - 1)
    }
    pub(super) fn contains(&self, address: u64) -> bool {
        (self.first()..=self.last()).contains(&address)
    }
    /// First and last byte of memory behind `first..=last`, of which the first address lies inside; no further than is known.
    pub(super) fn memory(&self, first: u64, last: u64) -> (u64, u64) {
        let end = self.memory_bytes.saturating_sub(1);
        let offset = |address: u64| address.saturating_sub(self.first()).min(end);
        let at = |address: u64| self.life.gpa.get().saturating_add(offset(address));
        (at(first), at(last))
    }
    pub(super) fn lets_device_write(&self) -> bool {
        self.life.direction.permissions().contains(Permissions::WRITE)
    }
    /// Whether it was there at that order or later: a death with the same number came after.
    pub(super) fn lived_at(&self, order: u64) -> bool {
        self.died.is_none_or(|died| died >= order)
    }
}

/// The addresses of a DMA and what it needs of a mapping.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked {
    pub(super) first: u64,
    /// Inclusive; a zero-length read asks for its address.
    pub(super) last: u64,
    pub(super) access: Access,
    needs: Permissions,
    /// Whether it is a piece of a transfer: one of no bytes is not.
    pub(super) moves_bytes: bool,
}

impl Asked {
    pub(super) fn new(first: u64, size_bytes: u32, access: Access) -> Self {
        let needs = match access {
            // A zero-length read moves nothing, and VT-d lets it through wherever anything is mapped (CAP.ZLR).
            Access::Read if size_bytes == 0 => Permissions::empty(),
            Access::Read => Permissions::READ,
            Access::Write => Permissions::WRITE,
            Access::Atomic => Permissions::READ_WRITE,
        };
        let last = first.saturating_add(u64::from(size_bytes.max(1)) - 1);
        Self { first, last, access, needs, moves_bytes: size_bytes != 0 }
    }
    /// Whether the mapping's direction allows it.
    pub(super) fn goes_with(&self, mapping: &Mapping) -> bool {
        mapping.life.direction.permissions().contains(self.needs)
    }
}
