//! The sanitizer over the wire: what it sees of devices and drivers, whom it blames, who may read it, and that it is bounded.

mod support;

use std::time::{SystemTime, UNIX_EPOCH};

use iommu_proto::pb;
use iommu_proto::pb::Protection::{Bounce, Deferred, Persistent, Ring, Shared, Strict};
use iommu_proto::pb::{Blame, ReportClass, Violation};
use support::*;

fn watched(options: pb::DomainOptions) -> pb::DomainOptions {
    pb::DomainOptions { sanitizer: true, ..options }
}

async fn list(channel: &tonic::transport::Channel) -> Vec<pb::SanitizerReport> {
    let listed = reports(channel).list_reports(pb::ListReportsRequest::default()).await;
    listed.unwrap().into_inner().reports
}

async fn sequences(
    channel: &tonic::transport::Channel,
    request: pb::ListReportsRequest,
) -> Result<Vec<u64>, tonic::Status> {
    let listed = reports(channel).list_reports(request).await?.into_inner();
    Ok(listed.reports.iter().map(|report| report.sequence).collect())
}

fn class(report: &pb::SanitizerReport) -> (ReportClass, Violation, Blame) {
    (report.class(), report.violation(), report.blame())
}

/// The driver writes a register of engine 0, and the device takes it.
async fn write_register(driver: &Driver, agent: &mut Agent, offset: u64, width_bytes: u32, value: u64) {
    let device = Some(device(ENGINE0));
    let request = pb::MmioWriteRequest { device, bar: 0, offset, width_bytes, value };
    let mut client = driver.client();
    let call = tokio::spawn(async move { client.mmio_write(request).await });
    loop {
        match agent.receive().await.unwrap() {
            Down::Mmio(request) => {
                let outcome = Some(pb::mmio_completion::Outcome::Value(0));
                agent.send(Up::Mmio(pb::MmioCompletion { tag: request.tag, outcome })).await;
                break;
            }
            Down::Reset(reset) => agent.send(Up::ResetDone(pb::ResetDone { tag: reset.tag })).await,
            other => panic!("no MMIO: {other:?}"),
        }
    }
    call.await.unwrap().unwrap();
}

/// A driver whose engine 0 is attached to a domain with a sanitizer, and its agent.
async fn scene(server: &iommu_server::server::Server, options: pb::DomainOptions) -> (Driver, Agent, u32) {
    let driver = Driver::open(server, 0).await;
    let agent = Agent::attach(server, ENGINE0).await;
    let id = driver.domain(watched(options)).await;
    (driver, agent, id)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_after_unmap_is_reported_with_the_mappings_life_let_through_or_refused() {
    let now_us = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_micros() as u64;
    for (options, refused_with) in [(deferred(256, 10_000), None), (mode(Strict), Some(5))] {
        let began_us = now_us();
        let server = server().await;
        let (driver, mut agent, id) = scene(&server, options).await;
        let gpa = driver.buffer(PAGE).await;
        let map = driver.map_request(gpa, PAGE);
        let born_by = map.header.as_ref().unwrap().request_id;
        let iova = driver.dma_map(map).await.unwrap();
        agent.write(iova, b"before").await.unwrap();
        assert_eq!(list(&driver.channel).await, [], "a mapping in use");
        let unmap = driver.unmap_request(iova, PAGE);
        let died_by = unmap.header.as_ref().unwrap().request_id;
        driver.dma_unmap(unmap).await.unwrap();
        let outcome = agent.write(iova + 16, b"after").await;
        assert_eq!(outcome.err(), refused_with);
        let lands = driver.read(gpa + 16, 5).await == "after";
        assert_eq!(lands, refused_with.is_none(), "{options:?}");
        let list = list(&driver.channel).await;
        let [report] = &list[..] else { panic!("one report: {list:?}") };
        // The driver never gave the address, by any register: the device kept it.
        assert_eq!(class(report), (ReportClass::UseAfterUnmap, Violation::InvalidUse, Blame::Device));
        assert_eq!((report.sequence, report.repeats), (1, 0));
        assert_eq!((report.owner, report.domain_id), (Some(owner(0)), id));
        assert_eq!(report.device, Some(device(ENGINE0)));
        let done_bytes = if lands { 5 } else { 0 };
        let write = pb::Access::Write.into();
        let seen = pb::SeenAccess {
            iova: iova + 16,
            size_bytes: 5,
            done_bytes,
            access: write,
            refused: refused_with,
        };
        assert_eq!(report.access, Some(seen));
        let life = report.mapping.unwrap();
        assert_eq!((life.iova, life.size_bytes, life.gpa, life.born_by), (iova, PAGE, gpa, born_by));
        let death = life.death.unwrap();
        assert_eq!(death.by, died_by);
        assert!((began_us..=death.at_us).contains(&life.born_at_us) && death.at_us <= now_us());
        assert_eq!(report.age_us, Some(report.at_us - death.at_us), "how long after");
        let faults = faults(&driver.channel).list(pb::ListFaultsRequest::default()).await.unwrap();
        assert_eq!(faults.into_inner().records.len(), usize::from(refused_with.is_some()));
        assert_eq!(driver.domain_state(id).await.sanitizer_reports, 1);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn devices_that_leave_their_mapping_are_reported() {
    let server = server().await;
    let (driver, mut agent, _) = scene(&server, mode(Strict)).await;
    let gpa = driver.buffer(2 * PAGE).await;
    let iova = driver.map(ENGINE0, gpa + 200, 100).await.unwrap();
    agent.write(iova, &[1; 100]).await.unwrap();
    agent.read(iova + 99, 1).await.unwrap();
    assert_eq!(list(&driver.channel).await, []);
    agent.write(iova + 96, &[2; 8]).await.expect("the page is open");
    let overrun = (ReportClass::Overrun, Violation::BadDevice, Blame::Device);
    let direction = pb::Direction::ToDevice.into();
    let read_only = pb::DmaMapRequest { direction, ..driver.map_request(gpa + PAGE, 64) };
    let read_only = driver.dma_map(read_only).await.unwrap();
    agent.write(read_only, &[3]).await.unwrap_err();
    let wrong = (ReportClass::WrongDirection, Violation::BadDevice, Blame::Device);
    agent.read(0x7777_0000, 8).await.unwrap_err();
    let stray = (ReportClass::StrayAccess, Violation::BadDevice, Blame::Device);
    let seen: Vec<_> = list(&driver.channel).await.iter().map(class).collect();
    assert_eq!(seen, [overrun, wrong, stray]);
    // Nonsense and interrupts are no DMA.
    let interrupt = agent.batch(write_batch(0xfee0_0000, &[0; 4])).await;
    assert_eq!(interrupt.fault_index, [0], "it was refused, as none was allocated");
    let nonsense = pb::DmaBatch { kind: bytes::Bytes::from_static(&[77]), ..read_batch(&[0x7000_0000], 4) };
    assert_eq!(agent.batch(nonsense).await.fault_reason, [0x1003]);
    assert_eq!(list(&driver.channel).await.len(), 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_gave_the_address_is_to_blame() {
    let server = server().await;
    let (driver, mut agent, _) = scene(&server, mode(Strict)).await;
    let stray = async |agent: &mut Agent, iova: u64| {
        assert_eq!(agent.write(iova, &[1]).await, Err(5));
        class(list(&driver.channel).await.last().unwrap())
    };
    let by_driver = (ReportClass::StrayAccess, Violation::BadAddress, Blame::Driver);
    let by_device = (ReportClass::StrayAccess, Violation::BadDevice, Blame::Device);
    assert_eq!(stray(&mut agent, 0x1_1111_0000).await, by_device, "nobody gave it");
    // In one register of 8 bytes, and in two of 4.
    write_register(&driver, &mut agent, 0x10, 8, 0x1_2222_0000).await;
    assert_eq!(stray(&mut agent, 0x1_2222_0000).await, by_driver);
    write_register(&driver, &mut agent, 0x20, 4, 0x3333_0000).await;
    write_register(&driver, &mut agent, 0x24, 4, 0x1).await;
    assert_eq!(stray(&mut agent, 0x1_3333_0000).await, by_driver);
    // In a descriptor, once the device has read it.
    let ring = driver.coherent(PAGE).await.unwrap();
    driver.write(ring.gpa + 64, &0x1_4444_0000_u64.to_le_bytes()).await;
    driver.write(ring.gpa + 128, &0x1_5555_0000_u64.to_le_bytes()).await;
    agent.read(ring.iova + 64, 16).await.unwrap();
    assert_eq!(stray(&mut agent, 0x1_4444_0000).await, by_driver);
    assert_eq!(stray(&mut agent, 0x1_5555_0000).await, by_device, "it was never read");
    // What atomics find is read, too.
    let atomic = pb::DmaBatch {
        iova: vec![ring.iova + 128],
        size_bytes: vec![8],
        kind: bytes::Bytes::from_static(&[3]),
        payload: bytes::Bytes::from(0_u64.to_le_bytes().to_vec()),
        ..Default::default()
    };
    assert_eq!(agent.batch(atomic).await.payload[..], 0x1_5555_0000_u64.to_le_bytes());
    assert_eq!(stray(&mut agent, 0x1_5555_0008).await, by_device, "only what was given");
    assert_eq!(stray(&mut agent, 0x1_5555_0000).await, by_driver);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn misuse_by_the_driver_is_reported_with_its_request() {
    let server = server().await;
    let (driver, mut agent, id) = scene(&server, mode(Strict)).await;
    let gpa = driver.buffer(2 * PAGE).await;
    let iova = driver.map(ENGINE0, gpa, 100).await.unwrap();
    let wrong_size = driver.unmap_request(iova, 99);
    let by = wrong_size.header.as_ref().unwrap().request_id;
    driver.dma_unmap(wrong_size).await.unwrap_err();
    driver.free(gpa).await.unwrap_err();
    driver.unmap(ENGINE0, iova, 100).await.unwrap();
    driver.unmap(ENGINE0, iova, 100).await.unwrap_err();
    driver.unmap(ENGINE0, 0x5000_0000, 100).await.unwrap_err();
    driver.sync(iova, 1, pb::SyncFor::Cpu).await.unwrap_err();
    driver.limit(None, Some(PAGE)).await.unwrap();
    driver.map(ENGINE0, gpa, 2 * PAGE).await.unwrap_err();
    write_register(&driver, &mut agent, 8, 8, u64::MAX).await;
    let (once, again) = (driver.map(ENGINE0, gpa, 64).await, driver.map(ENGINE0, gpa, 64).await);
    driver.unmap(ENGINE0, once.unwrap(), 64).await.unwrap();
    driver.unmap(ENGINE0, again.unwrap(), 64).await.unwrap();
    let list = list(&driver.channel).await;
    let classes: Vec<_> = list.iter().map(pb::SanitizerReport::class).collect();
    let expected = [
        ReportClass::SizeMismatch,
        ReportClass::ReleasedWhileMapped,
        ReportClass::DoubleUnmap,
        ReportClass::FreeOfUnmapped,
        ReportClass::SyncOfUnmapped,
        ReportClass::SegmentOverLimit,
        ReportClass::ErrorNeverChecked,
        ReportClass::Overlap,
    ];
    assert_eq!(classes, expected, "{list:?}");
    assert!(list.iter().all(|report| report.blame() == Blame::Driver));
    assert_eq!(list[0].request_id, Some(by));
    assert_eq!(list[0].mapping.unwrap().size_bytes, 100);
    assert_eq!(driver.domain_state(id).await.sanitizer_reports, expected.len() as u64);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_mapped_when_its_device_or_driver_lets_go_has_leaked() {
    let server = server_with(|args| args.grace = Some("1ms".to_owned())).await;
    let operator = operator(&server).await;
    let driver = Driver::open(&server, 0).await;
    let gpa = driver.buffer(4 * PAGE).await;
    let leaks = async || {
        let list = list(&operator).await;
        assert!(list.iter().all(|report| report.class() == ReportClass::Leak), "{list:?}");
        list.iter().map(|report| (report.domain_id, report.mapping.unwrap().gpa)).collect::<Vec<_>>()
    };
    let fresh = async |page: u64| {
        let id = driver.domain(watched(mode(Strict))).await;
        let iova = driver.map(ENGINE0, gpa + page * PAGE, PAGE).await.unwrap();
        (id, iova)
    };
    // Detached by its driver; that the domain goes afterwards is the same leak.
    let (first, _) = fresh(0).await;
    driver.detach(ENGINE0).await.unwrap();
    assert_eq!(leaks().await, [(first, gpa)]);
    driver.destroy(first).await.unwrap();
    assert_eq!(leaks().await.len(), 1);
    // Moved to another domain; and with everything unmapped it would be none.
    let (second, iova) = fresh(1).await;
    driver.unmap(ENGINE0, iova, PAGE).await.unwrap();
    driver.attach(ENGINE0, None).await.unwrap();
    assert_eq!(leaks().await.len(), 1);
    driver.attach(ENGINE0, Some(second)).await.unwrap();
    driver.map(ENGINE0, gpa + PAGE, PAGE).await.unwrap();
    let (third, _) = fresh(2).await;
    assert_eq!(leaks().await[1..], [(second, gpa + PAGE)]);
    // Taken by an operator.
    let device = Some(device(ENGINE0));
    admin(&operator).detach(pb::DetachRequest { device }).await.unwrap();
    assert_eq!(leaks().await[2..], [(third, gpa + 2 * PAGE)]);
    // At a fixed address a mapping goes with its domain, and is no leak.
    let lonely = driver.create_domain(watched(mode(Strict))).await.unwrap();
    let (header, permissions) = (driver.header(), Some(pb::Permissions { read: true, write: true }));
    let (iova, size_bytes) = (1 << 30, PAGE);
    let map = pb::MapRequest { header, domain_id: lonely, iova, gpa, size_bytes, permissions };
    driver.client().map(map).await.unwrap();
    driver.destroy(lonely).await.unwrap();
    assert_eq!(leaks().await.len(), 3);
    // A driver that never comes back.
    let (fourth, _) = fresh(3).await;
    drop(driver);
    let told = async || leaks().await.len() == 4;
    eventually("what it left is reclaimed", told).await;
    assert_eq!(leaks().await[3..], [(fourth, gpa + 3 * PAGE)]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_is_watched_where_it_is_attached_and_nowhere_else() {
    let server = server().await;
    let (driver, mut agent, first) = scene(&server, mode(Strict)).await;
    let wild = async |agent: &mut Agent| {
        agent.read(0x7777_0000, 8).await.unwrap_err();
        list(&driver.channel).await.iter().map(|report| report.domain_id).collect::<Vec<_>>()
    };
    assert_eq!(wild(&mut agent).await, [first]);
    driver.attach(ENGINE0, None).await.unwrap();
    assert_eq!(wild(&mut agent).await, [first], "nobody looks at the default domain");
    let second = driver.domain(watched(mode(Deferred))).await;
    assert_eq!(wild(&mut agent).await, [first, second]);
    driver.detach(ENGINE0).await.unwrap();
    assert_eq!(wild(&mut agent).await, [first, second]);
    driver.attach(ENGINE0, Some(first)).await.unwrap();
    // Equal to what that domain reported last, so it takes no place of its own.
    assert_eq!(wild(&mut agent).await, [first, second]);
    assert_eq!(list(&driver.channel).await[0].repeats, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reports_are_watched_and_a_token_goes_on_where_it_ended() {
    let server = server().await;
    let (driver, mut agent, _) = scene(&server, mode(Strict)).await;
    let other = Driver::open(&server, 1).await;
    let theirs = other.create_domain(watched(mode(Strict))).await.unwrap();
    other.attach(ENGINE1, Some(theirs)).await.unwrap();
    let mut stranger = Agent::attach(&server, ENGINE1).await;
    let watch =
        |resume_token: &str| pb::WatchReportsRequest { filter: None, resume_token: resume_token.to_owned() };
    let mut stream = reports(&driver.channel).watch(watch("")).await.unwrap().into_inner();
    let first = stream.message().await.unwrap().unwrap();
    assert_eq!(first.reports, []);
    stranger.read(0x5000_0000, 4).await.unwrap_err();
    agent.read(0x6000_0000, 4).await.unwrap_err();
    let told = stream.message().await.unwrap().unwrap();
    assert_eq!(told.reports.len(), 1, "not the stranger's");
    assert_eq!((told.reports[0].device, told.reports[0].sequence), (Some(device(ENGINE0)), 1));
    agent.read(0x7000_0000, 4).await.unwrap_err();
    for (token, count) in [(&first.resume_token, 2), (&told.resume_token, 1)] {
        let mut again = reports(&driver.channel).watch(watch(token)).await.unwrap().into_inner();
        assert_eq!(again.message().await.unwrap().unwrap().reports, []);
        assert_eq!(again.message().await.unwrap().unwrap().reports.len(), count);
    }
    let others = format!("{};driver:1=1", first.resume_token.split(';').next().unwrap());
    for token in ["nonsense", "0;driver:0=1", &format!("{}9", told.resume_token), &others] {
        assert_eq!(
            refused(reports(&driver.channel).watch(watch(token)).await),
            "BAD_RESUME_TOKEN",
            "{token}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_driver_reads_its_own_reports_and_those_who_look_read_all() {
    let server = server().await;
    let (driver, mut agent, id) = scene(&server, mode(Strict)).await;
    let other = Driver::open(&server, 1).await;
    let theirs = other.create_domain(watched(mode(Strict))).await.unwrap();
    other.attach(ENGINE1, Some(theirs)).await.unwrap();
    let mut stranger = Agent::attach(&server, ENGINE1).await;
    for page in 0..4 {
        agent.read(0x6000_0000 + page * PAGE * 16, 4).await.unwrap_err();
    }
    stranger.read(0x5000_0000, 4).await.unwrap_err();
    let request = |filter, after_sequence, limit| pb::ListReportsRequest {
        filter: Some(filter),
        after_sequence,
        limit,
    };
    let all = pb::SanitizerFilter::default();
    let of_owner = |number| pb::SanitizerFilter { owner: Some(owner(number)), ..all };
    let of_domain = |id| pb::SanitizerFilter { domain_id: Some(id), ..all };
    let of_device = |source| pb::SanitizerFilter { device: Some(device(source)), ..all };
    let own = &driver.channel;
    for (filter, after, limit, expected) in [
        (all, None, 0, &[1, 2, 3, 4][..]),
        (of_owner(0), None, 2, &[3, 4]),
        (of_domain(id), Some(1), 2, &[2, 3]),
        (of_device(ENGINE0), Some(3), 0, &[4]),
        (all, Some(4), 0, &[]),
    ] {
        assert_eq!(sequences(own, request(filter, after, limit)).await.unwrap(), expected, "{filter:?}");
    }
    for (filter, error) in [
        (of_owner(1), "NOT_YOURS"),
        (of_domain(theirs), "NOT_YOURS"),
        (of_device(ENGINE1), "NOT_YOURS"),
        (of_domain(999), "UNKNOWN_DOMAIN"),
        (of_domain(70_000), "INVALID_FIELD"),
    ] {
        assert_eq!(refused(sequences(own, request(filter, None, 0)).await), error, "{filter:?}");
        let resume_token = String::new();
        let watch = pb::WatchReportsRequest { filter: Some(filter), resume_token };
        assert_eq!(refused(reports(own).watch(watch).await), error, "{filter:?}");
    }
    for channel in [observer(&server).await, operator(&server).await] {
        assert_eq!(sequences(&channel, request(all, None, 0)).await.unwrap().len(), 5);
        assert_eq!(sequences(&channel, request(of_owner(1), None, 0)).await.unwrap(), [1]);
        assert_eq!(sequences(&channel, request(of_domain(theirs), None, 0)).await.unwrap(), [1]);
    }
    // Its reports outlive a domain.
    driver.attach(ENGINE0, None).await.unwrap();
    driver.destroy(id).await.unwrap();
    assert_eq!(sequences(own, request(of_domain(id), None, 0)).await.unwrap().len(), 4);
    let stranger = connect(&server).await;
    assert_eq!(refused(sequences(&stranger, request(all, None, 0)).await), "SESSION_REQUIRED");
    let tenant = session(&server, "someone", pb::open_request::Role::Bare(pb::BareRole {})).await;
    assert_eq!(refused(sequences(&tenant, request(all, None, 0)).await), "ROLE_REFUSED");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i7_one_tenants_reports_do_not_hide_anothers_and_one_batch_is_one_round() {
    let server = server().await;
    let (driver, mut noisy, id) = scene(&server, mode(Strict)).await;
    let victim = Driver::open(&server, 1).await;
    let theirs = victim.create_domain(watched(mode(Strict))).await.unwrap();
    victim.attach(ENGINE1, Some(theirs)).await.unwrap();
    let mut quiet = Agent::attach(&server, ENGINE1).await;
    quiet.read(0x5000_0000, 4).await.unwrap_err();
    for round in 0..3_u64 {
        let iovas: Vec<u64> = (0..1000).map(|n| 0x1_0000_0000 + ((round * 1000 + n) << 20)).collect();
        noisy.batch(read_batch(&iovas, 4)).await;
    }
    let listed = |channel| async move {
        reports(channel).list_reports(pb::ListReportsRequest::default()).await.unwrap().into_inner()
    };
    let theirs = listed(&victim.channel).await;
    assert_eq!((theirs.reports.len(), theirs.overwritten_count), (1, 0));
    let own = listed(&driver.channel).await;
    assert_eq!((own.reports.len(), own.overwritten_count), (1024, 3000 - 1024));
    assert_eq!(driver.domain_state(id).await.sanitizer_reports, 3000);
    // Equal ones in a row take one place.
    for _ in 0..3 {
        noisy.batch(read_batch(&[0x5000_0000; 1000], 4)).await;
    }
    let own = listed(&driver.channel).await;
    assert_eq!((own.reports.last().unwrap().repeats, own.overwritten_count), (2999, 3001 - 1024));
    let text = metrics(&server);
    let line = "iommu_sanitizer_reports_total{class=\"stray-access\"} 6001";
    assert!(text.contains(line), "{line} is not in\n{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_that_is_moved_under_load_is_told_to_the_domain_in_which_its_dma_was_done() {
    const IOVA: u64 = 1 << 30;
    let server = server().await;
    let (driver, mut agent, first) = scene(&server, mode(Strict)).await;
    let second = driver.create_domain(watched(mode(Strict))).await.unwrap();
    let gpa = driver.buffer(PAGE).await;
    // Each address is mapped in one of the two domains. What was done there and told to the other would be an access to nothing that was let
    // through, which no strict domain does.
    for (domain_id, iova) in [(first, IOVA), (second, 2 * IOVA)] {
        let (header, permissions) = (driver.header(), Some(pb::Permissions { read: true, write: true }));
        let map = pb::MapRequest { header, domain_id, iova, gpa, size_bytes: PAGE, permissions };
        driver.client().map(map).await.unwrap();
    }
    let stop = tokio_util::sync::CancellationToken::new();
    let load = tokio::spawn({
        let stop = stop.clone();
        async move {
            let mut done = 0;
            while !stop.is_cancelled() {
                let answer = agent.batch(read_batch(&[IOVA, 2 * IOVA].repeat(512), 2000)).await;
                done += 1024 - answer.fault_index.len();
            }
            done
        }
    });
    for _ in 0..100 {
        driver.attach(ENGINE0, Some(second)).await.unwrap();
        driver.attach(ENGINE0, Some(first)).await.unwrap();
    }
    stop.cancel();
    assert!(load.await.unwrap() > 0);
    let list = list(&driver.channel).await;
    let seen: Vec<_> = list.iter().filter_map(|report| report.access).collect();
    assert!(!seen.is_empty());
    assert!(seen.iter().all(|access| access.refused.is_some()), "{list:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_that_ends_before_the_unmap_is_reported_nowhere() {
    // Addresses are used again and again, and translations live on for a while.
    for options in [mode(Strict), deferred(4, 1), mode(Shared), mode(Persistent), mode(Bounce), mode(Ring)] {
        let server = server().await;
        let (driver, mut agent, id) = scene(&server, options).await;
        let gpa = driver.buffer(PAGE).await;
        for _ in 0..50 {
            let iova = driver.map(ENGINE0, gpa, PAGE).await.unwrap();
            let batch = agent.batch(read_batch(&[iova; 64], 64)).await;
            assert!(batch.fault_index.is_empty(), "{options:?}");
            driver.unmap(ENGINE0, iova, PAGE).await.unwrap();
        }
        assert_eq!(driver.domain_state(id).await.sanitizer_reports, 0, "{options:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_device_was_given_goes_with_it_from_domain_to_domain() {
    let server = server().await;
    let driver = Driver::open(&server, 0).await;
    let mut agent = Agent::attach(&server, ENGINE0).await;
    let blame = async |agent: &mut Agent, iova: u64| {
        assert_eq!(agent.write(iova, &[1]).await, Err(5));
        list(&driver.channel).await.last().unwrap().blame()
    };
    // Before anybody looks, in either width; and by halves on both sides of the move.
    write_register(&driver, &mut agent, 0x10, 8, 0x1_2222_0000).await;
    write_register(&driver, &mut agent, 0x20, 4, 0x3333_0000).await;
    write_register(&driver, &mut agent, 0x30, 4, 0x4444_0000).await;
    let first = driver.domain(watched(mode(Strict))).await;
    write_register(&driver, &mut agent, 0x34, 4, 0x1).await;
    assert_eq!(blame(&mut agent, 0x1_2222_0000).await, Blame::Unknown);
    assert_eq!(blame(&mut agent, 0x3333_0000).await, Blame::Unknown);
    assert_eq!(blame(&mut agent, 0x1_4444_0000).await, Blame::Driver);
    assert_eq!(blame(&mut agent, 0x1_5555_0000).await, Blame::Device, "nobody gave it");
    // What one sanitizer saw, the next one has, whether there was a domain without one between them or not.
    for between in [false, true] {
        write_register(&driver, &mut agent, 0x40, 8, 0x1_6666_0000).await;
        if between {
            driver.attach(ENGINE0, None).await.unwrap();
        }
        driver.domain(watched(mode(Strict))).await;
        assert_eq!(blame(&mut agent, 0x1_6666_0000).await, Blame::Unknown, "{between}");
        assert_eq!(blame(&mut agent, 0x1_5555_0000).await, Blame::Device, "{between}");
    }
    // Memory for descriptors where nobody looked: it may have been given anything there.
    driver.attach(ENGINE0, None).await.unwrap();
    driver.coherent(PAGE).await.unwrap();
    driver.attach(ENGINE0, Some(first)).await.unwrap();
    assert_eq!(blame(&mut agent, 0x1_5555_0000).await, Blame::Unknown);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reset_device_was_given_nothing() {
    let server = server().await;
    let operator = operator(&server).await;
    let driver = Driver::open(&server, 0).await;
    let mut agent = Agent::attach(&server, ENGINE0).await;
    write_register(&driver, &mut agent, 0x10, 8, 0x1_2222_0000).await;
    let next = Driver::open(&server, 1).await;
    let theirs = next.create_domain(watched(mode(Strict))).await.unwrap();
    let (device, owner) = (Some(device(ENGINE0)), Some(owner(1)));
    let give = pb::AttachToOwnerRequest { device, owner, domain_id: Some(theirs) };
    let mut admin = admin(&operator);
    let (given, ()) = tokio::join!(admin.attach_to_owner(give), async {
        match agent.receive().await.unwrap() {
            Down::Reset(reset) => agent.send(Up::ResetDone(pb::ResetDone { tag: reset.tag })).await,
            other => panic!("no reset: {other:?}"),
        }
    });
    given.unwrap();
    assert_eq!(agent.write(0x1_2222_0000, &[1]).await, Err(5));
    let reports = list(&next.channel).await;
    assert_eq!(class(&reports[0]), (ReportClass::StrayAccess, Violation::BadDevice, Blame::Device));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unmap_or_sync_of_what_the_default_domain_has_is_no_misuse() {
    let server = server().await;
    let driver = Driver::open(&server, 0).await;
    let gpa = driver.buffer(4 * PAGE).await;
    let early = driver.map(ENGINE0, gpa, 100).await.unwrap();
    let segments = driver.map_sg(&[(gpa + PAGE, 64), (gpa + 2 * PAGE, 64)]).await.unwrap();
    // Of the same place in its address space, and of another size.
    let id = driver.domain(watched(mode(Strict))).await;
    let late = driver.map(ENGINE0, gpa + 3 * PAGE, 200).await.unwrap();
    assert_eq!(early & !0xfff, late & !0xfff, "both domains hand out the same address");
    driver.sync(segments[0].0, 8, pb::SyncFor::Cpu).await.unwrap();
    driver.unmap_sg(segments[0].0, 2).await.unwrap();
    // A batch with mappings of both.
    let (up, requests) = tokio::sync::mpsc::channel(1);
    let stream = tokio_stream::wrappers::ReceiverStream::new(requests);
    let mut answers = driver.client().dma_stream(stream).await.unwrap().into_inner();
    let batch = pb::DmaUnmapBatch {
        iova: vec![late, early],
        size_bytes: vec![200, 100],
        direction: pb::Direction::Bidirectional.into(),
        ..Default::default()
    };
    let batch = Some(pb::dma_stream_request::Batch::Unmap(batch));
    let (header, device) = (driver.header(), Some(device(ENGINE0)));
    up.send(pb::DmaStreamRequest { header, device, batch }).await.unwrap();
    let answer = answers.message().await.unwrap().unwrap();
    assert_eq!(answer.errors, []);
    assert_eq!(list(&driver.channel).await, []);
    // What neither has is told once.
    assert_eq!(refused(driver.unmap(ENGINE0, late, 200).await), "NOT_MAPPED");
    assert_eq!(driver.domain_state(id).await.sanitizer_reports, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_map_that_succeeds_when_it_is_tried_again_did_not_fail() {
    let server = server().await;
    let (driver, mut agent, _) = scene(&server, deferred(256, 10_000)).await;
    let gpa = driver.buffer(PAGE).await;
    driver.limit(Some(13), None).await.unwrap();
    let iova = driver.map(ENGINE0, gpa, PAGE).await.unwrap();
    driver.unmap(ENGINE0, iova, PAGE).await.unwrap();
    assert_eq!(driver.map(ENGINE0, gpa, PAGE).await.unwrap(), iova, "after a flush");
    write_register(&driver, &mut agent, 8, 8, u64::MAX).await;
    assert_eq!(list(&driver.channel).await, []);
    driver.map(ENGINE0, gpa, PAGE).await.unwrap_err();
    write_register(&driver, &mut agent, 8, 8, u64::MAX).await;
    assert_eq!(list(&driver.channel).await[0].class(), ReportClass::ErrorNeverChecked);
}
