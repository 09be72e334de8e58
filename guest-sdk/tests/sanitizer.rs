//! Reports of the sanitizer, listed and watched, against a scripted server.

mod support;

use guest_sdk::errors::{BadResumeToken, CallError, UnknownDomain};
use guest_sdk::{Blame, DomainId, Owner, ReportClass, SanitizerFilter, SanitizerReport, SdkError};
use iommu_proto::errors::WireError;
use iommu_proto::pb;
use support::{Fake, soon};
use tonic::Status;

fn report(sequence: u64) -> SanitizerReport {
    SanitizerReport {
        sequence,
        at_us: 5,
        owner: Owner::Driver(1),
        domain_id: DomainId::new(3),
        device: None,
        class: ReportClass::DoubleUnmap,
        violation: None,
        blame: Blame::Driver,
        access: None,
        mapping: None,
        request_id: None,
        age_us: None,
        repeats: 0,
    }
}

fn sequences(reports: &[SanitizerReport]) -> Vec<u64> {
    reports.iter().map(|report| report.sequence).collect()
}

#[tokio::test]
async fn lists_ask_for_the_newest_or_for_what_follows() {
    let fake = Fake::default();
    let driver = fake.driver().await;
    let filter =
        SanitizerFilter { owner: Some(Owner::Driver(1)), domain_id: Some(DomainId::new(3)), device: None };
    let list = pb::ListReportsResponse {
        reports: vec![report(4).into(), report(5).into()],
        overwritten_count: 3,
        resume_token: "t5".to_owned(),
    };
    fake.answer("list_reports", list.clone()).answer("list_reports", list);
    let newest = driver.sanitizer().list(filter, 2).await.expect("a list");
    assert_eq!((newest.reports, newest.overwritten_count), (vec![report(4), report(5)], 3));
    driver.sanitizer().list_after(filter, 0, 7).await.expect("a list");
    let asked = fake.sent::<pb::ListReportsRequest>();
    let places: Vec<_> = asked.iter().map(|ask| (ask.after_sequence, ask.limit)).collect();
    assert_eq!(places, [(None, 2), (Some(0), 7)]);
    assert_eq!(asked[0].filter.and_then(|filter| filter.domain_id), Some(3));

    let unknown = UnknownDomain { domain_id: DomainId::new(3) };
    fake.refuse("list_reports", unknown.clone());
    let refused = driver.sanitizer().list(filter, 0).await.expect_err("refused");
    assert_eq!(refused, SdkError::Refused(unknown.into()));
}

#[tokio::test]
async fn reports_are_watched_on_from_the_last_token() {
    let message = |sequences: &[u64], missed_count, token: &str| {
        Ok(pb::WatchReportsResponse {
            reports: sequences.iter().map(|&sequence| report(sequence).into()).collect(),
            missed_count,
            resume_token: token.into(),
        })
    };
    let fake = Fake::default();
    let driver = fake.driver().await;
    fake.state().reports = [
        vec![
            message(&[], 0, "t0"),
            message(&[1, 2], 0, "t2"),
            Err(Status::unavailable("the connection is lost")),
        ],
        vec![
            message(&[], 0, "t2"),
            message(&[9], 6, "t9"),
            Err(BadResumeToken { token: "t9".into() }.into_status()),
        ],
    ]
    .into();
    let mut reports = driver.sanitizer().watch(SanitizerFilter::default(), "t0").await.expect("it stands");
    for (expected, missed) in [(vec![1, 2], 0), (vec![9], 6)] {
        let new = soon("reports", reports.next()).await.expect("it goes on").expect("reports");
        assert_eq!((sequences(&new.reports), new.missed_count), (expected, missed));
    }
    let end = soon("the end", reports.next()).await.expect("an end").expect_err("refused");
    assert!(matches!(end, SdkError::Call(CallError::BadResumeToken(_))), "{end:?}");
    assert!(reports.next().await.is_none());
    assert_eq!(fake.state().report_tokens, ["t0", "t2"]);
}

#[tokio::test]
async fn a_report_of_a_later_version_is_told_and_not_guessed() {
    let fake = Fake::default();
    let driver = fake.driver().await;
    let reports = vec![pb::SanitizerReport { class: 99, ..report(1).into() }];
    fake.answer("list_reports", pb::ListReportsResponse { reports, ..Default::default() });
    let refused = driver.sanitizer().list(SanitizerFilter::default(), 0).await.expect_err("not understood");
    assert!(refused.to_string().contains("reports[0].class: 99"), "{refused}");
}
