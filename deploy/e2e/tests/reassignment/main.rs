//! A busy device changes hands a hundred times: what it had queued for one owner never arrives at the next, however late and under whatever
//! claim it is sent.

mod busy;

use busy::{Aim, Busy, OnReset};
use guest_sdk::{Buffer, Direction, Hypervisor};
use iommu_e2e::guests::{Bystander, Guest, declare};
use iommu_e2e::raw_device::STALE;
use iommu_e2e::stage::{SOON, Stage, within};
use iommu_types::{DeviceAddress, FunctionKind, PciFunction};

/// Memory of each machine.
const MEMORY_BYTES: u64 = 64 << 10;

fn address(text: &str) -> DeviceAddress {
    text.parse().expect("an address")
}

/// Words that name tenant and round.
fn pattern(tenant: usize, round: u64) -> u64 {
    0x00c0_ffee_0000_0000 | (tenant as u64) << 24 | round
}

/// Two machines, and the functions of one group that go from one to the other.
struct World {
    stage: Stage,
    hypervisor: Hypervisor,
    guests: [Guest; 2],
    devices: Vec<Busy>,
    /// A page of each machine for each device.
    pages: [Vec<Buffer>; 2],
    /// Where the devices wrote in the round before.
    before: Vec<u64>,
    /// Rounds in which the new owner's memory was where the old owner's had been, for the devices.
    same_place: u64,
}

impl World {
    async fn begin(functions: &[&str], on_reset: OnReset) -> Self {
        let stage = Stage::start(&[]).await;
        let hypervisor = stage.hypervisor("hv0").await;
        let guests = [
            Guest::start(&stage, &hypervisor, "first", MEMORY_BYTES).await,
            Guest::start(&stage, &hypervisor, "second", MEMORY_BYTES).await,
        ];
        let acs = functions.len() == 1;
        for (index, function) in functions.iter().enumerate() {
            let described = PciFunction { kind: FunctionKind::Endpoint, acs };
            declare(&hypervisor, address(function), &format!("busy{index}"), described).await;
        }
        let group = guests[0].vm.assign(address(functions[0])).await.expect("it is assigned");
        assert_eq!(group.len(), functions.len(), "without ACS they are one group: {group:?}");
        let mut devices = Vec::new();
        for (index, device) in group.iter().enumerate() {
            devices.push(Busy::start(&stage, &format!("busy{index}"), *device, on_reset).await);
        }
        let mut pages = [Vec::new(), Vec::new()];
        for (guest, pages) in guests.iter().zip(&mut pages) {
            for _ in &devices {
                pages.push(guest.driver.allocate(4096).await.expect("memory"));
            }
        }
        let before = vec![0; devices.len()];
        Self { stage, hypervisor, guests, devices, pages, before, same_place: 0 }
    }

    /// Opens a zeroed page of this tenant to each device. Gives where.
    async fn open(&mut self, tenant: usize) -> Vec<u64> {
        let mut opened = Vec::new();
        for (index, device) in self.devices.iter().enumerate() {
            let (driver, page) = (&self.guests[tenant].driver, &self.pages[tenant][index]);
            page.write(0, vec![0; 4096]).await.expect("a write");
            let handle = driver.device(device.address);
            let mapping = driver.dma_map_single(&handle, page.range(), Direction::FromDevice).await;
            // It goes with the device.
            let iova = mapping.expect("a mapping").leave_mapped().get();
            self.same_place += u64::from(self.before[index] == iova);
            self.before[index] = iova;
            opened.push(iova);
        }
        opened
    }

    async fn words(&self, tenant: usize, index: usize) -> Vec<u64> {
        let bytes = self.pages[tenant][index].read(0, 4096).await.expect("a read");
        bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("eight"))).collect()
    }

    /// This tenant's pages hold what was written for it in this round, or nothing yet. The words, to compare later.
    async fn holds_its_own(&self, tenant: usize, round: u64) -> Vec<Vec<u64>> {
        let mut all = Vec::new();
        for index in 0..self.devices.len() {
            let words = self.words(tenant, index).await;
            let own = pattern(tenant, round);
            let foreign = words.iter().find(|word| **word != 0 && **word != own);
            assert!(foreign.is_none(), "I9, round {round}: {foreign:x?} in the memory of tenant {tenant}");
            all.push(words);
        }
        all
    }

    /// The devices are this tenant's: they write into its memory, and nothing else is there.
    async fn use_by(&mut self, tenant: usize, round: u64) {
        let opened = self.open(tenant).await;
        // What is late has had its time to come before anything that is meant to.
        for (index, words) in self.holds_its_own(tenant, round).await.iter().enumerate() {
            assert!(words.iter().all(|word| *word == 0), "round {round}: device {index} was too late");
        }
        for (device, iova) in self.devices.iter().zip(opened) {
            device.aim(Aim { iova, pattern: pattern(tenant, round) });
        }
        for device in &self.devices {
            device.has_landed(32).await;
        }
        let written = self.holds_its_own(tenant, round).await;
        assert!(written.iter().all(|words| words.contains(&pattern(tenant, round))), "round {round}");
    }

    /// Moves the group away, while the devices write, and back and forth until these rounds are over.
    async fn rounds(&mut self, rounds: u64) {
        self.use_by(0, 0).await;
        for round in 1..=rounds {
            let (from, to) = (((round - 1) % 2) as usize, (round % 2) as usize);
            let device = self.devices[(round as usize) % self.devices.len()].address;
            let moved = self.hypervisor.assign(device, self.guests[to].vm.number()).await.expect("it moves");
            assert_eq!(moved.len(), self.devices.len());
            let left = self.holds_its_own(from, round - 1).await;
            self.use_by(to, round).await;
            assert_eq!(
                self.holds_its_own(from, round - 1).await,
                left,
                "round {round}: the old owner's memory"
            );
        }
    }

    /// Stops the devices; the server has counted every refusal that they saw.
    async fn end(self) {
        for device in self.devices {
            let (address, late) = (device.address, device.late());
            let refused = device.stop().await;
            let state = self.stage.device_state_at(address).await;
            let stale = refused.get(&STALE).copied().unwrap_or_default();
            assert!(stale >= late && late > 0, "{late} late, {refused:x?}");
            assert_eq!(state.refusals, stale, "{refused:x?}");
            let faults: u64 =
                refused.iter().filter(|(code, _)| **code < 0x1000).map(|(_, count)| count).sum();
            assert_eq!(state.faults, faults, "{refused:x?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i9_a_busy_device_that_changes_hands_a_hundred_times_is_never_late() {
    const ROUNDS: u64 = 100;
    within(60, async {
        let mut world = World::begin(&["00:08.0"], OnReset::Answer).await;
        let bystanders = [
            Bystander::start(&world.stage, &world.hypervisor, &world.guests[0], address("00:09.0")).await,
            Bystander::start(&world.stage, &world.hypervisor, &world.guests[1], address("00:0a.0")).await,
        ];
        world.rounds(ROUNDS).await;
        assert!(world.same_place > ROUNDS / 2, "the late writes hit where memory is: {}", world.same_place);
        for bystander in bystanders {
            assert!(bystander.stop().await > 10, "the load went on");
        }
        world.end().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i9_functions_without_acs_move_together_and_none_is_late() {
    within(60, async {
        let mut world = World::begin(&["00:08.0", "00:08.1", "00:08.2"], OnReset::Answer).await;
        world.rounds(20).await;
        let functions = world.hypervisor.functions().await.expect("its functions");
        let owners: Vec<_> = functions.iter().filter_map(|function| function.owner).collect();
        assert_eq!(owners, [world.guests[0].driver.owner(); 3], "all of the group have one owner");
        world.end().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i9_a_device_that_leaves_instead_of_being_reset_finds_its_backlog_refused() {
    within(60, async {
        let mut world = World::begin(&["00:08.0"], OnReset::Leave).await;
        world.rounds(15).await;
        assert!(world.devices[0].late() > 0, "it sent its backlog after it came back");
        assert!(
            world.stage.device_state_at(address("00:08.0")).await.generation.0 >= 15,
            "it left each time"
        );
        for device in world.devices {
            device.stop().await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i9_a_device_that_never_answers_its_reset_reaches_nobody_until_it_does() {
    within(60, async {
        let mut world = World::begin(&["00:08.0"], OnReset::Ignore).await;
        world.use_by(0, 0).await;
        let device = world.devices[0].address;
        world.guests[1].vm.assign(device).await.expect("it moves all the same");
        let iova = world.open(1).await[0];
        world.devices[0].is_late(1000).await;
        assert!(world.words(1, 0).await.iter().all(|word| *word == 0), "nothing of it came");
        world.holds_its_own(0, 0).await;

        world.devices[0].relent();
        world.stage.log_says(&["device not reset in time"]).await;
        world.devices[0].aim(Aim { iova, pattern: pattern(1, 1) });
        tokio::time::timeout(SOON, world.devices[0].has_landed(32)).await.expect("it is the new owner's now");
        world.holds_its_own(1, 1).await;
        world.end().await;
    })
    .await;
}
