//! Who is who: owners of memory and devices, roles of peers, and the counters that fence old sessions.

use std::fmt;
use std::str::FromStr;

use crate::DeviceAddress;

/// Who owns memory, domains and devices. Printed `driver:3`, `vm:1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Owner {
    /// A driver of the host (a driver domain of its own).
    Driver(u32),
    /// A virtual machine.
    Vm(u32),
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Driver(number) => write!(f, "driver:{number}"),
            Self::Vm(number) => write!(f, "vm:{number}"),
        }
    }
}

/// A text that names no owner.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not an owner; write driver:NUMBER or vm:NUMBER")]
pub struct ParseOwnerError {
    /// The text as given.
    pub text: String,
}

impl FromStr for Owner {
    type Err = ParseOwnerError;
    fn from_str(text: &str) -> Result<Self, ParseOwnerError> {
        let parse = || {
            let (kind, number) = text.split_once(':')?;
            // `parse` would take a sign as well.
            let number = number.bytes().all(|b| b.is_ascii_digit()).then(|| number.parse().ok())??;
            match kind {
                "driver" => Some(Self::Driver(number)),
                "vm" => Some(Self::Vm(number)),
                _ => None,
            }
        };
        parse().ok_or_else(|| ParseOwnerError { text: text.to_owned() })
    }
}

/// What a peer may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// The PCI function at an address.
    Device(DeviceAddress),
    /// The driver software of an owner.
    Driver(Owner),
    /// Owner of bare machines that it creates.
    Bare,
    /// May look, may not touch.
    Observer,
    /// May look, declare devices and attach them, and read and write memory.
    Operator,
    /// Creates virtual machines and owns them.
    Hypervisor,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Device(address) => write!(f, "device {address}"),
            Self::Driver(owner) => write!(f, "driver of {owner}"),
            Self::Bare => f.write_str("bare-machine client"),
            Self::Observer => f.write_str("observer"),
            Self::Operator => f.write_str("operator"),
            Self::Hypervisor => f.write_str("hypervisor"),
        }
    }
}

/// Who a peer is (I8): fixed for a connection's session, never changed by a later message.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Identity {
    /// The name under which configuration knows the peer, such as `net0`.
    pub name: String,
    /// What it may be.
    pub role: Role,
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name, self.role)
    }
}

/// Counts the sessions of one identity, or the walks of one domain: a later one is larger. Never compared across kinds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Generation(pub u64);

/// A client's number for a mutating request: monotonic per client, so that a retry is recognised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);
