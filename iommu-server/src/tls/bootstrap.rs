//! The first start: an authority, a certificate for the server, and one for every peer that the configuration knows, so that nobody has to do
//! anything. Later starts issue what is missing, where the key of the authority is; nothing that is there is touched.

use std::path::PathBuf;

use iommu_pki::{
    AUTHORITY_DAYS, CREDENTIAL_DAYS, Directory, Overwrite, PkiError, SERVER, Usage, Validity, is_host,
};
use iommu_types::{Identity, Role};

use super::{Tls, TlsError};
use crate::config::{Config, Names};

/// The operator for whom a certificate is made where the configuration admits any: the name that `iommuctl` takes.
pub const OPERATOR: &str = "iommuctl";
/// The observer for whom a certificate is made where the configuration admits any.
pub const OBSERVER: &str = "observer";
/// The bare-machine client for whom a certificate is made where the configuration admits any.
pub const BARE: &str = "bare";
/// The hypervisor for whom a certificate is made where the configuration admits any.
pub const HYPERVISOR: &str = "hv0";

fn named(names: &Names, any: &str, role: Role) -> Vec<Identity> {
    let names = names.0.iter().map(|name| if name == "*" { any } else { name });
    names.map(|name| Identity { name: name.to_owned(), role }).collect()
}

/// Every peer that the configuration knows.
fn peers(config: &Config) -> Vec<Identity> {
    let devices = config
        .devices
        .iter()
        .map(|device| Identity { name: device.name.clone(), role: Role::Device(device.address) });
    let drivers = config
        .drivers
        .iter()
        .map(|driver| Identity { name: driver.name.clone(), role: Role::Driver(driver.owner) });
    let mut peers: Vec<Identity> = devices.chain(drivers).collect();
    peers.extend(named(&config.operators, OPERATOR, Role::Operator));
    peers.extend(named(&config.observers, OBSERVER, Role::Observer));
    peers.extend(named(&config.bare, BARE, Role::Bare));
    peers.extend(named(&config.hypervisors, HYPERVISOR, Role::Hypervisor));
    peers
}

/// Names and addresses under which the server is reached, as far as they can be known here.
fn hosts(config: &Config) -> Vec<String> {
    let addresses = config.listen.iter().map(std::net::SocketAddr::ip);
    let mut hosts: Vec<String> =
        addresses.filter(|address| !address.is_unspecified()).map(|address| address.to_string()).collect();
    let system = rustix::system::uname();
    hosts.extend(system.nodename().to_str().ok().filter(|name| is_host(name)).map(str::to_owned));
    hosts
}

/// What is there already stays, also when another server on this directory was quicker.
pub(super) fn unless_there<T>(issued: Result<T, PkiError>) -> Result<usize, PkiError> {
    match issued {
        Ok(_) => Ok(1),
        Err(PkiError::Exists { .. }) => Ok(0),
        Err(error) => Err(error),
    }
}

/// A file that is for somebody else stays; who finds it there must hear why it is refused.
pub(super) fn tell_of_another(directory: &Directory, peer: &Identity) {
    let Ok(path) = peer.credential_file().map(|name| directory.file(&name)) else { return };
    match Directory::show(&path).map(|shown| shown.usage) {
        Ok(Usage::Peer(other)) if other == *peer => {}
        Ok(Usage::Peer(other)) => {
            tracing::warn!(file = %path.display(), of = %other, configured = %peer, "the certificate is for another peer than the configuration has there; `iommuctl pki issue --force` makes another");
        }
        Ok(Usage::Server(_)) => tracing::warn!(file = %path.display(), "the certificate is for a server"),
        Err(error) => tracing::warn!(file = %path.display(), %error, "the certificate cannot be read"),
    }
}

fn fill(directory: &Directory, config: &Config) -> Result<(), TlsError> {
    if !directory.has_authority() && directory.file(SERVER).exists() {
        let remedy = "copy the authority's certificate (ca.crt) and list (ca.crl) beside server.pem";
        return Err(TlsError::Missing { path: directory.file(iommu_pki::AUTHORITY), remedy });
    }
    if directory.init(Validity::of_days(AUTHORITY_DAYS)?)? {
        tracing::info!(directory = %directory.path().display(), "made a certificate authority");
    }
    if !directory.has_authority_key() {
        return Ok(());
    }
    let validity = Validity::of_days(CREDENTIAL_DAYS)?;
    let mut issued = 0;
    if !directory.file(SERVER).exists() {
        issued += unless_there(directory.issue_server(&hosts(config), validity, None, Overwrite::Never))?;
    }
    for peer in peers(config) {
        if directory.has(&peer)? {
            tell_of_another(directory, &peer);
        } else {
            issued += unless_there(directory.issue(&peer, validity, None, Overwrite::Never))?;
        }
    }
    if issued > 0 {
        tracing::info!(directory = %directory.path().display(), issued, "issued certificates");
    }
    Ok(())
}

/// Certificates to serve with: those of the directory, which is filled first where it can be.
pub fn certificates(path: PathBuf, config: &Config) -> Result<Tls, TlsError> {
    let directory = Directory::at(path);
    fill(&directory, config)?;
    Tls::open(directory)
}
