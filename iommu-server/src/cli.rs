//! The command line. What it says is parsed into [`Config`](crate::config::Config) before a port is bound.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};
use iommu_proto::channel::DEFAULT_ENDPOINT;

const EXIT_CODES: &str = "\
Exit codes:
  0   drained and left on SIGTERM or SIGINT; for `healthcheck`: serving
  1   for `healthcheck`: not serving, or not reachable
  64  bad configuration: the message names the flag and the remedy
  69  an address cannot be bound
  70  the server could not go on (memory, boot, or a bug; see the log)
  75  the drain did not finish within its deadline, or a second signal forced it

When it is ready the server prints one line of JSON on standard output:
  {\"event\":\"ready\",\"listen\":[\"127.0.0.1:7450\"],\"unix\":[],\"admin\":\"127.0.0.1:7451\",\"pki\":\"/home/you/.local/state/iommu/pki\"}
Peers show a certificate of the authority in the --pki directory. The first start makes the authority, and certificates for the server, for every
device and driver of the configuration, and for an operator (iommuctl), an observer (observer), a bare-machine client (bare) and a hypervisor (hv0);
others are made by `iommuctl pki`. SIGHUP reads certificates anew, and so does a change of their files.
Logs go to standard error. Port 0 takes any free port; the ready line says which.";

/// An IOMMU that is a network service: physical memory, a VT-d remapping unit, and the host software that programs it.
#[derive(Debug, Parser)]
#[command(name = "iommu-server", version, after_help = EXIT_CODES, subcommand_negates_reqs = true, args_conflicts_with_subcommands = true)]
pub struct Cli {
    /// What to do instead of serving.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// How to serve.
    #[command(flatten)]
    pub serve: ServeArgs,
}

/// What else the binary does.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Asks a running server whether it serves (grpc.health.v1); exit code 0 if so.
    Healthcheck {
        /// Where it listens: https://HOST:PORT, http://HOST:PORT or unix:///PATH.
        #[arg(long, env = "IOMMU_SERVER", default_value = DEFAULT_ENDPOINT, value_name = "URL")]
        server: String,
        /// Directory with ca.crt and observer-observer.pem, as whom it asks.
        #[arg(long, env = "IOMMU_PKI", value_name = "DIR")]
        pki: Option<PathBuf>,
        /// File with the certificate and key of any peer, instead.
        #[arg(long, env = "IOMMU_CREDENTIAL", value_name = "FILE")]
        credential: Option<PathBuf>,
        /// File with the certificate of the authority, instead.
        #[arg(long, env = "IOMMU_CA", value_name = "FILE")]
        ca: Option<PathBuf>,
        /// How long to wait for the answer.
        #[arg(long, default_value = "2s", value_parser = humantime::parse_duration)]
        timeout: std::time::Duration,
    },
    /// Writes a completion script for a shell to standard output.
    Completion {
        /// Which shell.
        shell: clap_complete::Shell,
    },
}

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Human,
    /// One JSON object a line.
    Json,
}

/// The flags for serving; each has a twin in the environment.
#[derive(Debug, Default, clap::Args)]
pub struct ServeArgs {
    /// Accept TCP peers without TLS. Only on loopback addresses: peers then say themselves who they are, and the server checks only that its
    /// configuration knows them.
    #[arg(long, env = "IOMMU_INSECURE_PLAINTEXT")]
    pub insecure_plaintext: bool,
    /// Address to listen on; repeat for more [default: 127.0.0.1:7450, unless --listen-unix is given].
    #[arg(long, env = "IOMMU_LISTEN", value_name = "ADDRESS", value_delimiter = ',')]
    pub listen: Vec<SocketAddr>,
    /// UNIX socket to listen on; repeat for more. A stale socket file is removed. There is no TLS on it: peers are let in by their user
    /// (--unix-uid) and say themselves who they are.
    #[arg(long, env = "IOMMU_LISTEN_UNIX", value_name = "PATH", value_delimiter = ',')]
    pub listen_unix: Vec<PathBuf>,
    /// User whose processes may connect over UNIX sockets, besides the server's own and root; repeat for more.
    #[arg(long, env = "IOMMU_UNIX_UID", value_name = "UID", value_delimiter = ',')]
    pub unix_uid: Vec<u32>,
    /// Directory with certificates [default: $XDG_STATE_HOME/iommu/pki or ~/.local/state/iommu/pki]; filled at the first start.
    #[arg(long, env = "IOMMU_PKI", value_name = "DIR")]
    pub pki: Option<PathBuf>,
    /// Address for /metrics, /healthz and /readyz over HTTP [default: 127.0.0.1:7451]; `off` for none.
    #[arg(long, env = "IOMMU_ADMIN", value_name = "ADDRESS")]
    pub admin: Option<String>,
    /// Physical memory, such as 1GiB [default: 1GiB].
    #[arg(long, env = "IOMMU_MEMORY", value_name = "SIZE")]
    pub memory: Option<String>,
    /// File that holds physical memory; must not exist yet. Without it memory is anonymous.
    #[arg(long, env = "IOMMU_MEMORY_FILE", value_name = "PATH")]
    pub memory_file: Option<PathBuf>,
    /// TOML file with the same settings, devices and drivers; flags win over it.
    #[arg(long, env = "IOMMU_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// A device: ADDRESS=NAME, or ADDRESS=NAME@OWNER to give it to an owner, as in 00:01.0=engine0@driver:0; repeat for more.
    #[arg(long, env = "IOMMU_DEVICE", value_name = "DEVICE", value_delimiter = ',')]
    pub device: Vec<String>,
    /// A driver: OWNER=NAME, as in driver:0=driver0; repeat for more.
    #[arg(long, env = "IOMMU_DRIVER", value_name = "DRIVER", value_delimiter = ',')]
    pub driver: Vec<String>,
    /// How long the memory and mappings of a driver outlive its connection, such as 5s [default: 5s].
    #[arg(long, env = "IOMMU_GRACE", value_name = "TIME")]
    pub grace: Option<String>,
    /// How long streams may take to end after SIGTERM [default: 5s].
    #[arg(long, env = "IOMMU_DRAIN_DEADLINE", value_name = "TIME")]
    pub drain_deadline: Option<String>,
    /// How often a peer is pinged, and how long it may take to answer; a silent partition is noticed after both [default: 5s].
    #[arg(long, env = "IOMMU_KEEPALIVE", value_name = "TIME")]
    pub keepalive: Option<String>,
    /// How long a peer may leave its stream unread while something is to be sent, before it loses it [default: 10s].
    #[arg(long, env = "IOMMU_STREAM_STALLED", value_name = "TIME")]
    pub stream_stalled: Option<String>,
    /// How log lines look [default: human].
    #[arg(long, env = "IOMMU_LOG_FORMAT", value_name = "FORMAT", value_enum)]
    pub log_format: Option<LogFormat>,
    /// What is logged, as a tracing filter [default: info].
    #[arg(long, env = "IOMMU_LOG", value_name = "FILTER")]
    pub log: Option<String>,
}
