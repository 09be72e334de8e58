//! The command line of `cargo measure`.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Parser, Subcommand};

const EXIT_CODES: &str = "\
Exit codes:
  0  every measurement ran, targets missed or not
  1  a measurement could not run
  2  the command line makes no sense
  3  with --require: every measurement ran, and a target was missed

Writes report.json and SVG plots into the directory `measure` of cargo's target directory.";

/// Measures this house, each figure beside a reference that is measured in the same run.
#[derive(Debug, Parser)]
#[command(name = "measure", version, after_help = EXIT_CODES)]
pub(crate) struct Cli {
    /// Another part that this binary plays.
    #[command(subcommand)]
    pub(crate) role: Option<Role>,
    /// Fewer and shorter rounds: done within a minute.
    #[arg(long)]
    pub(crate) quick: bool,
    /// Exit with 3 if a target is missed.
    #[arg(long)]
    pub(crate) require: bool,
    /// Only the figures whose names begin so; see --list.
    #[arg(long, value_name = "NAME", num_args = 1..)]
    pub(crate) only: Vec<String>,
    /// Print the report as JSON instead of a table.
    #[arg(long)]
    pub(crate) json: bool,
    /// Say which measurements there are, and measure nothing.
    #[arg(long)]
    pub(crate) list: bool,
}

/// What else this binary does.
#[derive(Debug, Subcommand)]
pub(crate) enum Role {
    /// The reference on the wire: decodes what a device or a driver sends and answers with as many bytes.
    #[command(hide = true)]
    EchoServer {
        /// TCP address to listen on.
        #[arg(long)]
        listen: SocketAddr,
        /// UNIX socket to listen on.
        #[arg(long)]
        listen_unix: PathBuf,
    },
}
