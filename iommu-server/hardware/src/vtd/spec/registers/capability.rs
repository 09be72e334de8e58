//! What a unit says of itself: VER, CAP and ECAP, computed from its [`Capabilities`].

use bitfield_struct::bitfield;
use iommu_types::Capabilities;

use super::offset::{self, fault_records_offset};
use crate::vtd::spec::invalidation::INTERRUPT_INDEX_MASK_MAX;

/// VER: 5.0. From 6 on register-based invalidation is gone, and it is offered here.
pub const VERSION: u32 = 5 << 4;

/// CAP (VT-d 5.10 §11.4.2).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Cap {
    /// ND: 6 is 16 bits of domain identifier.
    #[bits(3)]
    pub domain_id_bits: u8,
    #[bits(4)]
    __: u8,
    /// CM.
    pub caching_mode: bool,
    /// SAGAW.
    #[bits(5)]
    pub widths: u8,
    #[bits(3)]
    __: u8,
    /// MGAW: maximum guest width - 1.
    #[bits(6)]
    pub max_guest_width: u8,
    /// ZLR.
    pub zero_length_read: bool,
    #[bits(1)]
    __: u8,
    /// FRO: offset of the fault recording registers / 16.
    #[bits(10)]
    pub fault_record_offset: u16,
    /// SSLPS: bit 0 2 MiB, bit 1 1 GiB.
    #[bits(4)]
    pub large_pages: u8,
    #[bits(1)]
    __: u8,
    /// PSI.
    pub page_selective: bool,
    /// NFR: number of fault recording registers - 1.
    pub fault_record_count: u8,
    /// MAMV.
    #[bits(6)]
    pub max_address_mask: u8,
    /// DWD.
    pub drains_writes: bool,
    /// DRD.
    pub drains_reads: bool,
    #[bits(6)]
    __: u8,
    /// ESIRTPS.
    pub enhanced_set_interrupt_table: bool,
    /// ESRTPS.
    pub enhanced_set_root: bool,
}

impl From<&Capabilities> for Cap {
    fn from(capabilities: &Capabilities) -> Self {
        let large_pages = u8::from(capabilities.pages_2m) | u8::from(capabilities.pages_1g) << 1;
        Self::new()
            .with_domain_id_bits(6)
            .with_caching_mode(capabilities.caching_mode)
            .with_widths(capabilities.widths.bits())
            .with_max_guest_width(capabilities.max_guest_width_bits.saturating_sub(1) & 0x3f)
            .with_zero_length_read(capabilities.zero_length_read)
            .with_fault_record_offset((fault_records_offset(capabilities.fault_records) / 16) as u16)
            .with_large_pages(large_pages)
            .with_page_selective(capabilities.page_selective)
            .with_fault_record_count(capabilities.fault_records.saturating_sub(1) as u8)
            .with_max_address_mask(capabilities.max_address_mask & 0x3f)
            .with_drains_writes(true)
            .with_drains_reads(true)
            .with_enhanced_set_interrupt_table(capabilities.enhanced_set_interrupt_table)
            .with_enhanced_set_root(capabilities.enhanced_set_root)
    }
}

/// ECAP (VT-d 5.10 §11.4.3).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Ecap {
    /// C: table accesses are coherent.
    pub coherent: bool,
    /// QI.
    pub queued_invalidation: bool,
    /// DT.
    pub device_tlb: bool,
    /// IR.
    pub interrupt_remapping: bool,
    /// EIM.
    pub extended_interrupt_mode: bool,
    #[bits(1)]
    __: u8,
    /// PT.
    pub pass_through: bool,
    /// SC.
    pub snoop_control: bool,
    /// IRO: offset of IVA / 16.
    #[bits(10)]
    pub iotlb_offset: u16,
    #[bits(2)]
    __: u8,
    /// MHMV: largest mask of an interrupt-entry invalidation.
    #[bits(4)]
    pub max_handle_mask: u8,
    #[bits(40)]
    __: u64,
}

impl From<&Capabilities> for Ecap {
    fn from(capabilities: &Capabilities) -> Self {
        let handle_mask = if capabilities.interrupt_remapping { INTERRUPT_INDEX_MASK_MAX } else { 0 };
        Self::new()
            .with_coherent(true)
            .with_queued_invalidation(capabilities.queued_invalidation)
            .with_interrupt_remapping(capabilities.interrupt_remapping)
            .with_extended_interrupt_mode(capabilities.extended_interrupt_mode)
            .with_pass_through(capabilities.pass_through)
            .with_snoop_control(capabilities.snoop_control)
            .with_iotlb_offset((offset::IVA / 16) as u16)
            .with_max_handle_mask(handle_mask)
    }
}
