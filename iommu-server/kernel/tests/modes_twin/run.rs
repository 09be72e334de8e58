//! A domain with two devices and its twin, in step.

use std::sync::Arc;

use iommu_hardware::vtd::Port;
use iommu_kernel::{DmaFunction, DmaMap, OwnerLimits, PendingUnmap, Tick};
use iommu_types::errors::FreeError;
use iommu_types::{
    DmaLimits, DomainOptions, Gpa, Iova, Protection, ReportClass, RequestId, SanitizerReport, SourceId,
};
use proptest::prelude::*;
use proptest::sample::Index;

use super::fixture::{Held, LIMITS, PAGE, Tenant, gpa_range, held, kernel_with};
use super::judge::{Judge, Said};
use super::steps::{Manner, Step};
use super::twin::{Buffer, Gone, Mapping, Twin};

pub(crate) type Checked<T = ()> = Result<T, TestCaseError>;

/// So few that maps are refused for it.
const FEW_MAPPINGS: u64 = 12;
const BUFFERS_MAX: usize = 5;

pub(crate) struct Run {
    pub(crate) tenant: Tenant,
    pub(crate) second: (SourceId, Port),
    before: Held,
    pub(crate) twin: Twin,
    pub(crate) judge: Judge,
    /// As the twin's.
    pub(crate) pending: Vec<Vec<PendingUnmap>>,
    pub(crate) now: Tick,
    requests: u64,
    /// What the step should have been reported for.
    pub(crate) said: Vec<Said>,
    pub(crate) begun: u64,
    pub(crate) last_end: [u64; 2],
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
    /// What others have unmapped and not finished is taken over; finishing it later releases nothing.
    fn take_over(&mut self, mut gone: Gone) -> Gone {
        for pending in &mut self.twin.pending {
            gone.append(std::mem::take(pending));
        }
        gone
    }
    fn let_go(&mut self, at: usize) -> Gone {
        let gone = match self.twin.options.protection {
            Protection::Passthrough => return self.twin.close_direct(at),
            Protection::Strict => return Gone::default(),
            Protection::Persistent(_) => {
                let idle: Vec<u64> = self.twin.idle.clone();
                let inside = |page: &u64| self.twin.buffers[at].holds(page * PAGE);
                let inside: Vec<u64> = idle.into_iter().filter(inside).collect();
                self.twin.close_pages(&inside)
            }
            Protection::Shared | Protection::Bounce(_) => Gone::default(),
            Protection::Deferred(_) | Protection::Ring(_) => self.flush_twin(),
        };
        self.take_over(gone)
    }
    fn flush_twin(&mut self) -> Gone {
        let mut gone = self.twin.flush();
        for ring in 0..self.twin.rings.len() {
            gone.append(self.twin.end_burst(ring));
        }
        gone
    }
    pub(crate) fn reclaim(&mut self) -> (PendingUnmap, Gone) {
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
        let gone = self.take_over(gone);
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

    // Comparing.

    /// No false report, and none missed.
    pub(crate) fn check_reports(&mut self) -> Checked<Vec<SanitizerReport>> {
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
