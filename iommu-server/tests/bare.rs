//! Bare machines over gRPC: bring-up as an operating system does it, and isolation from each other.

mod support;

use bytes::Bytes;
use iommu_proto::pb;
use iommu_proto::pb::bare_machine_service_client::BareMachineServiceClient;
use support::*;
use tonic::transport::Channel;

type Client = BareMachineServiceClient<Channel>;

const MEMORY: u64 = 8 << 20;
const ROOT: u64 = 0x10_0000;
const CONTEXT: u64 = 0x10_1000;
const TABLES: u64 = 0x10_2000; // levels 3, 2 and 1, one page each
const QUEUE: u64 = 0x10_8000;
const STATUS: u64 = 0x10_9000;
const FRAME: u64 = 0x20_0000;

// VT-d 5.10 §11.4.
const VER: u32 = 0x0;
const CAP: u32 = 0x8;
const ECAP: u32 = 0x10;
const GCMD: u32 = 0x18;
const GSTS: u32 = 0x1c;
const RTADDR: u32 = 0x20;
const FSTS: u32 = 0x34;
const FECTL: u32 = 0x38;
const FEDATA: u32 = 0x3c;
const FEADDR: u32 = 0x40;
const IQT: u32 = 0x88;
const IQA: u32 = 0x90;
const SRTP: u64 = 1 << 30;
const TE: u64 = 1 << 31;
const QIE: u64 = 1 << 26;

struct Machine {
    client: Client,
    segment: u32,
}

impl Machine {
    async fn create(client: &Client) -> Self {
        let request = pb::CreateMachineRequest {
            memory_bytes: MEMORY,
            capabilities: None,
            devices: vec![pb::MachineDevice { source_id: 0x08, name: "nic".to_owned() }],
        };
        let segment = client.clone().create(request).await.unwrap().into_inner().segment;
        Self { client: client.clone(), segment }
    }
    async fn read(&self, offset: u32, width_bytes: u32) -> u64 {
        let request = pb::ReadRegisterRequest { segment: self.segment, offset, width_bytes };
        self.client.clone().read_register(request).await.unwrap().into_inner().value
    }
    async fn write(&self, offset: u32, width_bytes: u32, value: u64) {
        let request = pb::WriteRegisterRequest { segment: self.segment, offset, width_bytes, value };
        self.client.clone().write_register(request).await.unwrap();
    }
    async fn command(&self, command: u64, status: u64) {
        self.write(GCMD, 4, command).await;
        eventually("the command is done", async || self.read(GSTS, 4).await & status != 0).await;
    }
    async fn store(&self, address: u64, words: &[u64]) {
        let data: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let data = Bytes::from(data);
        let request = pb::WriteMachineMemoryRequest { segment: self.segment, address, data };
        self.client.clone().write_memory(request).await.unwrap();
    }
    async fn load(&self, address: u64) -> u64 {
        let request = pb::ReadMachineMemoryRequest { segment: self.segment, address, size_bytes: 8 };
        let data = self.client.clone().read_memory(request).await.unwrap().into_inner().data;
        u64::from_le_bytes(data[..].try_into().unwrap())
    }
    /// 39-bit tables that map page 0x4000_0000 to FRAME, for 00:01.0.
    async fn tables(&self) {
        self.store(ROOT, &[CONTEXT | 1, 0]).await;
        self.store(CONTEXT + 0x08 * 16, &[TABLES | 1, 1 | 7 << 8]).await;
        self.store(TABLES + 8, &[(TABLES + 0x1000) | 3]).await;
        self.store(TABLES + 0x1000, &[(TABLES + 0x2000) | 3]).await;
        self.store(TABLES + 0x2000, &[FRAME | 3]).await;
    }
    async fn invalidate_everything(&self, slot: u64) {
        // IOTLB global, then a wait descriptor that writes a status.
        self.store(QUEUE + slot * 16, &[0x2 | 1 << 4, 0]).await;
        self.store(QUEUE + slot * 16 + 16, &[0x5 | 1 << 5 | (slot + 1) << 32, STATUS]).await;
        self.write(IQT, 8, (slot + 2) << 4).await;
        eventually("the wait descriptor completes", async || {
            self.load(STATUS).await & 0xffff_ffff == slot + 1
        })
        .await;
    }
    async fn agent(&self, server: &iommu_server::server::Server) -> Agent {
        let address = pb::DeviceAddress { segment: self.segment, source_id: 0x08 };
        Agent::attach_at(server, address, "nic").await
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_is_brought_up_through_its_registers() {
    let server = server().await;
    let client = bare(&server, "lab").await;
    let machine = Machine::create(&client).await;
    let mut agent = machine.agent(&server).await;
    assert_ne!(machine.read(VER, 4).await, 0);
    assert_ne!(machine.read(CAP, 8).await & machine.read(ECAP, 8).await, u64::MAX);
    machine.store(FRAME, &[0x1111]).await;
    // Translation is off: addresses are physical.
    assert_eq!(agent.read(FRAME, 8).await.unwrap()[..2], [0x11, 0x11]);
    machine.tables().await;
    machine.write(RTADDR, 8, ROOT).await;
    machine.command(SRTP, 1 << 30).await;
    machine.write(IQA, 8, QUEUE).await;
    machine.command(QIE, 1 << 26).await;
    machine.command(TE | QIE, TE).await;
    machine.invalidate_everything(0).await;
    assert_eq!(agent.read(0x4000_0000, 8).await.unwrap()[..2], [0x11, 0x11]);
    assert_eq!(agent.read(FRAME, 8).await, Err(0x6), "not mapped at its physical address");
    // A changed entry is seen only after an invalidation (the caches are real).
    machine.store(FRAME + PAGE, &[0x2222]).await;
    machine.store(TABLES + 0x2000, &[(FRAME + PAGE) | 3]).await;
    assert_eq!(agent.read(0x4000_0000, 8).await.unwrap()[..2], [0x11, 0x11]);
    machine.invalidate_everything(2).await;
    assert_eq!(agent.read(0x4000_0000, 8).await.unwrap()[..2], [0x22, 0x22]);
    // The refused read above is in the first fault recording register.
    assert_ne!(machine.read(FSTS, 4).await & 2, 0, "PPF");
    let recording = ((machine.read(CAP, 8).await >> 24) & 0x3ff) as u32 * 16;
    assert_eq!(machine.read(recording, 8).await, FRAME);
    assert_eq!(machine.read(recording + 8, 8).await & 0xffff, 0x08);
    let counters = pb::GetCountersRequest { segment: Some(machine.segment) };
    let observer = observer(&server).await;
    let counters = inspect(&observer).get_counters(counters).await.unwrap().into_inner();
    assert_eq!(counters.faults_recorded, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fault_event_reaches_the_creator() {
    let server = server().await;
    let client = bare(&server, "lab").await;
    let machine = Machine::create(&client).await;
    let mut agent = machine.agent(&server).await;
    let watch = pb::WatchMachineInterruptsRequest { segment: machine.segment };
    let mut watch = client.clone().watch_interrupts(watch).await.unwrap().into_inner();
    assert!(watch.message().await.unwrap().unwrap().interrupts.is_empty());
    machine.write(FEDATA, 4, 0x31).await;
    machine.write(FEADDR, 4, 0xfee0_1000).await;
    machine.write(FECTL, 4, 0).await;
    machine.store(ROOT, &[0, 0]).await;
    machine.write(RTADDR, 8, ROOT).await;
    machine.command(SRTP, 1 << 30).await;
    machine.command(TE, TE).await;
    assert_eq!(agent.read(0x1000, 8).await, Err(0x1));
    let told = watch.message().await.unwrap().unwrap().interrupts;
    let event = pb::EventMessage { address: 0xfee0_1000, data: 0x31 };
    assert_eq!(told[0].kind, Some(pb::machine_interrupt::Kind::Event(event)));
    // With remapping off a device's interrupt passes as it is: vector from the data, destination from the address.
    agent.write(0xfee0_5000, &0x44_u32.to_le_bytes()).await.unwrap();
    let told = watch.message().await.unwrap().unwrap().interrupts;
    let Some(pb::machine_interrupt::Kind::Device(interrupt)) = told[0].kind else { panic!("{told:?}") };
    assert_eq!((interrupt.vector, interrupt.destination), (0x44, 5));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn machines_are_their_creators_and_nobody_elses() {
    let server = server().await;
    let client = bare(&server, "lab").await;
    let stranger = bare(&server, "other").await;
    let machine = Machine::create(&client).await;
    let other = Machine::create(&stranger).await;
    assert_ne!(machine.segment, other.segment);
    let read = |segment| pb::ReadRegisterRequest { segment, offset: VER, width_bytes: 4 };
    assert_eq!(refused(stranger.clone().read_register(read(machine.segment)).await), "NOT_YOURS");
    assert_eq!(refused(client.clone().read_register(read(999)).await), "UNKNOWN_MACHINE");
    assert_eq!(refused(client.clone().read_register(read(0)).await), "UNKNOWN_MACHINE");
    let destroy = |segment| pb::DestroyMachineRequest { segment };
    assert_eq!(refused(stranger.clone().destroy(destroy(machine.segment)).await), "NOT_YOURS");
    let listed = client.clone().list(pb::ListMachinesRequest {}).await.unwrap().into_inner().machines;
    assert_eq!(listed.len(), 1);
    assert_eq!((listed[0].segment, listed[0].memory_bytes), (machine.segment, MEMORY));
    // The same physical address is another byte in each machine.
    machine.store(FRAME, &[1]).await;
    assert_eq!(other.load(FRAME).await, 0);
    let mut agent = machine.agent(&server).await;
    client.clone().destroy(destroy(machine.segment)).await.unwrap();
    assert_eq!(agent.ending().await, "UNKNOWN_DEVICE");
    assert_eq!(refused(client.clone().destroy(destroy(machine.segment)).await), "UNKNOWN_MACHINE");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_error_of_the_bare_service() {
    let server = server().await;
    let client = bare(&server, "lab").await;
    let machine = Machine::create(&client).await;
    let segment = machine.segment;
    let register = |offset, width_bytes| pb::ReadRegisterRequest { segment, offset, width_bytes };
    for (offset, width) in [(1, 4), (4, 8), (0x1000, 4), (0xffff_fffc, 4)] {
        let read = client.clone().read_register(register(offset, width)).await;
        assert_eq!(refused(read), "BAD_REGISTER_ACCESS", "{offset:#x}");
    }
    assert_eq!(refused(client.clone().read_register(register(0, 2)).await), "INVALID_FIELD");
    let memory = |address, size_bytes| pb::ReadMachineMemoryRequest { segment, address, size_bytes };
    assert_eq!(refused(client.clone().read_memory(memory(MEMORY - 4, 8)).await), "NO_MEMORY");
    assert_eq!(refused(client.clone().read_memory(memory(u64::MAX, 8)).await), "INVALID_RANGE");
    assert_eq!(refused(client.clone().read_memory(memory(0, 3 << 20)).await), "LIMIT_REACHED");
    let create = |memory_bytes, capabilities, devices| pb::CreateMachineRequest {
        memory_bytes,
        capabilities,
        devices,
    };
    let twice = vec![pb::MachineDevice { source_id: 1, name: "a".to_owned() }; 2];
    let nothing = Some(pb::Capabilities::default());
    assert_eq!(refused(client.clone().create(create(100, None, vec![])).await), "INVALID_FIELD");
    assert_eq!(refused(client.clone().create(create(1 << 40, None, vec![])).await), "LIMIT_REACHED");
    assert_eq!(refused(client.clone().create(create(MEMORY, nothing, vec![])).await), "BAD_CAPABILITIES");
    assert_eq!(refused(client.clone().create(create(MEMORY, None, twice)).await), "INVALID_FIELD");
    // i7: bounded per client.
    for _ in 1..iommu_server::bounds::MACHINES_PER_CLIENT_MAX {
        client.clone().create(create(MEMORY, None, vec![])).await.unwrap();
    }
    assert_eq!(refused(client.clone().create(create(MEMORY, None, vec![])).await), "LIMIT_REACHED");
    let mmio = |source_id| pb::MmioReadRequest {
        device: Some(pb::DeviceAddress { segment, source_id }),
        bar: 0,
        offset: 0,
        width_bytes: 4,
    };
    assert_eq!(refused(client.clone().mmio_read(mmio(8)).await), "DEVICE_ABSENT");
    assert_eq!(refused(client.clone().mmio_read(mmio(9)).await), "UNKNOWN_DEVICE");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_client_takes_its_machines_with_it_after_the_grace() {
    let server = server().await;
    let client = bare(&server, "lab").await;
    Machine::create(&client).await;
    assert_eq!(server.host.machines.count(), 1);
    drop(client);
    eventually("the machine is gone", async || server.host.machines.count() == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i7_machines_that_are_made_at_once_are_bounded_too() {
    let server = server().await;
    let client = bare(&server, "lab").await;
    let mut creating = tokio::task::JoinSet::new();
    for _ in 0..4 * iommu_server::bounds::MACHINES_PER_CLIENT_MAX {
        let mut client = client.clone();
        let request = pb::CreateMachineRequest { memory_bytes: MEMORY, capabilities: None, devices: vec![] };
        creating.spawn(async move { client.create(request).await.is_ok() });
    }
    let made = creating.join_all().await.into_iter().filter(|is_made| *is_made).count();
    assert_eq!(made, iommu_server::bounds::MACHINES_PER_CLIENT_MAX);
}
