//! Identities as text that certificates and files carry: a SPIFFE ID (`spiffe://iommu/device/engine0/0000-00-01.0`) and the name of a file
//! (`device-0000-00-01.0.pem`).
//!
//! An identity has exactly one URI and a URI names exactly one identity: the parser takes what [`Identity::uri`] writes, and nothing
//! that merely means the same. SPIFFE allows letters, digits, dots, dashes and underscores in a path segment, so the colons of addresses and
//! owners are dashes here.

use std::fmt;
use std::str::FromStr;

use crate::{DeviceAddress, Identity, Owner, Role};

/// The trust domain: all identities of all servers that share an authority.
pub const TRUST_DOMAIN: &str = "iommu";

/// Longest name of a peer, in bytes.
pub const NAME_BYTES_MAX: usize = 64;

/// Whether a name is 1 to 64 letters, digits, dots, dashes or underscores, and not one that paths give another meaning.
pub fn is_name(name: &str) -> bool {
    (1..=NAME_BYTES_MAX).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b".-_".contains(&b))
        && !matches!(name, "." | "..")
}

/// A name that no certificate can carry.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{name:?} is not a name; use 1 to 64 letters, digits, dots, dashes or underscores")]
pub struct UnfitName {
    /// The name as given.
    pub name: String,
}

/// A URI that is no identity of ours.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{uri:?} is no identity: {why}; write spiffe://iommu/device/NAME/0000-00-01.0, spiffe://iommu/driver/NAME/driver-0, or \
     spiffe://iommu/ROLE/NAME"
)]
pub struct ParseIdentityError {
    /// The URI as given, cut where it is long.
    pub uri: String,
    /// What is wrong with it.
    pub why: &'static str,
}

/// Name of the file with the authority's certificate, beside those of peers.
pub const AUTHORITY_FILE: &str = "ca.crt";

/// Longest part of a foreign URI that an error repeats, in bytes.
const SHOWN_BYTES_MAX: usize = 200;

fn dashed(text: impl fmt::Display) -> String {
    text.to_string().replace(':', "-")
}

/// Reads what [`dashed`] wrote; nothing that prints otherwise.
fn undashed<T: FromStr + fmt::Display>(text: &str, colons: usize) -> Option<T> {
    let value: T = text.replacen('-', ":", colons).parse().ok()?;
    (dashed(&value) == text).then_some(value)
}

impl Role {
    /// The word for the role in URIs and names of files.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Device(_) => "device",
            Self::Driver(_) => "driver",
            Self::Bare => "bare",
            Self::Observer => "observer",
            Self::Operator => "operator",
            Self::Hypervisor => "hypervisor",
        }
    }
    /// What the role is about, where names alone do not tell peers apart.
    fn object(&self) -> Option<String> {
        match self {
            Self::Device(address) => Some(dashed(address)),
            Self::Driver(owner) => Some(dashed(owner)),
            Self::Bare | Self::Observer | Self::Operator | Self::Hypervisor => None,
        }
    }
}

impl Identity {
    /// The SPIFFE ID.
    pub fn uri(&self) -> Result<String, UnfitName> {
        if !is_name(&self.name) {
            return Err(UnfitName { name: self.name.clone() });
        }
        let (role, name) = (self.role.word(), &self.name);
        Ok(match self.role.object() {
            Some(object) => format!("spiffe://{TRUST_DOMAIN}/{role}/{name}/{object}"),
            None => format!("spiffe://{TRUST_DOMAIN}/{role}/{name}"),
        })
    }

    /// The identity of a SPIFFE ID.
    pub fn from_uri(uri: &str) -> Result<Self, ParseIdentityError> {
        let bad = |why| {
            let shown = uri.chars().take(SHOWN_BYTES_MAX).collect();
            ParseIdentityError { uri: shown, why }
        };
        let rest = uri.strip_prefix("spiffe://").ok_or_else(|| bad("its scheme is not spiffe"))?;
        let (domain, path) = rest.split_once('/').ok_or_else(|| bad("it has no path"))?;
        if domain != TRUST_DOMAIN {
            return Err(bad("its trust domain is not iommu"));
        }
        let segments: Vec<&str> = path.splitn(4, '/').collect();
        let (role, name, object) = match segments[..] {
            [role, name] => (role, name, None),
            [role, name, object] => (role, name, Some(object)),
            _ => return Err(bad("its path has neither two nor three parts")),
        };
        if !is_name(name) {
            return Err(bad("its second part is not a name"));
        }
        let role = match (role, object) {
            ("device", Some(object)) => {
                let address: DeviceAddress =
                    undashed(object, 2).ok_or_else(|| bad("its last part is no address"))?;
                Role::Device(address)
            }
            ("driver", Some(object)) => {
                let owner: Owner = undashed(object, 1).ok_or_else(|| bad("its last part is no owner"))?;
                Role::Driver(owner)
            }
            ("device" | "driver", None) => return Err(bad("it does not say which one")),
            ("bare", None) => Role::Bare,
            ("observer", None) => Role::Observer,
            ("operator", None) => Role::Operator,
            ("hypervisor", None) => Role::Hypervisor,
            ("bare" | "observer" | "operator" | "hypervisor", Some(_)) => {
                return Err(bad("its path is too long"));
            }
            _ => return Err(bad("it names no role")),
        };
        Ok(Self { name: name.to_owned(), role })
    }

    /// Name of the file that holds the certificate and the key. Devices and drivers are found by what they are for, since that is what
    /// they know of themselves; the others by their name.
    pub fn credential_file(&self) -> Result<String, UnfitName> {
        let role = self.role.word();
        match self.role.object() {
            Some(object) => Ok(format!("{role}-{object}.pem")),
            None if is_name(&self.name) => Ok(format!("{role}-{}.pem", self.name)),
            None => Err(UnfitName { name: self.name.clone() }),
        }
    }
}
