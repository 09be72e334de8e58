//! The state machine of the fault log: PPF, PFO, FRI, collapse, events; and that no refused DMA goes uncounted (I6).

mod machine;

use iommu_hardware::vtd::EventMessage;
use iommu_hardware::vtd::spec::registers::{Fsts, Gcmd, Ics, Iectl, offset};
use iommu_types::{Access, Capabilities, Fault, FaultReason, SourceId};
use machine::{Machine, RW};
use proptest::prelude::*;

const EVENT: EventMessage = EventMessage { address: 0xfee0_1000, data: 0x41 };
const OVERFLOW: u32 = 1;
const PENDING: u32 = 2;

/// A unit with `records` recording registers, events unmasked unless `masked`, no device attached: every DMA faults.
fn faulting(records: u16, masked: bool) -> Machine {
    let machine = Machine::translating(Capabilities { fault_records: records, ..Capabilities::FULL });
    machine.write(offset::FEDATA, EVENT.data);
    machine.write(offset::FEADDR, EVENT.address as u32);
    if !masked {
        machine.write(offset::FECTL, 0);
    }
    machine
}

/// One step of software or of a device.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// A refused DMA of a source.
    Fault(u16),
    /// F of a record is cleared.
    ClearRecord(u32),
    ClearOverflow,
    Mask,
    Unmask,
}

use Step::{ClearOverflow, ClearRecord, Fault as Refused, Mask, Unmask};

/// After each step: FSTS (FRI in bits 15:8), and the event messages that the step sent.
fn check(records: u16, masked: bool, steps: &[(Step, u32, usize)]) {
    let machine = faulting(records, masked);
    for (index, (step, status, events)) in steps.iter().enumerate() {
        match *step {
            Step::Fault(source) => {
                assert!(machine.read_byte_of(SourceId::new(source), 0x1000).is_err());
            }
            Step::ClearRecord(index) => machine.clear_fault(index),
            Step::ClearOverflow => drop(machine.write(offset::FSTS, OVERFLOW)),
            Step::Mask => drop(machine.write(offset::FECTL, 1 << 31)),
            Step::Unmask => drop(machine.write(offset::FECTL, 0)),
        }
        assert_eq!(machine.read(offset::FSTS), *status, "FSTS after step {index}, {step:?}");
        assert_eq!(machine.events.take(), vec![EVENT; *events], "events of step {index}, {step:?}");
    }
}

const fn fri(index: u32) -> u32 {
    index << 8
}

#[test]
fn the_first_fault_raises_an_event_and_later_ones_do_not() {
    check(4, false, &[(Refused(1), PENDING, 1), (Refused(2), PENDING, 0), (Refused(3), PENDING, 0)]);
}

#[test]
fn fri_changes_only_when_ppf_rises() {
    check(
        4,
        false,
        &[
            (Refused(1), PENDING, 1),
            (Refused(2), PENDING, 0),
            (ClearRecord(0), PENDING, 0),
            (ClearRecord(1), 0, 0),
            (Refused(3), PENDING | fri(2), 1),
            (Refused(4), PENDING | fri(2), 0),
            (ClearRecord(2), PENDING | fri(2), 0),
            (Refused(5), PENDING | fri(2), 0),
            (ClearRecord(3), PENDING | fri(2), 0),
            (ClearRecord(0), fri(2), 0),
            (Refused(6), PENDING | fri(1), 1),
        ],
    );
}

#[test]
fn a_fault_without_room_sets_overflow_and_everything_is_dropped_until_it_is_cleared() {
    check(
        2,
        false,
        &[
            (Refused(1), PENDING, 1),
            (Refused(2), PENDING, 0),
            (Refused(3), PENDING | OVERFLOW, 0),
            (ClearRecord(0), PENDING | OVERFLOW, 0),
            (Refused(4), PENDING | OVERFLOW, 0),
            (ClearRecord(1), OVERFLOW, 0),
            // Dropped although there is room: PFO is set.
            (Refused(5), OVERFLOW, 0),
            (ClearOverflow, 0, 0),
            (Refused(6), PENDING, 1),
        ],
    );
}

#[test]
fn a_pending_record_collapses_later_faults_of_its_source() {
    check(
        2,
        false,
        &[
            (Refused(1), PENDING, 1),
            (Refused(1), PENDING, 0),
            (Refused(1), PENDING, 0),
            (Refused(2), PENDING, 0),
            (Refused(1), PENDING, 0),
            (ClearRecord(0), PENDING, 0),
            (Refused(1), PENDING, 0),
            (Refused(3), PENDING | OVERFLOW, 0),
        ],
    );
}

#[test]
fn a_masked_event_is_sent_when_it_is_unmasked() {
    check(
        4,
        true,
        &[
            (Refused(1), PENDING, 0),
            (Refused(2), PENDING, 0),
            (Unmask, PENDING, 1),
            (Unmask, PENDING, 0),
            (Mask, PENDING, 0),
            (ClearRecord(0), PENDING, 0),
            (ClearRecord(1), 0, 0),
            (Refused(3), PENDING | fri(2), 0),
            // Everything dealt with before it is unmasked: nothing is left to say.
            (ClearRecord(2), fri(2), 0),
            (Unmask, fri(2), 0),
        ],
    );
}

#[test]
fn ip_is_up_while_a_masked_event_waits() {
    let machine = faulting(4, true);
    let control = || Iectl::from_bits(machine.read(offset::FECTL));
    assert!(control().masked() && !control().pending());
    assert!(machine.read_byte(0x1000).is_err());
    assert!(control().pending());
    machine.clear_fault(0);
    assert!(!control().pending());
}

#[test]
fn a_queue_error_shares_the_fault_event() {
    let machine = faulting(4, false);
    assert!(machine.read_byte(0x1000).is_err());
    assert_eq!(machine.events.take(), [EVENT]);
    machine.submit_raw(&[0]);
    let status = Fsts::from_bits(machine.read(offset::FSTS));
    assert!(status.queue_error() && status.pending());
    assert_eq!(machine.events.take(), [], "a status bit was set before");
    machine.clear_fault(0);
    machine.write_wide(offset::IQT, 0);
    machine.write(offset::FSTS, Fsts::new().with_queue_error(true).into_bits());
    assert_eq!(machine.read(offset::FSTS), 0);
    machine.write_wide(offset::IQT, 0x10);
    assert_eq!(machine.events.take(), [EVENT]);
}

#[test]
fn a_second_completion_interrupt_waits_for_iwc_to_be_cleared() {
    use iommu_hardware::vtd::spec::invalidation::Descriptor;
    let machine = Machine::translating(Capabilities::FULL);
    machine.write(offset::IECTL, 0);
    let wait = Descriptor::Wait { interrupt: true, status_write: None, fence: false };
    machine.submit(&[wait, wait]);
    assert_eq!(machine.events.take().len(), 1);
    assert!(Ics::from_bits(machine.read(offset::ICS)).wait_complete());
    machine.submit(&[wait]);
    assert_eq!(machine.events.take().len(), 0);
    machine.write(offset::ICS, 1);
    machine.submit(&[wait]);
    assert_eq!(machine.events.take().len(), 1);
    // Masked: IP stays up until IWC is cleared.
    machine.write(offset::ICS, 1);
    machine.write(offset::IECTL, 1 << 31);
    machine.submit(&[wait]);
    assert!(Iectl::from_bits(machine.read(offset::IECTL)).pending());
    machine.write(offset::ICS, 1);
    assert!(!Iectl::from_bits(machine.read(offset::IECTL)).pending());
    assert_eq!(machine.events.take().len(), 0);
}

#[test]
fn the_write_index_starts_over_when_translation_and_remapping_are_off() {
    let machine = faulting(4, false);
    assert!(machine.read_byte(0x1000).is_err());
    machine.clear_fault(0);
    machine.command_off(Gcmd::new().with_translation(true));
    machine.command(Gcmd::new().with_translation(true));
    assert!(machine.read_byte(0x2000).is_err());
    assert!(machine.fault_record(0).fault(), "the first register again");
    assert!(!machine.fault_record(1).fault());
}

#[test]
fn only_f_of_a_recording_register_can_be_written() {
    let machine = faulting(4, false);
    assert!(machine.read_byte(0x1000).is_err());
    let at = iommu_hardware::vtd::spec::registers::fault_records_offset(4);
    let before = machine.fault_record(0);
    machine.write_wide(at, u64::MAX);
    machine.write_wide(at + 8, u64::MAX >> 1);
    assert_eq!(machine.fault_record(0), before);
    machine.write_wide(at + 8, u64::MAX);
    assert_eq!(machine.fault_record(0), before.with_fault(false));
}

#[test]
fn taking_faults_hands_out_the_oldest_first_and_clears_the_log() {
    let machine = faulting(4, false);
    for source in [1, 2, 3, 4, 4, 4, 5] {
        assert!(machine.read_byte_of(SourceId::new(source), 0x1234).is_err());
    }
    let unit = machine.bare.unit();
    assert!(unit.faults_pending());
    machine.clear_fault(0);
    machine.write(offset::FSTS, OVERFLOW);
    assert!(machine.read_byte_of(SourceId::new(6), 0x1234).is_err());
    let taken = unit.take_faults();
    let sources: Vec<u16> = taken.iter().map(|taken| taken.fault.source_id().get()).collect();
    assert_eq!(sources, [2, 3, 4, 6]);
    assert_eq!(taken[2].collapsed_count, 2);
    let Fault::Dma(fault) = taken[0].fault else { panic!("a DMA") };
    assert_eq!((fault.iova.get(), fault.access, fault.pasid), (0x1000, Access::Read, None));
    assert_eq!(fault.reason, FaultReason::ROOT_NOT_PRESENT);
    assert!(!unit.faults_pending() && unit.take_faults().is_empty());
    assert_eq!(machine.read(offset::FSTS) & (PENDING | OVERFLOW), 0);
}

#[test]
fn as_many_recording_registers_as_there_can_be() {
    let machine = faulting(256, false);
    assert_eq!(machine.bare.registers().size_bytes(), 0x2000);
    for source in 0..256 {
        assert!(machine.read_byte_of(SourceId::new(source), 0x1000).is_err());
    }
    assert_eq!(machine.fault_record(255).source_id(), SourceId::new(255));
    assert_eq!(machine.bare.unit().take_faults().len(), 256);
}

proptest! {
    #![proptest_config(machine::cases(24))]
    /// Every refused DMA is recorded, collapsed, overflowed or suppressed: exactly one of them.
    #[test]
    fn i6_every_refused_dma_is_accounted_for(
        records in 1u16..5,
        steps in proptest::collection::vec((0u16..6, 0u64..4, 0u32..5, any::<bool>()), 1..60),
    ) {
        let machine = faulting(records, true);
        let table = machine.table(4);
        machine.map_new(table, 0x1000, RW);
        // Source 0 is sound, source 1 suppresses its faults (FPD), the others have no context.
        machine.attach(SourceId::new(0), machine::DOMAIN, table);
        let silent = machine.context_entry_at(SourceId::new(1));
        machine.store_wide(silent, 1 << 1);
        let (mut refused, mut suppressed) = (0, 0);
        for (source, page, cleared, clears_overflow) in steps {
            if machine.read_byte_of(SourceId::new(source), page << 12).is_err() {
                refused += 1;
                suppressed += u64::from(source == 1);
            } else {
                prop_assert_eq!((source, page), (0, 1));
            }
            if cleared < u32::from(records) {
                machine.clear_fault(cleared);
            }
            if clears_overflow {
                machine.write(offset::FSTS, OVERFLOW);
            }
        }
        let counters = machine.bare.unit().counters();
        prop_assert_eq!(counters.faults, refused);
        prop_assert_eq!(counters.faults_suppressed, suppressed);
        prop_assert_eq!(
            counters.faults_recorded + counters.faults_collapsed + counters.faults_overflowed + counters.faults_suppressed,
            refused
        );
        prop_assert!(counters.faults_recorded > 0 || refused == suppressed);
    }
}

#[test]
fn a_latch_that_switches_nothing_off_leaves_the_write_index() {
    let machine = Machine::new(Capabilities { fault_records: 4, ..Capabilities::FULL });
    // Reads of FEEx_xxxx are refused and recorded even while translation is off.
    assert!(machine.read_byte_of(SourceId::new(1), 0xfee0_0000).is_err());
    machine.command(Gcmd::new().with_compatibility_interrupts(true));
    assert!(machine.read_byte_of(SourceId::new(2), 0xfee0_0000).is_err());
    assert!(machine.fault_record(1).fault(), "the second register, beside the pending first one");
    assert_eq!(machine.read(offset::FSTS) & OVERFLOW, 0);
}
