//! The server, its hypervisor, and the processes of guests and devices, all with certificates of their own.

use anyhow::Context;
use iommu_launch::{AgentOptions, Binaries, Process, Server, ServerOptions};
use iommu_types::{DeviceAddress, Identity, Owner, Role, SourceId};

use super::peer::Peer;
use crate::stand::{name, owner};

/// Names of the guests, in order.
pub(super) const GUESTS: [&str; 2] = ["guest1", "guest2"];
/// The hypervisor that the server's configuration knows.
const HYPERVISOR: &str = "hv0";

/// The device that the hypervisor shares is number 0; then that of each guest.
pub(super) fn address(number: u16) -> DeviceAddress {
    DeviceAddress { segment: 0, source_id: SourceId::new(0x100 + 8 * number) }
}

fn device_name(number: u16) -> String {
    format!("device{number}")
}

/// A server over mutual TLS with a device for its own first driver and one for each guest.
pub(super) struct Stage {
    pub(super) server: Server,
    pub(super) hypervisor: Option<Peer>,
    /// Guests, once there is a hypervisor.
    pub(super) guests: Vec<Peer>,
    own: std::path::PathBuf,
}

impl Stage {
    /// Starts the server.
    pub(super) async fn start(binaries: &Binaries) -> anyhow::Result<Self> {
        let mut arguments = vec!["--memory".to_owned(), "256MiB".to_owned()];
        arguments.extend(["--driver".into(), format!("{}={}", owner(0), name(0))]);
        arguments.extend(["--device".into(), format!("{}={}@{}", address(0), device_name(0), owner(0))]);
        for number in 1..=GUESTS.len() as u16 {
            arguments.extend(["--device".into(), format!("{}={}", address(number), device_name(number))]);
        }
        let server =
            Server::start(binaries, &ServerOptions { arguments, ..ServerOptions::default() }).await?;
        let own = binaries.caller.clone().context("cargo did not say where this program is")?;
        Ok(Self { server, hypervisor: None, guests: Vec::new(), own })
    }

    /// Starts the process of an engine for a device.
    pub(super) fn engine(&mut self, number: u16) -> anyhow::Result<Process> {
        let (name, address) = (device_name(number), address(number).to_string());
        self.server.start_dma_engine(&AgentOptions { name, address, arguments: Vec::new() })
    }

    /// Starts the process of a device that does what it is told.
    pub(super) async fn generator(&self, number: u16) -> anyhow::Result<Peer> {
        let role = Role::Device(address(number));
        let arguments = vec!["--device".to_owned(), address(number).to_string()];
        self.peer("device", device_name(number), role, arguments).await
    }

    /// Starts the hypervisor and then the guests; the last one has limits on its rates if it is so said.
    pub(super) async fn populate(&mut self, shares: bool, last_is_limited: bool) -> anyhow::Result<()> {
        let mut arguments = Vec::new();
        for (guest, number) in GUESTS.into_iter().zip(1..) {
            arguments.extend(["--guest".to_owned(), format!("{guest}={}", address(number))]);
        }
        if shares {
            arguments.extend(["--device".to_owned(), address(0).to_string()]);
        }
        arguments.extend(last_is_limited.then(|| "--limited".to_owned()));
        let hypervisor = self.peer("hypervisor", HYPERVISOR.to_owned(), Role::Hypervisor, arguments).await?;
        for ((guest, &vm), number) in GUESTS.into_iter().zip(&hypervisor.vms).zip(1..) {
            let owner = Owner::Vm(vm);
            let mut arguments = vec!["--owner".to_owned(), owner.to_string()];
            arguments.extend(["--device".to_owned(), address(number).to_string()]);
            let guest = self.peer("guest", guest.to_owned(), Role::Driver(owner), arguments).await?;
            self.guests.push(guest);
        }
        self.hypervisor = Some(hypervisor);
        Ok(())
    }

    async fn peer(
        &self,
        part: &str,
        name: String,
        role: Role,
        arguments: Vec<String>,
    ) -> anyhow::Result<Peer> {
        self.server.admit(&Identity { name: name.clone(), role })?;
        let mut all: Vec<String> =
            ["tenant", "--part", part, "--server", self.server.endpoint()].map(String::from).into();
        all.extend(["--name".to_owned(), name.clone()]);
        all.extend(arguments);
        let log = self.server.path(&format!("{name}.log"));
        let process = self.server.start_steered_peer(&name, &self.own, &all, log)?;
        Peer::of(name, process).await
    }

    /// Ends guests, the hypervisor and the server; devices are their owners' to end.
    pub(super) async fn stop(mut self) {
        for peer in self.guests.into_iter().chain(self.hypervisor) {
            peer.end().await;
        }
        let _ended = self.server.process.kill().await;
    }
}
