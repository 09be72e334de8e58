//! Maps of one buffer and of many, granted and refused, in step with the twin.

use iommu_kernel::{DmaMap, MappingKind, PendingUnmap};
use iommu_types::errors::DmaMapError;
use iommu_types::{Direction, DmaAttributes, Gpa, GpaRange, Iova, Permissions, Protection, ReportClass};
use proptest::prelude::*;

use super::fixture::{PAGE, gpa_range};
use super::run::{Checked, Run};
use super::steps::{Manner, Part};
use super::twin::{Gone, Group, Mapping, Segment, Why, pages, taken};

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
    pub(crate) fn request(
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
    pub(crate) fn map(&mut self, request: DmaMap) -> Checked {
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
        self.check_shadow(&mapping)?;
        Ok(mapping)
    }
    /// Nothing of an earlier mapping is seen in a shadow, beside this one either. Nobody tells the sanitizer of the look.
    fn check_shadow(&mut self, mapping: &Mapping) -> Checked {
        let is_read = mapping.request.direction.permissions().contains(Permissions::READ);
        if let Some(shadow) = mapping.shadow.filter(|_| is_read) {
            let shadow = &self.twin.shadows[shadow];
            let found = self.tenant.device_reads(Iova::new(shadow.first * PAGE), shadow.bytes.len());
            prop_assert!(
                found.as_ref() == Ok(&shadow.bytes),
                "{:?} is not all that is in its shadow",
                mapping
            );
        }
        Ok(())
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

    pub(crate) fn map_sg(&mut self, requests: Vec<DmaMap>) -> Checked {
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
    fn spread(&self, requests: &[DmaMap], segments: &mut [Segment]) -> Checked<Vec<u64>> {
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
}
