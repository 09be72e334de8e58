//! The processes of the matrix, and who plays in a cell.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use anyhow::{Context, ensure};
use guest_sdk::{Connection, Credentials, DeviceAddress, Owner};
use iommu_launch::{Binaries, Server, ServerOptions, binaries_beside};
use iommu_types::{Identity, Role};
use rogue::language::{Command, Connect, Dma};
use rogue::text::Address;
use tokio::sync::Mutex;

use super::act::language::Ask;
use super::actor::{Actor, start_own, start_rogue};
use super::column::Column;
use super::judge::Judge;
use super::site::{BLOW, FILL, PAGE, Site};

/// The guest that attacks: its number, and where its memory begins.
pub(crate) const GUEST_MEMORY: (u32, u64) = (1, 0x1000_0000);
/// The guest that is attacked.
pub(crate) const VICTIM_MEMORY: (u32, u64) = (2, 0x2000_0000);
/// Bytes of each guest's memory.
const GUEST_BYTES: u64 = 4 << 20;
/// Where memory that moves arrives, and where new memory comes.
const ARRIVALS: u64 = 0x3000_0000;
const NEW: u64 = 0x3800_0000;
/// Memory of the listener: as many pages as the IOTLB has entries, in pieces that no superpage fits.
pub(crate) const PIECES: usize = 64;
/// Pieces that the other one works with.
pub(crate) const WORKING: usize = 32;
pub(crate) const PIECE_BYTES: u64 = 1 << 20;

/// Where the listener's piece lies. Pieces are apart, so that nothing is mapped by superpages, and spread so that every set of the IOTLB gets as many
/// entries as it has ways.
pub(crate) const fn piece(n: usize) -> u64 {
    0x4000_0000 + n as u64 * 2 * PIECE_BYTES + (n as u64 / 8 % 2) * PIECE_BYTES
}

/// The operator who declares devices behind the stage.
const STAGEHAND: &str = "stagehand";

/// Which sides play.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sides {
    /// A driver and its device.
    Own,
    /// An attacker and a victim, with a device each.
    Tenants,
}

/// All processes, for all columns.
pub(crate) struct Stage {
    binaries: Binaries,
    own: PathBuf,
    server: Mutex<Server>,
    endpoint: String,
    credentials: Credentials,
    pub(crate) judge: Judge,
    driver: Actor,
    hypervisor: Actor,
    guests: [Actor; 2],
    machine: Actor,
    /// Hostile devices by name.
    rogues: BTreeMap<&'static str, (Actor, Connect)>,
    crowds: AtomicU32,
    moved_pages: AtomicU64,
    has_listening_memory: Mutex<bool>,
    restarts: Mutex<Option<Vec<Option<String>>>>,
}

/// One cell's players.
pub(crate) struct Scene<'a> {
    pub(crate) stage: &'a Stage,
    pub(crate) judge: &'a Judge,
    pub(crate) hypervisor: Option<Actor>,
    pub(crate) own: Site,
    pub(crate) attacker: Site,
    pub(crate) victim: Site,
}

impl Stage {
    /// Builds the binaries and starts everything.
    pub(crate) async fn start() -> anyhow::Result<Self> {
        let binaries = binaries_beside(env!("CARGO_PKG_NAME"))?;
        let own = binaries.caller.clone().context("cargo did not say where this program is")?;
        let arguments = ["--memory", "768MiB"].map(String::from).into();
        let options = ServerOptions { arguments, ..ServerOptions::default() };
        let mut server = Server::start(&binaries, &options).await?;
        let named = |name: &str, role| Identity { name: name.to_owned(), role };
        server.admit(&named("judge", Role::Observer))?;
        server.admit(&named(STAGEHAND, Role::Operator))?;
        let credentials = Credentials::from_directory(server.pki());
        let connection = Connection::to(server.endpoint()).credentials(credentials.clone());
        let observer = connection.observer("judge").await.context("open a session as observer")?;
        let start = |server: &Server, name: &str, role| start_own(server, &own, &named(name, role));
        let driver = start(&server, "driver0", Role::Driver(Owner::Driver(0)))?;
        let hypervisor = start(&server, "hv0", Role::Hypervisor)?;
        let machine = start(&server, "os0", Role::Bare)?;
        for ((vm, base), name) in [(GUEST_MEMORY, "guest1"), (VICTIM_MEMORY, "guest2")] {
            hypervisor
                .request(Ask::CreateVm { number: vm, name: name.into(), limits: BTreeMap::new() })
                .await?;
            hypervisor.request(Ask::AddMemory { vm, gpa: Address(base), bytes: GUEST_BYTES }).await?;
        }
        let guests = [
            start(&server, "guest1", Role::Driver(Owner::Vm(GUEST_MEMORY.0)))?,
            start(&server, "guest2", Role::Driver(Owner::Vm(VICTIM_MEMORY.0)))?,
        ];
        for (device, name) in [("00:04.0", "vf-a"), ("00:05.0", "vf-b"), ("00:06.0", "vf-c")] {
            hypervisor.request(Ask::Declare { device: device.into(), name: name.into() }).await?;
        }
        let devices =
            vec![("00:01.0".to_owned(), "bare-a".to_owned()), ("00:02.0".to_owned(), "bare-b".to_owned())];
        let segment = machine.request(Ask::Machine { bytes: 64 << 20, devices }).await?.value;
        let status = machine.request(Ask::Unit).await?;
        ensure!(status.further >> 31 == 0, "translation is on in the bare machine");
        let mut rogues = BTreeMap::new();
        for (name, address) in [
            ("engine0", "00:01.0".to_owned()),
            ("vf-a", "00:04.0".to_owned()),
            ("vf-b", "00:05.0".to_owned()),
            ("vf-c", "00:06.0".to_owned()),
            ("bare-a", format!("{segment:04x}:00:01.0")),
            ("bare-b", format!("{segment:04x}:00:02.0")),
        ] {
            let connect = Connect::new(name, address.parse()?);
            let rogue = start_rogue(&mut server, &connect).await?;
            rogues.insert(name, (rogue, connect));
        }
        for (device, vm) in [("00:04.0", GUEST_MEMORY.0), ("00:05.0", VICTIM_MEMORY.0)] {
            hypervisor.request(Ask::Assign { device: device.into(), vm }).await?;
        }
        Ok(Self {
            binaries,
            own,
            endpoint: server.endpoint().to_owned(),
            credentials,
            judge: Judge::new(observer),
            driver,
            hypervisor,
            guests,
            machine,
            rogues,
            crowds: AtomicU32::new(10),
            moved_pages: AtomicU64::new(0),
            has_listening_memory: Mutex::new(false),
            restarts: Mutex::new(None),
            server: Mutex::new(server),
        })
    }

    fn site(&self, actor: &Actor, device: &str, column: Column, next: u64) -> Site {
        let (rogue, connect) = self.rogues[device].clone();
        Site::new(actor.clone(), rogue, connect, column, next)
    }

    /// Has every device stop its writes, also one that is none of a scene's sites: nobody else would, and later cells would run under its storm.
    pub(crate) async fn stop_hammers(&self) {
        for (rogue, _) in self.rogues.values() {
            // It may be that nothing is hammered, or that the session is gone: both are well then.
            let _ = rogue.tell(&Command::HammerStop).await;
        }
    }

    /// The players of a cell of this column.
    pub(crate) fn scene(&self, column: Column) -> Scene<'_> {
        let (own, attacker, victim, hypervisor) = if column == Column::None {
            (
                self.site(&self.machine, "bare-a", column, 0x10_0000),
                self.site(&self.machine, "bare-a", column, 0x100_0000),
                self.site(&self.machine, "bare-b", column, 0x200_0000),
                None,
            )
        } else {
            (
                self.site(&self.driver, "engine0", column, 0),
                self.site(&self.guests[0], "vf-a", column, 0),
                self.site(&self.guests[1], "vf-b", column, 0),
                Some(self.hypervisor.clone()),
            )
        };
        Scene { stage: self, judge: &self.judge, hypervisor, own, attacker, victim }
    }

    /// What a device is told whose server has just started, and after that has been killed and started again. Tried once: there are no domains
    /// then, so no mode can make a difference.
    pub(crate) async fn restarts(&self) -> anyhow::Result<Vec<Option<String>>> {
        let mut known = self.restarts.lock().await;
        if let Some(known) = &*known {
            return Ok(known.clone());
        }
        let arguments = ["--memory", "64MiB"].map(String::from).into();
        let options = ServerOptions { arguments, ..ServerOptions::default() };
        let mut server = Server::start(&self.binaries, &options).await?;
        let connect = Connect::new("engine2", "00:03.0".parse()?);
        let rogue = start_rogue(&mut server, &connect).await?;
        let mut told = Vec::new();
        for is_restart in [false, true] {
            if is_restart {
                server.process.kill().await?;
                server.start_again().await?;
                rogue.connect(&connect).await?;
            }
            for address in [0, PAGE, 0x10_0000, 0xffff_f000] {
                told.push(rogue.dma(Dma::write(address, vec![FILL; BLOW as usize])).await?.err());
            }
        }
        server.process.kill().await?;
        *known = Some(told.clone());
        Ok(told)
    }

    /// Ends the server; everybody else ends with it.
    pub(crate) async fn end(self) -> anyhow::Result<()> {
        let mut server = self.server.into_inner();
        let ended = server.process.stop(std::time::Duration::from_secs(15)).await?;
        ensure!(ended.success(), "the server ended with {ended}; its log:\n{}", server.process.log());
        Ok(())
    }

    /// What the server has logged.
    pub(crate) async fn log(&self) -> String {
        self.server.lock().await.process.log()
    }
}

impl Scene<'_> {
    pub(crate) fn hypervisor(&self) -> anyhow::Result<Actor> {
        self.hypervisor.clone().context("a bare machine has no hypervisor")
    }

    /// Another device of the own driver, without an agent: it only lends its domain.
    pub(crate) async fn second_device(&self) -> anyhow::Result<Site> {
        const DEVICE: &str = "00:07.0";
        let mut second = self.own.clone();
        if self.own.is_bare() {
            second.next += 0x8_0000;
            return Ok(second);
        }
        let address: DeviceAddress = DEVICE.parse()?;
        let operator = Connection::to(&self.stage.endpoint)
            .credentials(self.stage.credentials.clone())
            .operator(STAGEHAND)
            .await?;
        let declared = operator.admin().declare_device(address, "second", Some("driver:0".parse()?)).await;
        // It is there from the column before.
        ensure!(
            declared.is_ok() || matches!(&declared, Err(guest_sdk::SdkError::Refused(_))),
            "declare {DEVICE}: {declared:?}"
        );
        second.connect = Connect::new("second", address);
        Ok(second)
    }

    /// A page of the attacker's memory that nobody uses, and where it goes in the victim's.
    pub(crate) fn page_to_move(&self) -> (u64, u64) {
        let n = self.stage.moved_pages.fetch_add(1, Ordering::Relaxed);
        (GUEST_MEMORY.1 + GUEST_BYTES - (n + 1) * PAGE, ARRIVALS + 2 * n * PAGE)
    }

    /// Where new memory of the victim's comes: address and bytes.
    pub(crate) fn new_memory(&self, pages: u64) -> (u64, u64) {
        let n = self.stage.moved_pages.fetch_add(1, Ordering::Relaxed);
        (NEW + n * pages * PAGE, pages * PAGE)
    }

    /// A third tenant, with limits, and with the third device.
    pub(crate) async fn crowd(&self, limits: BTreeMap<String, u64>) -> anyhow::Result<Site> {
        let hypervisor = self.hypervisor()?;
        let number = self.stage.crowds.fetch_add(1, Ordering::Relaxed);
        let name = format!("crowd{number}");
        hypervisor.request(Ask::CreateVm { number, name: name.clone(), limits }).await?;
        hypervisor.request(Ask::AddMemory { vm: number, gpa: Address(0x1000_0000), bytes: 1 << 20 }).await?;
        hypervisor.request(Ask::Assign { device: "00:06.0".into(), vm: number }).await?;
        let identity = Identity { name, role: Role::Driver(Owner::Vm(number)) };
        let actor = start_own(&*self.stage.server.lock().await, &self.stage.own, &identity)?;
        Ok(self.stage.site(&actor, "vf-c", self.own.column, 0))
    }

    /// Gives both guests the memory with which one listens while the other one works.
    pub(crate) async fn listening_memory(&self) -> anyhow::Result<()> {
        let mut has = self.stage.has_listening_memory.lock().await;
        if !*has {
            for ((vm, _), pieces) in [(GUEST_MEMORY, PIECES), (VICTIM_MEMORY, WORKING)] {
                for n in 0..pieces {
                    let add = Ask::AddMemory { vm, gpa: Address(piece(n)), bytes: PIECE_BYTES };
                    self.hypervisor()?.request(add).await?;
                }
            }
            *has = true;
        }
        Ok(())
    }

    /// Everybody gives back what they took.
    pub(crate) async fn end(&mut self) -> anyhow::Result<()> {
        for site in [&mut self.own, &mut self.attacker, &mut self.victim] {
            site.end().await?;
        }
        Ok(())
    }
}
