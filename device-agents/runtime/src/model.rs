//! What a device is to the runtime: registers, a reset, and work of its own.

use std::future::Future;

use iommu_proto::limits::MMIO_REFUSED_BYTES_MAX;
use iommu_types::AccessWidth;

use crate::Dma;

/// A register that the driver reads or writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Register {
    /// Base address register, 0 to 5.
    pub bar: u8,
    /// Offset in the BAR in bytes; a multiple of the width.
    pub offset: u64,
    /// How many bytes are accessed.
    pub width: AccessWidth,
}

/// Why a device refused a register access, in words for the driver's author.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{why}")]
pub struct MmioRefusal {
    why: String,
}

impl MmioRefusal {
    /// A refusal with a reason; what goes beyond 256 bytes is cut off.
    pub fn new(why: impl Into<String>) -> Self {
        let mut why = why.into();
        if why.len() > MMIO_REFUSED_BYTES_MAX {
            let cut = (0..=MMIO_REFUSED_BYTES_MAX).rev().find(|&at| why.is_char_boundary(at)).unwrap_or(0);
            why.truncate(cut);
        }
        Self { why }
    }

    /// The reason.
    pub fn why(&self) -> &str {
        &self.why
    }
}

/// A device model: one PCI function.
///
/// Register accesses come one at a time, in the order in which the driver made them; each is answered when
/// its future ends, so a long job belongs into [`run`](Self::run) and is only started by a register. All
/// methods take `&self`, because `run` goes on beside the register accesses.
pub trait DeviceModel: Send + Sync + 'static {
    /// Reads a register. The value must fit the width; bits above it are cut off.
    fn mmio_read(
        &self,
        register: Register,
        dma: &Dma,
    ) -> impl Future<Output = Result<u64, MmioRefusal>> + Send;

    /// Writes a register. The driver's write is answered when the future ends.
    fn mmio_write(
        &self,
        register: Register,
        value: u64,
        dma: &Dma,
    ) -> impl Future<Output = Result<(), MmioRefusal>> + Send;

    /// Function-level reset: back to the state after power-on. DMA that was in flight has failed with
    /// [`DmaError::Reset`](crate::DmaError::Reset) when this is called, and new DMA fails so until it ends.
    fn reset(&self) -> impl Future<Output = ()> + Send;

    /// The work that the device does by itself. Started once, before the first session, and dropped when the
    /// agent ends; it lives through reconnects, during which DMA fails with
    /// [`DmaError::SessionLost`](crate::DmaError::SessionLost).
    fn run(&self, dma: Dma) -> impl Future<Output = ()> + Send {
        let _ = dma;
        std::future::pending()
    }
}
