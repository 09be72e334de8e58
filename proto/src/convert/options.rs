//! `types.proto`, the part about domains: protection modes and what is chosen beside them.
//!
//! Here zero is a choice, "the usual one": it is resolved when a request is parsed, and what is sent always says everything.

use iommu_types::errors::InvalidField;
use iommu_types::{
    BouncePool, Deferral, DomainOptions, IovaAllocation, MappingGranularity, PersistentQuota, Protection,
    Rings, WalkCachePolicy,
};
use pb::domain_options::Parameters;

use super::{Field, choices, known, message_field, parse, within, wrong_at};
use crate::pb;

choices! {
    MappingGranularity as MappingGranularity { Page, Byte }
    IovaAllocation as IovaAllocation { Classic, Cached }
    WalkCachePolicy as WalkCachePolicy { OnReclaim, OnEveryUnmap }
}

/// The mode of this number, with its usual parameters.
fn mode(wire: i32) -> Result<Protection, InvalidField> {
    known(wire, pb::Protection::try_from(wire), |value| match value {
        pb::Protection::Unspecified => None,
        pb::Protection::Passthrough => Some(Protection::Passthrough),
        pb::Protection::Strict => Some(Protection::Strict),
        pb::Protection::Deferred => Some(Protection::DEFERRED),
        pb::Protection::Shared => Some(Protection::Shared),
        pb::Protection::Persistent => Some(Protection::PERSISTENT),
        pb::Protection::Bounce => Some(Protection::BOUNCE),
        pb::Protection::Ring => Some(Protection::RING),
    })
}

fn protection(wire: i32, parameters: Option<Parameters>) -> Result<Protection, InvalidField> {
    let usual = mode(wire).map_err(|error| within("protection", error))?;
    let Some(parameters) = parameters else { return Ok(usual) };
    match (usual, parameters) {
        (Protection::Deferred(_), Parameters::Deferred(pb::Deferral { batch, interval_ms })) => {
            Ok(Protection::Deferred(Deferral { batch, interval_ms }))
        }
        (Protection::Persistent(_), Parameters::Persistent(pb::PersistentQuota { pages_max })) => {
            Ok(Protection::Persistent(PersistentQuota { pages_max }))
        }
        (Protection::Bounce(_), Parameters::Bounce(pb::BouncePool { bytes_max })) => {
            Ok(Protection::Bounce(BouncePool { bytes_max }))
        }
        (Protection::Ring(_), Parameters::Ring(pb::Rings { count, slots })) => {
            Ok(Protection::Ring(Rings { count: parse("ring.count", count)?, slots }))
        }
        (mode, other) => {
            let (mode, other) = (mode.name(), name_of(&other));
            let why =
                format!("are parameters of another mode than {mode}; leave them out, or ask for {other}");
            Err(wrong_at(other, why))
        }
    }
}

/// The field of these parameters, which has the name of their mode.
fn name_of(parameters: &Parameters) -> &'static str {
    match parameters {
        Parameters::Deferred(_) => "deferred",
        Parameters::Persistent(_) => "persistent",
        Parameters::Bounce(_) => "bounce",
        Parameters::Ring(_) => "ring",
    }
}

/// Reads a choice whose zero is the usual one.
fn choice<M: Field<i32>>(name: &str, wire: i32, usual: M) -> Result<M, InvalidField> {
    if wire == 0 { Ok(usual) } else { parse(name, wire) }
}

impl TryFrom<pb::DomainOptions> for DomainOptions {
    type Error = InvalidField;
    fn try_from(wire: pb::DomainOptions) -> Result<Self, InvalidField> {
        let usual = Self::new(protection(wire.protection, wire.parameters)?);
        let options = Self {
            granularity: choice("granularity", wire.granularity, usual.granularity)?,
            allocator: choice("allocator", wire.allocator, usual.allocator)?,
            walk_cache: choice("walk_cache", wire.walk_cache, usual.walk_cache)?,
            width_bits: match wire.width_bits {
                0 => usual.width_bits,
                bits => parse("width_bits", bits)?,
            },
            sanitizer: wire.sanitizer,
            ..usual
        };
        options.check()?;
        Ok(options)
    }
}

impl From<DomainOptions> for pb::DomainOptions {
    fn from(options: DomainOptions) -> Self {
        let (protection, parameters) = match options.protection {
            Protection::Passthrough => (pb::Protection::Passthrough, None),
            Protection::Strict => (pb::Protection::Strict, None),
            Protection::Deferred(Deferral { batch, interval_ms }) => {
                let deferral = pb::Deferral { batch, interval_ms };
                (pb::Protection::Deferred, Some(Parameters::Deferred(deferral)))
            }
            Protection::Shared => (pb::Protection::Shared, None),
            Protection::Persistent(PersistentQuota { pages_max }) => {
                let quota = pb::PersistentQuota { pages_max };
                (pb::Protection::Persistent, Some(Parameters::Persistent(quota)))
            }
            Protection::Bounce(BouncePool { bytes_max }) => {
                (pb::Protection::Bounce, Some(Parameters::Bounce(pb::BouncePool { bytes_max })))
            }
            Protection::Ring(Rings { count, slots }) => {
                let rings = pb::Rings { count: count.write(), slots };
                (pb::Protection::Ring, Some(Parameters::Ring(rings)))
            }
        };
        Self {
            protection: protection.into(),
            granularity: options.granularity.write(),
            allocator: options.allocator.write(),
            walk_cache: options.walk_cache.write(),
            width_bits: options.width_bits.write(),
            sanitizer: options.sanitizer,
            parameters,
        }
    }
}
message_field!(DomainOptions, pb::DomainOptions);
