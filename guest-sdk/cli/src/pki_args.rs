//! The command line of `iommuctl pki`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};
use iommu_pki::Serial;
use iommu_types::{DeviceAddress, Identity, Owner, Role};

#[derive(Debug, Subcommand)]
pub(crate) enum PkiCommand {
    /// Makes a certificate authority in the directory, unless there is one.
    ///
    /// iommu-server does the same at its first start, and issues certificates for everybody in its configuration; this is for those who keep the
    /// key of the authority elsewhere. Then: iommuctl pki issue server --host NAME, and one `issue` for each peer; copy ca.crt, ca.crl and
    /// server.pem to the server, and ca.crt with its own file to each peer.
    Init {
        /// How long it is to live.
        #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, default_value = "3650d")]
        valid: Duration,
    },
    /// Issues a certificate with its key, in one file that only you may read.
    ///
    /// A running server and running peers take a new file by themselves; so `--force` rotates.
    ///
    /// Example: iommuctl pki issue device 00:01.0 --name engine0 --valid 30d
    Issue {
        /// For whom.
        #[command(subcommand)]
        subject: Subject,
    },
    /// Revokes every certificate that was issued for a peer, or one by its number.
    ///
    /// Servers that use the directory read the list within a second and end the connections of whoever is on it; other servers need the new
    /// ca.crl. A certificate that is issued afterwards is good.
    ///
    /// Example: iommuctl pki revoke device 00:01.0
    Revoke {
        /// Whose.
        #[command(subcommand)]
        whose: Whose,
    },
    /// Everything that was issued, oldest first: for whom, until when, and whether it still counts.
    List,
    /// What the certificate in a file says.
    ///
    /// Example: iommuctl pki show operator-iommuctl.pem
    Show {
        /// The file; a bare name is looked for in the directory too.
        file: PathBuf,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Terms {
    /// How long it is to live.
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, default_value = "365d")]
    pub(crate) valid: Duration,
    /// Write it to this file instead of the one in the directory where the peer looks.
    #[arg(long, value_name = "FILE")]
    pub(crate) out: Option<PathBuf>,
    /// Replace a file that is there.
    #[arg(long)]
    pub(crate) force: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Subject {
    /// For the agent of a device.
    Device {
        /// Where it sits.
        device: DeviceAddress,
        /// Name with which its agent says Hello.
        #[arg(long, required = true)]
        name: String,
        #[command(flatten)]
        terms: Terms,
    },
    /// For the driver of an owner.
    Driver {
        /// driver:NUMBER or vm:NUMBER.
        owner: Owner,
        /// Name with which it opens its session.
        #[arg(long, required = true)]
        name: String,
        #[command(flatten)]
        terms: Terms,
    },
    /// For a peer that has virtual machines.
    Hypervisor(Plain),
    /// For a client of bare machines.
    Bare(Plain),
    /// For one who may look.
    Observer(Plain),
    /// For one who may look and steer, such as iommuctl.
    Operator(Plain),
    /// For a server. Good for localhost, 127.0.0.1 and ::1, and for the hosts given.
    Server {
        /// Name or address under which peers reach it; repeat for more.
        #[arg(long, value_name = "HOST")]
        host: Vec<String>,
        #[command(flatten)]
        terms: Terms,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Plain {
    /// Name with which it opens its session.
    #[arg(value_name = "NAME")]
    pub(crate) peer: String,
    #[command(flatten)]
    pub(crate) terms: Terms,
}

impl Subject {
    /// The peer; none for a server.
    pub(crate) fn identity(&self) -> Option<Identity> {
        let identity = |name: &String, role| Some(Identity { name: name.clone(), role });
        match self {
            Self::Device { device, name, .. } => identity(name, Role::Device(*device)),
            Self::Driver { owner, name, .. } => identity(name, Role::Driver(*owner)),
            Self::Hypervisor(plain) => identity(&plain.peer, Role::Hypervisor),
            Self::Bare(plain) => identity(&plain.peer, Role::Bare),
            Self::Observer(plain) => identity(&plain.peer, Role::Observer),
            Self::Operator(plain) => identity(&plain.peer, Role::Operator),
            Self::Server { .. } => None,
        }
    }
    pub(crate) fn terms(&self) -> &Terms {
        match self {
            Self::Device { terms, .. } | Self::Driver { terms, .. } | Self::Server { terms, .. } => terms,
            Self::Hypervisor(plain) | Self::Bare(plain) | Self::Observer(plain) | Self::Operator(plain) => {
                &plain.terms
            }
        }
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum Whose {
    /// Those of the device at an address, under any name.
    Device {
        /// Which.
        device: DeviceAddress,
    },
    /// Those of the driver of an owner, under any name.
    Driver {
        /// Which.
        owner: Owner,
    },
    /// Those of a hypervisor.
    Hypervisor {
        /// Which.
        #[arg(value_name = "NAME")]
        peer: String,
    },
    /// Those of a client of bare machines.
    Bare {
        /// Which.
        #[arg(value_name = "NAME")]
        peer: String,
    },
    /// Those of an observer.
    Observer {
        /// Which.
        #[arg(value_name = "NAME")]
        peer: String,
    },
    /// Those of an operator.
    Operator {
        /// Which.
        #[arg(value_name = "NAME")]
        peer: String,
    },
    /// One certificate, by its number as `list` shows it.
    Serial {
        /// In hexadecimal.
        serial: Serial,
    },
}

impl Whose {
    /// Whether a certificate of this peer is meant.
    pub(crate) fn is(&self, identity: &Identity) -> bool {
        match self {
            Self::Device { device } => identity.role == Role::Device(*device),
            Self::Driver { owner } => identity.role == Role::Driver(*owner),
            Self::Hypervisor { peer } => identity.role == Role::Hypervisor && identity.name == *peer,
            Self::Bare { peer } => identity.role == Role::Bare && identity.name == *peer,
            Self::Observer { peer } => identity.role == Role::Observer && identity.name == *peer,
            Self::Operator { peer } => identity.role == Role::Operator && identity.name == *peer,
            Self::Serial { .. } => false,
        }
    }
}
