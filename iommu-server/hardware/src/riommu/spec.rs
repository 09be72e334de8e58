//! The bit layouts of the ring tables: plain values that encode and decode, and nothing that behaves.
//!
//! The paper (Malka, Amit, Ben-Yehuda and Tsafrir, ASPLOS'15) says what the structures hold; the bits are ours. All of them
//! are little endian, and an entry is read in one 16-byte access. Software may write a slot in two: where it leads, then that it is valid.
//!
//! ```text
//! root[bus]      127                        64 63                   12 11          1 0
//!               |             0               | device table           |     0      |P|
//!
//! rDEVICE[devfn] 127              80 79     64 63                                     0
//!               |        0          |  count  | rings (a multiple of 16)               |
//!
//! rRING          127      96 95             64 63                                     0
//!     bytes 0-15|   tail    |      size       | slots (a multiple of 16)               |
//!    bytes 16-31|                    0                       |  nmapped                |
//!
//! rPTE[slot]     127   97 96 95 94 93       64 63                                     0
//!               |   0    |V |W |R | size      | address                                |
//!
//! rIOVA                   63        48 47             30 29                           0
//!                        |   ring     |   slot          | offset                        |
//! ```
//!
//! What is shown as 0 is written as zero and ignored when read. A device table of 256 entries is one page, as the root is. A
//! device without rings (count 0) is not present. `tail` and `nmapped` are software's alone: the unit never looks at them.

use bitfield_struct::bitfield;
use iommu_types::{Hpa, Iova, Permissions};

/// Entries of the root (indexed by bus) and of a device table (indexed by device and function).
pub const ENTRIES_PER_TABLE: u64 = 256;
/// Bytes of an entry of the root, of a device table and of a ring.
pub const ENTRY_BYTES: u64 = 16;
/// Bytes of a ring's description.
pub const RING_BYTES: u64 = 32;
/// Where `tail` stands in a ring's description (4 bytes).
pub const RING_TAIL_OFFSET_BYTES: u64 = 12;
/// Where `nmapped` stands in a ring's description (4 bytes).
pub const RING_MAPPED_OFFSET_BYTES: u64 = 16;
/// Slots that an address can name. A ring that claims more has so many.
pub const SLOTS_MAX: u32 = 1 << SLOT_BITS;
/// Bytes of the largest slot.
pub const SLOT_BYTES_MAX: u32 = (1 << OFFSET_BITS) - 1;

const SLOT_BITS: u32 = 18;
const OFFSET_BITS: u32 = 30;
const RING_SHIFT: u32 = SLOT_BITS + OFFSET_BITS;

/// An entry of the root.
#[bitfield(u128)]
#[derive(PartialEq, Eq)]
pub struct RingRoot {
    /// P.
    pub is_present: bool,
    #[bits(11)]
    __: u16,
    /// Number of the frame that holds the device table of the bus.
    #[bits(52)]
    pub device_table_frame: u64,
    #[bits(64)]
    __: u64,
}

impl RingRoot {
    /// The entry that points to a device table. Bits 11:0 of the address are lost.
    pub const fn present(device_table: Hpa) -> Self {
        Self::new().with_is_present(true).with_device_table_frame(device_table.page_number())
    }
    /// Where the device table lies.
    pub const fn device_table(self) -> Hpa {
        Hpa::new(self.device_table_frame() << 12)
    }
}

/// rDEVICE: the rings of a device.
#[bitfield(u128)]
#[derive(PartialEq, Eq)]
pub struct RingDevice {
    /// Where the rings are described, one after the other.
    #[bits(64, from = Hpa::new, into = Hpa::get)]
    pub rings: Hpa,
    /// How many rings there are.
    pub count: u16,
    #[bits(48)]
    __: u64,
}

impl RingDevice {
    /// A device with `count` rings that are described at `rings`.
    pub const fn with_rings_at(rings: Hpa, count: u16) -> Self {
        Self::new().with_rings(rings).with_count(count)
    }
    /// Whether the device is there: it has a ring.
    pub const fn is_present(self) -> bool {
        self.count() != 0
    }
}

/// The first half of an rRING, which is all that the unit reads.
#[bitfield(u128)]
#[derive(PartialEq, Eq)]
pub struct Ring {
    /// Where the slots are.
    #[bits(64, from = Hpa::new, into = Hpa::get)]
    pub slots: Hpa,
    /// How many there are.
    pub size: u32,
    /// The slot that software maps next. The unit ignores it.
    pub tail: u32,
}

impl Ring {
    /// An empty ring of `size` slots at `slots`. The second half of its description is zero.
    pub const fn with_slots_at(slots: Hpa, size: u32) -> Self {
        Self::new().with_slots(slots).with_size(size)
    }
    /// How many slots an address can reach.
    pub const fn reachable_slots(self) -> u32 {
        if self.size() < SLOTS_MAX { self.size() } else { SLOTS_MAX }
    }
    /// The slot after `slot`, round the ring, or `None` when there is no other.
    pub const fn slot_after(self, slot: u32) -> Option<u32> {
        let size = self.reachable_slots();
        let next = if slot < size.saturating_sub(1) { slot + 1 } else { 0 };
        if size > 1 && next != slot { Some(next) } else { None }
    }
}

/// rPTE: one slot, which opens `size_bytes` bytes from any address.
#[bitfield(u128)]
#[derive(PartialEq, Eq)]
pub struct RingPte {
    /// Where the bytes are.
    #[bits(64, from = Hpa::new, into = Hpa::get)]
    pub address: Hpa,
    /// How many bytes there are.
    #[bits(30)]
    pub size_bytes: u32,
    /// Whether the device may read them.
    pub device_may_read: bool,
    /// Whether the device may write them.
    pub device_may_write: bool,
    /// V. Software sets it last, and clears it first.
    pub is_valid: bool,
    #[bits(31)]
    __: u32,
}

impl RingPte {
    /// A valid slot.
    pub fn valid(address: Hpa, size_bytes: u32, permissions: Permissions) -> Self {
        assert!(size_bytes <= SLOT_BYTES_MAX, "a slot holds less than 1 GiB: {size_bytes}");
        Self::new()
            .with_address(address)
            .with_size_bytes(size_bytes)
            .with_device_may_read(permissions.contains(Permissions::READ))
            .with_device_may_write(permissions.contains(Permissions::WRITE))
            .with_is_valid(true)
    }
    /// What the slot allows.
    pub fn permissions(self) -> Permissions {
        let mut permissions = Permissions::empty();
        permissions.set(Permissions::READ, self.device_may_read());
        permissions.set(Permissions::WRITE, self.device_may_write());
        permissions
    }
}

/// rIOVA: what a device behind rings puts on the bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RingIova {
    /// Which ring of the device.
    pub ring: u16,
    /// Which slot of the ring: 18 bits.
    pub slot: u32,
    /// Which byte of the slot: 30 bits.
    pub offset: u32,
}

impl RingIova {
    /// The address. Panics when the slot or the offset has more bits than an address has for it.
    #[inline]
    pub const fn pack(self) -> Iova {
        assert!(self.slot < SLOTS_MAX && self.offset <= SLOT_BYTES_MAX, "slot and offset fit an address");
        Iova::new((self.ring as u64) << RING_SHIFT | (self.slot as u64) << OFFSET_BITS | self.offset as u64)
    }
    /// The three parts. Every address has them.
    #[inline]
    pub const fn unpack(iova: Iova) -> Self {
        let raw = iova.get();
        Self {
            ring: (raw >> RING_SHIFT) as u16,
            slot: (raw >> OFFSET_BITS) as u32 & (SLOTS_MAX - 1),
            offset: raw as u32 & SLOT_BYTES_MAX,
        }
    }
}

/// Where the entry of an index lies, or `None` when that is beyond 64 bits.
#[inline]
pub const fn entry_address(table: Hpa, index: u32) -> Option<Hpa> {
    table.checked_add(index as u64 * ENTRY_BYTES)
}

/// Where a ring is described, or `None` when that is beyond 64 bits.
#[inline]
pub const fn ring_address(rings: Hpa, ring: u16) -> Option<Hpa> {
    rings.checked_add(ring as u64 * RING_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The bytes as they lie in memory, lowest address first.
    fn check(entry: u128, bytes: [u8; 16]) {
        assert_eq!(entry.to_le_bytes(), bytes);
    }

    #[test]
    fn entries_are_laid_out_to_the_bit() {
        check(
            RingRoot::present(Hpa::new(0x0012_3456_7000)).into_bits(),
            [0x01, 0x70, 0x56, 0x34, 0x12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        );
        check(
            RingDevice::with_rings_at(Hpa::new(0x1122_3344_5560), 0x0102).into_bits(),
            [0x60, 0x55, 0x44, 0x33, 0x22, 0x11, 0, 0, 0x02, 0x01, 0, 0, 0, 0, 0, 0],
        );
        check(
            Ring::with_slots_at(Hpa::new(0x8_7650), 0x0403_0201).with_tail(0x0807_0605).into_bits(),
            [0x50, 0x76, 0x08, 0, 0, 0, 0, 0, 0x01, 0x02, 0x03, 0x04, 0x05, 0x06, 0x07, 0x08],
        );
        check(
            RingPte::valid(Hpa::new(0x0807_0605_0403_0201), 1500, Permissions::READ).into_bits(),
            [1, 2, 3, 4, 5, 6, 7, 8, 0xdc, 0x05, 0, 0x40, 0x01, 0, 0, 0],
        );
        check(
            RingPte::valid(Hpa::new(1), SLOT_BYTES_MAX, Permissions::WRITE).into_bits(),
            [1, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xbf, 0x01, 0, 0, 0],
        );
        check(
            RingPte::new().with_is_valid(true).into_bits(),
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0],
        );
    }

    #[test]
    fn what_is_written_is_read_back() {
        for permissions in
            [Permissions::empty(), Permissions::READ, Permissions::WRITE, Permissions::READ_WRITE]
        {
            let pte = RingPte::valid(Hpa::new(u64::MAX), 7, permissions);
            assert_eq!((pte.address(), pte.size_bytes()), (Hpa::new(u64::MAX), 7));
            assert_eq!(pte.permissions(), permissions);
        }
        assert!(!RingRoot::from_bits(!1).is_present());
        assert!(!RingDevice::with_rings_at(Hpa::new(16), 0).is_present());
    }

    #[test]
    fn an_address_has_ring_slot_and_offset() {
        for (ring, slot, offset, iova) in [
            (0, 0, 0, 0),
            (1, 0, 0, 1 << 48),
            (0, 1, 0, 1 << 30),
            (0, 0, 1, 1),
            (0x1234, 0x2_3456, 0x3456_789a, 0x1234_8d15_b456_789a),
            (u16::MAX, SLOTS_MAX - 1, SLOT_BYTES_MAX, u64::MAX),
        ] {
            let parts = RingIova { ring, slot, offset };
            assert_eq!(parts.pack(), Iova::new(iova), "{parts:?}");
            assert_eq!(RingIova::unpack(Iova::new(iova)), parts);
        }
    }

    #[test]
    fn slots_go_round() {
        for (size, slot, next) in [
            (4, 0, Some(1)),
            (4, 3, Some(0)),
            (2, 1, Some(0)),
            (1, 0, None),
            (0, 0, None),
            (u32::MAX, SLOTS_MAX - 2, Some(SLOTS_MAX - 1)),
            (u32::MAX, SLOTS_MAX - 1, Some(0)),
        ] {
            assert_eq!(Ring::with_slots_at(Hpa::new(0), size).slot_after(slot), next, "{slot} of {size}");
        }
    }
}
