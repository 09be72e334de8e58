//! Reports of the sanitizer and the state of domains on the wire.

mod wire;

use expect_test::expect;
use iommu_proto::model::*;
use iommu_proto::pb;
use iommu_types::{
    Access, Blame, Direction, DomainId, DomainOptions, FaultReason, Gpa, Hpa, Iova, MappingLife, Owner,
    PageSize, Permissions, Protection, ReportClass, RequestId, SanitizerReport, SeenAccess, Violation,
};
use wire::{check, device, wrong};

fn report(class: ReportClass) -> SanitizerReport {
    SanitizerReport {
        sequence: 7,
        at_us: 1_000_500,
        owner: Owner::Vm(3),
        domain_id: DomainId::new(u16::MAX),
        device: Some(device()),
        class,
        violation: Some(Violation::InvalidUse),
        blame: Blame::Driver,
        access: Some(SeenAccess {
            iova: Iova::new(0x5010),
            size_bytes: 64,
            done_bytes: 64,
            access: Access::Write,
            refused: None,
        }),
        mapping: Some(MappingLife {
            iova: Iova::new(0x5000),
            size_bytes: 2048,
            gpa: Gpa::new(0x9000),
            direction: Direction::FromDevice,
            coherent: false,
            born_at_us: 1_000_000,
            born_by: RequestId(4),
            death: Some((1_000_400, RequestId(5))),
        }),
        request_id: None,
        age_us: Some(100),
        repeats: 2,
    }
}

#[test]
fn reports_arrive_as_they_are_sent() {
    for (class, ..) in ReportClass::ALL {
        check::<pb::SanitizerReport, _>(report(*class));
    }
    let whole = report(ReportClass::Overrun);
    for violation in [None, Some(Violation::BadAddress), Some(Violation::BadDevice)] {
        check::<pb::SanitizerReport, _>(SanitizerReport { violation, ..whole });
    }
    for blame in [Blame::Driver, Blame::Device, Blame::Unknown] {
        check::<pb::SanitizerReport, _>(SanitizerReport { blame, ..whole });
    }
    let refused = whole.access.map(|access| SeenAccess { refused: Some(FaultReason(0xfe)), ..access });
    let living = whole.mapping.map(|mapping| MappingLife { death: None, coherent: true, ..mapping });
    check::<pb::SanitizerReport, _>(SanitizerReport { access: refused, mapping: living, ..whole });
    let request_id = Some(RequestId(0));
    check::<pb::SanitizerReport, _>(SanitizerReport {
        device: None,
        access: None,
        mapping: None,
        request_id,
        age_us: None,
        ..whole
    });
}

#[test]
fn lists_and_subscriptions_arrive_as_they_are_sent() {
    let (owner, domain_id) = (Some(Owner::Driver(0)), Some(DomainId::new(0)));
    for filter in [None, Some(SanitizerFilter { owner, domain_id, device: Some(device()) })] {
        for after_sequence in [None, Some(0), Some(u64::MAX)] {
            check::<pb::ListReportsRequest, _>(ListReports { filter, after_sequence, limit: 3 });
        }
        check::<pb::WatchReportsRequest, _>(WatchReports { filter, resume_token: "a:1".to_owned() });
    }
    let reports = vec![report(ReportClass::Leak); 2];
    let resume_token = "a:2".to_owned();
    check::<pb::ListReportsResponse, _>(ReportList {
        reports: reports.clone(),
        overwritten_count: 9,
        resume_token: resume_token.clone(),
    });
    check::<pb::WatchReportsResponse, _>(NewReports { reports, missed_count: 9, resume_token });
}

#[test]
fn what_is_wrong_with_a_report_is_named() {
    let whole = pb::SanitizerReport::from(report(ReportClass::Overlap));
    let list = |report| pb::ListReportsResponse { reports: vec![report], ..Default::default() };
    for (report, expected) in [
        (pb::SanitizerReport { class: 0, ..whole }, expect!["reports[0].class: is not given"]),
        (
            pb::SanitizerReport { class: 18, ..whole },
            expect!["reports[0].class: 18 is a value that this version does not know"],
        ),
        (
            pb::SanitizerReport { violation: 4, ..whole },
            expect!["reports[0].violation: 4 is a value that this version does not know"],
        ),
        (pb::SanitizerReport { blame: 0, ..whole }, expect!["reports[0].blame: is not given"]),
        (
            pb::SanitizerReport { owner: None, ..whole },
            expect!["reports[0].owner: is absent, or of a kind that this version does not know"],
        ),
        (
            pb::SanitizerReport { mapping: Some(pb::MappingLife::default()), ..whole },
            expect!["reports[0].mapping.direction: is not given"],
        ),
        (
            pb::SanitizerReport { domain_id: 65_536, ..whole },
            expect!["reports[0].domain_id: 65536 is more than 65535"],
        ),
    ] {
        wrong::<_, ReportList>(list(report), expected);
    }
}

#[test]
fn the_state_of_a_domain_arrives_as_it_is_sent() {
    for protection in Protection::ALL {
        for oldest_pending_us in [None, Some(0), Some(9_000)] {
            check::<pb::DomainState, _>(DomainState {
                domain_id: DomainId::new(4),
                owner: Owner::Driver(1),
                options: DomainOptions::new(protection).with_sanitizer(true),
                devices: vec![device()],
                mappings: 1,
                mapped_bytes: 2,
                table_bytes: 3,
                maps: 4,
                unmaps: 5,
                live_iova_ranges: 6,
                cached_iova_ranges: 7,
                iova_allocations: 8,
                iova_visits: 9,
                pending_flushes: 10,
                oldest_pending_us,
                flushes: 11,
                invalidations: 12,
                idle_mappings: 13,
                shadow_bytes: 14,
                copied_bytes: 15,
                sanitizer_reports: 16,
            });
        }
    }
}

#[test]
fn cached_bytes_of_a_page_arrive_and_lie_in_it() {
    let entry = IotlbEntry {
        domain_id: DomainId::new(4),
        iova: Iova::new(0x1000),
        page_bytes: PageSize::Size4K,
        hpa: Hpa::new(0x7000),
        permissions: Permissions::READ,
        first_byte: None,
        last_byte: None,
    };
    check::<pb::IotlbEntry, _>(entry.clone());
    check::<pb::IotlbEntry, _>(IotlbEntry { first_byte: Some(0), last_byte: Some(0), ..entry.clone() });
    check::<pb::IotlbEntry, _>(IotlbEntry { first_byte: Some(64), last_byte: Some(4095), ..entry.clone() });
    let wire = pb::IotlbEntry::from(entry);
    for (first_byte, last_byte, expected) in [
        (Some(1), None, expect!["last_byte: comes with first_byte, and not without it"]),
        (None, Some(1), expect!["last_byte: comes with first_byte, and not without it"]),
        (Some(2), Some(1), expect!["last_byte: 2 to 1 are no bytes of the page"]),
        (Some(2), Some(4096), expect!["last_byte: 2 to 4096 are no bytes of the page"]),
    ] {
        wrong::<_, IotlbEntry>(pb::IotlbEntry { first_byte, last_byte, ..wire }, expected);
    }
}

#[test]
fn a_unit_without_rings_has_no_counters_of_rings() {
    let absent = Counters::try_from(pb::GetCountersResponse {
        iotlb: Some(pb::CacheCounters::default()),
        context_cache: Some(pb::CacheCounters::default()),
        paging_structure_cache: Some(pb::CacheCounters::default()),
        ..Default::default()
    });
    let absent = absent.expect("parses");
    assert_eq!(absent.ring, None);
    let ring =
        RingCounters { hits: 1, promotions: 2, walks: 3, walk_reads: 4, prefetch_reads: 5, invalidations: 6 };
    check::<pb::GetCountersResponse, _>(Counters { ring: Some(ring), ..absent });
}
