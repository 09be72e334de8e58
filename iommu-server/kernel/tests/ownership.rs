//! Memory of virtual machines: given at an address, taken back while it may be mapped, moved to another owner.

mod fixture;

use std::sync::Arc;

use fixture::*;
use iommu_kernel::{Kernel, Left, OwnerLimits, OwnerMemory};
use iommu_types::errors::{
    AddMemoryError, DmaMapError, FreeError, MapError, MemoryError, MemoryLeaving, MemoryOverlaps, NotOwned,
    StillMapped, TakeMemoryError,
};
use iommu_types::{Direction, DomainOptions, Gpa, GpaRange, Owner, Protection};

fn pages(first: u64, pages: u64) -> GpaRange {
    GpaRange::new(Gpa::new(first * PAGE), pages * PAGE).expect("range")
}

fn memory_of(kernel: &Kernel, vm: u32) -> OwnerMemory {
    OwnerMemory::new(kernel, kernel.account(Owner::Vm(vm)))
}

fn fill(kernel: &Kernel, memory: &OwnerMemory, range: GpaRange, byte: u8) {
    memory.write(kernel, range.base(), &vec![byte; range.size_bytes() as usize]).expect("owned");
}

fn read(kernel: &Kernel, memory: &OwnerMemory, range: GpaRange) -> Result<Vec<u8>, MemoryError> {
    let mut bytes = vec![0xee; range.size_bytes() as usize];
    memory.read(kernel, range.base(), &mut bytes).map(|()| bytes)
}

/// Takes memory out that nobody maps.
fn take(kernel: &Kernel, memory: &mut OwnerMemory, range: GpaRange) -> Left {
    let leaving = memory.begin_leaving(kernel, range).expect("owned");
    memory.finish_leaving(kernel, leaving).expect("nothing is mapped")
}

#[test]
fn memory_comes_at_whole_pages_where_none_is() {
    let kernel = kernel();
    let mut memory = memory_of(&kernel, 1);
    let range = |base, size_bytes| GpaRange::new(Gpa::new(base), size_bytes).expect("range");
    memory.add_at(&kernel, range(0, 4 * PAGE)).expect("page 0 is memory of a virtual machine as any other");
    memory.add_at(&kernel, range(0xfedf_f000, PAGE)).expect("right below the interrupts");
    memory.add_at(&kernel, range(0xfef0_0000, PAGE)).expect("right above the interrupts");
    memory.add_at(&kernel, range((1 << 48) - PAGE, PAGE)).expect("the last page");
    let _room = memory.make_room(range(0x8000, 2 * PAGE)).expect("room");
    let before = (memory.buffers(), kernel.account(Owner::Vm(1)).memory_bytes());
    let overlaps = |gpa| AddMemoryError::MemoryOverlaps(MemoryOverlaps { gpa: Gpa::new(gpa) });
    for (refused, overlapped) in [
        (range(0x10_0001, PAGE), None),
        (range(0x10_0000, 100), None),
        (range(0xfedf_f000, 2 * PAGE), None),
        (range(0xfee0_0000, PAGE), None),
        (range(0xfeef_f000, PAGE), None),
        (range(0xf000_0000, 0x1000_0000), None),
        (range(1 << 48, PAGE), None),
        (range((1 << 48) - PAGE, 2 * PAGE), None),
        (range(0, PAGE), Some(0)),
        (range(0x3000, PAGE), Some(0x3000)),
        (range(0x3000, 10 * PAGE), Some(0x3000)),
        (range(0x7000, 2 * PAGE), Some(0x8000)),
        (range(0x9000, PAGE), Some(0x9000)),
        (range(0xfef0_0000, 2 * PAGE), Some(0xfef0_0000)),
    ] {
        let error = memory.add_at(&kernel, refused).expect_err("refused");
        match overlapped {
            Some(gpa) => assert_eq!(error, overlaps(gpa), "{refused}"),
            None => assert!(!matches!(error, AddMemoryError::MemoryOverlaps(_)), "{refused}: {error}"),
        }
        assert_eq!(memory.make_room(refused).expect_err("refused"), error, "the same rules");
    }
    assert_eq!((memory.buffers(), kernel.account(Owner::Vm(1)).memory_bytes()), before, "nothing changed");
    let buffer = memory.allocate(&kernel, 5 * PAGE).expect("memory");
    assert_eq!(buffer, pages(11, 5), "a buffer stays clear of what was added, with a page between");
}

#[test]
fn i7_memory_at_an_address_is_charged_and_comes_back() {
    let kernel = kernel_with(16 << 20, OwnerLimits { memory_bytes: 4 * PAGE, ..LIMITS });
    let account = kernel.account(Owner::Vm(1));
    let before = held(&kernel, &account);
    let mut memory = memory_of(&kernel, 1);
    memory.add_at(&kernel, pages(16, 3)).expect("within");
    let room = memory.make_room(pages(32, 1)).expect("within");
    assert!(matches!(memory.add_at(&kernel, pages(64, 1)), Err(AddMemoryError::LimitReached(_))));
    assert!(matches!(memory.make_room(pages(64, 1)), Err(AddMemoryError::LimitReached(_))));
    drop(room);
    memory.add_at(&kernel, pages(32, 1)).expect("room that was given up is vacant and paid back");
    assert_eq!(memory.free_all(&kernel), 4 * PAGE);
    assert_eq!(held(&kernel, &account), before);
    let mut large = memory_of(&kernel_with(16 << 20, LIMITS), 1);
    assert!(matches!(
        large.add_at(&kernel_with(4 << 20, LIMITS), pages(0, 4096)),
        Err(AddMemoryError::OutOfMemory(_))
    ));
}

#[test]
fn a_range_crosses_from_one_region_into_the_next_where_they_meet() {
    let kernel = kernel();
    let mut tenant = Tenant::new(&kernel, 1, 48);
    for range in [pages(16, 1), pages(17, 2), pages(19, 1)] {
        tenant.memory.add_at(&kernel, range).expect("vacant");
    }
    let bytes: Vec<u8> = (0..4 * PAGE).map(|n| (n % 251) as u8).collect();
    tenant.cpu_writes(Gpa::new(16 * PAGE), &bytes);
    assert_eq!(tenant.cpu_reads(Gpa::new(16 * PAGE), bytes.len()), bytes);
    let iova = tenant.dma_map(gpa_range(Gpa::new(16 * PAGE), 100, 3 * PAGE), Direction::Bidirectional);
    assert_eq!(
        tenant.device_reads(iova, 3 * PAGE as usize).expect("mapped"),
        bytes[100..][..3 * PAGE as usize]
    );
    tenant.map(1 << 30, Gpa::new(16 * PAGE), 4);
    assert_eq!(tenant.device_reads(iova_range(iova, 1).base(), 1).expect("mapped"), bytes[100..101]);
    for (beyond, gpa) in [(pages(15, 2), 15), (pages(16, 5), 20)] {
        let error = tenant.domain.dma_map(&kernel, &tenant.memory, dma_map(beyond, Direction::ToDevice), NOW);
        assert_eq!(error, Err(DmaMapError::NotOwned(NotOwned { gpa: Gpa::new(gpa * PAGE) })));
    }
}

/// While memory is leaving, nothing there is mapped in any way; what lies beside it is, and after an abort everything is.
fn check_leaving(protection: Protection) {
    let kernel = kernel();
    let mut tenant = Tenant::with(&kernel, 1, DomainOptions::new(protection));
    for range in [pages(16, 4), pages(20, 4)] {
        tenant.memory.add_at(&kernel, range).expect("vacant");
        if tenant.domain.is_passthrough() {
            tenant.domain.open_direct(&kernel, &tenant.memory, range).expect("open");
        }
    }
    // In shared and persistent domains the page is open already.
    let held = tenant.dma_map(pages(19, 1), Direction::ToDevice);
    let leaving = tenant.memory.begin_leaving(&kernel, pages(19, 2)).expect("owned");
    let refused = |gpa: u64| MemoryLeaving { gpa: Gpa::new(gpa * PAGE) };
    for (range, gpa) in [(pages(19, 1), 19), (pages(18, 2), 19), (pages(20, 2), 20)] {
        let request = dma_map(range, Direction::ToDevice);
        let error = tenant.domain.dma_map(&kernel, &tenant.memory, request, NOW);
        assert_eq!(error, Err(DmaMapError::MemoryLeaving(refused(gpa))), "{protection:?} {range}");
        let elements = [pages(22, 1), range];
        let error = tenant.domain.dma_map_sg(&kernel, &tenant.memory, &elements, request, NOW);
        assert_eq!(error, Err(DmaMapError::MemoryLeaving(refused(gpa))), "{protection:?} {range}");
        let request = iommu_kernel::DmaMap::coherent(range, iommu_types::RequestId(1));
        let error = tenant.domain.dma_map(&kernel, &tenant.memory, request, NOW);
        assert_eq!(error, Err(DmaMapError::MemoryLeaving(refused(gpa))), "{protection:?} {range}");
        if matches!(protection, Protection::Strict | Protection::Deferred(_)) {
            let request = fixed(1 << 30, range.base(), range.pages_touched());
            let error = tenant.domain.map(&kernel, &tenant.memory, request, NOW);
            assert_eq!(error, Err(MapError::MemoryLeaving(refused(gpa))), "{protection:?} {range}");
        }
    }
    tenant.dma_map(pages(16, 3), Direction::ToDevice);
    tenant.dma_map(pages(21, 3), Direction::ToDevice);
    tenant.device_reads(held, 8).expect("what is mapped works on");
    tenant.cpu_writes(Gpa::new(19 * PAGE), b"the CPU as well");
    tenant.memory.abort_leaving(&kernel, leaving);
    tenant.dma_map(pages(19, 2), Direction::ToDevice);
    tenant.leave();
}

#[test]
fn what_is_leaving_is_not_mapped_in_any_mode_and_its_neighbours_are() {
    for protection in ALL_MODES {
        check_leaving(protection);
    }
}

#[test]
fn i9_two_revocations_that_overlap_do_not_both_begin() {
    let kernel = kernel();
    let mut memory = memory_of(&kernel, 1);
    memory.add_at(&kernel, pages(16, 4)).expect("vacant");
    memory.add_at(&kernel, pages(20, 4)).expect("vacant");
    let first = memory.begin_leaving(&kernel, pages(18, 3)).expect("across two regions");
    for (overlapping, gpa) in [(pages(18, 1), 18), (pages(16, 8), 18), (pages(20, 2), 20), (pages(17, 2), 18)]
    {
        let error = memory.begin_leaving(&kernel, overlapping).expect_err("leaving already");
        assert_eq!(error, TakeMemoryError::MemoryLeaving(MemoryLeaving { gpa: Gpa::new(gpa * PAGE) }));
    }
    let second = memory.begin_leaving(&kernel, pages(21, 1)).expect("beside it");
    assert_eq!(memory.mappable(), [pages(16, 2), pages(22, 2)]);
    let leaving = FreeError::MemoryLeaving(MemoryLeaving { gpa: Gpa::new(18 * PAGE) });
    assert_eq!(memory.free(&kernel, Gpa::new(16 * PAGE)), Err(leaving));
    for unowned in [pages(15, 2), pages(22, 3), pages(40, 1)] {
        assert!(matches!(memory.begin_leaving(&kernel, unowned), Err(TakeMemoryError::NotOwned(_))));
    }
    let part = gpa_range(Gpa::new(16 * PAGE), 0, 100);
    assert!(matches!(memory.begin_leaving(&kernel, part), Err(TakeMemoryError::Unaligned(_))));
    memory.abort_leaving(&kernel, second);
    drop(first);
    let again = memory.begin_leaving(&kernel, pages(16, 8)).expect("a ticket that is lost is aborted");
    assert_eq!(memory.finish_leaving(&kernel, again).expect("no pins").free(), pages(16, 8));
    assert_eq!(memory.buffers(), []);
}

#[test]
fn i9_memory_leaves_without_pins_only_and_the_rest_of_its_region_stays() {
    let kernel = kernel();
    let mut tenant = Tenant::new(&kernel, 1, 48);
    tenant.memory.add_at(&kernel, pages(16, 8)).expect("vacant");
    fill(&kernel, &tenant.memory, pages(16, 8), 0xaa);
    let iova = tenant.dma_map(pages(19, 1), Direction::Bidirectional);
    let leaving = tenant.memory.begin_leaving(&kernel, pages(18, 4)).expect("owned");
    assert_eq!(tenant.memory.pins(&kernel, &leaving), 1);
    let not_left = tenant.memory.finish_leaving(&kernel, leaving).expect_err("pinned");
    assert_eq!(not_left.error, TakeMemoryError::StillMapped(StillMapped { gpa: Gpa::new(19 * PAGE) }));
    assert_eq!(tenant.memory.buffers(), [pages(16, 8)], "nothing changed");
    tenant.dma_unmap(iova, PAGE, Direction::Bidirectional);
    assert_eq!(tenant.memory.pins(&kernel, &not_left.leaving), 0);
    let free = kernel.free_bytes();
    let left = tenant.memory.finish_leaving(&kernel, not_left.leaving).expect("no pins");
    assert_eq!(tenant.memory.buffers(), [pages(16, 2), pages(22, 2)]);
    for gone in 18..22 {
        let error = read(&kernel, &tenant.memory, pages(gone, 1)).expect_err("out of the map");
        assert_eq!(error, MemoryError::NotOwned(NotOwned { gpa: Gpa::new(gone * PAGE) }));
    }
    for stays in [pages(16, 2), pages(22, 2)] {
        assert!(tenant.cpu_reads(stays.base(), 2 * PAGE as usize).iter().all(|byte| *byte == 0xaa));
    }
    assert_eq!((kernel.free_bytes(), tenant.account.memory_bytes()), (free, 8 * PAGE), "still paid for");
    // Lost on the way, it is freed all the same.
    drop(left);
    assert_eq!((kernel.free_bytes(), tenant.account.memory_bytes()), (free + 4 * PAGE, 4 * PAGE));
    tenant.memory.add_at(&kernel, pages(18, 4)).expect("vacant again");
    assert!(tenant.cpu_reads(Gpa::new(18 * PAGE), 4 * PAGE as usize).iter().all(|byte| *byte == 0), "wiped");
    tenant.leave();
}

#[test]
fn i9_memory_that_moves_to_another_owner_is_wiped_and_paid_for_once() {
    let kernel = kernel_with(16 << 20, OwnerLimits { memory_bytes: 8 * PAGE, ..LIMITS });
    let (giver, receiver) = (kernel.account(Owner::Vm(1)), kernel.account(Owner::Vm(2)));
    let (mut from, mut to) = (memory_of(&kernel, 1), memory_of(&kernel, 2));
    from.add_at(&kernel, pages(16, 8)).expect("vacant");
    to.add_at(&kernel, pages(16, 6)).expect("vacant");
    fill(&kernel, &from, pages(16, 8), 0xaa);
    // What the receiver refuses, it refuses before anything leaves.
    assert!(matches!(to.make_room(pages(20, 2)), Err(AddMemoryError::MemoryOverlaps(_))));
    assert!(matches!(to.make_room(pages(32, 3)), Err(AddMemoryError::LimitReached(_))));
    let room = to.make_room(pages(32, 2)).expect("vacant");
    let left = take(&kernel, &mut from, pages(19, 2));
    let frames = left.range();
    let arrived = left.transfer(room);
    assert_eq!((giver.memory_bytes(), receiver.memory_bytes()), (6 * PAGE, 8 * PAGE));
    assert!(read(&kernel, &to, pages(32, 2)).is_err(), "not before it is received");
    assert_eq!((frames, to.receive(arrived)), (pages(19, 2), pages(32, 2)));
    assert!(read(&kernel, &to, pages(32, 2)).expect("received").iter().all(|byte| *byte == 0), "wiped");
    assert!(read(&kernel, &from, pages(20, 1)).is_err());
    // Lost on the way, it belongs to nobody.
    drop(to.free(&kernel, Gpa::new(16 * PAGE)));
    let room = to.make_room(pages(64, 2)).expect("vacant");
    let left = take(&kernel, &mut from, pages(16, 2));
    drop(left.transfer(room));
    assert_eq!((giver.memory_bytes(), receiver.memory_bytes()), (4 * PAGE, 2 * PAGE));
    to.add_at(&kernel, pages(64, 2)).expect("the room is vacant again");
    let free = kernel.free_bytes();
    assert_eq!((from.free_all(&kernel), to.free_all(&kernel)), (4 * PAGE, 4 * PAGE));
    assert_eq!(kernel.free_bytes(), free + 8 * PAGE);
}

#[test]
fn all_memory_is_freed_with_what_is_leaving_and_its_ticket_is_void() {
    let kernel = kernel();
    let account = kernel.account(Owner::Vm(1));
    let before = held(&kernel, &account);
    let mut memory = memory_of(&kernel, 1);
    memory.add_at(&kernel, pages(16, 8)).expect("vacant");
    let leaving = memory.begin_leaving(&kernel, pages(18, 2)).expect("owned");
    let left = take(&kernel, &mut memory, pages(22, 2));
    assert_eq!(memory.free_all(&kernel), 6 * PAGE);
    memory.add_at(&kernel, pages(16, 8)).expect("vacant");
    assert_eq!(memory.mappable(), [pages(16, 8)], "nothing of it is leaving");
    assert_eq!(memory.pins(&kernel, &leaving), 0);
    let not_left = memory.finish_leaving(&kernel, leaving).expect_err("void");
    assert!(matches!(not_left.error, TakeMemoryError::NotOwned(_)));
    memory.abort_leaving(&kernel, not_left.leaving);
    left.free();
    memory.free_all(&kernel);
    assert_eq!(held(&kernel, &Arc::clone(&account)), before);
}
