//! The commands about domains and the sanitizer, as processes against a scripted server: what they ask, print and exit with.

mod support;

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};

use iommu_proto::errors::WireError;
use iommu_proto::pb;
use iommu_types::errors::UnknownDomain;
use iommu_types::{
    Blame, Direction, DomainId, DomainOptions, Gpa, Iova, MappingLife, Owner, Protection, ReportClass,
    RequestId, SanitizerReport, Violation,
};
use serde_json::Value;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status};

#[derive(Clone, Default)]
struct Fake(Arc<Mutex<Script>>);

#[derive(Default)]
struct Script {
    domains: Vec<pb::DomainState>,
    /// What is kept, of all owners.
    reports: Vec<SanitizerReport>,
    /// What Watch sends.
    watched: Vec<pb::WatchReportsResponse>,
    lists: Vec<pb::ListReportsRequest>,
    watches: Vec<pb::WatchReportsRequest>,
}

impl Fake {
    fn script(&self) -> MutexGuard<'_, Script> {
        self.0.lock().expect("no test panics with the lock")
    }

    /// Runs `iommuctl` against this server: exit code, standard output, standard error.
    async fn run(&self, arguments: &[&str]) -> (Option<i32>, String, String) {
        let server = tonic::transport::Server::builder()
            .add_service(pb::session_service_server::SessionServiceServer::new(self.clone()))
            .add_service(pb::inspect_service_server::InspectServiceServer::new(self.clone()))
            .add_service(pb::sanitizer_service_server::SanitizerServiceServer::new(self.clone()));
        support::run(&support::serve(server), arguments, &[]).await
    }

    async fn json(&self, arguments: &[&str]) -> Value {
        let (code, out, err) = self.run(&[arguments, &["--json"]].concat()).await;
        assert_eq!(code, Some(0), "{err}");
        serde_json::from_str(&out).expect("--json prints JSON")
    }
}

#[tonic::async_trait]
impl pb::session_service_server::SessionService for Fake {
    async fn open(&self, _: Request<pb::OpenRequest>) -> Result<Response<pb::OpenResponse>, Status> {
        Ok(Response::new(support::opened(false)))
    }
}

type Replies<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl pb::inspect_service_server::InspectService for Fake {
    async fn get_topology(
        &self,
        _: Request<pb::GetTopologyRequest>,
    ) -> Result<Response<pb::GetTopologyResponse>, Status> {
        let owners = [Owner::Driver(0), Owner::Driver(1), Owner::Vm(2)];
        let state = |owner: Owner| pb::OwnerState { owner: Some(owner.into()), ..Default::default() };
        let owners = owners.into_iter().map(state).collect();
        Ok(Response::new(pb::GetTopologyResponse { owners, ..Default::default() }))
    }
    async fn list_domains(
        &self,
        _: Request<pb::ListDomainsRequest>,
    ) -> Result<Response<pb::ListDomainsResponse>, Status> {
        Ok(Response::new(pb::ListDomainsResponse { domains: self.script().domains.clone() }))
    }
    async fn list_mappings(
        &self,
        _: Request<pb::ListMappingsRequest>,
    ) -> Result<Response<pb::ListMappingsResponse>, Status> {
        Err(Status::unimplemented("not asked here"))
    }
    type DumpTablesStream = Replies<pb::DumpTablesResponse>;
    async fn dump_tables(
        &self,
        _: Request<pb::DumpTablesRequest>,
    ) -> Result<Response<Self::DumpTablesStream>, Status> {
        Err(Status::unimplemented("not asked here"))
    }
    async fn dump_iotlb(
        &self,
        _: Request<pb::DumpIotlbRequest>,
    ) -> Result<Response<pb::DumpIotlbResponse>, Status> {
        let entry = |first_byte, last_byte| pb::IotlbEntry {
            domain_id: 7,
            page_bytes: 4096,
            permissions: Some(pb::Permissions { read: true, write: false }),
            first_byte,
            last_byte,
            ..Default::default()
        };
        let entries = vec![entry(None, None), entry(Some(64), Some(1563))];
        Ok(Response::new(pb::DumpIotlbResponse { entries, total: 2, capacity: 64 }))
    }
    async fn get_counters(
        &self,
        _: Request<pb::GetCountersRequest>,
    ) -> Result<Response<pb::GetCountersResponse>, Status> {
        let cache = Some(pb::CacheCounters::default());
        Ok(Response::new(pb::GetCountersResponse {
            iotlb: cache,
            context_cache: cache,
            paging_structure_cache: cache,
            ring: Some(pb::RingCounters { promotions: 31_415, ..Default::default() }),
            ..Default::default()
        }))
    }
    async fn list_limits(
        &self,
        request: Request<pb::ListLimitsRequest>,
    ) -> Result<Response<pb::ListLimitsResponse>, Status> {
        let limit = |name: &str, used, allowed, refused_count| pb::LimitState {
            limit: name.to_owned(),
            used,
            allowed,
            refused_count,
        };
        let limits = vec![limit("mapped_bytes", 8192, 65_536, 3), limit("domains", 1, 2, 0)];
        let asked = request.into_inner().owner;
        let owners = [Owner::Driver(1), Owner::Vm(2)].map(pb::Owner::from).into_iter();
        let owners = owners.filter(|owner| asked.is_none_or(|asked| asked == *owner));
        let owners = owners.map(|owner| pb::OwnerLimits { owner: Some(owner), limits: limits.clone() });
        Ok(Response::new(pb::ListLimitsResponse { owners: owners.collect() }))
    }
    async fn explain(&self, _: Request<pb::ExplainRequest>) -> Result<Response<pb::ExplainResponse>, Status> {
        Err(Status::unimplemented("not asked here"))
    }
}

#[tonic::async_trait]
impl pb::sanitizer_service_server::SanitizerService for Fake {
    async fn list_reports(
        &self,
        request: Request<pb::ListReportsRequest>,
    ) -> Result<Response<pb::ListReportsResponse>, Status> {
        let ask = request.into_inner();
        let mut script = self.script();
        script.lists.push(ask);
        let filter = ask.filter.unwrap_or_default();
        if filter.domain_id == Some(99) {
            return Err(UnknownDomain { domain_id: DomainId::new(99) }.into_status());
        }
        let after = ask.after_sequence.unwrap_or_default();
        let wanted = script.reports.iter().filter(|report| {
            report.sequence > after && filter.owner.is_none_or(|owner| owner == report.owner.into())
        });
        let mut reports: Vec<pb::SanitizerReport> = wanted.map(|report| (*report).into()).collect();
        if ask.limit > 0 {
            reports.truncate(ask.limit as usize);
        }
        let resume_token = "t".to_owned();
        Ok(Response::new(pb::ListReportsResponse { reports, overwritten_count: 1, resume_token }))
    }
    type WatchStream = Replies<pb::WatchReportsResponse>;
    async fn watch(
        &self,
        request: Request<pb::WatchReportsRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let mut script = self.script();
        script.watches.push(request.into_inner());
        let stands = pb::WatchReportsResponse::default();
        let messages: Vec<_> = std::iter::once(stands).chain(script.watched.clone()).map(Ok).collect();
        Ok(Response::new(Box::pin(tokio_stream::iter(messages).chain(tokio_stream::pending()))))
    }
}

fn report(sequence: u64, owner: Owner) -> SanitizerReport {
    SanitizerReport {
        sequence,
        at_us: 1_000_000,
        owner,
        domain_id: DomainId::new(3),
        device: None,
        class: ReportClass::DoubleUnmap,
        violation: Some(Violation::BadAddress),
        blame: Blame::Driver,
        access: None,
        mapping: Some(MappingLife {
            iova: Iova::new(0x5000),
            size_bytes: 64,
            gpa: Gpa::new(0x9000),
            direction: Direction::ToDevice,
            coherent: false,
            born_at_us: 900_000,
            born_by: RequestId(4),
            death: Some((950_000, RequestId(5))),
        }),
        request_id: Some(RequestId(6)),
        age_us: None,
        repeats: 0,
    }
}

fn domain(number: u32, options: DomainOptions) -> pb::DomainState {
    pb::DomainState {
        domain_id: number,
        owner: Some(Owner::Driver(1).into()),
        options: Some(options.into()),
        pending_flushes: 17,
        oldest_pending_us: Some(4_250),
        sanitizer_reports: 3,
        ..Default::default()
    }
}

#[tokio::test]
async fn domains_are_a_table_or_a_page_about_one() {
    let fake = Fake::default();
    let deferred = DomainOptions::new(Protection::DEFERRED).with_sanitizer(true);
    fake.script().domains = vec![domain(7, deferred), domain(8, DomainOptions::new(Protection::RING))];
    let (code, out, err) = fake.run(&["domains"]).await;
    assert_eq!(code, Some(0), "{err}");
    let line = out.lines().find(|line| line.contains("deferred")).expect("a line for domain 7");
    for part in
        ["7", "driver:1", "deferred (256 or 10 ms)", "page", "cached", "17", "4.25 ms", "on, 3 reports"]
    {
        assert!(line.contains(part), "{part:?} is missing: {line}");
    }
    assert!(out.contains("ring (2 x 1024)"), "{out}");
    let (_, page, _) = fake.run(&["domains", "8"]).await;
    assert!(page.contains("domain 8 of driver:1") && page.contains("at most 2 slots"), "{page}");
    assert!(!page.contains("deferred"), "{page}");
    let value = fake.json(&["domains", "7"]).await;
    assert_eq!((&value["domain_id"], &value["oldest_pending_us"]), (&Value::from(7), &Value::from(4_250)));
    assert_eq!(fake.json(&["domains"]).await.as_array().map(Vec::len), Some(2));
    let (code, _, err) = fake.run(&["domains", "9", "--owner", "driver:1"]).await;
    assert_eq!(code, Some(1));
    assert!(
        err.contains("there is no domain 9 of driver:1; `iommuctl domains` lists those there are"),
        "{err}"
    );
}

#[tokio::test]
async fn reports_are_listed_as_asked() {
    let fake = Fake::default();
    fake.script().reports = vec![report(1, Owner::Driver(1)), report(2, Owner::Driver(1))];
    let (code, out, err) = fake.run(&["sanitizer", "list"]).await;
    assert_eq!(code, Some(0), "{err}");
    assert_eq!(out.lines().filter(|line| line.contains("double-unmap")).count(), 2, "{out}");
    assert!(out.ends_with("1 older report overwritten\n"), "{out}");
    let filter =
        ["--owner", "driver:1", "--domain", "3", "--device", "00:05.0", "--after", "1", "--limit", "9"];
    let value = fake.json(&[&["sanitizer", "list"], &filter[..]].concat()).await;
    assert_eq!(
        (&value["reports"][0]["sequence"], &value["reports"][0]["blame"]),
        (&2.into(), &"driver".into())
    );
    assert_eq!((&value["resume_token"], &value["overwritten_count"]), (&"t".into(), &1.into()));
    let asked = fake.script().lists.clone();
    let of = |ask: &pb::ListReportsRequest| (ask.after_sequence, ask.limit);
    assert_eq!(asked.iter().map(of).collect::<Vec<_>>(), [(None, 100), (Some(1), 9)]);
    let filter = asked[1].filter.expect("a filter");
    let device = pb::DeviceAddress { segment: 0, source_id: 0x28 };
    assert_eq!((filter.owner, filter.domain_id), (Some(Owner::Driver(1).into()), Some(3)));
    assert_eq!(filter.device, Some(device));
    let (code, _, err) = fake.run(&["sanitizer", "list", "--domain", "99"]).await;
    assert_eq!((code, err.as_str()), (Some(1), "iommuctl: there is no domain 99\n"));
    let (_, out, _) = fake.run(&["sanitizer", "list", "--after", "2"]).await;
    assert!(out.starts_with("no reports; `iommuctl domains` shows which"), "{out}");
}

#[tokio::test]
async fn a_report_is_explained_and_the_owner_asked_for_where_two_have_its_number() {
    let fake = Fake::default();
    fake.script().reports =
        vec![report(7, Owner::Driver(1)), report(8, Owner::Driver(1)), report(8, Owner::Vm(2))];
    let (code, out, err) = fake.run(&["sanitizer", "explain", "7"]).await;
    assert_eq!(code, Some(0), "{err}");
    for part in [
        "Report 7 of driver:1: double-unmap;",
        "request 6 of driver:1 asked for it",
        "request 4 made it",
        "request 5 unmapped it",
        "50.00 ms later",
        "The driver is to blame",
        "V1",
        "What to do: ",
    ] {
        assert!(out.contains(part), "{part:?} is missing:\n{out}");
    }
    let value = fake.json(&["sanitizer", "explain", "8", "--owner", "vm:2"]).await;
    assert_eq!((&value["owner"], &value["class"]), (&"vm:2".into(), &"double-unmap".into()));
    assert_eq!(value["mapping"]["death"]["by"], 5);
    assert!(value["sentences"].as_array().is_some_and(|sentences| sentences.len() > 3), "{value}");
    for (arguments, expected) in [
        (&["8"][..], "driver:1 and vm:2 each have a report 8; say whose with --owner"),
        (&["9"], "no report 9 is kept"),
        (&["7", "--owner", "vm:2"], "no report 7 of vm:2 is kept"),
    ] {
        let (code, _, err) = fake.run(&[&["sanitizer", "explain"], arguments].concat()).await;
        assert_eq!(code, Some(1));
        assert!(err.contains(expected), "{err}");
    }
}

#[tokio::test]
async fn reports_are_followed_from_a_token_until_enough_have_come() {
    let fake = Fake::default();
    let message = |sequences: &[u64], missed_count, token: &str| pb::WatchReportsResponse {
        reports: sequences.iter().map(|sequence| report(*sequence, Owner::Driver(1)).into()).collect(),
        missed_count,
        resume_token: token.to_owned(),
    };
    fake.script().watched = vec![message(&[1, 2], 0, "t2"), message(&[9, 10], 6, "t10")];
    let arguments = ["sanitizer", "follow", "--from", "t0", "--count", "3"];
    let (code, out, err) = fake.run(&arguments).await;
    assert_eq!(code, Some(0), "{err}");
    let numbers: Vec<_> = out.lines().map(|line| line.split_whitespace().next().expect("a word")).collect();
    assert_eq!(numbers, ["1", "2", "6", "9"], "6 were missed: {out}");
    let (_, out, _) = fake.run(&[&arguments[..], &["--json"]].concat()).await;
    let lines: Vec<Value> =
        out.lines().map(|line| serde_json::from_str(line).expect("a line of JSON")).collect();
    let tokens: Vec<_> = lines.iter().map(|line| line["resume_token"].as_str()).collect();
    // Before the last report of a message only the token before it misses nothing.
    assert_eq!(tokens, [Some("t0"), Some("t2"), None, Some("t2")]);
    assert_eq!(lines[2]["missed_count"], 6);
    assert!(fake.script().watches.iter().all(|watch| watch.resume_token == "t0"));
}

#[tokio::test]
async fn rings_and_partial_pages_are_shown() {
    let fake = Fake::default();
    let (_, out, _) = fake.run(&["counters"]).await;
    assert!(out.contains("rIOMMU") && out.contains("31415"), "{out}");
    assert_eq!(fake.json(&["counters"]).await["ring"]["promotions"], 31_415);
    let (_, out, _) = fake.run(&["iotlb"]).await;
    assert!(out.contains("64 to 1563") && out.contains("all"), "{out}");
    assert_eq!(fake.json(&["iotlb"]).await["entries"][1]["last_byte"], 1563);
}

#[tokio::test]
async fn limits_are_shown_per_owner_with_what_they_refused() {
    let fake = Fake::default();
    let (code, out, err) = fake.run(&["limits"]).await;
    assert_eq!(code, Some(0), "{err}");
    let line = out.lines().find(|line| line.contains("vm:2") && line.contains("mapped_bytes"));
    let words: Vec<&str> = line.expect("a line").split_whitespace().collect();
    assert_eq!(words, ["vm:2", "mapped_bytes", "8192", "65536", "3"]);
    let value = fake.json(&["limits", "--owner", "driver:1"]).await;
    let limits = value.as_array().expect("a list");
    assert_eq!((limits.len(), &limits[1]["limit"]), (2, &Value::from("domains")));
    assert!(limits.iter().all(|limit| limit["owner"] == "driver:1"));
}
