//! The flat twin: memory as bytes, mappings and what they open as lists.
//!
//! A *window* is what the tables say of one page (or of one slot of a ring): which bytes are open, for what, and where they lead. When a mapping
//! goes in a mode that does not invalidate at once, its windows become *stale*: a device may get through there, and need not.

use iommu_kernel::{DmaFunction, DmaMap};
use iommu_types::{
    Access, DmaLimits, DomainOptions, FaultReason, MappingGranularity, Permissions, Protection,
};

use super::fixture::PAGE;
use super::steps::FROM;

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

/// A scatter-gather mapping.
#[derive(Clone, Debug)]
pub(crate) struct Group {
    pub(crate) iova: u64,
    pub(crate) elements: Vec<Mapping>,
    /// As (address, size, memory of the elements).
    pub(crate) segments: Vec<(u64, u64, Vec<(u64, u64)>)>,
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

    // What maps and unmaps do.

    /// Why a buffer cannot be mapped, as far as it does not depend on where it goes.
    pub(crate) fn refuses_early(&self, request: &DmaMap) -> Option<Why> {
        let (base, size_bytes) = (request.range.base().get(), request.range.size_bytes());
        if size_bytes > self.limits.segment_bytes_max {
            return Some(Why::Segment);
        }
        let is_owned =
            self.buffers.iter().any(|buffer| buffer.holds(base) && buffer.holds(base + size_bytes - 1));
        (!is_owned).then_some(Why::NotOwned)
    }
    /// Every reason for which a map has to be refused.
    pub(crate) fn refuses(&self, request: &DmaMap) -> Vec<Why> {
        let mut all: Vec<Why> = self.refuses_early(request).into_iter().collect();
        if self.charged().0 + 1 > self.mappings_max {
            all.push(Why::Mappings);
        }
        if self.options.protection.is_identity() && request.range.last().get() > self.limits.last_address() {
            all.push(Why::Mask);
        }
        if let Protection::Persistent(quota) = self.options.protection {
            let in_use = self.windows.iter().filter(|window| window.users > 0).count();
            let wanted = pages(request.range.base().get(), request.range.size_bytes());
            let more = wanted.filter(|page| self.window(page * PAGE).is_none_or(|window| window.users == 0));
            if in_use + more.count() > quota.pages_max as usize {
                all.push(Why::Quota);
            }
        }
        if let Protection::Bounce(pool) = self.options.protection
            && self.bounces(request)
            && self.idle_shadows(request).is_empty()
        {
            let used = self.shadows_there().filter(|shadow| shadow.is_used);
            let used: u64 = used.map(|shadow| shadow.bytes.len() as u64).sum();
            if used + taken(request.range.pages_touched()) * PAGE > pool.bytes_max {
                all.push(Why::Pool);
            }
        }
        if self.is_ring() {
            match self.ring_of(request) {
                None => all.push(Why::Field),
                Some(ring) if self.slot_for(ring, request).is_none() => all.push(Why::Overflow),
                Some(_) => {}
            }
        }
        all
    }
    /// Shadows that would do for a request.
    pub(crate) fn idle_shadows(&self, request: &DmaMap) -> Vec<usize> {
        let size = taken(request.range.pages_touched());
        let permissions = request.direction.permissions();
        let fits = |shadow: &Shadow| {
            !shadow.is_used
                && !shadow.is_gone
                && shadow.pages() == size
                && shadow.permissions == permissions
                && shadow.first + size - 1 <= self.limits.last_address() / PAGE
        };
        (0..self.shadows.len()).filter(|at| fits(&self.shadows[*at])).collect()
    }
    fn ring_of(&self, request: &DmaMap) -> Option<usize> {
        let coherent = self.rings.len() - 1;
        if request.function == DmaFunction::Coherent {
            return Some(coherent);
        }
        Some(usize::from(request.ring)).filter(|ring| *ring < coherent)
    }
    fn slot_for(&self, ring: usize, request: &DmaMap) -> Option<usize> {
        let Ring { slots, tail, .. } = &self.rings[ring];
        let tries = if request.function == DmaFunction::Coherent { slots.len() } else { 1 };
        (0..tries).map(|n| (tail + n) % slots.len()).find(|slot| slots[*slot] == Slot::Free)
    }
    /// Where a mapping has to go that has no choice.
    pub(crate) fn address_of(&self, request: &DmaMap) -> Option<u64> {
        if self.options.protection.is_identity() {
            return Some(request.range.base().get());
        }
        let ring = if self.is_ring() { self.ring_of(request)? } else { return None };
        let slot = self.slot_for(ring, request)?;
        Some(ring as u64 * RING_BYTES + slot as u64 * SLOT_BYTES)
    }
    fn window(&self, address: u64) -> Option<&Window> {
        self.windows.iter().find(|window| window.holds(address))
    }
    /// Pages of a persistent domain that have to go for a request, the one longest idle first.
    pub(crate) fn evicted_by(&self, request: &DmaMap) -> Vec<u64> {
        let Protection::Persistent(quota) = self.options.protection else { return Vec::new() };
        let wanted: Vec<u64> = pages(request.range.base().get(), request.range.size_bytes()).collect();
        let missing = wanted.iter().filter(|page| self.window(**page * PAGE).is_none()).count();
        let excess = (self.windows.len() + missing).saturating_sub(quota.pages_max as usize);
        self.idle.iter().filter(|page| !wanted.contains(page)).take(excess).copied().collect()
    }
    pub(crate) fn close_pages(&mut self, closed: &[u64]) -> Gone {
        let mut gone = Gone::default();
        for page in closed {
            self.idle.retain(|idle| idle != page);
            self.windows.retain(|window| window.base != page * PAGE);
            gone.pinned.push(*page);
        }
        gone
    }
    /// A mapping was made. It opens what its mode opens; its memory is copied if its mode copies.
    pub(crate) fn open(&mut self, mapping: &Mapping) {
        let request = &mapping.request;
        let (base, permissions) = (mapping.iova, request.direction.permissions());
        if self.is_passthrough() {
            return;
        }
        if let Some(shadow) = mapping.shadow {
            self.fill_shadow(mapping, shadow);
        } else if self.is_ring() {
            let (ring, slot) = self.slot_at(base);
            self.rings[ring].slots[slot] = Slot::Taken;
            self.rings[ring].tail = (slot + 1) % self.rings[ring].slots.len();
            let (span, last) = (SLOT_BYTES, mapping.last());
            let leads_to = Place::Memory(mapping.gpa());
            self.push(Window {
                base,
                span,
                first: base,
                last,
                permissions,
                leads_to,
                users: 1,
                cached_by: [false; 2],
            });
        } else {
            for (page, gpa) in
                pages(base, mapping.size_bytes()).zip(pages(mapping.gpa(), mapping.size_bytes()))
            {
                self.open_page(page * PAGE, Place::Memory(gpa * PAGE), mapping, permissions);
            }
        }
    }
    fn push(&mut self, window: Window) {
        assert!(self.window(window.base).is_none(), "a window is opened where none is");
        self.windows.push(window);
    }
    fn open_page(&mut self, base: u64, leads_to: Place, mapping: &Mapping, permissions: Permissions) {
        let is_byte = self.options.granularity == MappingGranularity::Byte;
        let first = if is_byte { base.max(mapping.iova) } else { base };
        let last = if is_byte { (base + PAGE - 1).min(mapping.last()) } else { base + PAGE - 1 };
        self.idle.retain(|page| page * PAGE != base);
        if self.is_shared()
            && let Some(window) = self.windows.iter_mut().find(|window| window.holds(base))
        {
            window.users += 1;
            window.permissions |= permissions;
            (window.first, window.last) = (window.first.min(first), window.last.max(last));
            return;
        }
        self.push(Window {
            base,
            span: PAGE,
            first,
            last,
            permissions,
            leads_to,
            users: 1,
            cached_by: [false; 2],
        });
    }
    pub(crate) fn open_direct(&mut self, buffer: usize) {
        self.buffers[buffer].is_open = true;
        for page in self.buffers[buffer].pages().collect::<Vec<_>>() {
            let (base, permissions) = (page * PAGE, Permissions::READ_WRITE);
            let (last, leads_to) = (base + PAGE - 1, Place::Memory(base));
            self.push(Window {
                base,
                span: PAGE,
                first: base,
                last,
                permissions,
                leads_to,
                users: 1,
                cached_by: [false; 2],
            });
        }
    }
    pub(crate) fn close_direct(&mut self, buffer: usize) -> Gone {
        let mut gone =
            Gone { mappings: 1, bytes: self.buffers[buffer].bytes.len() as u64, ..Gone::default() };
        self.buffers[buffer].is_open = false;
        for page in self.buffers[buffer].pages().collect::<Vec<_>>() {
            self.windows.retain(|window| window.base != page * PAGE);
            gone.pinned.push(page);
        }
        gone
    }
    /// A shadow that was not there before.
    pub(crate) fn make_shadow(&mut self, first: u64, pages: u64, permissions: Permissions) -> usize {
        let shadow = self.shadows.len();
        let bytes = vec![0; (pages * PAGE) as usize];
        self.shadows.push(Shadow { first, bytes, permissions, is_used: false, is_gone: false });
        for n in 0..pages {
            let (base, leads_to) = ((first + n) * PAGE, Place::Shadow(shadow, n * PAGE));
            let last = base + PAGE - 1;
            self.push(Window {
                base,
                span: PAGE,
                first: base,
                last,
                permissions,
                leads_to,
                users: 1,
                cached_by: [false; 2],
            });
        }
        shadow
    }
    pub(crate) fn drop_shadow(&mut self, shadow: usize) -> Gone {
        let mut gone = Gone::default();
        gone.shadow(&self.shadows[shadow]);
        self.shadows[shadow].is_gone = true;
        self.windows.retain(|window| !matches!(window.leads_to, Place::Shadow(at, _) if at == shadow));
        gone
    }
    fn fill_shadow(&mut self, mapping: &Mapping, shadow: usize) {
        self.shadows[shadow].is_used = true;
        self.shadows[shadow].bytes.fill(0);
        if !mapping.request.attributes.skip_cpu_sync {
            self.copy_shadow(mapping, mapping.iova, mapping.size_bytes(), true);
        }
    }
    /// Copies a part of a bounced mapping.
    pub(crate) fn copy_shadow(&mut self, mapping: &Mapping, iova: u64, size_bytes: u64, to_device: bool) {
        let Some(shadow) = mapping.shadow else { return };
        for address in iova..iova + size_bytes {
            let memory = Place::Memory(mapping.gpa() + (address - mapping.iova));
            let shadow = Place::Shadow(shadow, address - self.shadows[shadow].first * PAGE);
            let (from, to) = if to_device { (memory, shadow) } else { (shadow, memory) };
            *self.byte(to) = *self.byte(from);
        }
    }
    /// A mapping is unmapped: what is to be released when it is quiet. `is_deferred` says whether what it opened may go on being used.
    pub(crate) fn close(&mut self, mapping: &Mapping, copies: bool, is_deferred: bool) -> Gone {
        let mut gone = Gone { mappings: 1, bytes: mapping.size_bytes(), ..Gone::default() };
        gone.blocks.extend(mapping.block);
        if let Some(shadow) = mapping.shadow {
            if copies && mapping.request.direction.permissions().contains(Permissions::WRITE) {
                self.copy_shadow(mapping, mapping.iova, mapping.size_bytes(), false);
            }
            self.shadows[shadow].is_used = false;
        } else if self.is_ring() {
            gone.pinned.extend(pages(mapping.gpa(), mapping.size_bytes()));
            gone.slots.push(self.slot_at(mapping.iova));
            let (ring, slot) = self.slot_at(mapping.iova);
            self.rings[ring].slots[slot] = Slot::Leaving;
            self.rings[ring].served.clear();
            self.close_window(mapping.iova, true);
        } else if !self.is_passthrough() {
            let (iova_pages, gpa_pages) =
                (pages(mapping.iova, mapping.size_bytes()), pages(mapping.gpa(), mapping.size_bytes()));
            for (page, gpa) in iova_pages.zip(gpa_pages) {
                self.close_page(page, gpa, is_deferred, &mut gone);
            }
        }
        gone
    }
    fn close_page(&mut self, page: u64, gpa: u64, is_deferred: bool, gone: &mut Gone) {
        let window = self.windows.iter_mut().find(|window| window.base == page * PAGE);
        let window = window.expect("a mapping has a window for each page");
        window.users -= 1;
        if window.users > 0 {
            return;
        }
        if let Protection::Persistent(_) = self.options.protection {
            self.idle.push(page);
            return;
        }
        gone.pinned.push(gpa);
        self.close_window(page * PAGE, is_deferred);
    }
    fn close_window(&mut self, base: u64, is_deferred: bool) {
        let at = self.windows.iter().position(|window| window.base == base).expect("it is open");
        let window = self.windows.swap_remove(at);
        if is_deferred {
            self.stale.push(window);
        }
    }
    pub(crate) fn slot_at(&self, iova: u64) -> (usize, usize) {
        ((iova / RING_BYTES) as usize, (iova % RING_BYTES / SLOT_BYTES) as usize)
    }
    /// Everything that waits is invalidated.
    pub(crate) fn flush(&mut self) -> Gone {
        self.stale.retain(|window| window.span != PAGE);
        std::mem::take(&mut self.waiting)
    }
    /// A ring in which nothing waits is not invalidated.
    pub(crate) fn end_burst(&mut self, ring: usize) -> Gone {
        if self.rings[ring].waiting.mappings == 0 {
            return Gone::default();
        }
        let in_ring = |window: &Window| (window.base / RING_BYTES) as usize == ring;
        self.stale.retain(|window| !in_ring(window));
        self.windows
            .iter_mut()
            .filter(|window| in_ring(window))
            .for_each(|window| window.cached_by = [false; 2]);
        self.rings[ring].served.clear();
        std::mem::take(&mut self.rings[ring].waiting)
    }
    /// It was quiet and is released.
    pub(crate) fn release(&mut self, gone: &Gone) {
        for (ring, slot) in &gone.slots {
            assert_eq!(self.rings[*ring].slots[*slot], Slot::Leaving);
            self.rings[*ring].slots[*slot] = Slot::Free;
        }
    }

    // What DMA does.

    pub(crate) fn byte(&mut self, place: Place) -> &mut u8 {
        match place {
            Place::Memory(gpa) => {
                let buffer = self.buffers.iter_mut().find(|buffer| buffer.holds(gpa));
                let buffer = buffer.expect("what is open or may be cached is somebody's memory");
                &mut buffer.bytes[(gpa - buffer.base) as usize]
            }
            Place::Shadow(shadow, at) => &mut self.shadows[shadow].bytes[at as usize],
        }
    }
    pub(crate) fn bytes(&mut self, place: Place, count: u64) -> Vec<u8> {
        (0..count).map(|n| *self.byte(place.at(n))).collect()
    }
    pub(crate) fn fill(&mut self, place: Place, count: u64, fill: u8) {
        (0..count).for_each(|n| *self.byte(place.at(n)) = fill);
    }
    /// What becomes of an access that lies in one page.
    pub(crate) fn outcome(&self, device: usize, first: u64, size_bytes: u64, access: Access) -> Outcome {
        assert!(is_unit(access), "atomics are not driven here");
        let here = self.window(first);
        let refused = match here.map(|window| window.refuses(first, size_bytes, access)) {
            Some(None) => return Outcome::Moves(here.expect("just found").place(first)),
            Some(Some(refused)) => refused,
            None => self.nothing_at(first),
        };
        let is_cached = |window: &&Window| {
            window.holds(first)
                && window.refuses(first, size_bytes, access).is_none()
                && if self.is_ring() { window.cached_by[device] } else { window.cached_by != [false; 2] }
        };
        Outcome::Refused(refused, self.stale.iter().find(is_cached).map(|window| window.place(first)))
    }
    fn nothing_at(&self, address: u64) -> Refused {
        if !self.is_ring() {
            let is_beyond = address >> self.options.width_bits != 0;
            return if is_beyond { Refused::BeyondWidth } else { Refused::Absent };
        }
        let (ring, slot) = self.slot_at(address);
        match self.rings.get(ring) {
            None => Refused::BeyondRings,
            Some(ring) if slot >= ring.slots.len() => Refused::BeyondRing,
            Some(_) => Refused::Absent,
        }
    }
    /// A device got through at an address; whether that was by a stale slot of which there are too many.
    pub(crate) fn passed(&mut self, device: usize, address: u64, was_stale: bool) -> bool {
        if !self.is_ring() {
            self.windows
                .iter_mut()
                .filter(|window| window.holds(address))
                .for_each(|window| window.cached_by[device] = true);
            return false;
        }
        let (ring, slot) = self.slot_at(address);
        // The slot itself, and the one after it, which is prefetched.
        let next = (slot + 1) % self.rings[ring].slots.len();
        let bases = [slot, next].map(|slot| ring as u64 * RING_BYTES + slot as u64 * SLOT_BYTES);
        self.windows
            .iter_mut()
            .filter(|window| bases.contains(&window.base))
            .for_each(|window| window.cached_by[device] = true);
        let served = &mut self.rings[ring].served;
        if !was_stale {
            served.retain(|(by, _)| *by != device);
        } else if !served.contains(&(device, bases[0])) {
            served.push((device, bases[0]));
        }
        served.iter().filter(|(by, _)| *by == device).count() > 2
    }
    /// The reason that a refusal is given.
    pub(crate) fn reason(&self, refused: Refused, is_write: bool) -> FaultReason {
        match (refused, self.is_ring(), is_write) {
            (Refused::BeyondWidth, ..) => FaultReason::ADDRESS_BEYOND_WIDTH,
            (Refused::BeyondRings, ..) => FaultReason::RING_BEYOND_DEVICE,
            (Refused::BeyondRing, ..) => FaultReason::RING_BEYOND_SIZE,
            (Refused::Absent, true, _) => FaultReason::RING_SLOT_INVALID,
            (Refused::Bytes, true, _) => FaultReason::RING_BEYOND_SLOT,
            (Refused::Bytes, false, _) => FaultReason::BYTES_DENIED,
            (Refused::Permission, true, true) => FaultReason::RING_WRITE_DENIED,
            (Refused::Permission, true, false) => FaultReason::RING_READ_DENIED,
            (_, false, true) => FaultReason::WRITE_DENIED,
            (_, false, false) => FaultReason::READ_DENIED,
        }
    }
    /// An address that is said to be one of a shadow, for looking whether it still is: may it be written?
    pub(crate) fn first_byte(&self, shadow: usize) -> (u64, bool, u8) {
        let Shadow { first, permissions, bytes, .. } = &self.shadows[shadow];
        (first * PAGE, *permissions == FROM.permissions(), bytes[0])
    }
}
