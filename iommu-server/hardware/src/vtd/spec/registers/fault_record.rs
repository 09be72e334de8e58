//! The fault recording register, and faults as it holds them.

use bitfield_struct::bitfield;
use iommu_types::{
    Access, AddressType, Fault, FaultReason, InterruptFault, Iova, Pasid, SourceId, TranslationFault,
};

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
                    .with_address_type(dma.address_type.bits())
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
            // 3 is reserved and never recorded.
            address_type: AddressType::from_bits(self.address_type()).unwrap_or_default(),
            reason,
        })
    }
}
