//! Interrupts of a driver's devices.

use std::sync::Arc;

pub use iommu_proto::model::Interrupt;
use iommu_proto::pb;
use iommu_types::Iova;
use tonic::Streaming;

use crate::connection::Core;
use crate::driver::client;
use crate::subscription::{Feed, subscribe};
use crate::{Never, SdkError, Subscription};

/// An interrupt as it is programmed into a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsiVector {
    /// Where the device writes: FEEx_xxxx, in remappable format.
    pub address: Iova,
    /// What it writes.
    pub data: u32,
    /// The vector with which it is delivered.
    pub vector: u8,
}

/// What a subscription to interrupts gives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InterruptEvent {
    /// An interrupt; its count is more than 1 when equal ones were merged.
    Raised(Interrupt),
    /// The connection was lost and is back. What was raised in between is not told, so look at the devices.
    Gap,
}

struct Interrupts {
    core: Arc<Core>,
}

impl Feed for Interrupts {
    type Message = pb::WatchInterruptsResponse;
    type Item = InterruptEvent;
    type Error = Never;

    async fn open(&mut self) -> Result<Streaming<Self::Message>, SdkError<Never>> {
        self.core
            .call(|channel| async move {
                client(channel).watch_interrupts(pb::WatchInterruptsRequest {}).await
            })
            .await
    }

    fn items(&mut self, message: Self::Message) -> Result<Vec<InterruptEvent>, String> {
        let parsed = message.interrupts.into_iter().map(|interrupt| {
            Interrupt::try_from(interrupt).map(InterruptEvent::Raised).map_err(|error| error.to_string())
        });
        parsed.collect()
    }

    fn resumed(&mut self) -> Option<InterruptEvent> {
        Some(InterruptEvent::Gap)
    }
}

pub(crate) async fn watch(core: Arc<Core>) -> Result<Subscription<InterruptEvent, Never>, SdkError<Never>> {
    subscribe(Interrupts { core }).await
}
