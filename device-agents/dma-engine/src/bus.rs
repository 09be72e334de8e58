//! What the engine needs of its bus, so that it can be tested without one.

use std::future::Future;

use bytes::Bytes;
use device_runtime::{AtomicValue, Batch, Dma, DmaError};
use iommu_types::{DmaFault, Iova};

/// DMA as the engine uses it. Every method is as many operations on the bus as it names.
pub trait Bus: Send + Sync {
    /// Most bytes that one operation may move; at least 8.
    fn operation_bytes_max(&self) -> u32;
    /// One read.
    fn read(&self, iova: Iova, size_bytes: u32) -> impl Future<Output = Result<Bytes, DmaError>> + Send;
    /// One write.
    fn write(&self, iova: Iova, data: Bytes) -> impl Future<Output = Result<(), DmaError>> + Send;
    /// One FetchAdd; gives the old value.
    fn fetch_add(
        &self,
        iova: Iova,
        operand: AtomicValue,
    ) -> impl Future<Output = Result<AtomicValue, DmaError>> + Send;
    /// One interrupt.
    fn msi(&self, address: Iova, data: u32) -> impl Future<Output = Result<(), DmaError>> + Send;
    /// One read each, answered together.
    fn read_each(
        &self,
        pieces: Vec<(Iova, u32)>,
    ) -> impl Future<Output = Result<Vec<Result<Bytes, DmaFault>>, DmaError>> + Send;
    /// One write each, answered together.
    fn write_each(
        &self,
        pieces: Vec<(Iova, Bytes)>,
    ) -> impl Future<Output = Result<Vec<Result<(), DmaFault>>, DmaError>> + Send;
}

impl Bus for Dma {
    fn operation_bytes_max(&self) -> u32 {
        // Without a session every operation fails as lost, whatever its size.
        self.limits().map_or(u32::MAX, |limits| limits.batch_bytes_max.max(8))
    }

    async fn read(&self, iova: Iova, size_bytes: u32) -> Result<Bytes, DmaError> {
        Dma::read(self, iova, size_bytes).await
    }

    async fn write(&self, iova: Iova, data: Bytes) -> Result<(), DmaError> {
        Dma::write(self, iova, data).await
    }

    async fn fetch_add(&self, iova: Iova, operand: AtomicValue) -> Result<AtomicValue, DmaError> {
        Dma::fetch_add(self, iova, operand).await
    }

    async fn msi(&self, address: Iova, data: u32) -> Result<(), DmaError> {
        Dma::msi(self, address, data).await
    }

    async fn read_each(&self, pieces: Vec<(Iova, u32)>) -> Result<Vec<Result<Bytes, DmaFault>>, DmaError> {
        let mut results = Vec::with_capacity(pieces.len());
        for part in parts(self, &pieces, |&(_, size_bytes)| u64::from(size_bytes))? {
            let mut batch = Batch::with_capacity(part.len());
            for &(iova, size_bytes) in part {
                batch.read(iova, size_bytes);
            }
            let completed = self.execute(batch).await?;
            results.extend(completed.results().map(|result| match result.fault {
                Some(fault) => Err(fault),
                None => Ok(Bytes::copy_from_slice(result.bytes)),
            }));
        }
        Ok(results)
    }

    async fn write_each(&self, pieces: Vec<(Iova, Bytes)>) -> Result<Vec<Result<(), DmaFault>>, DmaError> {
        let mut results = Vec::with_capacity(pieces.len());
        for part in parts(self, &pieces, |(_, data)| data.len() as u64)? {
            let mut batch = Batch::with_capacity(part.len());
            for (iova, data) in part {
                batch.write_slice(*iova, data);
            }
            let completed = self.execute(batch).await?;
            results.extend(completed.results().map(|result| result.fault.map_or(Ok(()), Err)));
        }
        Ok(results)
    }
}

/// Cuts pieces into parts that fit one batch of the session each. A piece that is too large alone is a part
/// of its own and is refused as such.
fn parts<'a, T>(dma: &Dma, pieces: &'a [T], size: impl Fn(&T) -> u64) -> Result<Vec<&'a [T]>, DmaError> {
    let limits = dma.limits().ok_or(DmaError::SessionLost)?;
    let (operations_max, bytes_max) =
        (limits.batch_operations_max as usize, u64::from(limits.batch_bytes_max));
    let mut parts = Vec::with_capacity(1);
    let (mut begin, mut bytes) = (0, 0);
    for (index, piece) in pieces.iter().enumerate() {
        let full = index - begin == operations_max || bytes + size(piece) > bytes_max;
        if full && index > begin {
            parts.push(&pieces[begin..index]);
            (begin, bytes) = (index, 0);
        }
        bytes += size(piece);
    }
    parts.push(&pieces[begin..]);
    Ok(parts)
}
