//! The enums of the operations: each variant goes the way of its fact.

use std::collections::HashMap;

use iommu_types::InvalidRange;
use iommu_types::errors::*;
use tonic::Code;
use tonic_types::ErrorDetails;

use super::WireError;
use crate::model::{InvalidBatch, InvalidRequest};

macro_rules! operations {
    ($($name:ident { $($variant:ident),* $(,)? })*) => { $(
        impl WireError for $name {
            fn reason(&self) -> &'static str {
                match self { $(Self::$variant(fact) => fact.reason()),* }
            }
            fn code(&self) -> Code {
                match self { $(Self::$variant(fact) => fact.code()),* }
            }
            fn metadata(&self) -> HashMap<String, String> {
                match self { $(Self::$variant(fact) => fact.metadata()),* }
            }
            fn details(&self) -> ErrorDetails {
                match self { $(Self::$variant(fact) => fact.details()),* }
            }
            fn from_reason(reason: &str, metadata: &HashMap<String, String>) -> Option<Self> {
                $(
                    if let Some(fact) = $variant::from_reason(reason, metadata) {
                        return Some(Self::$variant(fact));
                    }
                )*
                None
            }
        }
    )* };
}

operations! {
    AllocateError { InvalidField, OutOfMemory, LimitReached }
    FreeError { InvalidRange, NotAllocated, StillMapped }
    DmaMapError { InvalidRange, InvalidField, UnknownDevice, NotYours, NotAttached, NotOwned, IovaExhausted, OutOfMemory, LimitReached }
    DmaUnmapError { InvalidRange, InvalidField, UnknownDevice, NotYours, NotAttached, NotMapped, SizeMismatch, DirectionMismatch }
    MapError { InvalidRange, InvalidField, Unaligned, UnknownDomain, NotYours, NotOwned, RangeOverlaps, BeyondWidth, ReservedRange, OutOfMemory, LimitReached }
    UnmapError { InvalidRange, InvalidField, Unaligned, UnknownDomain, NotYours, SplitsMapping }
    CreateDomainError { InvalidField, OutOfMemory, LimitReached }
    DestroyDomainError { UnknownDomain, NotYours, DomainInUse }
    AttachError { UnknownDevice, UnknownDomain, UnknownOwner, NotYours, OutOfMemory, LimitReached }
    DetachError { UnknownDevice, NotAttached, NotYours }
    DeclareError { InvalidField, DeviceExists, UnknownOwner, LimitReached }
    MemoryError { InvalidRange, InvalidField, UnknownOwner, UnknownMachine, NotYours, NotOwned, NoMemory, LimitReached }
    InterruptError { UnknownDevice, NotYours, InvalidField, LimitReached }
    MmioError { InvalidField, UnknownDevice, NotYours, DeviceAbsent, DeviceTimeout, MmioRefused, LimitReached }
    CreateMachineError { InvalidField, BadCapabilities, OutOfMemory, LimitReached }
    RegisterError { UnknownMachine, NotYours, InvalidField, BadRegisterAccess }
    InspectError { UnknownDevice, UnknownDomain, UnknownMachine, NotYours }
    SessionError { InvalidField, IdentityRefused, VersionMismatch, SessionExists, LimitReached, ShuttingDown }
    CallError {
        SessionRequired, SessionFenced, RoleRefused, RequestTooOld, RequestReused, ProtocolViolation, MalformedMessage,
        MessageTooLarge, UnknownMethod, ShuttingDown, StreamStalled, BadResumeToken, LimitReached, InvalidField, Internal,
    }
    InvalidRequest { InvalidField, InvalidRange }
    InvalidBatch { InvalidField, LimitReached }
}
