//! The fault table of legacy mode, row by row: bytes in memory, a DMA, bits in the fault recording register.
//!
//! Rows that need posted interrupts (27, 28) cannot occur: they are not built. Each row runs with FPD=0
//! and with FPD=1; only a qualified reason is kept out of the register by it.

mod machine;

use iommu_hardware::dma::{Run, Transfer};
use iommu_hardware::vtd::spec::irte::{InterruptAddress, Irte};
use iommu_hardware::vtd::spec::registers::{Gcmd, Irta, offset};
use iommu_hardware::vtd::spec::root_context::ContextEntry;
use iommu_types::{
    AddressType, AtomicOperation, Capabilities, DmaFault, FaultReason, Hpa, Iova, PageSize, Pasid,
    Permissions,
};
use machine::{DEVICE, DOMAIN, INTERRUPTS, Machine, ROOT, RW, Table};

/// Where no memory is.
const NOWHERE: u64 = 0x40_0000_0000;
const PAGE: u64 = 0x12_3456_7000;
const FPD: u128 = 1 << 1;

/// What the device does.
#[derive(Clone, Copy)]
enum Attempt {
    Read(u64),
    Write(u64),
    Atomic(u64),
    WithPasid(u64),
    /// A read that bears another AT field.
    Claiming(u64, AddressType),
    WriteBytes(u64, usize),
}

/// One row: what software has written, what the device does, and what the record must say.
struct Row {
    name: &'static str,
    capabilities: Capabilities,
    /// Breaks a sound machine in which PAGE is mapped read-write. `fpd` is FPD of the context entry (0 or its bit).
    prepare: fn(&Machine, Table, u128),
    attempt: Attempt,
    reason: FaultReason,
    qualified: bool,
}

fn row(name: &'static str, reason: FaultReason, qualified: bool, prepare: fn(&Machine, Table, u128)) -> Row {
    let attempt = Attempt::Read(PAGE + 0x123);
    Row { name, capabilities: Capabilities::FULL, prepare, attempt, reason, qualified }
}

impl Row {
    fn on(self, attempt: Attempt) -> Self {
        Self { attempt, ..self }
    }
    fn with(self, capabilities: Capabilities) -> Self {
        Self { capabilities, ..self }
    }
}

/// The context entry of DEVICE with FPD, changed by `change`.
fn context(machine: &Machine, table: Table, change: impl FnOnce(ContextEntry) -> u128, fpd: u128) {
    let entry = ContextEntry::second_stage(table.top, table.levels, DOMAIN);
    machine.store_wide(machine.context_entry_at(DEVICE), change(entry) | fpd);
}

fn sound(machine: &Machine, table: Table, fpd: u128) {
    context(machine, table, ContextEntry::into_bits, fpd);
}

/// Sets the low qword of the leaf entry, or of the entry at a level above it.
fn entry(machine: &Machine, table: Table, level: u8, raw: u64) {
    machine.store(machine.entry_at(table, PAGE, level), raw);
}

fn root_rows() -> Vec<Row> {
    vec![
        row("8: the root table is nowhere", FaultReason::ROOT_ACCESS, false, |machine, table, fpd| {
            sound(machine, table, fpd);
            machine.set_root(NOWHERE);
        }),
        row(
            "1: the root entry is not present",
            FaultReason::ROOT_NOT_PRESENT,
            false,
            |machine, table, fpd| {
                sound(machine, table, fpd);
                machine.store_wide(Hpa::new(ROOT.get() + 16 * u64::from(DEVICE.bus())), 0xabc0);
            },
        ),
        row("a: reserved bits 11:1", FaultReason::ROOT_RESERVED, false, |machine, table, fpd| {
            sound(machine, table, fpd);
            let at = Hpa::new(ROOT.get() + 16 * u64::from(DEVICE.bus()));
            machine.store(at, machine.load(at) | 1 << 5);
        }),
        row("a: an address beyond HAW", FaultReason::ROOT_RESERVED, false, |machine, table, fpd| {
            sound(machine, table, fpd);
            let at = Hpa::new(ROOT.get() + 16 * u64::from(DEVICE.bus()));
            machine.store(at, machine.load(at) | 1 << 46);
        }),
        row("a: the high qword", FaultReason::ROOT_RESERVED, false, |machine, table, fpd| {
            sound(machine, table, fpd);
            machine.store(Hpa::new(ROOT.get() + 16 * u64::from(DEVICE.bus()) + 8), 1);
        }),
        row("30: table mode 10", FaultReason::TABLE_MODE_INVALID, false, |machine, table, fpd| {
            sound(machine, table, fpd);
            machine.set_root(ROOT.get() | 2 << 10);
        }),
        row(
            "30: scalable mode is not built",
            FaultReason::TABLE_MODE_INVALID,
            false,
            |machine, table, fpd| {
                sound(machine, table, fpd);
                machine.set_root(ROOT.get() | 1 << 10);
            },
        ),
        row("30: SSIRWE in legacy mode", FaultReason::TABLE_MODE_INVALID, false, |machine, table, fpd| {
            sound(machine, table, fpd);
            machine.set_root(ROOT.get() | 1 << 7);
        }),
        row("30 comes before 31", FaultReason::TABLE_MODE_INVALID, false, |machine, table, fpd| {
            sound(machine, table, fpd);
            machine.set_root(ROOT.get() | 3 << 10);
        })
        .on(Attempt::WithPasid(PAGE)),
        row("31: a PASID in legacy mode", FaultReason::PASID_IN_LEGACY_MODE, false, sound)
            .on(Attempt::WithPasid(PAGE)),
        row(
            "31: comes before the root entry",
            FaultReason::PASID_IN_LEGACY_MODE,
            false,
            |machine, table, fpd| {
                sound(machine, table, fpd);
                machine.set_root(NOWHERE);
            },
        )
        .on(Attempt::WithPasid(PAGE)),
    ]
}

fn context_rows() -> Vec<Row> {
    let narrow = Capabilities { widths: iommu_types::AddressWidths::BITS_39, ..Capabilities::FULL };
    let no_pass_through = Capabilities { pass_through: false, ..Capabilities::FULL };
    vec![
        row("9: the context table is nowhere", FaultReason::CONTEXT_ACCESS, false, |machine, _, _| {
            machine.store(Hpa::new(ROOT.get() + 16 * u64::from(DEVICE.bus())), NOWHERE | 1);
        }),
        row(
            "2: not present, FPD counts even so",
            FaultReason::CONTEXT_NOT_PRESENT,
            true,
            |machine, table, fpd| {
                context(machine, table, |entry| entry.with_is_present(false).into_bits(), fpd);
            },
        ),
        row("b: reserved bits 11:4", FaultReason::CONTEXT_RESERVED, true, |machine, table, fpd| {
            context(machine, table, |entry| entry.into_bits() | 1 << 4, fpd);
        }),
        row("b: bit 71", FaultReason::CONTEXT_RESERVED, true, |machine, table, fpd| {
            context(machine, table, |entry| entry.into_bits() | 1 << 71, fpd);
        }),
        row("b: bits 127:88", FaultReason::CONTEXT_RESERVED, true, |machine, table, fpd| {
            context(machine, table, |entry| entry.into_bits() | 1 << 127, fpd);
        }),
        row("b: a table beyond HAW", FaultReason::CONTEXT_RESERVED, true, |machine, table, fpd| {
            context(machine, table, |entry| entry.into_bits() | 1 << 50, fpd);
        }),
        row("3: a width without a meaning", FaultReason::CONTEXT_INVALID, true, |machine, table, fpd| {
            context(machine, table, |entry| entry.with_address_width(7).into_bits(), fpd);
        }),
        row("3: a width that the unit lacks", FaultReason::CONTEXT_INVALID, true, sound).with(narrow),
        row("3: TT=01 without a device TLB", FaultReason::CONTEXT_INVALID, true, |machine, table, fpd| {
            context(machine, table, |entry| entry.into_bits() | 1 << 2, fpd);
        }),
        row("3: TT=11", FaultReason::CONTEXT_INVALID, true, |machine, table, fpd| {
            context(machine, table, |entry| entry.into_bits() | 3 << 2, fpd);
        }),
        row(
            "3: pass-through where it is not built",
            FaultReason::CONTEXT_INVALID,
            true,
            |machine, table, fpd| {
                context(machine, table, |_| ContextEntry::pass_through(5, DOMAIN).into_bits(), fpd);
            },
        )
        .with(no_pass_through),
        row(
            "3: pass-through of less than the widest width",
            FaultReason::CONTEXT_INVALID,
            true,
            |machine, table, fpd| {
                context(machine, table, |_| ContextEntry::pass_through(4, DOMAIN).into_bits(), fpd);
            },
        ),
        row(
            "3: the top-level table is nowhere",
            FaultReason::CONTEXT_INVALID,
            true,
            |machine, table, fpd| {
                context(machine, Table { top: Hpa::new(NOWHERE), ..table }, ContextEntry::into_bits, fpd);
            },
        ),
        row("4: pass-through beyond HAW", FaultReason::ADDRESS_BEYOND_WIDTH, true, |machine, table, fpd| {
            context(machine, table, |_| ContextEntry::pass_through(5, DOMAIN).into_bits(), fpd);
        })
        .on(Attempt::Read(1 << 46)),
    ]
}

fn table_rows() -> Vec<Row> {
    let small_guest = Capabilities { max_guest_width_bits: 39, ..Capabilities::FULL };
    let no_large = Capabilities { pages_2m: false, pages_1g: false, ..Capabilities::FULL };
    let no_snoop = Capabilities { snoop_control: false, ..Capabilities::FULL };
    vec![
        row("4: beyond the width of the context", FaultReason::ADDRESS_BEYOND_WIDTH, true, sound)
            .on(Attempt::Read(1 << 48)),
        row("4: beyond MGAW", FaultReason::ADDRESS_BEYOND_WIDTH, true, sound)
            .on(Attempt::Write(1 << 39))
            .with(small_guest),
        row("7: a lower table is nowhere", FaultReason::TABLE_ACCESS, true, |machine, table, fpd| {
            sound(machine, table, fpd);
            entry(machine, table, 3, NOWHERE | 3);
        }),
        row("c: PS at level 4", FaultReason::TABLE_RESERVED, true, |machine, table, fpd| {
            sound(machine, table, fpd);
            entry(machine, table, 4, 1 << 7 | 3);
        }),
        row("c: a misaligned 2 MiB page", FaultReason::TABLE_RESERVED, true, |machine, table, fpd| {
            sound(machine, table, fpd);
            entry(machine, table, 2, 0x1000 | 1 << 7 | 3);
        }),
        row("c: a misaligned 1 GiB page", FaultReason::TABLE_RESERVED, true, |machine, table, fpd| {
            sound(machine, table, fpd);
            entry(machine, table, 3, 0x20_0000 | 1 << 7 | 3);
        }),
        row(
            "c: a 2 MiB page that the unit lacks",
            FaultReason::TABLE_RESERVED,
            true,
            |machine, table, fpd| {
                sound(machine, table, fpd);
                entry(machine, table, 2, 1 << 7 | 3);
            },
        )
        .with(no_large),
        row("c: a frame beyond HAW", FaultReason::TABLE_RESERVED, true, |machine, table, fpd| {
            sound(machine, table, fpd);
            entry(machine, table, 1, 1 << 46 | 3);
        }),
        row("c: SNP without snoop control", FaultReason::TABLE_RESERVED, true, |machine, table, fpd| {
            sound(machine, table, fpd);
            entry(machine, table, 1, 1 << 11 | 3);
        })
        .with(no_snoop),
        row("c: bit 62", FaultReason::TABLE_RESERVED, true, |machine, table, fpd| {
            sound(machine, table, fpd);
            entry(machine, table, 1, 1 << 62 | 3);
        }),
        row("6: not present, reserved bits unseen", FaultReason::READ_DENIED, true, |machine, table, fpd| {
            sound(machine, table, fpd);
            entry(machine, table, 2, 1 << 62 | 1 << 50);
        }),
        row("5: not present, for a write", FaultReason::WRITE_DENIED, true, |machine, table, fpd| {
            sound(machine, table, fpd);
            machine.unmap(table, PAGE);
        })
        .on(Attempt::Write(PAGE)),
        row("5: read-only leaf", FaultReason::WRITE_DENIED, true, |machine, table, fpd| {
            sound(machine, table, fpd);
            machine.map_new(table, PAGE, Permissions::READ);
        })
        .on(Attempt::Write(PAGE)),
        row("5: the AND over all levels", FaultReason::WRITE_DENIED, true, |machine, table, fpd| {
            sound(machine, table, fpd);
            let at = machine.entry_at(table, PAGE, 3);
            machine.store(at, machine.load(at) & !2);
        })
        .on(Attempt::Write(PAGE)),
        row("6: write-only leaf", FaultReason::READ_DENIED, true, |machine, table, fpd| {
            sound(machine, table, fpd);
            machine.map_new(table, PAGE, Permissions::WRITE);
        }),
        row("5: an atomic on a read-only page", FaultReason::WRITE_DENIED, true, |machine, table, fpd| {
            sound(machine, table, fpd);
            machine.map_new(table, PAGE, Permissions::READ);
        })
        .on(Attempt::Atomic(PAGE)),
        row("6: an atomic on a write-only page", FaultReason::READ_DENIED, true, |machine, table, fpd| {
            sound(machine, table, fpd);
            machine.map_new(table, PAGE, Permissions::WRITE);
        })
        .on(Attempt::Atomic(PAGE)),
        row(
            "e: the page lies in the interrupt range",
            FaultReason::RESULT_IN_INTERRUPT_RANGE,
            true,
            |machine, table, fpd| {
                sound(machine, table, fpd);
                machine.map(table, PAGE, Hpa::new(0xfee0_0000), RW);
            },
        ),
        row(
            "e: a part of a large page does",
            FaultReason::RESULT_IN_INTERRUPT_RANGE,
            true,
            |machine, table, fpd| {
                sound(machine, table, fpd);
                let base = 0x7_c000_0000;
                machine.map_size(table, base, Hpa::new(0xc000_0000), PageSize::Size1G, RW);
            },
        )
        .on(Attempt::Write(0x7_fee1_2340)),
        row("d: a request that claims to be translated", FaultReason::TRANSLATED_BLOCKED, true, sound)
            .on(Attempt::Claiming(PAGE, AddressType::Translated)),
        row("d: a translation request", FaultReason::TRANSLATED_BLOCKED, true, sound)
            .on(Attempt::Claiming(PAGE, AddressType::TranslationRequest)),
        row("d: a translated request to the interrupt range", FaultReason::TRANSLATED_BLOCKED, true, sound)
            .on(Attempt::Claiming(0xfee0_0000, AddressType::Translated)),
        row("29: a read of the interrupt range", FaultReason::IR_INVALID_ACCESS, false, sound)
            .on(Attempt::Read(0xfee0_1000)),
        row("29: two bytes to the interrupt range", FaultReason::IR_INVALID_ACCESS, false, sound)
            .on(Attempt::WriteBytes(0xfeef_fffe, 2)),
        row("29: an atomic to the interrupt range", FaultReason::IR_INVALID_ACCESS, false, sound)
            .on(Attempt::Atomic(0xfee0_0000)),
    ]
}

fn run(machine: &Machine, attempt: Attempt) -> (Result<(), DmaFault>, u64, (bool, bool)) {
    let mut port = machine.port(DEVICE);
    let address_type = match attempt {
        Attempt::Claiming(_, address_type) => address_type,
        _ => AddressType::Untranslated,
    };
    let mut run = Run::new(&mut port).with_address_type(address_type);
    let (iova, kind) = match attempt {
        Attempt::Read(iova) | Attempt::WithPasid(iova) | Attempt::Claiming(iova, _) => (iova, (true, false)),
        Attempt::Write(iova) | Attempt::WriteBytes(iova, _) => (iova, (false, false)),
        Attempt::Atomic(iova) => (iova, (true, true)),
    };
    let pasid = matches!(attempt, Attempt::WithPasid(_)).then(|| Pasid::new(5).expect("20 bits"));
    let (mut byte, zeros) = ([0], [0; 8]);
    let transfer = match attempt {
        Attempt::Read(_) | Attempt::WithPasid(_) | Attempt::Claiming(..) => Transfer::Read(&mut byte),
        Attempt::Write(_) => Transfer::Write(&zeros),
        Attempt::WriteBytes(_, size) => Transfer::Write(&zeros[..size]),
        Attempt::Atomic(_) => Transfer::Atomic(AtomicOperation::FetchAdd64(1)),
    };
    (run.execute(Iova::new(iova), pasid, transfer).map(|_| ()), iova, kind)
}

fn check(row: &Row, fpd: u128) {
    let name = format!("{} with FPD={}", row.name, fpd >> 1);
    let (machine, table) = Machine::with_domain(row.capabilities);
    machine.map_new(table, PAGE, RW);
    (row.prepare)(&machine, table, fpd);
    let (result, iova, (t1, t2)) = run(&machine, row.attempt);
    let fault = result.expect_err(&name);
    assert_eq!(fault.reason, Ok(row.reason), "{name}");
    assert_eq!((fault.done_bytes, fault.iova.get()), (0, iova), "{name}");
    let counters = machine.bare.unit().counters();
    assert_eq!(counters.faults, 1, "{name}: a refused DMA is counted, suppressed or not");
    let record = machine.fault_record(0).into_bits();
    if row.qualified && fpd != 0 {
        assert_eq!((record, counters.faults_suppressed), (0, 1), "{name}: FPD keeps the record out");
        assert_eq!(machine.read(offset::FSTS), 0, "{name}");
        return;
    }
    let address_type_bits = match row.attempt {
        Attempt::Claiming(_, address_type) => u128::from(address_type.bits()) << 124,
        _ => 0,
    };
    let pasid_bits = if matches!(row.attempt, Attempt::WithPasid(_)) { 1 << 95 | 5 << 104 } else { 0 };
    let expected = u128::from(iova & !0xfff)
        | u128::from(DEVICE.get()) << 64
        | u128::from(t2) << 92
        | u128::from(row.reason.0) << 96
        | u128::from(t1) << 126
        | pasid_bits
        | address_type_bits
        | 1 << 127;
    assert_eq!(record, expected, "{name}: {record:#034x} is not {expected:#034x}");
    assert_eq!(machine.read(offset::FSTS), 1 << 1, "{name}: PPF, and FRI 0");
}

#[test]
fn every_row_of_dma_faults_ends_in_its_register_bits() {
    for row in root_rows().into_iter().chain(context_rows()).chain(table_rows()) {
        check(&row, 0);
        check(&row, FPD);
    }
}

#[test]
fn every_dma_reason_that_is_built_has_a_row() {
    let rows: Vec<Row> = root_rows().into_iter().chain(context_rows()).chain(table_rows()).collect();
    for reason in FaultReason::KNOWN {
        // Interrupts have rows of their own; a bare machine has none of our extensions (`walk_faults` holds byte extents).
        let elsewhere = (0x20..=0x28).contains(&reason.0) || reason.0 >= 0xe0;
        let has_row = rows.iter().any(|row| row.reason == *reason);
        assert!(has_row || elsewhere, "{reason:?} has no row");
    }
    for row in &rows {
        assert_eq!(row.qualified, row.reason.is_qualified(), "{}", row.name);
    }
}

/// One row of interrupt faults: the message, the entry at index 2 and whether FPD of that entry counts.
struct InterruptRow {
    name: &'static str,
    address: InterruptAddress,
    data: u32,
    entry: u128,
    table_at: Hpa,
    reason: FaultReason,
    index: Option<u16>,
    qualified: bool,
}

fn interrupt_row(name: &'static str, reason: FaultReason, qualified: bool) -> InterruptRow {
    InterruptRow {
        name,
        address: InterruptAddress::remappable_request(2, false),
        data: 0,
        entry: Irte::remapped(0x31, 1, Some(DEVICE)).into_bits(),
        table_at: INTERRUPTS,
        reason,
        index: Some(2),
        qualified,
    }
}

fn interrupt_rows() -> Vec<InterruptRow> {
    let sound = Irte::remapped(0x31, 1, Some(DEVICE));
    vec![
        InterruptRow {
            address: InterruptAddress::remappable_request(2, true),
            data: 1 << 16,
            index: None,
            ..interrupt_row("20: reserved bits in the data", FaultReason::IR_REQUEST_RESERVED, false)
        },
        InterruptRow {
            address: InterruptAddress::remappable_request(4, false),
            index: Some(4),
            ..interrupt_row("21: index beyond the table", FaultReason::IR_INDEX_BEYOND_TABLE, false)
        },
        InterruptRow { entry: 0, ..interrupt_row("22: not present", FaultReason::IR_NOT_PRESENT, true) },
        InterruptRow {
            table_at: Hpa::new(NOWHERE),
            ..interrupt_row("23: the table is nowhere", FaultReason::IR_ACCESS, false)
        },
        InterruptRow {
            entry: sound.into_bits() | 1 << 12,
            ..interrupt_row("24: reserved bits in the entry", FaultReason::IR_RESERVED, true)
        },
        InterruptRow {
            address: InterruptAddress::new().with_prefix(0xfee),
            index: None,
            ..interrupt_row(
                "25: compatibility format in extended mode",
                FaultReason::IR_COMPATIBILITY_BLOCKED,
                false,
            )
        },
        InterruptRow {
            entry: sound.with_source_field(DEVICE.get() ^ 1).into_bits(),
            ..interrupt_row("26: another source's entry", FaultReason::IR_SOURCE_DENIED, true)
        },
    ]
}

fn check_interrupt(row: &InterruptRow, fpd: u128) {
    let name = format!("{} with FPD={}", row.name, fpd >> 1);
    let (machine, _) = Machine::with_domain(Capabilities::FULL);
    if row.table_at == INTERRUPTS {
        machine.store_wide(Hpa::new(INTERRUPTS.get() + 32), row.entry | fpd);
    }
    let register = Irta::new().with_frame(row.table_at.page_number()).with_extended_mode(true).with_size(1);
    machine.write_wide(offset::IRTA, register.into_bits());
    machine.command(Gcmd::new().with_set_interrupt_table(true));
    machine.command(Gcmd::new().with_interrupt_remapping(true));
    let mut port = machine.port(DEVICE);
    let iova = Iova::new(row.address.into_bits().into());
    let fault =
        Run::new(&mut port).execute(iova, None, Transfer::Write(&row.data.to_le_bytes())).expect_err(&name);
    assert_eq!(fault.reason, Ok(row.reason), "{name}");
    let counters = machine.bare.unit().counters();
    let record = machine.fault_record(0).into_bits();
    if row.qualified && fpd != 0 {
        assert_eq!((record, counters.faults_suppressed), (0, 1), "{name}");
        return;
    }
    let expected = u128::from(row.index.unwrap_or(0)) << 48
        | u128::from(DEVICE.get()) << 64
        | u128::from(row.reason.0) << 96
        | 1 << 127;
    assert_eq!(record, expected, "{name}: {record:#034x} is not {expected:#034x}");
}

#[test]
fn every_row_of_interrupt_faults_ends_in_its_register_bits() {
    for row in interrupt_rows() {
        check_interrupt(&row, 0);
        check_interrupt(&row, FPD);
    }
}

#[test]
fn a_zero_length_read_passes_where_the_unit_says_so() {
    for zero_length_read in [false, true] {
        let (machine, table) = Machine::with_domain(Capabilities { zero_length_read, ..Capabilities::FULL });
        machine.map_new(table, PAGE, Permissions::WRITE);
        let mut port = machine.port(DEVICE);
        let mut zero = |iova| Run::new(&mut port).execute(Iova::new(iova), None, Transfer::Read(&mut []));
        assert_eq!(zero(PAGE).is_ok(), zero_length_read);
        assert!(zero(PAGE + 0x1000).is_err(), "no permission at all");
        assert!(zero(0xfee0_0000).is_ok(), "the interrupt range lets it pass");
    }
}

#[test]
fn pass_through_uses_the_address_as_it_is_and_is_not_cached() {
    let machine = Machine::translating(Capabilities::FULL);
    machine.set_context(DEVICE, ContextEntry::pass_through(5, DOMAIN));
    let frame = machine.frame();
    machine.fill(frame, 0x77);
    assert_eq!(machine.read_byte(frame.get()), Ok(0x77));
    assert!(machine.bare.unit().iotlb_entries().is_empty());
}

#[test]
fn every_level_count_and_page_size_is_walked() {
    for levels in [3, 4, 5] {
        let machine = Machine::translating(Capabilities::FULL);
        let table = machine.table(levels);
        machine.attach(DEVICE, DOMAIN, table);
        let top = 1 << (11 + 9 * u32::from(levels));
        let hpa = machine.map_new(table, top, RW);
        machine.fill(hpa, 0x11);
        machine.fill(Hpa::new(0x20_0000), 0x22);
        machine.map_size(table, top + (1 << 21), Hpa::new(0x20_0000), PageSize::Size2M, RW);
        machine.map_size(table, top + (1 << 30), Hpa::new(0), PageSize::Size1G, RW);
        for _ in 0..2 {
            assert_eq!(machine.read_byte(top + 5), Ok(0x11), "{levels} levels");
            assert_eq!(machine.read_byte(top + (1 << 21) + 5), Ok(0x22), "{levels} levels");
            assert_eq!(machine.read_byte(top + (1 << 30) + 0x20_0005), Ok(0x22), "{levels} levels");
        }
        let sizes: Vec<_> = machine.bare.unit().iotlb_entries().iter().map(|entry| entry.size).collect();
        assert_eq!(sizes.len(), 3);
    }
}
