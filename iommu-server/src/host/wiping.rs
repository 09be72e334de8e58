//! Wiping memory before it changes hands (I9), where no DMA waits for it: a gibibyte takes a tenth of a second.

use std::future::pending;
use std::panic::resume_unwind;

use iommu_kernel::Left;

use super::Host;
use super::owners::OwnerState;
use crate::bounds;

impl Host {
    /// Wipes so much with nothing locked: a little on the spot, more on a thread of its own, of which there are [`bounds::WIPING_MAX`] at once.
    pub(super) async fn wiped<T: Send + 'static>(
        &self,
        size_bytes: u64,
        wipe: impl FnOnce() -> T + Send + 'static,
    ) -> T {
        if size_bytes <= bounds::WIPED_ON_THE_SPOT_BYTES {
            return wipe();
        }
        let _turn = self.wiping.acquire().await.expect("it is never closed");
        match tokio::task::spawn_blocking(wipe).await {
            Ok(done) => done,
            Err(error) if error.is_panic() => resume_unwind(error.into_panic()),
            // The server ends, and so does whoever waits here.
            Err(_) => pending().await,
        }
    }

    /// Takes all memory from an owner and wipes it; returns how many bytes. Nothing of it may be mapped any more.
    pub(super) async fn wipe_all_of(&self, owner: &OwnerState) -> u64 {
        let all = owner.memory.write().take_all(&self.kernel);
        let size_bytes = all.iter().map(|left: &Left| left.range().size_bytes()).sum();
        self.wiped(size_bytes, move || drop(all)).await;
        size_bytes
    }
}
