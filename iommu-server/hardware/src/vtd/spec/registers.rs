//! Register layouts (VT-d 5.10 §11.4) and where the registers lie.

use bitfield_struct::bitfield;
use iommu_types::{
    Access, Capabilities, DomainId, Fault, FaultReason, InterruptFault, Iova, Pasid, SourceId,
    TranslationFault,
};

/// Offsets in the register page, in bytes (VT-d 5.10 §11.4, register summary).
pub mod offset {
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

    const _: () = assert!(IVA % 16 == 0 && FAULT_RECORDS_FIRST_PAGE % 16 == 0);
}

/// Bytes of a fault recording register.
pub const FAULT_RECORD_BYTES: u32 = 16;
/// Fault recording registers that fit the first page.
pub const FAULT_RECORDS_FIRST_PAGE_MAX: u16 =
    ((offset::RDT - offset::FAULT_RECORDS_FIRST_PAGE) / FAULT_RECORD_BYTES) as u16;

/// Where the fault recording registers begin (CAP.FRO x 16).
pub const fn fault_records_offset(fault_records: u16) -> u32 {
    if fault_records <= FAULT_RECORDS_FIRST_PAGE_MAX {
        offset::FAULT_RECORDS_FIRST_PAGE
    } else {
        offset::FAULT_RECORDS_SECOND_PAGE
    }
}

/// Bytes of the whole register set: one page, or two when the fault records need one of their own.
pub const fn register_set_bytes(fault_records: u16) -> u32 {
    if fault_records <= FAULT_RECORDS_FIRST_PAGE_MAX { 0x1000 } else { 0x2000 }
}

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
        let handle_mask =
            if capabilities.interrupt_remapping { super::invalidation::INTERRUPT_INDEX_MASK_MAX } else { 0 };
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

/// GCMD and GSTS: the same bits, as commands and as their status (VT-d 5.10 §11.4.4.1, §11.4.4.2).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct GlobalCommand {
    #[bits(23)]
    __: u32,
    /// CFI, CFIS: compatibility-format interrupts pass.
    pub compatibility_interrupts: bool,
    /// SIRTP, IRTPS: latch IRTA.
    pub set_interrupt_table: bool,
    /// IRE, IRES: interrupt remapping is on.
    pub interrupt_remapping: bool,
    /// QIE, QIES: the invalidation queue is on.
    pub queued_invalidation: bool,
    /// WBF, WBFS: flush write buffers. There are none (CAP.RWBF=0).
    pub write_buffer_flush: bool,
    /// EAFL, AFLS: deprecated.
    pub advanced_fault_log: bool,
    /// SFL, FLS: deprecated.
    pub set_fault_log: bool,
    /// SRTP, RTPS: latch RTADDR.
    pub set_root_table: bool,
    /// TE, TES: translation is on.
    pub translation: bool,
}

/// GCMD: commands.
pub type Gcmd = GlobalCommand;
/// GSTS: their status.
pub type Gsts = GlobalCommand;

/// What software keeps of GSTS when it composes GCMD: everything but the one-shot commands.
pub const GSTS_KEPT: u32 = 0x96ff_ffff;

/// RTADDR (VT-d 5.10 §11.4.5).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Rtaddr {
    #[bits(7)]
    __: u8,
    /// SSIRWE: not built; invalid in legacy mode.
    pub second_stage_ir_iw: bool,
    #[bits(2)]
    __: u8,
    /// TTM: 00 legacy, 01 scalable, 10 reserved, 11 abort-DMA.
    #[bits(2)]
    pub table_mode: u8,
    /// Number of the frame that holds the root table.
    #[bits(52)]
    pub frame: u64,
}

/// CCMD (VT-d 5.10 §11.4.6.1).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Ccmd {
    /// DID.
    #[bits(16, from = DomainId::new, into = DomainId::get)]
    pub domain_id: DomainId,
    /// SID.
    #[bits(16, from = SourceId::new, into = SourceId::get)]
    pub source_id: SourceId,
    /// FM.
    #[bits(2)]
    pub function_mask: u8,
    #[bits(25)]
    __: u32,
    /// CAIG: the granularity that was done; 0 for a request that was ignored.
    #[bits(2)]
    pub actual_granularity: u8,
    /// CIRG: 1 global, 2 domain, 3 device.
    #[bits(2)]
    pub granularity: u8,
    /// ICC: set by software to begin, cleared when done.
    pub invalidate: bool,
}

/// IOTLB (VT-d 5.10 §11.4.6.2).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Iotlb {
    #[bits(32)]
    __: u32,
    /// DID.
    #[bits(16, from = DomainId::new, into = DomainId::get)]
    pub domain_id: DomainId,
    /// DW: ignored, every invalidation drains.
    pub drain_writes: bool,
    /// DR: ignored, every invalidation drains.
    pub drain_reads: bool,
    #[bits(7)]
    __: u8,
    /// IAIG: the granularity that was done; 0 for a request that was ignored.
    #[bits(2)]
    pub actual_granularity: u8,
    #[bits(1)]
    __: u8,
    /// IIRG: 1 global, 2 domain, 3 page.
    #[bits(2)]
    pub granularity: u8,
    #[bits(1)]
    __: u8,
    /// IVT: set by software to begin, cleared when done.
    pub invalidate: bool,
}

/// IVA (VT-d 5.10 §11.4.6.2.1).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Iva {
    /// AM: 2^AM pages.
    #[bits(6)]
    pub address_mask: u8,
    /// IH: only leaf entries changed.
    pub leaf_only: bool,
    #[bits(5)]
    __: u8,
    /// Page number of the address.
    #[bits(52)]
    pub page_number: u64,
}

/// FSTS (VT-d 5.10 §11.4.7.1).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Fsts {
    /// PFO: a fault found no room (RW1CS).
    pub overflow: bool,
    /// PPF: some recording register has F set (RO).
    pub pending: bool,
    #[bits(2)]
    __: u8,
    /// IQE (RW1CS).
    pub queue_error: bool,
    /// ICE (RW1CS).
    pub completion_error: bool,
    /// ITE (RW1CS).
    pub timeout_error: bool,
    #[bits(1)]
    __: u8,
    /// FRI: where the first pending record lies.
    pub record_index: u8,
    #[bits(16)]
    __: u16,
}

impl Fsts {
    /// The bits that a one clears.
    pub const WRITE_ONE_TO_CLEAR: u32 = 0b111_0001;
    /// The bits of which one set already keeps a new event from being raised.
    pub const EVENT_CONDITIONS: u32 = 0b111_0011;
}

/// FECTL and IECTL: event control (VT-d 5.10 §11.4.7.2).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct EventControl {
    #[bits(30)]
    __: u32,
    /// IP: an event waits to be sent (RO).
    pub pending: bool,
    /// IM: events are held back. Set after reset.
    pub masked: bool,
}

/// FECTL.
pub type Fectl = EventControl;
/// IECTL.
pub type Iectl = EventControl;

/// IQA (VT-d 5.10 §11.4.9.3).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Iqa {
    /// QS: the queue has 2^QS pages.
    #[bits(3)]
    pub size: u8,
    #[bits(8)]
    __: u8,
    /// DW: descriptors have 256 bits.
    pub wide: bool,
    /// Number of the frame where the queue begins.
    #[bits(52)]
    pub frame: u64,
}

impl Iqa {
    /// Bytes of the queue.
    pub const fn bytes(self) -> u64 {
        4096 << self.size()
    }
    /// Bytes of a descriptor: 16 or 32.
    pub const fn descriptor_bytes(self) -> u64 {
        if self.wide() { 32 } else { 16 }
    }
}

/// IQH and IQT: an offset into the queue in units of 16 bytes (VT-d 5.10 §11.4.9.1, §11.4.9.2).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct QueuePointer {
    #[bits(4)]
    __: u8,
    /// Bits 18:4. With 256-bit descriptors bit 4 of the register is reserved.
    #[bits(15)]
    pub index: u16,
    #[bits(45)]
    __: u64,
}

/// IQH.
pub type Iqh = QueuePointer;
/// IQT.
pub type Iqt = QueuePointer;

/// IQERCD (VT-d 5.10 §11.4.9.9).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Iqercd {
    /// IQEI: see [`QueueError`](super::invalidation::QueueError).
    #[bits(4)]
    pub error: u8,
    #[bits(28)]
    __: u32,
    /// ITESID.
    #[bits(16, from = SourceId::new, into = SourceId::get)]
    pub timeout_source: SourceId,
    /// ICESID.
    #[bits(16, from = SourceId::new, into = SourceId::get)]
    pub completion_source: SourceId,
}

/// ICS (VT-d 5.10 §11.4.9.4).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Ics {
    /// IWC: a wait descriptor with IF completed (RW1CS).
    pub wait_complete: bool,
    #[bits(31)]
    __: u32,
}

/// IRTA (VT-d 5.10 §11.4.10).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Irta {
    /// S: the table has 2^(S+1) entries.
    #[bits(4)]
    pub size: u8,
    #[bits(7)]
    __: u8,
    /// EIME: destinations have 32 bits.
    pub extended_mode: bool,
    /// Number of the frame where the table begins.
    #[bits(52)]
    pub frame: u64,
}

/// FRCD: a fault recording register (VT-d 5.10 §11.4.7.6).
#[bitfield(u128)]
#[derive(PartialEq, Eq)]
pub struct FaultRecord {
    #[bits(12)]
    __: u16,
    /// FI: page number of the address; for interrupts bits 63:48 of the register are the index.
    #[bits(52)]
    pub fault_page: u64,
    /// SID.
    #[bits(16, from = SourceId::new, into = SourceId::get)]
    pub source_id: SourceId,
    #[bits(12)]
    __: u16,
    /// T2: with T1 the type of the request.
    pub type_2: bool,
    /// PRIV.
    pub privileged: bool,
    /// EXE.
    pub execute: bool,
    /// PP: the request had a PASID.
    pub has_pasid: bool,
    /// FR.
    pub reason: u8,
    /// PASID.
    #[bits(20)]
    pub pasid: u32,
    /// AT.
    #[bits(2)]
    pub address_type: u8,
    /// T1: with T2, 00 write, 01 page request, 10 read, 11 atomic.
    pub type_1: bool,
    /// F (RW1CS): the record is pending.
    pub fault: bool,
}

impl FaultRecord {
    /// The record of a fault, without F: setting that is the last step of recording.
    pub fn of(fault: &Fault) -> Self {
        match fault {
            Fault::Dma(dma) => {
                let (type_1, type_2) = match dma.access {
                    Access::Write => (false, false),
                    Access::Read => (true, false),
                    Access::Atomic => (true, true),
                };
                Self::new()
                    .with_fault_page(dma.iova.page_number())
                    .with_source_id(dma.source_id)
                    .with_reason(dma.reason.0)
                    .with_type_1(type_1)
                    .with_type_2(type_2)
                    .with_has_pasid(dma.pasid.is_some())
                    .with_pasid(dma.pasid.map_or(0, Pasid::get))
            }
            Fault::Interrupt(interrupt) => Self::new()
                .with_fault_page(u64::from(interrupt.index.unwrap_or(0)) << 36)
                .with_source_id(interrupt.source_id)
                .with_reason(interrupt.reason.0),
        }
    }

    /// The fault that the record holds. The low 12 bits of a DMA address are gone; the index of an interrupt is `None`
    /// where the reason leaves it undefined.
    pub fn to_fault(self) -> Fault {
        let reason = FaultReason(self.reason());
        let source_id = self.source_id();
        // 0x29 is a DMA to the interrupt range that is no interrupt: it keeps its address, as any DMA does.
        if (0x20..=0x2f).contains(&reason.0) && reason != FaultReason::IR_INVALID_ACCESS {
            let defined = !matches!(reason.0, 0x20 | 0x25 | 0x2a | 0x2b);
            let index = defined.then_some((self.fault_page() >> 36) as u16);
            return Fault::Interrupt(InterruptFault { source_id, index, reason });
        }
        let access = match (self.type_1(), self.type_2()) {
            (true, true) => Access::Atomic,
            (true, false) => Access::Read,
            // A page request (01) is never recorded here: there is no PRI.
            (false, _) => Access::Write,
        };
        Fault::Dma(TranslationFault {
            source_id,
            pasid: if self.has_pasid() { Pasid::new(self.pasid()) } else { None },
            iova: Iova::new(self.fault_page() << 12),
            access,
            reason,
        })
    }
}
