//! A process that is told what to do line by line, and answers each line with one.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use iommu_launch::{Process, Server};
use iommu_types::{Identity, Role};
use rogue::language::{Answer, Command, Connect, Counted, Dma, Hammer, Scan, Status};
use rogue::text::{Address, Hex};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{ChildStdin, ChildStdout};
use tokio::sync::{mpsc, oneshot};

use super::act::language::{Ask, Refused, Reply};

/// An answer comes within milliseconds; the slowest, an assignment whose device does not answer its reset, within seconds.
const DEADLINE: Duration = Duration::from_secs(30);

type Line = (String, oneshot::Sender<anyhow::Result<String>>);

/// One actor. Clones are the same one; what they ask is answered in order.
#[derive(Clone)]
pub(crate) struct Actor {
    name: Arc<str>,
    lines: mpsc::Sender<Line>,
}

impl Actor {
    /// Takes a process that was started with an input.
    pub(crate) fn of(name: &str, mut process: Process) -> anyhow::Result<Self> {
        let stdin = process.take_stdin().context("the actor has an input")?;
        let stdout = BufReader::new(process.take_stdout().context("the actor has an output")?).lines();
        let (lines, queue) = mpsc::channel(16);
        tokio::spawn(pump(process, stdin, stdout, queue));
        Ok(Self { name: name.into(), lines })
    }

    async fn ask<T: DeserializeOwned>(&self, what: &impl Serialize) -> anyhow::Result<T> {
        let line = serde_json::to_string(what)?;
        let (sender, answer) = oneshot::channel();
        let asked = self.lines.send((line.clone(), sender)).await;
        asked.map_err(|_| anyhow::anyhow!("{} is gone", self.name))?;
        let answer = tokio::time::timeout(DEADLINE, answer).await;
        let answer = answer.with_context(|| format!("{} did not answer {line} in time", self.name))?;
        let answer = answer.with_context(|| format!("{} is gone", self.name))??;
        serde_json::from_str(&answer)
            .with_context(|| format!("{} was asked {line} and said {answer}", self.name))
    }

    /// Asks a driver, hypervisor or operating system something that may be refused.
    pub(crate) async fn attempt(&self, ask: Ask) -> anyhow::Result<Result<Reply, Refused>> {
        let mut reply: Reply = self.ask(&ask).await?;
        Ok(match reply.refused.take() {
            Some(refused) => Err(refused),
            None => Ok(reply),
        })
    }

    /// Asks something that must not be refused.
    pub(crate) async fn request(&self, ask: Ask) -> anyhow::Result<Reply> {
        let what = format!("{ask:?}");
        match self.attempt(ask).await? {
            Ok(reply) => Ok(reply),
            Err(refused) => bail!("{}: {what}: {}: {}", self.name, refused.reason, refused.message),
        }
    }

    /// Tells a hostile device something.
    pub(crate) async fn tell(&self, command: &Command) -> anyhow::Result<Answer> {
        match self.ask(command).await? {
            Answer::Wrong { why } => bail!("{}: {command:?}: {why}", self.name),
            answer => Ok(answer),
        }
    }
}

/// The hostile device's commands in short.
impl Actor {
    /// Connects, and must be welcome.
    pub(crate) async fn connect(&self, connect: &Connect) -> anyhow::Result<()> {
        let answer = self.tell(&Command::Connect(connect.clone())).await?;
        ensure!(matches!(answer, Answer::Connected { .. }), "{}: {connect:?}: {answer:?}", self.name);
        Ok(())
    }

    /// One operation: what it read, or why it was refused.
    pub(crate) async fn dma(&self, dma: Dma) -> anyhow::Result<Result<Vec<u8>, String>> {
        match self.tell(&Command::Dma(dma.clone())).await? {
            Answer::Done { data } => Ok(Ok(data.0)),
            Answer::Fault(fault) => Ok(Err(fault.reason.to_string())),
            other => bail!("{}: {dma:?}: {other:?}", self.name),
        }
    }

    /// Reads so many bytes.
    pub(crate) async fn peek(&self, iova: u64, size: u32) -> anyhow::Result<Result<Vec<u8>, String>> {
        self.dma(Dma::read(iova, size)).await
    }

    /// What it knows of itself.
    pub(crate) async fn status(&self) -> anyhow::Result<Status> {
        match self.tell(&Command::Status).await? {
            Answer::Status(status) => Ok(status),
            other => bail!("{}: a status was due: {other:?}", self.name),
        }
    }

    /// Begins to write to addresses again and again.
    pub(crate) async fn hammer(
        &self,
        iova: &[u64],
        size: u32,
        fill: u8,
        in_flight: usize,
    ) -> anyhow::Result<()> {
        let iova = iova.iter().map(|iova| Address(*iova)).collect();
        self.tell(&Command::Hammer(Hammer { iova, size, fill, in_flight })).await.map(drop)
    }

    /// What hammering came to so far.
    pub(crate) async fn hammered(&self) -> anyhow::Result<Counted> {
        self.status().await?.hammered.context("nothing is hammered")
    }

    /// Waits until the hammer has swung so often that `enough` says so.
    pub(crate) async fn hammered_until(
        &self,
        what: &str,
        enough: impl Fn(&Counted) -> bool,
    ) -> anyhow::Result<Counted> {
        let wait = async {
            loop {
                let counted = self.hammered().await?;
                if enough(&counted) {
                    return anyhow::Ok(counted);
                }
                if let Some(end) = counted.ended {
                    bail!("{}: its session ended: {end:?}", self.name);
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(DEADLINE, wait).await.with_context(|| format!("not in time: {what}"))?
    }

    /// Ends the hammer.
    pub(crate) async fn stop_hammer(&self) -> anyhow::Result<Counted> {
        match self.tell(&Command::HammerStop).await? {
            Answer::Counted(counted) => Ok(counted),
            other => bail!("{}: counts were due: {other:?}", self.name),
        }
    }

    /// Looks for a canary.
    pub(crate) async fn scan(
        &self,
        from: u64,
        to: u64,
        stride: u64,
        canary: &[u8],
    ) -> anyhow::Result<Scanned> {
        let (from, to, stride) = (Address(from), Address(to), Address(stride));
        let scan = Scan { from, to, stride, size: 64, canary: Some(Hex(canary.to_vec())), write: None };
        match self.tell(&Command::Scan(scan)).await? {
            Answer::Scanned { canary_at, refused, tried, ended: None, .. } => {
                Ok(Scanned { found: !canary_at.is_empty(), refused: refused.into_keys().collect(), tried })
            }
            other => bail!("{}: {other:?}", self.name),
        }
    }
}

/// What a scan found.
#[derive(Debug, Default)]
pub(crate) struct Scanned {
    pub(crate) found: bool,
    pub(crate) refused: Vec<String>,
    pub(crate) tried: u64,
}

/// Starts an actor of this program, as this identity. Its session stands when it answers for the first time.
pub(crate) fn start_own(server: &Server, own: &Path, identity: &Identity) -> anyhow::Result<Actor> {
    let (role, owner) = match identity.role {
        Role::Driver(owner) => ("driver", Some(owner)),
        Role::Hypervisor => ("hypervisor", None),
        Role::Bare => ("machine", None),
        other => bail!("nobody here acts as {other:?}"),
    };
    server.admit(identity)?;
    let name = identity.name.as_str();
    let mut arguments: Vec<String> =
        ["act-in-matrix", "--server", server.endpoint(), "--role", role, "--name", name]
            .map(String::from)
            .into();
    if let Some(owner) = owner {
        arguments.extend(["--owner".to_owned(), owner.to_string()]);
    }
    let log = server.path(&format!("{name}.log"));
    Actor::of(name, server.start_steered_peer(name, own, &arguments, log)?)
}

/// Starts a hostile device, which has the certificate of one device and may show it as whoever it likes.
pub(crate) async fn start_rogue(server: &mut Server, connect: &Connect) -> anyhow::Result<Actor> {
    server.admit(&connect.shown())?;
    let rogue = Actor::of(&connect.name, server.start_rogue()?)?;
    rogue.connect(connect).await?;
    Ok(rogue)
}

/// Carries lines, one after the other, for as long as somebody may ask.
async fn pump(
    mut process: Process,
    mut stdin: ChildStdin,
    mut stdout: Lines<BufReader<ChildStdout>>,
    mut queue: mpsc::Receiver<Line>,
) {
    while let Some((line, answer)) = queue.recv().await {
        let told = async {
            stdin.write_all(format!("{line}\n").as_bytes()).await?;
            stdin.flush().await?;
            stdout.next_line().await?.context("it ended without an answer")
        };
        let told: anyhow::Result<String> = told.await;
        let told = told.with_context(|| format!("its log:\n{}", process.log()));
        // Whoever asked may have given up.
        let _ = answer.send(told);
    }
    drop(stdin);
    let _ = process.wait(Duration::from_secs(5)).await;
}
