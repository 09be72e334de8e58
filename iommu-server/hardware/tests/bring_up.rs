//! A bare machine is brought up through its registers, as an operating system does it: queue, tables, faults, interrupts, events.

mod machine;

use iommu_hardware::dma::{Done, Run, Transfer};
use iommu_hardware::vtd::spec::invalidation::{Descriptor, StatusWrite};
use iommu_hardware::vtd::spec::irte::{InterruptAddress, Irte};
use iommu_hardware::vtd::spec::registers::{Cap, Ecap, Fsts, Gcmd, Gsts, Irta, offset};
use iommu_hardware::vtd::{EventMessage, WriteEffect};
use iommu_types::{AccessWidth, Capabilities, FaultReason, Invalidation, Iova};
use machine::{DEVICE, INTERRUPTS, Machine, QUEUE, ROOT, RW, STATUS};

const FAULT_EVENT: EventMessage = EventMessage { address: 0x1_fee0_1000, data: 0x41 };
const WAIT_EVENT: EventMessage = EventMessage { address: 0xfee0_2000, data: 0x42 };

fn program_event(machine: &Machine, control: u32, event: EventMessage) {
    machine.write(control + 4, event.data);
    machine.write(control + 8, event.address as u32);
    machine.write(control + 12, (event.address >> 32) as u32);
    machine.write(control, 0);
}

#[test]
fn an_operating_system_brings_the_unit_up_and_sees_everything_it_should() {
    let machine = Machine::new(Capabilities::FULL);
    assert_eq!(machine.read(offset::VER), 0x50);
    let (cap, ecap) =
        (Cap::from_bits(machine.read_wide(offset::CAP)), Ecap::from_bits(machine.read_wide(offset::ECAP)));
    assert_eq!((cap.widths(), cap.max_guest_width(), cap.fault_record_count()), (0b1110, 56, 7));
    assert!(ecap.queued_invalidation() && ecap.interrupt_remapping() && ecap.pass_through());

    // While translation is off DMA passes unremapped.
    let buffer = machine.frame();
    machine.fill(buffer, 0x5a);
    assert_eq!(machine.read_byte(buffer.get()), Ok(0x5a));

    program_event(&machine, offset::FECTL, FAULT_EVENT);
    program_event(&machine, offset::IECTL, WAIT_EVENT);

    // Queue, root table, invalidations, translation.
    machine.queue_on();
    assert!(Gsts::from_bits(machine.read(offset::GSTS)).queued_invalidation());
    machine.set_root(ROOT.get());
    assert!(Gsts::from_bits(machine.read(offset::GSTS)).set_root_table());
    machine.invalidate(Invalidation::ContextGlobal);
    machine.invalidate(Invalidation::IotlbGlobal);
    let table = machine.table(4);
    machine.attach(DEVICE, machine::DOMAIN, table);
    machine.map(table, 0x7000, buffer, RW);
    machine.command(Gcmd::new().with_translation(true));
    assert!(Gsts::from_bits(machine.read(offset::GSTS)).translation());
    assert_eq!(machine.read_byte(0x7123), Ok(0x5a));

    // A refused DMA: record, status, event.
    assert_eq!(machine.events.take(), []);
    let refused = machine.read_byte(0x8000).expect_err("nothing is mapped there");
    assert_eq!(refused.reason, Ok(FaultReason::READ_DENIED));
    assert_eq!(machine.events.take(), [FAULT_EVENT]);
    assert!(Fsts::from_bits(machine.read(offset::FSTS)).pending());
    let record = machine.fault_record(0);
    assert!(record.fault());
    assert_eq!((record.source_id(), record.fault_page(), record.reason()), (DEVICE, 8, 6));
    machine.clear_fault(0);
    assert_eq!(machine.read(offset::FSTS), 0);

    // A wait descriptor with an interrupt.
    machine.submit(&[Descriptor::Wait { interrupt: true, status_write: None, fence: false }]);
    machine.settle();
    assert_eq!(machine.events.take(), [WAIT_EVENT]);
    assert_eq!(machine.read(offset::ICS), 1);
    machine.write(offset::ICS, 1);
    assert_eq!(machine.read(offset::ICS), 0);

    // Interrupts: compatibility format while remapping is off, then through the table.
    let message = |handle| u64::from(InterruptAddress::remappable_request(handle, false).into_bits());
    let mut port = machine.port(DEVICE);
    let as_is = port.interrupt(0xfee0_3000, 0x77).expect("remapping is off");
    assert_eq!((as_is.vector, as_is.destination, as_is.index), (0x77, 3, None));
    machine.store_wide(INTERRUPTS, Irte::remapped(0x31, 5, Some(DEVICE)).into_bits());
    let register = Irta::new().with_frame(INTERRUPTS.page_number()).with_extended_mode(true).with_size(7);
    machine.write_wide(offset::IRTA, register.into_bits());
    machine.command(Gcmd::new().with_set_interrupt_table(true));
    machine.invalidate(Invalidation::InterruptGlobal);
    machine.command(Gcmd::new().with_interrupt_remapping(true));
    let status = Gsts::from_bits(machine.read(offset::GSTS));
    assert!(status.interrupt_remapping() && status.set_interrupt_table() && status.translation());
    let done = Run::new(&mut port).execute(Iova::new(message(0)), None, Transfer::Write(&[0; 4]));
    let Ok(Done::Interrupt(delivered)) = done else { panic!("an interrupt, not {done:?}") };
    assert_eq!((delivered.vector, delivered.destination, delivered.index), (0x31, 5, Some(0)));
    let refused = port.interrupt(message(1), 0).expect_err("entry 1 is not present");
    assert_eq!((refused.reason, refused.index), (FaultReason::IR_NOT_PRESENT, Some(1)));
    assert_eq!(machine.bare.unit().counters().interrupts, 2);
}

#[test]
fn registers_take_aligned_accesses_of_4_or_8_bytes_inside_the_page_only() {
    let machine = Machine::new(Capabilities::FULL);
    let registers = machine.bare.registers();
    use AccessWidth::{Bytes1, Bytes2, Bytes4, Bytes8};
    for (offset, width, possible) in [
        (0x8, Bytes8, true),
        (0x4, Bytes4, true),
        (0x4, Bytes8, false),
        (0x2, Bytes4, false),
        (0x8, Bytes1, false),
        (0x8, Bytes2, false),
        (0xffc, Bytes4, true),
        (0xff8, Bytes8, true),
        (0x1000, Bytes4, false),
        (u64::MAX - 3, Bytes4, false),
        (1 << 32, Bytes4, false),
    ] {
        assert_eq!(registers.read(offset, width).is_ok(), possible, "read of {width} at {offset:#x}");
        assert_eq!(registers.write(offset, width, 0).is_ok(), possible, "write of {width} at {offset:#x}");
    }
}

#[test]
fn reserved_offsets_read_as_zero_and_take_no_writes() {
    let machine = Machine::new(Capabilities::FULL);
    for reserved in [0x058, 0x064, 0x0c0, 0x0dc, 0x100, 0x400, 0xe00, offset::GCMD] {
        machine.write(reserved, !Gcmd::new().with_translation(true).into_bits());
        if reserved != offset::GCMD {
            assert_eq!(machine.read(reserved), 0, "at {reserved:#x}");
        }
    }
}

#[test]
fn root_and_interrupt_tables_act_only_when_they_are_set() {
    let (machine, table) = Machine::with_domain(Capabilities::FULL);
    machine.map_new(table, 0x1000, RW);
    assert!(machine.read_byte(0x1000).is_ok());
    // Another root table is written but not set: after an invalidation the walk still finds the old one.
    machine.write_wide(offset::RTADDR, machine.frame().get());
    machine.invalidate(Invalidation::ContextGlobal);
    assert!(machine.read_byte(0x1000).is_ok());
    machine.command(Gcmd::new().with_set_root_table(true));
    machine.invalidate(Invalidation::ContextGlobal);
    let refused = machine.read_byte(0x1000).expect_err("the new root table is empty");
    assert_eq!(refused.reason, Ok(FaultReason::ROOT_NOT_PRESENT));
}

#[test]
fn enhanced_set_root_forgets_everything_by_itself() {
    for enhanced in [false, true] {
        let capabilities = Capabilities { enhanced_set_root: enhanced, ..Capabilities::FULL };
        let (machine, table) = Machine::with_domain(capabilities);
        machine.map_new(table, 0x1000, RW);
        assert!(machine.read_byte(0x1000).is_ok());
        machine.set_root(machine.frame().get());
        assert_eq!(machine.read_byte(0x1000).is_err(), enhanced);
        assert_eq!(machine.bare.unit().iotlb_entries().is_empty(), enhanced);
    }
}

#[test]
fn without_the_capability_a_command_does_nothing() {
    let capabilities = Capabilities {
        queued_invalidation: false,
        interrupt_remapping: false,
        extended_interrupt_mode: false,
        ..Capabilities::FULL
    };
    let machine = Machine::new(capabilities);
    machine.command(Gcmd::new().with_queued_invalidation(true));
    machine.command(Gcmd::new().with_interrupt_remapping(true));
    machine.command(Gcmd::new().with_set_interrupt_table(true));
    machine.command(Gcmd::new().with_compatibility_interrupts(true));
    assert_eq!(machine.read(offset::GSTS), 0);
}

#[test]
fn the_queue_goes_on_after_it_was_switched_off_and_on() {
    let (machine, _) = Machine::with_domain(Capabilities::FULL);
    machine.invalidate(Invalidation::IotlbGlobal);
    assert_eq!(machine.read_wide(offset::IQH), 32);
    machine.command_off(Gcmd::new().with_queued_invalidation(true));
    assert!(!Gsts::from_bits(machine.read(offset::GSTS)).queued_invalidation());
    assert_eq!(machine.read_wide(offset::IQH), 0);
    machine.queue_on();
    machine.invalidate(Invalidation::IotlbGlobal);
}

#[test]
fn one_register_write_processes_a_bounded_number_of_descriptors() {
    let (machine, _) = Machine::with_domain(Capabilities::FULL);
    let (wait, number) = machine.wait_descriptor();
    let mut descriptors = vec![Descriptor::Invalidate(Invalidation::IotlbGlobal); 150];
    descriptors.push(wait);
    assert_eq!(machine.submit(&descriptors), WriteEffect::Unfinished);
    let per_step = u64::from(iommu_hardware::vtd::QUEUE_DESCRIPTORS_PER_STEP);
    assert_eq!(machine.read_wide(offset::IQH), 16 * per_step);
    assert_ne!(machine.load(STATUS), number);
    machine.settle();
    assert_eq!(machine.read_wide(offset::IQH), 151 * 16);
    assert_eq!(machine.load(STATUS), number);
}

/// Where the queue stops and why; the head stays there, and goes on once the descriptor is mended and IQE cleared.
fn check_queue_error(bad: u128, error: u64) {
    let (machine, _) = Machine::with_domain(Capabilities::FULL);
    program_event(&machine, offset::FECTL, FAULT_EVENT);
    let (wait, number) = machine.wait_descriptor();
    machine.submit_raw(&[Descriptor::Invalidate(Invalidation::IotlbGlobal).encode(), bad, wait.encode()]);
    machine.settle();
    assert!(Fsts::from_bits(machine.read(offset::FSTS)).queue_error(), "{bad:#x}");
    assert_eq!(machine.read_wide(offset::IQERCD) & 0xf, error, "{bad:#x}");
    assert_eq!(machine.read_wide(offset::IQH), 16, "the head stays at {bad:#x}");
    assert_eq!(machine.events.take(), [FAULT_EVENT]);
    // IQE cleared without mending: the same again.
    machine.write(offset::FSTS, Fsts::new().with_queue_error(true).into_bits());
    assert_eq!(machine.read_wide(offset::IQERCD) & 0xf, error);
    assert_ne!(machine.load(STATUS), number);
    machine.store_wide(iommu_types::Hpa::new(QUEUE.get() + 16), wait.encode());
    machine.write(offset::FSTS, Fsts::new().with_queue_error(true).into_bits());
    machine.settle();
    assert_eq!(machine.read(offset::FSTS), 0);
    assert_eq!(machine.read_wide(offset::IQERCD), 0);
    assert_eq!(machine.load(STATUS), number);
}

#[test]
fn at_a_bad_descriptor_the_head_stays_until_iqe_is_cleared() {
    let iotlb_global = Descriptor::Invalidate(Invalidation::IotlbGlobal).encode();
    for (bad, error) in [
        (0, 3),                      // type 0
        (3, 3),                      // device TLB, with DT=0
        (6, 3),                      // PASID IOTLB, in legacy mode
        (1 << 9 | 2, 3),             // type 0x12
        (2, 4),                      // IOTLB of granularity 0
        (1, 4),                      // context cache of granularity 0
        (iotlb_global | 1 << 8, 4),  // reserved bits, low
        (iotlb_global | 1 << 32, 4), // and middle
        (2 | 3 << 4 | 19 << 64, 4),  // AM beyond MAMV
        (5 | 1 << 7, 4),             // PD without page requests
        (5 | 1 << 64, 4),            // status address
    ] {
        check_queue_error(bad, error);
    }
}

#[test]
fn a_tail_beyond_the_queue_stops_it() {
    let (machine, _) = Machine::with_domain(Capabilities::FULL);
    machine.write_wide(offset::IQT, 0x1000);
    machine.settle();
    assert_eq!(machine.read_wide(offset::IQERCD) & 0xf, 1);
    assert_eq!(machine.read_wide(offset::IQH), 0);
}

#[test]
fn a_queue_without_memory_stops_at_the_fetch() {
    let machine = Machine::new(Capabilities::FULL);
    machine.write_wide(offset::IQA, 1 << 40);
    machine.command(Gcmd::new().with_queued_invalidation(true));
    machine.write_wide(offset::IQT, 0x10);
    machine.settle();
    assert_eq!(machine.read_wide(offset::IQERCD) & 0xf, 2);
}

#[test]
fn wide_descriptors_take_the_same_types_with_a_zero_upper_half() {
    let machine = Machine::new(Capabilities::FULL);
    machine.write_wide(offset::IQA, QUEUE.get() | 1 << 11);
    machine.command(Gcmd::new().with_queued_invalidation(true));
    let status = StatusWrite { at: STATUS, data: 9 };
    let wait = Descriptor::Wait { interrupt: false, status_write: Some(status), fence: true };
    let at = |offset| iommu_types::Hpa::new(QUEUE.get() + offset);
    machine.store_wide(at(0), Descriptor::Invalidate(Invalidation::ContextGlobal).encode());
    machine.store_wide(at(32), wait.encode());
    machine.write_wide(offset::IQT, 64);
    machine.settle();
    assert_eq!((machine.load(STATUS), machine.read_wide(offset::IQH)), (9, 64));
    // A tail in the middle of a descriptor.
    machine.write_wide(offset::IQT, 80);
    assert_eq!(machine.read_wide(offset::IQERCD) & 0xf, 6);
    machine.write_wide(offset::IQT, 96);
    machine.store_wide(at(64), wait.encode());
    machine.store_wide(at(80), 1);
    machine.write(offset::FSTS, Fsts::new().with_queue_error(true).into_bits());
    assert_eq!(machine.read_wide(offset::IQERCD) & 0xf, 4, "the upper half must be zero");
}

#[test]
fn the_queue_wraps_around_its_end() {
    let (machine, _) = Machine::with_domain(Capabilities::FULL);
    for _ in 0..300 {
        machine.invalidate(Invalidation::IotlbDomain(machine::DOMAIN));
    }
    assert_eq!(machine.read_wide(offset::IQH), 600 * 16 % 4096);
}
