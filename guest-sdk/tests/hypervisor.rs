//! A hypervisor against a scripted server: what is asked, typed errors, request IDs, hypercalls.

mod support;

use std::collections::HashMap;
use std::time::Duration;

use bytes::Bytes;
use guest_sdk::{
    Connection, DeviceAddress, FunctionKind, Gpa, GpaRange, Hypercalls, Hypervisor, Owner, PciFunction,
    Revocation, SdkError, TenantLimits, TransportError, VmOptions, errors,
};
use iommu_proto::errors::WireError;
use iommu_proto::pb;
use support::{Fake, soon};
use tonic::Status;

fn range(gpa: u64, size_bytes: u64) -> GpaRange {
    GpaRange::new(Gpa::new(gpa), size_bytes).expect("a range")
}

fn device(text: &str) -> DeviceAddress {
    text.parse().expect("an address")
}

fn call(tag: u64, vm: u32, payload: &'static str) -> Result<pb::ServeHypercallsResponse, Status> {
    Ok(pb::ServeHypercallsResponse { tag, vm, payload: Bytes::from_static(payload.as_bytes()) })
}

/// Waits for so many answers to hypercalls; by tag, with the reason where there is no payload.
async fn answers(fake: &Fake, count: usize) -> HashMap<u64, Result<Bytes, String>> {
    let there = async {
        while fake.state().hypercall_answers.len() < count {
            tokio::task::yield_now().await;
        }
    };
    soon("the answers", there).await;
    let answers = fake.state().hypercall_answers.clone();
    answers.into_iter().map(|answer| (answer.tag, answer.payload.ok_or(answer.refused))).collect()
}

#[tokio::test]
async fn a_machine_is_made_and_fed_and_unmade() {
    let fake = Fake::default();
    let hypervisor = fake.hypervisor().await;
    fake.answer("create_vm", pb::CreateVmResponse { number: 7 })
        .answer("create_vm", pb::CreateVmResponse { number: 8 })
        .answer("add_memory", pb::AddMemoryResponse {})
        .answer("remove_memory", pb::RemoveMemoryResponse { revoked_mappings: 3 })
        .answer("move_memory", pb::MoveMemoryResponse { revoked_mappings: 0 })
        .answer("destroy_vm", pb::DestroyVmResponse {});
    let limits = TenantLimits { domains: Some(2), ..TenantLimits::default() };
    let options = VmOptions::new("guest7").with_number(7).with_limits(limits);
    let vm = hypervisor.create_vm(options).await.expect("it is created");
    let other = hypervisor.create_vm(VmOptions::new("guest8")).await.expect("it is created");
    assert_eq!((vm.number(), vm.owner(), other.number()), (7, Owner::Vm(7), 8));
    vm.add_memory(range(0x10_0000, 0x4000)).await.expect("it is given");
    let wait = Revocation::Wait { wait_ms: 500 };
    assert_eq!(vm.remove_memory(range(0x10_0000, 0x1000), wait).await, Ok(3));
    let moved = vm.move_memory(range(0x10_1000, 0x1000), &other, Gpa::new(0x5000), Revocation::Refuse).await;
    assert_eq!(moved, Ok(0));
    vm.destroy().await.expect("it goes");

    let created: Vec<pb::CreateVmRequest> = fake.sent();
    assert_eq!((created[0].number, created[1].number, created[1].limits), (Some(7), None, None));
    assert_eq!(created[0].limits.map(|limits| (limits.domains, limits.mappings)), Some((Some(2), None)));
    let removed: Vec<pb::RemoveMemoryRequest> = fake.sent();
    assert_eq!((removed[0].how(), removed[0].wait_ms), (pb::Revocation::Wait, 500));
    let moved: Vec<pb::MoveMemoryRequest> = fake.sent();
    assert_eq!((moved[0].from_gpa, moved[0].to_vm, moved[0].to_gpa), (0x10_1000, 8, 0x5000));
    let ids: Vec<u64> = fake.state().calls.iter().map(|(_, id)| *id).collect();
    assert_eq!(ids, [1, 2, 3, 4, 5, 6], "one ID a request, in order");
}

#[tokio::test]
async fn functions_are_described_listed_and_handed_out_by_group() {
    let fake = Fake::default();
    let hypervisor = fake.hypervisor().await;
    let group: Vec<pb::DeviceAddress> = vec![device("00:08.0").into(), device("00:08.1").into()];
    let function =
        PciFunction { kind: FunctionKind::VirtualFunction { physical: device("00:08.0") }, acs: true };
    fake.answer("declare_function", pb::DeclareFunctionResponse {})
        .answer("assign_group", pb::AssignGroupResponse { functions: group.clone() })
        .answer("release_group", pb::ReleaseGroupResponse { functions: group })
        .answer("remove_function", pb::RemoveFunctionResponse {});
    let state = pb::FunctionState {
        device: Some(device("00:08.1").into()),
        name: "net-vf1".into(),
        function: Some(function.into()),
        group: Some(device("00:08.0").into()),
        owner: Some(Owner::Vm(7).into()),
        connected: true,
        assignment_generation: 2,
    };
    fake.answer("list_functions", pb::ListFunctionsResponse { functions: vec![state] });
    hypervisor.declare_function(device("00:08.1"), "net-vf1", function).await.expect("it is described");
    let both = [device("00:08.0"), device("00:08.1")];
    assert_eq!(hypervisor.vm(7).assign(device("00:08.1")).await.as_deref(), Ok(&both[..]));
    let listed = hypervisor.functions().await.expect("a list");
    assert_eq!(
        (listed[0].function, listed[0].group, listed[0].owner),
        (function, both[0], Some(Owner::Vm(7)))
    );
    assert_eq!(hypervisor.release(device("00:08.1")).await.as_deref(), Ok(&both[..]));
    hypervisor.remove_function(device("00:08.1")).await.expect("it is forgotten");
}

#[tokio::test]
async fn refusals_are_the_enums_of_their_operations() {
    let fake = Fake::default();
    let hypervisor = fake.hypervisor().await;
    let vm = hypervisor.vm(7);
    let unknown = errors::UnknownOwner { owner: Owner::Vm(7) };
    let mapped = errors::StillMapped { gpa: Gpa::new(0x1000) };
    let overlaps = errors::MemoryOverlaps { gpa: Gpa::new(0x1000) };
    let in_use = errors::GroupInUse { device: device("00:08.0"), owner: Owner::Driver(1) };
    let taken = errors::InvalidField { field: "name".into(), why: "is taken".into() };
    fake.refuse("create_vm", taken.clone())
        .refuse("add_memory", overlaps.clone())
        .refuse("remove_memory", mapped.clone())
        .refuse("move_memory", overlaps.clone())
        .refuse("assign_group", in_use.clone())
        .refuse("destroy_vm", unknown.clone());
    let created = hypervisor.create_vm(VmOptions::new("guest7")).await;
    assert_eq!(created.map(|vm| vm.number()), Err(SdkError::Refused(taken.into())));
    assert_eq!(vm.add_memory(range(0x1000, 0x1000)).await, Err(SdkError::Refused(overlaps.clone().into())));
    let removed = vm.remove_memory(range(0x1000, 0x1000), Revocation::Refuse).await;
    assert_eq!(removed, Err(SdkError::Refused(mapped.into())));
    let moved = vm.move_memory(range(0x1000, 0x1000), &vm, Gpa::new(0x1000), Revocation::Revoke).await;
    assert_eq!(moved, Err(SdkError::Refused(overlaps.into())));
    assert_eq!(vm.assign(device("00:08.1")).await, Err(SdkError::Refused(in_use.into())));
    assert_eq!(vm.destroy().await, Err(SdkError::Refused(unknown.into())));
}

#[tokio::test]
async fn a_lost_connection_comes_back_with_the_token_and_the_same_request_id() {
    let fake = Fake::default();
    let hypervisor = fake.hypervisor().await;
    fake.fail("create_vm", Status::unavailable("the connection is lost"))
        .answer("create_vm", pb::CreateVmResponse { number: 1 });
    soon("the machine", hypervisor.create_vm(VmOptions::new("guest1"))).await.expect("it is created");
    assert_eq!(fake.calls("create_vm"), [1, 1]);
    let tokens: Vec<Vec<u8>> = fake.state().opens.iter().map(|open| open.resume_token.to_vec()).collect();
    assert_eq!(tokens, [vec![], vec![1; 16]]);
}

#[tokio::test]
async fn a_saved_session_goes_on_counting_and_a_forgotten_one_says_so() {
    let fake = Fake::default();
    let endpoint = fake.start().await;
    let first = Connection::to(&endpoint).hypervisor("hv0").await.expect("a session");
    fake.answer("create_vm", pb::CreateVmResponse { number: 1 })
        .answer("create_vm", pb::CreateVmResponse { number: 2 });
    first.create_vm(VmOptions::new("guest1")).await.expect("it is created");
    let saved = first.save().await;
    assert!(!format!("{saved:?}").contains("resume_token"), "the token is secret");
    drop(first);
    let second = Connection::to(&endpoint).resume_hypervisor("hv0", &saved).await.expect("it goes on");
    second.create_vm(VmOptions::new("guest2")).await.expect("it is created");
    assert_eq!((fake.calls("create_vm"), fake.state().acknowledged.clone()), (vec![1, 2], vec![0, 1]));
    assert_eq!(fake.state().opens[1].resume_token, vec![1; 16]);

    // Whether the server refuses the token or opens another session.
    let unknown = errors::BadResumeToken { token: "01010101...".into() };
    fake.state().open_refusals.push_back(unknown.into_status());
    for _ in 0..2 {
        let lost = Connection::to(&endpoint).resume_hypervisor("hv0", &saved).await.map(|_: Hypervisor| ());
        assert_eq!(lost, Err(SdkError::Transport(TransportError::StateLost)));
        fake.state().forgets_state = true;
    }
}

#[tokio::test]
async fn a_call_that_waits_for_a_driver_may_take_as_long_as_it_said() {
    let fake = Fake::default();
    let connection = Connection::to(fake.start().await).deadline(Duration::from_millis(100));
    let hypervisor = connection.hypervisor("hv0").await.expect("a session");
    // Each attempt is lost and made again, well past the deadline of other calls.
    for _ in 0..6 {
        fake.fail("remove_memory", Status::unavailable("the connection is lost"));
    }
    fake.answer("remove_memory", pb::RemoveMemoryResponse { revoked_mappings: 0 });
    let wait = Revocation::Wait { wait_ms: 20_000 };
    assert_eq!(hypervisor.vm(1).remove_memory(range(0, 4096), wait).await, Ok(0));
}

#[tokio::test]
async fn hypercalls_are_answered_in_any_order_refused_and_never_left_alone() {
    let fake = Fake::default();
    let hypervisor = fake.hypervisor().await;
    fake.state().hypercalls =
        [vec![call(5, 1, "a"), call(6, 2, "b"), call(7, 1, "c"), call(8, 1, "d")]].into();
    let mut calls = hypervisor.serve_hypercalls().await.expect("it serves");
    let mut taken = Vec::new();
    for _ in 0..4 {
        taken.push(soon("a call", calls.next()).await.expect("not ended").expect("a call"));
    }
    assert_eq!((taken[1].vm(), taken[1].owner(), &taken[1].payload()[..]), (2, Owner::Vm(2), &b"b"[..]));
    taken.pop().expect("the fourth").refuse("ä".repeat(200));
    taken.pop().expect("the third").answer("to c").expect("short enough");
    assert!(taken.pop().expect("the second").answer(vec![0; 4097]).is_err(), "4096 bytes at most");
    drop(taken);
    let answers = answers(&fake, 4).await;
    assert_eq!(answers[&7], Ok(Bytes::from_static(b"to c")));
    assert_eq!(answers[&5], Err("the hypervisor dropped the call".to_owned()));
    assert_eq!(answers[&6], Err("the answer of the hypervisor is too long".to_owned()));
    assert_eq!(answers[&8], Err("ä".repeat(128)));
}

#[tokio::test]
async fn hypercalls_are_served_by_a_closure_until_another_takes_over() {
    let fake = Fake::default();
    let hypervisor = fake.hypervisor().await;
    let fenced = errors::SessionFenced { by_generation: 2 };
    let lost = Err(Status::unavailable("the connection is lost"));
    fake.state().hypercalls = [vec![call(1, 1, "one"), lost], vec![call(2, 1, "two")]].into();
    let calls = hypervisor.serve_hypercalls().await.expect("it serves");
    let serving = tokio::spawn(calls.serve(|vm, payload| async move {
        if payload == "one" { Err("no".to_owned()) } else { Ok(format!("{vm}: {payload:?}").into()) }
    }));
    let given = async {
        while !fake.state().hypercall_answers.iter().any(|answer| answer.tag == 2) {
            tokio::task::yield_now().await;
        }
    };
    soon("the call of the second stream", given).await;
    serving.abort();
    let second = fake.state().hypercall_answers.iter().find(|answer| answer.tag == 2).cloned();
    assert_eq!(second.and_then(|answer| answer.payload), Some(Bytes::from_static(b"1: b\"two\"")));

    fake.state().hypercalls = [vec![Err(fenced.clone().into_status())]].into();
    let calls = hypervisor.serve_hypercalls().await.expect("it serves");
    let ended = soon("the end", calls.serve(|_, _| async { Ok(Bytes::new()) })).await;
    assert_eq!(ended, SdkError::Call(fenced.into()));
}

#[tokio::test]
async fn i7_no_more_hypercalls_are_out_than_the_limit() {
    let fake = Fake::default();
    let hypervisor = fake.hypervisor().await;
    let limit = Hypercalls::IN_FLIGHT_MAX;
    fake.state().hypercalls = [(1..=limit as u64 + 1).map(|tag| call(tag, 1, "x")).collect()].into();
    let mut calls = hypervisor.serve_hypercalls().await.expect("it serves");
    let mut taken = Vec::new();
    for _ in 0..limit {
        taken.push(soon("a call", calls.next()).await.expect("not ended").expect("a call"));
    }
    let none = tokio::time::timeout(Duration::from_millis(50), calls.next()).await;
    assert!(none.is_err(), "the next one waits for an answer");
    taken.pop().expect("one").answer("").expect("short enough");
    soon("the next call", calls.next()).await.expect("not ended").expect("a call").refuse("enough");
}
