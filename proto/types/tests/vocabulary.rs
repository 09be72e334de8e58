//! The vocabulary holds at its edges: constructors, and what is printed reads back as the same.

use std::fmt::{Debug, Display};
use std::str::FromStr;

use expect_test::{Expect, expect};
use iommu_types::*;
use proptest::prelude::*;

fn reads_back<T: FromStr + Display + PartialEq + Debug>(value: T)
where
    T::Err: Debug,
{
    let text = value.to_string();
    assert_eq!(text.parse::<T>().expect("what is printed parses"), value, "{text}");
}

#[test]
fn all_65536_sources_read_back_and_take_apart() {
    for raw in 0..=u16::MAX {
        let source = SourceId::new(raw);
        reads_back(source);
        assert_eq!(SourceId::at(source.bus(), source.device(), source.function()), Some(source));
        assert_eq!(u16::from(source.bus()) << 8 | u16::from(source.devfn()), raw);
        reads_back(DeviceAddress::new(raw.rotate_left(5), source));
    }
}

#[test]
fn a_source_has_no_33rd_device_and_no_9th_function() {
    assert_eq!(SourceId::at(0, 32, 0), None);
    assert_eq!(SourceId::at(0, 0, 8), None);
    assert_eq!(SourceId::at(255, 31, 7), Some(SourceId::new(u16::MAX)));
}

#[test]
fn texts_that_are_no_addresses_are_refused() {
    for text in [
        "", "00:1f", "1f.2", "00:1f.8", "00:20.0", "0:1f.2", "000:1f.2", "00:1f.02", "+0:1f.2", "00:1f.2 ",
        "zz:00.0",
    ] {
        assert!(text.parse::<SourceId>().is_err(), "{text:?}");
        assert!(text.parse::<DeviceAddress>().is_err(), "{text:?}");
    }
    for text in ["0:00:1f.2", "00000:00:1f.2", ":00:1f.2", "0000:00:1f.2:", "-001:00:1f.2"] {
        assert!(text.parse::<DeviceAddress>().is_err(), "{text:?}");
    }
    assert_eq!("00:1f.2".parse(), Ok(DeviceAddress::new(0, SourceId::new(0x00fa))));
    assert_eq!("ABCD:1F:1F.7".parse(), Ok(DeviceAddress::new(0xabcd, SourceId::new(0x1fff))));
}

#[test]
fn owners_read_back_and_nothing_else_is_one() {
    for number in [0, 1, u32::MAX] {
        reads_back(Owner::Driver(number));
        reads_back(Owner::Vm(number));
    }
    for text in
        ["", "driver", "driver:", "vm:-1", "vm:4294967296", "host:1", "driver:1:2", "driver:+1", "vm:+0"]
    {
        assert!(text.parse::<Owner>().is_err(), "{text:?}");
    }
}

#[test]
fn a_pasid_has_20_bits() {
    assert_eq!(Pasid::new((1 << 20) - 1).map(Pasid::get), Some(0xf_ffff));
    assert_eq!(Pasid::new(1 << 20), None);
}

fn check_range(base: u64, size_bytes: u64, expected: Expect) {
    let shown = match IovaRange::new(Iova::new(base), size_bytes) {
        Ok(range) => range.to_string(),
        Err(error) => error.to_string(),
    };
    expected.assert_eq(&shown);
}

#[test]
fn a_range_is_not_empty_and_does_not_wrap_and_reaches_the_last_byte() {
    check_range(0, 0, expect!["range at iova:0x0 is empty; its size must be at least one byte"]);
    check_range(u64::MAX, 1, expect!["iova:0xffffffffffffffff..=0xffffffffffffffff"]);
    check_range(
        u64::MAX,
        2,
        expect!["range at iova:0xffffffffffffffff of 0x2 bytes wraps around the end of the address space"],
    );
    check_range(0, u64::MAX, expect!["iova:0x0..=0xfffffffffffffffe"]);
    check_range(1, u64::MAX, expect!["iova:0x1..=0xffffffffffffffff"]);
    check_range(
        2,
        u64::MAX,
        expect!["range at iova:0x2 of 0xffffffffffffffff bytes wraps around the end of the address space"],
    );
    let last_page = IovaRange::new(Iova::new(!0xfff), 0x1000).expect("the last page");
    assert_eq!((last_page.last(), last_page.pages_touched()), (Iova::new(u64::MAX), 1));
    assert!(last_page.is_aligned(0x1000) && last_page.contains(Iova::new(u64::MAX)));
}

#[test]
fn an_address_has_its_space_in_its_name_and_checked_arithmetic() {
    assert_eq!(
        [Iova::new(16).to_string(), Gpa::new(16).to_string(), Hpa::new(16).to_string()],
        ["iova:0x10", "gpa:0x10", "hpa:0x10"]
    );
    assert_eq!(format!("{:?}", Iova::new(16)), "iova:0x10");
    assert_eq!(Iova::new(u64::MAX).checked_add(1), None);
    assert_eq!(Iova::new(1).offset_from(Iova::new(2)), None);
    let address = Hpa::new(0x1_2345);
    assert_eq!(
        (address.page_base(), address.page_offset(), address.page_number()),
        (Hpa::new(0x1_2000), 0x345, 0x12)
    );
}

#[test]
fn page_sizes_stand_at_their_levels() {
    for size in PageSize::ALL {
        assert_eq!(PageSize::at_level(size.leaf_level()), Some(size));
        assert_eq!(size.bytes(), 1 << size.shift());
    }
    assert_eq!([0, 4, 5].map(PageSize::at_level), [None; 3]);
}

#[test]
fn permissions_allow_what_they_say() {
    let rows = [
        (Permissions::empty(), [false, false, false]),
        (Permissions::READ, [true, false, false]),
        (Permissions::WRITE, [false, true, false]),
        (Permissions::READ_WRITE, [true, true, true]),
    ];
    for (permissions, expected) in rows {
        assert_eq!(
            [Access::Read, Access::Write, Access::Atomic].map(|access| permissions.allow(access)),
            expected
        );
    }
    assert_eq!(Direction::FromDevice.permissions(), Permissions::WRITE);
}

#[test]
fn widths_mask_their_bits() {
    for (bytes, mask) in [(1, 0xff), (2, 0xffff), (4, 0xffff_ffff), (8, u64::MAX)] {
        let width = AccessWidth::from_bytes(bytes).expect("a width");
        assert_eq!((width.bytes(), width.mask()), (bytes, mask));
    }
    assert_eq!([0, 3, 5, 16].map(AccessWidth::from_bytes), [None; 4]);
}

#[test]
fn every_known_reason_has_its_own_code_label_and_meaning() {
    for (index, reason) in FaultReason::KNOWN.iter().enumerate() {
        assert_ne!(reason.label(), "unknown");
        for other in &FaultReason::KNOWN[..index] {
            assert_ne!((reason.0, reason.label()), (other.0, other.label()));
            assert!(
                reason.0 != other.0 && reason.label() != other.label() && reason.meaning() != other.meaning()
            );
        }
    }
    assert_eq!(FaultReason(0xee).label(), "unknown");
}

#[test]
fn full_capabilities_make_sense_and_contradictions_do_not() {
    let full = Capabilities::FULL;
    assert_eq!(full.validate(), Ok(()));
    let refused = [
        ("widths", Capabilities { widths: AddressWidths::empty(), ..full }),
        ("max_guest_width_bits", Capabilities { max_guest_width_bits: 58, ..full }),
        ("host_width_bits", Capabilities { host_width_bits: 31, ..full }),
        ("pages_1g", Capabilities { pages_2m: false, ..full }),
        ("interrupt_remapping", Capabilities { queued_invalidation: false, ..full }),
        ("extended_interrupt_mode", Capabilities { interrupt_remapping: false, ..full }),
        ("max_address_mask", Capabilities { max_address_mask: 19, ..full }),
        ("max_address_mask", Capabilities { page_selective: false, ..full }),
        ("fault_records", Capabilities { fault_records: 0, ..full }),
        ("fault_records", Capabilities { fault_records: 257, ..full }),
    ];
    for (field, capabilities) in refused {
        assert_eq!(capabilities.validate().map_err(|error| error.field), Err(field));
    }
}

#[test]
fn a_function_mask_ignores_its_bits_only() {
    let target = SourceId::new(0x0100);
    let matched =
        |mask: FunctionMask| (0..=u16::MAX).filter(|raw| mask.matches(target, SourceId::new(*raw))).count();
    let masks = [
        FunctionMask::Exact,
        FunctionMask::IgnoreBit2,
        FunctionMask::IgnoreBits2To1,
        FunctionMask::IgnoreAll,
    ];
    assert_eq!(masks.map(matched), [1, 2, 4, 8]);
}

proptest! {
    // The twin counts in 128 bits.
    #[test]
    fn ranges_agree_with_plain_numbers(a in edge(), a_size in edge(), b in edge(), b_size in edge(), at in edge()) {
        let (ranges, ends) = ([(a, a_size), (b, b_size)], |(base, size): (u64, u64)| (u128::from(base), u128::from(base) + u128::from(size)));
        let parsed = ranges.map(|(base, size_bytes)| IovaRange::new(Iova::new(base), size_bytes));
        for (range, parsed) in ranges.into_iter().zip(&parsed) {
            let (_, end) = ends(range);
            prop_assert_eq!(parsed.is_ok(), range.1 > 0 && end <= 1 << 64);
        }
        if let [Ok(first), Ok(second)] = parsed {
            let ((a_base, a_end), (b_base, b_end)) = (ends(ranges[0]), ends(ranges[1]));
            prop_assert_eq!(first.overlaps(second), a_base < b_end && b_base < a_end);
            prop_assert_eq!(first.covers(second), a_base <= b_base && b_end <= a_end);
            prop_assert_eq!(first.contains(Iova::new(at)), a_base <= u128::from(at) && u128::from(at) < a_end);
            prop_assert_eq!(u128::from(first.pages_touched()), (a_end - 1) / 4096 - a_base / 4096 + 1);
        }
    }
}

/// Numbers near the edges of pages and of the space.
fn edge() -> impl Strategy<Value = u64> {
    let near = |centre: u64| (0_u64..4).prop_map(move |offset| centre.wrapping_add(offset).wrapping_sub(2));
    prop_oneof![near(0), near(4096), near(8192), near(1 << 32), near(u64::MAX), any::<u64>()]
}
