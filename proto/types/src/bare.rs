//! What a unit can do, as its capability registers say it (VT-d 5.10 §11.4.2, §11.4.3).
//!
//! The client of a bare machine chooses within what is built; the managed unit has a fixed choice.

use bitflags::bitflags;

bitflags! {
    /// Second-stage address widths (CAP.SAGAW, same bits).
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct AddressWidths: u8 {
        /// 39 bits, 3 levels.
        const BITS_39 = 1 << 1;
        /// 48 bits, 4 levels.
        const BITS_48 = 1 << 2;
        /// 57 bits, 5 levels.
        const BITS_57 = 1 << 3;
    }
}

/// The choices of a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Capabilities {
    /// CAP.SAGAW.
    pub widths: AddressWidths,
    /// Maximum guest address width in bits (CAP.MGAW + 1), 39 to 57.
    pub max_guest_width_bits: u8,
    /// Host address width in bits: physical addresses above are reserved. 32 to 52.
    pub host_width_bits: u8,
    /// 2 MiB pages (CAP.SSLPS bit 0).
    pub pages_2m: bool,
    /// 1 GiB pages (CAP.SSLPS bit 1); needs `pages_2m`.
    pub pages_1g: bool,
    /// Zero-length reads of write-only pages pass (CAP.ZLR).
    pub zero_length_read: bool,
    /// Not-present and faulting entries may be cached (CAP.CM).
    pub caching_mode: bool,
    /// Pass-through contexts, TT=10 (ECAP.PT).
    pub pass_through: bool,
    /// Snoop control, bit 11 of leaf entries is not reserved (ECAP.SC).
    pub snoop_control: bool,
    /// Queued invalidation (ECAP.QI).
    pub queued_invalidation: bool,
    /// Interrupt remapping (ECAP.IR); needs `queued_invalidation`.
    pub interrupt_remapping: bool,
    /// Extended interrupt mode (ECAP.EIM); needs `interrupt_remapping`.
    pub extended_interrupt_mode: bool,
    /// Page-selective invalidation (CAP.PSI).
    pub page_selective: bool,
    /// Largest address mask of a page-selective invalidation (CAP.MAMV), 0 to 18; 0 without `page_selective`.
    pub max_address_mask: u8,
    /// Fault recording registers (CAP.NFR + 1), 1 to 256.
    pub fault_records: u16,
    /// SRTP invalidates every cache by itself (CAP.ESRTPS).
    pub enhanced_set_root: bool,
    /// SIRTP and IRE off invalidate by themselves (CAP.ESIRTPS).
    pub enhanced_set_interrupt_table: bool,
}

impl Capabilities {
    /// Everything that is built, with caching mode off: what the managed unit has, and what a bare machine gets unless it
    /// asks for less.
    pub const FULL: Self = Self {
        widths: AddressWidths::all(),
        max_guest_width_bits: 57,
        host_width_bits: 46,
        pages_2m: true,
        pages_1g: true,
        zero_length_read: true,
        caching_mode: false,
        pass_through: true,
        snoop_control: true,
        queued_invalidation: true,
        interrupt_remapping: true,
        extended_interrupt_mode: true,
        page_selective: true,
        max_address_mask: 18,
        fault_records: 8,
        enhanced_set_root: false,
        enhanced_set_interrupt_table: false,
    };

    /// Whether the choices make sense together.
    pub fn validate(&self) -> Result<(), InvalidCapabilities> {
        let rule =
            |holds: bool, field, why| if holds { Ok(()) } else { Err(InvalidCapabilities { field, why }) };
        rule(!self.widths.is_empty(), "widths", "at least one of 39, 48 and 57 bits is needed")?;
        rule(
            (39..=57).contains(&self.max_guest_width_bits),
            "max_guest_width_bits",
            "must be between 39 and 57",
        )?;
        rule((32..=52).contains(&self.host_width_bits), "host_width_bits", "must be between 32 and 52")?;
        rule(self.pages_2m || !self.pages_1g, "pages_1g", "1 GiB pages need 2 MiB pages (CAP.SSLPS)")?;
        rule(
            self.queued_invalidation || !self.interrupt_remapping,
            "interrupt_remapping",
            "needs queued_invalidation (ECAP.IR requires ECAP.QI)",
        )?;
        rule(
            self.interrupt_remapping || !self.extended_interrupt_mode,
            "extended_interrupt_mode",
            "needs interrupt_remapping (ECAP.EIM requires ECAP.IR)",
        )?;
        rule(self.max_address_mask <= 18, "max_address_mask", "must be at most 18")?;
        rule(
            self.page_selective || self.max_address_mask == 0,
            "max_address_mask",
            "must be 0 without page_selective",
        )?;
        rule((1..=256).contains(&self.fault_records), "fault_records", "must be between 1 and 256")
    }
}

/// A choice of capabilities that makes no sense, or that is not built.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {why}")]
pub struct InvalidCapabilities {
    /// The field at fault.
    pub field: &'static str,
    /// What it must be.
    pub why: &'static str,
}
