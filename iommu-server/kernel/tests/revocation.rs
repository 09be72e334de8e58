//! Memory that is taken back while it is mapped: in every mode nothing leads there afterwards, and what lies beside it works on.

mod fixture;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use fixture::*;
use iommu_kernel::{DmaFunction, DmaMap, DmaUnmap, DmaUnmapSg, OwnerLimits, OwnerMemory, PendingUnmap};
use iommu_types::errors::{DmaSyncError, DmaUnmapError, MapError, NotMapped, StillMapped, TakeMemoryError};
use iommu_types::{
    Direction, DmaAttributes, DomainOptions, Gpa, GpaRange, Iova, MappingGranularity, Owner, Protection,
    ReportClass, RequestId, SyncFor,
};

const BOTH: Direction = Direction::Bidirectional;
/// What is taken back: across two regions.
const TAKEN: (u64, u64) = (24, 16);

fn pages(first: u64, pages: u64) -> GpaRange {
    GpaRange::new(Gpa::new(first * PAGE), pages * PAGE).expect("range")
}

fn taken() -> GpaRange {
    pages(TAKEN.0, TAKEN.1)
}

/// A mapping of the DMA API: where, which memory, how it was made.
#[derive(Clone, Copy, Debug)]
struct Mapped {
    iova: Iova,
    memory: GpaRange,
    function: DmaFunction,
}

impl Mapped {
    /// Whether nothing of it lies in what is taken.
    fn stays(&self) -> bool {
        !self.memory.overlaps(taken())
    }
    /// The device address of a byte that is taken.
    fn taken_byte(&self) -> Iova {
        let offset = taken().base().get().saturating_sub(self.memory.base().get());
        self.iova.checked_add(offset).expect("sum")
    }
}

struct World {
    tenant: Tenant,
    mapped: Vec<Mapped>,
    /// Scatter-gather mappings: first address and whether it stays.
    groups: Vec<(Iova, bool)>,
    fixed: Vec<(u64, bool)>,
    /// An unmap that nobody has finished.
    unfinished: Option<PendingUnmap>,
}

impl World {
    fn new(options: DomainOptions) -> Self {
        let kernel = kernel();
        let mut tenant = Tenant::with(&kernel, 1, options);
        for region in [pages(16, 16), pages(32, 16)] {
            tenant.memory.add_at(&kernel, region).expect("vacant");
            let stamp: Vec<u8> = vec![0xaa; region.size_bytes() as usize];
            tenant.cpu_writes(region.base(), &stamp);
        }
        if tenant.domain.is_passthrough() {
            tenant.domain.open_missing(&kernel, &tenant.memory).expect("room");
        }
        let (mapped, groups, fixed) = Default::default();
        let mut world = Self { tenant, mapped, groups, fixed, unfinished: None };
        world.map_everything();
        world
    }
    fn map_everything(&mut self) {
        let part = |page: u64, offset, bytes| gpa_range(Gpa::new(page * PAGE), offset, bytes);
        for memory in [
            pages(25, 1),
            part(26, 50, 100),
            pages(23, 2),
            pages(39, 2),
            part(23, 4000, 97),
            pages(30, 4),
            pages(18, 1),
            part(23, 100, 200),
            part(40, 0, 1),
        ] {
            self.map(DmaMap::single(memory, BOTH, RequestId(1)));
        }
        for memory in [pages(30, 1), pages(46, 1)] {
            self.map(DmaMap::coherent(memory, RequestId(2)));
        }
        let resource = DmaAttributes { resource: true, ..DmaAttributes::default() };
        self.map(DmaMap { attributes: resource, ..DmaMap::single(pages(28, 1), BOTH, RequestId(3)) });
        for elements in [[pages(44, 1), pages(27, 1)], [pages(19, 1), pages(45, 1)]] {
            self.map_sg(&elements);
        }
        if matches!(self.tenant.domain.protection(), Protection::Strict | Protection::Deferred(_)) {
            for (at, memory) in [(1, pages(24, 4)), (2, pages(38, 4)), (3, pages(16, 8))] {
                self.tenant.map(at << 30, memory.base(), memory.pages_touched());
                self.fixed.push((at << 30, !memory.overlaps(taken())));
            }
        }
        let request = DmaMap::single(pages(29, 1), BOTH, RequestId(4));
        let Tenant { kernel, memory, domain, .. } = &mut self.tenant;
        let iova = domain.dma_map(kernel, memory, request, NOW).expect("mapped");
        self.tenant.device_reads(iova, 8).expect("mapped, and now cached");
        let unmap = DmaUnmap { end_of_burst: false, ..unmap_request(iova_range(iova, PAGE), BOTH) };
        self.unfinished =
            Some(self.tenant.domain.dma_unmap(&self.tenant.kernel, unmap, NOW).expect("unmapped"));
    }
    fn map(&mut self, request: DmaMap) {
        let Tenant { kernel, memory, domain, .. } = &mut self.tenant;
        let iova = domain.dma_map(kernel, memory, request, NOW).expect("mapped");
        let mapped = Mapped { iova, memory: request.range, function: request.function };
        self.tenant.device_reads(iova, request.range.size_bytes() as usize).expect("mapped, and now cached");
        self.mapped.push(mapped);
    }
    fn map_sg(&mut self, elements: &[GpaRange]) {
        let request = DmaMap::single(elements[0], BOTH, RequestId(5));
        let Tenant { kernel, memory, domain, .. } = &mut self.tenant;
        let segments = domain.dma_map_sg(kernel, memory, elements, request, NOW).expect("mapped");
        for segment in &segments {
            self.tenant
                .device_reads(segment.iova, segment.size_bytes as usize)
                .expect("mapped, and now cached");
        }
        self.groups.push((segments[0].iova, elements.iter().all(|element| !element.overlaps(taken()))));
    }
    fn revoke(&mut self) {
        let pending = self.tenant.domain.revoke_memory(&self.tenant.kernel, taken(), NOW);
        self.tenant.finish(pending);
    }
    /// Where addresses are the memory's own, what is open is the page.
    fn is_identity(&self) -> bool {
        let protection = self.tenant.domain.protection();
        matches!(protection, Protection::Passthrough | Protection::Shared | Protection::Persistent(_))
    }
    /// Every mapping that stays works, through caches and without.
    fn check_what_stays(&mut self) {
        for round in 0..2 {
            for mapped in self.mapped.clone().iter().filter(|mapped| mapped.stays()) {
                let size_bytes = mapped.memory.size_bytes() as usize;
                let read = self.tenant.device_reads(mapped.iova, size_bytes);
                assert!(read.is_ok_and(|bytes| bytes.iter().all(|byte| *byte == 0xaa)), "{round} {mapped:?}");
                self.tenant.device_writes(mapped.iova, &vec![0xaa; size_bytes]).expect("stays");
            }
            for (iova, _) in self.groups.clone().iter().filter(|(_, stays)| *stays) {
                assert!(self.tenant.device_reads(*iova, PAGE as usize).is_ok(), "{round} {iova}");
            }
            for (at, _) in self.fixed.clone().iter().filter(|(_, stays)| *stays) {
                assert!(
                    self.tenant.device_reads(Iova::new(*at), 8 * PAGE as usize).is_ok(),
                    "{round} {at:#x}"
                );
            }
        }
    }
    /// A device that goes on with what is revoked is refused; in a bounce domain it reaches a shadow buffer at most.
    fn check_what_is_gone(&mut self) {
        let is_bounce = matches!(self.tenant.domain.protection(), Protection::Bounce(_));
        for mapped in self.mapped.clone().iter().filter(|mapped| !mapped.stays()) {
            let is_direct = mapped.function == DmaFunction::Coherent || mapped.memory == pages(28, 1);
            let refused = self.tenant.device_writes(mapped.taken_byte(), &[0x66]).is_err();
            assert_eq!(refused, !is_bounce || is_direct, "{mapped:?}");
            if !self.is_identity() && refused {
                assert!(
                    self.tenant.device_writes(mapped.iova, &[0x66]).is_err(),
                    "it is gone whole: {mapped:?}"
                );
            }
        }
        for (iova, _) in self.groups.clone().iter().filter(|(_, stays)| !stays) {
            let second = if self.is_identity() { Iova::new(27 * PAGE) } else { *iova };
            assert_eq!(self.tenant.device_writes(second, &[0x66]).is_err(), !is_bounce, "{iova}");
        }
        for (at, _) in self.fixed.clone().iter().filter(|(_, stays)| !stays) {
            assert!(self.tenant.device_writes(Iova::new(*at), &[0x66]).is_err(), "{at:#x}");
        }
    }
    /// The driver, who was told nothing, goes on: what is gone is not mapped, what stays is unmapped.
    fn driver_unmaps_everything(&mut self) {
        let kernel = Arc::clone(&self.tenant.kernel);
        for mapped in self.mapped.drain(..) {
            let range = iova_range(mapped.iova, mapped.memory.size_bytes());
            let request = DmaUnmap { function: mapped.function, ..unmap_request(range, BOTH) };
            match self.tenant.domain.dma_unmap(&kernel, request, NOW) {
                Ok(pending) if mapped.stays() => _ = self.tenant.finish(pending),
                Err(error) => {
                    assert_eq!(
                        error,
                        DmaUnmapError::NotMapped(NotMapped { iova: mapped.iova }),
                        "{mapped:?}"
                    );
                    assert!(!mapped.stays(), "{mapped:?}");
                }
                Ok(_) => panic!("{mapped:?} was revoked"),
            }
        }
        for (iova, stays) in self.groups.drain(..) {
            let attributes = DmaAttributes::default();
            let (direction, request_id) = (BOTH, RequestId(6));
            let request = DmaUnmapSg {
                iova,
                elements: 2,
                direction,
                request_id,
                attributes,
                end_of_burst: true,
                client: 0,
            };
            match self.tenant.domain.dma_unmap_sg(&kernel, request, NOW) {
                Ok(pending) if stays => _ = self.tenant.finish(pending),
                Err(error) => {
                    assert_eq!(error, DmaUnmapError::NotMapped(NotMapped { iova }));
                    assert!(!stays);
                }
                Ok(_) => panic!("the group at {iova} was revoked"),
            }
        }
        for (at, stays) in self.fixed.drain(..) {
            assert_eq!(self.tenant.unmap(at, 8) > 0, stays, "{at:#x}");
        }
    }
}

/// Every mode, with bytes where it has them.
fn all_options() -> impl Iterator<Item = DomainOptions> {
    ALL_MODES.into_iter().flat_map(|protection| {
        let options = DomainOptions::new(protection);
        let bytes = options.with_granularity(MappingGranularity::Byte);
        [Some(options), bytes.check().is_ok().then_some(bytes)].into_iter().flatten()
    })
}

fn check_revoked(options: DomainOptions) {
    let mut world = World::new(options);
    let kernel = Arc::clone(&world.tenant.kernel);
    let leaving = world.tenant.memory.begin_leaving(&kernel, taken()).expect("owned");
    let not_left = world.tenant.memory.finish_leaving(&kernel, leaving).expect_err("mapped");
    assert_eq!(
        not_left.error,
        TakeMemoryError::StillMapped(StillMapped { gpa: taken().base() }),
        "{options:?}"
    );
    let bounced = world.mapped[0];
    if matches!(options.protection, Protection::Bounce(_)) {
        world.tenant.device_writes(bounced.iova, &[0x55; 8]).expect("into the shadow");
    }
    world.revoke();
    let now = world.tenant.cpu_reads(bounced.memory.base(), 8);
    assert_eq!(now, [0xaa; 8], "{options:?}: nothing is copied back");
    assert_eq!(world.tenant.memory.pins(&kernel, &not_left.leaving), 0, "{options:?}");
    world.check_what_stays();
    world.check_what_is_gone();
    // What the device wrote to a shadow buffer is copied nowhere.
    let mut other = OwnerMemory::new(&kernel, kernel.account(Owner::Vm(2)));
    let room = other.make_room(pages(100, TAKEN.1)).expect("vacant");
    let left = world.tenant.memory.finish_leaving(&kernel, not_left.leaving).expect("no pins");
    let theirs = other.receive(left.transfer(room));
    world.check_what_is_gone();
    world.check_what_stays();
    let unfinished = world.unfinished.take().expect("an unmap was begun");
    world.tenant.finish(unfinished);
    world.driver_unmaps_everything();
    let mut bytes = vec![0xee; theirs.size_bytes() as usize];
    other.read(&kernel, theirs.base(), &mut bytes).expect("theirs");
    assert!(bytes.iter().all(|byte| *byte == 0), "{options:?}: I9: wiped, and out of the device's reach");
    for page in (16..24).chain(40..48) {
        assert!(
            world.tenant.cpu_reads(Gpa::new(page * PAGE), PAGE as usize).iter().all(|byte| *byte == 0xaa)
        );
    }
    other.free_all(&kernel);
    let account = Arc::clone(&world.tenant.account);
    world.tenant.leave();
    assert_eq!(held(&kernel, &account).account, [0; 6], "{options:?}");
}

#[test]
fn i1_i9_memory_that_is_taken_back_is_out_of_reach_in_every_mode() {
    for options in all_options() {
        check_revoked(options);
    }
}

#[test]
fn a_revocation_is_no_misuse_of_the_driver_and_no_fault_of_the_device() {
    for options in all_options() {
        let mut world = World::new(DomainOptions { sanitizer: true, ..options });
        let kernel = Arc::clone(&world.tenant.kernel);
        let sanitizer = world.tenant.domain.sanitizer().expect("asked for").clone();
        // The buffers of this test overlap, which is misuse indeed.
        drop(sanitizer.drain_reports());
        let first = world.mapped[0];
        world.revoke();
        let sync = iommu_kernel::DmaSync {
            range: iova_range(first.iova, 8),
            direction: BOTH,
            target: SyncFor::Cpu,
            request_id: RequestId(7),
        };
        let refused = world.tenant.domain.dma_sync(&kernel, sync, NOW);
        assert_eq!(refused, Err(DmaSyncError::NotMapped(NotMapped { iova: first.iova })), "{options:?}");
        world.driver_unmaps_everything();
        let reports = sanitizer.drain_reports();
        assert!(reports.is_empty(), "{options:?}: {reports:?}");
        let unmap = unmap_request(iova_range(first.iova, PAGE), BOTH);
        world.tenant.domain.dma_unmap(&kernel, unmap, NOW).expect_err("unmapped already");
        let classes: Vec<_> = sanitizer.drain_reports().iter().map(|report| report.class).collect();
        assert_eq!(classes, [ReportClass::DoubleUnmap], "{options:?}: the second time it is");
    }
}

#[test]
fn what_nobody_maps_is_revoked_without_an_invalidation() {
    for options in all_options() {
        let kernel = kernel();
        let mut tenant = Tenant::with(&kernel, 1, options);
        tenant.memory.add_at(&kernel, pages(16, 16)).expect("vacant");
        let before = tenant.domain.counters();
        let pending = tenant.domain.revoke_memory(&kernel, pages(16, 16), NOW);
        assert!(pending.undone.is_empty());
        assert!(pending.drain.try_complete().is_ok(), "{options:?}");
        assert_eq!(tenant.domain.counters(), before, "{options:?}");
    }
}

fn passthrough(limits: OwnerLimits) -> Tenant {
    let kernel = kernel_with(16 << 20, limits);
    let mut tenant = Tenant::with(&kernel, 1, DomainOptions::new(Protection::Passthrough));
    tenant.memory.add_at(&kernel, pages(0, 1)).expect("vacant");
    tenant.memory.add_at(&kernel, pages(512, 1024)).expect("vacant");
    tenant.domain.open_missing(&kernel, &tenant.memory).expect("room");
    tenant
}

/// Stops the device also when the test fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A device that uses memory beside what leaves is never refused, though the superpage over both is split under it.
#[test]
fn a_direct_map_is_cut_under_a_device_that_goes_on() {
    let tenant = passthrough(LIMITS);
    let Tenant { kernel, account, mut memory, mut domain, source, mut port } = tenant;
    let stop = AtomicBool::new(false);
    let first = Iova::new(512 * PAGE);
    std::thread::scope(|threads| {
        let device = threads.spawn(|| {
            let mut accesses = 0u64;
            while !stop.load(Ordering::Relaxed) || accesses < 1000 {
                for page in [0, 512, 699, 701, 1023, 1024, 1535] {
                    let mut byte = [0];
                    let read = iommu_hardware::dma::Transfer::Read(&mut byte);
                    let done =
                        iommu_hardware::dma::Run::new(&mut port).execute(Iova::new(page * PAGE), None, read);
                    assert!(done.is_ok(), "page {page} stays: {done:?}");
                    accesses += 1;
                }
            }
        });
        let stopping = Stop(&stop);
        let mut take = |range| {
            let leaving = memory.begin_leaving(&kernel, range).expect("owned");
            let (drain, undone) = domain.revoke_memory(&kernel, range, NOW).split();
            domain.finish_unmap(&kernel, undone, drain.wait_blocking());
            memory.finish_leaving(&kernel, leaving).map(|left| left.free())
        };
        let ranges = [pages(700, 1), pages(800, 10), pages(702, 90), pages(1022, 1), pages(1025, 500)];
        let taken = ranges.map(&mut take);
        drop(stopping);
        device.join().expect("the device was never refused");
        assert_eq!(taken.map(|taken| taken.expect("no pins")), ranges);
    });
    let pieces: Vec<_> =
        domain.mappings(&kernel, Iova::new(0), 20).into_iter().map(|state| state.range).collect();
    let expected = [(0, 1), (512, 188), (701, 1), (792, 8), (810, 212), (1023, 2), (1525, 11)];
    let expected = expected.map(|(first, count)| iova_range(Iova::new(first * PAGE), count * PAGE));
    assert_eq!(pieces, expected);
    let mut tenant = Tenant { kernel, account, memory, domain, source, port };
    for gone in [700, 702, 791, 800, 809, 1022, 1025, 1524] {
        assert!(tenant.device_reads(Iova::new(gone * PAGE), 1).is_err(), "{gone}");
    }
    let kernel = Arc::clone(&tenant.kernel);
    tenant.memory.add_at(&kernel, pages(700, 1)).expect("vacant");
    tenant.domain.open_missing(&kernel, &tenant.memory).expect("room");
    assert_eq!(tenant.device_reads(Iova::new(700 * PAGE), 4).expect("open"), [0; 4]);
    tenant.device_reads(first, 8).expect("open");
    let account = Arc::clone(&tenant.account);
    tenant.leave();
    assert_eq!(held(&kernel, &account).account, [0; 6]);
}

#[test]
fn a_direct_map_that_cannot_be_cut_is_closed_whole_and_memory_leaves_all_the_same() {
    let mut tenant = passthrough(OwnerLimits { mappings: 3, ..LIMITS });
    let kernel = Arc::clone(&tenant.kernel);
    let leaving = tenant.memory.begin_leaving(&kernel, pages(700, 1)).expect("owned");
    let pending = tenant.domain.revoke_memory(&kernel, pages(700, 1), NOW);
    tenant.finish(pending);
    assert!(tenant.device_reads(Iova::new(512 * PAGE), 8).is_err());
    tenant.device_reads(Iova::new(0), 8).expect("another region");
    tenant.domain.open_missing(&kernel, &tenant.memory).expect("two pieces");
    for open in [512, 699, 701, 1535] {
        tenant.device_reads(Iova::new(open * PAGE), 8).expect("open again");
    }
    assert!(tenant.device_reads(Iova::new(700 * PAGE), 8).is_err(), "what is leaving is not opened");
    tenant.memory.finish_leaving(&kernel, leaving).expect("no pins").free();
    let leaving = tenant.memory.begin_leaving(&kernel, pages(600, 1)).expect("owned");
    let pending = tenant.domain.revoke_memory(&kernel, pages(600, 1), NOW);
    tenant.finish(pending);
    let refused = tenant.domain.open_missing(&kernel, &tenant.memory);
    assert!(matches!(refused, Err(MapError::LimitReached(_))), "{refused:?}");
    tenant.memory.abort_leaving(&kernel, leaving);
    tenant
        .domain
        .open_missing(&kernel, &tenant.memory)
        .expect_err("a piece was opened, and it is one too many");
    let account = Arc::clone(&tenant.account);
    tenant.leave();
    assert_eq!(held(&kernel, &account).account, [0; 6]);
}
