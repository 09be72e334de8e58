//! A tenant's attacks, by hand: each comes to nothing, and its sender is told why.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use iommu_e2e::random::Random;
use iommu_e2e::raw::{ask, open_request, reason};
use iommu_e2e::raw_device::{
    MALFORMED, RawDevice, TRANSLATED_BLOCKED, WRITE_DENIED, hello_as, reads, writes,
};
use iommu_proto::pb;
use iommu_proto::pb::device_to_server::Message as Up;
use iommu_proto::pb::open_request::Role as WireRole;
use iommu_types::{DeviceAddress, Owner, Role};
use prost::Message;
use tokio::task::JoinSet;
use tonic::Status;

use super::plan::{Attack, History, STEPS_MIN};
use super::world::{SPY_MAPPINGS, Spy, Worker, World};
use iommu_e2e::guests::MEMORY;

/// Addresses in a scan.
const SCANNED: usize = 64;
/// Operations in a storm: the most that a batch may have.
const STORM: usize = 1024;

struct Attacker<'a> {
    world: &'a World,
    tenant: usize,
    spy: &'a Spy,
    /// Of the other tenant.
    other: &'a Worker,
    raw: RawDevice,
    request_id: u64,
}

/// Attacks until it is told to stop, and [`STEPS_MIN`] steps at least.
pub(crate) async fn attack(world: Arc<World>, tenant: usize, seed: u64, stop: Arc<AtomicBool>) {
    let spy = &world.tenants[tenant].spy;
    let other = &world.tenants[1 - tenant].worker;
    let raw = attach(spy).await;
    let mut attacker = Attacker { world: &world, tenant, spy, other, raw, request_id: 0 };
    let mut history = History::of(format!("attacks of tenant {tenant}"), seed);
    let mut step = 0;
    while step < STEPS_MIN || !stop.load(Ordering::SeqCst) {
        let what = Attack::of(seed, tenant as u64, step);
        history.begins(step, &what);
        attacker.does(what).await;
        step += 1;
    }
}

async fn attach(spy: &Spy) -> RawDevice {
    let own = &spy.device_identity;
    RawDevice::claim(&spy.door, own, (&own.name, spy.device)).await.expect("as itself it is admitted")
}

/// The typed reason of a refusal.
fn refused<T>(called: Result<T, Status>, what: &str, expected: &str) {
    let told = called.err().map(|status| reason(&status));
    assert_eq!(told.as_deref(), Some(expected), "{what}");
}

impl Attacker<'_> {
    async fn does(&mut self, what: Attack) {
        match what {
            Attack::Scan { at } => {
                let places = scan(at);
                self.comes_to_nothing(reads(&places, 8)).await;
                self.comes_to_nothing(writes(&places, &[0x66; 8])).await;
            }
            Attack::Storm { at } => {
                let places: Vec<u64> = (0..STORM as u64).map(|index| (at >> 20) + index * 64).collect();
                self.comes_to_nothing(writes(&places, &[0x66])).await;
            }
            Attack::OthersAddresses => {
                for tenant in [self.tenant, 1 - self.tenant] {
                    let places = self.world.addresses_of(tenant);
                    let places: Vec<u64> = places.iter().map(|iova| iova.get()).collect();
                    self.comes_to_nothing(writes(&places, &[0x66; 64])).await;
                    self.comes_to_nothing(reads(&places, 64)).await;
                }
            }
            Attack::Translated { address_type } => {
                let at = [self.other.canary_hpa, self.other.canary.mapping.iova().get(), MEMORY];
                let codes = self.comes_to_nothing(pb::DmaBatch { address_type, ..reads(&at, 8) }).await;
                assert_eq!(codes, [TRANSLATED_BLOCKED; 3]);
                let codes =
                    self.comes_to_nothing(pb::DmaBatch { address_type, ..writes(&at, &[0x66; 8]) }).await;
                assert_eq!(codes, [TRANSLATED_BLOCKED; 3]);
            }
            Attack::ForgedMsi { at } => {
                let remappable = |index: u64| 0xfee0_0000 | ((at >> (index % 8)) % 512 + index) << 5 | 1 << 4;
                let compatible = |index: u64| 0xfee0_0000 | index << 12;
                let places: Vec<u64> = (0..32).map(remappable).chain((0..32).map(compatible)).collect();
                let codes = self.comes_to_nothing(writes(&places, &[at as u8, 0, 0, 0])).await;
                assert!(codes.iter().all(|code| (0x20..=0x29).contains(code)), "{codes:x?}");
            }
            Attack::Malformed { kind } => self.malformed(kind).await,
            Attack::Broken { how } => self.broken(how).await,
            Attack::Stale => self.stale().await,
            Attack::OthersDevice => self.others_device().await,
            Attack::OthersSession => self.others_session().await,
            Attack::OthersThings => self.others_things().await,
            Attack::OverLimit => self.over_limit().await,
            Attack::Hypercalls { count } => self.hypercalls(count).await,
        }
    }

    async fn ask<A: Message + Default>(&self, method: &str, message: &impl Message) -> Result<A, Status> {
        ask(&self.spy.channel, &format!("/iommu.v1.{method}"), message).await
    }

    fn header(&mut self) -> Option<pb::RequestHeader> {
        self.request_id += 1;
        let acknowledged_through = self.request_id - 1;
        Some(pb::RequestHeader { request_id: self.request_id, acknowledged_through })
    }

    /// Every operation is refused, and not a byte is read or written. Gives the reasons.
    async fn comes_to_nothing(&mut self, batch: pb::DmaBatch) -> Vec<u32> {
        let operations = batch.iova.len();
        let answer = self.raw.batch(batch.clone()).await.expect("the session stands");
        assert_eq!(answer.fault_index.len(), operations, "one was let through: {batch:x?}, {answer:x?}");
        assert!(answer.payload.is_empty(), "bytes were read: {answer:x?}");
        assert!(answer.fault_done_bytes.iter().all(|done| *done == 0), "bytes were moved: {answer:x?}");
        answer.fault_reason
    }

    async fn malformed(&mut self, kind: u8) {
        let operand_bytes = match kind {
            3 | 4 => 8,
            5 => 16,
            _ => 0,
        };
        let batch = pb::DmaBatch {
            // An atomic that is not aligned, or an operation that does not exist.
            iova: vec![self.other.canary_hpa + 1],
            size_bytes: vec![8],
            kind: Bytes::copy_from_slice(&[kind]),
            payload: vec![0x66; operand_bytes].into(),
            ..pb::DmaBatch::default()
        };
        assert_eq!(self.comes_to_nothing(batch).await, [MALFORMED]);
    }

    /// A device that breaks the protocol loses its session, and may come back.
    async fn broken(&mut self, how: u8) {
        let good = writes(&[MEMORY, MEMORY + 64], &[0x66; 8]);
        let message = match how {
            0 => Up::Dma(pb::DmaBatch { size_bytes: vec![8; 3], ..good }),
            1 => Up::Dma(pb::DmaBatch { payload: Bytes::from_static(b"short"), ..good }),
            2 => Up::ResetDone(pb::ResetDone { tag: u64::MAX }),
            _ => hello_as(&self.spy.device_identity.name, self.spy.device),
        };
        self.raw.say(message).await;
        let ended = loop {
            match self.raw.hear().await {
                Ok(_) => {}
                Err(status) => break status,
            }
        };
        assert_eq!(reason(&ended), "PROTOCOL_VIOLATION", "{how}");
        self.raw = attach(self.spy).await;
    }

    async fn map(&mut self, device: DeviceAddress, gpa: u64) -> Result<u64, Status> {
        let request = pb::DmaMapRequest {
            header: self.header(),
            device: Some(device.into()),
            gpa,
            size_bytes: 4096,
            direction: pb::Direction::Bidirectional.into(),
            attributes: None,
            ring: 0,
        };
        let mapped: Result<pb::DmaMapResponse, Status> = self.ask("DriverService/DmaMap", &request).await;
        mapped.map(|mapped| mapped.iova)
    }

    async fn unmap(&mut self, device: DeviceAddress, iova: u64) -> Result<(), Status> {
        let request = pb::DmaUnmapRequest {
            header: self.header(),
            device: Some(device.into()),
            iova,
            size_bytes: 4096,
            direction: pb::Direction::Bidirectional.into(),
            attributes: None,
            end_of_burst: None,
        };
        self.ask::<pb::DmaUnmapResponse>("DriverService/DmaUnmap", &request).await.map(drop)
    }

    async fn stale(&mut self) {
        let iova = self.map(self.spy.device, MEMORY).await.expect("its own memory for its own device");
        let answer = self.raw.batch(writes(&[iova], &[0x11; 8])).await.expect("the session stands");
        assert!(answer.fault_index.is_empty(), "mapped: {answer:x?}");
        self.unmap(self.spy.device, iova).await.expect("an unmap");
        let codes = self.comes_to_nothing(writes(&[iova; 8], &[0x66; 8])).await;
        assert_eq!(codes, [WRITE_DENIED; 8]);
        let read = pb::MemoryReadRequest { owner: None, gpa: MEMORY, size_bytes: 8 };
        let now: pb::MemoryReadResponse =
            self.ask("MemoryService/Read", &read).await.expect("its own memory");
        assert_eq!(now.data[..], [0x11; 8], "I1: a stale write landed");
    }

    async fn others_device(&mut self) {
        let (other, own) = (self.other, &self.spy.device_identity);
        let name = format!("port-of-{}", 1 - self.tenant);
        for claimed in [(name.as_str(), other.port), (&own.name, other.port), (&name, self.spy.device)] {
            let admitted = RawDevice::claim(&self.spy.door, own, claimed).await;
            refused(admitted, "a stream as another's device", "IDENTITY_REFUSED");
        }
    }

    async fn others_session(&mut self) {
        let other = self.other.guest.driver.owner();
        let Role::Driver(own) = self.spy.driver_identity.role else { panic!("a driver") };
        let (own_name, other_name) = (self.spy.driver_identity.name.clone(), self.other.guest.name.clone());
        let driver = |owner: Owner| WireRole::Driver(pb::DriverRole { owner: Some(owner.into()) });
        let forged = Bytes::from(vec![0x66; 16]);
        let rows = [
            (other_name.clone(), driver(other), Bytes::new(), "IDENTITY_REFUSED"),
            (other_name, driver(other), forged.clone(), "IDENTITY_REFUSED"),
            (own_name.clone(), driver(other), Bytes::new(), "IDENTITY_REFUSED"),
            (own_name.clone(), WireRole::Hypervisor(pb::HypervisorRole {}), Bytes::new(), "IDENTITY_REFUSED"),
            (own_name.clone(), WireRole::Operator(pb::OperatorRole {}), Bytes::new(), "IDENTITY_REFUSED"),
            (own_name, driver(own), forged, "BAD_RESUME_TOKEN"),
        ];
        let channel = self.spy.door.connect(&self.spy.driver_identity).await;
        for (name, role, resume_token, expected) in rows {
            let open = pb::OpenRequest { resume_token, ..open_request(&name, role) };
            let opened = ask::<pb::OpenResponse>(&channel, "/iommu.v1.SessionService/Open", &open).await;
            refused(opened, &format!("a session with {open:?}"), expected);
        }
    }

    async fn others_things(&mut self) {
        let (owner, device) = (self.other.guest.driver.owner(), self.other.port);
        let (spied, iova) = (self.spy.device, self.other.canary.mapping.iova().get());
        refused(self.map(device, MEMORY).await, "a mapping for another's device", "NOT_YOURS");
        refused(self.unmap(self.other.engine, iova).await, "an unmap of the other's canary", "NOT_YOURS");
        for gpa in [self.other.canary_hpa & !0xfff, MEMORY + (1 << 20), 0xfee0_0000] {
            refused(self.map(spied, gpa).await, "a mapping of memory that it has not", "NOT_OWNED");
        }
        let read = pb::MemoryReadRequest { owner: Some(owner.into()), gpa: MEMORY, size_bytes: 8 };
        refused(self.ask::<pb::MemoryReadResponse>("MemoryService/Read", &read).await, "a read", "NOT_YOURS");
        let read = pb::MemoryReadRequest { owner: None, gpa: MEMORY + (1 << 20), size_bytes: 8 };
        refused(self.ask::<pb::MemoryReadResponse>("MemoryService/Read", &read).await, "a read", "NOT_OWNED");
        let write =
            pb::MemoryWriteRequest { owner: Some(owner.into()), gpa: MEMORY, data: vec![0x66; 8].into() };
        let wrote = self.ask::<pb::MemoryWriteResponse>("MemoryService/Write", &write).await;
        refused(wrote, "a write", "NOT_YOURS");
        let detach = pb::DetachDeviceRequest { header: self.header(), device: Some(device.into()) };
        let detached = self.ask::<pb::DetachDeviceResponse>("DriverService/DetachDevice", &detach).await;
        refused(detached, "a detach", "NOT_YOURS");
        let register = pb::MmioReadRequest { device: Some(device.into()), bar: 0, offset: 0, width_bytes: 4 };
        let value = self.ask::<pb::MmioReadResponse>("DriverService/MmioRead", &register).await;
        refused(value, "a register", "NOT_YOURS");
        let filter = pb::FaultFilter { owner: Some(owner.into()), device: None };
        let list = pb::ListFaultsRequest { filter: Some(filter), limit: 0 };
        let listed = self.ask::<pb::ListFaultsResponse>("FaultService/List", &list).await;
        refused(listed, "the other's faults", "NOT_YOURS");
        let destroy = pb::DestroyVmRequest { header: self.header(), vm: self.other.guest.vm.number() };
        let destroyed = self.ask::<pb::DestroyVmResponse>("HypervisorService/DestroyVm", &destroy).await;
        refused(destroyed, "the other's machine", "ROLE_REFUSED");
    }

    async fn over_limit(&mut self) {
        let mut mapped = Vec::new();
        let over = loop {
            match self.map(self.spy.device, MEMORY + 4096).await {
                Ok(iova) => mapped.push(iova),
                Err(status) => break status,
            }
        };
        assert_eq!(reason(&over), "LIMIT_REACHED");
        assert!(over.message().contains("mappings_per_owner"), "{over:?}");
        assert_eq!(mapped.len() as u64, SPY_MAPPINGS);
        for iova in mapped {
            self.unmap(self.spy.device, iova).await.expect("an unmap");
        }
    }

    async fn hypercalls(&mut self, count: usize) {
        let mut calls = JoinSet::new();
        for _ in 0..count {
            let channel = self.spy.channel.clone();
            calls.spawn(async move {
                let call = pb::HypercallRequest { payload: Bytes::from_static(b"flood") };
                ask::<pb::HypercallResponse>(&channel, "/iommu.v1.DriverService/Hypercall", &call).await
            });
        }
        while let Some(called) = calls.join_next().await {
            match called.expect("no panic") {
                Ok(answer) => assert_eq!(answer.payload[..4], self.spy.vm.to_le_bytes()),
                Err(status) => {
                    assert!(status.message().contains("hypercalls_per_vm"), "{status:?}");
                }
            }
        }
    }
}

/// Addresses of every size, those of the interrupt range and of the end among them.
fn scan(at: u64) -> Vec<u64> {
    let mut random = Random::of(at, &[]);
    let mut places = vec![0, MEMORY, 0xfee0_0000, 0xffff_ffff, 1 << 47, (1 << 48) - 8, 1 << 57, u64::MAX - 4];
    while places.len() < SCANNED {
        let bits = 12 + random.below(52);
        places.push(random.draw() >> (64 - bits));
    }
    places
}
