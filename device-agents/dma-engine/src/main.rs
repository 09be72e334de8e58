//! The agent binary: command line, logging, signals, exit codes.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;
use device_runtime::{Agent, Credentials, DEFAULT_ENDPOINT, EndReason, Reconnect};
use dma_engine::Engine;
use iommu_types::DeviceAddress;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

const ABOUT: &str = "A PCI copy engine behind a software IOMMU";

const TEACH: &str = "\
This process is one PCI function. It connects to an iommu-server, which brings it the register accesses of its driver and \
carries out its DMA; every address that it touches is translated, and refused unless the driver mapped it.

Name and address must be those that the server's configuration (or `iommuctl device declare`) gives the device, and its certificate must be \
for both. A server that is started on this machine makes certificates for the devices of its configuration, in a directory where this \
program looks by itself; for others: `iommuctl pki issue device 00:05.0 --name copy0`.

EXAMPLES
  dma-engine --name copy0 --address 0000:00:05.0
  dma-engine --server https://iommu.example:7450 --pki /etc/iommu --name copy0 --address 00:05.0
  dma-engine --server unix:///run/iommu.sock --name copy0 --address 00:05.0 --log debug
  dma-engine completion bash > /etc/bash_completion.d/dma-engine

EXIT CODES
   0  asked to stop (SIGTERM, SIGINT)
   3  fenced: a newer agent has taken over the address
  64  the command line or the endpoint is wrong
  69  no connection, and no attempts left
  76  the server or this agent broke the rules of the stream
  77  the server refused the name, the address or the certificate";

#[derive(Parser)]
#[command(version, about = ABOUT, after_long_help = TEACH, args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
struct Cli {
    /// Where the server listens: https://HOST:PORT, http://HOST:PORT (plaintext) or unix:///PATH
    #[arg(long, env = "IOMMU_SERVER", default_value = DEFAULT_ENDPOINT)]
    server: String,
    /// Directory with ca.crt and the certificates of peers [default: $XDG_STATE_HOME/iommu/pki or ~/.local/state/iommu/pki]
    #[arg(long, env = "IOMMU_PKI", value_name = "DIR")]
    pki: Option<PathBuf>,
    /// File with this device's certificate and key [default: device-ADDRESS.pem in the directory]
    #[arg(long, env = "IOMMU_CREDENTIAL", value_name = "FILE")]
    credential: Option<PathBuf>,
    /// File with the certificate of the authority [default: ca.crt in the directory]
    #[arg(long, env = "IOMMU_CA", value_name = "FILE")]
    ca: Option<PathBuf>,
    /// Name of the device in the server's configuration
    #[arg(long, env = "IOMMU_DEVICE_NAME", required = true)]
    name: Option<String>,
    /// PCI address of the device: segment:bus:device.function, as in 0000:00:05.0
    #[arg(long, env = "IOMMU_DEVICE_ADDRESS", required = true)]
    address: Option<DeviceAddress>,
    /// Attempts in a row to connect before giving up; without it, for ever
    #[arg(long, env = "IOMMU_CONNECT_ATTEMPTS")]
    attempts: Option<u32>,
    /// Go on trying when the server refuses the name or address, for a device that is declared later
    #[arg(long, env = "IOMMU_WAIT_FOR_DECLARATION")]
    wait_for_declaration: bool,
    /// What to log: error, warn, info, debug, trace, or a filter such as device_runtime=debug
    #[arg(long, env = "IOMMU_LOG", default_value = "info")]
    log: String,
    /// Log as JSON, one object a line
    #[arg(long, env = "IOMMU_LOG_JSON")]
    log_json: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Print a completion script for a shell
    Completion {
        /// Which shell
        shell: Shell,
    },
}

/// `EX_USAGE` of sysexits.h.
const USAGE: u8 = 64;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Nothing is left to do when even the message cannot be printed.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { USAGE } else { 0 });
        }
    };
    if let Some(Command::Completion { shell }) = cli.command {
        let mut script = Vec::new();
        clap_complete::generate(shell, &mut Cli::command(), "dma-engine", &mut script);
        // A reader that has seen enough (such as head) is no error.
        let _ = std::io::stdout().write_all(&script);
        return ExitCode::SUCCESS;
    }
    if let Err(error) = start_log(&cli) {
        let _ = Cli::command().error(clap::error::ErrorKind::ValueValidation, error).print();
        return ExitCode::from(USAGE);
    }
    let (Some(name), Some(address)) = (cli.name, cli.address) else {
        unreachable!("clap requires both without a subcommand");
    };
    let policy = Reconnect {
        attempts_max: cli.attempts,
        after_refused: cli.wait_for_declaration,
        ..Reconnect::STANDARD
    };
    let credentials = Credentials::from_flags(cli.pki, cli.credential, cli.ca);
    match run(cli.server, credentials, name, address, policy) {
        Ok(reason) => code_of(&reason),
        Err(error) => {
            tracing::error!(%error, "the agent could not start");
            ExitCode::FAILURE
        }
    }
}

fn start_log(cli: &Cli) -> Result<(), String> {
    let filter = EnvFilter::try_new(&cli.log).map_err(|error| format!("--log {:?}: {error}", cli.log))?;
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    if cli.log_json {
        log.json().init()
    } else {
        log.init()
    }
    Ok(())
}

#[tokio::main]
async fn run(
    server: String,
    credentials: Credentials,
    name: String,
    address: DeviceAddress,
    policy: Reconnect,
) -> anyhow::Result<EndReason> {
    let stop = CancellationToken::new();
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::spawn({
        let stop = stop.clone();
        async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            stop.cancel();
        }
    });
    tracing::info!(%server, name, device = %address, "copy engine starting");
    let agent =
        Agent::builder(server, name, address).credentials(credentials).reconnect(policy).stop_on(stop);
    let ended = agent.run(Engine::new()).await;
    Ok(ended.err().unwrap_or(EndReason::Cancelled))
}

/// Tells why the agent ended, and gives the exit code for it.
fn code_of(reason: &EndReason) -> ExitCode {
    let code = match reason {
        EndReason::Cancelled => 0,
        EndReason::Fenced(_) => 3,
        EndReason::BadEndpoint(_) => USAGE,
        EndReason::Lost(_) => 69,
        EndReason::Protocol(_) | EndReason::Ended(_) => 76,
        EndReason::Refused(_) | EndReason::Credential(_) => 77,
    };
    if code == 0 {
        tracing::info!("stopped as asked");
    } else {
        tracing::error!(%reason, "the agent ends");
    }
    ExitCode::from(code)
}
