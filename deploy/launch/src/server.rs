//! A server with its agents, in a directory of its own.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use iommu_pki::{CREDENTIAL_DAYS, Directory, Overwrite, PkiError, Validity};
use iommu_types::{DeviceAddress, Identity, Role};
use serde::Deserialize;

use crate::{Binaries, Process};

/// What a server speaks on its TCP port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Wire {
    /// TLS, with certificates in a directory of the server's own.
    #[default]
    Tls,
    /// Plaintext, for measurements of everything else.
    Plaintext,
}

impl Wire {
    const fn scheme(self) -> &'static str {
        match self {
            Self::Tls => "https",
            Self::Plaintext => "http",
        }
    }
}

/// How to start a server.
#[derive(Clone, Debug, Default)]
pub struct ServerOptions {
    /// What it speaks on its TCP port.
    pub wire: Wire,
    /// Further command-line arguments.
    pub arguments: Vec<String>,
}

/// How to start an agent.
#[derive(Clone, Debug)]
pub struct AgentOptions {
    /// Name under which the server knows the device.
    pub name: String,
    /// PCI address, such as `00:01.0`.
    pub address: String,
    /// Further command-line arguments.
    pub arguments: Vec<String>,
}

/// What the server prints when it is ready.
#[derive(Debug, Deserialize)]
struct Ready {
    listen: Vec<String>,
    admin: Option<String>,
}

/// Name of the directory with certificates.
const PKI: &str = "pki";

/// A running server.
#[derive(Debug)]
pub struct Server {
    /// The process.
    pub process: Process,
    binaries: Binaries,
    options: ServerOptions,
    directory: tempfile::TempDir,
    endpoint: String,
    admin: Option<String>,
    agents_started: u32,
}

/// Starts a server in this directory, on this TCP address, and waits until it is ready.
async fn launch(
    binaries: &Binaries,
    options: &ServerOptions,
    directory: &Path,
    address: &str,
) -> anyhow::Result<(Process, Ready)> {
    let mut arguments: Vec<String> = ["--listen", address, "--admin", "127.0.0.1:0"].map(String::from).into();
    match options.wire {
        Wire::Tls => arguments.extend(["--pki".to_owned(), directory.join(PKI).display().to_string()]),
        Wire::Plaintext => arguments.push("--insecure-plaintext".to_owned()),
    }
    arguments.extend(["--listen-unix".to_owned(), directory.join("server.sock").display().to_string()]);
    arguments.extend(options.arguments.iter().cloned());
    let log = directory.join("server.log");
    let mut process = Process::start("iommu-server", &binaries.server, &arguments, log)?;
    let ready = process.first_line().await?;
    let ready = serde_json::from_str(&ready).with_context(|| {
        format!("the server said {ready:?} instead of being ready; its log:\n{}", process.log())
    })?;
    Ok((process, ready))
}

impl Server {
    /// Starts a server on a free port of the loopback interface and on a UNIX socket, and waits until it is ready.
    pub async fn start(binaries: &Binaries, options: &ServerOptions) -> anyhow::Result<Self> {
        let directory = tempfile::Builder::new().prefix("iommu-").tempdir().context("create a directory")?;
        let (process, ready) = launch(binaries, options, directory.path(), "127.0.0.1:0").await?;
        let Some(address) = ready.listen.first() else { bail!("the server listens nowhere") };
        let endpoint = format!("{}://{address}", options.wire.scheme());
        Ok(Self {
            process,
            binaries: binaries.clone(),
            options: options.clone(),
            directory,
            endpoint,
            admin: ready.admin,
            agents_started: 0,
        })
    }

    /// Starts it once more after its end, with the same arguments, directory and port, and waits until it is ready. Its admin address is another
    /// one, and its log begins anew.
    pub async fn start_again(&mut self) -> anyhow::Result<()> {
        ensure!(self.process.id().is_none(), "the server has not ended");
        let address = self.endpoint.split_once("://").map_or("", |(_, address)| address);
        let (process, ready) = launch(&self.binaries, &self.options, self.directory.path(), address).await?;
        (self.process, self.admin) = (process, ready.admin);
        Ok(())
    }

    /// Where it listens over TCP, as an endpoint for clients.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Where it listens on a UNIX socket, as an endpoint for clients.
    pub fn unix_endpoint(&self) -> String {
        format!("unix://{}", self.directory.path().join("server.sock").display())
    }

    /// Where its certificates lie, and those of its peers.
    pub fn pki(&self) -> PathBuf {
        self.path(PKI)
    }

    /// Has a certificate made for a peer that is not in the server's configuration, unless there is one.
    pub fn admit(&self, identity: &Identity) -> anyhow::Result<()> {
        let directory = Directory::at(self.pki());
        if !directory.has_authority() || directory.has(identity)? {
            return Ok(());
        }
        match directory.issue(identity, Validity::of_days(CREDENTIAL_DAYS)?, None, Overwrite::Never) {
            // The server was quicker: it issues for peers that are declared at run time.
            Ok(_) | Err(PkiError::Exists { .. }) => Ok(()),
            Err(error) => Err(error).with_context(|| format!("issue a certificate for {identity}")),
        }
    }

    /// Its admin address, `host:port`.
    pub fn admin(&self) -> Option<&str> {
        self.admin.as_deref()
    }

    /// A path in the server's own directory, which goes away with it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Starts a `dma-engine` agent of this server. It connects by itself, now or later.
    pub fn start_dma_engine(&mut self, options: &AgentOptions) -> anyhow::Result<Process> {
        let address: DeviceAddress = options.address.parse().context("the address of an agent")?;
        self.admit(&Identity { name: options.name.clone(), role: Role::Device(address) })?;
        let mut arguments: Vec<String> = vec!["--server".into(), self.endpoint.clone()];
        arguments.extend(["--pki".into(), self.pki().display().to_string()]);
        arguments.extend([
            "--name".into(),
            options.name.clone(),
            "--address".into(),
            options.address.clone(),
        ]);
        arguments.extend(options.arguments.iter().cloned());
        self.agents_started += 1;
        let log = self.path(&format!("agent-{}.log", self.agents_started));
        Process::start(&options.name, &self.binaries.dma_engine, &arguments, log)
    }

    /// Starts a peer that is a program of the caller's own. It finds its certificate by itself, once it is [admitted](Self::admit).
    pub fn start_peer(
        &self,
        name: &str,
        program: &Path,
        arguments: &[String],
        log: PathBuf,
    ) -> anyhow::Result<Process> {
        Process::start_with(name, program, arguments, &[("IOMMU_PKI", &self.pki())], log)
    }

    /// The same for one that is told what to do on its standard input.
    pub fn start_steered_peer(
        &self,
        name: &str,
        program: &Path,
        arguments: &[String],
        log: PathBuf,
    ) -> anyhow::Result<Process> {
        Process::start_steered(name, program, arguments, &[("IOMMU_PKI", &self.pki())], log)
    }

    /// Starts a `rogue`, which knows where this server listens and where certificates lie, and waits for lines.
    pub fn start_rogue(&mut self) -> anyhow::Result<Process> {
        let arguments: Vec<String> = vec!["--server".into(), self.endpoint.clone()];
        self.agents_started += 1;
        let log = self.path(&format!("agent-{}.log", self.agents_started));
        self.start_steered_peer("rogue", &self.binaries.rogue, &arguments, log)
    }

    /// Runs `iommuctl` against this server and gives its exit code, standard output and standard error.
    pub async fn iommuctl(&self, arguments: &[&str]) -> anyhow::Result<(i32, String, String)> {
        let output = tokio::process::Command::new(&self.binaries.iommuctl)
            .args(["--server", &self.endpoint])
            .arg("--pki")
            .arg(self.pki())
            .args(arguments)
            .stdin(std::process::Stdio::null())
            .kill_on_drop(true)
            .output()
            .await
            .context("run iommuctl")?;
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Ok((output.status.code().unwrap_or(-1), text(output.stdout), text(output.stderr)))
    }
}
