//! The data word of an entry: where it leads and what it allows.
//!
//! ```text
//!  whole    63                                                 12 11              2 1 0
//!          [ host-physical address                               |       0         |W|R]
//!  partial  63        52 51        46 45                       12 11         6 5 4 3 2 1 0
//!          [ last byte  | first 11:6 | host-physical address     | first 5:0  | 0 |W|R| 0 ]
//! ```
//!
//! A partial page, of which a byte extent is open, takes the room that addresses of 46 bits leave. Its permissions stand where those of a
//! whole page never do, and none stand where those of a whole page do: so whoever looks at bits 1:0 alone, as the hot path does, finds
//! that a partial page allows nothing, and asks again for all of the word. Whole pages pay nothing for it.
//!
//! A partial page allows something, so its word differs from that of a page that is cached as absent (CM=1), which is whole.

use iommu_types::{Hpa, Permissions};

use crate::vtd::spec::extent::ByteExtent;

/// The widest host address that leaves room for an extent.
pub(crate) const EXTENT_HOST_WIDTH_BITS_MAX: u8 = 46;

const PAGE_SHIFT: u32 = 12;
const WHOLE_HPA_MASK: u64 = ((1 << 52) - 1) & !((1 << PAGE_SHIFT) - 1);
const PARTIAL_HPA_MASK: u64 = WHOLE_HPA_MASK & ((1 << EXTENT_HOST_WIDTH_BITS_MAX) - 1);
const PARTIAL_PERMISSIONS_SHIFT: u32 = 2;
const FIRST_LOW_SHIFT: u32 = 6;
const FIRST_HIGH_SHIFT: u32 = 46;
const FIRST_HALF_BITS: u32 = 6;
const FIRST_HALF_MASK: u64 = (1 << FIRST_HALF_BITS) - 1;
const LAST_SHIFT: u32 = 52;

/// The word of an entry that is open as a whole. Panics on an address that no walk gives.
pub(super) fn whole(target: Hpa, permissions: Permissions) -> u64 {
    assert!(target.get() & !WHOLE_HPA_MASK == 0, "a walk checks reserved bits first: {target}");
    target.get() | u64::from(permissions.bits())
}

/// The word of a page of which an extent is open. Panics on an address that leaves no room, which [`Unit::new`](crate::vtd::Unit::new)
/// rules out, and without permissions.
pub(super) fn partial(target: Hpa, permissions: Permissions, extent: ByteExtent) -> u64 {
    assert!(target.get() & !PARTIAL_HPA_MASK == 0, "a unit with byte extents has narrow addresses: {target}");
    assert!(!permissions.is_empty(), "a page that allows nothing is not looked into");
    let (first, last) = (u64::from(extent.first()), u64::from(extent.last()));
    target.get()
        | u64::from(permissions.bits()) << PARTIAL_PERMISSIONS_SHIFT
        | (first & FIRST_HALF_MASK) << FIRST_LOW_SHIFT
        | first >> FIRST_HALF_BITS << FIRST_HIGH_SHIFT
        | last << LAST_SHIFT
}

/// Where an entry leads, if it is open as a whole.
#[inline]
pub(super) fn whole_target(data: u64) -> Hpa {
    Hpa::new(data & WHOLE_HPA_MASK)
}

/// What an entry allows as a whole: a partial page nothing.
#[inline]
pub(super) fn whole_permissions(data: u64) -> Permissions {
    Permissions::from_bits_truncate(data as u8)
}

/// All that a word says: target, permissions, and the extent of a partial page.
pub(super) fn decode(data: u64) -> (Hpa, Permissions, Option<ByteExtent>) {
    let permissions = Permissions::from_bits_truncate((data >> PARTIAL_PERMISSIONS_SHIFT) as u8);
    if permissions.is_empty() {
        return (whole_target(data), whole_permissions(data), None);
    }
    let first = (data >> FIRST_HIGH_SHIFT & FIRST_HALF_MASK) << FIRST_HALF_BITS
        | data >> FIRST_LOW_SHIFT & FIRST_HALF_MASK;
    let extent = ByteExtent::new(first as u16, (data >> LAST_SHIFT) as u16);
    (Hpa::new(data & PARTIAL_HPA_MASK), permissions, Some(extent.expect("only an extent is put in")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(hpa: u64, permissions: Permissions, bytes: Option<(u16, u16)>, golden: u64) {
        let extent = bytes.map(|(first, last)| ByteExtent::new(first, last).expect("an extent"));
        let data = extent.map_or_else(
            || whole(Hpa::new(hpa), permissions),
            |extent| partial(Hpa::new(hpa), permissions, extent),
        );
        assert_eq!(data, golden, "{data:#018x}");
        assert_eq!(decode(data), (Hpa::new(hpa), permissions, extent));
        let as_whole = if extent.is_none() { permissions } else { Permissions::empty() };
        assert_eq!(whole_permissions(data), as_whole, "the hot path sees no permission of a partial page");
    }

    #[test]
    fn words_have_their_golden_bits_and_come_back() {
        use Permissions as P;
        check(0x000f_ffff_ffff_f000, P::READ_WRITE, None, 0x000f_ffff_ffff_f003);
        check(0, P::empty(), None, 0);
        check(0x0000_3fff_ffff_f000, P::READ_WRITE, Some((0, 0xfff)), 0xfff0_3fff_ffff_f00c);
        check(0x0000_3fff_ffff_f000, P::WRITE, Some((0xfff, 0xfff)), 0xffff_ffff_ffff_ffc8);
        check(0x1000, P::READ, Some((0x041, 0x123)), 0x1230_4000_0000_1044);
        check(0x1000, P::READ, Some((0, 0)), 0x1004);
    }

    #[test]
    fn every_extent_comes_back() {
        for first in (0..=4095).step_by(7).chain([4095]) {
            for last in (first..=4095).step_by(13).chain([4095]) {
                let extent = ByteExtent::new(first, last).expect("in order");
                let data = partial(Hpa::new(0x2fff_ffff_f000), Permissions::READ, extent);
                assert_eq!(
                    decode(data),
                    (Hpa::new(0x2fff_ffff_f000), Permissions::READ, Some(extent)),
                    "{data:#x}"
                );
            }
        }
    }
}
