//! `session.proto`: who a peer is.

use bytes::Bytes;
use iommu_types::errors::InvalidField;
use iommu_types::{Generation, Owner, Role};

use super::{Field, absent, messages, parse, within, wrong};
use crate::limits::{NAME_BYTES_MAX, RESUME_TOKEN_BYTES};
use crate::pb;

/// What a peer with a connection of its own may be. A device says Hello on its stream instead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SessionRole {
    /// The driver software of an owner.
    Driver(Owner),
    /// Creates bare machines and owns them.
    Bare,
    /// May look, may not touch.
    Observer,
    /// May look, declare and attach devices, read and write memory.
    Operator,
    /// Creates virtual machines and owns them.
    Hypervisor,
}

impl From<SessionRole> for Role {
    fn from(role: SessionRole) -> Self {
        match role {
            SessionRole::Driver(owner) => Self::Driver(owner),
            SessionRole::Bare => Self::Bare,
            SessionRole::Observer => Self::Observer,
            SessionRole::Operator => Self::Operator,
            SessionRole::Hypervisor => Self::Hypervisor,
        }
    }
}

impl Field<Option<pb::open_request::Role>> for SessionRole {
    fn parse(wire: Option<pb::open_request::Role>) -> Result<Self, InvalidField> {
        Ok(match wire.ok_or_else(absent)? {
            pb::open_request::Role::Driver(role) => {
                Self::Driver(parse("owner", role.owner).map_err(|error| within("driver", error))?)
            }
            pb::open_request::Role::Bare(_) => Self::Bare,
            pb::open_request::Role::Observer(_) => Self::Observer,
            pb::open_request::Role::Operator(_) => Self::Operator,
            pb::open_request::Role::Hypervisor(_) => Self::Hypervisor,
        })
    }
    fn write(self) -> Option<pb::open_request::Role> {
        Some(match self {
            Self::Driver(owner) => {
                pb::open_request::Role::Driver(pb::DriverRole { owner: Some(owner.into()) })
            }
            Self::Bare => pb::open_request::Role::Bare(pb::BareRole {}),
            Self::Observer => pb::open_request::Role::Observer(pb::ObserverRole {}),
            Self::Operator => pb::open_request::Role::Operator(pb::OperatorRole {}),
            Self::Hypervisor => pb::open_request::Role::Hypervisor(pb::HypervisorRole {}),
        })
    }
}

/// What brings a session back after its connection is lost. It is a secret and does not show itself.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ResumeToken(pub [u8; RESUME_TOKEN_BYTES]);

impl std::fmt::Debug for ResumeToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ResumeToken(secret)")
    }
}

impl Field<Bytes> for ResumeToken {
    fn parse(wire: Bytes) -> Result<Self, InvalidField> {
        let length = wire.len();
        let token = <[u8; RESUME_TOKEN_BYTES]>::try_from(&*wire);
        token.map(Self).map_err(|_| wrong(format!("has {length} bytes; needs {RESUME_TOKEN_BYTES}")))
    }
    fn write(self) -> Bytes {
        Bytes::copy_from_slice(&self.0)
    }
}

// An empty token is no token.
impl Field<Bytes> for Option<ResumeToken> {
    fn parse(wire: Bytes) -> Result<Self, InvalidField> {
        if wire.is_empty() { Ok(None) } else { ResumeToken::parse(wire).map(Some) }
    }
    fn write(self) -> Bytes {
        self.map_or_else(Bytes::new, ResumeToken::write)
    }
}

/// The name of a peer: 1 to 64 letters, digits, dots, dashes or underscores.
pub(super) fn check_name(name: &str) -> Result<(), InvalidField> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    if (1..=NAME_BYTES_MAX).contains(&name.len()) && name.chars().all(allowed) {
        return Ok(());
    }
    let rule = format!("needs 1 to {NAME_BYTES_MAX} letters, digits, dots, dashes or underscores");
    Err(within("name", wrong(rule)))
}

fn check_open(open: &Open) -> Result<(), InvalidField> {
    check_name(&open.name)
}

messages! {
    /// What a peer declares itself to be.
    Open as OpenRequest {
        /// Major version of the schema that it speaks.
        schema_version: u32,
        /// Name in the configuration.
        name: String,
        /// What it wants to be.
        role: SessionRole,
        /// Set to continue an earlier session.
        resume_token: Option<ResumeToken>,
    } check check_open;
    /// What the session is.
    Opened as OpenResponse {
        /// Major version of the schema that the server speaks.
        schema_version: u32,
        /// Counts the sessions of this identity.
        generation: Generation,
        /// Brings the session back after its connection is lost.
        resume_token: ResumeToken,
        /// Whether it continues an earlier one.
        resumed: bool,
        /// How long what it holds is kept after its connection is lost, in milliseconds.
        grace_ms: u64,
        /// The limits that it must keep to.
        limits: Limits,
    };
    /// Limits of a session.
    Limits as Limits {
        /// Largest message in bytes, either way.
        message_bytes_max: u32,
        /// Most operations in one batch.
        batch_operations_max: u32,
        /// Most bytes that one memory or DMA message may read or write.
        batch_bytes_max: u32,
        /// Most request IDs remembered for retries.
        request_window: u32,
    };
}
