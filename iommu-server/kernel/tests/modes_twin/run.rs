//! A domain with two devices and its twin, in step.

use std::sync::Arc;

use iommu_hardware::dma::{Run as DmaRun, Transfer};
use iommu_hardware::vtd::Port;
use iommu_kernel::{DmaFunction, DmaMap, DmaUnmap, MappingKind, Moment, OwnerLimits, PendingUnmap, Tick};
use iommu_types::errors::{DmaMapError, FreeError};
use iommu_types::{
    Access, DeviceAddress, Direction, DmaAttributes, DmaLimits, DomainOptions, Gpa, GpaRange, Iova,
    Protection, ReportClass, RequestId, SanitizerReport, SeenAccess, SourceId,
};
use proptest::prelude::*;
use proptest::sample::Index;

use super::fixture::{Held, LIMITS, PAGE, Tenant, gpa_range, held, iova_range, kernel_with};
use super::judge::{Judge, Said};
use super::steps::{Dma, Manner, Part, Step, Target};
use super::twin::{Buffer, Gone, Group, Mapping, Outcome, Twin, Why, pages, taken};

pub(crate) type Checked<T = ()> = Result<T, TestCaseError>;

/// So few that maps are refused for it.
const FEW_MAPPINGS: u64 = 12;
const BUFFERS_MAX: usize = 5;

pub(crate) struct Run {
    pub(crate) tenant: Tenant,
    second: (SourceId, Port),
    before: Held,
    pub(crate) twin: Twin,
    pub(crate) judge: Judge,
    /// As the twin's.
    pub(crate) pending: Vec<Vec<PendingUnmap>>,
    pub(crate) now: Tick,
    requests: u64,
    /// What the step should have been reported for.
    pub(crate) said: Vec<Said>,
    begun: u64,
    last_end: [u64; 2],
}

fn why(error: &DmaMapError) -> Option<Why> {
    Some(match error {
        DmaMapError::InvalidField(_) => Why::Field,
        DmaMapError::SegmentOverLimit(_) => Why::Segment,
        DmaMapError::NotOwned(_) => Why::NotOwned,
        DmaMapError::BeyondMask(_) => Why::Mask,
        DmaMapError::RingOverflow(_) => Why::Overflow,
        DmaMapError::IovaExhausted(_) => Why::Exhausted,
        DmaMapError::NotContiguous(_) => Why::NotContiguous,
        DmaMapError::LimitReached(limit) => match limit.limit.as_str() {
            "persistent_pages" => Why::Quota,
            "bounce_bytes" => Why::Pool,
            _ => Why::Mappings,
        },
        _ => return None,
    })
}

pub(crate) fn kind(request: &DmaMap) -> MappingKind {
    request.function.into()
}

impl Run {
    pub(crate) fn new(options: DomainOptions, has_few_mappings: bool) -> Self {
        let is_passthrough = options.protection == Protection::Passthrough;
        let mappings = if has_few_mappings && !is_passthrough { FEW_MAPPINGS } else { LIMITS.mappings };
        let kernel = kernel_with(8 << 20, OwnerLimits { mappings, ..LIMITS });
        // Tables of contexts and of ring devices are made once and stay.
        Tenant::with(&kernel, 1, options).leave();
        let account = kernel.account(iommu_types::Owner::Driver(1));
        let before = held(&kernel, &account);
        let mut tenant = Tenant::with(&kernel, 1, options);
        let source = SourceId::at(1, 1, 0).expect("source");
        kernel.attach(source, &mut tenant.domain).expect("attach");
        let port = kernel.unit().port(source).expect("port");
        let mut run = Self {
            tenant,
            second: (source, port),
            before,
            twin: Twin::new(options, mappings),
            judge: Judge::default(),
            pending: Vec::new(),
            now: Tick(1 << 20),
            requests: 0,
            said: Vec::new(),
            begun: 0,
            last_end: [0; 2],
        };
        run.allocate(3);
        run.allocate(2);
        if run.twin.is_bounce() {
            // One shadow of it is all that the pool may have.
            run.allocate(130);
        }
        run
    }
    pub(crate) fn next_request(&mut self) -> RequestId {
        self.requests += 1;
        RequestId(self.requests)
    }
    pub(crate) fn order(&self) -> u64 {
        self.tenant.domain.sanitizer().expect("it has one").clock().now()
    }
    pub(crate) fn finish(&mut self, pending: Vec<PendingUnmap>, gone: &Gone) {
        for pending in pending {
            self.tenant.finish(pending);
        }
        self.twin.release(gone);
    }
    pub(crate) fn keep(&mut self, pending: Vec<PendingUnmap>, gone: Gone) {
        self.pending.push(pending);
        self.twin.pending.push(gone);
    }

    pub(crate) fn step(&mut self, step: Step) -> Checked {
        self.now = Tick(self.now.0 + 3);
        match step {
            Step::Map { part, direction, manner, ring, client } => {
                let request = self.request(&part, direction, manner, ring, client);
                self.map(request)
            }
            Step::MapSg { parts, direction, skips_sync, ring, client } => {
                let manner = if skips_sync { Manner::SkipCpuSync } else { Manner::Single };
                let requests = parts.iter().map(|part| {
                    let request = self.request(part, direction, manner, ring, client);
                    DmaMap { function: DmaFunction::ScatterGather, ..request }
                });
                let requests: Vec<DmaMap> = requests.collect();
                self.map_sg(requests)
            }
            Step::Unmap(unmap) => self.unmap(&unmap),
            Step::UnmapBatch(unmaps) => self.unmap_batch(&unmaps),
            Step::UnmapSg(unmap) => self.unmap_sg(&unmap),
            Step::Sync { which, offset, size_bytes, target, wrong } => {
                self.sync(which, offset, size_bytes, target, wrong)
            }
            Step::Limits { mask_bits, segment_bytes_max, boundary_pages } => {
                self.set_limits(mask_bits, segment_bytes_max, boundary_pages)
            }
            Step::Pass { ms } => {
                self.now = self.now.after_ms(u32::try_from(ms).expect("few"));
                if self.tenant.domain.flush_at().is_some_and(|at| at <= self.now) {
                    let pending = self.tenant.domain.flush(&self.tenant.kernel);
                    let gone = self.twin.flush();
                    self.keep(vec![pending], gone);
                }
                Ok(())
            }
            Step::Reclaim => {
                let (pending, gone) = self.reclaim();
                self.keep(vec![pending], gone);
                Ok(())
            }
            Step::Finish { which } => {
                if !self.pending.is_empty() {
                    let at = which.index(self.pending.len());
                    let (pending, gone) = (self.pending.swap_remove(at), self.twin.pending.swap_remove(at));
                    self.finish(pending, &gone);
                }
                Ok(())
            }
            Step::Allocate { pages } => {
                if self.twin.buffers.len() < BUFFERS_MAX {
                    self.allocate(pages);
                }
                Ok(())
            }
            Step::Free { which, lets_go } => self.free(which, lets_go),
            Step::Begin => {
                self.begun = self.order();
                Ok(())
            }
            Step::Attack { which, device, fill, ends_burst } => self.attack(which, device, fill, ends_burst),
            Step::Dma(dma) => self.dma(&dma),
            Step::Cpu { which, offset, size_bytes, fill } => {
                self.cpu_writes(which, offset, size_bytes, fill);
                Ok(())
            }
        }
    }

    // Memory.

    fn allocate(&mut self, pages: u64) {
        let range = self.tenant.buffer(pages);
        let (base, bytes) = (range.base().get(), vec![0; (pages * PAGE) as usize]);
        self.twin.buffers.push(Buffer { base, bytes, is_open: false });
        if self.tenant.domain.is_passthrough() {
            self.tenant.domain.open_direct(&self.tenant.kernel, &self.tenant.memory, range).expect("room");
            self.twin.open_direct(self.twin.buffers.len() - 1);
        }
    }
    /// As the service frees memory: it lets the domain go first. Or it forgets to.
    fn free(&mut self, which: Index, lets_go: bool) -> Checked {
        if self.twin.buffers.is_empty() {
            return Ok(());
        }
        let at = which.index(self.twin.buffers.len());
        let (base, last) = (self.twin.buffers[at].base, self.twin.buffers[at].bytes.len() as u64 - 1);
        let buffer = gpa_range(Gpa::new(base), 0, last + 1);
        let kernel = Arc::clone(&self.tenant.kernel);
        let is_passthrough = self.tenant.domain.is_passthrough();
        let is_used = self.twin.is_buffer_used(at);
        if is_passthrough {
            prop_assert_eq!(self.tenant.domain.uses(&kernel, buffer), is_used);
        }
        if lets_go && !(is_passthrough && is_used) {
            let pending = self.tenant.domain.let_go(&kernel, buffer);
            let gone = self.let_go(at);
            self.finish(vec![pending], &gone);
        }
        let is_pinned = self.twin.is_buffer_pinned(at);
        match self.tenant.memory.free(&kernel, buffer.base()) {
            Ok(freed) => {
                prop_assert!(!is_pinned, "I9: {} was freed and is pinned", freed);
                self.twin.buffers.remove(at);
            }
            Err(error) => {
                prop_assert!(is_pinned && matches!(error, FreeError::StillMapped(_)), "{}", error);
                let request = self.next_request();
                let is_mine = self.tenant.domain.released_while_mapped(buffer, self.now, request);
                let said = self.judge.released(base, base + last);
                prop_assert_eq!(is_mine, said.is_some());
                self.said.extend(said);
            }
        }
        Ok(())
    }
    fn let_go(&mut self, at: usize) -> Gone {
        match self.twin.options.protection {
            Protection::Passthrough => self.twin.close_direct(at),
            Protection::Persistent(_) => {
                let idle: Vec<u64> = self.twin.idle.clone();
                let inside = |page: &u64| self.twin.buffers[at].holds(page * PAGE);
                let inside: Vec<u64> = idle.into_iter().filter(inside).collect();
                self.twin.close_pages(&inside)
            }
            Protection::Strict | Protection::Shared | Protection::Bounce(_) => Gone::default(),
            Protection::Deferred(_) | Protection::Ring(_) => self.flush_twin(),
        }
    }
    fn flush_twin(&mut self) -> Gone {
        let mut gone = self.twin.flush();
        for ring in 0..self.twin.rings.len() {
            gone.append(self.twin.end_burst(ring));
        }
        gone
    }
    fn reclaim(&mut self) -> (PendingUnmap, Gone) {
        let pending = self.tenant.domain.reclaim(&self.tenant.kernel);
        let gone = match self.twin.options.protection {
            Protection::Persistent(_) => {
                let idle = self.twin.idle.clone();
                self.twin.close_pages(&idle)
            }
            Protection::Bounce(_) => {
                let mut gone = Gone::default();
                for shadow in 0..self.twin.shadows.len() {
                    if !self.twin.shadows[shadow].is_used && !self.twin.shadows[shadow].is_gone {
                        gone.append(self.twin.drop_shadow(shadow));
                    }
                }
                gone
            }
            _ => self.flush_twin(),
        };
        (pending, gone)
    }
    fn cpu_writes(&mut self, which: Index, offset: u64, size_bytes: usize, fill: u8) {
        if self.twin.buffers.is_empty() {
            return;
        }
        let at = which.index(self.twin.buffers.len());
        let buffer = &mut self.twin.buffers[at];
        let from = offset as usize % buffer.bytes.len();
        let to = buffer.bytes.len().min(from + size_bytes);
        buffer.bytes[from..to].fill(fill);
        let gpa = Gpa::new(buffer.base + from as u64);
        let bytes = buffer.bytes[from..to].to_vec();
        self.tenant.cpu_writes(gpa, &bytes);
    }

    // Maps.

    fn request(
        &mut self,
        part: &Part,
        direction: Direction,
        manner: Manner,
        ring: u16,
        client: u8,
    ) -> DmaMap {
        let request_id = self.next_request();
        let range = if self.twin.buffers.is_empty() {
            gpa_range(Gpa::new(PAGE), 0, PAGE)
        } else {
            let buffer = &self.twin.buffers[part.buffer.index(self.twin.buffers.len())];
            let all = buffer.bytes.len() as u64;
            let offset = part.offset % all;
            // One in seven may run over the end.
            let keeps_inside = part.size_bytes == u64::MAX || !part.size_bytes.is_multiple_of(7);
            let size = if keeps_inside { part.size_bytes.min(all - offset) } else { part.size_bytes };
            gpa_range(Gpa::new(buffer.base), offset, size)
        };
        let single = DmaMap { ring, client, ..DmaMap::single(range, direction, request_id) };
        let attributes = DmaAttributes::default();
        match manner {
            Manner::Single => single,
            Manner::SkipCpuSync => {
                DmaMap { attributes: DmaAttributes { skip_cpu_sync: true, ..attributes }, ..single }
            }
            Manner::Resource => {
                DmaMap { attributes: DmaAttributes { resource: true, ..attributes }, ..single }
            }
            Manner::Coherent => DmaMap { ring, client, ..DmaMap::coherent(range, request_id) },
        }
    }
    fn map(&mut self, request: DmaMap) -> Checked {
        let whys = self.twin.refuses(&request);
        let evicted = self.twin.evicted_by(&request);
        let evictions = self.tenant.domain.counters().evictions;
        let result = self.tenant.domain.dma_map(&self.tenant.kernel, &self.tenant.memory, request, self.now);
        let evictions = self.tenant.domain.counters().evictions - evictions;
        let pending = self.tenant.domain.take_evicted();
        match result {
            Err(error) => {
                let may = self.may_be_refused(&[request]);
                let why = why(&error).filter(|why| whys.contains(why) || may.contains(why));
                prop_assert!(
                    why.is_some(),
                    "{:?} is refused for {:?} and not for {:?}",
                    request,
                    error,
                    whys
                );
                let has_evicted = evictions > 0;
                prop_assert!(!has_evicted || evictions == evicted.len() as u64);
                let gone = if has_evicted { self.twin.close_pages(&evicted) } else { Gone::default() };
                self.refused(why, pending, gone)
            }
            Ok(iova) => {
                prop_assert_eq!(&whys, &[], "{:?} was mapped", request);
                prop_assert_eq!(evictions, evicted.len() as u64);
                let mut gone = self.twin.close_pages(&evicted);
                gone.append(self.look_for_shadows(!pending.is_empty())?);
                let block =
                    self.twin.allocates(&request).then(|| pages(iova.get(), request.range.size_bytes()));
                let block = block.map(|pages| (*pages.start(), taken(pages.end() - pages.start() + 1)));
                self.check_block(block)?;
                let mapping = self.mapped(request, iova.get(), block)?;
                self.twin.live.push(mapping);
                self.keep(pending, gone);
                let (at, memory) =
                    ((iova.get(), mapping.size_bytes()), vec![(mapping.gpa(), mapping.size_bytes())]);
                let birth = (self.now.0, request.request_id);
                let twice = self.judge.mapped(at, memory, request.direction, kind(&request), birth);
                self.said.extend(twice.map(|class| (class, None)));
                Ok(())
            }
        }
    }
    /// Reasons that depend on what the twin does not foresee.
    fn may_be_refused(&self, requests: &[DmaMap]) -> Vec<Why> {
        let mut may = Vec::new();
        let most = requests.iter().map(|request| request.range.pages_touched()).sum::<u64>().max(1);
        if let [request] = requests
            && !self.twin.has_room_for(most)
            && (self.twin.allocates(request) || self.twin.bounces(request))
        {
            may.push(Why::Exhausted);
        }
        if self.twin.is_bounce() && self.twin.charged().0 + 2 * requests.len() as u64 > self.twin.mappings_max
        {
            may.push(Why::Mappings);
        }
        if self.twin.is_ring() && most > 1 {
            may.push(Why::NotContiguous);
        }
        may
    }
    /// Settles a map that failed. In a bounce domain it may have left shadows that nobody knows of: the service reclaims them.
    fn refused(&mut self, why: Option<Why>, pending: Vec<PendingUnmap>, gone: Gone) -> Checked {
        self.finish(pending, &gone);
        if self.twin.is_bounce() && !matches!(why, Some(Why::NotOwned | Why::Field)) {
            let (pending, gone) = self.reclaim();
            self.finish(vec![pending], &gone);
        }
        if why == Some(Why::Segment) {
            self.said.push((ReportClass::SegmentOverLimit, None));
        }
        Ok(())
    }
    /// I9: addresses that are handed out are free, aligned and within the limit of the device.
    fn check_block(&self, block: Option<(u64, u64)>) -> Checked {
        if let Some((first, size)) = block {
            prop_assert!(!self.twin.is_taken((first, size)), "I9: addresses are used again: {first:#x}");
            prop_assert!(first > 0 && first.is_multiple_of(size.min(512)));
            prop_assert!(first + size - 1 <= self.twin.limits.last_address() / PAGE);
        }
        Ok(())
    }
    /// One buffer was mapped at an address.
    fn mapped(&mut self, request: DmaMap, iova: u64, block: Option<(u64, u64)>) -> Checked<Mapping> {
        match self.twin.address_of(&request) {
            Some(expected) => prop_assert_eq!(iova, expected),
            None => prop_assert_eq!(iova % PAGE, request.range.base().page_offset()),
        }
        let mut mapping = Mapping { iova, request, block, shadow: None };
        if self.twin.bounces(&request) {
            let first = iova / PAGE;
            let idle = self.twin.idle_shadows(&request);
            let known = idle.iter().copied().find(|at| self.twin.shadows[*at].first == first);
            prop_assert!(known.is_some() || idle.is_empty(), "a shadow is made where one is idle");
            let size = taken(request.range.pages_touched());
            mapping.shadow = Some(match known {
                Some(known) => known,
                None => {
                    self.check_block(Some((first, size)))?;
                    self.twin.make_shadow(first, size, request.direction.permissions())
                }
            });
        }
        self.twin.open(&mapping);
        Ok(mapping)
    }
    /// Which idle shadows are gone, by trying.
    fn look_for_shadows(&mut self, is_some_gone: bool) -> Checked<Gone> {
        let mut gone = Gone::default();
        if !self.twin.is_bounce() || !is_some_gone {
            return Ok(gone);
        }
        for shadow in 0..self.twin.shadows.len() {
            if self.twin.shadows[shadow].is_gone {
                continue;
            }
            let (at, is_written, byte) = self.twin.first_byte(shadow);
            let at = Iova::new(at);
            let is_there = match is_written {
                true => self.tenant.device_writes(at, &[byte]).is_ok(),
                false => self.tenant.device_reads(at, 1).is_ok(),
            };
            if !is_there {
                prop_assert!(!self.twin.shadows[shadow].is_used, "a shadow in use is gone");
                gone.append(self.twin.drop_shadow(shadow));
            }
        }
        Ok(gone)
    }

    // Scatter-gather.

    fn map_sg(&mut self, requests: Vec<DmaMap>) -> Checked {
        let ranges: Vec<GpaRange> = requests.iter().map(|request| request.range).collect();
        let id = self.next_request();
        let template = match requests.first() {
            Some(first) => *first,
            None => DmaMap::single(gpa_range(Gpa::new(PAGE), 0, PAGE), Direction::Bidirectional, id),
        };
        let template = DmaMap { request_id: id, ..template };
        let requests: Vec<DmaMap> =
            requests.into_iter().map(|request| DmaMap { request_id: id, ..request }).collect();
        let evictions = self.tenant.domain.counters().evictions;
        let (kernel, memory) = (&self.tenant.kernel, &self.tenant.memory);
        let result = self.tenant.domain.dma_map_sg(kernel, memory, &ranges, template, self.now);
        let evictions = self.tenant.domain.counters().evictions - evictions;
        let pending = self.tenant.domain.take_evicted();
        match result {
            Err(error) => {
                let Some(why) = why(&error) else {
                    prop_assert!(false, "{:?}", error);
                    return Ok(());
                };
                self.sg_refused(&requests, why, evictions, pending)
            }
            Ok(segments) => {
                let mut segments: Vec<_> = segments
                    .iter()
                    .map(|segment| (segment.iova.get(), segment.size_bytes, Vec::new()))
                    .collect();
                let addresses = self.spread(&requests, &mut segments)?;
                let block = self.block_of(&requests, &addresses);
                self.check_block(block)?;
                self.twin.groups.push(Group { iova: addresses[0], elements: Vec::new(), segments });
                let mut gone = self.look_for_shadows(!pending.is_empty())?;
                let mut evicted = 0;
                for (n, (request, iova)) in std::iter::zip(&requests, &addresses).enumerate() {
                    prop_assert_eq!(self.sg_refuses(request), vec![], "{:?} was mapped", request);
                    let pages = self.twin.evicted_by(request);
                    evicted += pages.len() as u64;
                    gone.append(self.twin.close_pages(&pages));
                    let mapping = self.mapped(*request, *iova, block.filter(|_| n == 0))?;
                    self.twin.groups.last_mut().expect("just pushed").elements.push(mapping);
                }
                prop_assert_eq!(evictions, evicted);
                self.keep(pending, gone);
                for (iova, size, memory) in self.twin.groups.last().expect("just pushed").segments.clone() {
                    let birth = (self.now.0, id);
                    let kind = MappingKind::ScatterGather;
                    let twice = self.judge.mapped((iova, size), memory, template.direction, kind, birth);
                    self.said.extend(twice.map(|class| (class, None)));
                }
                Ok(())
            }
        }
    }
    fn sg_refuses(&self, request: &DmaMap) -> Vec<Why> {
        let mut all = self.twin.refuses(request);
        let boundary = self.twin.limits.segment_boundary_mask;
        let identity = self.twin.options.protection.is_identity();
        // Allocated addresses are aligned, so only the offset counts; in a ring there is none.
        let first = match (identity, self.twin.is_ring()) {
            (true, _) => request.range.base().get(),
            (_, true) => 0,
            _ => request.range.base().page_offset(),
        };
        let last = first + (request.range.size_bytes() - 1);
        if first & !boundary != last & !boundary {
            all.push(Why::Segment);
        }
        all
    }
    /// The address of each element, in segments that keep the limits; the memory of each segment is noted in it.
    fn spread(&self, requests: &[DmaMap], segments: &mut [(u64, u64, Vec<(u64, u64)>)]) -> Checked<Vec<u64>> {
        let mut elements = requests.iter();
        let mut addresses = Vec::new();
        for (iova, size_bytes, memory) in segments {
            let mut done = 0;
            while done < *size_bytes {
                let element = elements.next();
                prop_assert!(element.is_some(), "segments are longer than the elements");
                let range = element.expect("just seen").range;
                addresses.push(*iova + done);
                memory.push((range.base().get(), range.size_bytes()));
                done += range.size_bytes();
            }
            prop_assert_eq!(done, *size_bytes, "a segment ends inside an element");
            let boundary = !self.twin.limits.segment_boundary_mask;
            prop_assert!(*size_bytes <= self.twin.limits.segment_bytes_max);
            prop_assert_eq!(*iova & boundary, (*iova + (*size_bytes - 1)) & boundary);
        }
        prop_assert!(elements.next().is_none(), "an element has no segment");
        Ok(addresses)
    }
    fn block_of(&self, requests: &[DmaMap], addresses: &[u64]) -> Option<(u64, u64)> {
        if !matches!(self.twin.options.protection, Protection::Strict | Protection::Deferred(_)) {
            return None;
        }
        let (last, address) = (requests.last()?, addresses.last()?);
        let first = addresses[0] / PAGE;
        Some((first, taken((address + (last.range.size_bytes() - 1)) / PAGE - first + 1)))
    }
    /// A map of many buffers failed: one of them is to blame, and those before it were taken back.
    fn sg_refused(
        &mut self,
        requests: &[DmaMap],
        why: Why,
        evictions: u64,
        pending: Vec<PendingUnmap>,
    ) -> Checked {
        let early: Vec<Why> =
            requests.iter().filter_map(|request| self.twin.refuses_early(request)).collect();
        if requests.is_empty() || !early.is_empty() {
            prop_assert!(
                early.contains(&why) || (requests.is_empty() && why == Why::Field),
                "{:?} {:?}",
                why,
                early
            );
            prop_assert_eq!(evictions, 0);
            return self.refused(Some(why), pending, Gone::default());
        }
        let mut may = self.may_be_refused(requests);
        let is_allocated = !self.twin.options.protection.is_identity() && !self.twin.is_ring();
        if is_allocated {
            // Their order among the refusals is not looked at: nothing of them stays.
            may.extend(requests.iter().flat_map(|request| self.sg_refuses(request)));
            if self.twin.charged().0 + requests.len() as u64 > self.twin.mappings_max {
                may.push(Why::Mappings);
            }
            if self.twin.is_bounce() {
                may.push(Why::Pool);
            }
            if self.twin.limits.mask_bits < 20 {
                may.push(Why::Exhausted);
            }
            prop_assert!(may.contains(&why), "{:?} is refused for {:?}", requests, why);
            return self.refused(Some(why), pending, Gone::default());
        }
        let saved = self.twin.is_ring().then(|| self.twin.clone());
        let gone = self.take_back(requests, why, &may, evictions)?;
        if let Some(saved) = saved {
            // Slots are free again, and the tail is where it was; but the burst has ended.
            let touched = gone.is_some();
            self.twin = saved;
            let ring = usize::from(requests[0].ring);
            if touched {
                let gone = self.twin.end_burst(ring);
                return self.refused(Some(why), pending, gone);
            }
            return self.refused(Some(why), pending, Gone::default());
        }
        self.refused(Some(why), pending, gone.unwrap_or_default())
    }
    /// Maps the elements before the one that is refused, and unmaps them. What went, if any was mapped.
    fn take_back(
        &mut self,
        requests: &[DmaMap],
        why: Why,
        may: &[Why],
        evictions: u64,
    ) -> Checked<Option<Gone>> {
        let iova = 0;
        self.twin.groups.push(Group { iova, elements: Vec::new(), segments: Vec::new() });
        let mut gone = Gone::default();
        let mut evicted = 0;
        let mut blamed = None;
        for request in requests {
            let whys = self.sg_refuses(request);
            if whys.iter().any(|why| *why != Why::Segment) {
                blamed = Some(whys);
                break;
            }
            let pages = self.twin.evicted_by(request);
            evicted += pages.len() as u64;
            gone.append(self.twin.close_pages(&pages));
            let address = self.twin.address_of(request).expect("it has no choice");
            let mapping = Mapping { iova: address, request: *request, block: None, shadow: None };
            self.twin.open(&mapping);
            self.twin.groups.last_mut().expect("just pushed").elements.push(mapping);
            if !whys.is_empty() {
                blamed = Some(whys);
                break;
            }
        }
        let group = self.twin.groups.pop().expect("just pushed");
        let is_right = blamed.as_ref().is_some_and(|whys| whys.contains(&why)) || may.contains(&why);
        prop_assert!(is_right, "{:?} is refused for {:?} and not for {:?}", requests, why, blamed);
        if let Some(request) = requests.get(group.elements.len()).filter(|_| evictions > evicted) {
            // The one that was refused had evicted for itself already.
            let pages = self.twin.evicted_by(request);
            evicted += pages.len() as u64;
            gone.append(self.twin.close_pages(&pages));
        }
        prop_assert_eq!(evictions, evicted);
        for mapping in &group.elements {
            gone.append(self.twin.close(mapping, false, false));
        }
        Ok((!group.elements.is_empty()).then_some(gone))
    }
    fn set_limits(&mut self, mask_bits: u8, segment_bytes_max: u64, boundary_pages: u64) -> Checked {
        let segment_boundary_mask = match boundary_pages {
            0 => u64::MAX,
            pages => pages * PAGE - 1,
        };
        let limits = DmaLimits { mask_bits, segment_bytes_max, segment_boundary_mask };
        let is_sound = segment_bytes_max > 0 && !(self.twin.is_ring() && mask_bits < 64);
        let result = self.tenant.domain.set_limits(limits);
        prop_assert_eq!(result.is_ok(), is_sound, "{:?}: {:?}", limits, result);
        if is_sound {
            self.twin.limits = limits;
        }
        prop_assert_eq!(self.tenant.domain.limits(), self.twin.limits);
        Ok(())
    }

    // DMA.

    fn target(&self, device: usize, target: &Target) -> u64 {
        let beside = |bases: Vec<u64>, which: &Index, skew: i64| {
            let base = if bases.is_empty() { PAGE } else { *which.get(&bases) };
            base.saturating_add_signed(skew)
        };
        match target {
            Target::Live(which, skew) => {
                beside(self.twin.mappings().map(|mapping| mapping.iova).collect(), which, *skew)
            }
            Target::Gone(which, skew) => {
                beside(self.judge.dead().map(|known| known.life.iova.get()).collect(), which, *skew)
            }
            Target::Onward => self.last_end[device],
            Target::Memory(which, offset) => {
                let bases = self.twin.buffers.iter().map(|buffer| buffer.base).collect();
                beside(bases, which, offset.cast_signed())
            }
            Target::Anywhere(address) => *address,
        }
    }
    fn attack(&mut self, which: Index, device: usize, fill: u8, ends_burst: bool) -> Checked {
        if self.twin.live.is_empty() {
            return Ok(());
        }
        let mapping = *which.get(&self.twin.live);
        let is_write = mapping.request.direction != Direction::ToDevice;
        let size_bytes = mapping.size_bytes().min(16) as usize;
        let target = Target::Anywhere(mapping.iova);
        let dma = Dma { device, target, size_bytes, is_write, fill, began_before: false };
        self.dma(&dma)?;
        let range = iova_range(Iova::new(mapping.iova), mapping.size_bytes());
        let request_id = self.next_request();
        let unmap = DmaUnmap::single(range, mapping.request.direction, request_id);
        let function = mapping.request.function;
        self.unmap_as(DmaUnmap { function, end_of_burst: ends_burst, ..unmap })?;
        self.check()?;
        self.dma(&Dma { fill: fill ^ 0xff, ..dma })
    }
    fn dma(&mut self, dma: &Dma) -> Checked {
        let device = dma.device;
        let first = self.target(device, &dma.target);
        // An access that would wrap is no access.
        let size = (u64::MAX - first).saturating_add(1).min(dma.size_bytes as u64);
        let begun = if dma.began_before { self.begun } else { self.order() };
        let port = if device == 0 { &mut self.tenant.port } else { &mut self.second.1 };
        let mut bytes = vec![dma.fill; size as usize];
        let transfer = if dma.is_write { Transfer::Write(&bytes) } else { Transfer::Read(&mut bytes) };
        let result = DmaRun::new(port).execute(Iova::new(first), None, transfer);
        let done = result.as_ref().err().map_or(size, |fault| u64::from(fault.done_bytes));
        let reason = result.as_ref().err().map(|fault| fault.reason.expect("refused by translation"));
        let at_fault = result.as_ref().err().map(|fault| fault.iova.get());
        self.follow(dma, first, size, done, &bytes, reason.zip(at_fault))?;
        let access = if dma.is_write { Access::Write } else { Access::Read };
        let seen = SeenAccess {
            iova: Iova::new(first),
            size_bytes: size as u32,
            done_bytes: done as u32,
            access,
            refused: reason,
        };
        let source = if device == 0 { self.tenant.source } else { self.second.0 };
        let address = DeviceAddress { segment: 0, source_id: source };
        let moment = Moment { at_us: self.now.0, order: begun };
        let read = (!dma.is_write && reason.is_none()).then_some(bytes.as_slice());
        let sanitizer = self.tenant.domain.sanitizer().expect("it has one");
        sanitizer.with(|sanitizer| sanitizer.dma(moment, self.now.0, address, seen, read));
        self.said.extend(self.judge.dma(device, begun, first, size as usize, access));
        self.last_end[device] = first.saturating_add(size);
        let reports = self.check_reports()?;
        for report in reports {
            prop_assert_eq!((report.device, report.access), (Some(address), Some(seen)));
            let death = report.mapping.and_then(|life| life.death);
            let age = death
                .filter(|_| report.class == ReportClass::UseAfterUnmap)
                .map(|death| self.now.0 - death.0);
            prop_assert_eq!(report.age_us, age);
        }
        Ok(())
    }
    /// Goes through a DMA page by page, as the unit did, and sees whether each piece ended as it may.
    fn follow(
        &mut self,
        dma: &Dma,
        first: u64,
        size: u64,
        done: u64,
        bytes: &[u8],
        refused: Option<(iommu_types::FaultReason, u64)>,
    ) -> Checked {
        let access = if dma.is_write { Access::Write } else { Access::Read };
        let mut at = 0;
        while at < size {
            let address = first + at;
            let piece = (PAGE - address % PAGE).min(size - at);
            let outcome = self.twin.outcome(dma.device, address, piece, access);
            let (place, was_stale) = match outcome {
                Outcome::Moves(place) => (place, false),
                Outcome::Refused(_, Some(place)) if done > at => (place, true),
                Outcome::Refused(why, _) => {
                    let expected = Some((self.twin.reason(why, dma.is_write), address));
                    prop_assert_eq!((done, refused), (at, expected), "{:?} at {:#x}", dma, address);
                    return Ok(());
                }
            };
            prop_assert!(done >= at + piece, "{:?} at {:#x} is refused for {:?}", dma, address, refused);
            if dma.is_write {
                self.twin.fill(place, piece, dma.fill);
            } else {
                let expected = self.twin.bytes(place, piece);
                prop_assert!(
                    bytes[at as usize..][..piece as usize] == expected,
                    "{:?} read something else",
                    dma
                );
            }
            let too_many = self.twin.passed(dma.device, address, was_stale);
            prop_assert!(!too_many, "more than two stale slots of a ring are served");
            at += piece;
        }
        prop_assert_eq!((done, refused), (size, None));
        Ok(())
    }

    // Comparing.

    /// No false report, and none missed.
    fn check_reports(&mut self) -> Checked<Vec<SanitizerReport>> {
        let reports = self.tenant.domain.sanitizer().expect("it has one").drain_reports();
        let each = reports.iter().flat_map(|report| vec![report; report.repeats as usize + 1]);
        let told: Vec<Said> = each.map(|report| (report.class, report.mapping)).collect();
        let said = std::mem::take(&mut self.said);
        let said = said.into_iter().enumerate().map(|(n, (class, mapping))| match class {
            // Which of several it overlaps is of no account.
            ReportClass::Overlap => (class, told.get(n).and_then(|told| told.1)),
            _ => (class, mapping),
        });
        prop_assert_eq!(&told, &said.collect::<Vec<_>>());
        Ok(reports)
    }
    pub(crate) fn check(&mut self) -> Checked {
        self.check_reports()?;
        let sanitizer = self.tenant.domain.sanitizer().expect("it has one");
        prop_assert_eq!(sanitizer.with(|sanitizer| sanitizer.live_mappings()), self.judge.live().count());
        for buffer in &self.twin.buffers {
            let found = self.tenant.cpu_reads(Gpa::new(buffer.base), buffer.bytes.len());
            prop_assert!(found == buffer.bytes, "memory at {:#x} is not what it should be", buffer.base);
        }
        prop_assert_eq!(self.listed(), self.expected_list(self.twin.mappings()));
        let (counters, account) = (self.tenant.domain.counters(), &self.tenant.account);
        prop_assert_eq!((counters.mappings, counters.mapped_bytes), self.twin.counted());
        prop_assert_eq!((account.mappings(), account.mapped_bytes()), self.twin.charged());
        prop_assert_eq!(counters.idle_pages, self.twin.idle.len() as u64);
        prop_assert_eq!(counters.shadow_bytes, self.twin.shadow_bytes());
        self.check_waiting()
    }
    fn check_waiting(&self) -> Checked {
        let waiting = self.tenant.domain.waiting().map(|waiting| (waiting.unmaps, waiting.since.0));
        let in_rings = self.twin.rings.iter().filter(|ring| ring.waiting.mappings > 0);
        let oldest = in_rings.clone().map(|ring| ring.since).min();
        let in_rings = oldest.map(|since| (in_rings.map(|ring| ring.waiting.mappings).sum(), since));
        let in_queue = Some((self.twin.waiting.mappings, self.twin.since)).filter(|(unmaps, _)| *unmaps > 0);
        prop_assert_eq!(waiting, in_queue.or(in_rings));
        if let Protection::Deferred(deferral) = self.twin.options.protection {
            let due = in_queue.map(|(_, since)| Tick(since).after_ms(deferral.interval_ms));
            prop_assert_eq!(self.tenant.domain.flush_at(), due);
        }
        Ok(())
    }
    /// What the domain lists, but for the direct map.
    pub(crate) fn listed(&self) -> Vec<(u64, u64, u64, u8)> {
        let all = self.tenant.domain.mappings(&self.tenant.kernel, Iova::new(0), usize::MAX - 1);
        let is_direct = |id: RequestId| id == RequestId(0);
        let asked = all.iter().filter(|state| !is_direct(state.request_id));
        let fact = |state: &iommu_kernel::MappingState| {
            (state.range.base().get(), state.range.size_bytes(), state.gpa.get(), state.permissions.bits())
        };
        let mut list: Vec<_> = asked.map(fact).collect();
        list.sort_unstable();
        list
    }
    pub(crate) fn expected_list<'m>(
        &self,
        mappings: impl Iterator<Item = &'m Mapping>,
    ) -> Vec<(u64, u64, u64, u8)> {
        let fact = |mapping: &Mapping| {
            let permissions = mapping.request.direction.permissions().bits();
            (mapping.iova, mapping.size_bytes(), mapping.gpa(), permissions)
        };
        let mut list: Vec<_> = mappings.map(fact).collect();
        list.sort_unstable();
        list
    }
    /// What is mapped leaks; then everything goes, and nothing is left.
    pub(crate) fn end(mut self) -> Checked {
        let request = self.next_request();
        self.tenant.domain.leaked(self.now, request);
        self.said.extend(self.judge.leaked());
        self.check_reports()?;
        let kernel = Arc::clone(&self.tenant.kernel);
        let pending = self.tenant.domain.unmap_all(&kernel, self.now);
        self.tenant.finish(pending);
        // Those that were begun before are taken over; finishing them does nothing.
        for pending in std::mem::take(&mut self.pending).into_iter().flatten() {
            self.tenant.finish(pending);
        }
        let account = Arc::clone(&self.tenant.account);
        prop_assert_eq!((account.mappings(), account.mapped_bytes()), (0, 0));
        prop_assert_eq!(self.listed(), vec![]);
        for buffer in &self.twin.buffers {
            let freed = self.tenant.memory.free(&kernel, Gpa::new(buffer.base));
            prop_assert!(freed.is_ok(), "{:?}", freed);
        }
        let Self { mut tenant, second: (source, port), before, .. } = self;
        drop(port);
        let _quiet = kernel.detach(source, &mut tenant.domain).wait_blocking();
        tenant.leave();
        prop_assert_eq!(held(&kernel, &account), before);
        Ok(())
    }
}
