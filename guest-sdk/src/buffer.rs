//! Memory that a driver allocated: from the host, or, in a virtual machine, out of what the machine has.

use std::sync::Arc;

use bytes::Bytes;
use iommu_proto::model::RequestHeader;
use iommu_proto::pb;
use iommu_types::errors::{FreeError, MemoryError};
use iommu_types::{Gpa, GpaRange, InvalidRange};

use crate::driver::DriverCore;
use crate::{Memory, SdkError};

/// A buffer of whole pages in the owner's memory. It stays allocated until it is freed or the session is
/// reclaimed; dropping the value frees nothing.
#[derive(Debug)]
pub struct Buffer {
    driver: Arc<DriverCore>,
    range: GpaRange,
}

impl Buffer {
    pub(crate) fn new(driver: Arc<DriverCore>, range: GpaRange) -> Self {
        Self { driver, range }
    }

    /// Address of the first byte.
    pub fn gpa(&self) -> Gpa {
        self.range.base()
    }

    /// Size in bytes: whole pages.
    pub fn size_bytes(&self) -> u64 {
        self.range.size_bytes()
    }

    /// All of it.
    pub fn range(&self) -> GpaRange {
        self.range
    }

    /// A part: `size_bytes` (at least 1) from `offset`. What leaves the buffer is refused by the server
    /// unless it is memory of the owner as well.
    pub fn slice(&self, offset: u64, size_bytes: u64) -> Result<GpaRange, InvalidRange> {
        let base = self.gpa().checked_add(offset).ok_or(InvalidRange::Wraps {
            space: "gpa",
            base: self.gpa().get(),
            size_bytes: offset,
        })?;
        GpaRange::new(base, size_bytes)
    }

    /// Reads `size_bytes` from `offset`, as the CPU would; any amount.
    pub async fn read(&self, offset: u64, size_bytes: u64) -> Result<Bytes, SdkError<MemoryError>> {
        self.memory().read(self.at(offset)?, size_bytes).await
    }

    /// Writes `data` at `offset`, as the CPU would; any amount.
    pub async fn write(&self, offset: u64, data: impl Into<Bytes>) -> Result<(), SdkError<MemoryError>> {
        self.memory().write(self.at(offset)?, data).await
    }

    /// Gives the buffer back. Refused while a device has any of it mapped, and then given back to the caller.
    ///
    /// In a virtual machine the memory stays the machine's, and nobody is asked: as in any kernel, memory that is freed while a device has it
    /// mapped is the next buffer's, and the device's too.
    pub async fn free(self) -> Result<(), (Self, SdkError<FreeError>)> {
        if let Some(own) = &self.driver.own_memory {
            own.give_back(self.range);
            return Ok(());
        }
        let gpa = self.gpa().get();
        let message = |header: RequestHeader| pb::FreeBufferRequest { header: Some(header.into()), gpa };
        let answer = self
            .driver
            .mutate(message, |mut client, request| async move { client.free_buffer(request).await })
            .await;
        answer.map(drop).map_err(|error| (self, error))
    }

    fn at(&self, offset: u64) -> Result<Gpa, SdkError<MemoryError>> {
        let wraps = InvalidRange::Wraps { space: "gpa", base: self.gpa().get(), size_bytes: offset };
        self.gpa().checked_add(offset).ok_or(SdkError::Refused(wraps.into()))
    }

    fn memory(&self) -> Memory {
        Memory::new(Arc::clone(&self.driver.core), None)
    }
}
