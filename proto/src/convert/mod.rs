//! From messages to the types that programs use, and back: one file per schema file (two or three for the large ones).
//!
//! Parsing happens once, on the receiving side. A field that is absent, out of its range or of an unknown kind gives an
//! [`InvalidField`] with the path of the field, such as `records[2].device.segment`; sending cannot fail. Unknown fields are ignored.

pub(crate) mod admin;
pub(crate) mod bare;
pub(crate) mod device;
pub(crate) mod dma_api;
pub(crate) mod driver;
pub(crate) mod explain;
pub(crate) mod fault;
pub(crate) mod function;
pub(crate) mod hypervisor;
pub(crate) mod inspect;
pub(crate) mod memory;
pub(crate) mod options;
pub(crate) mod sanitizer;
pub(crate) mod session;
pub(crate) mod stream;
pub(crate) mod types;

use bytes::Bytes;
use iommu_types::errors::InvalidField;
use iommu_types::{
    AccessWidth, DomainId, FaultReason, Generation, Gpa, Hpa, Iova, Pasid, RequestId, SourceId,
};

/// A field of a message: how its wire form `W` is parsed and written.
///
/// The error of `parse` names the path *below* the field; whoever reads the field puts its name before it.
pub(crate) trait Field<W>: Sized {
    fn parse(wire: W) -> Result<Self, InvalidField>;
    fn write(self) -> W;
}

/// An error at the field itself.
pub(crate) fn wrong(why: impl Into<String>) -> InvalidField {
    InvalidField { field: String::new(), why: why.into() }
}

/// An error at a field by its name.
pub(crate) fn wrong_at(field: &str, why: impl Into<String>) -> InvalidField {
    InvalidField { field: field.to_owned(), why: why.into() }
}

/// Nothing was sent where something must be.
pub(crate) fn absent() -> InvalidField {
    wrong("is absent, or of a kind that this version does not know")
}

/// Puts the name of a field before the path of an error below it.
pub(crate) fn within(parent: &str, error: InvalidField) -> InvalidField {
    let InvalidField { field, why } = error;
    let separator = if field.is_empty() || field.starts_with('[') { "" } else { "." };
    InvalidField { field: format!("{parent}{separator}{field}"), why }
}

/// Parses the field `name`.
pub(crate) fn parse<W, M: Field<W>>(name: &str, wire: W) -> Result<M, InvalidField> {
    M::parse(wire).map_err(|error| within(name, error))
}

macro_rules! as_it_is {
    ($($ty:ty),*) => { $(
        impl Field<$ty> for $ty {
            fn parse(wire: $ty) -> Result<Self, InvalidField> {
                Ok(wire)
            }
            fn write(self) -> $ty {
                self
            }
        }
    )* };
}
as_it_is!(bool, u32, u64, String, Bytes);

macro_rules! address {
    ($($ty:ty as $wire:ty),*) => { $(
        impl Field<$wire> for $ty {
            fn parse(wire: $wire) -> Result<Self, InvalidField> {
                Ok(Self::new(wire))
            }
            fn write(self) -> $wire {
                self.get()
            }
        }
    )* };
}
address!(Iova as u64, Gpa as u64, Hpa as u64);

macro_rules! counter {
    ($($ty:ident),*) => { $(
        impl Field<u64> for $ty {
            fn parse(wire: u64) -> Result<Self, InvalidField> {
                Ok(Self(wire))
            }
            fn write(self) -> u64 {
                self.0
            }
        }
    )* };
}
counter!(Generation, RequestId);

macro_rules! narrow {
    ($($ty:ty as $narrow:ty = $read:expr, $write:expr;)*) => { $(
        impl Field<u32> for $ty {
            fn parse(wire: u32) -> Result<Self, InvalidField> {
                let most = <$narrow>::MAX;
                let number = <$narrow>::try_from(wire).map_err(|_| wrong(format!("{wire} is more than {most}")))?;
                Ok($read(number))
            }
            fn write(self) -> u32 {
                u32::from($write(self))
            }
        }
    )* };
}
narrow! {
    u8 as u8 = std::convert::identity, std::convert::identity;
    u16 as u16 = std::convert::identity, std::convert::identity;
    SourceId as u16 = SourceId::new, SourceId::get;
    DomainId as u16 = DomainId::new, DomainId::get;
    FaultReason as u8 = FaultReason, |reason: FaultReason| reason.0;
}

impl Field<u32> for Pasid {
    fn parse(wire: u32) -> Result<Self, InvalidField> {
        Self::new(wire).ok_or_else(|| wrong(format!("{wire} needs more than 20 bits")))
    }
    fn write(self) -> u32 {
        self.get()
    }
}

impl Field<u32> for AccessWidth {
    fn parse(wire: u32) -> Result<Self, InvalidField> {
        Self::from_bytes(wire).ok_or_else(|| wrong(format!("{wire} is not a width; use 1, 2, 4 or 8")))
    }
    fn write(self) -> u32 {
        self.bytes()
    }
}

impl<W, M: Field<W>> Field<Option<W>> for Option<M> {
    fn parse(wire: Option<W>) -> Result<Self, InvalidField> {
        wire.map(M::parse).transpose()
    }
    fn write(self) -> Option<W> {
        self.map(M::write)
    }
}

impl<W, M: Field<W>> Field<Vec<W>> for Vec<M> {
    fn parse(wire: Vec<W>) -> Result<Self, InvalidField> {
        let element = |(index, wire)| M::parse(wire).map_err(|error| within(&format!("[{index}]"), error));
        wire.into_iter().enumerate().map(element).collect()
    }
    fn write(self) -> Vec<W> {
        self.into_iter().map(M::write).collect()
    }
}

/// Gives a type that is converted by `TryFrom` and `From` its place as a field: required on its own, optional in an `Option`.
macro_rules! message_field {
    ($model:ty, $wire:ty) => {
        impl crate::convert::Field<$wire> for $model {
            fn parse(wire: $wire) -> Result<Self, InvalidField> {
                Self::try_from(wire)
            }
            fn write(self) -> $wire {
                self.into()
            }
        }
        impl crate::convert::Field<Option<$wire>> for $model {
            fn parse(wire: Option<$wire>) -> Result<Self, InvalidField> {
                Self::try_from(wire.ok_or_else(crate::convert::absent)?)
            }
            fn write(self) -> Option<$wire> {
                Some(self.into())
            }
        }
    };
}
pub(crate) use message_field;

/// Converts between a type and a message with fields of the same names. `check` sees the parsed whole.
macro_rules! convert {
    ($model:ident as $wire:ident { $($field:ident),* } $(check $check:path)?) => {
        impl TryFrom<crate::pb::$wire> for $model {
            type Error = InvalidField;
            #[allow(unused_variables, reason = "some messages have no fields")]
            fn try_from(wire: crate::pb::$wire) -> Result<Self, InvalidField> {
                let parsed = Self {
                    $($field: crate::convert::parse(stringify!($field), wire.$field)?),*
                };
                $($check(&parsed)?;)?
                Ok(parsed)
            }
        }
        impl From<$model> for crate::pb::$wire {
            #[allow(unused_variables, reason = "some messages have no fields")]
            fn from(model: $model) -> Self {
                Self { $($field: crate::convert::Field::write(model.$field)),* }
            }
        }
        crate::convert::message_field!($model, crate::pb::$wire);
    };
}
pub(crate) use convert;

/// Defines types that have the fields of their messages, and converts them.
macro_rules! messages {
    ($(
        $(#[$doc:meta])*
        $model:ident as $wire:ident { $($(#[$field_doc:meta])* $field:ident: $ty:ty),* $(,)? } $(check $check:path)?;
    )*) => { $(
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub struct $model { $($(#[$field_doc])* pub $field: $ty),* }
        crate::convert::convert!($model as $wire { $($field),* } $(check $check)?);
    )* };
}
pub(crate) use messages;

/// Reads an enum whose zero is "not given": `known` is the parsed value, when the number is a known one.
pub(crate) fn known<E, M>(
    number: i32,
    known: Result<E, prost::UnknownEnumValue>,
    model: impl FnOnce(E) -> Option<M>,
) -> Result<M, InvalidField> {
    let absent_or_unknown = || match number {
        0 => wrong("is not given"),
        number => wrong(format!("{number} is a value that this version does not know")),
    };
    known.ok().and_then(model).ok_or_else(absent_or_unknown)
}

/// Converts between enums with the same variants; the zero of the schema's is "not given".
macro_rules! choices {
    ($($model:ident as $wire:ident { $($variant:ident),* $(,)? })*) => { $(
        impl crate::convert::Field<i32> for $model {
            fn parse(wire: i32) -> Result<Self, InvalidField> {
                crate::convert::known(wire, crate::pb::$wire::try_from(wire), |value| match value {
                    crate::pb::$wire::Unspecified => None,
                    $(crate::pb::$wire::$variant => Some(Self::$variant)),*
                })
            }
            fn write(self) -> i32 {
                match self { $(Self::$variant => crate::pb::$wire::$variant),* }.into()
            }
        }
    )* };
}
pub(crate) use choices;
