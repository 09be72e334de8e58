//! The processes of a demonstration: a server, its agents, and drivers that tell what they do.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use iommu_launch::{AgentOptions, Process, Server, ServerOptions, binaries_beside};
use tokio::io::{AsyncBufReadExt, BufReader};

use crate::report::{self, Step, Told};

/// A driver takes a few seconds; a machine under load may need more.
const DRIVER_DEADLINE: Duration = Duration::from_secs(60);
/// How long a process may take to end when it is asked to.
const END_DEADLINE: Duration = Duration::from_secs(10);
/// The device and its driver, as the server's embedded configuration knows them.
pub(crate) const DEVICE: (&str, &str) = ("engine0", "00:01.0");

/// A server with its agents.
pub(crate) struct Stage {
    server: Server,
    agents: Vec<Process>,
    own: PathBuf,
    json: bool,
    started: Instant,
}

impl Stage {
    /// Builds the binaries and starts a server and the agent of [`DEVICE`].
    pub(crate) async fn start(json: bool) -> anyhow::Result<Self> {
        report::progress(json, "building the binaries");
        let binaries = binaries_beside(env!("CARGO_PKG_NAME"))?;
        let own = binaries.caller.clone().context("cargo did not say where this program is")?;
        let started = Instant::now();
        let server = Server::start(&binaries, &ServerOptions::default()).await?;
        let number = number(&server.process);
        report::progress(json, &format!("process: iommu-server {number} at {}", server.endpoint()));
        let mut stage = Self { server, agents: Vec::new(), own, json, started };
        stage.start_agent(DEVICE.0, DEVICE.1)?;
        Ok(stage)
    }

    /// A path in a directory that goes away with the stage.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.server.path(name)
    }

    /// How long ago the first process was started.
    pub(crate) fn took(&self) -> Duration {
        self.started.elapsed()
    }

    fn start_agent(&mut self, name: &str, address: &str) -> anyhow::Result<()> {
        let options =
            AgentOptions { name: name.to_owned(), address: address.to_owned(), arguments: Vec::new() };
        let agent = self.server.start_dma_engine(&options)?;
        report::progress(self.json, &format!("process: dma-engine {} at {address}", number(&agent)));
        self.agents.push(agent);
        Ok(())
    }

    /// Runs a driver, which is this program with another subcommand, until it ends; agents that it asks for are stopped then.
    pub(crate) async fn play(&mut self, subcommand: &str, arguments: &[String]) -> anyhow::Result<Vec<Step>> {
        let mut all = vec![subcommand.to_owned(), "--server".to_owned(), self.server.endpoint().to_owned()];
        all.extend_from_slice(arguments);
        let log = self.path(&format!("{subcommand}.log"));
        let mut driver = self.server.start_peer(subcommand, &self.own, &all, log)?;
        report::progress(self.json, &format!("process: driver {} ({subcommand})", number(&driver)));
        let agents_before = self.agents.len();
        let steps = match tokio::time::timeout(DRIVER_DEADLINE, self.follow(&mut driver)).await {
            Ok(steps) => steps,
            Err(_) => Err(anyhow::anyhow!("the driver was not done within {DRIVER_DEADLINE:?}")),
        };
        let steps = steps.with_context(|| {
            let mut logs = format!("driver log:\n{}", driver.log());
            for agent in &self.agents {
                logs += &format!("\nagent log:\n{}", agent.log());
            }
            format!("{logs}\nserver log:\n{}", self.server.process.log())
        })?;
        for mut agent in self.agents.drain(agents_before..) {
            let ended = agent.stop(END_DEADLINE).await?;
            if !ended.success() {
                bail!("an agent ended with {ended}; its log:\n{}", agent.log());
            }
        }
        Ok(steps)
    }

    /// Passes on what the driver tells, until it ends.
    async fn follow(&mut self, driver: &mut Process) -> anyhow::Result<Vec<Step>> {
        let mut lines = BufReader::new(driver.take_stdout().context("the driver's output is taken")?).lines();
        let mut steps = Vec::new();
        while let Some(line) = lines.next_line().await.context("read what the driver tells")? {
            match serde_json::from_str(&line).with_context(|| format!("the driver told {line:?}"))? {
                Told::Begin { name, story } => report::begin(self.json, &name, &story),
                Told::NeedsAgent { name, address } => self.start_agent(&name, &address)?,
                Told::End(step) => {
                    report::end(self.json, &step);
                    steps.push(*step);
                }
            }
        }
        let status = driver.wait(Duration::from_secs(5)).await?;
        if !status.success() {
            bail!("the driver ended with {status}");
        }
        Ok(steps)
    }

    /// The server drains and goes when it is asked to, and so do the agents.
    pub(crate) async fn end(&mut self) -> anyhow::Result<Step> {
        let ended = self.server.process.stop(END_DEADLINE).await?;
        let mut observed = format!("server: {ended}");
        let mut passed = ended.success();
        for agent in &mut self.agents {
            let ended = agent.stop(END_DEADLINE).await?;
            observed += &format!(", agent: {ended}");
            passed &= ended.success();
        }
        Ok(Step {
            name: "graceful end".into(),
            expected: "SIGTERM drains the server; all end with exit code 0".into(),
            observed,
            passed,
            ..Step::default()
        })
    }
}

fn number(process: &Process) -> String {
    process.id().map_or_else(|| "(ended)".to_owned(), |id| format!("(pid {id})"))
}
