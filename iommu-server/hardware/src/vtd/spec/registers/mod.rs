//! Register layouts (VT-d 5.10 §11.4) and where the registers lie.

mod capability;
mod fault_record;
pub mod offset;

pub use capability::{Cap, Ecap, VERSION};
pub use fault_record::FaultRecord;
pub use offset::{
    FAULT_RECORD_BYTES, FAULT_RECORDS_FIRST_PAGE_MAX, fault_records_offset, register_set_bytes,
};

use bitfield_struct::bitfield;
use iommu_types::{DomainId, SourceId};

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
    /// IQEI: see [`QueueError`](crate::vtd::spec::invalidation::QueueError).
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
