//! Memory goes back and forth between two virtual machines while the devices of its owner write into it, in every mode: once it has changed
//! hands, nothing of the old owner's arrives (I9).

mod hammer;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use guest_sdk::errors::{DmaMapError, DmaUnmapError, TakeMemoryError};
use guest_sdk::{
    Direction, DmaMapping, Domain, DomainOptions, Driver, Hypervisor, Protection, Revocation, SdkError,
};
use hammer::{Aim, Hammer};
use iommu_e2e::device::Device;
use iommu_e2e::guests::{Bystander, Guest, declare, memory};
use iommu_e2e::random::{Random, seed};
use iommu_e2e::stage::{Stage, within};
use iommu_types::{DeviceAddress, GpaRange, PciFunction};
use tokio::task::JoinHandle;

/// How long memory goes back and forth; this variable, in seconds, says otherwise.
const SECONDS: &str = "IOMMU_MOVED_MEMORY_SECONDS";
const SECONDS_USUALLY: u64 = 8;
/// Rounds that are played at least, however slow the machine is.
const ROUNDS_MIN: u64 = 10;
/// Memory that stays with each machine.
const OWN_BYTES: u64 = 64 << 10;
/// Where the memory that moves is, in whoever has it.
const AREA: u64 = 0x10_0000;
const AREA_PAGES: u64 = 4;

/// How it changes hands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    /// The very frames, by force.
    Move,
    /// Taken and given, by force.
    RemoveAndAdd,
    /// As it is in use, not at once; then by force.
    RefuseThenMove,
    /// When its driver has unmapped it, on being asked.
    Wait,
}

/// What a round does: it follows from the seed and the number of the round.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Round {
    how: How,
    modes: [Protection; 2],
    /// The pages of the area that each device has mapped.
    pages: [Vec<u64>; 2],
}

impl Round {
    fn of(seed: u64, round: u64) -> Self {
        let mut random = Random::of(seed, &[round]);
        let how = random.one_of(&[How::Move, How::Move, How::RemoveAndAdd, How::RefuseThenMove, How::Wait]);
        let modes = [random.one_of(&Protection::ALL), random.one_of(&Protection::ALL)];
        let mut pages = || (0..2 + random.below(4)).map(|_| random.below(AREA_PAGES)).collect();
        Self { how, modes, pages: [pages(), pages()] }
    }
}

fn area() -> GpaRange {
    memory(AREA, AREA_PAGES * 4096)
}

fn page(number: u64) -> GpaRange {
    memory(AREA + number * 4096, 4096)
}

/// A device of one of the machines.
struct Worker {
    address: DeviceAddress,
    _agent: Device,
    hammer: Arc<Hammer>,
}

struct World {
    hypervisor: Hypervisor,
    guests: [Guest; 2],
    workers: [[Worker; 2]; 2],
    bystanders: [Bystander; 2],
    stage: Stage,
}

async fn worker(stage: &Stage, hypervisor: &Hypervisor, guest: &Guest, at: &str) -> Worker {
    let address: DeviceAddress = at.parse().expect("an address");
    let name = format!("worker-{}", at.replace([':', '.'], "-"));
    declare(hypervisor, address, &name, PciFunction::ISOLATED).await;
    guest.vm.assign(address).await.expect("it is assigned");
    let agent = Device::attach(&stage.server, stage.server.endpoint(), &name, address).await;
    let hammer = Arc::new(Hammer::start(&agent.dma));
    Worker { address, _agent: agent, hammer }
}

impl World {
    async fn begin() -> Self {
        let stage = Stage::start(&[]).await;
        let hypervisor = stage.hypervisor("hv0").await;
        let first = Guest::start(&stage, &hypervisor, "first", OWN_BYTES).await;
        let second = Guest::start(&stage, &hypervisor, "second", OWN_BYTES).await;
        first.vm.add_memory(area()).await.expect("memory");
        let workers = [
            [
                worker(&stage, &hypervisor, &first, "00:08.0").await,
                worker(&stage, &hypervisor, &first, "00:09.0").await,
            ],
            [
                worker(&stage, &hypervisor, &second, "00:0a.0").await,
                worker(&stage, &hypervisor, &second, "00:0b.0").await,
            ],
        ];
        let bystanders = [
            Bystander::start(&stage, &hypervisor, &first, "00:0c.0".parse().expect("an address")).await,
            Bystander::start(&stage, &hypervisor, &second, "00:0d.0".parse().expect("an address")).await,
        ];
        Self { hypervisor, guests: [first, second], workers, bystanders, stage }
    }

    /// Brings a device into a domain of this mode and opens pages of the area to it.
    async fn open(
        &self,
        tenant: usize,
        device: usize,
        round: &Round,
        pattern: u64,
    ) -> (Domain, Vec<DmaMapping>) {
        let (driver, worker) = (&self.guests[tenant].driver, &self.workers[tenant][device]);
        let options = DomainOptions::new(round.modes[device]);
        let domain = driver.create_domain(options).await.expect("a domain");
        let handle = driver.device(worker.address);
        domain.attach(&handle).await.expect("attached");
        let mut mappings = Vec::new();
        for number in &round.pages[device] {
            let mapping = driver.dma_map_single(&handle, page(*number), Direction::FromDevice).await;
            mappings.push(mapping.expect("a mapping"));
        }
        let iovas = mappings.iter().map(DmaMapping::iova).collect();
        worker.hammer.change(|aim| *aim = Aim { iovas, pattern, is_dead: false });
        worker.hammer.lands(32).await;
        (domain, mappings)
    }

    /// Takes a device out of its domain again.
    async fn close(&self, tenant: usize, device: usize, domain: Domain) {
        let worker = &self.workers[tenant][device];
        worker.hammer.rest().await;
        let handle = self.guests[tenant].driver.device(worker.address);
        handle.attach_default().await.expect("attached");
        domain.destroy().await.expect("nothing is attached to it");
    }

    /// Has the area change hands.
    async fn hand_over(&self, from: usize, round: &Round, mappings: Vec<DmaMapping>) {
        let (old, new) = (&self.guests[from].vm, &self.guests[1 - from].vm);
        let revoke = old.move_memory(area(), new, area().base(), Revocation::Revoke);
        match round.how {
            How::Move => assert!(revoke.await.expect("it moves") >= 1, "mappings were revoked"),
            How::RemoveAndAdd => {
                let removed = old.remove_memory(area(), Revocation::Revoke).await;
                assert!(removed.expect("it is taken") >= 1, "mappings were revoked");
                new.add_memory(area()).await.expect("it is given");
            }
            How::RefuseThenMove => {
                let refused = old.move_memory(area(), new, area().base(), Revocation::Refuse).await;
                let is_told = matches!(&refused, Err(SdkError::Refused(TakeMemoryError::StillMapped(_))));
                assert!(is_told, "STILL_MAPPED was expected: {refused:?}");
                for worker in &self.workers[from] {
                    worker.hammer.lands(32).await;
                }
                revoke.await.expect("it moves");
            }
            How::Wait => {
                let how = Revocation::Wait { wait_ms: 10_000 };
                let waiting = old.move_memory(area(), new, area().base(), how);
                let unmapping = async {
                    for mapping in mappings {
                        mapping.unmap().await.expect("an unmap");
                    }
                };
                let (moved, ()) = tokio::join!(waiting, unmapping);
                moved.expect("it moves once it is not in use");
                return;
            }
        }
        // They were revoked, and nothing is left to unmap.
        for mapping in mappings {
            let _revoked = mapping.leave_mapped();
        }
    }

    /// The area is the new owner's alone: zeroed, and what is written there stays.
    async fn stays(&self, tenant: usize, what: &str) {
        let memory = self.guests[tenant].driver.memory();
        let size_bytes = area().size_bytes();
        let came = memory.read(area().base(), size_bytes).await.expect("it is the new owner's");
        assert!(came.iter().all(|byte| *byte == 0), "I9, {what}: it was not wiped, or reached after that");
        let canary: Vec<u8> = (0..size_bytes).map(|at| (at % 251) as u8 ^ 0xa5).collect();
        memory.write(area().base(), canary.clone()).await.expect("a write");
        for worker in &self.workers[1 - tenant] {
            worker.hammer.attempts(32).await;
            let now = memory.read(area().base(), size_bytes).await.expect("a read");
            assert!(now[..] == canary[..], "I9, {what}: the old owner reached it");
        }
    }

    async fn round(&self, seed: u64, number: u64, round: &Round) {
        let from = usize::try_from(number % 2).expect("0 or 1");
        let pattern = 0xdead_0000_0000_0000 | (from as u64) << 32 | (number + 1);
        let (first, mut mappings) = self.open(from, 0, round, pattern).await;
        let (second, more) = self.open(from, 1, round, pattern).await;
        mappings.extend(more);
        let racer = Racer::start(self, from, Random::of(seed, &[number, 0xface]));
        self.hand_over(from, round, mappings).await;
        for (worker, mode) in self.workers[from].iter().zip(round.modes) {
            // A shadow stays open by design, and is not the memory.
            worker.hammer.change(|aim| aim.is_dead = !matches!(mode, Protection::Bounce(_)));
        }
        self.stays(1 - from, &format!("round {number}, {round:?}")).await;
        racer.await.expect("it was refused as it must be");
        self.close(from, 0, first).await;
        self.close(from, 1, second).await;
    }
}

/// Maps pages of the area while they are taken away.
struct Racer {
    driver: Driver,
    devices: [DeviceAddress; 2],
    hammers: [Arc<Hammer>; 2],
    random: Random,
    mapped: VecDeque<DmaMapping>,
}

/// Mappings that it has at once.
const RACING: usize = 3;

impl Racer {
    fn start(world: &World, tenant: usize, random: Random) -> JoinHandle<()> {
        let workers = &world.workers[tenant];
        let racer = Self {
            driver: world.guests[tenant].driver.clone(),
            devices: [workers[0].address, workers[1].address],
            hammers: [Arc::clone(&workers[0].hammer), Arc::clone(&workers[1].hammer)],
            random,
            mapped: VecDeque::new(),
        };
        tokio::spawn(racer.run())
    }

    /// Until the memory is not its machine's any more.
    async fn run(mut self) {
        loop {
            let which = usize::try_from(self.random.below(2)).expect("0 or 1");
            let handle = self.driver.device(self.devices[which]);
            let range = page(self.random.below(AREA_PAGES));
            match self.driver.dma_map_single(&handle, range, Direction::FromDevice).await {
                Ok(mapping) => {
                    self.hammers[which].change(|aim| aim.add(mapping.iova()));
                    self.mapped.push_back(mapping);
                }
                // Who waits for it to be unmapped is not kept waiting.
                Err(SdkError::Refused(DmaMapError::MemoryLeaving(_))) => self.unmap_down_to(0).await,
                Err(SdkError::Refused(DmaMapError::NotOwned(_))) => break,
                Err(other) => panic!("MEMORY_LEAVING or NOT_OWNED was expected: {other:?}"),
            }
            self.unmap_down_to(RACING).await;
        }
        for mapping in self.mapped {
            let _revoked = mapping.leave_mapped();
        }
    }

    async fn unmap_down_to(&mut self, count: usize) {
        while self.mapped.len() > count {
            let Some(mapping) = self.mapped.pop_front() else { return };
            match mapping.unmap().await {
                // Not there any more: it was revoked.
                Ok(()) | Err(SdkError::Refused(DmaUnmapError::NotMapped(_))) => {}
                Err(other) => panic!("an unmap, or NOT_MAPPED, was expected: {other:?}"),
            }
        }
    }
}

#[test]
fn rounds_follow_from_the_seed() {
    let rounds = |seed| (0..20).map(|round| Round::of(seed, round)).collect::<Vec<_>>();
    assert_eq!(rounds(1), rounds(1));
    assert_ne!(rounds(1), rounds(2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i9_memory_that_changed_hands_is_never_written_by_the_devices_of_its_old_owner() {
    let seed = seed("moved_memory");
    let seconds = std::env::var(SECONDS).ok().and_then(|text| text.parse().ok()).unwrap_or(SECONDS_USUALLY);
    within(60 + seconds, async {
        let world = World::begin().await;
        let started = Instant::now();
        let mut number = 0;
        while number < ROUNDS_MIN || started.elapsed() < Duration::from_secs(seconds) {
            let round = Round::of(seed, number);
            let done = tokio::time::timeout(Duration::from_secs(20), world.round(seed, number, &round)).await;
            done.unwrap_or_else(|_| panic!("seed {seed}, round {number} does not end: {round:?}"));
            number += 1;
        }
        for bystander in world.bystanders {
            assert!(bystander.stop().await > 10, "the load went on");
        }
        for worker in world.workers.iter().flatten() {
            let (landed, refused) = worker.hammer.stop();
            assert!(landed > 100 && refused > 100, "{landed} landed, {refused} refused");
        }
        let mine = world.hypervisor.vms().await.expect("its machines");
        let total: u64 = mine.iter().flat_map(|vm| &vm.memory).map(|region| region.size_bytes).sum();
        assert_eq!(total, 2 * OWN_BYTES + area().size_bytes(), "no page was lost");
        drop(world.stage);
    })
    .await;
}
