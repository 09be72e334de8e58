//! Second-stage page-table entries (VT-d 5.10 §9.8).
//!
//! ```text
//!   63  62  61  60      53 52   51    HAW HAW-1            12 11  10 9 8 7  6    5  3 2 1 0
//!  |ign|rsv|ign| ignored  |part| rsvd    | frame address     |SNP|i |D|A|PS|IPAT|EMT |i|W|R|
//! ```
//!
//! Bit 52 is one of those that the specification leaves to software. A unit with byte extents reads it in the leaf of a 4 KiB page (see
//! [`extent`](super::extent)); to every other unit, and everywhere else, it is ignored.
//!
//! Bits 61 and 62 have a meaning only with SSIRWE, which is not built: 61 is ignored and 62 is reserved.

use bitfield_struct::bitfield;
use iommu_types::{Hpa, Iova, PageSize, Permissions};

use super::beyond_host_width;

/// Entries in one table.
pub const ENTRIES_PER_TABLE: u64 = 512;
/// Bytes of one entry.
pub const ENTRY_BYTES: u64 = 8;

/// A second-stage entry: a pointer to a table, or a page (VT-d 5.10 §9.8).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct SecondStageEntry {
    /// R.
    pub read: bool,
    /// W.
    pub write: bool,
    #[bits(1)]
    __: u8,
    /// EMT: memory type, without a meaning to DMA.
    #[bits(3)]
    pub memory_type: u8,
    /// IPAT.
    pub ignore_pat: bool,
    /// PS: a leaf at level 2 or 3. Ignored at level 1, reserved above 3.
    pub page_size: bool,
    /// A.
    pub accessed: bool,
    /// D (leaves).
    pub dirty: bool,
    #[bits(1)]
    __: u8,
    /// SNP (leaves, with ECAP.SC).
    pub snoop: bool,
    /// Bits 51:12: number of the frame.
    #[bits(40)]
    pub frame: u64,
    /// Bit 52: our mark of a 4 KiB page that is granted only in part. Ignored by units without byte extents.
    pub partial_page: bool,
    /// Bits 60:53, ignored by the walk.
    #[bits(8)]
    pub software: u8,
    #[bits(3)]
    __: u8,
}

impl SecondStageEntry {
    /// The entry of a page. The frame must be aligned to the size.
    pub const fn leaf(hpa: Hpa, size: PageSize, permissions: Permissions) -> Self {
        assert!(hpa.is_aligned(size.bytes()), "a page starts at a multiple of its size");
        Self::new()
            .with_read(permissions.contains(Permissions::READ))
            .with_write(permissions.contains(Permissions::WRITE))
            .with_page_size(!matches!(size, PageSize::Size4K))
            .with_frame(hpa.page_number())
    }
    /// The entry that points to a table, with both permissions: the leaves below decide.
    pub const fn table(hpa: Hpa) -> Self {
        assert!(hpa.is_aligned(4096), "a table starts at a multiple of 4 KiB");
        Self::new().with_read(true).with_write(true).with_frame(hpa.page_number())
    }
    /// R and W.
    pub const fn permissions(self) -> Permissions {
        Permissions::from_bits_truncate(self.into_bits() as u8)
    }
    /// Whether the entry is present: R or W is set.
    pub const fn is_present(self) -> bool {
        !self.permissions().is_empty()
    }
    /// Whether the entry is a page when it stands at `level`.
    pub const fn is_leaf_at(self, level: u8) -> bool {
        level == 1 || (level <= 3 && self.page_size())
    }
    /// The address that the entry holds: a table or the start of a page.
    pub const fn address(self) -> Hpa {
        Hpa::new(self.frame() << 12)
    }
    /// The bits that must be zero when this (present) entry stands at `level`.
    #[inline]
    pub const fn reserved_bits(self, level: u8, checks: ReservedChecks) -> u64 {
        let (table, leaf) = checks.at_level(level);
        if self.is_leaf_at(level) { leaf } else { table }
    }
}

/// What a unit's capabilities make reserved in second-stage entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReservedChecks {
    /// Physical addresses above are reserved.
    pub host_width_bits: u8,
    /// 2 MiB pages exist.
    pub pages_2m: bool,
    /// 1 GiB pages exist.
    pub pages_1g: bool,
    /// Bit 11 of a leaf has a meaning.
    pub snoop_control: bool,
}

impl ReservedChecks {
    const PS: u64 = 1 << 7;
    const SNP: u64 = 1 << 11;

    /// The reserved bits at a level: of an entry that points to a table, and of one that is a page.
    #[inline]
    const fn at_level(self, level: u8) -> (u64, u64) {
        let always = (beyond_host_width(self.host_width_bits) & ((1 << 52) - 1)) | 1 << 62;
        let leaf = if self.snoop_control { always } else { always | Self::SNP };
        let table = always | Self::SNP;
        match level {
            1 => (table, leaf),
            2 if self.pages_2m => (table, leaf | 0x1f_f000),
            3 if self.pages_1g => (table, leaf | 0x3fff_f000),
            // A page of a size that the unit lacks, or PS where no page can stand.
            _ => (table | Self::PS, leaf | Self::PS),
        }
    }
}

/// The index of an address in a table of `level` (1 to 5).
#[inline]
pub const fn table_index(iova: Iova, level: u8) -> u64 {
    (iova.get() >> level_shift(level)) % ENTRIES_PER_TABLE
}

/// Low address bits below an entry of `level`: 12 at level 1, 21 at level 2, 48 at level 5.
#[inline]
pub const fn level_shift(level: u8) -> u32 {
    3 + 9 * level as u32
}

/// Where the entry of an address lies in a table of `level`, or `None` when that is beyond 64 bits.
#[inline]
pub const fn entry_address(table: Hpa, iova: Iova, level: u8) -> Option<Hpa> {
    table.checked_add(table_index(iova, level) * ENTRY_BYTES)
}
