//! What the measurements run on: the plan, and the processes on both ends of the wire.

use std::path::Path;

use anyhow::{Context, bail};
use iommu_launch::{Binaries, Process, Server, ServerOptions, Wire, binaries_beside};
use iommu_types::{DeviceAddress, Owner, SourceId};
use serde::Deserialize;

use crate::catalogue::Wanted;
use crate::modes::costs::Costs;
use crate::progress::Progress;
use crate::rounds::Plan;

/// Devices and drivers that the server knows.
pub(crate) const PEERS: u16 = 64;

/// The plan and the stage.
pub(crate) struct Bench {
    /// How much is measured.
    pub(crate) plan: Plan,
    /// Where it is told.
    pub(crate) progress: Progress,
    /// Which figures are asked for.
    pub(crate) wanted: Wanted,
    /// What one event costs in the model of protection modes.
    pub(crate) costs: Costs,
    binaries: Option<Binaries>,
    ends: Option<Ends>,
}

impl Bench {
    /// Starts nothing yet.
    pub(crate) fn new(plan: Plan, progress: Progress, wanted: Wanted, costs: Costs) -> Self {
        Self { plan, progress, wanted, costs, binaries: None, ends: None }
    }

    /// The real binaries, built when they are first needed.
    pub(crate) fn binaries(&mut self) -> anyhow::Result<Binaries> {
        if let Some(binaries) = &self.binaries {
            return Ok(binaries.clone());
        }
        self.progress.detail("cargo builds the binaries");
        let binaries = tokio::task::block_in_place(|| binaries_beside(env!("CARGO_PKG_NAME")))?;
        Ok(self.binaries.insert(binaries).clone())
    }

    /// Takes the server and the echo, started when they are first needed. Whoever is done with them gives them [back](Self::put).
    pub(crate) async fn take(&mut self) -> anyhow::Result<Ends> {
        match self.ends.take() {
            Some(ends) => Ok(ends),
            None => Ends::start(&self.binaries()?).await,
        }
    }

    /// Gives them back for the next measurement.
    pub(crate) fn put(&mut self, ends: Ends) {
        self.ends = Some(ends);
    }

    /// Ends what was started.
    pub(crate) async fn stop(&mut self) {
        if let Some(ends) = self.ends.take() {
            ends.stop().await;
        }
    }
}

/// The server under measurement and the echo that is its reference.
pub(crate) struct Ends {
    pub(crate) server: Server,
    pub(crate) echo: Echo,
}

impl Ends {
    /// Starts both.
    pub(crate) async fn start(binaries: &Binaries) -> anyhow::Result<Self> {
        let mut arguments = vec!["--memory".to_owned(), "512MiB".to_owned()];
        for peer in 0..PEERS {
            arguments.extend(["--driver".into(), format!("{}={}", owner(peer), name(peer))]);
            let address = address(peer).source_id;
            // The devices are all of the first driver; the others only sit there.
            arguments.extend(["--device".into(), format!("{address}={}@{}", name(peer), owner(0))]);
        }
        let server = Server::start(binaries, &ServerOptions { wire: Wire::Plaintext, arguments }).await?;
        let own = binaries.caller.as_deref().context("cargo did not say where this program is")?;
        let echo = Echo::start(own, &server.path("echo.sock"), server.path("echo.log")).await?;
        Ok(Self { server, echo })
    }

    /// Ends both at once: nobody needs what they hold.
    pub(crate) async fn stop(mut self) {
        // Whatever does not end now is killed when it is dropped.
        let _ended = (self.server.process.kill().await, self.echo.process.kill().await);
    }
}

/// A device of the server, by its number.
pub(crate) fn address(peer: u16) -> DeviceAddress {
    assert!(peer < PEERS, "the server knows {PEERS} devices");
    DeviceAddress { segment: 0, source_id: SourceId::new(0x100 + peer) }
}

/// The name of a device or a driver, by its number.
pub(crate) fn name(peer: u16) -> String {
    format!("bench{peer}")
}

/// A driver of the server, by its number.
pub(crate) fn owner(peer: u16) -> Owner {
    assert!(peer < PEERS, "the server knows {PEERS} drivers");
    Owner::Driver(peer.into())
}

/// The echo, a process of its own.
pub(crate) struct Echo {
    pub(crate) process: Process,
    endpoint: String,
    unix_endpoint: String,
}

/// What the echo prints when it is ready.
#[derive(Debug, Deserialize)]
struct Ready {
    listen: Vec<String>,
}

impl Echo {
    async fn start(own: &Path, socket: &Path, log: std::path::PathBuf) -> anyhow::Result<Self> {
        let arguments = ["echo-server", "--listen", "127.0.0.1:0", "--listen-unix"].map(String::from);
        let mut arguments = Vec::from(arguments);
        arguments.push(socket.display().to_string());
        let mut process = Process::start("the echo", own, &arguments, log)?;
        let line = process.first_line().await?;
        let ready: Ready = serde_json::from_str(&line).with_context(|| format!("the echo said {line:?}"))?;
        let Some(address) = ready.listen.first() else { bail!("the echo listens nowhere") };
        let endpoint = format!("http://{address}");
        Ok(Self { process, endpoint, unix_endpoint: format!("unix://{}", socket.display()) })
    }

    /// Where it listens over TCP.
    pub(crate) fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Where it listens on a UNIX socket.
    pub(crate) fn unix_endpoint(&self) -> &str {
        &self.unix_endpoint
    }
}
