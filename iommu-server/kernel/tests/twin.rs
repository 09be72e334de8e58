//! Random maps, unmaps and DMA against a flat twin: a table from page to page, and a copy of the memory.
//!
//! Every DMA ends as the twin says, byte for byte and fault for fault; every refusal is one that the twin expects; and when all
//! is unmapped, everything is back where it was: frames, pins, records, addresses.

mod fixture;

use std::collections::BTreeMap;

use fixture::*;
use iommu_kernel::{DmaMap, MapFixed, PendingUnmap};
use iommu_types::errors::{DmaUnmapError, UnmapError};
use iommu_types::{Access, Direction, FaultReason, Gpa, GpaRange, Iova, Permissions, RequestId};
use proptest::prelude::*;
use proptest::sample::Index;

/// Buffers of the tenant, in pages. The largest has room for a 2 MiB page.
const BUFFERS: [u64; 3] = [3, 40, 1100];
/// Where fixed mappings go: beside each other, across table boundaries, and where superpages fit.
const FIXED_BASES: [u64; 4] = [0x1000, 0x20_0000 - 8 * PAGE, 1 << 30, (1 << 39) - 4 * PAGE];

#[derive(Clone, Debug)]
enum Step {
    DmaMap { buffer: Index, offset: u64, size_bytes: u64, direction: Direction },
    DmaUnmap { which: Index, wrong: u8 },
    DmaUnmapBatch { which: Vec<Index> },
    Map { base: Index, page: u64, pages: u64, buffer: Index, permissions: Permissions },
    Unmap { base: Index, page: u64, pages: u64 },
    Finish { which: Index },
    Dma { which: Index, skew: i64, size_bytes: u64, is_write: bool, fill: u8 },
}

fn any_step() -> impl Strategy<Value = Step> {
    let direction =
        prop_oneof![Just(Direction::Bidirectional), Just(Direction::ToDevice), Just(Direction::FromDevice),];
    let permissions = (1u8..4).prop_map(Permissions::from_bits_truncate);
    let index = any::<Index>;
    let pages = prop_oneof![8 => 1u64..12, 1 => 500u64..1100];
    let bytes = prop_oneof![8 => 1u64..9000, 1 => 1u64..4_000_000];
    prop_oneof![
        6 => (index(), 0u64..100_000, bytes, direction)
            .prop_map(|(buffer, offset, size_bytes, direction)| Step::DmaMap { buffer, offset, size_bytes, direction }),
        3 => (index(), 0u8..8).prop_map(|(which, wrong)| Step::DmaUnmap { which, wrong }),
        1 => prop::collection::vec(index(), 0..6).prop_map(|which| Step::DmaUnmapBatch { which }),
        4 => (index(), 0u64..16, pages.clone(), index(), permissions)
            .prop_map(|(base, page, pages, buffer, permissions)| Step::Map { base, page, pages, buffer, permissions }),
        3 => (index(), 0u64..16, pages).prop_map(|(base, page, pages)| Step::Unmap { base, page, pages }),
        4 => index().prop_map(|which| Step::Finish { which }),
        12 => (index(), -5000i64..9000, 0u64..9000, any::<bool>(), any::<u8>())
            .prop_map(|(which, skew, size_bytes, is_write, fill)| Step::Dma { which, skew, size_bytes, is_write, fill }),
    ]
}

#[derive(Clone, Copy, Debug)]
struct Mapping {
    iova: Iova,
    size_bytes: u64,
    gpa: Gpa,
    permissions: Permissions,
    /// `None` for the domain API.
    direction: Option<Direction>,
}

impl Mapping {
    fn pages(&self) -> std::ops::RangeInclusive<u64> {
        let range = iova_range(self.iova, self.size_bytes);
        range.base().page_number()..=range.last().page_number()
    }
}

/// The flat twin.
struct Twin {
    buffers: Vec<GpaRange>,
    /// What the memory holds, by buffer.
    content: Vec<Vec<u8>>,
    live: Vec<Mapping>,
    /// IOVA page → guest page and permissions.
    pages: BTreeMap<u64, (u64, Permissions)>,
    /// Pages whose unmap is not finished.
    leaving: Vec<Mapping>,
}

impl Twin {
    fn add(&mut self, mapping: Mapping) {
        for (n, page) in mapping.pages().enumerate() {
            let guest = mapping.gpa.page_number() + n as u64;
            let before = self.pages.insert(page, (guest, mapping.permissions));
            assert_eq!(before, None, "page {page:#x} was mapped already");
        }
        self.live.push(mapping);
    }
    fn remove(&mut self, index: usize) {
        let mapping = self.live.swap_remove(index);
        mapping.pages().for_each(|page| assert!(self.pages.remove(&page).is_some()));
        self.leaving.push(mapping);
    }
    fn byte(&mut self, iova: u64) -> Option<(&mut u8, Permissions)> {
        let &(guest, permissions) = self.pages.get(&(iova / PAGE))?;
        let gpa = Gpa::new(guest * PAGE + iova % PAGE);
        let buffer =
            self.buffers.iter().position(|buffer| buffer.contains(gpa)).expect("the twin maps buffers");
        let offset = gpa.offset_from(self.buffers[buffer].base()).expect("inside");
        Some((&mut self.content[buffer][offset as usize], permissions))
    }
}

struct Run {
    tenant: Tenant,
    twin: Twin,
    pending: Vec<PendingUnmap>,
}

impl Run {
    fn new(width_bits: u8) -> Self {
        let kernel = kernel_with(32 << 20, LIMITS);
        let mut tenant = Tenant::new(&kernel, 1, width_bits);
        let buffers: Vec<_> = BUFFERS.iter().map(|pages| tenant.buffer(*pages)).collect();
        let content = BUFFERS.iter().map(|pages| vec![0; (pages * PAGE) as usize]).collect();
        let twin = Twin { buffers, content, live: Vec::new(), pages: BTreeMap::new(), leaving: Vec::new() };
        Self { tenant, twin, pending: Vec::new() }
    }
    fn step(&mut self, step: Step) -> Result<(), TestCaseError> {
        match step {
            Step::DmaMap { buffer, offset, size_bytes, direction } => {
                self.dma_map(buffer, offset, size_bytes, direction)
            }
            Step::DmaUnmap { which, wrong } => self.dma_unmap(which, wrong),
            Step::DmaUnmapBatch { which } => self.dma_unmap_batch(&which),
            Step::Map { base, page, pages, buffer, permissions } => {
                self.map(FIXED_BASES[base.index(FIXED_BASES.len())] + page * PAGE, pages, buffer, permissions)
            }
            Step::Unmap { base, page, pages } => {
                self.unmap(FIXED_BASES[base.index(FIXED_BASES.len())] + page * PAGE, pages)
            }
            Step::Finish { which } => {
                if !self.pending.is_empty() {
                    let pending = self.pending.swap_remove(which.index(self.pending.len()));
                    self.tenant.finish(pending);
                }
                Ok(())
            }
            Step::Dma { which, skew, size_bytes, is_write, fill } => {
                self.dma(which, skew, size_bytes, is_write, fill)
            }
        }
    }
    fn dma_map(
        &mut self,
        buffer: Index,
        offset: u64,
        size_bytes: u64,
        direction: Direction,
    ) -> Result<(), TestCaseError> {
        let buffer = *buffer.get(&self.twin.buffers);
        let range = gpa_range(buffer.base(), offset % buffer.size_bytes(), size_bytes);
        let request = DmaMap::single(range, direction, RequestId(1));
        let result = self.tenant.domain.dma_map(&self.tenant.kernel, &self.tenant.memory, request, NOW);
        prop_assert_eq!(result.is_ok(), buffer.covers(range), "{:?}: {:?}", request, result);
        if let Ok(iova) = result {
            let permissions = direction.permissions();
            let mapping =
                Mapping { iova, size_bytes, gpa: range.base(), permissions, direction: Some(direction) };
            self.twin.add(mapping);
        }
        Ok(())
    }
    fn dma_unmap(&mut self, which: Index, wrong: u8) -> Result<(), TestCaseError> {
        if self.twin.live.is_empty() {
            return Ok(());
        }
        let index = which.index(self.twin.live.len());
        let mapping = self.twin.live[index];
        let direction = mapping.direction.unwrap_or(Direction::Bidirectional);
        let mut request = unmap_request(iova_range(mapping.iova, mapping.size_bytes), direction);
        match wrong {
            0 => request.range = iova_range(mapping.iova, mapping.size_bytes + 1),
            1 => request.range = iova_range(Iova::new(mapping.iova.get() + 1), mapping.size_bytes),
            2 if direction == Direction::ToDevice => request.direction = Direction::FromDevice,
            2 => request.direction = Direction::ToDevice,
            _ => {}
        }
        let result = self.tenant.domain.dma_unmap(&self.tenant.kernel, request, NOW);
        let as_expected = matches!(
            (&result, mapping.direction, wrong),
            (Err(DmaUnmapError::NotMapped(_)), None, _)
                | (Err(DmaUnmapError::SizeMismatch(_)), Some(_), 0)
                | (Err(DmaUnmapError::NotMapped(_)), Some(_), 1)
                | (Err(DmaUnmapError::DirectionMismatch(_)), Some(_), 2)
                | (Ok(_), Some(_), 3..)
        );
        prop_assert!(as_expected, "{:?} {}: {:?}", mapping, wrong, result);
        if let Ok(pending) = result {
            self.pending.push(pending);
            self.twin.remove(index);
        }
        Ok(())
    }
    fn dma_unmap_batch(&mut self, which: &[Index]) -> Result<(), TestCaseError> {
        let live: Vec<Mapping> = self.twin.live.clone();
        let chosen: Vec<Mapping> =
            if live.is_empty() { vec![] } else { which.iter().map(|n| *n.get(&live)).collect() };
        let request = |mapping: &Mapping| {
            unmap_request(
                iova_range(mapping.iova, mapping.size_bytes),
                mapping.direction.unwrap_or(Direction::Bidirectional),
            )
        };
        let requests: Vec<_> = chosen.iter().map(request).collect();
        let (results, pending) = self.tenant.domain.dma_unmap_batch(&self.tenant.kernel, &requests, NOW);
        self.pending.push(pending);
        for (mapping, result) in chosen.iter().zip(results) {
            let index = self.twin.live.iter().position(|live| live.iova == mapping.iova);
            let expected = index.filter(|_| mapping.direction.is_some());
            prop_assert_eq!(result.is_ok(), expected.is_some(), "{:?}: {:?}", mapping, result);
            if let Some(index) = expected {
                self.twin.remove(index);
            }
        }
        Ok(())
    }
    fn map(
        &mut self,
        iova: u64,
        pages: u64,
        buffer: Index,
        permissions: Permissions,
    ) -> Result<(), TestCaseError> {
        let buffer = *buffer.get(&self.twin.buffers);
        let range = iova_range(Iova::new(iova), pages * PAGE);
        let request = MapFixed { iova: range, gpa: buffer.base(), permissions, request_id: RequestId(2) };
        let result = self.tenant.domain.map(&self.tenant.kernel, &self.tenant.memory, request, NOW);
        let mapping = Mapping {
            iova: range.base(),
            size_bytes: range.size_bytes(),
            gpa: buffer.base(),
            permissions,
            direction: None,
        };
        let is_free = mapping.pages().all(|page| !self.twin.pages.contains_key(&page));
        let is_quiet = self.pending.is_empty()
            || self.twin.leaving.iter().all(|leaving| {
                leaving.pages().end() < mapping.pages().start()
                    || mapping.pages().end() < leaving.pages().start()
            });
        let is_owned = range.size_bytes() <= buffer.size_bytes();
        let fits = range.last().get() >> self.tenant.domain.width_bits() == 0;
        let must = is_free && is_owned && fits;
        // Where an unmap may not be finished, the address may still be taken.
        prop_assert!(
            if is_quiet { result.is_ok() == must } else { result.is_err() || must },
            "{:?}: {:?}",
            request,
            result
        );
        if result.is_ok() {
            self.twin.add(mapping);
        }
        Ok(())
    }
    fn unmap(&mut self, iova: u64, pages: u64) -> Result<(), TestCaseError> {
        let range = iova_range(Iova::new(iova), pages * PAGE);
        let result = self.tenant.domain.unmap(&self.tenant.kernel, range, NOW);
        let touched = |mapping: &&Mapping| {
            mapping.direction.is_none() && range.overlaps(iova_range(mapping.iova, mapping.size_bytes))
        };
        let splits = (self.twin.live.iter().filter(touched))
            .any(|mapping| !range.covers(iova_range(mapping.iova, mapping.size_bytes)));
        match result {
            Err(UnmapError::SplitsMapping(_)) => prop_assert!(splits),
            Err(error) => prop_assert!(false, "{}", error),
            Ok(pending) => {
                prop_assert!(!splits);
                let mut bytes = 0;
                while let Some(index) = self.twin.live.iter().position(|mapping| touched(&mapping)) {
                    bytes += self.twin.live[index].size_bytes;
                    self.twin.remove(index);
                }
                prop_assert_eq!(pending.undone.unmapped_bytes(), bytes);
                self.pending.push(pending);
            }
        }
        Ok(())
    }
    fn dma(
        &mut self,
        which: Index,
        skew: i64,
        size_bytes: u64,
        is_write: bool,
        fill: u8,
    ) -> Result<(), TestCaseError> {
        // Aimed at what is mapped or was a moment ago, and beside it.
        let targets: Vec<Iova> =
            self.twin.live.iter().chain(&self.twin.leaving).map(|mapping| mapping.iova).collect();
        let base = if targets.is_empty() { 0x1000 } else { which.get(&targets).get() };
        let iova = Iova::new(base.saturating_add_signed(skew).max(1));
        let size_bytes = size_bytes.max(1) as usize;
        let access = if is_write { Access::Write } else { Access::Read };
        let mut expected = Vec::new();
        for at in iova.get()..iova.get() + size_bytes as u64 {
            match self.twin.byte(at) {
                Some((byte, permissions)) if permissions.allow(access) => {
                    if is_write {
                        *byte = fill;
                    }
                    expected.push(*byte);
                }
                _ => break,
            }
        }
        let result = if is_write {
            self.tenant.device_writes(iova, &vec![fill; size_bytes]).map(|()| vec![fill; size_bytes])
        } else {
            self.tenant.device_reads(iova, size_bytes)
        };
        match result {
            Ok(bytes) => prop_assert_eq!(bytes, expected),
            Err(fault) => {
                prop_assert_eq!(fault.done_bytes as usize, expected.len());
                let beyond = fault.iova.get() >> self.tenant.domain.width_bits() != 0;
                let reason = match (beyond, is_write) {
                    (true, _) => FaultReason::ADDRESS_BEYOND_WIDTH,
                    (false, true) => FaultReason::WRITE_DENIED,
                    (false, false) => FaultReason::READ_DENIED,
                };
                prop_assert_eq!(fault.reason, Ok(reason));
            }
        }
        Ok(())
    }
    fn check_state(&self) -> Result<(), TestCaseError> {
        let kernel = &self.tenant.kernel;
        let mut expected: Vec<_> = self
            .twin
            .live
            .iter()
            .map(|live| (live.iova, live.size_bytes, live.gpa, live.permissions))
            .collect();
        expected.sort_unstable_by_key(|(iova, ..)| *iova);
        let states = self.tenant.domain.mappings(kernel, Iova::new(0), usize::MAX - 1);
        let found: Vec<_> = states
            .iter()
            .map(|state| (state.range.base(), state.range.size_bytes(), state.gpa, state.permissions))
            .collect();
        prop_assert_eq!(found, expected);
        let counters = self.tenant.domain.counters();
        prop_assert_eq!(counters.mappings, self.twin.live.len() as u64);
        prop_assert_eq!(
            counters.mapped_bytes,
            self.twin.live.iter().map(|live| live.size_bytes).sum::<u64>()
        );
        for (buffer, content) in self.twin.buffers.iter().zip(&self.twin.content) {
            prop_assert!(
                &self.tenant.cpu_reads(buffer.base(), content.len()) == content,
                "memory of {}",
                buffer
            );
        }
        Ok(())
    }
    /// Unmaps everything and leaves; nothing may be left.
    fn end(mut self) -> Result<(), TestCaseError> {
        let kernel = std::sync::Arc::clone(&self.tenant.kernel);
        for pending in std::mem::take(&mut self.pending) {
            self.tenant.finish(pending);
        }
        let pending = self.tenant.domain.unmap_all(&kernel, NOW);
        self.tenant.finish(pending);
        let account = std::sync::Arc::clone(&self.tenant.account);
        prop_assert_eq!((account.mappings(), account.mapped_bytes()), (0, 0));
        for buffer in &self.twin.buffers {
            prop_assert_eq!(self.tenant.memory.free(&kernel, buffer.base()), Ok(*buffer));
        }
        // Every address can be mapped again.
        let buffer = self.tenant.buffer(1);
        for mapping in &self.twin.leaving {
            let iova = mapping.iova.page_base().get();
            self.tenant.map(iova, buffer.base(), 1);
            self.tenant.unmap(iova, 1);
        }
        self.tenant.leave();
        let other = Tenant::new(&kernel, 1, 48);
        other.leave();
        let left = held(&kernel, &account);
        prop_assert_eq!(left.account, [0; 6]);
        let fresh = kernel_with(32 << 20, LIMITS);
        let untouched = held(&fresh, &account);
        prop_assert_eq!(left.free_records, untouched.free_records);
        prop_assert_eq!(left.free_bytes, untouched.free_bytes - PAGE, "all but the context table of the bus");
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, max_shrink_iters: 2000, ..ProptestConfig::default() })]
    #[test]
    fn i2_every_dma_ends_as_the_flat_twin_says_and_nothing_leaks(
        width_bits in prop::sample::select(vec![39u8, 48, 57]),
        steps in prop::collection::vec(any_step(), 1..120),
    ) {
        let mut run = Run::new(width_bits);
        for (n, step) in steps.into_iter().enumerate() {
            run.step(step)?;
            if n % 16 == 0 {
                run.check_state()?;
            }
        }
        run.check_state()?;
        run.end()?;
    }
}
