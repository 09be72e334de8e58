//! One child process with a log.

use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::{Child, Command};

/// How long a process may take until it is ready. Generous: machines that build are slow.
const READY_WITHIN: Duration = Duration::from_secs(20);

/// A child process. It is killed when this value is dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `program`. Standard error goes to the file `log`; standard output can be taken by the caller.
    pub fn start(name: &str, program: &Path, arguments: &[String], log: PathBuf) -> anyhow::Result<Self> {
        Self::start_with(name, program, arguments, &[], log)
    }

    /// The same with these variables in its environment.
    pub fn start_with(
        name: &str,
        program: &Path,
        arguments: &[String],
        environment: &[(&str, &Path)],
        log: PathBuf,
    ) -> anyhow::Result<Self> {
        Self::spawn(name, program, arguments, environment, log, Stdio::null())
    }

    /// The same with a standard input that can be taken by the caller.
    pub fn start_steered(
        name: &str,
        program: &Path,
        arguments: &[String],
        environment: &[(&str, &Path)],
        log: PathBuf,
    ) -> anyhow::Result<Self> {
        Self::spawn(name, program, arguments, environment, log, Stdio::piped())
    }

    fn spawn(
        name: &str,
        program: &Path,
        arguments: &[String],
        environment: &[(&str, &Path)],
        log: PathBuf,
        input: Stdio,
    ) -> anyhow::Result<Self> {
        let file = std::fs::File::create(&log).with_context(|| format!("create {}", log.display()))?;
        let child = Command::new(program)
            .args(arguments)
            .envs(environment.iter().copied())
            .stdin(input)
            .stdout(Stdio::piped())
            .stderr(file)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("start {}", program.display()))?;
        Ok(Self { name: name.to_owned(), child, log })
    }

    /// Its process ID, while it has not ended.
    pub fn id(&self) -> Option<u32> {
        self.child.id()
    }

    /// What it has logged so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Its standard input, when it was started with one; once.
    pub fn take_stdin(&mut self) -> Option<tokio::process::ChildStdin> {
        self.child.stdin.take()
    }

    /// Its standard output; once.
    pub fn take_stdout(&mut self) -> Option<tokio::process::ChildStdout> {
        self.child.stdout.take()
    }

    /// The first line that it prints, which says that it is ready. Once: standard output goes with it.
    pub async fn first_line(&mut self) -> anyhow::Result<String> {
        let stdout = self.take_stdout().context("standard output is taken already")?;
        // A process that prints without end must not fill our memory: 64 KiB is far more than the line needs.
        let mut line = String::new();
        let mut reader = BufReader::new(stdout.take(64 << 10));
        match tokio::time::timeout(READY_WITHIN, reader.read_line(&mut line)).await {
            Ok(Ok(read)) if read > 0 => Ok(line),
            Ok(Ok(_)) => {
                let status = self.wait(Duration::from_secs(5)).await?;
                bail!("{} ended before it was ready ({status}); its log:\n{}", self.name, self.log())
            }
            Ok(Err(error)) => Err(error).with_context(|| format!("read what {} prints", self.name)),
            Err(_) => bail!("{} was not ready within {READY_WITHIN:?}; its log:\n{}", self.name, self.log()),
        }
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        let id = self.child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        let Some(id) = id else { bail!("{} has ended already", self.name) };
        kill_process(id, signal).with_context(|| format!("signal {}", self.name))
    }

    /// Waits for its end, at most `deadline`.
    pub async fn wait(&mut self, deadline: Duration) -> anyhow::Result<ExitStatus> {
        match tokio::time::timeout(deadline, self.child.wait()).await {
            Ok(status) => status.with_context(|| format!("wait for {}", self.name)),
            Err(_) => bail!("{} did not end within {deadline:?}; its log:\n{}", self.name, self.log()),
        }
    }

    /// Whether it has ended, and how.
    pub fn ended(&mut self) -> anyhow::Result<Option<ExitStatus>> {
        self.child.try_wait().with_context(|| format!("ask about {}", self.name))
    }

    /// Asks it to end (SIGTERM) and waits.
    pub async fn stop(&mut self, deadline: Duration) -> anyhow::Result<ExitStatus> {
        self.signal(Signal::TERM)?;
        self.wait(deadline).await
    }

    /// Ends it at once (SIGKILL) and waits.
    pub async fn kill(&mut self) -> anyhow::Result<()> {
        self.signal(Signal::KILL)?;
        self.wait(Duration::from_secs(5)).await.map(drop)
    }
}
