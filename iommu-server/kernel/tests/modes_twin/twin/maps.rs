//! What maps and unmaps do: when they are refused, what they open and close, what is copied.

use iommu_kernel::{DmaFunction, DmaMap};
use iommu_types::{MappingGranularity, Permissions, Protection};

use super::super::fixture::PAGE;
use super::*;

impl Twin {
    /// Why a buffer cannot be mapped, as far as it does not depend on where it goes.
    pub(crate) fn refuses_early(&self, request: &DmaMap) -> Option<Why> {
        let (base, size_bytes) = (request.range.base().get(), request.range.size_bytes());
        if size_bytes > self.limits.segment_bytes_max && request.function != DmaFunction::Coherent {
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
    pub(super) fn window(&self, address: u64) -> Option<&Window> {
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
}
