//! Interrupt remapping: every check, in the order of VT-d 5.10 chapter 5, and every way to validate a source.

mod table_world;

use iommu_hardware::vtd::interrupt::{DeliveredInterrupt, InterruptState, InterruptTable, remap};
use iommu_hardware::vtd::spec::irte::{InterruptAddress, Irte, entry_address};
use iommu_types::{Capabilities, FaultReason, Hpa, InterruptFault, SourceId};
use table_world::{MapMemory, Random};

const TABLE: Hpa = Hpa::new(0x30_0000);
const INDEX: u16 = 5;
const SOURCE: SourceId = SourceId::new(0x1234);

#[derive(Clone, Debug)]
struct Machine {
    memory: MapMemory,
    capabilities: Capabilities,
    state: InterruptState,
    source: SourceId,
    address: u64,
    data: u32,
}

impl Machine {
    /// Entry 5 delivers vector 0x41 to APIC 0x0102_0304 for SOURCE; the request asks for it.
    fn new() -> Self {
        let mut machine = Self {
            memory: MapMemory::default(),
            capabilities: Capabilities::FULL,
            state: InterruptState {
                remapping_enabled: true,
                compatibility_allowed: false,
                table: Some(InterruptTable { base: TABLE, entries_log2: 8, extended_mode: true }),
            },
            source: SOURCE,
            address: request(INDEX, false),
            data: 0,
        };
        machine.set(Irte::remapped(0x41, 0x0102_0304, Some(SOURCE)));
        machine
    }
    fn set(&mut self, entry: Irte) {
        self.memory.store_wide(entry_address(TABLE, INDEX).expect("fits"), entry.into_bits());
    }
    fn entry(&self) -> Irte {
        let at = entry_address(TABLE, INDEX).expect("fits");
        let half = |offset| u128::from(self.memory.word(Hpa::new(at.get() + offset)).expect("the table"));
        Irte::from_bits(half(0) | half(8) << 64)
    }
    fn table(&mut self) -> &mut InterruptTable {
        self.state.table.as_mut().expect("set")
    }
    fn remap(&self) -> Result<DeliveredInterrupt, (InterruptFault, bool)> {
        remap(&self.memory, &self.capabilities, self.state, self.source, self.address, self.data)
    }
}

fn request(handle: u16, subhandle_valid: bool) -> u64 {
    u64::from(InterruptAddress::remappable_request(handle, subhandle_valid).into_bits())
}

type Row = (&'static str, fn(&mut Machine), u8, Option<u16>, bool);
const N: bool = false;
const Q: bool = true;

fn check(rows: &[Row]) {
    for (name, change, reason, index, qualified) in rows {
        for fpd in [false, true] {
            let mut machine = Machine::new();
            change(&mut machine);
            if fpd && machine.memory.word(TABLE).is_some() {
                machine.set(machine.entry().with_fault_processing_disable(true));
            }
            let reason = FaultReason(*reason);
            let fault = InterruptFault { source_id: machine.source, index: *index, reason };
            assert_eq!(machine.remap(), Err((fault, fpd && *qualified)), "{name}, FPD={fpd}");
            assert_eq!(reason.is_qualified(), *qualified, "{name}: the vocabulary knows the same");
        }
    }
}

#[test]
fn a_remappable_request_is_delivered_as_its_entry_says() {
    let expected = DeliveredInterrupt {
        vector: 0x41,
        destination: 0x0102_0304,
        delivery_mode: 0,
        level_triggered: false,
        logical_destination: false,
        redirection_hint: false,
        index: Some(INDEX),
    };
    let mut machine = Machine::new();
    assert_eq!(machine.remap(), Ok(expected));
    machine.data = 0xffff_ffff; // without SHV the data word is ignored altogether
    assert_eq!(machine.remap(), Ok(expected));
    machine.address = request(INDEX - 2, true);
    machine.data = 2;
    assert_eq!(machine.remap(), Ok(expected), "handle + subhandle");
    machine.address |= 0b11; // bits 1:0 have no meaning
    assert_eq!(machine.remap(), Ok(expected));
    let entry = machine.entry().with_level_triggered(true).with_logical_destination(true);
    machine.set(entry.with_redirection_hint(true).with_delivery_mode(4).with_available(0xf));
    let all = DeliveredInterrupt {
        delivery_mode: 4,
        level_triggered: true,
        logical_destination: true,
        redirection_hint: true,
        ..expected
    };
    assert_eq!(machine.remap(), Ok(all));
}

#[test]
fn i6_every_refusal_has_its_reason_index_and_qualification() {
    check(&[
        ("not the interrupt range", |m| m.address = 0xfed0_0000, 0x29, None, N),
        ("above 4 GiB", |m| m.address |= 1 << 32, 0x29, None, N),
        (
            "compatibility format with CFIS=0",
            |m| {
                m.address = 0xfee0_0000;
                m.table().extended_mode = false
            },
            0x25,
            None,
            N,
        ),
        (
            "compatibility format with EIME=1",
            |m| {
                m.address = 0xfee0_0000;
                m.state.compatibility_allowed = true
            },
            0x25,
            None,
            N,
        ),
        (
            "reserved bits beside the subhandle",
            |m| {
                m.address = request(INDEX, true);
                m.data = 1 << 16
            },
            0x20,
            None,
            N,
        ),
        ("first index beyond the table", |m| m.address = request(256, false), 0x21, Some(256), N),
        ("last handle", |m| m.address = request(0xffff, false), 0x21, Some(0xffff), N),
        (
            "subhandle beyond the table",
            |m| {
                m.address = request(250, true);
                m.data = 6
            },
            0x21,
            Some(256),
            N,
        ),
        (
            "subhandle beyond 16 bits, in the largest table",
            |m| {
                m.table().entries_log2 = 16;
                m.address = request(0xffff, true);
                m.data = 6
            },
            0x21,
            Some(5),
            N,
        ),
        ("no table latched", |m| m.state.table = None, 0x21, Some(INDEX), N),
        ("table beyond HAW", |m| m.table().base = Hpa::new(1 << 46), 0x21, Some(INDEX), N),
        ("table at the end of 64 bits", |m| m.table().base = Hpa::new(!0xf), 0x21, Some(INDEX), N),
        ("table where no memory is", |m| m.memory.remove_frame(TABLE), 0x23, Some(INDEX), N),
        ("not present", |m| m.set(m.entry().with_is_present(false)), 0x22, Some(INDEX), Q),
        ("not present, all else zero", |m| m.set(Irte::new()), 0x22, Some(INDEX), Q),
        ("another source", |m| m.source = SourceId::new(0x1235), 0x26, Some(INDEX), Q),
        ("SVT 11", |m| m.set(m.entry().with_source_validation(3)), 0x24, Some(INDEX), Q),
        ("posted format", |m| m.set(m.entry().with_posted(true)), 0x24, Some(INDEX), Q),
        (
            "a wide destination outside extended mode",
            |m| m.table().extended_mode = false,
            0x24,
            Some(INDEX),
            Q,
        ),
    ]);
}

/// A request that violates a check and all that come after it is refused by the first.
#[test]
fn checks_come_in_the_order_of_the_specification() {
    let mut machine = Machine::new();
    machine.address = request(0xfff0, true);
    machine.data = 1 << 16;
    machine.set(machine.entry().with_is_present(false).with_posted(true).with_source_field(1));
    machine.memory.remove_frame(TABLE);
    let mut seen = Vec::new();
    let repairs: [fn(&mut Machine); 6] = [
        |m| m.data = 0,
        |m| m.address = request(INDEX, true),
        |m| m.set(Irte::remapped(1, 1, Some(SourceId::new(1))).with_is_present(false).with_posted(true)),
        |m| m.set(m.entry().with_is_present(true)),
        |m| m.set(m.entry().with_source_field(SOURCE.get())),
        |m| m.set(m.entry().with_posted(false)),
    ];
    for repair in repairs {
        seen.push(machine.remap().expect_err("something is still wrong").0.reason.0);
        repair(&mut machine);
    }
    assert_eq!(seen, [0x20, 0x21, 0x23, 0x22, 0x26, 0x24]);
    assert!(machine.remap().is_ok());
}

#[test]
fn every_reserved_bit_of_an_entry_is_refused_and_no_other() {
    for extended_mode in [false, true] {
        for bit in 0..128u32 {
            let mut machine = Machine::new();
            machine.table().extended_mode = extended_mode;
            let entry = Irte::remapped(0x41, 0, None).with_xapic_destination(9);
            machine.set(Irte::from_bits(entry.into_bits() ^ 1 << bit));
            let reserved = match bit {
                12..=14 | 24..=31 | 84..=127 => true,
                15 => true, // posted format, not built
                32..=39 | 48..=63 => !extended_mode,
                _ => false,
            };
            let refused = machine.remap().is_err_and(|(fault, _)| fault.reason == FaultReason::IR_RESERVED);
            assert_eq!(refused, reserved, "bit {bit}, EIME={extended_mode}: {:?}", machine.remap());
        }
    }
}

#[test]
fn outside_extended_mode_the_destination_has_eight_bits() {
    let mut machine = Machine::new();
    machine.table().extended_mode = false;
    machine.set(Irte::remapped(0x41, 0, None).with_xapic_destination(0xab));
    assert_eq!(machine.remap().expect("delivered").destination, 0xab);
}

/// SVT and SQ against a twin that compares strings of bits.
#[test]
fn sources_are_validated_by_svt_and_sq() {
    let mut random = Random(26);
    for qualifier in 0..4u8 {
        for _ in 0..2_000 {
            let field = random.next() as u16;
            let flips = random.pick(&[0u16, 1, 2, 3, 4, 5, 6, 7, 8, 0x100, 0x8000]);
            let source = field ^ flips;
            let ignored: &[u16] = [&[][..], &[4], &[4, 2], &[4, 2, 1]][usize::from(qualifier)];
            let admitted = (0..16)
                .map(|bit| 1u16 << bit)
                .all(|bit| field & bit == source & bit || ignored.contains(&bit));
            let entry = Irte::remapped(1, 1, Some(SourceId::new(field))).with_source_qualifier(qualifier);
            check_source(entry, source, admitted);
            check_source(entry.with_source_validation(Irte::SOURCE_ANY), source, true);
            let (first, last) = ((field >> 8) as u8, field as u8);
            let bus = (source >> 8) as u8;
            check_source(entry.with_bus_range(first, last), source, first <= bus && bus <= last);
        }
    }
    let range = Irte::remapped(1, 1, None).with_bus_range(0x10, 0x20);
    for (bus, admitted) in [(0x0f, false), (0x10, true), (0x20, true), (0x21, false)] {
        check_source(range, bus << 8 | 0xff, admitted);
    }
    check_source(Irte::remapped(1, 1, None).with_bus_range(0x20, 0x10), 0x1800, false);
}

fn check_source(entry: Irte, source: u16, admitted: bool) {
    let mut machine = Machine::new();
    machine.source = SourceId::new(source);
    machine.set(entry);
    match machine.remap() {
        Ok(_) => assert!(admitted, "{source:#x} through {entry:?}"),
        Err((fault, _)) => {
            assert!(!admitted, "{source:#x} through {entry:?}");
            assert_eq!(fault.reason, FaultReason::IR_SOURCE_DENIED);
        }
    }
}

#[test]
fn compatibility_format_is_delivered_as_it_is_when_nothing_forbids_it() {
    let mut machine = Machine::new();
    machine.address = 0xfeea_b00c;
    machine.data = 0x8531;
    let expected = DeliveredInterrupt {
        vector: 0x31,
        destination: 0xab,
        delivery_mode: 5,
        level_triggered: true,
        logical_destination: true,
        redirection_hint: true,
        index: None,
    };
    machine.state.compatibility_allowed = true;
    machine.table().extended_mode = false;
    assert_eq!(machine.remap(), Ok(expected), "CFIS=1 and EIME=0");
    machine.state.table = None;
    assert_eq!(machine.remap(), Ok(expected), "CFIS=1 and no table latched");
    machine.state = InterruptState { remapping_enabled: false, compatibility_allowed: false, table: None };
    assert_eq!(machine.remap(), Ok(expected), "remapping off");
}
