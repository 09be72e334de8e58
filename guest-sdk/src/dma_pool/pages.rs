//! Where a pool has its pages from: coherent memory of the host, or pages of a virtual machine that stay mapped.

use std::sync::Arc;

use iommu_types::errors::{AllocateError, DmaMapError, DmaUnmapError, ModeRefuses};
use iommu_types::{Direction, DmaAttributes, GpaRange, Iova, IovaRange, Protection};

use crate::error::without_refusal;
use crate::{Buffer, Coherent, DeviceHandle, DmaMapping, Driver, SdkError};

/// Pages that CPU and device share until they are freed. Dropping them frees nothing and is no leak.
#[derive(Debug)]
pub(super) enum PoolPages {
    Coherent(Coherent),
    Mapped { driver: Driver, device: DeviceHandle, buffer: Buffer, iova: IovaRange },
}

fn allocated(error: SdkError<AllocateError>) -> SdkError<DmaMapError> {
    match error {
        SdkError::Refused(refused) => SdkError::Refused(match refused {
            AllocateError::NotAHostDriver(error) => error.into(),
            AllocateError::InvalidField(error) => error.into(),
            AllocateError::OutOfMemory(error) => error.into(),
            AllocateError::LimitReached(error) => error.into(),
        }),
        SdkError::Call(error) => SdkError::Call(error),
        SdkError::Transport(error) => SdkError::Transport(error),
    }
}

impl PoolPages {
    pub(super) async fn take(
        driver: &Driver,
        device: &DeviceHandle,
        size_bytes: u64,
    ) -> Result<Self, SdkError<DmaMapError>> {
        if driver.inner.own_memory.is_none() {
            return driver.dma_alloc_coherent(device, size_bytes).await.map(Self::Coherent);
        }
        let mode = driver.inner.mode_of(device.address()).await.map_err(without_refusal)?;
        if let Some(mode @ Protection::Bounce(_)) = mode {
            let why = "shows a device copies, which are not coherent with a machine's own pages; attach it to a domain of another mode";
            let refused = ModeRefuses { mode: mode.name().to_owned(), why: why.to_owned() };
            return Err(SdkError::Refused(refused.into()));
        }
        let buffer = driver.allocate(size_bytes).await.map_err(allocated)?;
        let mapped = driver.dma_map_single(device, buffer.range(), Direction::Bidirectional).await;
        match mapped {
            Ok(mapping) => {
                let iova = IovaRange::new(mapping.leave_mapped(), buffer.size_bytes());
                let iova = iova.expect("it was one when it was mapped");
                Ok(Self::Mapped { driver: driver.clone(), device: device.clone(), buffer, iova })
            }
            Err(refused @ SdkError::Refused(_)) => {
                // In a virtual machine that cannot fail; where the outcome is unknown, as below, the pages stay taken.
                let _freed = buffer.free().await;
                Err(refused)
            }
            Err(error) => Err(error),
        }
    }

    pub(super) fn iova(&self) -> Iova {
        match self {
            Self::Coherent(coherent) => coherent.iova(),
            Self::Mapped { iova, .. } => iova.base(),
        }
    }

    pub(super) fn range(&self) -> GpaRange {
        match self {
            Self::Coherent(coherent) => coherent.range(),
            Self::Mapped { buffer, .. } => buffer.range(),
        }
    }

    pub(super) async fn free(self) -> Result<(), SdkError<DmaUnmapError>> {
        match self {
            Self::Coherent(coherent) => coherent.free().await,
            Self::Mapped { driver, device, buffer, iova } => {
                let (memory, core) = (buffer.range(), Arc::clone(&driver.inner));
                let (direction, attributes) = (Direction::Bidirectional, DmaAttributes::NONE);
                let mapping = DmaMapping::new(core, device.address(), iova, memory, direction, attributes);
                mapping.unmap().await?;
                let _freed = buffer.free().await;
                Ok(())
            }
        }
    }
}
