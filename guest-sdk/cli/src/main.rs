//! `iommuctl`: see and steer an IOMMU server from the command line.
//!
//! Everything goes through [`guest_sdk`]; what is printed for people and what is printed for programs (`--json`) come from the same
//! values.

mod args;
mod ask;
mod domains;
mod function;
mod json;
mod memory;
mod pki;
mod pki_args;
mod print;
mod reports;
mod sanitizer;
mod session;
mod session_file;
mod steer;
mod vm;
mod words;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use guest_sdk::errors::SessionError;
use guest_sdk::{Connection, Credentials, Operator, SdkError, TransportError};

use args::{Cli, Command};

/// The server refused or failed.
const FAILED: u8 = 1;
/// The command line is wrong; clap uses the same.
const WRONG_USAGE: u8 = 2;
/// The access that was asked about would be refused.
const WOULD_BE_REFUSED: u8 = 3;
/// The server cannot be reached (`EX_UNAVAILABLE`).
const UNREACHABLE: u8 = 69;

/// How a command ended when it did not fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ended {
    Done,
    WouldBeRefused,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Command::Completion { shell } = cli.command {
        let mut script = Vec::new();
        clap_complete::generate(shell, &mut Cli::command(), "iommuctl", &mut script);
        print::write(&script);
        return ExitCode::SUCCESS;
    }
    if let Command::Pki(command) = &cli.command {
        return match pki::run(print::Output { json: cli.json }, cli.pki.clone(), command) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                print::error(&format_args!("{error:#}"));
                ExitCode::from(FAILED)
            }
        };
    }
    match run(&cli).await {
        Ok(Ended::Done) => ExitCode::SUCCESS,
        Ok(Ended::WouldBeRefused) => ExitCode::from(WOULD_BE_REFUSED),
        Err(error) => {
            print::error(&format_args!("{error:#}"));
            ExitCode::from(exit_code(&error))
        }
    }
}

/// What a failure is told with. Only opening a session ends with a session's error.
fn exit_code(error: &anyhow::Error) -> u8 {
    match error.downcast_ref::<SdkError<SessionError>>() {
        Some(SdkError::Transport(TransportError::BadEndpoint(_))) => WRONG_USAGE,
        Some(SdkError::Transport(TransportError::StateLost | TransportError::Credential(_))) => FAILED,
        Some(SdkError::Transport(_)) => UNREACHABLE,
        Some(SdkError::Refused(_) | SdkError::Call(_)) | None => FAILED,
    }
}

/// Where a session is opened, in whatever role.
fn connection(cli: &Cli) -> Connection {
    let credentials = Credentials::from_flags(cli.pki.clone(), cli.credential.clone(), cli.ca.clone());
    Connection::to(&cli.server).credentials(credentials)
}

async fn run(cli: &Cli) -> anyhow::Result<Ended> {
    let out = print::Output { json: cli.json };
    match &cli.command {
        Command::Vm(command) => vm::run(cli, out, command).await.map(|()| Ended::Done),
        Command::Function(command) => function::run(cli, out, command).await.map(|()| Ended::Done),
        _ => run_as_operator(&connection(cli).operator(&cli.name).await?, cli, out).await,
    }
}

async fn run_as_operator(operator: &Operator, cli: &Cli, out: print::Output) -> anyhow::Result<Ended> {
    match &cli.command {
        Command::Status => ask::status(operator, out).await?,
        Command::Domains { domain, owner } => domains::run(operator, out, *domain, *owner).await?,
        Command::Mappings { domain, from, skip, limit } => {
            ask::mappings(operator, out, *domain, *from, *skip, *limit).await?
        }
        Command::Translate(access) => return ask::translate(operator, out, access).await,
        Command::Explain(access) => return ask::explain(operator, out, access).await,
        Command::Tables { device, without_page_tables } => {
            ask::tables(operator, out, *device, *without_page_tables).await?;
        }
        Command::Iotlb { domain, limit } => ask::iotlb(operator, out, *domain, *limit).await?,
        Command::Counters => ask::counters(operator, out).await?,
        Command::Fault(command) => ask::faults(operator, out, command).await?,
        Command::Sanitizer(command) => sanitizer::run(operator, out, command).await?,
        Command::Device(command) => steer::device(operator, out, command).await?,
        Command::Owner(command) => steer::owner(operator, out, command).await?,
        Command::Mmio(command) => steer::mmio(operator, out, command).await?,
        Command::Memory(command) => memory::run(operator, out, command).await?,
        Command::Limits { owner } => ask::limits(operator, out, *owner).await?,
        Command::Vm(_) | Command::Function(_) | Command::Completion { .. } | Command::Pki(_) => {}
    }
    Ok(Ended::Done)
}
