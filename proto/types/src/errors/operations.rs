//! One enum per operation, and the one list of them.

use super::*;
use crate::InvalidRange;

/// Calls a macro with `more` and then every operation and its errors, as `Name { Error, … }`, so that the wire and its
/// tests cover each without a list of their own.
#[macro_export]
macro_rules! for_each_operation {
    ($callback:ident $($more:tt)*) => {
        $callback! {
            $($more)*
            /// Why a buffer was not allocated.
            AllocateError { NotAHostDriver, InvalidField, OutOfMemory, LimitReached }
            /// Why a buffer was not freed.
            FreeError { InvalidRange, NotAllocated, StillMapped, MemoryLeaving }
            /// Why an owner was not given memory at an address.
            AddMemoryError { InvalidRange, InvalidField, Unaligned, UnknownOwner, NotYours, MemoryOverlaps, OutOfMemory, LimitReached }
            /// Why memory was not taken back from an owner, nor given to another.
            TakeMemoryError {
                InvalidRange, InvalidField, Unaligned, UnknownOwner, NotYours, NotOwned, MemoryLeaving, StillMapped, MemoryOverlaps,
                OutOfMemory, LimitReached,
            }
            /// Why the DMA API did not map.
            DmaMapError {
                InvalidRange, InvalidField, UnknownDevice, NotYours, NotAttached, NotAHostDriver, NotOwned, MemoryLeaving, IovaExhausted, OutOfMemory, LimitReached,
                RingOverflow, NotContiguous, SegmentOverLimit, BeyondMask, BeyondWidth, ModeRefuses,
            }
            /// Why the DMA API did not unmap.
            DmaUnmapError { InvalidRange, InvalidField, UnknownDevice, NotYours, NotAttached, NotMapped, SizeMismatch, DirectionMismatch, WrongFunction }
            /// Why a mapping was not synced.
            DmaSyncError { InvalidRange, InvalidField, UnknownDevice, NotYours, NotAttached, NotMapped, OutsideMapping, DirectionMismatch, WrongFunction }
            /// Why a device's DMA limits were not set.
            DmaLimitsError { InvalidField, UnknownDevice, NotYours, NotAttached, ModeRefuses }
            /// Why the domain API did not map.
            MapError {
                InvalidRange, InvalidField, ModeRefuses, Unaligned, UnknownDomain, NotYours, NotOwned, MemoryLeaving, RangeOverlaps, BeyondWidth,
                ReservedRange, OutOfMemory, LimitReached,
            }
            /// Why the domain API did not unmap.
            UnmapError { InvalidRange, InvalidField, Unaligned, UnknownDomain, NotYours, SplitsMapping }
            /// Why a domain was not created.
            CreateDomainError { InvalidField, OutOfMemory, LimitReached }
            /// Why a domain was not destroyed.
            DestroyDomainError { UnknownDomain, NotYours, DomainInUse }
            /// Why a device was not attached.
            AttachError { UnknownDevice, UnknownDomain, UnknownOwner, NotYours, NotAssignable, GroupInUse, OutOfMemory, LimitReached }
            /// Why a device was not detached.
            DetachError { UnknownDevice, NotAttached, NotYours }
            /// Why a device was not declared.
            DeclareError { InvalidField, DeviceExists, UnknownOwner, LimitReached }
            /// Why no virtual machine was created.
            CreateVmError { InvalidField, LimitReached }
            /// Why a virtual machine was not destroyed.
            DestroyVmError { UnknownOwner, NotYours }
            /// Why a device was not removed.
            RemoveDeviceError { InvalidField, UnknownDevice, NotYours, GroupInUse }
            /// Why a device was not assigned.
            AssignError {
                InvalidField, UnknownDevice, UnknownDomain, UnknownOwner, NotYours, NotAssignable, GroupInUse, DomainInUse, OutOfMemory,
                LimitReached,
            }
            /// Why a device was not released.
            ReleaseError { UnknownDevice, NotYours, NotAttached }
            /// Why an owner was not removed.
            RemoveOwnerError { UnknownOwner, NotYours, OwnerInUse }
            /// Why a hypercall has no answer.
            HypercallError { InvalidField, NoHypervisor, HypercallRefused, HypercallTimeout, LimitReached }
            /// Why memory was not read or written.
            MemoryError { InvalidRange, InvalidField, UnknownOwner, UnknownMachine, NotYours, NotOwned, NoMemory, LimitReached }
            /// Why no interrupt was allocated.
            InterruptError { UnknownDevice, NotYours, InvalidField, LimitReached }
            /// Why a register of a device was not read or written.
            MmioError { InvalidField, UnknownDevice, NotYours, DeviceAbsent, DeviceTimeout, MmioRefused, LimitReached }
            /// Why no bare machine was created.
            CreateMachineError { InvalidField, BadCapabilities, OutOfMemory, LimitReached }
            /// Why a register of a bare machine's unit was not read or written.
            RegisterError { UnknownMachine, NotYours, InvalidField, BadRegisterAccess }
            /// Why an inspection was refused.
            InspectError { UnknownDevice, UnknownDomain, UnknownMachine, NotYours }
            /// Why a session was not opened.
            SessionError {
                InvalidField, IdentityRefused, BadResumeToken, VersionMismatch, SessionExists, LimitReached, ShuttingDown,
            }
            /// What can befall any call, whatever it does: the session, the framing, the server.
            CallError {
                SessionRequired, SessionFenced, RoleRefused, RequestTooOld, RequestReused, ProtocolViolation, MalformedMessage,
                MessageTooLarge, UnknownMethod, ShuttingDown, StreamStalled, BadResumeToken, LimitReached, InvalidField, Internal,
                CertificateExpired, CertificateRevoked,
            }
        }
    };
}

macro_rules! operations {
    ($($(#[$doc:meta])* $name:ident { $($variant:ident),* $(,)? })*) => {
        $(
            $(#[$doc])*
            #[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
            pub enum $name {
                $(
                    #[doc = concat!("See [`", stringify!($variant), "`].")]
                    #[error(transparent)]
                    $variant(#[from] $variant),
                )*
            }
        )*
    };
}

for_each_operation!(operations);

impl From<AttachError> for AssignError {
    fn from(error: AttachError) -> Self {
        match error {
            AttachError::UnknownDevice(error) => error.into(),
            AttachError::UnknownDomain(error) => error.into(),
            AttachError::UnknownOwner(error) => error.into(),
            AttachError::NotYours(error) => error.into(),
            AttachError::NotAssignable(error) => error.into(),
            AttachError::GroupInUse(error) => error.into(),
            AttachError::OutOfMemory(error) => error.into(),
            AttachError::LimitReached(error) => error.into(),
        }
    }
}
