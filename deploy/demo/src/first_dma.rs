//! The orchestrator of the first protected DMA: server, agent and driver as three processes.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use iommu_launch::{AgentOptions, Process, Server, ServerOptions, binaries_beside};
use tokio::io::{AsyncBufReadExt, BufReader};

use crate::report::{self, Step, Told};

/// The whole demonstration takes a few seconds; a machine under load may need more.
const DRIVER_DEADLINE: Duration = Duration::from_secs(60);
/// Size of the file that is made when none is given.
const DEFAULT_FILE_BYTES: usize = 1 << 20;
/// The device and its driver, as the server's embedded configuration knows them.
const DEVICE: (&str, &str) = ("engine0", "00:01.0");

/// Runs it. `Ok(true)` when every step came out as expected.
pub(crate) async fn run(file: Option<PathBuf>, json: bool) -> anyhow::Result<bool> {
    if let Some(file) = &file {
        std::fs::metadata(file).with_context(|| format!("FILE: {}", file.display()))?;
    }
    report::progress(json, "building the binaries");
    let binaries = binaries_beside(env!("CARGO_PKG_NAME"))?;
    let started = Instant::now();
    let mut server = Server::start(&binaries, &ServerOptions::default()).await?;
    let mut agent = server.start_dma_engine(&AgentOptions {
        name: DEVICE.0.to_owned(),
        address: DEVICE.1.to_owned(),
        arguments: Vec::new(),
    })?;
    let file = match file {
        Some(file) => file,
        None => default_file(&server.path("payload.bin"))?,
    };
    let own = binaries.caller.as_deref().context("cargo did not say where this program is")?;
    let mut driver = start_driver(own, &server, &file)?;
    report::progress(
        json,
        &format!(
            "three processes: iommu-server {} at {}, dma-engine {} at {}, driver {}",
            number(&server.process),
            server.endpoint(),
            number(&agent),
            DEVICE.1,
            number(&driver)
        ),
    );
    let steps = match tokio::time::timeout(DRIVER_DEADLINE, follow(&mut driver, json)).await {
        Ok(steps) => steps,
        Err(_) => bail!("the driver was not done within {DRIVER_DEADLINE:?}"),
    }
    .with_context(|| {
        format!(
            "driver log:\n{}\nagent log:\n{}\nserver log:\n{}",
            driver.log(),
            agent.log(),
            server.process.log()
        )
    })?;
    let mut steps = steps;
    steps.push(graceful_end(&mut server, &mut agent).await?);
    report::close(json, "first-dma", &steps, started.elapsed())
}

fn number(process: &Process) -> String {
    process.id().map_or_else(|| "(ended)".to_owned(), |id| format!("(pid {id})"))
}

/// A file with contents that no accident repeats.
fn default_file(path: &Path) -> anyhow::Result<PathBuf> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let bytes: Vec<u8> = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 24) as u8
    })
    .take(DEFAULT_FILE_BYTES)
    .collect();
    std::fs::write(path, bytes).with_context(|| format!("write {}", path.display()))?;
    Ok(path.to_owned())
}

fn start_driver(own: &Path, server: &Server, file: &Path) -> anyhow::Result<Process> {
    let arguments = [
        "drive-first-dma".to_owned(),
        "--server".to_owned(),
        server.endpoint().to_owned(),
        "--device".to_owned(),
        DEVICE.1.to_owned(),
        "--file".to_owned(),
        file.display().to_string(),
    ];
    Process::start("driver", own, &arguments, server.path("driver.log"))
}

/// Passes on what the driver tells, until it ends.
async fn follow(driver: &mut Process, json: bool) -> anyhow::Result<Vec<Step>> {
    let mut lines = BufReader::new(driver.take_stdout().context("the driver's output is taken")?).lines();
    let mut steps = Vec::new();
    while let Some(line) = lines.next_line().await.context("read what the driver tells")? {
        match serde_json::from_str(&line).with_context(|| format!("the driver told {line:?}"))? {
            Told::Begin { name, story } => report::begin(json, &name, &story),
            Told::End(step) => {
                report::end(json, &step);
                steps.push(step);
            }
        }
    }
    let status = driver.wait(Duration::from_secs(5)).await?;
    if !status.success() {
        bail!("the driver ended with {status}");
    }
    Ok(steps)
}

/// The server drains and goes when it is asked to, and so does the agent.
async fn graceful_end(server: &mut Server, agent: &mut Process) -> anyhow::Result<Step> {
    let ended = server.process.stop(Duration::from_secs(10)).await?;
    let agent_ended = agent.stop(Duration::from_secs(10)).await?;
    Ok(Step {
        name: "graceful end".into(),
        expected: "SIGTERM drains the server; both end with exit code 0".into(),
        observed: format!("server: {ended}, agent: {agent_ended}"),
        passed: ended.success() && agent_ended.success(),
        details: Vec::new(),
    })
}
