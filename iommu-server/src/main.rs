//! The server binary: parse, log, build, listen, wait for a signal, drain.

use std::io::Write as _;
use std::process::ExitCode;
use std::sync::Arc;

use clap::{CommandFactory, Parser};
use iommu_proto::credentials::Credentials;
use iommu_server::cli::{Cli, Command};
use iommu_server::config::{Config, ConfigError};
use iommu_server::drain::Drained;
use iommu_server::host::{Host, StartError};
use iommu_server::server::{Server, ServerError};
use iommu_server::{admin_http, healthcheck, telemetry};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Payloads of a megabyte come and go thousands of times a second; the C library's allocator gives their pages back to the system
/// each time and takes them again, fault by fault (measured: half of the bytes per second).
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const UNHEALTHY: u8 = 1;
const BAD_CONFIGURATION: u8 = 64;
const CANNOT_BIND: u8 = 69;
const BROKEN: u8 = 70;
const NOT_DRAINED: u8 = 75;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Nobody is left to tell when even this cannot be printed.
            let _printed = error.print();
            return if error.use_stderr() { ExitCode::from(BAD_CONFIGURATION) } else { ExitCode::SUCCESS };
        }
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(reason) => return fail(BROKEN, &format!("the runtime does not start: {reason}")),
    };
    let code = match cli.command {
        Some(Command::Completion { shell }) => {
            clap_complete::generate(shell, &mut Cli::command(), "iommu-server", &mut std::io::stdout());
            ExitCode::SUCCESS
        }
        Some(Command::Healthcheck { server, pki, credential, ca, timeout }) => {
            let credentials = Credentials::from_flags(pki, credential, ca);
            match runtime.block_on(healthcheck::healthcheck(&server, &credentials, timeout)) {
                Ok(true) => ExitCode::SUCCESS,
                Ok(false) => fail(UNHEALTHY, &format!("{server} is not serving")),
                Err(why) => fail(UNHEALTHY, &why),
            }
        }
        None => match Config::from_args(cli.serve) {
            Ok(config) => runtime.block_on(run(config)),
            Err(error) => refuse(&error),
        },
    };
    // Blocking work that is still under way must not hold up the end.
    runtime.shutdown_background();
    code
}

fn fail(code: u8, why: &str) -> ExitCode {
    // Standard error may be closed; the exit code still says it.
    let _written = writeln!(std::io::stderr(), "iommu-server: {why}");
    ExitCode::from(code)
}

fn refuse(error: &ConfigError) -> ExitCode {
    fail(BAD_CONFIGURATION, &error.to_string())
}

async fn run(config: Config) -> ExitCode {
    if let Err(error) = telemetry::start(&config.log, config.log_format) {
        return refuse(&error);
    }
    let signals =
        (signal(SignalKind::terminate()), signal(SignalKind::interrupt()), signal(SignalKind::hangup()));
    let (Ok(terminate), Ok(interrupt), Ok(hangup)) = signals else {
        return fail(BROKEN, "signals cannot be received");
    };
    let deadline = config.drain_deadline;
    let admin = match config.admin {
        None => None,
        Some(address) => match admin_http::bind(address).await {
            Ok(listener) => Some(listener),
            Err(reason) => {
                let remedy = "stop whoever uses it, or give another --admin, or --admin off";
                return fail(
                    CANNOT_BIND,
                    &format!("cannot listen on {address}: {reason}\n  remedy: {remedy}"),
                );
            }
        },
    };
    let server = match Server::start(config).await {
        Ok(server) => server,
        Err(ServerError::Bind(error)) => return fail(CANNOT_BIND, &error.to_string()),
        Err(ServerError::Start(StartError::Tls(error))) => {
            return fail(BAD_CONFIGURATION, &error.to_string());
        }
        Err(error) => return fail(BROKEN, &error.to_string()),
    };
    let admin_address = admin.as_ref().and_then(|listener| listener.local_addr().ok());
    if let Some(listener) = admin {
        tokio::spawn(admin_http::serve(listener, Arc::clone(&server.host)));
    }
    tokio::spawn(reload_on(hangup, Arc::clone(&server.host)));
    let memory = tokio::task::spawn_blocking({
        let host = Arc::clone(&server.host);
        move || preallocate(&host)
    });
    if let Err(reason) = print_ready(&server, admin_address) {
        tracing::warn!(%reason, "the ready line was not written");
    }
    end(server, terminate, interrupt, memory, deadline).await
}

/// Reads certificates anew at every SIGHUP.
async fn reload_on(mut hangup: Signal, host: Arc<Host>) {
    while hangup.recv().await.is_some() {
        match &host.tls {
            Some(tls) => tls.reload_soon(),
            None => tracing::info!("SIGHUP: there are no certificates to read anew"),
        }
    }
}

/// Allocates physical memory behind the server's back (ADR 0003).
fn preallocate(host: &Host) -> Result<(), String> {
    host.kernel.memory().preallocate().map_err(|error| error.to_string())
}

/// The line that programs wait for.
#[derive(serde::Serialize)]
struct Ready<'a> {
    event: &'static str,
    listen: &'a [std::net::SocketAddr],
    unix: &'a [std::path::PathBuf],
    admin: Option<std::net::SocketAddr>,
    pki: Option<&'a std::path::Path>,
}

fn print_ready(server: &Server, admin: Option<std::net::SocketAddr>) -> std::io::Result<()> {
    let pki = server.host.tls.as_ref().map(|tls| tls.directory());
    let ready = Ready { event: "ready", listen: &server.listen, unix: &server.unix, admin, pki };
    let line = serde_json::to_string(&ready)?;
    tracing::info!(listen = ?server.listen, unix = ?server.unix, ?admin, ?pki, "ready");
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{line}")?;
    stdout.flush()
}

/// Waits for a signal or a fatal failure, then drains; a second signal forces the end.
async fn end(
    server: Server,
    mut terminate: Signal,
    mut interrupt: Signal,
    memory: tokio::task::JoinHandle<Result<(), String>>,
    deadline: std::time::Duration,
) -> ExitCode {
    let failed = async {
        match memory.await {
            Ok(Ok(())) => std::future::pending().await,
            Ok(Err(why)) => why,
            Err(_) => "allocating physical memory ended early".to_owned(),
        }
    };
    let why = tokio::select! {
        _ = terminate.recv() => None,
        _ = interrupt.recv() => None,
        why = failed => Some(why),
    };
    if let Some(why) = &why {
        tracing::error!(reason = why, "physical memory cannot be allocated");
    }
    tracing::info!(deadline_ms = deadline.as_millis() as u64, "draining");
    let drained = tokio::select! {
        drained = server.drain(deadline) => drained,
        _ = terminate.recv() => Drained::Late,
        _ = interrupt.recv() => Drained::Late,
    };
    match (why, drained) {
        (Some(why), _) => fail(BROKEN, &why),
        (None, Drained::Cleanly) => ExitCode::SUCCESS,
        (None, Drained::Late) => fail(NOT_DRAINED, "the drain did not finish"),
    }
}
