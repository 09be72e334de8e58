//! Two tenants on one server. Each has a machine that works, with a `dma-engine` process and another device, and a machine that attacks, with a device
//! that keeps to no rule; each of them has a certificate of its own.

use guest_sdk::{
    AccessQuestion, Buffer, Direction, DmaMapping, FaultFilter, Hypervisor, TenantLimits, VmOptions,
};
use iommu_e2e::device::Device;
use iommu_e2e::guests::{Guest, declare, memory};
use iommu_e2e::raw::{Door, ask, open_request};
use iommu_e2e::stage::{Stage, soon};
use iommu_launch::{AgentOptions, Process};
use iommu_proto::pb;
use iommu_proto::pb::open_request::Role as WireRole;
use iommu_types::{Access, DeviceAddress, Identity, Iova, Outcome, Owner, PciFunction, Role};
use tonic::transport::Channel;

/// Memory of each machine that works.
const MEMORY_BYTES: u64 = 4 << 20;
/// Bytes of a canary.
const CANARY_BYTES: u64 = 8 * 4096;
/// Mappings that a spy may have.
pub(crate) const SPY_MAPPINGS: u64 = 8;

/// Memory that nobody may touch but who put it there.
#[derive(Debug)]
pub(crate) struct Canary {
    pub(crate) buffer: Buffer,
    content: Vec<u8>,
    /// It is mapped for the engine of its owner, all the time: a translation to it exists.
    pub(crate) mapping: DmaMapping,
}

impl Canary {
    async fn place(guest: &Guest, engine: DeviceAddress, tenant: usize) -> Self {
        let buffer = guest.driver.allocate(CANARY_BYTES).await.expect("memory");
        let content: Vec<u8> = (0..CANARY_BYTES).map(|at| (at % 249) as u8 ^ (0x35 << tenant)).collect();
        buffer.write(0, content.clone()).await.expect("a write");
        let handle = guest.driver.device(engine);
        let mapping = guest.driver.dma_map_single(&handle, buffer.range(), Direction::Bidirectional).await;
        Self { buffer, content, mapping: mapping.expect("a mapping") }
    }

    /// Where it was touched, if it was.
    pub(crate) async fn is_whole(&self) -> Result<(), u64> {
        let now = self.buffer.read(0, CANARY_BYTES).await.expect("a read");
        let touched = now.iter().zip(&self.content).position(|(now, then)| now != then);
        touched.map_or(Ok(()), |at| Err(at as u64))
    }
}

/// A machine that works.
pub(crate) struct Worker {
    pub(crate) guest: Guest,
    pub(crate) engine: DeviceAddress,
    pub(crate) port: DeviceAddress,
    pub(crate) port_agent: Device,
    _engine_agent: Process,
    pub(crate) canary: Canary,
    /// The canary, as the host sees it.
    pub(crate) canary_hpa: u64,
}

/// A machine that attacks: everything by hand.
pub(crate) struct Spy {
    pub(crate) vm: u32,
    pub(crate) door: Door,
    pub(crate) device: DeviceAddress,
    pub(crate) device_identity: Identity,
    pub(crate) driver_identity: Identity,
    /// With a driver's session.
    pub(crate) channel: Channel,
}

/// A tenant.
pub(crate) struct Tenant {
    pub(crate) worker: Worker,
    pub(crate) spy: Spy,
}

pub(crate) struct World {
    pub(crate) stage: Stage,
    /// Its machines go with it.
    _hypervisor: Hypervisor,
    pub(crate) tenants: [Tenant; 2],
    serving: tokio::task::JoinHandle<()>,
}

fn at(tenant: usize, number: usize) -> DeviceAddress {
    format!("00:{:02x}.0", 0x10 + 4 * tenant + number).parse().expect("an address")
}

async fn worker(stage: &mut Stage, hypervisor: &Hypervisor, tenant: usize) -> Worker {
    let guest = Guest::start(stage, hypervisor, &format!("worker{tenant}"), MEMORY_BYTES).await;
    let (engine, port) = (at(tenant, 0), at(tenant, 1));
    let (engine_name, port_name) = (format!("engine-of-{tenant}"), format!("port-of-{tenant}"));
    for (device, name) in [(engine, &engine_name), (port, &port_name)] {
        declare(hypervisor, device, name, PciFunction::ISOLATED).await;
        guest.vm.assign(device).await.expect("it is assigned");
    }
    let options = AgentOptions { name: engine_name, address: engine.to_string(), arguments: Vec::new() };
    let engine_agent = stage.server.start_dma_engine(&options).expect("the agent starts");
    let port_agent = Device::attach(&stage.server, stage.server.endpoint(), &port_name, port).await;
    soon("the engine is connected", async || stage.device_state_at(engine).await.connected.then_some(()))
        .await;
    let canary = Canary::place(&guest, engine, tenant).await;
    let iova = canary.mapping.iova();
    let question = AccessQuestion { device: engine, pasid: None, iova, access: Access::Write, size_bytes: 8 };
    let explained = stage.inspect().explain(question).await.expect("the observer sees it");
    let Outcome::Translated(translation) = explained.outcome else { panic!("{explained:?}") };
    let canary_hpa = translation.hpa.get();
    Worker { guest, engine, port, port_agent, _engine_agent: engine_agent, canary, canary_hpa }
}

async fn spy(stage: &Stage, hypervisor: &Hypervisor, tenant: usize) -> Spy {
    let name = format!("spy{tenant}");
    let limits = TenantLimits { mappings: Some(SPY_MAPPINGS), ..TenantLimits::default() };
    let vm = hypervisor.create_vm(VmOptions::new(&name).with_limits(limits)).await.expect("a machine");
    vm.add_memory(memory(0, 4 * 4096)).await.expect("memory");
    let (device, device_name) = (at(tenant, 2), format!("rogue-of-{tenant}"));
    declare(hypervisor, device, &device_name, PciFunction::ISOLATED).await;
    vm.assign(device).await.expect("it is assigned");
    let driver_identity = Identity { name: name.clone(), role: Role::Driver(vm.owner()) };
    let device_identity = Identity { name: device_name, role: Role::Device(device) };
    Door::to(&stage.server, &device_identity);
    let door = Door::to(&stage.server, &driver_identity);
    let channel = door.connect(&driver_identity).await;
    let role = WireRole::Driver(pb::DriverRole { owner: Some(vm.owner().into()) });
    let open = open_request(&name, role);
    let _: pb::OpenResponse =
        ask(&channel, "/iommu.v1.SessionService/Open", &open).await.expect("it is admitted");
    Spy { vm: vm.number(), door, device, device_identity, driver_identity, channel }
}

impl World {
    pub(crate) async fn begin() -> Self {
        let mut stage = Stage::start(&[]).await;
        let hypervisor = stage.hypervisor("hv0").await;
        let calls = hypervisor.serve_hypercalls().await.expect("it serves");
        let serving = tokio::spawn(async move {
            // The answer names who asked, as the server says it.
            let _ended = calls
                .serve(|vm, payload| async move {
                    Ok([&vm.to_le_bytes()[..], &payload[..payload.len().min(64)]].concat().into())
                })
                .await;
        });
        let workers = [worker(&mut stage, &hypervisor, 0).await, worker(&mut stage, &hypervisor, 1).await];
        let spies = [spy(&stage, &hypervisor, 0).await, spy(&stage, &hypervisor, 1).await];
        let [first, second] = workers;
        let [first_spy, second_spy] = spies;
        let tenants = [Tenant { worker: first, spy: first_spy }, Tenant { worker: second, spy: second_spy }];
        Self { stage, _hypervisor: hypervisor, tenants, serving }
    }

    /// Every canary as it was put there.
    pub(crate) async fn canaries_are_whole(&self) -> Result<(), String> {
        for (number, tenant) in self.tenants.iter().enumerate() {
            let whole = tenant.worker.canary.is_whole().await;
            whole.map_err(|at| format!("I2: the canary of tenant {number} was touched at byte {at}"))?;
        }
        Ok(())
    }

    /// Every log holds faults of its owner's own devices and no others.
    pub(crate) async fn logs_are_their_owners(&self) {
        for tenant in &self.tenants {
            let (worker, spy) = (&tenant.worker, &tenant.spy);
            let own = [worker.engine, worker.port];
            let all = FaultFilter { owner: None, device: None };
            let told = worker.guest.driver.faults().list(all, 0).await.expect("its own log");
            let foreign = told.records.iter().find(|record| !own.contains(&record.device));
            assert!(foreign.is_none(), "I6: {foreign:?} in the log of {}", worker.guest.driver.owner());
            let of_spy = FaultFilter { owner: Some(Owner::Vm(spy.vm)), device: None };
            let told = self.stage.observer.faults().list(of_spy, 0).await.expect("the observer sees it");
            assert!(!told.records.is_empty(), "its attacks left their marks");
            let foreign = told.records.iter().find(|record| record.device != spy.device);
            assert!(foreign.is_none(), "I6: {foreign:?} in the log of vm:{}", spy.vm);
        }
        let counters = self.stage.inspect().counters(None).await.expect("counters");
        let accounted = counters.faults_recorded
            + counters.faults_collapsed
            + counters.faults_overflowed
            + counters.faults_suppressed;
        assert_eq!(counters.faults, accounted, "I6: {counters:?}");
    }

    /// The addresses of a tenant's memory in every sense.
    pub(crate) fn addresses_of(&self, tenant: usize) -> Vec<Iova> {
        let worker = &self.tenants[tenant].worker;
        let canary = &worker.canary;
        let starts = [canary.mapping.iova().get(), canary.buffer.gpa().get(), worker.canary_hpa];
        starts.iter().flat_map(|start| (0..8).map(move |page| Iova::new(start + page * 4096))).collect()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.serving.abort();
    }
}
