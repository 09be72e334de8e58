//! A peer of the server as a process of its own, and the one line in, one line out with it.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

use super::words::{Ask, Told};

/// How long an answer may take beyond what was asked for. Generous: machines that build are slow.
const PATIENCE: Duration = Duration::from_secs(30);

/// A process that is asked. It is killed when this value is dropped.
#[derive(Debug)]
pub(super) struct Peer {
    name: String,
    child: Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
    log: std::path::PathBuf,
    /// What it said when it was ready.
    pub(super) vms: Vec<u32>,
}

impl Peer {
    /// Starts it and waits until it is ready.
    pub(super) async fn start(
        own: &Path,
        name: &str,
        arguments: &[String],
        pki: &Path,
        log: std::path::PathBuf,
    ) -> anyhow::Result<Self> {
        let file = std::fs::File::create(&log).with_context(|| format!("create {}", log.display()))?;
        let mut child = Command::new(own)
            .arg("tenant")
            .args(arguments)
            .env("IOMMU_PKI", pki)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(file)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("start {name}"))?;
        let input = child.stdin.take().context("standard input is there once")?;
        let output = BufReader::new(child.stdout.take().context("standard output is there once")?).lines();
        let mut peer = Self { name: name.to_owned(), child, input, output, log, vms: Vec::new() };
        match peer.told().await? {
            Told::Ready { vms } => peer.vms = vms,
            other => bail!("{name} begins with {other:?}"),
        }
        Ok(peer)
    }

    /// Its process.
    pub(super) fn id(&self) -> anyhow::Result<u32> {
        self.child.id().with_context(|| format!("{} has ended", self.name))
    }

    /// Asks, without waiting for what it tells.
    pub(super) async fn ask(&mut self, ask: &Ask) -> anyhow::Result<()> {
        let line = serde_json::to_string(ask).context("write a question as JSON")? + "\n";
        self.input.write_all(line.as_bytes()).await.with_context(|| format!("ask {}", self.name))
    }

    /// What it tells next.
    pub(super) async fn told(&mut self) -> anyhow::Result<Told> {
        let line = tokio::time::timeout(PATIENCE, self.output.next_line()).await;
        let line = line.with_context(|| format!("{} says nothing; its log:\n{}", self.name, self.log()))?;
        let line = line.with_context(|| format!("read what {} says", self.name))?;
        let line = line.with_context(|| format!("{} has ended; its log:\n{}", self.name, self.log()))?;
        match serde_json::from_str(&line).with_context(|| format!("{} said {line:?}", self.name))? {
            Told::Failed { why } => bail!("{}: {why}; its log:\n{}", self.name, self.log()),
            told => Ok(told),
        }
    }

    /// Both.
    pub(super) async fn answer(&mut self, ask: &Ask) -> anyhow::Result<Told> {
        self.ask(ask).await?;
        self.told().await
    }

    fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }
}
