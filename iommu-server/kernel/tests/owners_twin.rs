//! Two virtual machines that get, map, use, lose and hand over memory at random, in every mode, against a twin that knows who owns which page.
//!
//! Each writes its own marks only, by CPU and by DMA, through every address that its device was ever given. So a foreign mark in a
//! page, or in what a device reads, is memory that was reached after it changed owner.

mod fixture;

use std::collections::BTreeSet;
use std::sync::Arc;

use fixture::*;
use iommu_kernel::{DmaMap, DmaUnmap, DmaUnmapSg, Kernel, PendingUnmap};
use iommu_types::errors::{AddMemoryError, DmaMapError, TakeMemoryError};
use iommu_types::{
    Direction, DmaAttributes, DomainOptions, Gpa, GpaRange, Iova, MappingGranularity, RequestId,
};
use proptest::prelude::*;
use proptest::sample::Index;

/// Pages of the window in which everything happens, from guest-physical address 0.
const WINDOW: u64 = 24;
const BOTH: Direction = Direction::Bidirectional;

#[derive(Clone, Debug)]
enum Step {
    Add { vm: usize, page: u64, pages: u64 },
    Map { vm: usize, page: u64, offset: u64, size_bytes: u64, is_coherent: bool },
    MapSg { vm: usize, pages: [u64; 2] },
    Unmap { vm: usize, which: Index, is_lost: bool },
    CpuWrites { vm: usize, page: u64 },
    Dma { vm: usize },
    Take { vm: usize, page: u64, pages: u64, to: Option<u64>, is_aborted: bool },
}

fn any_step() -> impl Strategy<Value = Step> {
    let vm = || 0..2usize;
    let page = || 0..WINDOW;
    prop_oneof![
        4 => (vm(), page(), 1u64..8).prop_map(|(vm, page, pages)| Step::Add { vm, page, pages }),
        6 => (vm(), page(), 0..PAGE, 1u64..3 * PAGE, any::<bool>()).prop_map(
            |(vm, page, offset, size_bytes, is_coherent)| Step::Map { vm, page, offset, size_bytes, is_coherent }
        ),
        2 => (vm(), page(), page()).prop_map(|(vm, one, two)| Step::MapSg { vm, pages: [one, two] }),
        3 => (vm(), any::<Index>(), any::<bool>()).prop_map(|(vm, which, is_lost)| Step::Unmap { vm, which, is_lost }),
        3 => (vm(), page()).prop_map(|(vm, page)| Step::CpuWrites { vm, page }),
        4 => vm().prop_map(|vm| Step::Dma { vm }),
        5 => (vm(), page(), 1u64..6, prop::option::of(page()), prop::bool::weighted(0.1)).prop_map(
            |(vm, page, pages, to, is_aborted)| Step::Take { vm, page, pages, to, is_aborted }
        ),
    ]
}

fn any_options() -> impl Strategy<Value = DomainOptions> {
    (0..ALL_MODES.len(), any::<bool>(), any::<bool>()).prop_map(|(mode, bytes, sanitizer)| {
        let options = DomainOptions { sanitizer, ..DomainOptions::new(ALL_MODES[mode]) };
        let in_bytes = options.with_granularity(MappingGranularity::Byte);
        if bytes && in_bytes.check().is_ok() { in_bytes } else { options }
    })
}

fn pages_of(first: u64, pages: u64) -> GpaRange {
    GpaRange::new(Gpa::new(first * PAGE), pages * PAGE).expect("range")
}

/// A mapping that the driver knows. One of scatter-gather has two pieces of memory.
#[derive(Clone, Debug)]
struct Mapped {
    iova: Iova,
    size_bytes: u64,
    memory: Vec<GpaRange>,
    is_coherent: bool,
}

struct Vm {
    tenant: Tenant,
    mark: u8,
    owned: BTreeSet<u64>,
    mapped: Vec<Mapped>,
    /// Every address that the device was ever given.
    given: BTreeSet<u64>,
}

impl Vm {
    fn new(kernel: &Arc<Kernel>, number: u32, options: DomainOptions) -> Self {
        let tenant = Tenant::with(kernel, number, options);
        let mark = number as u8;
        Self { tenant, mark, owned: BTreeSet::new(), mapped: Vec::new(), given: BTreeSet::new() }
    }
    fn owns(&self, range: GpaRange) -> bool {
        (range.base().page_number()..=range.last().page_number()).all(|page| self.owned.contains(&page))
    }
    fn is_vacant(&self, range: GpaRange) -> bool {
        (range.base().page_number()..=range.last().page_number()).all(|page| !self.owned.contains(&page))
    }
    /// New memory is zero, and open where all memory is.
    fn takes_over(&mut self, range: GpaRange) {
        let bytes = self.tenant.cpu_reads(range.base(), range.size_bytes() as usize);
        assert!(bytes.iter().all(|byte| *byte == 0), "I9: {range} was not wiped");
        self.owned.extend(range.base().page_number()..=range.last().page_number());
        self.opens_all();
    }
    fn opens_all(&mut self) {
        if self.tenant.domain.is_passthrough() {
            let Tenant { kernel, memory, domain, .. } = &mut self.tenant;
            domain.open_missing(kernel, memory).expect("room");
        }
    }
    fn adds(&mut self, range: GpaRange) {
        let added = self.tenant.memory.add_at(&self.tenant.kernel, range);
        if self.is_vacant(range) {
            added.expect("vacant");
            self.takes_over(range);
        } else {
            assert!(matches!(added, Err(AddMemoryError::MemoryOverlaps(_))), "{added:?}");
        }
    }
    fn maps(&mut self, memory: GpaRange, is_coherent: bool) {
        let single = DmaMap::single(memory, BOTH, RequestId(1));
        let request = if is_coherent { DmaMap::coherent(memory, RequestId(1)) } else { single };
        let Tenant { kernel, memory: owned, domain, .. } = &mut self.tenant;
        let outcome = domain.dma_map(kernel, owned, request, NOW);
        let iova = outcome.as_ref().ok().copied();
        self.check_map(&[memory], outcome.map(|_| ()));
        if let Some(iova) = iova {
            let size_bytes = memory.size_bytes();
            self.given.extend([iova.get(), iova.get() + size_bytes - 1]);
            self.mapped.push(Mapped { iova, size_bytes, memory: vec![memory], is_coherent });
        }
    }
    fn maps_sg(&mut self, elements: [GpaRange; 2]) {
        let request = DmaMap::single(elements[0], BOTH, RequestId(2));
        let Tenant { kernel, memory, domain, .. } = &mut self.tenant;
        let outcome = domain.dma_map_sg(kernel, memory, &elements, request, NOW);
        let segments = outcome.as_ref().ok().cloned();
        self.check_map(&elements, outcome.map(|_| ()));
        if let Some(segments) = segments {
            self.given.extend(segments.iter().map(|segment| segment.iova.get()));
            let (iova, size_bytes) = (segments[0].iova, 0);
            self.mapped.push(Mapped { iova, size_bytes, memory: elements.to_vec(), is_coherent: false });
        }
    }
    /// A map fails where memory is somebody else's; for want of slots and the like it may.
    fn check_map(&mut self, memory: &[GpaRange], outcome: Result<(), DmaMapError>) {
        let is_owned = memory.iter().all(|range| self.owns(*range));
        match outcome {
            Ok(()) => assert!(is_owned, "I2: {memory:?} is not theirs"),
            Err(DmaMapError::NotOwned(_)) => assert!(!is_owned, "{memory:?}"),
            Err(DmaMapError::MemoryLeaving(leaving)) => panic!("nothing is leaving: {leaving}"),
            Err(_) => {}
        }
        for evicted in self.tenant.domain.take_evicted() {
            self.tenant.finish(evicted);
        }
    }
    fn unmaps(&mut self, which: Index, is_lost: bool) {
        if self.mapped.is_empty() {
            return;
        }
        let mapped = self.mapped.swap_remove(which.index(self.mapped.len()));
        let kernel = Arc::clone(&self.tenant.kernel);
        let pending = if mapped.memory.len() == 2 {
            let (iova, attributes) = (mapped.iova, DmaAttributes::default());
            let request = DmaUnmapSg {
                iova,
                elements: 2,
                direction: BOTH,
                request_id: RequestId(3),
                attributes,
                end_of_burst: true,
                client: 0,
            };
            self.tenant.domain.dma_unmap_sg(&kernel, request, NOW)
        } else {
            let single = DmaUnmap::single(iova_range(mapped.iova, mapped.size_bytes), BOTH, RequestId(3));
            let function = if mapped.is_coherent {
                iommu_kernel::DmaFunction::Coherent
            } else {
                iommu_kernel::DmaFunction::Single
            };
            self.tenant.domain.dma_unmap(&kernel, DmaUnmap { function, ..single }, NOW)
        };
        self.finishes(pending.unwrap_or_else(|error| panic!("{mapped:?} is mapped: {error}")), is_lost);
    }
    /// Some callers are cancelled, and what they began is for others to finish.
    fn finishes(&mut self, pending: PendingUnmap, is_lost: bool) {
        if is_lost {
            drop(pending);
        } else {
            self.tenant.finish(pending);
        }
    }
    fn cpu_writes(&mut self, page: u64) {
        let mark = vec![self.mark; PAGE as usize];
        let written = self.tenant.memory.write(&self.tenant.kernel, Gpa::new(page * PAGE), &mark);
        assert_eq!(written.is_ok(), self.owned.contains(&page), "{page}: {written:?}");
    }
    /// The device writes and reads through whatever it was ever told.
    fn does_dma(&mut self) {
        for iova in self.given.clone().into_iter().chain((0..WINDOW).map(|page| page * PAGE)) {
            let iova = Iova::new(iova);
            let _may_be_refused = self.tenant.device_writes(iova, &[self.mark]);
            if let Ok(bytes) = self.tenant.device_reads(iova, 8) {
                self.check_marks(&bytes, format!("a read at {iova}"));
            }
        }
    }
    fn check_marks(&self, bytes: &[u8], what: String) {
        let foreign = bytes.iter().find(|byte| ![0, self.mark].contains(byte));
        assert_eq!(foreign, None, "I9: a mark of somebody else in {what} of {}", self.mark);
    }
    fn check_memory(&self) {
        for page in 0..WINDOW {
            let mut bytes = vec![0; PAGE as usize];
            let read = self.tenant.memory.read(&self.tenant.kernel, Gpa::new(page * PAGE), &mut bytes);
            assert_eq!(read.is_ok(), self.owned.contains(&page), "page {page}: {read:?}");
            self.check_marks(&bytes, format!("page {page}"));
        }
    }
}

struct World {
    kernel: Arc<Kernel>,
    vms: [Vm; 2],
}

impl World {
    fn run(&mut self, step: &Step) {
        match *step {
            Step::Add { vm, page, pages } => self.vms[vm].adds(pages_of(page, pages)),
            Step::Map { vm, page, offset, size_bytes, is_coherent } => {
                self.vms[vm].maps(gpa_range(Gpa::new(page * PAGE), offset, size_bytes), is_coherent);
            }
            Step::MapSg { vm, pages } => self.vms[vm].maps_sg(pages.map(|page| pages_of(page, 1))),
            Step::Unmap { vm, which, is_lost } => self.vms[vm].unmaps(which, is_lost),
            Step::CpuWrites { vm, page } => self.vms[vm].cpu_writes(page),
            Step::Dma { vm } => self.vms[vm].does_dma(),
            Step::Take { vm, page, pages, to, is_aborted } => {
                self.take(vm, pages_of(page, pages), to, is_aborted)
            }
        }
        self.vms.iter().for_each(Vm::check_memory);
    }
    fn take(&mut self, vm: usize, range: GpaRange, to: Option<u64>, is_aborted: bool) {
        let kernel = Arc::clone(&self.kernel);
        let [one, two] = &mut self.vms;
        let (giver, receiver) = if vm == 0 { (one, two) } else { (two, one) };
        let room = match to {
            Some(page) => {
                let wanted = pages_of(page, range.pages_touched());
                let room = receiver.tenant.memory.make_room(wanted);
                assert_eq!(room.is_ok(), receiver.is_vacant(wanted));
                let Ok(room) = room else { return };
                Some(room)
            }
            None => None,
        };
        let leaving = match giver.tenant.memory.begin_leaving(&kernel, range) {
            Ok(leaving) => leaving,
            Err(error) => {
                assert!(matches!(error, TakeMemoryError::NotOwned(_)) && !giver.owns(range), "{error}");
                return;
            }
        };
        let pending = giver.tenant.domain.revoke_memory(&kernel, range, NOW);
        giver.tenant.finish(pending);
        giver.mapped.retain(|mapped| mapped.memory.iter().all(|memory| !memory.overlaps(range)));
        assert_eq!(giver.tenant.memory.pins(&kernel, &leaving), 0, "I9");
        if is_aborted {
            giver.tenant.memory.abort_leaving(&kernel, leaving);
            giver.opens_all();
            return;
        }
        let left = giver.tenant.memory.finish_leaving(&kernel, leaving).expect("no pins");
        for page in range.base().page_number()..=range.last().page_number() {
            giver.owned.remove(&page);
        }
        match room {
            None => _ = left.free(),
            Some(room) => {
                let arrived = left.transfer(room);
                giver.does_dma();
                let range = receiver.tenant.memory.receive(arrived);
                receiver.takes_over(range);
            }
        }
        giver.does_dma();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]
    #[test]
    fn i9_a_page_that_changed_owner_is_zero_and_unreachable_for_the_old_owner(
        options in [any_options(), any_options()],
        steps in prop::collection::vec(any_step(), 1..60),
    ) {
        let kernel = kernel_with(4 << 20, LIMITS);
        let vms = [Vm::new(&kernel, 1, options[0]), Vm::new(&kernel, 2, options[1])];
        let mut world = World { kernel, vms };
        for step in &steps {
            world.run(step);
        }
        let World { kernel, vms } = world;
        for vm in vms {
            let account = Arc::clone(&vm.tenant.account);
            vm.tenant.leave();
            prop_assert_eq!(held(&kernel, &account).account, [0; 6]);
        }
    }
}
