//! Virtual machines: their memory, their devices, and what is left of them.

mod support;

use iommu_proto::pb;
use iommu_server::server::Server;
use pb::Revocation::{Refuse, Revoke, Wait};
use support::{
    Agent, Down, Driver, ENGINE0, ENGINE2, Hypervisor, PAGE, Up, deferred, device, eventually, mode, reason,
    refused, server, vm_owner, write_batch,
};

/// Stale generation.
const STALE: u32 = 0x1001;
/// The context entry is not present.
const NO_CONTEXT: u32 = 0x02;
/// The tables give no write permission.
const NOT_MAPPED: u32 = 0x05;

const AT: u64 = 0x10_0000;

/// A hypervisor with two virtual machines, a and b, of 16 pages each at the same address.
struct World {
    server: Server,
    hypervisor: Hypervisor,
    a: Driver,
    b: Driver,
}

impl World {
    async fn new() -> Self {
        let server = server().await;
        let hypervisor = Hypervisor::open(&server, "hv0").await;
        for (number, name) in [(1, "a"), (2, "b")] {
            assert_eq!(hypervisor.create(name, None).await.unwrap(), number);
            hypervisor.add(number, AT, 16).await.unwrap();
        }
        let (a, b) = (hypervisor.guest(&server, 1, "a").await, hypervisor.guest(&server, 2, "b").await);
        Self { server, hypervisor, a, b }
    }
}

#[tokio::test]
async fn i2_a_guest_maps_its_own_memory_by_guest_address_and_nothing_else() {
    let world = World::new().await;
    let mut agent = Agent::attach(&world.server, ENGINE2).await;
    let assigning = {
        let assigning = world.hypervisor.assign(ENGINE2, 1);
        let answering = async {
            let Down::Reset(reset) = agent.receive().await.unwrap() else { panic!("no reset") };
            agent.send(Up::ResetDone(pb::ResetDone { tag: reset.tag })).await;
        };
        tokio::join!(assigning, answering).0
    };
    assert_eq!(assigning.unwrap(), [device(ENGINE2)]);
    let iova = world.a.map(ENGINE2, AT, PAGE).await.unwrap();
    agent.write(iova, b"from the device").await.unwrap();
    assert_eq!(&world.a.read(AT, 15).await[..], b"from the device");
    assert_eq!(
        &world.b.read(AT, 15).await[..],
        [0; 15],
        "the other guest has the same address and other memory"
    );
    // Across its end, beside it, and the other's device.
    for gpa in [AT + 15 * PAGE, AT - PAGE, 0, u64::MAX - 2 * PAGE] {
        assert_eq!(refused(world.a.map(ENGINE2, gpa, 2 * PAGE).await), "NOT_OWNED", "{gpa:#x}");
    }
    assert_eq!(refused(world.b.map(ENGINE2, AT, PAGE).await), "NOT_YOURS");
    let request = pb::AllocateBufferRequest { header: world.a.header(), size_bytes: 1 };
    assert_eq!(refused(world.a.client().allocate_buffer(request).await), "NOT_A_HOST_DRIVER");
}

#[tokio::test]
async fn a_hypervisor_moves_its_own_virtual_machines_only() {
    let world = World::new().await;
    let other = Hypervisor::open(&world.server, "hv1").await;
    assert_eq!(refused(other.create("a", None).await), "INVALID_FIELD", "the name is taken");
    assert_eq!(refused(other.create("c", Some(1)).await), "INVALID_FIELD", "the number is taken");
    assert_eq!(other.create("c", None).await.unwrap(), 3);
    // Numbers that are asked for, given or not, do not bring back those that were given before.
    other.destroy(3).await.unwrap();
    assert_eq!(other.create("d", Some(3)).await.unwrap(), 3);
    other.destroy(3).await.unwrap();
    assert_eq!(refused(other.create("c", Some(1)).await), "INVALID_FIELD", "the number is taken");
    assert_eq!(other.create("c", None).await.unwrap(), 4);
    assert_eq!(refused(other.add(1, 0, 1).await), "NOT_YOURS");
    assert_eq!(refused(other.remove(1, AT, 1, Revoke).await), "NOT_YOURS");
    assert_eq!(refused(other.hand_over(1, 4, AT, 1).await), "NOT_YOURS");
    assert_eq!(refused(world.hypervisor.hand_over(1, 4, AT, 1).await), "NOT_YOURS");
    assert_eq!(refused(other.assign(ENGINE2, 1).await), "NOT_YOURS");
    assert_eq!(refused(other.destroy(1).await), "NOT_YOURS");
    assert_eq!(refused(other.destroy(9).await), "UNKNOWN_OWNER");
    assert_eq!(refused(other.read(1, AT, 8).await), "NOT_YOURS");
    assert!(world.hypervisor.read(1, AT, 8).await.is_ok());
    assert_eq!(
        refused(world.hypervisor.assign(ENGINE0, 1).await),
        "NOT_YOURS",
        "a driver of the host has it"
    );
    world.hypervisor.assign(ENGINE2, 1).await.unwrap();
    assert_eq!(refused(other.assign(ENGINE2, 4).await), "NOT_YOURS");
    assert_eq!(refused(other.release(ENGINE2).await), "NOT_YOURS");
    let seen: Vec<u32> = other.vms().await.iter().map(|vm| vm.number).collect();
    assert_eq!(seen, [4]);
}

#[tokio::test]
async fn i9_memory_in_use_is_refused_waited_for_or_revoked_as_asked_in_every_mode() {
    let world = World::new().await;
    world.hypervisor.assign(ENGINE2, 1).await.unwrap();
    let mut agent = Agent::attach(&world.server, ENGINE2).await;
    let modes = [
        mode(pb::Protection::Strict),
        deferred(1000, 10_000),
        mode(pb::Protection::Shared),
        mode(pb::Protection::Persistent),
        mode(pb::Protection::Bounce),
        mode(pb::Protection::Ring),
        mode(pb::Protection::Passthrough),
    ];
    for options in modes {
        let name = format!("{:?}", options.protection());
        let has_shadow = options.protection() == pb::Protection::Bounce;
        let domain = world.a.create_domain(options).await.unwrap();
        world.a.attach(ENGINE2, Some(domain)).await.unwrap();
        let iova = world.a.map(ENGINE2, AT + PAGE, PAGE).await.unwrap();
        agent.write(iova, &[1; 64]).await.unwrap_or_else(|code| panic!("{name}: refused with {code:#x}"));
        assert_eq!(refused(world.hypervisor.remove(1, AT + PAGE, 1, Refuse).await), "STILL_MAPPED", "{name}");
        agent.write(iova, &[2; 64]).await.unwrap_or_else(|code| panic!("{name}: refused with {code:#x}"));
        let unmap = async {
            eventually(&name, async || {
                // It is leaving: nothing new is mapped there while the hypervisor waits.
                let again = world.a.map(ENGINE2, AT + PAGE, PAGE).await;
                if let Ok(iova) = again {
                    world.a.unmap(ENGINE2, iova, PAGE).await.unwrap();
                    return false;
                }
                reason(&again.unwrap_err()) == "MEMORY_LEAVING"
            })
            .await;
            world.a.unmap(ENGINE2, iova, PAGE).await.unwrap();
        };
        let (waited, ()) = tokio::join!(world.hypervisor.remove(1, AT + PAGE, 1, Wait), unmap);
        waited.unwrap_or_else(|status| panic!("{name}: {status:?}"));
        assert_eq!(refused(world.a.map(ENGINE2, AT + PAGE, PAGE).await), "NOT_OWNED", "{name}");
        let is_reached = agent.write(iova, &[3; 64]).await.is_ok();
        assert_eq!(is_reached, has_shadow, "{name}: a shadow stays open by design, and is not the memory");
        world.hypervisor.add(1, AT + PAGE, 1).await.unwrap();
        assert_eq!(&world.a.read(AT + PAGE, 64).await[..], [0; 64], "{name}: what comes is zeroed");

        let iova = world.a.map(ENGINE2, AT + PAGE, PAGE).await.unwrap();
        agent.write(iova, &[4; 64]).await.unwrap();
        let before = world.b.read(AT + PAGE, 64).await;
        assert_eq!(&before[..], [0; 64], "{name}");
        world.hypervisor.remove(2, AT + PAGE, 1, Refuse).await.unwrap();
        let revoked = world.hypervisor.hand_over(1, 2, AT + PAGE, 1).await;
        assert!(revoked.unwrap_or_else(|status| panic!("{name}: {status:?}")) >= 1, "{name}");
        let is_reached = agent.write(iova, &[5; 64]).await.is_ok();
        assert_eq!(is_reached, has_shadow, "{name}: a cached translation was used");
        assert_eq!(&world.b.read(AT + PAGE, 64).await[..], [0; 64], "{name}: not wiped, or reached");
        world.hypervisor.add(1, AT + PAGE, 1).await.unwrap();
        world.a.detach(ENGINE2).await.unwrap();
        world.a.destroy(domain).await.unwrap();
    }
}

#[tokio::test]
async fn a_move_that_is_refused_changes_nothing() {
    let world = World::new().await;
    world.a.write(AT, b"here").await;
    assert_eq!(refused(world.hypervisor.hand_over(1, 2, AT, 1).await), "MEMORY_OVERLAPS");
    assert_eq!(refused(world.hypervisor.hand_over(1, 1, AT, 1).await), "INVALID_FIELD");
    assert_eq!(refused(world.hypervisor.hand_over(1, 2, AT + 16 * PAGE, 1).await), "NOT_OWNED");
    assert_eq!(&world.a.read(AT, 4).await[..], b"here");
    let memory = world.hypervisor.vms().await[0].memory.clone();
    assert_eq!(memory.iter().map(|region| region.size_bytes).sum::<u64>(), 16 * PAGE);
}

#[tokio::test]
async fn what_was_queued_before_a_device_changed_hands_is_refused_as_stale() {
    let world = World::new().await;
    world.hypervisor.assign(ENGINE2, 1).await.unwrap();
    let mut agent = Agent::silent(&world.server).await;
    let welcome = agent.greet(support::hello(device(ENGINE2), "engine2")).await.unwrap();
    let first = welcome.assignment_generation;
    let iova = world.a.map(ENGINE2, AT, PAGE).await.unwrap();
    let mut queued = write_batch(iova, &[0xaa; 64]);
    queued.assignment_generation = Some(first);
    assert_eq!(agent.batch(queued.clone()).await.fault_reason, [] as [u32; 0]);

    // The group moves; the rogue does not say that it was reset. What it sends is refused, whatever generation it claims.
    let moved = {
        let moving = world.hypervisor.assign(ENGINE2, 2);
        let sending = async {
            let Down::Reset(reset) = agent.receive().await.unwrap() else { panic!("no reset") };
            for claimed in [None, Some(first), Some(reset.assignment_generation), Some(u64::MAX)] {
                queued.assignment_generation = claimed;
                agent.send(Up::Dma(queued.clone())).await;
                let Down::Dma(answer) = agent.receive().await.unwrap() else { panic!("no completions") };
                assert!(
                    [[STALE], [NO_CONTEXT]].iter().any(|refused| answer.fault_reason == *refused),
                    "{claimed:?}: {:x?}",
                    answer.fault_reason
                );
            }
            agent.send(Up::ResetDone(pb::ResetDone { tag: reset.tag })).await;
            // Nobody's for a moment, then b's: a second reset may come, or not.
            reset.assignment_generation
        };
        let (moved, generation) = tokio::join!(moving, sending);
        moved.unwrap();
        generation
    };
    assert!(moved > first);
    let target = world.b.map(ENGINE2, AT, PAGE).await.unwrap();
    for (claimed, expected) in [(Some(first), STALE), (Some(u64::MAX), STALE)] {
        let mut late = write_batch(target, &[0xbb; 64]);
        late.assignment_generation = claimed;
        assert_eq!(agent.batch(late).await.fault_reason, [expected], "{claimed:?}");
    }
    assert_eq!(&world.b.read(AT, 64).await[..], [0; 64]);
    // The old address means nothing in the new owner's domain, or the new owner's memory by its own will.
    agent.write(target, &[0xcc; 8]).await.unwrap();
    assert_eq!(&world.b.read(AT, 8).await[..], [0xcc; 8]);
    world.b.unmap(ENGINE2, target, PAGE).await.unwrap();
    assert_eq!(agent.write(target, &[0xdd; 8]).await, Err(NOT_MAPPED));
}

#[tokio::test]
async fn a_destroyed_virtual_machine_leaves_nothing_and_its_number_is_free() {
    let world = World::new().await;
    world.hypervisor.assign(ENGINE2, 1).await.unwrap();
    let mut agent = Agent::attach(&world.server, ENGINE2).await;
    let iova = world.a.map(ENGINE2, AT, PAGE).await.unwrap();
    world.a.write(AT, b"secret").await;
    agent.write(iova, &[1; 8]).await.unwrap();
    let free_before = world.server.host.kernel.free_bytes();
    let destroying = {
        let destroying = world.hypervisor.destroy(1);
        let answering = async {
            while let Ok(message) = agent.receive().await {
                let Down::Reset(reset) = message else { panic!("no reset") };
                agent.send(Up::ResetDone(pb::ResetDone { tag: reset.tag })).await;
                if world.hypervisor.functions().await[0].owner.is_none() {
                    break;
                }
            }
        };
        tokio::select! {
            destroyed = destroying => destroyed,
            () = answering => panic!("the agent was not asked"),
        }
    };
    destroying.unwrap();
    assert!(agent.write(iova, &[2; 8]).await.is_err());
    assert_eq!(refused(world.a.map(ENGINE2, AT, PAGE).await), "SESSION_FENCED");
    assert!(world.server.host.kernel.free_bytes() >= free_before + 16 * PAGE);
    assert_eq!(world.hypervisor.create("again", Some(1)).await.unwrap(), 1);
    world.hypervisor.add(1, AT, 16).await.unwrap();
    let again = world.hypervisor.guest(&world.server, 1, "again").await;
    assert_eq!(&again.read(AT, 8).await[..], [0; 8]);
    let faults = support::faults(&again.channel).list(pb::ListFaultsRequest::default()).await.unwrap();
    assert_eq!(faults.into_inner().records, [], "nothing of the one that had the number before");
}

#[tokio::test]
async fn a_hypervisor_that_is_gone_takes_its_virtual_machines_along() {
    let world = World::new().await;
    drop(world.hypervisor.channel.clone());
    let World { server, hypervisor, a, .. } = world;
    drop(hypervisor);
    eventually("the virtual machines are gone", async || {
        server.host.topology.read().owner("vm:1".parse().unwrap()).is_err()
    })
    .await;
    assert_eq!(refused(a.map(ENGINE2, AT, PAGE).await), "SESSION_FENCED");
}

#[tokio::test]
async fn i7_limits_of_a_virtual_machine_refuse_by_name_and_are_told() {
    let server = server().await;
    let hypervisor = Hypervisor::open(&server, "hv0").await;
    let limits = |limits| Some(limits);
    let too_many = pb::TenantLimits { domains: Some(u32::MAX), ..Default::default() };
    assert_eq!(refused(hypervisor.create_with("x", None, limits(too_many)).await), "INVALID_FIELD");
    let nothing = pb::TenantLimits { requests_per_second: Some(0), ..Default::default() };
    assert_eq!(refused(hypervisor.create_with("x", None, limits(nothing)).await), "INVALID_FIELD");
    let small = pb::TenantLimits {
        domains: Some(1),
        memory_bytes: Some(4 * PAGE),
        dma_operations_per_second: Some(1000),
        requests_per_second: Some(20),
        ..Default::default()
    };
    let vm = hypervisor.create_with("small", None, limits(small)).await.unwrap();
    hypervisor.add(vm, AT, 4).await.unwrap();
    assert_eq!(refused(hypervisor.add(vm, 0, 1).await), "LIMIT_REACHED");
    let guest = hypervisor.guest(&server, vm, "small").await;
    guest.create_domain(mode(pb::Protection::Strict)).await.unwrap();
    let over = guest.create_domain(mode(pb::Protection::Strict)).await.unwrap_err();
    assert!(over.message().contains("domains_per_owner") && over.message().contains('1'), "{over:?}");
    let mut refusals = 0;
    for _ in 0..60 {
        if let Err(status) = guest.client().list_memory(pb::ListMemoryRequest {}).await {
            assert!(status.message().contains("requests_per_second of 20"), "{status:?}");
            refusals += 1;
        }
    }
    assert!(refusals > 10, "a flood of requests is refused: {refusals}");
    let request = pb::ListLimitsRequest { owner: Some(vm_owner(vm)) };
    let told = support::inspect(&hypervisor.channel).list_limits(request).await.unwrap().into_inner();
    let limit = |name: &str| told.owners[0].limits.iter().find(|limit| limit.limit == name).unwrap().clone();
    assert_eq!(
        (limit("memory_bytes_per_owner").used, limit("memory_bytes_per_owner").refused_count),
        (4 * PAGE, 1)
    );
    assert!(limit("requests_per_second").refused_count >= refusals);
}

#[tokio::test]
async fn i7_a_watch_on_a_number_ends_with_the_machine_and_shows_nothing_of_the_next() {
    let server = server().await;
    let (a, b) = (Hypervisor::open(&server, "a").await, Hypervisor::open(&server, "b").await);
    a.create("first", Some(7)).await.unwrap();
    let filter = Some(pb::FaultFilter { owner: Some(vm_owner(7)), device: None });
    let watch = pb::WatchFaultsRequest { filter, resume_token: String::new() };
    let mut watching = support::faults(&a.channel).watch(watch).await.unwrap().into_inner();
    watching.message().await.unwrap().expect("it stands");
    a.destroy(7).await.unwrap();
    b.create("second", Some(7)).await.unwrap();
    b.assign(ENGINE2, 7).await.unwrap();
    let mut agent = Agent::attach(&server, ENGINE2).await;
    assert_eq!(agent.write(0x0dea_d000, &[0; 4]).await, Err(NOT_MAPPED));
    let list = pb::ListFaultsRequest { filter, limit: 0 };
    eventually("its own hypervisor sees the fault", async || {
        let listed = support::faults(&b.channel).list(list).await.unwrap().into_inner();
        !listed.records.is_empty()
    })
    .await;
    let shown = tokio::time::timeout(std::time::Duration::from_millis(300), watching.message()).await;
    assert!(shown.is_err(), "{shown:?}");
    assert_eq!(refused(support::faults(&a.channel).list(list).await), "NOT_YOURS");
}

#[tokio::test]
async fn memory_is_cut_out_of_a_direct_map_in_one_piece() {
    let world = World::new().await;
    world.hypervisor.assign(ENGINE2, 1).await.unwrap();
    let mut agent = Agent::attach(&world.server, ENGINE2).await;
    let domain = world.a.create_domain(mode(pb::Protection::Passthrough)).await.unwrap();
    world.a.attach(ENGINE2, Some(domain)).await.unwrap();
    agent.write(AT + PAGE, &[1; 8]).await.unwrap();
    assert_eq!(world.hypervisor.remove(1, AT + PAGE, 1, Revoke).await.unwrap(), 1);
    assert_eq!(agent.write(AT + PAGE, &[2; 8]).await, Err(NOT_MAPPED));
    for open in [AT, AT + 2 * PAGE, AT + 15 * PAGE] {
        agent.write(open, &[3; 8]).await.unwrap();
    }
}

fn bridge(secondary_bus: u32, subordinate_bus: u32, acs: bool) -> pb::PciFunction {
    let bridge = pb::Bridge { secondary_bus, subordinate_bus };
    pb::PciFunction { kind: Some(pb::pci_function::Kind::Bridge(bridge)), acs }
}
fn endpoint(acs: bool) -> pb::PciFunction {
    pb::PciFunction { kind: Some(pb::pci_function::Kind::Endpoint(pb::Endpoint {})), acs }
}

#[tokio::test]
async fn a_group_moves_as_a_whole_and_nobody_gets_a_part_or_a_bridge() {
    let world = World::new().await;
    let (port, one, two, other) = (0x00e0, 0x0100, 0x0108, 0x0200);
    world.hypervisor.declare(port, "port", bridge(1, 1, false)).await.unwrap();
    world.hypervisor.declare(one, "one", endpoint(true)).await.unwrap();
    world.hypervisor.declare(two, "two", endpoint(true)).await.unwrap();
    world.hypervisor.declare(other, "other", endpoint(true)).await.unwrap();
    assert_eq!(world.hypervisor.assign(one, 1).await.unwrap(), [device(one), device(two)]);
    assert_eq!(refused(world.hypervisor.assign(port, 1).await), "NOT_ASSIGNABLE");
    let operator = support::operator(&world.server).await;
    let attach = |source, owner| {
        let request =
            pb::AttachToOwnerRequest { device: Some(device(source)), owner: Some(owner), domain_id: None };
        let mut admin = support::admin(&operator);
        async move { admin.attach_to_owner(request).await }
    };
    // Twice: the first refusal leaves nothing half done.
    for _ in 0..2 {
        assert_eq!(refused(attach(port, vm_owner(1)).await), "NOT_ASSIGNABLE");
        assert_eq!(refused(attach(two, vm_owner(2)).await), "GROUP_IN_USE");
    }
    attach(other, vm_owner(2)).await.unwrap();
    assert_eq!(world.hypervisor.assign(two, 2).await.unwrap(), [device(one), device(two)], "the group moves");
    // What a machine has already stays in the domain that its driver chose.
    let chosen = world.b.create_domain(mode(pb::Protection::Strict)).await.unwrap();
    world.b.attach(one, Some(chosen)).await.unwrap();
    assert_eq!(world.hypervisor.assign(two, 2).await.unwrap(), [device(one), device(two)], "once more");
    assert_eq!(support::device_state(&operator, one).await.domain_id, Some(chosen));
    // And what its driver detached is attached again.
    world.b.detach(one).await.unwrap();
    assert_eq!(support::device_state(&operator, one).await.domain_id, None);
    assert_eq!(world.hypervisor.assign(two, 2).await.unwrap(), [device(one), device(two)], "and again");
    let domain_id = support::device_state(&operator, one).await.domain_id;
    assert!(domain_id.is_some_and(|id| id != chosen), "its default domain: {domain_id:?}");
    let owners: Vec<_> =
        world.hypervisor.functions().await.into_iter().map(|function| function.owner).collect();
    assert_eq!(owners.iter().filter(|owner| **owner == Some(vm_owner(2))).count(), 3, "{owners:?}");
    // Another hypervisor cannot spoil the groups of this one, nor lean on its functions.
    let spoiler = Hypervisor::open(&world.server, "spoiler").await;
    assert_eq!(refused(spoiler.declare(0x00e8, "wide", bridge(2, 9, false)).await), "INVALID_FIELD");
    let of_other = pb::VirtualFunction { physical: Some(device(other)) };
    let kind = Some(pb::pci_function::Kind::VirtualFunction(of_other));
    let function = pb::PciFunction { kind, acs: true };
    assert_eq!(refused(spoiler.declare(0x0201, "vf", function).await), "INVALID_FIELD");
    // What a hypervisor declared goes with it, bridges too.
    let World { server, hypervisor, .. } = world;
    drop(hypervisor);
    eventually("its functions are forgotten", async || {
        server.host.topology.read().devices().all(|entry| entry.declared_by.is_none())
    })
    .await;
}
