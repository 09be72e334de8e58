//! The flat twin: memory as bytes, mappings and what they open as lists.
//!
//! A *window* is what the tables say of one page (or of one slot of a ring): which bytes are open, for what, and where they lead. When a mapping
//! goes in a mode that does not invalidate at once, its windows become *stale*: a device may get through there, and need not.

mod dma;
mod maps;

use iommu_kernel::{DmaFunction, DmaMap};
use iommu_types::{Access, DmaLimits, DomainOptions, Permissions, Protection};

use super::fixture::PAGE;

/// Where a slot of a ring stands in an address.
const SLOT_BYTES: u64 = 1 << 30;
const RING_BYTES: u64 = 1 << 48;
/// Slots of the ring for coherent memory.
const COHERENT_SLOTS: usize = 256;

/// A byte that a device can reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Memory(u64),
    Shadow(usize, u64),
}

impl Place {
    fn at(self, offset: u64) -> Self {
        match self {
            Self::Memory(gpa) => Self::Memory(gpa + offset),
            Self::Shadow(shadow, at) => Self::Shadow(shadow, at + offset),
        }
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Window {
    pub(crate) base: u64,
    span: u64,
    first: u64,
    last: u64,
    permissions: Permissions,
    leads_to: Place,
    pub(crate) users: u32,
    /// Which devices may have it in a cache.
    cached_by: [bool; 2],
}

impl Window {
    fn holds(&self, address: u64) -> bool {
        address.checked_sub(self.base).is_some_and(|offset| offset < self.span)
    }
    /// Why an access is refused here.
    fn refuses(&self, first: u64, size_bytes: u64, access: Access) -> Option<Refused> {
        let is_inside = self.first <= first && first + (size_bytes - 1) <= self.last;
        match (self.permissions.allow(access), is_inside) {
            (false, _) if self.span == PAGE => Some(Refused::Permission),
            (_, false) => Some(Refused::Bytes),
            (false, true) => Some(Refused::Permission),
            (true, true) => None,
        }
    }
    fn place(&self, address: u64) -> Place {
        self.leads_to.at(address - self.base)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    Permission,
    Bytes,
    Absent,
    BeyondWidth,
    BeyondRings,
    BeyondRing,
}

/// What a piece of a DMA may come to.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Outcome {
    Moves(Place),
    /// Refused, or let through by a stale translation.
    Refused(Refused, Option<Place>),
}

#[derive(Clone, Debug)]
pub(crate) struct Buffer {
    pub(crate) base: u64,
    pub(crate) bytes: Vec<u8>,
    /// Passthrough: whether it is in the direct map.
    pub(crate) is_open: bool,
}

impl Buffer {
    pub(crate) fn holds(&self, gpa: u64) -> bool {
        gpa.checked_sub(self.base).is_some_and(|offset| offset < self.bytes.len() as u64)
    }
    fn pages(&self) -> impl Iterator<Item = u64> {
        pages(self.base, self.bytes.len() as u64)
    }
}

/// A shadow buffer.
#[derive(Clone, Debug)]
pub(crate) struct Shadow {
    pub(crate) first: u64,
    pub(crate) bytes: Vec<u8>,
    pub(crate) permissions: Permissions,
    pub(crate) is_used: bool,
    /// Given up: its addresses lead nowhere.
    pub(crate) is_gone: bool,
}

impl Shadow {
    pub(crate) fn pages(&self) -> u64 {
        self.bytes.len() as u64 / PAGE
    }
}

/// A mapping that is there: a buffer, or an element of scatter-gather.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mapping {
    pub(crate) iova: u64,
    pub(crate) request: DmaMap,
    /// The addresses that were allocated, in pages as they are taken; of scatter-gather the first element has them.
    pub(crate) block: Option<(u64, u64)>,
    pub(crate) shadow: Option<usize>,
}

impl Mapping {
    pub(crate) fn size_bytes(&self) -> u64 {
        self.request.range.size_bytes()
    }
    pub(crate) fn gpa(&self) -> u64 {
        self.request.range.base().get()
    }
    pub(crate) fn last(&self) -> u64 {
        self.iova + (self.size_bytes() - 1)
    }
}

/// A segment: address, size, and the memory of its elements as (address, size).
pub(crate) type Segment = (u64, u64, Vec<(u64, u64)>);

/// A scatter-gather mapping.
#[derive(Clone, Debug)]
pub(crate) struct Group {
    pub(crate) iova: u64,
    pub(crate) elements: Vec<Mapping>,
    pub(crate) segments: Vec<Segment>,
}

/// What is unmapped and not released.
#[derive(Clone, Debug, Default)]
pub(crate) struct Gone {
    pub(crate) mappings: u64,
    pub(crate) bytes: u64,
    /// Pages of memory that must stay pinned.
    pinned: Vec<u64>,
    blocks: Vec<(u64, u64)>,
    slots: Vec<(usize, usize)>,
}

impl Gone {
    pub(crate) fn append(&mut self, other: Self) {
        self.mappings += other.mappings;
        self.bytes += other.bytes;
        self.pinned.extend(other.pinned);
        self.blocks.extend(other.blocks);
        self.slots.extend(other.slots);
    }
    fn shadow(&mut self, shadow: &Shadow) {
        self.mappings += 1;
        self.bytes += shadow.bytes.len() as u64;
        self.blocks.push((shadow.first, shadow.pages()));
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Slot {
    Free,
    Taken,
    Leaving,
}

#[derive(Clone, Debug)]
pub(crate) struct Ring {
    slots: Vec<Slot>,
    tail: usize,
    pub(crate) waiting: Gone,
    pub(crate) since: u64,
    /// Stale slots that were served since the rings' caches last had reason to change, as (device, slot).
    served: Vec<(usize, u64)>,
}

/// Why a map must be refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Why {
    Field,
    Segment,
    NotOwned,
    Mappings,
    Quota,
    Pool,
    Mask,
    Overflow,
    Exhausted,
    NotContiguous,
}

#[derive(Clone, Debug)]
pub(crate) struct Twin {
    pub(crate) options: DomainOptions,
    pub(crate) limits: DmaLimits,
    pub(crate) mappings_max: u64,
    pub(crate) buffers: Vec<Buffer>,
    pub(crate) shadows: Vec<Shadow>,
    /// Without the elements of groups.
    pub(crate) live: Vec<Mapping>,
    pub(crate) groups: Vec<Group>,
    windows: Vec<Window>,
    stale: Vec<Window>,
    /// Persistent: open pages without a user, the one longest without first.
    pub(crate) idle: Vec<u64>,
    /// Deferred: what waits, and since when.
    pub(crate) waiting: Gone,
    pub(crate) since: u64,
    pub(crate) rings: Vec<Ring>,
    pub(crate) pending: Vec<Gone>,
}

pub(crate) fn pages(base: u64, size_bytes: u64) -> std::ops::RangeInclusive<u64> {
    base / PAGE..=(base + (size_bytes - 1)) / PAGE
}

/// Pages that the allocator takes for so many.
pub(crate) fn taken(pages: u64) -> u64 {
    pages.next_power_of_two()
}

fn overlap(one: (u64, u64), other: (u64, u64)) -> bool {
    one.0 < other.0 + other.1 && other.0 < one.0 + one.1
}

fn is_unit(access: Access) -> bool {
    matches!(access, Access::Read | Access::Write)
}

impl Twin {
    pub(crate) fn new(options: DomainOptions, mappings_max: u64) -> Self {
        let rings = match options.protection {
            Protection::Ring(rings) => {
                let ring = |slots| Ring {
                    slots: vec![Slot::Free; slots],
                    tail: 0,
                    waiting: Gone::default(),
                    since: 0,
                    served: Vec::new(),
                };
                let streaming = (0..rings.count).map(|_| ring(rings.slots as usize));
                streaming.chain([ring(COHERENT_SLOTS)]).collect()
            }
            _ => Vec::new(),
        };
        Self {
            options,
            limits: DmaLimits::NONE,
            mappings_max,
            buffers: Vec::new(),
            shadows: Vec::new(),
            live: Vec::new(),
            groups: Vec::new(),
            windows: Vec::new(),
            stale: Vec::new(),
            idle: Vec::new(),
            waiting: Gone::default(),
            since: 0,
            rings,
            pending: Vec::new(),
        }
    }
    fn is_shared(&self) -> bool {
        matches!(self.options.protection, Protection::Shared | Protection::Persistent(_))
    }
    pub(crate) fn is_ring(&self) -> bool {
        matches!(self.options.protection, Protection::Ring(_))
    }
    pub(crate) fn is_bounce(&self) -> bool {
        matches!(self.options.protection, Protection::Bounce(_))
    }
    fn is_passthrough(&self) -> bool {
        matches!(self.options.protection, Protection::Passthrough)
    }
    /// Whether a request is copied.
    pub(crate) fn bounces(&self, request: &DmaMap) -> bool {
        self.is_bounce() && !request.attributes.resource && request.function != DmaFunction::Coherent
    }
    /// Whether a request is given addresses of an allocator.
    pub(crate) fn allocates(&self, request: &DmaMap) -> bool {
        !self.options.protection.is_identity() && !self.is_ring() && !self.bounces(request)
    }
    /// Every mapping, elements of groups included.
    pub(crate) fn mappings(&self) -> impl Iterator<Item = &Mapping> {
        self.live.iter().chain(self.groups.iter().flat_map(|group| &group.elements))
    }
    fn gone(&self) -> impl Iterator<Item = &Gone> {
        self.pending.iter().chain([&self.waiting]).chain(self.rings.iter().map(|ring| &ring.waiting))
    }
    fn shadows_there(&self) -> impl Iterator<Item = &Shadow> {
        self.shadows.iter().filter(|shadow| !shadow.is_gone)
    }
    pub(crate) fn shadow_bytes(&self) -> u64 {
        self.shadows_there().map(|shadow| shadow.bytes.len() as u64).sum()
    }
    /// Mappings and bytes that the domain counts as live.
    pub(crate) fn counted(&self) -> (u64, u64) {
        let open = || self.buffers.iter().filter(|buffer| buffer.is_open);
        let count = self.mappings().count() + self.shadows_there().count() + open().count();
        let bytes: u64 = self.mappings().map(Mapping::size_bytes).sum();
        let open_bytes: u64 = open().map(|buffer| buffer.bytes.len() as u64).sum();
        (count as u64, bytes + self.shadow_bytes() + open_bytes)
    }
    /// Mappings and bytes that the owner is charged for.
    pub(crate) fn charged(&self) -> (u64, u64) {
        let (mappings, bytes) = self.counted();
        self.gone().fold((mappings, bytes), |sum, gone| (sum.0 + gone.mappings, sum.1 + gone.bytes))
    }
    /// Whether the page of memory must not be freed.
    fn is_pinned(&self, page: u64) -> bool {
        let in_gone = self.gone().any(|gone| gone.pinned.contains(&page));
        let in_windows = self.windows.iter().any(|window| match window.leads_to {
            Place::Memory(gpa) => pages(gpa, if self.is_ring() { window.last - window.base + 1 } else { 1 })
                .any(|at| at == page),
            Place::Shadow(..) => false,
        });
        let bounced = self.mappings().filter(|mapping| mapping.shadow.is_some());
        let mut bounced = bounced.flat_map(|mapping| pages(mapping.gpa(), mapping.size_bytes()));
        in_gone || in_windows || bounced.any(|at| at == page)
    }
    pub(crate) fn is_buffer_pinned(&self, buffer: usize) -> bool {
        self.buffers[buffer].pages().any(|page| self.is_pinned(page))
    }
    /// Whether a mapping lies in the buffer.
    pub(crate) fn is_buffer_used(&self, buffer: usize) -> bool {
        self.mappings().any(|mapping| self.buffers[buffer].holds(mapping.gpa()))
    }
    /// Whether addresses are in use, or were and may still be cached.
    pub(crate) fn is_taken(&self, block: (u64, u64)) -> bool {
        let blocks = self.mappings().filter_map(|mapping| mapping.block);
        let shadows = self.shadows_there().map(|shadow| (shadow.first, shadow.pages()));
        let gone = self.gone().flat_map(|gone| gone.blocks.iter().copied());
        blocks.chain(shadows).chain(gone).any(|other| overlap(block, other))
    }
    /// Whether addresses for so many pages are free within the limits.
    pub(crate) fn has_room_for(&self, pages: u64) -> bool {
        let (size, last) = (taken(pages), self.limits.last_address() / PAGE);
        let end = (last.saturating_add(1)).min(1 << 20);
        (0..end / size).map(|n| n * size).any(|first| first > 0 && !self.is_taken((first, size)))
    }
}
