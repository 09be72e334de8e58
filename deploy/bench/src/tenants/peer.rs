//! A peer of the server as a process of its own, and the one line in, one line out with it.

use std::time::Duration;

use anyhow::{Context, bail};
use iommu_launch::Process;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{ChildStdin, ChildStdout};

use super::words::{Ask, Told};

/// How long an answer may take beyond what was asked for. Generous: machines that build are slow.
const PATIENCE: Duration = Duration::from_secs(30);

/// A process that is asked. It is killed when this value is dropped.
#[derive(Debug)]
pub(super) struct Peer {
    name: String,
    process: Process,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
    /// What it said when it was ready.
    pub(super) vms: Vec<u32>,
}

impl Peer {
    /// Takes a process that was started with an input, and waits until it is ready.
    pub(super) async fn of(name: String, mut process: Process) -> anyhow::Result<Self> {
        let input = process.take_stdin().context("standard input is there once")?;
        let output = process.take_stdout().context("standard output is there once")?;
        let output = BufReader::new(output).lines();
        let mut peer = Self { name, process, input, output, vms: Vec::new() };
        match peer.told().await? {
            Told::Ready { vms } => peer.vms = vms,
            other => bail!("{} begins with {other:?}", peer.name),
        }
        Ok(peer)
    }

    /// Its process.
    pub(super) fn id(&self) -> anyhow::Result<u32> {
        self.process.id().with_context(|| format!("{} has ended", self.name))
    }

    /// Ends it and waits for it, so that what it used counts as ours and not as other programs'.
    pub(super) async fn end(mut self) {
        let _ended = self.process.kill().await;
    }

    /// Asks, without waiting for what it tells.
    pub(super) async fn ask(&mut self, ask: &Ask) -> anyhow::Result<()> {
        let line = serde_json::to_string(ask).context("write a question as JSON")? + "\n";
        self.input.write_all(line.as_bytes()).await.with_context(|| format!("ask {}", self.name))
    }

    /// What it tells next.
    pub(super) async fn told(&mut self) -> anyhow::Result<Told> {
        let line = tokio::time::timeout(PATIENCE, self.output.next_line()).await;
        let line =
            line.with_context(|| format!("{} says nothing; its log:\n{}", self.name, self.process.log()))?;
        let line = line.with_context(|| format!("read what {} says", self.name))?;
        let line =
            line.with_context(|| format!("{} has ended; its log:\n{}", self.name, self.process.log()))?;
        match serde_json::from_str(&line).with_context(|| format!("{} said {line:?}", self.name))? {
            Told::Failed { why } => bail!("{}: {why}; its log:\n{}", self.name, self.process.log()),
            told => Ok(told),
        }
    }

    /// Both.
    pub(super) async fn answer(&mut self, ask: &Ask) -> anyhow::Result<Told> {
        self.ask(ask).await?;
        self.told().await
    }
}
