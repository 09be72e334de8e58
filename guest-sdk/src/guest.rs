//! What the driver of a virtual machine has beside that of the host: memory of its own, and a hypervisor to ask.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use iommu_proto::limits::HYPERCALL_TIMEOUT_MS;
use iommu_proto::pb;
use iommu_types::errors::{AllocateError, HypercallError, InvalidField, MemoryError, OutOfMemory};
use iommu_types::{DeviceAddress, GpaRange, Protection};

use crate::driver::{DriverCore, client};
use crate::error::without_refusal;
use crate::guest_memory::{self, GuestMemory};
use crate::{Driver, Memory, Never, SdkError};

/// Zeros that are sent in one piece; larger buffers are zeroed piece by piece.
const ZEROS: Bytes = Bytes::from_static(&[0; 64 << 10]);

impl DriverCore {
    /// The memory that the hypervisor gave, as it is now; buffers are allocated in it from now on.
    pub(crate) async fn learn_memory(&self) -> Result<Vec<GpaRange>, SdkError<Never>> {
        let answer = self
            .core
            .unary(pb::ListMemoryRequest {}, |channel, request| async move {
                client(channel).list_memory(request).await
            })
            .await?;
        let regions = guest_memory::regions(answer)?;
        if let Some(own) = &self.own_memory {
            own.learn(&regions);
        }
        Ok(regions)
    }

    /// Allocates zeroed pages of the machine's own memory. What is known of the memory may be old, so it is asked for once before this fails.
    pub(crate) async fn allocate_own(
        &self,
        own: &GuestMemory,
        size_bytes: u64,
    ) -> Result<GpaRange, SdkError<AllocateError>> {
        if size_bytes == 0 {
            let (field, why) = ("size_bytes".to_owned(), "is 0; ask for at least 1 byte".to_owned());
            return Err(SdkError::Refused(InvalidField { field, why }.into()));
        }
        for is_last in [false, true] {
            if let Some(range) = own.take(size_bytes) {
                match self.zero(range).await {
                    Ok(()) => return Ok(range),
                    // Nothing else may be zeroed later by a write that is still on its way: where the outcome is unknown the pages stay taken.
                    Err(SdkError::Refused(refused)) => {
                        own.give_back(range);
                        zero_refused(refused)?;
                    }
                    Err(SdkError::Call(error)) => return Err(error.into()),
                    Err(SdkError::Transport(error)) => return Err(error.into()),
                }
            }
            if !is_last {
                self.learn_memory().await.map_err(without_refusal)?;
            }
        }
        Err(SdkError::Refused(OutOfMemory { size_bytes }.into()))
    }

    async fn zero(&self, range: GpaRange) -> Result<(), SdkError<MemoryError>> {
        let memory = Memory::new(Arc::clone(&self.core), None);
        let piece_bytes = u64::from(self.core.limits().batch_bytes_max).min(ZEROS.len() as u64);
        let mut done = 0;
        while done < range.size_bytes() {
            let bytes = piece_bytes.min(range.size_bytes() - done);
            let at = range.base().checked_add(done).expect("it lies in the range");
            memory.write(at, ZEROS.slice(..bytes as usize)).await?;
            done += bytes;
        }
        Ok(())
    }

    /// The mode of the domain that a device of this owner is attached to; `None` for none.
    pub(crate) async fn mode_of(&self, device: DeviceAddress) -> Result<Option<Protection>, SdkError<Never>> {
        let inspect = crate::Inspect::new(Arc::clone(&self.core));
        let devices = inspect.topology().await?.devices;
        let Some(domain_id) =
            devices.iter().find(|state| state.device == device).and_then(|state| state.domain_id)
        else {
            return Ok(None);
        };
        let domains = match inspect.domains(Some(self.owner)).await {
            Ok(domains) => domains,
            // It has just become somebody else's.
            Err(SdkError::Refused(_)) => return Ok(None),
            Err(SdkError::Call(error)) => return Err(error.into()),
            Err(SdkError::Transport(error)) => return Err(error.into()),
        };
        let domain = domains.into_iter().find(|state| state.domain_id == domain_id);
        Ok(domain.map(|state| state.options.protection))
    }
}

/// Memory that went away since it was listed is looked for elsewhere; other refusals are the caller's to see.
fn zero_refused(refused: MemoryError) -> Result<(), SdkError<AllocateError>> {
    match refused {
        MemoryError::NotOwned(_) => Ok(()),
        MemoryError::LimitReached(limit) => Err(SdkError::Refused(limit.into())),
        MemoryError::InvalidField(field) => Err(SdkError::Refused(field.into())),
        refused => Err(crate::convert::bad_answer(format!("zeroing a buffer: {refused}")).into()),
    }
}

impl Driver {
    /// For a virtual machine: the memory that its hypervisor gave it, by address, as it is now. [`allocate`](Self::allocate) works in it. Empty for
    /// drivers of the host.
    ///
    /// ```no_run
    /// # async fn run() -> Result<(), Box<dyn std::error::Error>> {
    /// use guest_sdk::{Connection, Direction, Owner};
    ///
    /// let driver = Connection::to("https://127.0.0.1:7450").driver("guest1", Owner::Vm(1)).await?;
    /// for region in driver.memory_regions().await? {
    ///     println!("{region}");
    /// }
    /// // A machine maps any memory that it has, by its guest-physical address; a buffer is a way to divide it.
    /// let buffer = driver.allocate(4096).await?;
    /// let device = driver.device("00:03.0".parse()?);
    /// driver.dma_map_single(&device, buffer.range(), Direction::FromDevice).await?.unmap().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn memory_regions(&self) -> Result<Vec<GpaRange>, SdkError<Never>> {
        self.inner.learn_memory().await
    }

    /// For a virtual machine: asks its hypervisor something of at most 4096 bytes, and gives its answer. A call that got no answer because the
    /// connection was lost is **not** made again, as the hypervisor may have acted on it.
    ///
    /// ```no_run
    /// # async fn run(driver: guest_sdk::Driver) -> Result<(), Box<dyn std::error::Error>> {
    /// let answer = driver.hypercall(&b"balloon 16"[..]).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn hypercall(&self, payload: impl Into<Bytes>) -> Result<Bytes, SdkError<HypercallError>> {
        let message = pb::HypercallRequest { payload: payload.into() };
        // The server's own answer, that nobody answered, takes as long.
        let longer = Duration::from_millis(HYPERCALL_TIMEOUT_MS.into());
        let deadline = self.inner.core.deadline().saturating_add(longer);
        let answer = self
            .inner
            .core
            .unary_once_within(deadline, message, |channel, request| async move {
                client(channel).hypercall(request).await
            })
            .await?;
        Ok(answer.payload)
    }
}
