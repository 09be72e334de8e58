//! Invalidations against DMA in flight (I1, I4): what is answered when, with a DMA that is held inside its copy.

mod machine;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use iommu_hardware::dma::{Run, Transfer};
use iommu_hardware::drain::PendingDrain;
use iommu_hardware::vtd::spec::invalidation::Descriptor;
use iommu_hardware::vtd::spec::registers::{Ccmd, Gcmd, Gsts, Iotlb, offset};
use iommu_hardware::vtd::{Port, QueueProgress, Request, WriteEffect};
use iommu_types::{
    Access, AddressType, Capabilities, DomainId, FunctionMask, Invalidation, Iova, IovaRange, Permissions,
    SourceId,
};
use machine::{DEVICE, DOMAIN, Machine, RW, STATUS};

const OTHER_DEVICE: SourceId = SourceId::new(0x0408);
const OTHER_DOMAIN: DomainId = DomainId::new(9);
const PAGE: u64 = 0x5000;

/// A DMA that has its address and is held inside its copy until it is released.
struct HeldDma {
    release: Sender<()>,
    thread: JoinHandle<()>,
}

impl HeldDma {
    fn begin(mut port: Port, iova: u64) -> Self {
        let (release, released): (Sender<()>, Receiver<()>) = channel();
        let (entered, inside) = channel();
        let thread = std::thread::spawn(move || {
            let request = Request {
                iova: Iova::new(iova),
                size_bytes: 8,
                access: Access::Read,
                pasid: None,
                address_type: AddressType::Untranslated,
            };
            let held = port.burst().translate(request, |_lent| {
                entered.send(()).expect("the test waits for it");
                released.recv().expect("the test releases it");
            });
            held.expect("the page is mapped");
        });
        inside.recv().expect("the DMA reaches its copy");
        Self { release, thread }
    }
    fn finish(self) {
        self.release.send(()).expect("the DMA waits for it");
        self.thread.join().expect("the DMA ends well");
    }
}

fn two_domains() -> Machine {
    let (machine, table) = Machine::with_domain(Capabilities::FULL);
    machine.map_new(table, PAGE, RW);
    let other = machine.table(4);
    machine.attach(OTHER_DEVICE, OTHER_DOMAIN, other);
    machine.map_new(other, PAGE, RW);
    machine
}

fn page_range() -> IovaRange {
    IovaRange::new(Iova::new(PAGE), 4096).expect("a page")
}

fn is_pending(drain: PendingDrain) -> (bool, PendingDrain) {
    match drain.try_complete() {
        Ok(_drained) => (false, PendingDrain::none()),
        Err(pending) => (true, pending),
    }
}

#[test]
fn i1_an_unmap_stays_unanswered_while_a_dma_is_inside_its_copy() {
    let pages = Invalidation::IotlbPages { domain_id: DOMAIN, range: page_range(), leaf_only: true };
    let device = Invalidation::ContextDevice {
        domain_id: DOMAIN,
        source_id: DEVICE,
        function_mask: FunctionMask::Exact,
    };
    for invalidation in [
        pages,
        Invalidation::IotlbDomain(DOMAIN),
        Invalidation::IotlbGlobal,
        Invalidation::ContextDomain(DOMAIN),
        Invalidation::ContextGlobal,
        device,
        Invalidation::InterruptGlobal,
    ] {
        let machine = two_domains();
        let dma = HeldDma::begin(machine.port(DEVICE), PAGE);
        let (pending, drain) = is_pending(machine.bare.unit().invalidate(invalidation));
        assert!(pending, "{invalidation:?} must wait for the DMA");
        assert_eq!(machine.bare.unit().counters().drains_waited, 1);
        dma.finish();
        let (pending, _) = is_pending(drain);
        assert!(!pending, "{invalidation:?} is drained once the DMA has ended");
    }
}

#[test]
fn i7_a_drain_of_another_domain_or_device_is_not_held_up() {
    let other_device = Invalidation::ContextDevice {
        domain_id: OTHER_DOMAIN,
        source_id: OTHER_DEVICE,
        function_mask: FunctionMask::Exact,
    };
    let pages = Invalidation::IotlbPages { domain_id: OTHER_DOMAIN, range: page_range(), leaf_only: true };
    let machine = two_domains();
    assert!(machine.read_byte_of(OTHER_DEVICE, PAGE).is_ok());
    let dma = HeldDma::begin(machine.port(DEVICE), PAGE);
    for invalidation in [
        pages,
        Invalidation::IotlbDomain(OTHER_DOMAIN),
        Invalidation::ContextDomain(OTHER_DOMAIN),
        other_device,
    ] {
        let (pending, _) = is_pending(machine.bare.unit().invalidate(invalidation));
        assert!(!pending, "{invalidation:?} has nothing to do with the DMA that is held");
    }
    dma.finish();
}

#[test]
fn i1_a_wait_descriptor_completes_only_after_the_drains_before_it() {
    let machine = two_domains();
    let dma = HeldDma::begin(machine.port(DEVICE), PAGE);
    let (wait, number) = machine.wait_descriptor();
    let invalidate = Descriptor::Invalidate(Invalidation::IotlbDomain(DOMAIN));
    assert_eq!(machine.submit(&[invalidate, wait]), WriteEffect::Unfinished);
    let QueueProgress::Draining(drain) = machine.bare.registers().run_queue() else {
        panic!("the queue waits for the DMA");
    };
    // Lent out once: a second caller has nothing to do.
    assert!(matches!(machine.bare.registers().run_queue(), QueueProgress::Idle));
    assert_ne!(machine.load(STATUS), number);
    // Whoever gives up waiting leaves the drain to the next caller, and completes nothing.
    drop(drain);
    assert_ne!(machine.load(STATUS), number);
    let QueueProgress::Draining(drain) = machine.bare.registers().run_queue() else {
        panic!("the queue still waits for the DMA");
    };
    dma.finish();
    drain.wait_blocking();
    assert_ne!(machine.load(STATUS), number, "completed by running the queue, not by the drain itself");
    machine.settle();
    assert_eq!(machine.load(STATUS), number);
}

#[test]
fn a_wait_for_another_domain_completes_while_a_dma_is_held() {
    let machine = two_domains();
    assert!(machine.read_byte_of(OTHER_DEVICE, PAGE).is_ok());
    let dma = HeldDma::begin(machine.port(DEVICE), PAGE);
    machine.invalidate(Invalidation::IotlbDomain(OTHER_DOMAIN));
    dma.finish();
}

/// A command whose status changes only when the DMA that was admitted before has ended.
fn check_command_drains(begin: fn(&Machine), is_done: fn(&Machine) -> bool) {
    let machine = two_domains();
    let dma = HeldDma::begin(machine.port(DEVICE), PAGE);
    begin(&machine);
    assert!(!is_done(&machine), "the status waits for the drain");
    assert!(matches!(machine.bare.registers().run_queue(), QueueProgress::Draining(_)));
    dma.finish();
    machine.settle();
    assert!(is_done(&machine), "the status follows the drain");
}

#[test]
fn i1_translation_off_drains_before_its_status_changes() {
    check_command_drains(
        |machine| {
            let off = machine.kept_status() & !Gcmd::new().with_translation(true).into_bits();
            machine.write(offset::GCMD, off);
        },
        |machine| !Gsts::from_bits(machine.read(offset::GSTS)).translation(),
    );
}

#[test]
fn i1_interrupt_remapping_on_drains_before_its_status_changes() {
    check_command_drains(
        |machine| {
            let on = machine.kept_status() | Gcmd::new().with_interrupt_remapping(true).into_bits();
            machine.write(offset::GCMD, on);
        },
        |machine| Gsts::from_bits(machine.read(offset::GSTS)).interrupt_remapping(),
    );
}

#[test]
fn i1_a_context_command_drains_before_icc_falls() {
    check_command_drains(
        |machine| {
            let command = Ccmd::new().with_granularity(1).with_invalidate(true);
            machine.write_wide(offset::CCMD, command.into_bits());
        },
        |machine| {
            let command = Ccmd::from_bits(machine.read_wide(offset::CCMD));
            !command.invalidate() && command.actual_granularity() == 1
        },
    );
}

#[test]
fn i1_an_iotlb_command_drains_before_ivt_falls() {
    check_command_drains(
        |machine| {
            let command = Iotlb::new().with_domain_id(DOMAIN).with_granularity(2).with_invalidate(true);
            machine.write_wide(offset::IOTLB, command.into_bits());
        },
        |machine| {
            let command = Iotlb::from_bits(machine.read_wide(offset::IOTLB));
            !command.invalidate() && command.actual_granularity() == 2
        },
    );
}

#[test]
fn i1_switching_the_queue_off_drains_what_it_took() {
    check_command_drains(
        |machine| {
            machine.submit(&[Descriptor::Invalidate(Invalidation::IotlbGlobal)]);
            let off = machine.kept_status() & !Gcmd::new().with_queued_invalidation(true).into_bits();
            machine.write(offset::GCMD, off);
        },
        |machine| !Gsts::from_bits(machine.read(offset::GSTS)).queued_invalidation(),
    );
}

/// A device that moves to another domain in the middle is still found by the drain of the new one.
#[test]
fn i1_a_device_that_changed_its_domain_is_drained_with_the_new_one() {
    let machine = two_domains();
    let table = machine.table(4);
    machine.map_new(table, PAGE, RW);
    let mut port = machine.port(DEVICE);
    let touch = Request {
        iova: Iova::new(PAGE),
        size_bytes: 1,
        access: Access::Read,
        pasid: None,
        address_type: AddressType::Untranslated,
    };
    assert!(port.burst().translate(touch, |_| ()).is_ok());
    machine.attach(DEVICE, OTHER_DOMAIN, table);
    machine.invalidate(Invalidation::ContextGlobal);
    let dma = HeldDma::begin(port, PAGE);
    let (pending, drain) =
        is_pending(machine.bare.unit().invalidate(Invalidation::IotlbDomain(OTHER_DOMAIN)));
    assert!(pending);
    let (of_old, _) = is_pending(machine.bare.unit().invalidate(Invalidation::IotlbDomain(DOMAIN)));
    assert!(!of_old, "the device has left the list of its old domain");
    dma.finish();
    assert!(!is_pending(drain).0);
}

/// Devices read a page as fast as they can while it is moved from frame to frame. After each answered invalidation, nobody
/// may see what the page held before.
#[test]
fn i4_a_fill_that_an_invalidation_overtook_is_not_served() {
    const ROUNDS: u64 = 300;
    let (machine, table) = Machine::with_domain(Capabilities::FULL);
    let frames = [machine.frame(), machine.frame()];
    let entry = machine.entry_at(table, PAGE, 1);
    let leaf = |round: u64| {
        use iommu_hardware::vtd::spec::pte::SecondStageEntry;
        let frame = frames[(round % 2) as usize];
        SecondStageEntry::leaf(frame, iommu_types::PageSize::Size4K, Permissions::READ).into_bits()
    };
    machine.store(frames[0], 0);
    machine.store(entry, leaf(0));
    let over = AtomicBool::new(false);
    let read = |port: &mut Port| {
        let request = Request {
            iova: Iova::new(PAGE),
            size_bytes: 8,
            access: Access::Read,
            pasid: None,
            address_type: AddressType::Untranslated,
        };
        port.burst().translate(request, |lent| machine.load(lent.hpa)).expect("always mapped")
    };
    std::thread::scope(|scope| {
        for _ in 0..2 {
            let mut port = machine.port(DEVICE);
            let (over, read) = (&over, &read);
            scope.spawn(move || {
                let mut newest = 0;
                while !over.load(Ordering::Relaxed) {
                    let seen = read(&mut port);
                    assert!(seen >= newest, "a page never goes back: {seen} after {newest}");
                    newest = seen;
                }
            });
        }
        let mut port = machine.port(DEVICE);
        for round in 1..=ROUNDS {
            machine.store(frames[(round % 2) as usize], round);
            machine.store(entry, leaf(round));
            let _drained =
                machine.bare.unit().invalidate_pages(DOMAIN, &[page_range()], true).wait_blocking();
            assert_eq!(read(&mut port), round, "the invalidation was answered");
        }
        over.store(true, Ordering::Relaxed);
    });
}

#[test]
fn i7_interrupts_leave_the_epoch_like_any_other_operation() {
    let machine = two_domains();
    let mut port = machine.port(DEVICE);
    let mut run = Run::new(&mut port);
    let mut byte = [0];
    run.execute(Iova::new(PAGE), None, Transfer::Read(&mut byte)).expect("the page is mapped");
    let (pending, drain) = is_pending(machine.bare.unit().invalidate(Invalidation::IotlbDomain(DOMAIN)));
    assert!(pending, "the run is in its epoch");
    for _ in 0..iommu_hardware::vtd::BURST_OPERATIONS_MAX {
        // Remapping is off, so the interrupt is delivered in compatibility format or refused; both count.
        let _ = run.execute(Iova::new(0xfee0_0000), None, Transfer::Write(&[0; 4]));
    }
    let (pending, _) = is_pending(drain);
    assert!(!pending, "a run of interrupts does not hold its epoch");
}
