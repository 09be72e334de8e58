//! The eyes of a domain's sanitizer on a device: on what is written to its registers, and on one batch of its DMA.
//!
//! While the batch runs, what is seen is only noted: the device holds an epoch then, for which invalidations wait, so nothing else is
//! waited for. When the batch is done and before its completions leave, the sanitizer is told of all of it, in order.

use std::ops::Range;

use iommu_hardware::dma::Done;
use iommu_kernel::{Moment, RegisterWrite};
use iommu_proto::dma::{Action, Operation};
use iommu_proto::model::MmioAccess;
use iommu_types::{Access, DeviceAddress, DmaFault, FaultReason, SeenAccess};

use super::execute::Watch;
use crate::host::devices::DeviceState;
use crate::host::sanitizer::WatchedDomain;
use crate::telemetry;

/// Reasons of refused interrupts (VT-d 5.10 §7.1: 20h to 26h). An interrupt is no DMA.
const INTERRUPT_REASONS: Range<u8> = 0x20..0x30;

/// What is written to a register of a device may be an address: the sanitizer knows it before the device does. Who writes makes no
/// difference: it was not the device.
pub(crate) fn supply(device: &DeviceState, access: MmioAccess) {
    let Some(value) = access.write_value else { return };
    // Registers of two BARs are not neighbours.
    let offset = access.offset.wrapping_add(u64::from(access.bar) << 60);
    let write = RegisterWrite { offset, width: access.width, value };
    device.written(write, |domain| {
        let now = Moment { at_us: telemetry::now().0, order: domain.handle().clock().now() };
        domain.handle().with(|sanitizer| sanitizer.supplied(now, device.address, write));
        domain.file();
    });
}

struct Seen {
    begun: Moment,
    access: SeenAccess,
    /// Which of the results of the batch it brought back, if any.
    result: Option<Range<usize>>,
}

/// Notes what a device does in one batch.
pub(crate) struct BatchWatch<'d> {
    domain: &'d WatchedDomain,
    device: DeviceAddress,
    seen: Vec<Seen>,
}

impl<'d> BatchWatch<'d> {
    pub(crate) fn new(domain: &'d WatchedDomain, device: DeviceAddress) -> Self {
        Self { domain, device, seen: Vec::new() }
    }
    /// Tells the sanitizer, and files what it has to say.
    pub(crate) fn tell(self, results: &[u8]) {
        let Self { domain, device, seen } = self;
        domain.handle().with(|sanitizer| {
            for Seen { begun, access, result } in seen {
                let result = result.and_then(|result| results.get(result));
                sanitizer.dma(begun, begun.at_us, device, access, result);
            }
        });
        domain.file();
    }
}

/// What an operation asks of memory; `None` for nonsense.
fn asked(operation: &Operation<'_>) -> Option<Access> {
    match operation.action {
        Action::Read => Some(Access::Read),
        Action::Write { .. } => Some(Access::Write),
        Action::Atomic(_) => Some(Access::Atomic),
        Action::Malformed => None,
    }
}

impl Watch for BatchWatch<'_> {
    const IS_ON: bool = true;
    type Begun = Moment;

    fn begin(&mut self) -> Moment {
        Moment { at_us: telemetry::now().0, order: self.domain.handle().clock().now() }
    }

    fn end(
        &mut self,
        begun: Moment,
        operation: &Operation<'_>,
        outcome: Result<Done, DmaFault>,
        result: Range<usize>,
    ) {
        let Some(access) = asked(operation) else { return };
        let (done_bytes, refused): (u32, Option<FaultReason>) = match outcome {
            Ok(Done::Interrupt(_)) => return,
            Ok(Done::Moved | Done::Old(_)) => (operation.size_bytes, None),
            // Refused outside translation: it was nonsense, or there is no memory at all.
            Err(DmaFault { reason: Err(_), .. }) => return,
            Err(DmaFault { reason: Ok(reason), .. }) if INTERRUPT_REASONS.contains(&reason.0) => return,
            Err(DmaFault { reason: Ok(reason), done_bytes, .. }) => (done_bytes, Some(reason)),
        };
        let (iova, size_bytes) = (operation.iova, operation.size_bytes);
        let access = SeenAccess { iova, size_bytes, done_bytes, access, refused };
        let result = (!result.is_empty()).then_some(result);
        self.seen.push(Seen { begun, access, result });
    }
}
