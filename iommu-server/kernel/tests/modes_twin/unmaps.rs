//! Unmaps and syncs, right and wrong, in step with the twin.

use iommu_kernel::{DmaFunction, DmaSync, DmaUnmap, DmaUnmapSg, MappingKind, PendingUnmap};
use iommu_types::errors::{DmaSyncError, DmaUnmapError};
use iommu_types::{Direction, DmaAttributes, Iova, Protection, SyncFor};
use proptest::prelude::*;
use proptest::sample::Index;

use super::fixture::iova_range;
use super::maps::kind;
use super::run::{Checked, Run};
use super::steps::{BOTH, FROM, TO, Unmap, Wrong};
use super::twin::{Gone, Group, Mapping};

fn other(direction: Direction) -> Direction {
    match direction {
        Direction::Bidirectional => TO,
        Direction::ToDevice => FROM,
        Direction::FromDevice => BOTH,
    }
}

/// What an unmap is told that names none of the mappings that begin at its address.
fn is_told(found: &[&Mapping], request: &DmaUnmap, error: &DmaUnmapError) -> bool {
    let wrong_with = |mapping: &&&Mapping| {
        let has_function =
            mapping.request.function == request.function && request.function != DmaFunction::ScatterGather;
        match error {
            DmaUnmapError::WrongFunction(_) => !has_function,
            DmaUnmapError::SizeMismatch(_) => {
                has_function && mapping.size_bytes() != request.range.size_bytes()
            }
            DmaUnmapError::DirectionMismatch(_) => {
                has_function
                    && mapping.size_bytes() == request.range.size_bytes()
                    && mapping.request.direction != request.direction
            }
            _ => false,
        }
    };
    match error {
        DmaUnmapError::NotMapped(_) => found.is_empty(),
        _ => found.iter().any(|mapping| wrong_with(&mapping)),
    }
}

/// What can be synced: a buffer, or a segment.
struct Unit {
    iova: u64,
    size_bytes: u64,
    direction: Direction,
    is_coherent: bool,
    elements: Vec<Mapping>,
}

impl Run {
    fn unmap_request(&mut self, unmap: &Unmap) -> Option<DmaUnmap> {
        let request_id = self.next_request();
        let all: Vec<Mapping> = self.twin.mappings().copied().collect();
        let dead: Vec<_> = self.judge.dead().map(|known| (known.life, known.kind)).collect();
        let function = |kind| match kind {
            MappingKind::Coherent => DmaFunction::Coherent,
            _ => DmaFunction::Single,
        };
        let (iova, size, direction, function) = match unmap.wrong {
            Wrong::Gone if !dead.is_empty() => {
                let (life, kind) = unmap.which.get(&dead);
                (life.iova.get(), life.size_bytes, life.direction, function(*kind))
            }
            _ if all.is_empty() => return None,
            _ => {
                let mapping = unmap.which.get(&all);
                (mapping.iova, mapping.size_bytes(), mapping.request.direction, mapping.request.function)
            }
        };
        let (iova, size, direction, function) = match unmap.wrong {
            Wrong::Nothing | Wrong::Gone => (iova, size, direction, function),
            Wrong::Size => (iova, size + 1, direction, function),
            Wrong::Direction => (iova, size, other(direction), function),
            Wrong::Base => (iova + 3, size, direction, function),
            Wrong::Function if function == DmaFunction::Single => {
                (iova, size, direction, DmaFunction::Coherent)
            }
            Wrong::Function => (iova, size, direction, DmaFunction::Single),
        };
        let skip_cpu_sync = unmap.skips_sync;
        Some(DmaUnmap {
            function,
            attributes: DmaAttributes { skip_cpu_sync, ..DmaAttributes::default() },
            end_of_burst: unmap.ends_burst,
            client: unmap.client,
            ..DmaUnmap::single(iova_range(Iova::new(iova), size), direction, request_id)
        })
    }
    pub(crate) fn unmap(&mut self, unmap: &Unmap) -> Checked {
        match self.unmap_request(unmap) {
            Some(request) => self.unmap_as(request),
            None => Ok(()),
        }
    }
    pub(crate) fn unmap_as(&mut self, request: DmaUnmap) -> Checked {
        let order = self.order();
        let result = self.tenant.domain.dma_unmap(&self.tenant.kernel, request, self.now);
        let (outcome, pending) = match result {
            Ok(pending) => (Ok(()), Some(pending)),
            Err(error) => (Err(error), None),
        };
        let is_deferred = self.defers(&[request]);
        let gone = self.unmapped(&request, outcome, order, is_deferred)?;
        let named = [request.range.base().get()];
        match pending {
            Some(pending) => self.settle(gone, is_deferred, request.end_of_burst, &named, pending),
            None => {
                // A burst ends where its driver says so, also with an unmap that is refused.
                let pending = self.tenant.domain.take_evicted();
                let ends = self.twin.is_ring() && request.end_of_burst;
                prop_assert_eq!(!pending.is_empty(), ends);
                let released = if ends { self.end_bursts_named(&named) } else { Gone::default() };
                self.keep(pending, released);
                Ok(())
            }
        }
    }
    /// Ends the bursts of the rings that these addresses name, where there are such rings.
    fn end_bursts_named(&mut self, named: &[u64]) -> Gone {
        let mut released = Gone::default();
        for ring in named.iter().map(|iova| (iova >> 48) as usize) {
            if ring < self.twin.rings.len() {
                released.append(self.twin.end_burst(ring));
            }
        }
        released
    }
    pub(crate) fn unmap_batch(&mut self, unmaps: &[Unmap]) -> Checked {
        let requests: Vec<DmaUnmap> = unmaps.iter().filter_map(|unmap| self.unmap_request(unmap)).collect();
        let order = self.order();
        let (results, pending) = self.tenant.domain.dma_unmap_batch(&self.tenant.kernel, &requests, self.now);
        prop_assert_eq!(results.len(), requests.len());
        let is_deferred = self.defers(&requests);
        let mut gone = Vec::new();
        for (n, (request, outcome)) in requests.iter().zip(results).enumerate() {
            gone.extend(self.unmapped(request, outcome, order + n as u64, is_deferred)?);
        }
        let ends_burst = requests.last().is_some_and(|last| last.end_of_burst);
        let named: Vec<u64> = requests.iter().map(|request| request.range.base().get()).collect();
        self.settle(gone, is_deferred, ends_burst, &named, pending)
    }
    /// Whether what these unmap stays in use for a while. Coherent memory is freed right away.
    fn defers(&self, requests: &[DmaUnmap]) -> bool {
        let is_coherent = requests.iter().any(|request| request.function == DmaFunction::Coherent);
        matches!(self.twin.options.protection, Protection::Deferred(_)) && !is_coherent
    }
    /// One unmap was answered; what is gone, with its ring.
    fn unmapped(
        &mut self,
        request: &DmaUnmap,
        outcome: Result<(), DmaUnmapError>,
        order: u64,
        is_deferred: bool,
    ) -> Checked<Vec<(usize, Gone)>> {
        let base = request.range.base().get();
        let is_meant = |mapping: &Mapping| {
            (mapping.iova, mapping.size_bytes(), mapping.request.direction, mapping.request.function)
                == (base, request.range.size_bytes(), request.direction, request.function)
        };
        let meant = self.twin.live.iter().position(is_meant);
        match (outcome, meant) {
            (Ok(()), Some(at)) => {
                let mapping = self.twin.live.remove(at);
                let gone = self.twin.close(&mapping, !request.attributes.skip_cpu_sync, is_deferred);
                let death = (self.now.0, request.request_id);
                let range = (base, mapping.size_bytes());
                self.judge.unmapped(range, request.direction, kind(&mapping.request), order, death);
                Ok(vec![(self.twin.slot_at(base).0, gone)])
            }
            (Err(error), None) => {
                let found: Vec<_> = self.twin.mappings().filter(|mapping| mapping.iova == base).collect();
                prop_assert!(is_told(&found, request, &error), "{:?}: {:?} of {:?}", request, error, found);
                self.said.extend(self.judge.refused_unmap(base, &error));
                Ok(Vec::new())
            }
            (outcome, meant) => {
                prop_assert!(false, "{:?}: {:?}, and the twin has {:?}", request, outcome, meant);
                Ok(Vec::new())
            }
        }
    }
    /// What the mode does about what is gone. One pending unmap came of it.
    fn settle(
        &mut self,
        gone: Vec<(usize, Gone)>,
        is_deferred: bool,
        ends_burst: bool,
        named: &[u64],
        pending: PendingUnmap,
    ) -> Checked {
        let told = gone.iter().fold((0, 0), |sum, (_, gone)| (sum.0 + gone.mappings, sum.1 + gone.bytes));
        prop_assert_eq!((pending.undone.unmapped_mappings(), pending.undone.unmapped_bytes()), told);
        let mut released = Gone::default();
        if self.twin.is_ring() {
            for (ring, gone) in gone {
                let ring = &mut self.twin.rings[ring];
                if ring.waiting.mappings == 0 {
                    ring.since = self.now.0;
                }
                ring.waiting.append(gone);
            }
            if ends_burst {
                released = self.end_bursts_named(named);
            }
        } else if is_deferred {
            for (_, gone) in gone {
                if self.twin.waiting.mappings == 0 {
                    self.twin.since = self.now.0;
                }
                self.twin.waiting.append(gone);
            }
            if let Protection::Deferred(deferral) = self.twin.options.protection
                && self.twin.waiting.mappings >= deferral.batch.into()
            {
                released = self.twin.flush();
            }
        } else {
            gone.into_iter().for_each(|(_, gone)| released.append(gone));
        }
        self.keep(vec![pending], released);
        Ok(())
    }

    // Scatter-gather.

    fn sg_request(&mut self, unmap: &Unmap) -> Option<DmaUnmapSg> {
        let request_id = self.next_request();
        let dead: Vec<_> = self.judge.dead().map(|known| known.life).collect();
        let (iova, elements, direction) = match unmap.wrong {
            Wrong::Gone if !dead.is_empty() => {
                let life = unmap.which.get(&dead);
                (life.iova.get(), 1, life.direction)
            }
            // One that was mapped by another function.
            Wrong::Function if !self.twin.live.is_empty() => {
                let mapping = unmap.which.get(&self.twin.live);
                (mapping.iova, 1, mapping.request.direction)
            }
            _ if self.twin.groups.is_empty() => return None,
            _ => {
                let group = unmap.which.get(&self.twin.groups);
                (group.iova, group.elements.len() as u32, group.elements[0].request.direction)
            }
        };
        let (iova, elements, direction) = match unmap.wrong {
            Wrong::Size => (iova, elements + 1, direction),
            Wrong::Direction => (iova, elements, other(direction)),
            Wrong::Base => (iova + 3, elements, direction),
            Wrong::Nothing | Wrong::Function | Wrong::Gone => (iova, elements, direction),
        };
        let attributes = DmaAttributes { skip_cpu_sync: unmap.skips_sync, ..DmaAttributes::default() };
        Some(DmaUnmapSg {
            iova: Iova::new(iova),
            elements,
            direction,
            request_id,
            attributes,
            end_of_burst: unmap.ends_burst,
            client: unmap.client,
        })
    }
    pub(crate) fn unmap_sg(&mut self, unmap: &Unmap) -> Checked {
        let Some(request) = self.sg_request(unmap) else { return Ok(()) };
        let base = request.iova.get();
        let order = self.order();
        let here: Vec<Group> = self.twin.groups.iter().filter(|group| group.iova == base).cloned().collect();
        let has_count = |group: &Group| group.elements.len() == request.elements as usize;
        let has_direction = |group: &Group| group.elements[0].request.direction == request.direction;
        let is_here = |mapping: &Mapping| mapping.iova == base;
        let is_meant = here.iter().any(|group| has_count(group) && has_direction(group));
        match self.tenant.domain.dma_unmap_sg(&self.tenant.kernel, request, self.now) {
            Err(error) => {
                let is_told = match &error {
                    DmaUnmapError::NotMapped(_) => here.is_empty() && !self.twin.live.iter().any(is_here),
                    DmaUnmapError::WrongFunction(_) => here.is_empty() && self.twin.live.iter().any(is_here),
                    DmaUnmapError::InvalidField(_) => here.iter().any(|group| !has_count(group)),
                    DmaUnmapError::DirectionMismatch(_) => {
                        here.iter().any(|group| has_count(group) && !has_direction(group))
                    }
                    _ => false,
                };
                prop_assert!(is_told && !is_meant, "{:?}: {:?} of {:?}", request, error, here);
                self.said.extend(self.judge.refused_unmap(base, &error));
                Ok(())
            }
            Ok(pending) => {
                prop_assert!(is_meant, "{:?} was unmapped", request);
                // Where several fit, any of them may have gone; which it was shows in what is left.
                let fits = |at: &usize| {
                    let group = &self.twin.groups[*at];
                    let rest = self.twin.groups.iter().enumerate().filter(|(other, _)| other != at);
                    let rest = rest.flat_map(|(_, group)| &group.elements);
                    let left = self.expected_list(self.twin.live.iter().chain(rest));
                    group.iova == base && has_count(group) && has_direction(group) && left == self.listed()
                };
                let at = (0..self.twin.groups.len()).find(fits);
                prop_assert!(at.is_some(), "{:?} left something else", request);
                let group = self.twin.groups.remove(at.expect("just seen"));
                let is_deferred = matches!(self.twin.options.protection, Protection::Deferred(_));
                let mut gone = Vec::new();
                for mapping in &group.elements {
                    let ring = self.twin.slot_at(mapping.iova).0;
                    gone.push((ring, self.twin.close(mapping, !unmap.skips_sync, is_deferred)));
                }
                for (iova, size, _) in &group.segments {
                    let death = (self.now.0, request.request_id);
                    let kind = MappingKind::ScatterGather;
                    self.judge.unmapped((*iova, *size), request.direction, kind, order, death);
                }
                let named: Vec<u64> = gone.iter().map(|(ring, _)| (*ring as u64) << 48).collect();
                self.settle(gone, is_deferred, request.end_of_burst, &named, pending)
            }
        }
    }

    // Sync.

    fn units(&self) -> Vec<Unit> {
        let buffers = self.twin.live.iter().map(|mapping| Unit {
            iova: mapping.iova,
            size_bytes: mapping.size_bytes(),
            direction: mapping.request.direction,
            is_coherent: mapping.request.function == DmaFunction::Coherent,
            elements: vec![*mapping],
        });
        let segments = self.twin.groups.iter().flat_map(|group| {
            let mut elements = group.elements.iter();
            group.segments.iter().map(move |(iova, size_bytes, memory)| Unit {
                iova: *iova,
                size_bytes: *size_bytes,
                direction: group.elements[0].request.direction,
                is_coherent: false,
                elements: elements.by_ref().take(memory.len()).copied().collect(),
            })
        });
        buffers.chain(segments).collect()
    }
    pub(crate) fn sync(
        &mut self,
        which: Index,
        offset: u64,
        size_bytes: u64,
        target: SyncFor,
        wrong: Wrong,
    ) -> Checked {
        let request_id = self.next_request();
        let units = self.units();
        let dead: Vec<_> = self.judge.dead().map(|known| known.life).collect();
        let (iova, size, direction) = match wrong {
            Wrong::Gone if !dead.is_empty() => {
                let life = which.get(&dead);
                (life.iova.get(), life.size_bytes, life.direction)
            }
            _ if units.is_empty() => return Ok(()),
            _ => {
                let unit = which.get(&units);
                (unit.iova, unit.size_bytes, unit.direction)
            }
        };
        let direction = if wrong == Wrong::Direction { other(direction) } else { direction };
        // A part of it; one in five may leave it.
        let skip = offset % size;
        let size = if offset.is_multiple_of(5) { size_bytes } else { size_bytes.min(size - skip) };
        let range = iova_range(Iova::new(iova + skip), size);
        let request = DmaSync { range, direction, target, request_id };
        let (first, last) = (range.base().get(), range.last().get());
        let here: Vec<&Unit> =
            units.iter().filter(|unit| (unit.iova..unit.iova + unit.size_bytes).contains(&first)).collect();
        let holds = |unit: &Unit| last < unit.iova + unit.size_bytes;
        let fits = |unit: &&&Unit| !unit.is_coherent && holds(unit) && unit.direction == direction;
        let meant = here.iter().find(fits);
        match self.tenant.domain.dma_sync(&self.tenant.kernel, request, self.now) {
            Ok(()) => {
                prop_assert!(meant.is_some(), "{:?} was synced", request);
                let copies = direction == BOTH || (direction == FROM) == (target == SyncFor::Cpu);
                for element in meant.iter().flat_map(|unit| &unit.elements).filter(|_| copies) {
                    let (from, to) = (first.max(element.iova), last.min(element.last()));
                    if from <= to {
                        self.twin.copy_shadow(element, from, to - from + 1, target == SyncFor::Device);
                    }
                }
                self.said.extend(self.judge.synced(first, last, target));
            }
            Err(error) => {
                let is_told = match &error {
                    DmaSyncError::NotMapped(_) => here.is_empty(),
                    DmaSyncError::WrongFunction(_) => here.iter().any(|unit| unit.is_coherent),
                    DmaSyncError::OutsideMapping(_) => here.iter().any(|unit| !holds(unit)),
                    DmaSyncError::DirectionMismatch(_) => here.iter().any(|unit| unit.direction != direction),
                    _ => false,
                };
                prop_assert!(is_told && meant.is_none(), "{:?}: {:?}", request, error);
                self.said.extend(self.judge.refused_sync(first, &error));
            }
        }
        Ok(())
    }
}
