//! `driver.proto`: what drivers ask for. The DMA API is in `dma_api.rs`, its pipelined stream in `stream.rs`.

use iommu_types::errors::{
    DmaMapError, DmaSyncError, DmaUnmapError, InvalidField, MapError, MemoryError, UnmapError,
};
use iommu_types::{
    DeviceAddress, DomainId, DomainOptions, Gpa, GpaRange, InvalidRange, Iova, IovaRange, Permissions,
    RequestId,
};

use super::device::MmioAccess;
use super::{Field, messages, parse, wrong_at};
use crate::pb;

/// Why a request with a range does not parse.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidRequest {
    /// A field does not parse.
    #[error(transparent)]
    InvalidField(#[from] InvalidField),
    /// The fields parse, and make no range.
    #[error(transparent)]
    InvalidRange(#[from] InvalidRange),
}

macro_rules! errors_of_requests {
    ($($operation:ident),*) => { $(
        impl From<InvalidRequest> for $operation {
            fn from(error: InvalidRequest) -> Self {
                match error {
                    InvalidRequest::InvalidField(error) => error.into(),
                    InvalidRequest::InvalidRange(error) => error.into(),
                }
            }
        }
    )* };
}
errors_of_requests!(DmaMapError, DmaUnmapError, DmaSyncError, MapError, UnmapError, MemoryError);

fn check_header(header: &RequestHeader) -> Result<(), InvalidField> {
    if header.request_id.0 == 0 {
        return Err(wrong_at("request_id", "is 0; request IDs start at 1"));
    }
    if header.acknowledged_through >= header.request_id {
        let why = "is not below request_id: the answer to this request cannot have been seen yet";
        return Err(wrong_at("acknowledged_through", why));
    }
    Ok(())
}

fn check_size(size_bytes: u64) -> Result<(), InvalidField> {
    if size_bytes == 0 { Err(wrong_at("size_bytes", "is 0; at least 1 is needed")) } else { Ok(()) }
}
fn check_allocate(allocate: &AllocateBuffer) -> Result<(), InvalidField> {
    check_size(allocate.size_bytes)
}
fn check_coherent(allocate: &AllocateCoherent) -> Result<(), InvalidField> {
    check_size(allocate.size_bytes)
}

messages! {
    /// Names a mutating request.
    #[derive(Copy)]
    RequestHeader as RequestHeader {
        /// Monotonic per session identity, from 1.
        request_id: RequestId,
        /// The answers of all requests up to this one were seen.
        acknowledged_through: RequestId,
    } check check_header;
    /// A buffer to allocate.
    AllocateBuffer as AllocateBufferRequest {
        /// Names the request.
        header: RequestHeader,
        /// Size, at least 1; rounded up to whole pages.
        size_bytes: u64,
    } check check_allocate;
    /// A buffer.
    AllocatedBuffer as AllocateBufferResponse {
        /// First byte.
        gpa: Gpa,
        /// Size, in whole pages.
        size_bytes: u64,
    };
    /// A buffer to free.
    FreeBuffer as FreeBufferRequest {
        /// Names the request.
        header: RequestHeader,
        /// First byte.
        gpa: Gpa,
    };
    /// Coherent memory to allocate.
    AllocateCoherent as AllocateCoherentRequest {
        /// Names the request.
        header: RequestHeader,
        /// For which device.
        device: DeviceAddress,
        /// Size, at least 1; rounded up to whole pages.
        size_bytes: u64,
    } check check_coherent;
    /// Coherent memory.
    AllocatedCoherent as AllocateCoherentResponse {
        /// For the CPU.
        gpa: Gpa,
        /// For the device.
        iova: Iova,
        /// Size in whole pages.
        size_bytes: u64,
    };
    /// Coherent memory to free.
    FreeCoherent as FreeCoherentRequest {
        /// Names the request.
        header: RequestHeader,
        /// For which device.
        device: DeviceAddress,
        /// As it was returned.
        gpa: Gpa,
        /// As it was returned.
        iova: Iova,
    };
    /// A domain to create.
    CreateDomain as CreateDomainRequest {
        /// Names the request.
        header: RequestHeader,
        /// What is chosen.
        options: DomainOptions,
    };
    /// A domain to destroy.
    DestroyDomain as DestroyDomainRequest {
        /// Names the request.
        header: RequestHeader,
        /// Which.
        domain_id: DomainId,
    };
    /// A device to attach.
    AttachDevice as AttachDeviceRequest {
        /// Names the request.
        header: RequestHeader,
        /// Which.
        device: DeviceAddress,
        /// Where to; `None` for the owner's default domain of the device.
        domain_id: Option<DomainId>,
    };
    /// A device to detach.
    DetachDevice as DetachDeviceRequest {
        /// Names the request.
        header: RequestHeader,
        /// Which.
        device: DeviceAddress,
    };
    /// An interrupt to allocate.
    AllocateInterrupt as AllocateInterruptRequest {
        /// Names the request.
        header: RequestHeader,
        /// Of which device.
        device: DeviceAddress,
    };
    /// An interrupt, as the device is to be programmed.
    AllocatedInterrupt as AllocateInterruptResponse {
        /// Address to write.
        address: u64,
        /// Data to write.
        data: u32,
        /// The vector with which it is delivered.
        vector: u8,
    };
}

/// A mapping to make with the domain API, at a fixed address. Alignment is the domain's to check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapFixed {
    /// Names the request.
    pub header: RequestHeader,
    /// In which domain.
    pub domain_id: DomainId,
    /// Where.
    pub range: IovaRange,
    /// The memory, as large as the range.
    pub memory: GpaRange,
    /// What it allows; not nothing.
    pub permissions: Permissions,
}

impl TryFrom<pb::MapRequest> for MapFixed {
    type Error = InvalidRequest;
    fn try_from(wire: pb::MapRequest) -> Result<Self, InvalidRequest> {
        let permissions: Permissions = parse("permissions", wire.permissions)?;
        if permissions.is_empty() {
            return Err(
                wrong_at("permissions", "allow nothing; at least one of read and write is needed").into()
            );
        }
        Ok(Self {
            header: parse("header", wire.header)?,
            domain_id: parse("domain_id", wire.domain_id)?,
            range: IovaRange::new(Iova::new(wire.iova), wire.size_bytes)?,
            memory: GpaRange::new(Gpa::new(wire.gpa), wire.size_bytes)?,
            permissions,
        })
    }
}
impl From<MapFixed> for pb::MapRequest {
    fn from(map: MapFixed) -> Self {
        Self {
            header: map.header.write(),
            domain_id: map.domain_id.write(),
            iova: map.range.base().get(),
            gpa: map.memory.base().get(),
            size_bytes: map.range.size_bytes(),
            permissions: map.permissions.write(),
        }
    }
}

/// A range to unmap with the domain API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnmapFixed {
    /// Names the request.
    pub header: RequestHeader,
    /// In which domain.
    pub domain_id: DomainId,
    /// The addresses.
    pub range: IovaRange,
}

impl TryFrom<pb::UnmapRequest> for UnmapFixed {
    type Error = InvalidRequest;
    fn try_from(wire: pb::UnmapRequest) -> Result<Self, InvalidRequest> {
        Ok(Self {
            header: parse("header", wire.header)?,
            domain_id: parse("domain_id", wire.domain_id)?,
            range: IovaRange::new(Iova::new(wire.iova), wire.size_bytes)?,
        })
    }
}
impl From<UnmapFixed> for pb::UnmapRequest {
    fn from(unmap: UnmapFixed) -> Self {
        Self {
            header: unmap.header.write(),
            domain_id: unmap.domain_id.write(),
            iova: unmap.range.base().get(),
            size_bytes: unmap.range.size_bytes(),
        }
    }
}

/// A register access by a driver, to be brought to the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mmio {
    /// Of which device.
    pub device: DeviceAddress,
    /// The access.
    pub access: MmioAccess,
}

impl TryFrom<pb::MmioReadRequest> for Mmio {
    type Error = InvalidField;
    fn try_from(wire: pb::MmioReadRequest) -> Result<Self, InvalidField> {
        let device = parse("device", wire.device)?;
        let access = MmioAccess::parse(wire.bar, wire.offset, wire.width_bytes, None, "value")?;
        Ok(Self { device, access })
    }
}
impl TryFrom<pb::MmioWriteRequest> for Mmio {
    type Error = InvalidField;
    fn try_from(wire: pb::MmioWriteRequest) -> Result<Self, InvalidField> {
        let device = parse("device", wire.device)?;
        let value = Some(wire.value);
        let access = MmioAccess::parse(wire.bar, wire.offset, wire.width_bytes, value, "value")?;
        Ok(Self { device, access })
    }
}
