//! The table: every fact by name, with its code, its reason, its standard detail and its fields.

use std::collections::HashMap;

use iommu_types::InvalidRange;
use iommu_types::errors::*;
use tonic::Code;
use tonic_types::ErrorDetails;

use super::WireError;
use super::text::FactText;

/// One row of the table, for documentation and tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// `ErrorInfo.reason`.
    pub reason: &'static str,
    /// gRPC code.
    pub code: Code,
    /// Keys of `ErrorInfo.metadata`.
    pub keys: &'static [&'static str],
}

/// Every kind of detail that STYLE's table of errors knows, made from a fact.
mod detail {
    use std::fmt::Display;
    use std::time::Duration;

    use tonic_types::ErrorDetails;

    use super::super::text::bounded;

    /// How soon a client tries again where the server is going down: long enough for a restart.
    const RETRY_DELAY: Duration = Duration::from_secs(1);

    pub(super) fn none(_: &impl Display) -> ErrorDetails {
        ErrorDetails::new()
    }
    pub(super) fn bad_request(fact: &impl Display, field: &str) -> ErrorDetails {
        ErrorDetails::with_bad_request_violation(bounded(field), bounded(&fact.to_string()))
    }
    pub(super) fn resource(fact: &impl Display, kind: &str, name: &impl Display) -> ErrorDetails {
        ErrorDetails::with_resource_info(kind, bounded(&name.to_string()), "", bounded(&fact.to_string()))
    }
    pub(super) fn precondition(fact: &impl Display, reason: &str, subject: &impl Display) -> ErrorDetails {
        let description = bounded(&fact.to_string());
        ErrorDetails::with_precondition_failure_violation(reason, bounded(&subject.to_string()), description)
    }
    pub(super) fn quota(fact: &impl Display, subject: &str) -> ErrorDetails {
        ErrorDetails::with_quota_failure_violation(bounded(subject), bounded(&fact.to_string()))
    }
    pub(super) fn retry(_: &impl Display) -> ErrorDetails {
        ErrorDetails::with_retry_info(Some(RETRY_DELAY))
    }
    pub(super) fn request(_: &impl Display, reference: &str) -> ErrorDetails {
        ErrorDetails::with_request_info(bounded(reference), "")
    }
}

macro_rules! table {
    ($($name:ident { $($field:ident),* } $code:ident $reason:literal => $detail:ident($($argument:expr),*);)*) => {
        /// Every error there is, in the order of the table.
        pub const REASONS: &[Row] = &[
            Row { reason: INVALID_RANGE, code: Code::InvalidArgument, keys: &["kind", "space", "base", "size_bytes"] },
            $(Row { reason: $reason, code: Code::$code, keys: &[$(stringify!($field)),*] }),*
        ];

        $(
            impl WireError for $name {
                fn reason(&self) -> &'static str {
                    $reason
                }
                fn code(&self) -> Code {
                    Code::$code
                }
                fn metadata(&self) -> HashMap<String, String> {
                    let Self { $($field),* } = self;
                    HashMap::from([$((stringify!($field).to_owned(), $field.to_text())),*])
                }
                #[allow(unused_variables, reason = "not every detail names every field")]
                fn details(&self) -> ErrorDetails {
                    let Self { $($field),* } = self;
                    detail::$detail(self $(, $argument)*)
                }
                #[allow(unused_variables, reason = "some facts have no fields")]
                fn from_reason(reason: &str, metadata: &HashMap<String, String>) -> Option<Self> {
                    (reason == $reason).then_some(())?;
                    Some(Self { $($field: FactText::from_text(metadata.get(stringify!($field))?)?),* })
                }
            }
        )*
    };
}

table! {
    InvalidField { field, why } InvalidArgument "INVALID_FIELD" => bad_request(field);
    Unaligned { field, value, alignment } InvalidArgument "UNALIGNED" => bad_request(field);
    UnknownDevice { device } NotFound "UNKNOWN_DEVICE" => resource("device", device);
    DeviceExists { device } AlreadyExists "DEVICE_EXISTS" => none();
    UnknownDomain { domain_id } NotFound "UNKNOWN_DOMAIN" => resource("domain", domain_id);
    UnknownOwner { owner } NotFound "UNKNOWN_OWNER" => resource("owner", owner);
    UnknownMachine { segment } NotFound "UNKNOWN_MACHINE" => resource("machine", segment);
    NotYours { object } PermissionDenied "NOT_YOURS" => none();
    RoleRefused { role, needs } PermissionDenied "ROLE_REFUSED" => none();
    NotAttached { device } FailedPrecondition "NOT_ATTACHED" => precondition("NOT_ATTACHED", device);
    DeviceAbsent { device } FailedPrecondition "DEVICE_ABSENT" => precondition("DEVICE_ABSENT", device);
    DeviceTimeout { device, waited_ms } DeadlineExceeded "DEVICE_TIMEOUT" => none();
    MmioRefused { device, offset, why } FailedPrecondition "MMIO_REFUSED" => precondition("MMIO_REFUSED", device);
    NotOwned { gpa } PermissionDenied "NOT_OWNED" => none();
    RangeOverlaps { iova } AlreadyExists "RANGE_OVERLAPS" => none();
    SplitsMapping { iova } FailedPrecondition "SPLITS_MAPPING" => precondition("SPLITS_MAPPING", iova);
    NotMapped { iova } NotFound "NOT_MAPPED" => resource("mapping", iova);
    SizeMismatch { iova, mapped_bytes, asked_bytes } FailedPrecondition "SIZE_MISMATCH" => precondition("SIZE_MISMATCH", iova);
    DirectionMismatch { iova, mapped, asked } FailedPrecondition "DIRECTION_MISMATCH" => precondition("DIRECTION_MISMATCH", iova);
    WrongFunction { iova, made_as, asked_as } FailedPrecondition "WRONG_FUNCTION" => precondition("WRONG_FUNCTION", iova);
    OutsideMapping { iova, size_bytes } OutOfRange "OUTSIDE_MAPPING" => bad_request("size_bytes");
    RingOverflow { ring, slots } ResourceExhausted "RING_OVERFLOW" => quota("ring_slots");
    NotContiguous { gpa } FailedPrecondition "NOT_CONTIGUOUS" => precondition("NOT_CONTIGUOUS", gpa);
    SegmentOverLimit { size_bytes, allowed_bytes } OutOfRange "SEGMENT_OVER_LIMIT" => bad_request("size_bytes");
    BeyondMask { iova, mask_bits } OutOfRange "BEYOND_MASK" => bad_request("iova");
    ModeRefuses { mode, why } FailedPrecondition "MODE_REFUSES" => precondition("MODE_REFUSES", mode);
    BeyondWidth { iova, width_bits } OutOfRange "BEYOND_WIDTH" => bad_request("iova");
    ReservedRange { iova } InvalidArgument "RESERVED_RANGE" => bad_request("iova");
    IovaExhausted { size_bytes } ResourceExhausted "IOVA_EXHAUSTED" => quota("iova");
    OutOfMemory { size_bytes } ResourceExhausted "OUT_OF_MEMORY" => quota("memory");
    StillMapped { gpa } FailedPrecondition "STILL_MAPPED" => precondition("STILL_MAPPED", gpa);
    MemoryLeaving { gpa } FailedPrecondition "MEMORY_LEAVING" => precondition("MEMORY_LEAVING", gpa);
    MemoryOverlaps { gpa } AlreadyExists "MEMORY_OVERLAPS" => none();
    NotAHostDriver { owner } FailedPrecondition "NOT_A_HOST_DRIVER" => precondition("NOT_A_HOST_DRIVER", owner);
    GroupInUse { device, owner } FailedPrecondition "GROUP_IN_USE" => precondition("GROUP_IN_USE", device);
    NotAssignable { device, why } FailedPrecondition "NOT_ASSIGNABLE" => precondition("NOT_ASSIGNABLE", device);
    NoHypervisor {} FailedPrecondition "NO_HYPERVISOR" => none();
    HypercallRefused { why } FailedPrecondition "HYPERCALL_REFUSED" => none();
    HypercallTimeout { waited_ms } DeadlineExceeded "HYPERCALL_TIMEOUT" => none();
    NotAllocated { gpa } NotFound "NOT_ALLOCATED" => resource("buffer", gpa);
    DomainInUse { domain_id, device } FailedPrecondition "DOMAIN_IN_USE" => precondition("DOMAIN_IN_USE", device);
    OwnerInUse { owner, device } FailedPrecondition "OWNER_IN_USE" => precondition("OWNER_IN_USE", device);
    LimitReached { limit, allowed } ResourceExhausted "LIMIT_REACHED" => quota(limit);
    NoMemory { address } OutOfRange "NO_MEMORY" => bad_request("address");
    BadRegisterAccess { offset, width_bytes } InvalidArgument "BAD_REGISTER_ACCESS" => bad_request("offset");
    BadCapabilities { field, why } InvalidArgument "BAD_CAPABILITIES" => bad_request(&format!("capabilities.{field}"));
    SessionRequired {} Unauthenticated "SESSION_REQUIRED" => none();
    SessionExists {} AlreadyExists "SESSION_EXISTS" => none();
    SessionFenced { by_generation } Aborted "SESSION_FENCED" => none();
    IdentityRefused { name, why } Unauthenticated "IDENTITY_REFUSED" => none();
    CertificateExpired { expired_unix_s } Unauthenticated "CERTIFICATE_EXPIRED" => none();
    CertificateRevoked { serial } Unauthenticated "CERTIFICATE_REVOKED" => none();
    VersionMismatch { server, peer } FailedPrecondition "VERSION_MISMATCH" => precondition("VERSION_MISMATCH", peer);
    RequestTooOld { request_id, oldest } FailedPrecondition "REQUEST_TOO_OLD" => precondition("REQUEST_TOO_OLD", request_id);
    RequestReused { request_id } AlreadyExists "REQUEST_REUSED" => none();
    ProtocolViolation { why } FailedPrecondition "PROTOCOL_VIOLATION" => precondition("PROTOCOL_VIOLATION", why);
    MalformedMessage { why } InvalidArgument "MALFORMED_MESSAGE" => none();
    MessageTooLarge { why } ResourceExhausted "MESSAGE_TOO_LARGE" => quota("message_bytes_max");
    UnknownMethod {} Unimplemented "UNKNOWN_METHOD" => none();
    ShuttingDown {} Unavailable "SHUTTING_DOWN" => retry();
    StreamStalled { stalled_ms } Aborted "STREAM_STALLED" => none();
    BadResumeToken { token } InvalidArgument "BAD_RESUME_TOKEN" => bad_request("resume_token");
    Internal { reference } Internal "INTERNAL" => request(reference);
}

const INVALID_RANGE: &str = "INVALID_RANGE";

/// The address spaces that a range can lie in; the wire carries the name, the type holds it as a constant.
const SPACES: [&str; 3] = [
    <iommu_types::Iova as iommu_types::Address>::SPACE,
    <iommu_types::Gpa as iommu_types::Address>::SPACE,
    <iommu_types::Hpa as iommu_types::Address>::SPACE,
];

// By hand: the only fact with two shapes.
impl WireError for InvalidRange {
    fn reason(&self) -> &'static str {
        INVALID_RANGE
    }
    fn code(&self) -> Code {
        Code::InvalidArgument
    }
    fn metadata(&self) -> HashMap<String, String> {
        let (kind, space, base, size_bytes) = match self {
            Self::Empty { space, base } => ("empty", space, base, 0),
            Self::Wraps { space, base, size_bytes } => ("wraps", space, base, *size_bytes),
        };
        HashMap::from([
            ("kind".to_owned(), kind.to_owned()),
            ("space".to_owned(), (*space).to_owned()),
            ("base".to_owned(), base.to_text()),
            ("size_bytes".to_owned(), size_bytes.to_text()),
        ])
    }
    fn details(&self) -> ErrorDetails {
        let (Self::Empty { space, .. } | Self::Wraps { space, .. }) = self;
        detail::bad_request(self, space)
    }
    fn from_reason(reason: &str, metadata: &HashMap<String, String>) -> Option<Self> {
        (reason == INVALID_RANGE).then_some(())?;
        let named = metadata.get("space")?;
        let space = SPACES.into_iter().find(|space| space == named)?;
        let base = FactText::from_text(metadata.get("base")?)?;
        match metadata.get("kind")?.as_str() {
            "empty" => Some(Self::Empty { space, base }),
            "wraps" => Some(Self::Wraps {
                space,
                base,
                size_bytes: FactText::from_text(metadata.get("size_bytes")?)?,
            }),
            _ => None,
        }
    }
}
