//! The command line of `cargo measure`.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Parser, Subcommand};

use crate::modes::counted::DmaPath;
use crate::tenants::actor;

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
    /// A part of the measurements, or another part that this binary plays.
    #[command(subcommand)]
    pub(crate) role: Option<Role>,
    /// Fewer and shorter rounds: done within a minute.
    #[arg(long, global = true)]
    pub(crate) quick: bool,
    /// Exit with 3 if a target is missed.
    #[arg(long, global = true)]
    pub(crate) require: bool,
    /// Only the figures whose names begin so; see --list.
    #[arg(long, value_name = "NAME", num_args = 1.., global = true)]
    pub(crate) only: Vec<String>,
    /// Unit costs for the modelled cycles of `modes`, instead of those of the rIOMMU paper (deploy/bench/costs).
    #[arg(long, value_name = "FILE", global = true)]
    pub(crate) costs: Option<PathBuf>,
    /// Print the report as JSON instead of a table.
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Say which measurements there are, and measure nothing.
    #[arg(long, global = true)]
    pub(crate) list: bool,
}

impl Cli {
    /// What the figures' names begin with; nothing means all of them.
    pub(crate) fn words(&self) -> Vec<String> {
        let part = match self.role {
            Some(Role::Modes) => MODES,
            Some(Role::Tenants) => TENANTS,
            _ => return self.only.clone(),
        };
        if self.only.is_empty() {
            return vec![part.to_owned()];
        }
        let told = |word: &String| {
            if word.starts_with(part) { word.clone() } else { format!("{part}-{word}") }
        };
        self.only.iter().map(told).collect()
    }
}

/// What the names of the measurements of protection modes begin with.
const MODES: &str = "modes";
/// Of those of tenants.
const TENANTS: &str = "tenants";

/// What this binary does.
#[derive(Debug, Subcommand)]
pub(crate) enum Role {
    /// Only what each protection mode costs and what each shortcut gives up; options as without it.
    ///
    /// A replay of a NIC's rings in every mode, as event counts, modelled cycles and time, and what stands around it. Options as without
    /// it; names may be told without their "modes-". Instructions are counted where `valgrind` is installed.
    Modes,
    /// Only what tenants cost and what they do to each other; options as without it.
    ///
    /// A device that is assigned and one that is shared in software, mutual TLS beside plaintext, and a tenant beside a neighbour who floods. Options
    /// as without it; names may be told without their "tenants-".
    Tenants,
    /// A peer of the server in `tenants`: a hypervisor, a guest, or a device, asked on standard input.
    #[command(hide = true)]
    Tenant(actor::Options),
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
    /// What `modes-sanitizer` counts instructions of: batches of DMA, in this process.
    #[command(hide = true)]
    CountDma {
        /// How the batches reach their device's domain.
        #[arg(long)]
        path: DmaPath,
        /// DMA in each batch.
        #[arg(long)]
        operations: u32,
        /// How many batches.
        #[arg(long)]
        batches: u32,
    },
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::Cli;

    fn check(line: &str, words: &[&str]) {
        let cli = Cli::try_parse_from(line.split(' ')).expect(line);
        assert_eq!(cli.words(), words, "{line}");
        assert_eq!(cli.quick, line.contains("--quick"), "{line}");
    }

    #[test]
    fn modes_is_a_part_of_the_measurements_with_the_same_options() {
        check("measure", &[]);
        check("measure --quick --only start dma", &["start", "dma"]);
        check("measure modes", &["modes"]);
        check("measure --quick modes", &["modes"]);
        check("measure modes --quick --json --only rings modes-walk", &["modes-rings", "modes-walk"]);
        check("measure tenants --quick", &["tenants"]);
        check("measure --quick tenants --only isolation", &["tenants-isolation"]);
        check("measure modes --costs x.toml --quick", &["modes"]);
    }
}
