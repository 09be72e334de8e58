//! Root and context entries in legacy mode (VT-d 5.10 §9.1, §9.3).
//!
//! ```text
//! root     127          64 63                    12 11       1 0
//!         |   reserved    | context table (CTP)    | reserved |P|
//!
//! context  127    88 87   72 71 70 67 66 64 63                    12 11  4 3  2 1   0
//!         | reserved| DID   |r |ign  | AW  | second-stage table     | rsvd | TT |FPD|P|
//! ```

use bitfield_struct::bitfield;
use iommu_types::{AddressWidths, DomainId, Hpa};

use super::beyond_host_width;

/// Entries in a root table (indexed by bus) and in a context table (indexed by device and function).
pub const ENTRIES_PER_TABLE: u64 = 256;
/// Bytes of a root or context entry.
pub const ENTRY_BYTES: u64 = 16;

/// A root entry (VT-d 5.10 §9.1).
#[bitfield(u128)]
#[derive(PartialEq, Eq)]
pub struct RootEntry {
    /// P.
    pub is_present: bool,
    #[bits(11)]
    __: u16,
    /// CTP: number of the frame that holds the context table.
    #[bits(52)]
    pub context_table_frame: u64,
    #[bits(64)]
    __: u64,
}

impl RootEntry {
    /// The entry that points to a context table. Bits 11:0 of the address are lost.
    pub const fn present(context_table: Hpa) -> Self {
        Self::new().with_is_present(true).with_context_table_frame(context_table.page_number())
    }
    /// Where the context table lies.
    pub const fn context_table(self) -> Hpa {
        Hpa::new(self.context_table_frame() << 12)
    }
    /// The bits that must be zero in a present entry.
    pub const fn reserved_bits(host_width_bits: u8) -> u128 {
        (u64::MAX as u128) << 64 | beyond_host_width(host_width_bits) as u128 | 0xffe
    }
}

/// TT: what the entry does with requests. 01 (with device TLB) and 11 (reserved) are not built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TranslationType(pub u8);

impl TranslationType {
    /// 00: untranslated requests are translated, all others are blocked.
    pub const SECOND_STAGE: Self = Self(0b00);
    /// 01: also translation requests and translated requests (needs ECAP.DT).
    pub const DEVICE_TLB: Self = Self(0b01);
    /// 10: untranslated requests pass as they are (needs ECAP.PT).
    pub const PASS_THROUGH: Self = Self(0b10);

    const fn from_bits(bits: u8) -> Self {
        Self(bits)
    }
    const fn into_bits(self) -> u8 {
        self.0
    }
}

/// A context entry (VT-d 5.10 §9.3).
#[bitfield(u128)]
#[derive(PartialEq, Eq)]
pub struct ContextEntry {
    /// P.
    pub is_present: bool,
    /// FPD: qualified faults of this device are not recorded. Counts in an entry that is not present, too.
    pub fault_processing_disable: bool,
    /// TT.
    #[bits(2)]
    pub translation_type: TranslationType,
    #[bits(8)]
    __: u8,
    /// SSPTPTR: number of the frame that holds the top-level second-stage table.
    #[bits(52)]
    pub second_stage_frame: u64,
    /// AW: 1 is 39 bits and 3 levels, 2 is 48 and 4, 3 is 57 and 5.
    #[bits(3)]
    pub address_width: u8,
    /// Ignored by the walk; software may use them.
    #[bits(4)]
    pub ignored: u8,
    #[bits(1)]
    __: u8,
    /// DID.
    #[bits(16, from = DomainId::new, into = DomainId::get)]
    pub domain_id: DomainId,
    #[bits(40)]
    __: u64,
}

impl ContextEntry {
    /// The entry that translates through a second-stage table of 3, 4 or 5 levels.
    pub const fn second_stage(table: Hpa, levels: u8, domain_id: DomainId) -> Self {
        assert!(levels >= 3 && levels <= 5, "second-stage tables have 3, 4 or 5 levels");
        Self::new()
            .with_is_present(true)
            .with_second_stage_frame(table.page_number())
            .with_address_width(levels - 2)
            .with_domain_id(domain_id)
    }
    /// The entry that passes requests as they are. `levels` must be the most that the unit supports.
    pub const fn pass_through(levels: u8, domain_id: DomainId) -> Self {
        Self::second_stage(Hpa::new(0), levels, domain_id)
            .with_translation_type(TranslationType::PASS_THROUGH)
    }
    /// Where the top-level second-stage table lies.
    pub const fn second_stage_table(self) -> Hpa {
        Hpa::new(self.second_stage_frame() << 12)
    }
    /// AW as a width of CAP.SAGAW, or `None` for a value without a meaning.
    pub const fn width(self) -> Option<AddressWidths> {
        match self.address_width() {
            1 => Some(AddressWidths::BITS_39),
            2 => Some(AddressWidths::BITS_48),
            3 => Some(AddressWidths::BITS_57),
            _ => None,
        }
    }
    /// Levels of the tables that AW stands for (AW + 2); only 3, 4 and 5 have a meaning.
    pub const fn levels(self) -> u8 {
        self.address_width() + 2
    }
    /// The bits that must be zero in a present entry. A pass-through entry ignores the table pointer altogether.
    pub const fn reserved_bits(self, host_width_bits: u8) -> u128 {
        let high = 0xffff_ffff_ff00_0080u128 << 64;
        match self.translation_type() {
            TranslationType::PASS_THROUGH => high | 0xff0,
            _ => high | beyond_host_width(host_width_bits) as u128 | 0xff0,
        }
    }
}

/// Where the entry of an index lies in a root or context table, or `None` when that is beyond 64 bits.
pub const fn entry_address(table: Hpa, index: u8) -> Option<Hpa> {
    table.checked_add(index as u64 * ENTRY_BYTES)
}
