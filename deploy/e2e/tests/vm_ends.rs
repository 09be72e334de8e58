//! Virtual machines end under load: destroyed, or with their hypervisor killed, or with their guest killed. What stays is what must.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use device_runtime::{Dma, DmaError};
use guest_sdk::{Direction, DomainOptions, Driver, Protection, VmOptions};
use iommu_e2e::device::fault;
use iommu_e2e::guests::{Bystander, Guest, memory};
use iommu_e2e::stage::{Actor, Stage, address, eventually, soon, within};
use iommu_types::{DeviceAddress, FaultReason, Gpa, Identity, Iova, Owner, Role};
use serde_json::Value;
use tokio::task::JoinHandle;

const ACTOR: &str = env!("CARGO_BIN_EXE_e2e-driver");
/// The device that nobody owns in the built-in configuration, and its number there.
const FREE: u32 = 2;
const MEMORY_BYTES: u64 = 64 << 10;

/// A device that writes to a place until it is stopped, and may not land once it is told so.
struct Hammer {
    is_dead: Arc<AtomicBool>,
    landed: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    writing: JoinHandle<u64>,
}

impl Hammer {
    fn start(dma: &Dma, iova: Iova) -> Self {
        let (is_dead, landed, stop) =
            (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default(), Arc::<AtomicBool>::default());
        let (dma, dead, count, stopped) =
            (dma.clone(), Arc::clone(&is_dead), Arc::clone(&landed), Arc::clone(&stop));
        let writing = tokio::spawn(async move {
            let mut refused_dead = 0;
            while !stopped.load(Ordering::SeqCst) || refused_dead < 100 {
                let was_dead = dead.load(Ordering::SeqCst);
                match dma.write(iova, vec![0xee; 256]).await {
                    Ok(()) => {
                        assert!(!was_dead, "a write landed after the machine was gone");
                        count.fetch_add(1, Ordering::SeqCst);
                    }
                    Err(DmaError::Fault(_) | DmaError::Reset) => refused_dead += u64::from(was_dead),
                    Err(other) => panic!("{other}"),
                }
            }
            refused_dead
        });
        Self { is_dead, landed, stop, writing }
    }

    async fn lands(&self, least: u64) {
        soon("its writes land", async || (self.landed.load(Ordering::SeqCst) >= least).then_some(())).await;
    }

    /// Nothing lands from now on; it goes on for a while, and stops.
    async fn dies(self) {
        self.is_dead.store(true, Ordering::SeqCst);
        self.stop.store(true, Ordering::SeqCst);
        self.writing.await.expect("nothing landed");
    }
}

/// A driver that maps and unmaps until it is told that it is no more; gives what it is told.
fn mapping_until_the_end(driver: &Driver, device: DeviceAddress) -> JoinHandle<String> {
    let driver = driver.clone();
    tokio::spawn(async move {
        let handle = driver.device(device);
        let range = memory(4096, 8192);
        loop {
            let mapped = driver.dma_map_single(&handle, range, Direction::FromDevice).await;
            let ended = match mapped {
                Ok(mapping) => mapping.unmap().await.map_err(|error| error.to_string()),
                Err(error) => Err(error.to_string()),
            };
            if let Err(why) = ended {
                return why;
            }
        }
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i9_a_machine_destroyed_under_load_leaves_nothing_behind_and_reaches_nothing() {
    const ROUNDS: u32 = 15;
    within(60, async {
        let stage = Stage::start(&[]).await;
        let hypervisor = stage.hypervisor("hv0").await;
        let device = stage.device(FREE).await;
        let before = stage.holdings().await.at_rest();
        for round in 0..ROUNDS {
            // Its name and its number are those of the one before.
            let again = |vm: VmOptions| vm.with_number(1);
            let guest = Guest::start_with(&stage, &hypervisor, "short", MEMORY_BYTES, again).await;
            let all = guest.driver.memory().read(memory(0, 1).base(), MEMORY_BYTES).await.expect("a read");
            assert!(all.iter().all(|byte| *byte == 0), "round {round}: it has what the one before left");
            guest.vm.assign(address(FREE)).await.expect("it is assigned");
            let handle = guest.driver.device(address(FREE));
            let mapping = guest.driver.dma_map_single(&handle, memory(0, 4096), Direction::FromDevice).await;
            let iova = mapping.expect("a mapping").leave_mapped();
            let domain = guest.driver.create_domain(DomainOptions::new(Protection::DEFERRED)).await;
            let domain = domain.expect("a domain");
            let rw = iommu_types::Permissions::READ_WRITE;
            domain.map(Iova::new(0x7000), memory(0, 1).base(), 4096, rw).await.expect("a mapping");
            let hammer = Hammer::start(&device.dma, iova);
            let mapping = mapping_until_the_end(&guest.driver, address(FREE));
            hammer.lands(20).await;

            guest.vm.clone().destroy().await.expect("it is destroyed");
            hammer.dies().await;
            let told = tokio::time::timeout(Duration::from_secs(10), mapping).await.expect("it is told");
            let told = told.expect("the driver ends by being told");
            assert!(!told.contains("no answer within"), "round {round}: {told}");
            assert_eq!(stage.holdings().await.at_rest(), before, "round {round}: what is held");
            let refused = fault(device.dma.write(iova, vec![1]).await);
            assert_eq!(refused.reason, Ok(FaultReason::CONTEXT_NOT_PRESENT));
        }
    })
    .await;
}

/// A hypervisor, a guest and a device that are processes, all at work.
struct Processes {
    hypervisor: Actor,
    guest: Actor,
    _device: Actor,
    iova: Iova,
    gpa: Gpa,
}

fn number(told: &Value, field: &str) -> u64 {
    told[field].as_u64().unwrap_or_else(|| panic!("{field} is missing: {told}"))
}

impl Processes {
    async fn start(stage: &Stage) -> Self {
        let admit = |name: &str, role: Role| {
            let identity = Identity { name: name.to_owned(), role };
            stage.server.admit(&identity).expect("certificates can be issued");
        };
        admit("hv-process", Role::Hypervisor);
        let device = address(FREE).to_string();
        let mut hypervisor = stage.actor(ACTOR, &["hypervisor", "hv-process", "guest-process", &device]);
        let vm = number(&hypervisor.says().await, "vm");
        admit("guest-process", Role::Driver(Owner::Vm(u32::try_from(vm).expect("a number"))));
        let mut guest = stage.actor(ACTOR, &["guest", "guest-process", &vm.to_string(), &device]);
        let told = guest.says().await;
        let iova = Iova::new(number(&told, "iova"));
        let device = stage.actor(ACTOR, &["device", &FREE.to_string(), &iova.get().to_string(), "4096"]);
        soon("the device hammers", async || (stage.device_state(FREE).await.operations > 1000).then_some(()))
            .await;
        Self { hypervisor, guest, _device: device, iova, gpa: Gpa::new(number(&told, "gpa")) }
    }
}

/// The device goes on, and nothing of it lands any more.
async fn nothing_lands(stage: &Stage) {
    let before = stage.device_state(FREE).await;
    soon("it goes on", async || {
        let now = stage.device_state(FREE).await;
        (now.faults + now.refusals > before.faults + before.refusals + 1000).then_some(())
    })
    .await;
    assert_eq!(stage.device_state(FREE).await.operations, before.operations, "nothing of it lands");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i10_a_killed_hypervisor_takes_its_machines_along_and_no_others() {
    within(60, async {
        let stage = Stage::start(&["--grace", "1s"]).await;
        let other = stage.hypervisor("other").await;
        let neighbour = Guest::start(&stage, &other, "neighbour", MEMORY_BYTES).await;
        let at = "00:09.0".parse().expect("an address");
        let bystander = Bystander::start(&stage, &other, &neighbour, at).await;
        let mut processes = Processes::start(&stage).await;
        let its_vm = |owner: Owner| matches!(owner, Owner::Vm(_)) && owner != neighbour.driver.owner();

        processes.hypervisor.process.kill().await.expect("it is killed");
        eventually(Duration::from_secs(10), "its machine is gone", async || {
            let topology = stage.inspect().topology().await.expect("topology");
            topology.owners.iter().all(|owner| !its_vm(owner.owner)).then_some(())
        })
        .await;
        let state = stage.device_state(FREE).await;
        assert_eq!((state.owner, state.domain_id), (None, None), "its device is nobody's");
        let domains = stage.inspect().domains(None).await.expect("domains");
        assert!(domains.iter().all(|domain| !its_vm(domain.owner)), "{domains:?}");
        nothing_lands(&stage).await;
        assert!(bystander.stop().await > 10, "the machine of another hypervisor went on");

        // Its name, its machine's name and number, its memory and its device can be had again, and come with nothing in them.
        let again = stage.hypervisor("hv-process").await;
        assert!(again.vms().await.expect("its machines").is_empty());
        let guest = Guest::start(&stage, &again, "guest-process", MEMORY_BYTES).await;
        let all = guest.driver.memory().read(memory(0, 1).base(), MEMORY_BYTES).await.expect("a read");
        assert!(all.iter().all(|byte| *byte == 0), "it was wiped");
        guest.vm.assign(address(FREE)).await.expect("it is assigned");
        nothing_lands(&stage).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i10_a_killed_guest_leaves_its_memory_to_the_machine_and_its_devices_reset() {
    within(60, async {
        let stage = Stage::start(&["--grace", "1s"]).await;
        let mut processes = Processes::start(&stage).await;
        let owner = stage.device_state(FREE).await.owner.expect("the machine has it");
        let operator = stage.operator().await;
        let of_machine = async || {
            let topology = stage.inspect().topology().await.expect("topology");
            let found = topology.owners.into_iter().find(|state| state.owner == owner);
            found.expect("the machine is there")
        };
        let before = of_machine().await;
        assert!(before.mappings > 0 && before.memory_bytes > 0, "{before:?}");

        processes.guest.process.kill().await.expect("it is killed");
        eventually(Duration::from_secs(10), "its mappings are gone", async || {
            let now = of_machine().await;
            (now.mappings == 0 && now.domain_ids.len() == 1).then_some(())
        })
        .await;
        let now = of_machine().await;
        assert_eq!((now.memory_bytes, now.connected), (before.memory_bytes, false));
        let marker = operator.memory(owner).read(processes.gpa, 8).await.expect("a read");
        assert_eq!(marker[..], [0x5a; 8], "memory stays as it was, with the machine");
        let state = stage.device_state(FREE).await;
        assert_eq!(state.owner, Some(owner), "and so does the device");
        nothing_lands(&stage).await;

        // The guest is started anew and begins afresh in the same machine.
        let Owner::Vm(vm) = owner else { panic!("{owner} is a machine") };
        let driver = stage.guest("guest-process", vm).await;
        let handle = driver.device(address(FREE));
        // Of the size of what was mapped before, so that it has the same address: what was freed last is given first.
        let range = memory(4 * 4096, 4 * 4096);
        let mapping = driver.dma_map_single(&handle, range, Direction::Bidirectional).await;
        let before = stage.device_state(FREE).await.operations;
        assert_eq!(mapping.expect("a mapping").leave_mapped(), processes.iova);
        soon("the device, which goes on, reaches what is mapped now", async || {
            (stage.device_state(FREE).await.operations > before).then_some(())
        })
        .await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_that_is_created_and_destroyed_by_many_at_once_ends_whole_or_not_at_all() {
    const AT_ONCE: usize = 6;
    within(60, async {
        let stage = Stage::start(&[]).await;
        let hypervisor = stage.hypervisor("hv0").await;
        let before = stage.holdings().await.at_rest();
        let mut tasks = tokio::task::JoinSet::new();
        for index in 0..AT_ONCE {
            let hypervisor = hypervisor.clone();
            tasks.spawn(async move {
                for _ in 0..10 {
                    let vm =
                        hypervisor.create_vm(VmOptions::new(format!("vm-{index}"))).await.expect("a machine");
                    vm.add_memory(memory(0, MEMORY_BYTES)).await.expect("memory");
                    // Everybody wants the one device, and it is whoever's comes last.
                    let _either = vm.assign(address(FREE)).await;
                    vm.destroy().await.expect("it ends");
                }
            });
        }
        while let Some(ended) = tasks.join_next().await {
            ended.expect("nothing went wrong");
        }
        assert_eq!(stage.holdings().await.at_rest(), before);
        assert!(hypervisor.vms().await.expect("its machines").is_empty());
    })
    .await;
}
