//! Every error says what happened: a sentence with its facts, fit to be shown.

use iommu_types::errors::*;
use iommu_types::{DeviceAddress, Direction, DomainId, Gpa, Iova, Owner, SourceId};

fn device() -> DeviceAddress {
    DeviceAddress::new(0, SourceId::new(0x00fa))
}

fn text() -> String {
    "the given text".to_owned()
}

fn shown(error: impl std::error::Error) -> String {
    error.to_string()
}

#[test]
fn every_fact_shows_itself_with_its_facts() {
    // Each fact with the texts that must be seen; alternatives are separated by a bar.
    let rows: &[(String, &[&str])] = &[
        (shown(InvalidField { field: text(), why: text() }), &["the given text", "the given text"]),
        (
            shown(Unaligned { field: text(), value: 7654, alignment: 7654 }),
            &["the given text", "7654|0x1de6", "7654|0x1de6"],
        ),
        (shown(UnknownDevice { device: device() }), &["0000:00:1f.2"]),
        (shown(DeviceExists { device: device() }), &["0000:00:1f.2"]),
        (shown(UnknownDomain { domain_id: DomainId::new(54) }), &["54"]),
        (shown(UnknownOwner { owner: Owner::Driver(3) }), &["driver:3"]),
        (shown(UnknownMachine { segment: 7 }), &["0007"]),
        (shown(NotYours { object: text() }), &["the given text"]),
        (shown(RoleRefused { role: text(), needs: text() }), &["the given text", "the given text"]),
        (shown(NotAttached { device: device() }), &["0000:00:1f.2"]),
        (shown(DeviceAbsent { device: device() }), &["0000:00:1f.2"]),
        (shown(DeviceTimeout { device: device(), waited_ms: 7654 }), &["0000:00:1f.2", "7654|0x1de6"]),
        (
            shown(MmioRefused { device: device(), offset: 7654, why: text() }),
            &["0000:00:1f.2", "7654|0x1de6", "the given text"],
        ),
        (shown(NotOwned { gpa: Gpa::new(0x2000) }), &["gpa:0x2000"]),
        (shown(RangeOverlaps { iova: Iova::new(0x3000) }), &["iova:0x3000"]),
        (shown(SplitsMapping { iova: Iova::new(0x3000) }), &["iova:0x3000"]),
        (shown(NotMapped { iova: Iova::new(0x3000) }), &["iova:0x3000"]),
        (
            shown(SizeMismatch { iova: Iova::new(0x3000), mapped_bytes: 7654, asked_bytes: 7654 }),
            &["iova:0x3000", "7654|0x1de6", "7654|0x1de6"],
        ),
        (
            shown(DirectionMismatch {
                iova: Iova::new(0x3000),
                mapped: Direction::ToDevice,
                asked: Direction::ToDevice,
            }),
            &["iova:0x3000", "to-device", "to-device"],
        ),
        (
            shown(WrongFunction {
                iova: Iova::new(0x3000),
                made_as: "coherent".to_owned(),
                asked_as: text(),
            }),
            &["iova:0x3000", "coherent", "the given text"],
        ),
        (
            shown(OutsideMapping { iova: Iova::new(0x3000), size_bytes: 7654 }),
            &["iova:0x3000", "7654|0x1de6"],
        ),
        (shown(RingOverflow { ring: 3, slots: 321 }), &["ring 3", "321"]),
        (shown(NotContiguous { gpa: Gpa::new(0x2000) }), &["gpa:0x2000"]),
        (shown(SegmentOverLimit { size_bytes: 7654, allowed_bytes: 4321 }), &["7654|0x1de6", "4321|0x10e1"]),
        (shown(BeyondMask { iova: Iova::new(0x3000), mask_bits: 32 }), &["iova:0x3000", "32"]),
        (shown(ModeRefuses { mode: "ring".to_owned(), why: text() }), &["ring", "the given text"]),
        (shown(BeyondWidth { iova: Iova::new(0x3000), width_bits: 48 }), &["iova:0x3000", "48"]),
        (shown(ReservedRange { iova: Iova::new(0x3000) }), &["iova:0x3000"]),
        (shown(IovaExhausted { size_bytes: 7654 }), &["7654|0x1de6"]),
        (shown(OutOfMemory { size_bytes: 7654 }), &["7654|0x1de6"]),
        (shown(StillMapped { gpa: Gpa::new(0x2000) }), &["gpa:0x2000"]),
        (shown(MemoryLeaving { gpa: Gpa::new(0x2000) }), &["gpa:0x2000"]),
        (shown(MemoryOverlaps { gpa: Gpa::new(0x2000) }), &["gpa:0x2000"]),
        (shown(NotAHostDriver { owner: Owner::Vm(3) }), &["vm:3"]),
        (shown(GroupInUse { device: device(), owner: Owner::Vm(3) }), &["0000:00:1f.2", "vm:3"]),
        (shown(NotAssignable { device: device(), why: text() }), &["0000:00:1f.2", "the given text"]),
        (shown(NoHypervisor {}), &[]),
        (shown(HypercallRefused { why: text() }), &["the given text"]),
        (shown(HypercallTimeout { waited_ms: 7654 }), &["7654|0x1de6"]),
        (shown(NotAllocated { gpa: Gpa::new(0x2000) }), &["gpa:0x2000"]),
        (shown(DomainInUse { domain_id: DomainId::new(54), device: device() }), &["54", "0000:00:1f.2"]),
        (shown(OwnerInUse { owner: Owner::Driver(3), device: device() }), &["driver:3", "0000:00:1f.2"]),
        (shown(LimitReached { limit: text(), allowed: 7654 }), &["the given text", "7654|0x1de6"]),
        (shown(NoMemory { address: 7654 }), &["7654|0x1de6"]),
        (shown(BadRegisterAccess { offset: 7654, width_bytes: 321 }), &["7654|0x1de6", "321"]),
        (shown(BadCapabilities { field: text(), why: text() }), &["the given text", "the given text"]),
        (shown(SessionRequired {}), &[]),
        (shown(SessionExists {}), &[]),
        (shown(SessionFenced { by_generation: 7654 }), &["7654|0x1de6"]),
        (shown(IdentityRefused { name: text(), why: text() }), &["the given text", "the given text"]),
        (shown(CertificateExpired { expired_unix_s: 7654 }), &["7654|0x1de6"]),
        (shown(CertificateRevoked { serial: text() }), &["the given text"]),
        (shown(VersionMismatch { server: 321, peer: 321 }), &["321", "321"]),
        (shown(RequestTooOld { request_id: 7654, oldest: 7654 }), &["7654|0x1de6", "7654|0x1de6"]),
        (shown(RequestReused { request_id: 7654 }), &["7654|0x1de6"]),
        (shown(ProtocolViolation { why: text() }), &["the given text"]),
        (shown(MalformedMessage { why: text() }), &["the given text"]),
        (shown(MessageTooLarge { why: text() }), &["the given text"]),
        (shown(UnknownMethod {}), &[]),
        (shown(ShuttingDown {}), &[]),
        (shown(StreamStalled { stalled_ms: 7654 }), &["7654|0x1de6"]),
        (shown(BadResumeToken { token: text() }), &["the given text"]),
        (shown(Internal { reference: text() }), &["the given text"]),
    ];
    let mut seen = std::collections::HashSet::new();
    for (message, facts) in rows {
        assert!(message.len() > 10 && !message.contains('{'), "{message:?} is a sentence");
        for fact in *facts {
            assert!(fact.split('|').any(|text| message.contains(text)), "{message:?} lacks {fact}");
        }
        assert!(seen.insert(message), "{message:?} says the same as another");
    }
    let declared =
        include_str!("../src/errors/facts.rs").lines().filter(|line| line.contains("} = \"")).count();
    assert_eq!(rows.len(), declared, "every fact of facts.rs has a row");
}

#[test]
fn an_operation_shows_the_fact_itself() {
    let fact = UnknownDevice { device: device() };
    assert_eq!(DetachError::from(fact.clone()).to_string(), fact.to_string());
}
