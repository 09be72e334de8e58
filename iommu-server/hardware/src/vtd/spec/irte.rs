//! Interrupt remapping: the entry (VT-d 5.10 §9.10) and the two formats of an interrupt request (§5.1.2).
//!
//! ```text
//! entry    127     84 83 82 81 80 79    64 63          32 31  24 23   16 15 14 12 11  8 7  5 4  3  2  1   0
//!         | reserved |SVT  |SQ   | SID    | destination  | rsvd | vector|IM|rsvd |avail|DLM |TM|RH|DM|FPD|P|
//! ```

use bitfield_struct::bitfield;
use iommu_types::{Hpa, SourceId};

/// Bytes of one entry.
pub const ENTRY_BYTES: u64 = 16;

/// An interrupt remapping table entry in remapped format (VT-d 5.10 §9.10).
#[bitfield(u128)]
#[derive(PartialEq, Eq)]
pub struct Irte {
    /// P.
    pub is_present: bool,
    /// FPD: qualified faults of this entry are not recorded. Counts in an entry that is not present, too.
    pub fault_processing_disable: bool,
    /// DM: the destination is logical.
    pub logical_destination: bool,
    /// RH.
    pub redirection_hint: bool,
    /// TM: level triggered.
    pub level_triggered: bool,
    /// DLM.
    #[bits(3)]
    pub delivery_mode: u8,
    /// Available to software.
    #[bits(4)]
    pub available: u8,
    #[bits(3)]
    __: u8,
    /// IM: posted format. Not built: reported as reserved (24).
    pub posted: bool,
    /// V.
    pub vector: u8,
    #[bits(8)]
    __: u8,
    /// DST: 32 bits in extended mode, else the APIC ID in bits 15:8 of this field.
    pub destination_field: u32,
    /// SID: a source, or for a bus range its first bus (high byte) and last bus (low byte).
    pub source_field: u16,
    /// SQ: which function bits of the source are ignored. 1 bit 2, 2 bits 2:1, 3 bits 2:0.
    #[bits(2)]
    pub source_qualifier: u8,
    /// SVT: 0 any source, 1 the source field with SQ, 2 bus range, 3 reserved.
    #[bits(2)]
    pub source_validation: u8,
    #[bits(44)]
    __: u64,
}

impl Irte {
    /// SVT 00: every source may use the entry.
    pub const SOURCE_ANY: u8 = 0;
    /// SVT 01: the source field, of which SQ ignores some function bits.
    pub const SOURCE_ID: u8 = 1;
    /// SVT 10: sources whose bus lies in a range.
    pub const SOURCE_BUS_RANGE: u8 = 2;

    /// The entry (extended mode, fixed delivery, edge triggered) that only `source` may use; `None` admits every source.
    pub const fn remapped(vector: u8, destination: u32, source: Option<SourceId>) -> Self {
        let entry = Self::new().with_is_present(true).with_vector(vector).with_destination_field(destination);
        match source {
            None => entry,
            Some(source) => entry.with_source_validation(Self::SOURCE_ID).with_source_field(source.get()),
        }
    }
    /// The destination as xAPIC mode holds it.
    pub const fn with_xapic_destination(self, apic_id: u8) -> Self {
        self.with_destination_field((apic_id as u32) << 8)
    }
    /// The entry for the sources of buses `first..=last`.
    pub const fn with_bus_range(self, first: u8, last: u8) -> Self {
        self.with_source_validation(Self::SOURCE_BUS_RANGE)
            .with_source_field((first as u16) << 8 | last as u16)
    }
    /// The destination as the mode reads it.
    pub const fn destination(self, extended_mode: bool) -> u32 {
        if extended_mode { self.destination_field() } else { self.destination_field() >> 8 & 0xff }
    }
    /// The bits that must be zero in a present entry: IM too, because posting is not built, and outside extended mode all of
    /// the destination but its 8 bits.
    pub const fn reserved_bits(extended_mode: bool) -> u128 {
        let always = u128::MAX << 84 | 0xff00_f000;
        if extended_mode { always } else { always | 0xffff_00ffu128 << 32 }
    }
}

/// Where the entry of an index lies, or `None` when that is beyond 64 bits.
pub const fn entry_address(table: Hpa, index: u16) -> Option<Hpa> {
    table.checked_add(index as u64 * ENTRY_BYTES)
}

/// The address of an interrupt request (VT-d 5.10 §5.1.2.2): remappable when bit 4 is set, else compatibility format.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct InterruptAddress {
    #[bits(2)]
    __: u8,
    /// Handle bit 15 (remappable). DM in compatibility format.
    pub handle_high: bool,
    /// SHV: the low half of the data word is added to the handle (remappable). RH in compatibility format.
    pub subhandle_valid: bool,
    /// The interrupt format: 1 is remappable.
    pub remappable: bool,
    /// Handle bits 14:0 (remappable).
    #[bits(15)]
    pub handle_low: u16,
    /// 0xFEE.
    #[bits(12)]
    pub prefix: u16,
}

impl InterruptAddress {
    /// The address of a remappable request.
    pub const fn remappable_request(handle: u16, subhandle_valid: bool) -> Self {
        Self::new()
            .with_prefix(0xfee)
            .with_remappable(true)
            .with_subhandle_valid(subhandle_valid)
            .with_handle_low(handle & 0x7fff)
            .with_handle_high(handle & 0x8000 != 0)
    }
    /// The handle.
    pub const fn handle(self) -> u16 {
        self.handle_low() | (self.handle_high() as u16) << 15
    }
    /// Destination of a compatibility-format request (bits 19:12).
    pub const fn compatibility_destination(self) -> u8 {
        (self.into_bits() >> 12) as u8
    }
}
