//! The columns of the matrix: how the device is kept from memory.

use std::fmt;
use std::time::Duration;

use clap::ValueEnum;
use guest_sdk::{BouncePool, Deferral, DomainOptions, MappingGranularity, Protection};
use serde::{Deserialize, Serialize};

/// A column.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Column {
    /// A bare machine with translation off
    None,
    /// All memory of the owner, always
    Passthrough,
    /// A batch of unmaps is invalidated together
    Deferred,
    /// Every unmap is invalidated before its answer
    Strict,
    /// Strict, and by the byte
    Byte,
    /// The device sees shadow buffers only
    Bounce,
    /// The flat tables of rIOMMU
    Ring,
}

/// The stale window of the deferred column. Linux has 10 ms; this is long enough to attack inside of it on a machine under load too.
pub(crate) const WINDOW: Duration = Duration::from_millis(DEFERRAL.interval_ms as u64);
const DEFERRAL: Deferral = Deferral { batch: 256, interval_ms: 250 };

impl Column {
    /// All of them, in order.
    pub(crate) const ALL: [Self; 7] =
        [Self::None, Self::Passthrough, Self::Deferred, Self::Strict, Self::Byte, Self::Bounce, Self::Ring];

    /// Its name.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Passthrough => "passthrough",
            Self::Deferred => "deferred",
            Self::Strict => "strict",
            Self::Byte => "byte",
            Self::Bounce => "bounce",
            Self::Ring => "ring",
        }
    }

    /// What it is, in a few words.
    pub(crate) const fn meaning(self) -> &'static str {
        match self {
            Self::None => "translation off",
            Self::Passthrough => "all memory of the owner, always",
            Self::Deferred => "unmaps are flushed in batches",
            Self::Strict => "every unmap is flushed",
            Self::Byte => "strict, by the byte",
            Self::Bounce => "shadow buffers, copied",
            Self::Ring => "flat rings (rIOMMU)",
        }
    }

    /// Its domain; `None` where translation is off.
    pub(crate) fn options(self) -> Option<DomainOptions> {
        let protection = match self {
            Self::None => return None,
            Self::Passthrough => Protection::Passthrough,
            Self::Deferred => Protection::Deferred(DEFERRAL),
            Self::Strict | Self::Byte => Protection::Strict,
            Self::Bounce => Protection::BOUNCE,
            Self::Ring => Protection::RING,
        };
        let options = DomainOptions::new(protection);
        let byte = self == Self::Byte;
        Some(if byte { options.with_granularity(MappingGranularity::Byte) } else { options })
    }

    /// Its domain with room for as many pages as the IOTLB has entries.
    pub(crate) fn roomy(self) -> Option<DomainOptions> {
        match self {
            Self::Bounce => Some(DomainOptions::new(Protection::Bounce(BouncePool { bytes_max: 256 << 20 }))),
            other => other.options(),
        }
    }
}

impl fmt::Display for Column {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}
