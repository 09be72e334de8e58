//! The demonstrations: what the product does, shown with real processes and checked step by step.
//!
//! `cargo demo` builds the server, the device and the command line, starts them, and runs a driver as a process of its own; nothing here
//! reaches into the server but through the wire.

mod driver;
mod engine;
mod first_dma;
mod matrix;
mod modes;
mod records;
mod report;
mod stage;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Demonstrations of an IOMMU as a network service, with real processes.
///
/// Each ends with a table of what was expected and what came. Exit codes: 0 everything came out as expected; 1 something did not;
/// 2 wrong usage; 70 the demonstration itself could not run.
#[derive(Debug, Parser)]
#[command(name = "cargo demo", bin_name = "cargo demo", version, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    demonstration: Option<Demonstration>,
    /// Print one JSON document instead of words.
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum Demonstration {
    /// The first protected DMA: a file copied by a device, a packet received through a ring, and four forbidden accesses refused,
    /// recorded and explained. This is what runs when no name is given.
    FirstDma {
        /// The file that the device copies; without it, a file of 1 MiB that is made for the occasion.
        file: Option<PathBuf>,
    },
    /// The same attack in every protection mode: a device writes into a buffer right after its unmap. What becomes of the memory, what
    /// the hardware records, what the DMA sanitizer sees, and whom it blames.
    Modes,
    /// Every attack of the catalogue (31 rows) in every protection mode (7 columns), and the lecture's two tables: attacked for real, and compared
    /// with what must come.
    Matrix(matrix::Options),
    /// The driver of first-dma, run as a process of its own.
    #[command(hide = true)]
    DriveFirstDma(driver::Options),
    /// The driver of modes, run as a process of its own.
    #[command(hide = true)]
    DriveModes(modes::driver::Options),
    /// The operating system of the bare machine of modes, run as a process of its own.
    #[command(hide = true)]
    DriveNoProtection(modes::bare::Options),
    /// A driver, hypervisor or operating system of matrix, run as a process of its own.
    #[command(hide = true)]
    ActInMatrix(matrix::act::Options),
}

/// The demonstration could not run (`EX_SOFTWARE`).
const COULD_NOT_RUN: u8 = 70;

#[tokio::main]
async fn main() -> ExitCode {
    let cli = Cli::parse();
    let ended = match cli.demonstration {
        Some(Demonstration::DriveFirstDma(options)) => driver::run(options).await.map(|()| true),
        Some(Demonstration::DriveModes(options)) => modes::driver::run(options).await.map(|()| true),
        Some(Demonstration::DriveNoProtection(options)) => modes::bare::run(options).await.map(|()| true),
        Some(Demonstration::ActInMatrix(options)) => matrix::act::run(options).await.map(|()| true),
        Some(Demonstration::Matrix(options)) => matrix::run(options, cli.json).await,
        Some(Demonstration::Modes) => modes::run(cli.json).await,
        Some(Demonstration::FirstDma { file }) => first_dma::run(file, cli.json).await,
        None => first_dma::run(None, cli.json).await,
    };
    match ended {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            report::failure(&error);
            ExitCode::from(COULD_NOT_RUN)
        }
    }
}
