//! What a certificate says: whose it is, its serial number, until when.

use std::fmt;
use std::str::FromStr;

use iommu_types::{Identity, ParseIdentityError};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// Longest serial number, in bytes (RFC 5280 §4.1.2.2).
const SERIAL_BYTES_MAX: usize = 20;

/// The serial number of a certificate, without leading zeros. Printed in hexadecimal.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Serial(Vec<u8>);

impl Serial {
    /// Of big-endian bytes.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let first = bytes.iter().position(|byte| *byte != 0).unwrap_or(bytes.len());
        Self(bytes.get(first..).unwrap_or_default().to_vec())
    }
    /// As big-endian bytes, without leading zeros.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Display for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text that is no serial number.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no serial number; write its hexadecimal digits as `iommuctl pki list` does")]
pub struct ParseSerialError {
    text: String,
}

impl FromStr for Serial {
    type Err = ParseSerialError;
    fn from_str(text: &str) -> Result<Self, ParseSerialError> {
        let bad = || ParseSerialError { text: text.to_owned() };
        let fits = (2..=2 * SERIAL_BYTES_MAX).contains(&text.len()) && text.len().is_multiple_of(2);
        if !fits || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(bad());
        }
        let pairs = (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16));
        pairs.collect::<Result<Vec<_>, _>>().map(|bytes| Self::from_bytes(&bytes)).map_err(|_| bad())
    }
}

/// A certificate that identifies nobody.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnfitCertificate {
    /// It does not parse.
    #[error("the certificate does not parse: {why}")]
    Malformed {
        /// What the parser said.
        why: String,
    },
    /// It has no URI among its alternative names.
    #[error("the certificate names no identity: it has no URI among its alternative names")]
    NoIdentity,
    /// It has several.
    #[error("the certificate names {count} URIs, and a peer is one identity")]
    SeveralIdentities {
        /// How many.
        count: usize,
    },
    /// The URI is not one of ours.
    #[error(transparent)]
    NotOurs(#[from] ParseIdentityError),
}

/// What a certificate is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Usage {
    /// A peer that connects.
    Peer(Identity),
    /// A server under these names.
    Server(Vec<String>),
}

/// What a certificate says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerCertificate {
    /// Whose it is.
    pub identity: Identity,
    /// Its number.
    pub serial: Serial,
    /// The last second of its validity, since the UNIX epoch.
    pub not_after_unix_s: u64,
}

impl PeerCertificate {
    /// Reads the certificate of a peer. Whether it is genuine was settled before; this says only what it says. Exactly one URI, and one of
    /// ours: with two, it would be for whoever reads it to choose.
    pub fn read(der: &[u8]) -> Result<Self, UnfitCertificate> {
        let certificate = parse(der)?;
        let uris: Vec<&str> = names(&certificate)?
            .into_iter()
            .filter_map(|name| if let GeneralName::URI(uri) = name { Some(*uri) } else { None })
            .collect();
        let identity = match uris[..] {
            [] => return Err(UnfitCertificate::NoIdentity),
            [uri] => Identity::from_uri(uri)?,
            _ => return Err(UnfitCertificate::SeveralIdentities { count: uris.len() }),
        };
        Ok(Self { identity, serial: serial(&certificate), not_after_unix_s: not_after(&certificate) })
    }
}

/// Last second of the validity of any certificate, since the UNIX epoch.
pub fn not_after_unix_s(der: &[u8]) -> Result<u64, UnfitCertificate> {
    Ok(not_after(&parse(der)?))
}

pub(crate) fn parse(der: &[u8]) -> Result<X509Certificate<'_>, UnfitCertificate> {
    let malformed = |why: String| UnfitCertificate::Malformed { why };
    let (rest, certificate) = X509Certificate::from_der(der).map_err(|error| malformed(error.to_string()))?;
    if !rest.is_empty() {
        return Err(malformed("bytes follow it".to_owned()));
    }
    Ok(certificate)
}

fn names<'c>(certificate: &'c X509Certificate<'_>) -> Result<Vec<&'c GeneralName<'c>>, UnfitCertificate> {
    let names = certificate.subject_alternative_name();
    let names = names.map_err(|error| UnfitCertificate::Malformed { why: error.to_string() })?;
    Ok(names.map(|names| names.value.general_names.iter().collect()).unwrap_or_default())
}

pub(crate) fn serial(certificate: &X509Certificate<'_>) -> Serial {
    Serial::from_bytes(certificate.raw_serial())
}

pub(crate) fn not_after(certificate: &X509Certificate<'_>) -> u64 {
    u64::try_from(certificate.validity().not_after.timestamp()).unwrap_or(0)
}

/// What any certificate of the directory is for.
pub(crate) fn usage(certificate: &X509Certificate<'_>) -> Result<Usage, UnfitCertificate> {
    let server = certificate.extended_key_usage().ok().flatten().is_some_and(|usage| usage.value.server_auth);
    if !server {
        return PeerCertificate::read(certificate.as_raw()).map(|peer| Usage::Peer(peer.identity));
    }
    let hosts = names(certificate)?.into_iter().filter_map(|name| match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        GeneralName::IPAddress(bytes) => address(bytes),
        _ => None,
    });
    Ok(Usage::Server(hosts.collect()))
}

fn address(bytes: &[u8]) -> Option<String> {
    let four = <[u8; 4]>::try_from(bytes).map(std::net::IpAddr::from);
    four.or_else(|_| <[u8; 16]>::try_from(bytes).map(std::net::IpAddr::from)).ok().map(|ip| ip.to_string())
}
