//! A server of a test's own, and what a test asks it all the time.

use std::future::Future;
use std::path::Path;
use std::process::Output;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use guest_sdk::{
    AccessQuestion, BareClient, Connection, Credentials, DeviceState, DomainState, Driver, FaultFilter,
    Hypervisor, Inspect, MappingState, Observer, Operator, OwnerState,
};
use iommu_launch::{AgentOptions, Binaries, Process, Server, ServerOptions};
use iommu_types::{Access, DeviceAddress, Explanation, FaultRecord, Identity, Iova, Owner, Role};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::ChildStdout;

use crate::device::Device;

/// How long the system may take to reach a state that it must reach by itself. Generous: machines that build are slow.
pub const SOON: Duration = Duration::from_secs(10);

/// The real binaries, built once per test program.
pub fn binaries() -> &'static Binaries {
    static BINARIES: OnceLock<Binaries> = OnceLock::new();
    BINARIES.get_or_init(|| iommu_launch::binaries().expect("the binaries build"))
}

/// Runs a test, and ends it when it hangs. Building the binaries does not count.
pub async fn within<T>(seconds: u64, test: impl Future<Output = T>) -> T {
    tokio::task::spawn_blocking(binaries).await.expect("the binaries build");
    let ended = tokio::time::timeout(Duration::from_secs(seconds), test).await;
    ended.unwrap_or_else(|_| panic!("the test did not end within {seconds} s"))
}

/// Asks again and again until there is an answer, at most [`SOON`].
pub async fn soon<T>(what: &str, ask: impl AsyncFnMut() -> Option<T>) -> T {
    eventually(SOON, what, ask).await
}

/// Asks again and again until there is an answer, at most `deadline`.
pub async fn eventually<T>(deadline: Duration, what: &str, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(started.elapsed() < deadline, "not within {deadline:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Runs the server with these arguments until it ends by itself.
pub async fn run_server(arguments: &[&str]) -> Output {
    run(&binaries().server, arguments).await
}

/// Runs a program until it ends by itself.
pub async fn run(program: &Path, arguments: &[&str]) -> Output {
    let running = tokio::process::Command::new(program)
        .args(arguments)
        .stdin(std::process::Stdio::null())
        .kill_on_drop(true)
        .output();
    let ended = tokio::time::timeout(SOON, running).await;
    ended.expect("the program ends by itself").expect("the program starts")
}

/// What nothing may change when a request is refused: everything held by anybody, without the sessions and counters of the peers.
#[derive(Clone, Debug, PartialEq)]
pub struct Holdings {
    memory_free_bytes: u64,
    owners: Vec<OwnerState>,
    attachments: Vec<(DeviceAddress, Option<Owner>, Option<u16>)>,
    domains: Vec<DomainState>,
    mappings: Vec<MappingState>,
}

impl Holdings {
    /// The same without what may stay after use: what was ever done, free addresses that are kept for the next mapping, and table pages,
    /// which are kept too and count as free here.
    pub fn at_rest(mut self) -> Self {
        for domain in &mut self.domains {
            self.memory_free_bytes += domain.table_bytes;
            (domain.maps, domain.unmaps, domain.table_bytes) = (0, 0, 0);
            (domain.iova_allocations, domain.iova_visits, domain.cached_iova_ranges) = (0, 0, 0);
            (domain.flushes, domain.invalidations, domain.copied_bytes) = (0, 0, 0);
        }
        self
    }
}

/// A server, and the observer who watches it.
#[derive(Debug)]
pub struct Stage {
    /// The server.
    pub server: Server,
    /// Looks at everything.
    pub observer: Observer,
    /// Memory that was free when the server was ready.
    pub memory_free_bytes: u64,
}

/// The owner of driver `number`.
pub fn owner(number: u32) -> Owner {
    Owner::Driver(number)
}

/// The device of driver `number` in the built-in configuration; number 2 is owned by nobody.
pub fn address(number: u32) -> DeviceAddress {
    format!("00:{:02x}.0", number + 1).parse().expect("an address")
}

/// A connection to an endpoint of the server for a peer, which gets a certificate if it has none.
pub fn connection(server: &Server, endpoint: &str, name: &str, role: Role) -> Connection {
    server.admit(&Identity { name: name.to_owned(), role }).expect("certificates can be issued");
    Connection::to(endpoint).credentials(Credentials::from_directory(server.pki()))
}

impl Stage {
    /// Starts a server with the built-in devices and drivers, little memory, and these further arguments.
    pub async fn start(arguments: &[&str]) -> Self {
        let mut all: Vec<String> = ["--memory", "64MiB"].map(String::from).into();
        all.extend(arguments.iter().map(|argument| (*argument).to_owned()));
        let server =
            Server::start(binaries(), &ServerOptions { arguments: all, ..ServerOptions::default() }).await;
        let server = server.expect("the server starts");
        let watcher = connection(&server, server.endpoint(), "watcher", Role::Observer);
        let observer = watcher.observer("watcher").await.expect("an observer is admitted");
        let memory_free_bytes = observer.inspect().topology().await.expect("topology").memory_free_bytes;
        Self { server, observer, memory_free_bytes }
    }

    /// The driver with this number, connected over TCP.
    pub async fn driver(&self, number: u32) -> Driver {
        self.driver_over(self.server.endpoint(), number).await
    }

    /// The driver with this number, connected to an endpoint.
    pub async fn driver_over(&self, endpoint: &str, number: u32) -> Driver {
        let name = format!("driver{number}");
        let connection = connection(&self.server, endpoint, &name, Role::Driver(owner(number)));
        let connection = connection.deadline(Duration::from_secs(8));
        connection.driver(name, owner(number)).await.expect("the driver is admitted")
    }

    /// An operator.
    pub async fn operator(&self) -> Operator {
        let connection = connection(&self.server, self.server.endpoint(), "operator", Role::Operator);
        connection.operator("operator").await.expect("an operator is admitted")
    }

    /// A hypervisor.
    pub async fn hypervisor(&self, name: &str) -> Hypervisor {
        let connection = connection(&self.server, self.server.endpoint(), name, Role::Hypervisor);
        connection.hypervisor(name).await.expect("a hypervisor is admitted")
    }

    /// The driver of a virtual machine.
    pub async fn guest(&self, name: &str, vm: u32) -> Driver {
        let connection = connection(&self.server, self.server.endpoint(), name, Role::Driver(Owner::Vm(vm)));
        let connection = connection.deadline(Duration::from_secs(8));
        connection.driver(name, Owner::Vm(vm)).await.expect("the driver is admitted")
    }

    /// A client of bare machines.
    pub async fn bare(&self, name: &str) -> BareClient {
        let connection = connection(&self.server, self.server.endpoint(), name, Role::Bare);
        connection.bare(name).await.expect("a bare client is admitted")
    }

    /// A device of the built-in configuration, played by this process; connected on return.
    pub async fn device(&self, number: u32) -> Device {
        Device::attach(&self.server, self.server.endpoint(), &format!("engine{number}"), address(number))
            .await
    }

    /// A `dma-engine` process for a device of the built-in configuration; connected on return.
    pub async fn engine(&mut self, number: u32) -> Process {
        let before = self.device_state(number).await.generation;
        let options = AgentOptions {
            name: format!("engine{number}"),
            address: address(number).to_string(),
            arguments: Vec::new(),
        };
        let agent = self.server.start_dma_engine(&options).expect("the agent starts");
        self.device_connected(number, before.0 + 1).await;
        agent
    }

    /// A process of this crate's own test program, with its standard output.
    pub fn actor(&self, program: &str, arguments: &[&str]) -> Actor {
        let name = arguments.first().copied().unwrap_or("actor");
        let mut all: Vec<String> = vec![name.to_owned(), self.server.endpoint().to_owned()];
        all.extend(arguments.iter().skip(1).map(|argument| (*argument).to_owned()));
        let log = self.server.path(&format!("{}.log", all.join("-").replace(['/', ':'], "_")));
        let mut process =
            self.server.start_peer(name, Path::new(program), &all, log).expect("the actor starts");
        let stdout = process.take_stdout().expect("standard output is there once");
        Actor { process, lines: BufReader::new(stdout).lines() }
    }

    /// The inspection service.
    pub fn inspect(&self) -> Inspect {
        self.observer.inspect()
    }

    /// A device as the server sees it.
    pub async fn device_state(&self, number: u32) -> DeviceState {
        self.device_state_at(address(number)).await
    }

    /// The device at an address as the server sees it.
    pub async fn device_state_at(&self, device: DeviceAddress) -> DeviceState {
        let topology = self.inspect().topology().await.expect("topology");
        let found = topology.devices.into_iter().find(|state| state.device == device);
        found.unwrap_or_else(|| panic!("{device} is declared"))
    }

    /// An owner as the server sees it.
    pub async fn owner_state(&self, number: u32) -> OwnerState {
        let topology = self.inspect().topology().await.expect("topology");
        let found = topology.owners.into_iter().find(|state| state.owner == owner(number));
        found.expect("the owner is declared")
    }

    /// Waits until an agent is connected for the device in session `generation` or a later one.
    pub async fn device_connected(&self, number: u32, generation: u64) -> DeviceState {
        soon(&format!("an agent for engine{number}, session {generation}"), async || {
            let state = self.device_state(number).await;
            (state.connected && state.generation.0 >= generation).then_some(state)
        })
        .await
    }

    /// Waits until no agent is connected for the device.
    pub async fn device_gone(&self, number: u32, deadline: Duration) {
        eventually(deadline, &format!("engine{number} is not connected"), async || {
            (!self.device_state(number).await.connected).then_some(())
        })
        .await;
    }

    /// Waits until a line of the server's log holds all of these words, and gives it without colours.
    pub async fn log_says(&self, words: &[&str]) -> String {
        soon(&format!("a log line with {words:?}, in:\n{}", self.log()), async || {
            self.log().lines().find(|line| words.iter().all(|word| line.contains(word))).map(str::to_owned)
        })
        .await
    }

    /// What the server has logged so far, without colours.
    pub fn log(&self) -> String {
        let mut plain = String::new();
        let log = self.server.process.log();
        let mut pieces = log.split("\x1b[");
        plain.push_str(pieces.next().unwrap_or_default());
        for piece in pieces {
            plain.push_str(piece.split_once('m').map_or(piece, |(_, rest)| rest));
        }
        plain
    }

    /// Everything that is held.
    pub async fn holdings(&self) -> Holdings {
        let inspect = self.inspect();
        let topology = inspect.topology().await.expect("topology");
        let domains = inspect.domains(None).await.expect("domains");
        let mut mappings = Vec::new();
        for domain in &domains {
            let listed = inspect.mappings(domain.domain_id, Iova::new(0), 0, 0).await.expect("mappings");
            mappings.extend(listed.mappings);
        }
        let attachment =
            |state: &DeviceState| (state.device, state.owner, state.domain_id.map(|id| id.get()));
        let owners = topology.owners.into_iter().map(|owner| OwnerState { connected: false, ..owner });
        Holdings {
            memory_free_bytes: topology.memory_free_bytes,
            owners: owners.collect(),
            attachments: topology.devices.iter().map(attachment).collect(),
            domains,
            mappings,
        }
    }

    /// How an access of the device would end.
    pub async fn explain(&self, device: DeviceAddress, iova: Iova, access: Access) -> Explanation {
        let question = AccessQuestion { device, pasid: None, iova, access, size_bytes: 8 };
        self.inspect().explain(question).await.expect("every access can be explained")
    }

    /// The fault records of a device.
    pub async fn faults_of(&self, device: DeviceAddress) -> Vec<FaultRecord> {
        let filter = FaultFilter { owner: None, device: Some(device) };
        self.observer.faults().list(filter, 0).await.expect("faults").records
    }
}

/// A process of this crate's own.
#[derive(Debug)]
pub struct Actor {
    /// The process.
    pub process: Process,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Actor {
    /// The next line that it prints, which is JSON.
    pub async fn says(&mut self) -> Value {
        let line = tokio::time::timeout(SOON, self.lines.next_line()).await;
        let line = line.expect("the actor says something soon").expect("its output can be read");
        let line = line.unwrap_or_else(|| panic!("the actor ended without a word:\n{}", self.process.log()));
        serde_json::from_str(&line).expect("the actor speaks JSON")
    }
}
