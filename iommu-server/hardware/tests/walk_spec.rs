//! The bits of VT-d: golden bytes, reserved bits one by one, and round trips. Deterministic by seed.

mod table_world;

use iommu_hardware::vtd::spec::extent::{ByteExtent, extent_address};
use iommu_hardware::vtd::spec::invalidation::{Descriptor, QueueError, StatusWrite, masked_range};
use iommu_hardware::vtd::spec::irte::{InterruptAddress, Irte};
use iommu_hardware::vtd::spec::pte::SecondStageEntry;
use iommu_hardware::vtd::spec::registers::{
    Cap, Ccmd, Ecap, FaultRecord, Fsts, GSTS_KEPT, Gcmd, Iotlb, Iqa, Iqercd, Irta, Iva, QueuePointer, Rtaddr,
    fault_records_offset, offset, register_set_bytes,
};
use iommu_hardware::vtd::spec::root_context::{ContextEntry, RootEntry};
use iommu_types::{
    Access, AddressType, Capabilities, DomainId, Fault, FaultReason, FunctionMask, Hpa, InterruptFault,
    Invalidation, Iova, IovaRange, PageSize, Pasid, Permissions, SourceId, TranslationFault,
};
use table_world::Random;

const DOMAIN: DomainId = DomainId::new(0xbeef);
const SOURCE: SourceId = SourceId::new(0x1234);

/// Sixteen bytes as they lie in memory.
fn check_bytes(value: u128, expected: [u8; 16]) {
    assert_eq!(value.to_le_bytes(), expected, "{value:#034x}");
}

#[test]
fn entries_have_their_golden_bytes() {
    let hpa = Hpa::new(0x3f_1234_5000);
    check_bytes(
        RootEntry::present(hpa).into_bits(),
        [0x01, 0x50, 0x34, 0x12, 0x3f, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    );
    check_bytes(
        ContextEntry::second_stage(hpa, 4, DOMAIN).into_bits(),
        [0x01, 0x50, 0x34, 0x12, 0x3f, 0, 0, 0, 0x02, 0xef, 0xbe, 0, 0, 0, 0, 0],
    );
    check_bytes(
        ContextEntry::second_stage(hpa, 3, DOMAIN).with_fault_processing_disable(true).into_bits(),
        [0x03, 0x50, 0x34, 0x12, 0x3f, 0, 0, 0, 0x01, 0xef, 0xbe, 0, 0, 0, 0, 0],
    );
    check_bytes(
        ContextEntry::pass_through(5, DOMAIN).into_bits(),
        [0x09, 0, 0, 0, 0, 0, 0, 0, 0x03, 0xef, 0xbe, 0, 0, 0, 0, 0],
    );
    check_bytes(
        Irte::remapped(0x41, 0x0102_0304, Some(SOURCE)).into_bits(),
        [0x01, 0, 0x41, 0, 4, 3, 2, 1, 0x34, 0x12, 0x04, 0, 0, 0, 0, 0],
    );
    check_bytes(
        Irte::remapped(0x41, 0, None).with_xapic_destination(7).with_bus_range(0x10, 0x20).into_bits(),
        [0x01, 0, 0x41, 0, 0, 7, 0, 0, 0x20, 0x10, 0x08, 0, 0, 0, 0, 0],
    );
}

#[test]
fn second_stage_entries_have_their_golden_bits() {
    let hpa = Hpa::new(0x3f_4000_0000);
    assert_eq!(SecondStageEntry::table(hpa).into_bits(), 0x3f_4000_0003);
    assert_eq!(SecondStageEntry::leaf(hpa, PageSize::Size4K, Permissions::READ).into_bits(), 0x3f_4000_0001);
    assert_eq!(SecondStageEntry::leaf(hpa, PageSize::Size2M, Permissions::WRITE).into_bits(), 0x3f_4000_0082);
    let partial =
        SecondStageEntry::leaf(hpa, PageSize::Size1G, Permissions::READ_WRITE).with_partial_page(true);
    assert_eq!(partial.into_bits(), 1 << 52 | 0x3f_4000_0083);
}

#[test]
fn extents_have_their_golden_bits_and_nonsense_is_none() {
    let check = |first, last, word: u64| {
        let extent = ByteExtent::new(first, last).expect("in order");
        assert_eq!(extent.into_word(), word, "{extent}");
        assert_eq!(ByteExtent::from_word(word), Some(extent));
        for bit in 24..64 {
            assert_eq!(ByteExtent::from_word(word ^ 1 << bit), None, "bit {bit} of {word:#x}");
        }
    };
    check(0, 0, 0x8000_0000_0000_0000);
    check(0x041, 0x123, 0x8000_0000_0012_3041);
    check(0, 0xfff, 0x8000_0000_00ff_f000);
    check(0xfff, 0xfff, 0x8000_0000_00ff_ffff);
    assert_eq!(0x8000_0000_0012_3041u64.to_le_bytes(), [0x41, 0x30, 0x12, 0, 0, 0, 0, 0x80]);
    for (first, last) in [(1, 0), (0xfff, 0xffe), (0, 0x1000), (0x1000, 0x1000), (0, u16::MAX)] {
        assert_eq!(ByteExtent::new(first, last), None, "{first} {last}");
    }
    for word in [0, 0x0012_3041, 1 << 63 | 1, u64::MAX] {
        assert_eq!(ByteExtent::from_word(word), None, "{word:#x}");
    }
    let table = Hpa::new(0x7000);
    assert_eq!(extent_address(table, Iova::new(0x12_3456_7fff)), Some(Hpa::new(0x8000 + 8 * 0x167)));
    assert_eq!(extent_address(Hpa::new(!0xfff), Iova::new(0)), None);
}

#[test]
fn interrupt_requests_carry_all_sixteen_bits_of_the_handle() {
    assert_eq!(InterruptAddress::remappable_request(5, false).into_bits(), 0xfee0_00b0);
    assert_eq!(InterruptAddress::remappable_request(0xffff, true).into_bits(), 0xfeef_fffc);
    for handle in 0..=u16::MAX {
        let address = InterruptAddress::remappable_request(handle, handle & 1 != 0);
        assert_eq!((address.handle(), address.prefix()), (handle, 0xfee));
    }
}

/// Descriptors with every field in use, and their golden bytes.
fn descriptors() -> Vec<(Descriptor, [u8; 16])> {
    let pages = IovaRange::new(Iova::new(0x1234_5020_0000), 2 << 20).expect("a range");
    vec![
        (
            Descriptor::Invalidate(Invalidation::ContextGlobal),
            [0x11, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        ),
        (
            Descriptor::Invalidate(Invalidation::ContextDomain(DOMAIN)),
            [0x21, 0, 0xef, 0xbe, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        ),
        (
            Descriptor::Invalidate(Invalidation::ContextDevice {
                domain_id: DOMAIN,
                source_id: SOURCE,
                function_mask: FunctionMask::IgnoreBits2To1,
            }),
            [0x31, 0, 0xef, 0xbe, 0x34, 0x12, 0x02, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        ),
        (
            Descriptor::Invalidate(Invalidation::IotlbGlobal),
            [0x12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        ),
        (
            Descriptor::Invalidate(Invalidation::IotlbDomain(DOMAIN)),
            [0x22, 0, 0xef, 0xbe, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        ),
        (
            Descriptor::Invalidate(Invalidation::IotlbPages {
                domain_id: DOMAIN,
                range: pages,
                leaf_only: true,
            }),
            [0x32, 0, 0xef, 0xbe, 0, 0, 0, 0, 0x49, 0, 0x20, 0x50, 0x34, 0x12, 0, 0],
        ),
        (
            Descriptor::Invalidate(Invalidation::InterruptGlobal),
            [0x04, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        ),
        (
            Descriptor::Invalidate(Invalidation::InterruptIndex { index: 0x1234, mask: 3 }),
            [0x14, 0, 0, 0x18, 0x34, 0x12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        ),
        (
            Descriptor::Wait {
                interrupt: true,
                status_write: Some(StatusWrite { at: Hpa::new(0x3f_1234_5678), data: 0xcafe_f00d }),
                fence: true,
            },
            [0x75, 0, 0, 0, 0x0d, 0xf0, 0xfe, 0xca, 0x78, 0x56, 0x34, 0x12, 0x3f, 0, 0, 0],
        ),
        (
            Descriptor::Wait { interrupt: false, status_write: None, fence: false },
            [0x05, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        ),
    ]
}

#[test]
fn descriptors_have_their_golden_bytes_and_come_back() {
    for (descriptor, bytes) in descriptors() {
        check_bytes(descriptor.encode(), bytes);
        let raw = u128::from_le_bytes(bytes);
        assert_eq!(Descriptor::decode(raw, None, &Capabilities::FULL), Ok(descriptor));
        assert_eq!(Descriptor::decode(raw, Some(0), &Capabilities::FULL), Ok(descriptor), "256-bit queue");
    }
}

/// The bits that each type defines, by hand from the specification; all others are reserved.
fn is_defined(descriptor_type: u128, bit: u32) -> bool {
    match descriptor_type {
        1 => matches!(bit, 0..=5 | 9..=11 | 16..=49),
        2 => matches!(bit, 0..=7 | 9..=11 | 16..=31 | 64..=70 | 76..=127),
        4 => matches!(bit, 0..=4 | 9..=11 | 27..=47),
        5 => matches!(bit, 0..=6 | 9..=11 | 32..=63 | 66..=127),
        other => panic!("type {other}"),
    }
}

#[test]
fn every_reserved_bit_of_every_descriptor_is_refused_with_iqei_4() {
    for (descriptor, bytes) in descriptors() {
        let raw = u128::from_le_bytes(bytes);
        for bit in 0..128 {
            let decoded = Descriptor::decode(raw ^ 1 << bit, None, &Capabilities::FULL);
            if !is_defined(raw & 0xf, bit) {
                assert_eq!(decoded, Err(QueueError::RESERVED), "bit {bit} of {descriptor:?}");
            } else if (9..=11).contains(&bit) {
                assert_eq!(decoded, Err(QueueError::TYPE), "bit {bit} of {descriptor:?}");
            } else if bit > 11 && descriptor_uses_every_bit(&descriptor) {
                assert!(decoded.is_ok_and(|other| other != descriptor), "bit {bit} of {descriptor:?} counts");
            }
            let upper = Descriptor::decode(raw, Some(1 << bit), &Capabilities::FULL);
            assert_eq!(upper, Err(QueueError::RESERVED), "upper bit {bit}");
        }
    }
}

/// Those in which no defined bit is ignored, and none makes a reserved value.
fn descriptor_uses_every_bit(descriptor: &Descriptor) -> bool {
    matches!(
        descriptor,
        Descriptor::Wait { status_write: Some(_), .. }
            | Descriptor::Invalidate(Invalidation::ContextDevice { .. })
    )
}

#[test]
fn reserved_values_and_types_are_refused() {
    let full = Capabilities::FULL;
    let check = |raw: u128, capabilities: &Capabilities, expected| {
        assert_eq!(Descriptor::decode(raw, None, capabilities), Err(expected), "{raw:#x}");
    };
    check(0x01, &full, QueueError::RESERVED); // context, G=0
    check(0x02, &full, QueueError::RESERVED); // IOTLB, G=0
    check(0x32 | 19 << 64, &full, QueueError::RESERVED); // AM beyond MAMV
    check(0x14 | 16 << 27, &full, QueueError::RESERVED); // IM beyond MHMV
    for descriptor_type in [0, 3, 6, 7, 8, 9, 0xa, 0xb, 0xc, 0xd, 0xe, 0xf] {
        check(descriptor_type, &full, QueueError::TYPE);
        check(descriptor_type | u128::MAX << 12, &full, QueueError::TYPE); // the type is looked at first
    }
    let plain = Capabilities { interrupt_remapping: false, extended_interrupt_mode: false, ..full };
    check(0x04, &plain, QueueError::TYPE);
}

#[test]
fn without_page_selective_invalidation_the_domain_goes() {
    let capabilities = Capabilities { page_selective: false, max_address_mask: 0, ..Capabilities::FULL };
    let raw = 0x32 | 7 << 16 | 9u128 << 64;
    let expected = Descriptor::Invalidate(Invalidation::IotlbDomain(DomainId::new(7)));
    assert_eq!(Descriptor::decode(raw, None, &capabilities), Ok(expected));
}

#[test]
fn an_address_mask_means_the_aligned_pages_around_the_address() {
    let check = |address, mask, expected: Option<(u64, u64)>| {
        let range = masked_range(address, mask).map(|range| (range.base().get(), range.size_bytes()));
        assert_eq!(range, expected, "{address:#x} AM {mask}");
    };
    check(0x1234_5fff, 0, Some((0x1234_5000, 0x1000)));
    check(0x1234_5000, 9, Some((0x1220_0000, 0x20_0000)));
    check(u64::MAX, 18, Some((!0x3fff_ffff, 0x4000_0000)));
    check(u64::MAX, 51, Some((1 << 63, 1 << 63)));
    for mask in 52..=u8::MAX {
        check(0x1000, mask, None);
    }
}

#[test]
fn any_bytes_decode_without_panic_and_what_decodes_is_stable() {
    let mut random = Random(0xde5c);
    for round in 0..200_000u64 {
        let wide = u128::from(random.next()) << 64 | u128::from(random.next());
        // Mostly types that exist and few other bits, so that decoding often succeeds.
        let raw = match round % 4 {
            0 => wide,
            1 => {
                wide & u128::from(random.next()) & u128::from(random.next()) | u128::from(random.below(0x80))
            }
            2 => wide & !0xfff & !(0xfffu128 << 64) | u128::from(random.below(0x80)),
            _ => u128::from(random.below(0x80)) | wide & (0xffffu128 << 16),
        };
        if let Ok(descriptor) = Descriptor::decode(raw, None, &Capabilities::FULL) {
            let again = Descriptor::decode(descriptor.encode(), None, &Capabilities::FULL);
            assert_eq!(again, Ok(descriptor), "{raw:#034x}");
        }
    }
}

#[test]
fn fault_records_have_their_golden_bytes_and_come_back() {
    let dma = |access, pasid| {
        Fault::Dma(TranslationFault {
            source_id: SOURCE,
            pasid,
            iova: Iova::new(0x00ff_1234_5678_9000),
            access,
            address_type: AddressType::Untranslated,
            reason: FaultReason::WRITE_DENIED,
        })
    };
    let interrupt = |index, reason| Fault::Interrupt(InterruptFault { source_id: SOURCE, index, reason });
    let low = 0x00ff_1234_5678_9000u128;
    let high = |bits: u64| u128::from(bits) << 64;
    for (fault, expected) in [
        (dma(Access::Write, None), low | high(0x0000_0005_0000_1234)),
        (dma(Access::Read, None), low | high(0x4000_0005_0000_1234)),
        (dma(Access::Atomic, None), low | high(0x4000_0005_1000_1234)),
        (dma(Access::Write, Pasid::new(0xabcde)), low | high(0x0abc_de05_8000_1234)),
        (interrupt(Some(0xbeef), FaultReason::IR_NOT_PRESENT), 0xbeef << 48 | high(0x0000_0022_0000_1234)),
        (interrupt(None, FaultReason::IR_COMPATIBILITY_BLOCKED), high(0x0000_0025_0000_1234)),
    ] {
        let record = FaultRecord::of(&fault);
        assert_eq!(record.into_bits(), expected, "{fault}");
        assert_eq!(record.with_fault(true).into_bits(), expected | 1 << 127);
        assert_eq!(record.to_fault(), fault);
    }
}

#[test]
fn capability_registers_say_what_the_unit_can_do() {
    let (cap, ecap) = (Cap::from(&Capabilities::FULL), Ecap::from(&Capabilities::FULL));
    // ND 6, SAGAW 0b1110, MGAW 56, ZLR, FRO 0x45, SSLPS 3, PSI, NFR 7, MAMV 18, DWD, DRD.
    assert_eq!(cap.into_bits(), 0x00d2_078c_4578_0e06, "{cap:?}");
    // C, QI, IR, EIM, PT, SC, IRO 0xf, MHMV 15.
    assert_eq!(ecap.into_bits(), 0x00f0_0fdb, "{ecap:?}");
    let small = Capabilities {
        caching_mode: true,
        fault_records: 256,
        interrupt_remapping: false,
        extended_interrupt_mode: false,
        enhanced_set_root: true,
        enhanced_set_interrupt_table: true,
        ..Capabilities::FULL
    };
    let cap = Cap::from(&small);
    assert_eq!((cap.fault_record_count(), cap.fault_record_offset()), (255, 0x100));
    assert!(cap.caching_mode() && cap.into_bits() >> 62 == 0b11);
    assert_eq!(Ecap::from(&small).max_handle_mask(), 0);
}

#[test]
fn registers_do_not_collide() {
    // Everything that VT-d 5.10 puts at a fixed place, built or not: (first byte, bytes).
    const FIXED: [(u32, u32); 11] = [
        (0x000, 0x0b8 + 8),
        (0x0c0, 0x0f0 - 0x0c0),
        (0x100, 0x220 - 0x100),
        (0x300, 0x388 - 0x300),
        (0x400, 0x450 - 0x400),
        (offset::RDT, 8),
        (0xe00, 8),
        (0xe08, 8),
        (0xe10, 8),
        (0xe30, 8),
        (offset::IVA, 16),
    ];
    for fault_records in 1..=256u16 {
        let first = fault_records_offset(fault_records);
        let end = first + 16 * u32::from(fault_records);
        assert!(end <= register_set_bytes(fault_records) && first / 16 < 1 << 10);
        for (at, bytes) in FIXED {
            assert!(end <= at || at + bytes <= first, "{fault_records} records meet {at:#x}");
        }
    }
    let before_iva = FIXED.iter().filter(|(at, _)| *at < offset::IVA);
    assert!(before_iva.clone().all(|(at, bytes)| at + bytes <= offset::IVA));
    assert_eq!(offset::IOTLB, 0xf8);
}

#[test]
fn register_fields_are_where_the_specification_puts_them() {
    assert_eq!(Gcmd::new().with_translation(true).into_bits(), 1 << 31);
    assert_eq!(Gcmd::new().with_set_root_table(true).into_bits(), 1 << 30);
    assert_eq!(Gcmd::new().with_write_buffer_flush(true).into_bits(), 1 << 27);
    assert_eq!(Gcmd::new().with_queued_invalidation(true).into_bits(), 1 << 26);
    assert_eq!(Gcmd::new().with_interrupt_remapping(true).into_bits(), 1 << 25);
    assert_eq!(Gcmd::new().with_set_interrupt_table(true).into_bits(), 1 << 24);
    assert_eq!(Gcmd::new().with_compatibility_interrupts(true).into_bits(), 1 << 23);
    // Linux keeps everything but the one-shot commands.
    let one_shot = Gcmd::new()
        .with_set_root_table(true)
        .with_set_fault_log(true)
        .with_write_buffer_flush(true)
        .with_set_interrupt_table(true);
    assert_eq!(one_shot.into_bits() & GSTS_KEPT, 0);

    assert_eq!(Rtaddr::new().with_frame(5).with_table_mode(3).into_bits(), 5 << 12 | 3 << 10);
    let ccmd =
        Ccmd::new().with_domain_id(DOMAIN).with_source_id(SOURCE).with_function_mask(2).with_granularity(3);
    assert_eq!(ccmd.with_invalidate(true).into_bits(), 1 << 63 | 3 << 61 | 2 << 32 | 0x1234 << 16 | 0xbeef);
    assert_eq!(Ccmd::new().with_actual_granularity(3).into_bits(), 3 << 59);
    let iotlb = Iotlb::new().with_domain_id(DOMAIN).with_granularity(2).with_invalidate(true);
    assert_eq!(iotlb.into_bits(), 1 << 63 | 2 << 60 | 0xbeef << 32);
    assert_eq!(Iotlb::new().with_actual_granularity(3).into_bits(), 3 << 57);
    assert_eq!(Iotlb::new().with_drain_writes(true).with_drain_reads(true).into_bits(), 3 << 48);
    assert_eq!(Iva::new().with_page_number(7).with_leaf_only(true).with_address_mask(9).into_bits(), 0x7049);

    let status = Fsts::new().with_overflow(true).with_queue_error(true).with_record_index(0xab);
    assert_eq!(status.into_bits(), 0xab11);
    assert_eq!(Fsts::new().with_pending(true).with_timeout_error(true).into_bits(), 0x42);
    assert_eq!(Fsts::WRITE_ONE_TO_CLEAR, 0x71);
    assert_eq!(Fsts::EVENT_CONDITIONS, 0x73);

    let queue = Iqa::from_bits(0x0012_3000 | 1 << 11 | 7);
    assert_eq!(
        (queue.frame(), queue.wide(), queue.bytes(), queue.descriptor_bytes()),
        (0x123, true, 128 << 12, 32)
    );
    assert_eq!(QueuePointer::new().with_index(0x7fff).into_bits(), 0x7_fff0);
    let error = Iqercd::new().with_error(QueueError::RESERVED.0).with_timeout_source(SOURCE);
    assert_eq!(error.into_bits(), 0x1234_0000_0004);
    assert_eq!(
        Irta::new().with_frame(9).with_extended_mode(true).with_size(15).into_bits(),
        9 << 12 | 1 << 11 | 15
    );
}
