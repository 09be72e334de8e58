//! Offsets in the register set, in bytes (VT-d 5.10 §11.4, register summary), chosen so that nothing collides.

/// Version.
pub const VER: u32 = 0x000;
/// Capability.
pub const CAP: u32 = 0x008;
/// Extended capability.
pub const ECAP: u32 = 0x010;
/// Global command.
pub const GCMD: u32 = 0x018;
/// Global status.
pub const GSTS: u32 = 0x01c;
/// Root table address.
pub const RTADDR: u32 = 0x020;
/// Context command.
pub const CCMD: u32 = 0x028;
/// Fault status.
pub const FSTS: u32 = 0x034;
/// Fault event control.
pub const FECTL: u32 = 0x038;
/// Fault event message: data.
pub const FEDATA: u32 = 0x03c;
/// Fault event message: address.
pub const FEADDR: u32 = 0x040;
/// Fault event message: upper address.
pub const FEUADDR: u32 = 0x044;
/// Invalidation queue head.
pub const IQH: u32 = 0x080;
/// Invalidation queue tail.
pub const IQT: u32 = 0x088;
/// Invalidation queue address.
pub const IQA: u32 = 0x090;
/// Invalidation completion status.
pub const ICS: u32 = 0x09c;
/// Invalidation event control.
pub const IECTL: u32 = 0x0a0;
/// Invalidation event message: data.
pub const IEDATA: u32 = 0x0a4;
/// Invalidation event message: address.
pub const IEADDR: u32 = 0x0a8;
/// Invalidation event message: upper address.
pub const IEUADDR: u32 = 0x0ac;
/// Invalidation queue error record.
pub const IQERCD: u32 = 0x0b0;
/// Interrupt remapping table address.
pub const IRTA: u32 = 0x0b8;
/// Invalidate address (at ECAP.IRO x 16; IOTLB follows). Between PEUADDR and the MTRRs nothing else lies.
pub const IVA: u32 = 0x0f0;
/// IOTLB invalidate.
pub const IOTLB: u32 = IVA + 8;
/// Fault recording registers when they fit the first page: behind the ECMD block, below RDT at 0xDC0.
pub const FAULT_RECORDS_FIRST_PAGE: u32 = 0x450;
/// Fault recording registers otherwise: a second page, of nothing else.
pub const FAULT_RECORDS_SECOND_PAGE: u32 = 0x1000;
/// The first register behind the room for fault records in the first page.
pub const RDT: u32 = 0xdc0;

const _: () = assert!(IVA.is_multiple_of(16) && FAULT_RECORDS_FIRST_PAGE.is_multiple_of(16));

/// Bytes of a fault recording register.
pub const FAULT_RECORD_BYTES: u32 = 16;
/// Fault recording registers that fit the first page.
pub const FAULT_RECORDS_FIRST_PAGE_MAX: u16 = ((RDT - FAULT_RECORDS_FIRST_PAGE) / FAULT_RECORD_BYTES) as u16;

/// Where the fault recording registers begin (CAP.FRO x 16).
pub const fn fault_records_offset(fault_records: u16) -> u32 {
    if fault_records <= FAULT_RECORDS_FIRST_PAGE_MAX {
        FAULT_RECORDS_FIRST_PAGE
    } else {
        FAULT_RECORDS_SECOND_PAGE
    }
}

/// Bytes of the whole register set: one page, or two when the fault records need one of their own.
pub const fn register_set_bytes(fault_records: u16) -> u32 {
    if fault_records <= FAULT_RECORDS_FIRST_PAGE_MAX { 0x1000 } else { 0x2000 }
}
