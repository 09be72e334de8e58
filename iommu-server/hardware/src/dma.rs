//! DMA operations over a port: page by page, stopping at the first fault, in bounded bursts.
// CONTRACT (helper D)
use crate::memory::AtomicOperation;
use crate::vtd::{Port, interrupt::DeliveredInterrupt};
use iommu_types::*;

/// What one operation moves.
pub enum Transfer<'a> {
    Read(&'a mut [u8]), // empty slice = zero-length read
    Write(&'a [u8]),    // 4-byte write without PASID to FEEx_xxxx = interrupt
    Atomic(AtomicOperation),
}
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Done {
    Moved,
    Old(u128), /* atomics */
    Interrupt(DeliveredInterrupt),
}

/// A run of operations of one device: keeps the epoch bounds of a burst by itself (leaves and re-enters every 128 operations or 64 KiB; a large operation is split at the bounds,
/// page by page). The wire's batches are executed through this. Any iova + size that wraps is Refusal::Malformed; a misaligned atomic likewise; a translated address
/// without memory behind it is Refusal::NoMemory.
pub struct Run<'p> {
    _port: &'p mut Port,
}
impl<'p> Run<'p> {
    pub fn new(port: &'p mut Port) -> Self {
        todo!()
    }
    pub fn execute(
        &mut self,
        iova: Iova,
        pasid: Option<Pasid>,
        transfer: Transfer<'_>,
    ) -> Result<Done, DmaFault> {
        todo!()
    }
}
