//! The commands of a hypervisor, as processes against a scripted server: what they ask, print and exit with, and how they share a session.

mod support;

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use iommu_proto::errors::WireError;
use iommu_proto::pb;
use iommu_types::errors::{BadResumeToken, IdentityRefused, ShuttingDown, StillMapped};
use iommu_types::{DeviceAddress, FunctionKind, Gpa, Owner, PciFunction};
use serde_json::Value;
use tonic::{Request, Response, Status, Streaming};

#[derive(Default)]
struct Script {
    opens: Vec<pb::OpenRequest>,
    /// Whether a token is known no more.
    forgets: bool,
    /// How the next sessions are refused.
    refusals: VecDeque<Status>,
    /// Every request, in words, and the IDs of those that have one.
    asked: Vec<String>,
    ids: Vec<u64>,
}

#[derive(Clone, Default)]
struct Fake(Arc<Mutex<Script>>);

/// A scripted server, and where the command keeps its sessions.
struct Run {
    fake: Fake,
    endpoint: String,
    directory: tempfile::TempDir,
}

impl Run {
    fn start() -> Self {
        let fake = Fake::default();
        let server = tonic::transport::Server::builder()
            .add_service(pb::session_service_server::SessionServiceServer::new(fake.clone()))
            .add_service(pb::hypervisor_service_server::HypervisorServiceServer::new(fake.clone()))
            .add_service(pb::admin_service_server::AdminServiceServer::new(fake.clone()));
        let endpoint = support::serve(server);
        Self { fake, endpoint, directory: tempfile::tempdir().expect("a directory") }
    }

    fn script(&self) -> MutexGuard<'_, Script> {
        self.fake.script()
    }

    async fn run(&self, arguments: &[&str]) -> support::Ran {
        let directory = self.directory.path().to_str().expect("UTF-8");
        support::run(&self.endpoint, arguments, &[("XDG_RUNTIME_DIR", directory)]).await
    }

    /// What a command that succeeds prints.
    async fn done(&self, arguments: &[&str]) -> String {
        let (code, out, err) = self.run(arguments).await;
        assert_eq!(code, Some(0), "{arguments:?}: {err}");
        out
    }

    async fn json(&self, arguments: &[&str]) -> Value {
        let out = self.done(&[arguments, &["--json"]].concat()).await;
        serde_json::from_str(&out).expect("--json prints JSON")
    }

    fn session_file(&self) -> PathBuf {
        self.directory.path().join("iommuctl-hv0.session")
    }
}

impl Fake {
    fn script(&self) -> MutexGuard<'_, Script> {
        self.0.lock().expect("no test panics with the lock")
    }

    fn asked(&self, words: String, header: Option<pb::RequestHeader>) {
        let mut script = self.script();
        script.asked.push(words);
        script.ids.extend(header.map(|header| header.request_id));
    }
}

fn device(text: &str) -> DeviceAddress {
    text.parse().expect("an address")
}

#[tonic::async_trait]
impl pb::session_service_server::SessionService for Fake {
    async fn open(&self, request: Request<pb::OpenRequest>) -> Result<Response<pb::OpenResponse>, Status> {
        let open = request.into_inner();
        let mut script = self.script();
        let resumed = !open.resume_token.is_empty();
        script.opens.push(open);
        if let Some(refusal) = script.refusals.pop_front() {
            return Err(refusal);
        }
        if resumed && script.forgets {
            return Err(BadResumeToken { token: "01010101...".into() }.into_status());
        }
        Ok(Response::new(support::opened(resumed)))
    }
}

#[tonic::async_trait]
impl pb::hypervisor_service_server::HypervisorService for Fake {
    async fn create_vm(
        &self,
        request: Request<pb::CreateVmRequest>,
    ) -> Result<Response<pb::CreateVmResponse>, Status> {
        let ask = request.into_inner();
        let memory = ask.limits.and_then(|limits| limits.memory_bytes);
        self.asked(format!("create {} {:?} {memory:?}", ask.name, ask.number), ask.header);
        Ok(Response::new(pb::CreateVmResponse { number: ask.number.unwrap_or(1) }))
    }
    async fn destroy_vm(
        &self,
        request: Request<pb::DestroyVmRequest>,
    ) -> Result<Response<pb::DestroyVmResponse>, Status> {
        let ask = request.into_inner();
        self.asked(format!("destroy {}", ask.vm), ask.header);
        Ok(Response::new(pb::DestroyVmResponse {}))
    }
    async fn list_vms(
        &self,
        _: Request<pb::ListVmsRequest>,
    ) -> Result<Response<pb::ListVmsResponse>, Status> {
        let vm = pb::VmState {
            number: 1,
            name: "guest1".into(),
            connected: true,
            memory: vec![
                pb::MemoryRegion { gpa: 0x10_0000, size_bytes: 0x4000 },
                pb::MemoryRegion { gpa: 0x20_0000, size_bytes: 0x1000 },
            ],
            functions: vec![device("00:03.0").into()],
        };
        Ok(Response::new(pb::ListVmsResponse { vms: vec![vm] }))
    }
    async fn add_memory(
        &self,
        request: Request<pb::AddMemoryRequest>,
    ) -> Result<Response<pb::AddMemoryResponse>, Status> {
        let ask = request.into_inner();
        self.asked(format!("add {} {:#x} {}", ask.vm, ask.gpa, ask.size_bytes), ask.header);
        Ok(Response::new(pb::AddMemoryResponse {}))
    }
    async fn remove_memory(
        &self,
        request: Request<pb::RemoveMemoryRequest>,
    ) -> Result<Response<pb::RemoveMemoryResponse>, Status> {
        let ask = request.into_inner();
        if ask.how() == pb::Revocation::Refuse {
            return Err(StillMapped { gpa: Gpa::new(ask.gpa) }.into_status());
        }
        self.asked(format!("remove {} {:?} {}", ask.vm, ask.how(), ask.wait_ms), ask.header);
        Ok(Response::new(pb::RemoveMemoryResponse { revoked_mappings: 1 }))
    }
    async fn move_memory(
        &self,
        request: Request<pb::MoveMemoryRequest>,
    ) -> Result<Response<pb::MoveMemoryResponse>, Status> {
        let ask = request.into_inner();
        self.asked(format!("move {} to {} at {:#x}", ask.from_vm, ask.to_vm, ask.to_gpa), ask.header);
        Ok(Response::new(pb::MoveMemoryResponse { revoked_mappings: 2 }))
    }
    async fn declare_function(
        &self,
        request: Request<pb::DeclareFunctionRequest>,
    ) -> Result<Response<pb::DeclareFunctionResponse>, Status> {
        let ask = request.into_inner();
        let function: PciFunction = ask.function.expect("a function").try_into().expect("one that parses");
        self.asked(format!("declare {}: {function}", ask.name), ask.header);
        Ok(Response::new(pb::DeclareFunctionResponse {}))
    }
    async fn remove_function(
        &self,
        request: Request<pb::RemoveFunctionRequest>,
    ) -> Result<Response<pb::RemoveFunctionResponse>, Status> {
        self.asked("remove function".into(), request.into_inner().header);
        Ok(Response::new(pb::RemoveFunctionResponse {}))
    }
    async fn list_functions(
        &self,
        _: Request<pb::ListFunctionsRequest>,
    ) -> Result<Response<pb::ListFunctionsResponse>, Status> {
        let kind = FunctionKind::VirtualFunction { physical: device("00:08.0") };
        let state = pb::FunctionState {
            device: Some(device("00:08.1").into()),
            name: "vf1".into(),
            function: Some(PciFunction { kind, acs: true }.into()),
            group: Some(device("00:08.1").into()),
            owner: Some(Owner::Vm(1).into()),
            connected: false,
            assignment_generation: 5,
        };
        Ok(Response::new(pb::ListFunctionsResponse { functions: vec![state] }))
    }
    async fn assign_group(
        &self,
        request: Request<pb::AssignGroupRequest>,
    ) -> Result<Response<pb::AssignGroupResponse>, Status> {
        let ask = request.into_inner();
        self.asked(format!("assign to {}", ask.vm), ask.header);
        let functions = vec![device("00:08.0").into(), device("00:08.1").into()];
        Ok(Response::new(pb::AssignGroupResponse { functions }))
    }
    async fn release_group(
        &self,
        request: Request<pb::ReleaseGroupRequest>,
    ) -> Result<Response<pb::ReleaseGroupResponse>, Status> {
        self.asked("release".into(), request.into_inner().header);
        Ok(Response::new(pb::ReleaseGroupResponse { functions: vec![device("00:08.1").into()] }))
    }
    type ServeHypercallsStream = tokio_stream::Pending<Result<pb::ServeHypercallsResponse, Status>>;
    async fn serve_hypercalls(
        &self,
        _: Request<Streaming<pb::ServeHypercallsRequest>>,
    ) -> Result<Response<Self::ServeHypercallsStream>, Status> {
        Err(Status::unimplemented("not asked here"))
    }
}

macro_rules! only_declares {
    ($($method:ident: $request:ident => $response:ident;)*) => {
        #[tonic::async_trait]
        impl pb::admin_service_server::AdminService for Fake {
            async fn declare_device(
                &self,
                request: Request<pb::DeclareDeviceRequest>,
            ) -> Result<Response<pb::DeclareDeviceResponse>, Status> {
                let ask = request.into_inner();
                let function: PciFunction = ask.function.expect("a function").try_into().expect("one that parses");
                self.asked(format!("device {}: {function}", ask.name), None);
                Ok(Response::new(pb::DeclareDeviceResponse {}))
            }
            $(async fn $method(&self, _: Request<pb::$request>) -> Result<Response<pb::$response>, Status> {
                Err(Status::unimplemented("not asked here"))
            })*
        }
    };
}

only_declares! {
    remove_device: RemoveDeviceRequest => RemoveDeviceResponse;
    declare_driver: DeclareDriverRequest => DeclareDriverResponse;
    attach_to_owner: AttachToOwnerRequest => AttachToOwnerResponse;
    detach: DetachRequest => DetachResponse;
    quarantine: QuarantineRequest => QuarantineResponse;
    mmio_read: MmioReadRequest => MmioReadResponse;
    mmio_write: MmioWriteRequest => MmioWriteResponse;
}

#[tokio::test]
async fn machines_are_made_and_unmade_in_one_session_over_several_commands() {
    let run = Run::start();
    let out = run.done(&["vm", "create", "guest1", "--max-memory-bytes", "0x10000"]).await;
    assert!(out.contains("created vm:1; it goes 900ms after") && out.contains("vm keep"), "{out}");
    let value = run.json(&["vm", "create", "guest7", "--number", "7"]).await;
    assert_eq!((&value["vm"], &value["grace_ms"]), (&Value::from(7), &Value::from(900)));
    let out = run.done(&["vm", "add-memory", "vm:1", "0x100000", "0x4000"]).await;
    assert_eq!(out, "vm:1 has 16384 bytes at gpa:0x100000\n");
    let value = run.json(&["vm", "remove-memory", "1", "0x100000", "4096", "--how", "revoke"]).await;
    assert_eq!((&value["gpa"], &value["revoked_mappings"]), (&Value::from("0x100000"), &Value::from(1)));
    run.done(&["vm", "remove-memory", "1", "0x100000", "4096", "--how", "wait", "--wait-ms", "77"]).await;
    let out = run.done(&["vm", "move-memory", "1", "0x101000", "4096", "7", "0x5000"]).await;
    assert!(out.contains("to vm:7 gpa:0x5000, 2 mappings revoked"), "{out}");
    run.done(&["vm", "destroy", "vm:7"]).await;

    let script = run.script();
    let asked = [
        "create guest1 None Some(65536)",
        "create guest7 Some(7) None",
        "add 1 0x100000 16384",
        "remove 1 Revoke 0",
        "remove 1 Wait 77",
        "move 1 to 7 at 0x5000",
        "destroy 7",
    ];
    assert_eq!(script.asked, asked);
    let tokens: Vec<bool> = script.opens.iter().map(|open| open.resume_token.is_empty()).collect();
    assert_eq!(tokens, [true, false, false, false, false, false, false], "one session");
    assert!(script.opens.iter().all(|open| open.name == "hv0"));
    assert!(script.ids.is_sorted_by(|one, next| one < next), "no ID twice: {:?}", script.ids);
}

#[tokio::test]
async fn machines_and_functions_are_listed_for_people_and_for_programs() {
    let run = Run::start();
    run.done(&["vm", "create", "guest1", "--as", "hv0"]).await;
    let out = run.done(&["vm", "list"]).await;
    let line = out.lines().find(|line| line.contains("guest1")).expect("a line");
    for part in ["vm:1", "yes", "20480", "0x100000+0x4000 0x200000+0x1000", "0000:00:03.0"] {
        assert!(line.contains(part), "{part:?} is missing: {line}");
    }
    let value = run.json(&["vm", "list"]).await;
    assert_eq!((&value[0]["number"], &value[0]["memory"][1]["gpa"]), (&1.into(), &"0x200000".into()));

    let out = run.done(&["function", "list"]).await;
    let line = out.lines().find(|line| line.contains("vf1")).expect("a line");
    for part in ["0000:00:08.1", "virtual function of 0000:00:08.0, ACS", "vm:1", "no", "5"] {
        assert!(line.contains(part), "{part:?} is missing: {line}");
    }
    let value = run.json(&["function", "list"]).await;
    assert_eq!(value[0]["function"]["kind"], "virtual_function");
    assert_eq!((&value[0]["owner"], &value[0]["assignment_generation"]), (&"vm:1".into(), &5.into()));
}

#[tokio::test]
async fn functions_are_described_and_handed_out_and_devices_too() {
    let run = Run::start();
    run.done(&["function", "declare", "00:08.1", "--device-name", "vf1", "--virtual-function-of", "00:08.0"])
        .await;
    run.done(&["function", "declare", "00:01.0", "--device-name", "port", "--bridge", "02-0a", "--no-acs"])
        .await;
    let out = run.done(&["function", "assign", "00:08.1", "1"]).await;
    assert_eq!(out, "assigned 0000:00:08.0, 0000:00:08.1 to vm:1\n");
    assert_eq!(run.json(&["function", "release", "00:08.1"]).await["functions"][0], "0000:00:08.1");
    run.done(&["function", "remove", "00:08.1"]).await;
    run.done(&["device", "declare", "00:09.0", "--device-name", "net9"]).await;
    let value = run.json(&["device", "declare", "00:0a.0", "--device-name", "net10", "--no-acs"]).await;
    assert_eq!(value["function"], serde_json::json!({ "kind": "endpoint", "acs": false }));
    let asked = [
        "declare vf1: virtual function of 0000:00:08.0, ACS",
        "declare port: bridge to 02-0a, no ACS",
        "assign to 1",
        "release",
        "remove function",
        "device net9: endpoint, ACS",
        "device net10: endpoint, no ACS",
    ];
    assert_eq!(run.script().asked, asked);
}

#[tokio::test]
async fn a_command_takes_no_name_over_unless_it_makes_something() {
    let run = Run::start();
    for command in [["vm", "list"], ["vm", "destroy"], ["function", "list"]] {
        let arguments = if command[1] == "destroy" { vec!["vm", "destroy", "1"] } else { command.to_vec() };
        let (code, _, err) = run.run(&arguments).await;
        assert_eq!(code, Some(1), "{arguments:?}");
        assert!(err.contains("hv0 has no session in") && err.contains("`iommuctl vm create`"), "{err}");
    }
    assert!(run.script().opens.is_empty(), "opening afresh would have reclaimed what another process has");
    // A session that is over is told as such, until there is another.
    run.done(&["vm", "create", "guest1"]).await;
    run.script().forgets = true;
    let (code, _, err) = run.run(&["vm", "list"]).await;
    assert!(
        code == Some(1) && err.contains("the session of hv0 is over, and what it had is reclaimed"),
        "{err}"
    );
    run.done(&["vm", "create", "guest1"]).await;
    run.script().forgets = false;
    run.done(&["vm", "list"]).await;
}

#[tokio::test]
async fn a_session_outlives_commands_that_were_refused() {
    let run = Run::start();
    run.done(&["vm", "create", "guest1"]).await;
    let kept = std::fs::read_to_string(run.session_file()).expect("read");
    for (refusal, says) in [
        // Such as with the certificate of an operator.
        (
            IdentityRefused { name: "hv0".into(), why: "its certificate is for iommuctl".into() }
                .into_status(),
            "its certificate is for iommuctl",
        ),
        (ShuttingDown {}.into_status(), "shutting down"),
    ] {
        for command in [&["vm", "list"][..], &["vm", "create", "guest2"]] {
            run.script().refusals.push_back(refusal.clone());
            let (code, _, err) = run.run(command).await;
            assert!(code == Some(1) && err.contains(says) && !err.contains("is over"), "{command:?}: {err}");
            assert_eq!(std::fs::read_to_string(run.session_file()).expect("read"), kept);
        }
    }
    // Not even where the session is over: what is in the file goes when there is another.
    run.script().forgets = true;
    run.script()
        .refusals
        .extend([BadResumeToken { token: "01".into() }.into_status(), ShuttingDown {}.into_status()]);
    assert_eq!(run.run(&["vm", "create", "guest2"]).await.0, Some(1));
    assert_eq!(std::fs::read_to_string(run.session_file()).expect("read"), kept);
    run.script().forgets = false;
    run.done(&["vm", "list"]).await;
}

#[tokio::test]
async fn a_session_file_that_others_can_read_or_steer_is_refused() {
    use std::os::unix::fs::{PermissionsExt, symlink};

    let run = Run::start();
    run.done(&["vm", "create", "guest1"]).await;
    let file = run.session_file();
    let kept = std::fs::read_to_string(&file).expect("read");
    let mode = |mode| std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).expect("set");
    let refused = async |says: &str| {
        let opens = run.script().opens.len();
        let (code, _, err) = run.run(&["vm", "create", "guest2"]).await;
        assert!(code == Some(1) && err.contains(says), "{says}: {err}");
        assert_eq!(run.script().opens.len(), opens, "{says}: nothing was asked");
    };
    for open_to in [0o604, 0o640, 0o620] {
        mode(open_to);
        refused("chmod 600").await;
    }
    mode(0o600);
    let elsewhere = run.directory.path().join("elsewhere");
    std::fs::rename(&file, &elsewhere).expect("moved");
    symlink(&elsewhere, &file).expect("linked");
    refused("symbolic link").await;
    assert_eq!(std::fs::read_to_string(&elsewhere).expect("read"), kept);
}

#[tokio::test]
async fn a_session_is_kept_over_failures_that_pass() {
    let run = Run::start();
    let gone = Status::unavailable("the server is somewhere else");
    let trouble = async {
        // Once it keeps something.
        while run.script().opens.is_empty() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        run.script().refusals.extend([gone.clone(), gone]);
    };
    tokio::join!(run.done(&["vm", "keep", "--seconds", "1"]), trouble);
    assert!(run.script().refusals.is_empty());
    // What does not pass ends it.
    let refused = IdentityRefused { name: "hv0".into(), why: "not in the configuration".into() };
    run.script().refusals.push_back(refused.into_status());
    assert_eq!(run.run(&["vm", "keep", "--seconds", "1"]).await.0, Some(1));
}

#[tokio::test]
async fn a_session_file_is_secret_and_of_one_server_and_no_other_file_is_written_over() {
    use std::os::unix::fs::PermissionsExt;

    let run = Run::start();
    run.done(&["vm", "create", "guest1"]).await;
    let mode = std::fs::metadata(run.session_file()).expect("it is there").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let other = Run::start();
    let file = run.session_file();
    let path = file.to_str().expect("UTF-8");
    let (code, _, err) = other.run(&["vm", "create", "guest1", "--session", path]).await;
    assert!(code == Some(1) && err.contains("it is a session of hv0 with http://127.0.0.1"), "{err}");
    std::fs::write(&file, "my diary").expect("written");
    let (code, _, err) = run.run(&["vm", "create", "guest1"]).await;
    assert!(code == Some(1) && err.contains("it is no session"), "{err}");
    assert_eq!(std::fs::read_to_string(&file).expect("read"), "my diary");
}

#[tokio::test]
async fn a_session_file_whose_request_ids_are_used_up_is_told_as_such() {
    let run = Run::start();
    run.done(&["vm", "create", "guest1"]).await;
    let kept = std::fs::read_to_string(run.session_file()).expect("read");
    let mut value: Value = serde_json::from_str(&kept).expect("JSON");
    value["last_request_id"] = (u64::MAX - 15).into();
    std::fs::write(run.session_file(), value.to_string()).expect("written");
    let opens = run.script().opens.len();
    let (code, _, err) = run.run(&["vm", "list"]).await;
    assert!(code == Some(1) && err.contains("no request IDs are left") && !err.contains("panicked"), "{err}");
    assert_eq!(run.script().opens.len(), opens, "nothing was asked");
}

#[tokio::test]
async fn a_session_is_kept_by_coming_back_within_the_grace() {
    let run = Run::start();
    let out = run.done(&["vm", "keep", "--seconds", "1"]).await;
    assert!(out.contains("keeping the session of hv0"), "{out}");
    // The grace is 900 ms, so that it comes back several times.
    let opens = run.script().opens.len();
    assert!(opens >= 2, "it came back");
    assert!(run.script().opens[1..].iter().all(|open| !open.resume_token.is_empty()));
}

#[tokio::test]
async fn refusals_wrong_usage_and_an_absent_server_have_their_exit_codes() {
    let run = Run::start();
    run.done(&["vm", "create", "guest1"]).await;
    let (code, _, err) = run.run(&["vm", "remove-memory", "1", "0x1000", "4096"]).await;
    assert!(code == Some(1) && err.contains("gpa:0x1000 is still mapped"), "{err}");
    for wrong in [
        &["vm", "destroy", "driver:1"][..],
        &["vm", "create", "guest1", "--number", "0"],
        &["vm", "keep", "--seconds", "18446744073709551615"],
        &["vm", "remove-memory", "1", "0", "1", "--how", "perhaps"],
        &["vm", "remove-memory", "1", "0", "1", "--how", "wait", "--wait-ms", "30001"],
        &["function", "declare", "00:01.0", "--device-name", "x", "--bridge", "4-2"],
    ] {
        assert_eq!(run.run(wrong).await.0, Some(2), "{wrong:?}");
    }
    let directory = run.directory.path().join("absent");
    let absent = format!("unix://{}", directory.display());
    let environment = [("XDG_RUNTIME_DIR", run.directory.path().to_str().expect("UTF-8"))];
    let (code, ..) = support::run(&absent, &["vm", "create", "x", "--as", "hv1"], &environment).await;
    assert_eq!(code, Some(69));
    let (code, script, _) = run.run(&["completion", "bash"]).await;
    assert!(code == Some(0) && script.contains("remove-memory") && script.contains("--virtual-function-of"));
}
