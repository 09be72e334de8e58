//! Register accesses as messages: the same ones for a driver, an operator and the client of a bare machine.

use iommu_proto::pb;
use iommu_types::{AccessWidth, DeviceAddress};

use crate::TransportError;

/// A register of a device.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    pub(crate) device: DeviceAddress,
    pub(crate) bar: u8,
    pub(crate) offset: u64,
    pub(crate) width: AccessWidth,
}

impl Place {
    pub(crate) fn read(self) -> pb::MmioReadRequest {
        let Self { device, bar, offset, width } = self;
        let (device, width_bytes) = (Some(device.into()), width.bytes());
        pb::MmioReadRequest { device, bar: bar.into(), offset, width_bytes }
    }

    pub(crate) fn write(self, value: u64) -> pb::MmioWriteRequest {
        let Self { device, bar, offset, width } = self;
        let (device, width_bytes) = (Some(device.into()), width.bytes());
        pb::MmioWriteRequest { device, bar: bar.into(), offset, width_bytes, value }
    }

    /// The value that was read; one that is wider than the register is no answer.
    pub(crate) fn value(self, answer: pb::MmioReadResponse) -> Result<u64, TransportError> {
        if answer.value & !self.width.mask() != 0 {
            let why = format!("value: {:#x} does not fit {}", answer.value, self.width);
            return Err(TransportError::BadAnswer(why));
        }
        Ok(answer.value)
    }
}
