//! Every error survives the wire, and the README says what the wire carries.

use expect_test::expect;
use iommu_proto::errors::{DOMAIN, FACT_BYTES_MAX, REASONS, WireError, reason_of};
use iommu_proto::model::{InvalidBatch, InvalidRequest};
use iommu_types::errors::*;
use iommu_types::{
    DeviceAddress, Direction, DomainId, Gpa, InvalidRange, Iova, Owner, SourceId, for_each_operation,
};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

fn device() -> DeviceAddress {
    DeviceAddress::new(2, SourceId::new(0x00fa))
}

/// An example of a fact.
trait Sample: Sized {
    fn sample() -> Self;
}

/// Through headers, as a client sees it.
fn over_the_wire(status: Status) -> Status {
    let response: http::Response<()> = status.into_http();
    Status::from_header_map(response.headers()).expect("a status travels in headers")
}

fn check<E: WireError + Clone + PartialEq>(error: &E) {
    let status = over_the_wire(error.clone().into_status());
    assert_eq!(status.code(), error.code());
    assert_eq!(status.message(), error.to_string());
    assert_eq!(reason_of(&status).as_deref(), Some(error.reason()));
    assert_eq!(E::from_status(&status).as_ref(), Some(error));
    assert_eq!(E::from_reason(error.reason(), &error.metadata()).as_ref(), Some(error));
    let row = REASONS.iter().find(|row| row.reason == error.reason()).expect("every reason has a row");
    assert_eq!(row.code, error.code());
    let mut keys: Vec<_> = error.metadata().into_keys().collect();
    let mut promised = row.keys.to_vec();
    keys.sort_unstable();
    promised.sort_unstable();
    assert_eq!(keys, promised, "{} carries the facts that its row promises", row.reason);
}

macro_rules! samples {
    ($($name:ident { $($field:ident: $value:expr),* };)*) => {
        $(
            impl Sample for $name {
                fn sample() -> Self {
                    Self { $($field: $value),* }
                }
            }
        )*
        /// The names of all facts.
        const FACTS: &[&str] = &[$(stringify!($name)),*];

        #[test]
        fn every_fact_survives_the_wire() {
            $(check(&$name::sample());)*
        }
    };
}

samples! {
    InvalidField { field: "some text".to_owned(), why: "some text".to_owned() };
    Unaligned { field: "some text".to_owned(), value: 0x1234_5678_9abc, alignment: 0x1234_5678_9abc };
    UnknownDevice { device: device() };
    DeviceExists { device: device() };
    UnknownDomain { domain_id: DomainId::new(7) };
    UnknownOwner { owner: Owner::Driver(3) };
    UnknownMachine { segment: 7 };
    NotYours { object: "some text".to_owned() };
    RoleRefused { role: "some text".to_owned(), needs: "some text".to_owned() };
    NotAttached { device: device() };
    DeviceAbsent { device: device() };
    DeviceTimeout { device: device(), waited_ms: 0x1234_5678_9abc };
    MmioRefused { device: device(), offset: 0x1234_5678_9abc, why: "some text".to_owned() };
    NotOwned { gpa: Gpa::new(0x2000) };
    RangeOverlaps { iova: Iova::new(0xffff_f000) };
    SplitsMapping { iova: Iova::new(0xffff_f000) };
    NotMapped { iova: Iova::new(0xffff_f000) };
    SizeMismatch { iova: Iova::new(0xffff_f000), mapped_bytes: 0x1234_5678_9abc, asked_bytes: 0x1234_5678_9abc };
    DirectionMismatch { iova: Iova::new(0xffff_f000), mapped: Direction::ToDevice, asked: Direction::ToDevice };
    WrongFunction { iova: Iova::new(0xffff_f000), made_as: "coherent".to_owned(), asked_as: "single".to_owned() };
    OutsideMapping { iova: Iova::new(0xffff_f000), size_bytes: 0x1234_5678_9abc };
    RingOverflow { ring: 3, slots: 70_000 };
    NotContiguous { gpa: Gpa::new(0x2000) };
    SegmentOverLimit { size_bytes: 0x1234_5678_9abc, allowed_bytes: 0x1234_5678 };
    BeyondMask { iova: Iova::new(0xffff_f000), mask_bits: 32 };
    ModeRefuses { mode: "ring".to_owned(), why: "some text".to_owned() };
    BeyondWidth { iova: Iova::new(0xffff_f000), width_bits: 48 };
    ReservedRange { iova: Iova::new(0xffff_f000) };
    IovaExhausted { size_bytes: 0x1234_5678_9abc };
    OutOfMemory { size_bytes: 0x1234_5678_9abc };
    StillMapped { gpa: Gpa::new(0x2000) };
    MemoryLeaving { gpa: Gpa::new(0x2000) };
    MemoryOverlaps { gpa: Gpa::new(0x2000) };
    NotAHostDriver { owner: Owner::Vm(3) };
    GroupInUse { device: device(), owner: Owner::Vm(3) };
    NotAssignable { device: device(), why: "some text".to_owned() };
    NoHypervisor {  };
    HypercallRefused { why: "some text".to_owned() };
    HypercallTimeout { waited_ms: 0x1234_5678_9abc };
    NotAllocated { gpa: Gpa::new(0x2000) };
    DomainInUse { domain_id: DomainId::new(7), device: device() };
    OwnerInUse { owner: Owner::Driver(3), device: device() };
    LimitReached { limit: "some text".to_owned(), allowed: 0x1234_5678_9abc };
    NoMemory { address: 0x1234_5678_9abc };
    BadRegisterAccess { offset: 0x1234_5678_9abc, width_bytes: 70_000 };
    BadCapabilities { field: "some text".to_owned(), why: "some text".to_owned() };
    SessionRequired {  };
    SessionExists {  };
    SessionFenced { by_generation: 0x1234_5678_9abc };
    IdentityRefused { name: "some text".to_owned(), why: "some text".to_owned() };
    CertificateExpired { expired_unix_s: 0x1234_5678_9abc };
    CertificateRevoked { serial: "some text".to_owned() };
    VersionMismatch { server: 70_000, peer: 70_000 };
    RequestTooOld { request_id: 0x1234_5678_9abc, oldest: 0x1234_5678_9abc };
    RequestReused { request_id: 0x1234_5678_9abc };
    ProtocolViolation { why: "some text".to_owned() };
    MalformedMessage { why: "some text".to_owned() };
    MessageTooLarge { why: "some text".to_owned() };
    UnknownMethod {  };
    ShuttingDown {  };
    StreamStalled { stalled_ms: 0x1234_5678_9abc };
    BadResumeToken { token: "some text".to_owned() };
    Internal { reference: "some text".to_owned() };
}

impl Sample for InvalidRange {
    fn sample() -> Self {
        Self::Wraps { space: "iova", base: u64::MAX, size_bytes: 2 }
    }
}

#[test]
fn both_shapes_of_an_invalid_range_survive_in_every_space() {
    for space in ["iova", "gpa", "hpa"] {
        check(&InvalidRange::Empty { space, base: 0x1000 });
        check(&InvalidRange::Wraps { space, base: u64::MAX, size_bytes: 2 });
    }
}

macro_rules! operations {
    ($($(#[$doc:meta])* $name:ident { $($variant:ident),* $(,)? })*) => {
        #[test]
        fn every_variant_of_every_operation_survives_the_wire() {
            $(
                $(check(&$name::$variant($variant::sample()));)*
            )*
        }
    };
}

for_each_operation!(operations
    InvalidRequest { InvalidField, InvalidRange }
    InvalidBatch { InvalidField, LimitReached }
);

#[test]
fn every_fact_of_the_vocabulary_is_in_the_table() {
    let source = include_str!("../types/src/errors/facts.rs");
    let (_, table) =
        source.split_once("facts! {\n    ///").expect("facts.rs declares its facts with one macro");
    let indented = table.lines().filter_map(|line| line.strip_prefix("    "));
    let declared: Vec<_> = indented
        .filter(|line| line.starts_with(|letter: char| letter.is_ascii_uppercase()))
        .filter_map(|line| line.split_once(" {"))
        .map(|(name, _)| name)
        .collect();
    assert_eq!(declared, FACTS);
}

#[test]
fn reasons_are_unique_and_upper_snake() {
    let mut reasons: Vec<_> = REASONS.iter().map(|row| row.reason).collect();
    assert!(
        reasons.iter().all(|reason| reason.bytes().all(|byte| byte.is_ascii_uppercase() || byte == b'_'))
    );
    reasons.sort_unstable();
    reasons.dedup();
    assert_eq!(reasons.len(), REASONS.len());
    assert_eq!(REASONS.len(), FACTS.len() + 1, "the facts and InvalidRange");
}

fn check_foreign(status: Status) {
    assert_eq!(CallError::from_status(&status), None);
    assert_eq!(reason_of(&status), None);
}

#[test]
fn a_status_without_our_details_is_the_transports() {
    check_foreign(Status::unavailable("connection refused"));
    check_foreign(Status::with_details(Code::Internal, "", bytes::Bytes::from_static(b"\xff\xff")));
    let elsewhere = ErrorDetails::with_error_info("SHUTTING_DOWN", "elsewhere.example", []);
    check_foreign(Status::with_error_details(Code::Unavailable, "", elsewhere));
}

#[test]
fn an_error_of_another_operation_or_without_its_facts_is_none() {
    let status = UnknownDevice { device: device() }.into_status();
    assert_eq!(FreeError::from_status(&status), None);
    assert_eq!(DetachError::from_status(&status), Some(UnknownDevice { device: device() }.into()));
    let bare = ErrorDetails::with_error_info("UNKNOWN_DEVICE", DOMAIN, []);
    let status = Status::with_error_details(Code::NotFound, "", bare);
    assert_eq!(DetachError::from_status(&status), None);
}

#[test]
fn long_facts_are_cut_so_that_the_status_fits_its_trailers() {
    let why = "é".repeat(FACT_BYTES_MAX);
    let status = InvalidField { field: why.clone(), why: why.clone() }.into_status();
    let response: http::Response<()> = status.into_http();
    let bytes: usize = response.headers().iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
    assert!(bytes < 8 << 10, "{bytes} bytes of trailers");
    let cut = MalformedMessage::from_status(&MalformedMessage { why }.into_status()).expect("still typed");
    assert_eq!(cut.why.len(), FACT_BYTES_MAX);
}

#[test]
fn each_kind_of_error_has_its_standard_detail() {
    let details = |status: Status| status.get_error_details();
    let field =
        details(InvalidField { field: "device.segment".to_owned(), why: "is bad".to_owned() }.into_status());
    assert_eq!(field.bad_request().map(|d| d.field_violations[0].field.as_str()), Some("device.segment"));
    let unknown = details(UnknownOwner { owner: Owner::Vm(1) }.into_status());
    assert_eq!(unknown.resource_info().map(|d| d.resource_name.as_str()), Some("vm:1"));
    let splits = details(SplitsMapping { iova: Iova::new(0x1000) }.into_status());
    assert_eq!(splits.precondition_failure().map(|d| d.violations[0].subject.as_str()), Some("iova:0x1000"));
    let limit = details(LimitReached { limit: "domains_per_owner".to_owned(), allowed: 4 }.into_status());
    assert_eq!(limit.quota_failure().map(|d| d.violations[0].subject.as_str()), Some("domains_per_owner"));
    assert!(details(ShuttingDown {}.into_status()).retry_info().is_some());
}

#[test]
fn the_bytes_of_an_error_do_not_change() {
    let status = NotMapped { iova: Iova::new(0x1000) }.into_status();
    let text: String =
        status.details().iter().flat_map(|byte| std::ascii::escape_default(*byte)).map(char::from).collect();
    expect![[r#"\x08\x05\x12 nothing is mapped at iova:0x1000\x1aR\n(type.googleapis.com/google.rpc.ErrorInfo\x12&\n\nNOT_MAPPED\x12\x08iommu.v1\x1a\x0e\n\x04iova\x12\x060x1000\x1ag\n+type.googleapis.com/google.rpc.ResourceInfo\x128\n\x07mapping\x12\x0biova:0x1000\" nothing is mapped at iova:0x1000"#]].assert_eq(&text);
}

#[test]
fn the_readme_prints_the_table() {
    let readme = include_str!("../README.md");
    for row in REASONS {
        let keys: Vec<_> = row.keys.iter().map(|key| format!("`{key}`")).collect();
        let keys = if keys.is_empty() { "–".to_owned() } else { keys.join(", ") };
        let line = format!("| `{}` | {} | {keys} |", row.reason, code_name(row.code));
        assert!(readme.lines().any(|printed| printed == line), "proto/README.md lacks this row:\n{line}");
    }
}

fn code_name(code: Code) -> String {
    let mut name = String::new();
    for letter in format!("{code:?}").chars() {
        if letter.is_uppercase() && !name.is_empty() {
            name.push('_');
        }
        name.push(letter.to_ascii_uppercase());
    }
    name
}
