//! Commands about the session: who it is with, and what is answered in it.

use iommu_types::{DeviceAddress, Identity, Role};
use serde::{Deserialize, Serialize};

/// Whose name it takes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Connect {
    /// Where; absent for the server of the command line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server: Option<String>,
    /// The name that it claims.
    pub name: String,
    /// The address that it claims.
    #[serde(with = "printed")]
    pub address: DeviceAddress,
    /// Whose certificate it shows; absent for the name that it claims. Of no account where there is no TLS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shown_name: Option<String>,
    /// Of the device at which address; absent for the one that it claims.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "printed_option")]
    pub shown_address: Option<DeviceAddress>,
    /// The schema that it claims to speak.
    #[serde(default = "one")]
    pub schema_version: u32,
    /// Register accesses that it takes at once.
    #[serde(default = "sixteen")]
    pub mmio_credits: u32,
}

fn one() -> u32 {
    1
}
fn sixteen() -> u32 {
    16
}

impl Connect {
    /// As the device of this name and address.
    pub fn new(name: &str, address: DeviceAddress) -> Self {
        Self {
            server: None,
            name: name.to_owned(),
            address,
            shown_name: None,
            shown_address: None,
            schema_version: 1,
            mmio_credits: 16,
        }
    }

    /// The same with the certificate of another device.
    pub fn shown_as(&self, other: &Self) -> Self {
        let (shown_name, shown_address) = (Some(other.name.clone()), Some(other.address));
        Self { shown_name, shown_address, ..self.clone() }
    }

    /// Whose certificate is shown.
    pub fn shown(&self) -> Identity {
        Identity {
            name: self.shown_name.clone().unwrap_or_else(|| self.name.clone()),
            role: Role::Device(self.shown_address.unwrap_or(self.address)),
        }
    }
}

mod printed {
    use serde::de::Error as _;
    use serde::{Deserialize as _, Deserializer, Serializer};

    pub(super) fn serialize<T: ToString, S: Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&value.to_string())
    }
    pub(super) fn deserialize<'de, T, D>(deserializer: D) -> Result<T, D::Error>
    where
        T: std::str::FromStr<Err: std::fmt::Display>,
        D: Deserializer<'de>,
    {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

mod printed_option {
    use serde::{Deserialize as _, Deserializer, Serializer};

    pub(super) fn serialize<T: ToString, S: Serializer>(
        value: &Option<T>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match value {
            Some(value) => serializer.serialize_some(&value.to_string()),
            None => serializer.serialize_none(),
        }
    }
    pub(super) fn deserialize<'de, T, D>(deserializer: D) -> Result<Option<T>, D::Error>
    where
        T: std::str::FromStr<Err: std::fmt::Display>,
        D: Deserializer<'de>,
    {
        let text = Option::<String>::deserialize(deserializer)?;
        text.map(|text| text.parse().map_err(serde::de::Error::custom)).transpose()
    }
}

/// Whether the stream is read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reading {
    /// Yes or no.
    pub on: bool,
}

/// What is done about something that the server asks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Obedience {
    /// It is answered at once.
    #[default]
    Answer,
    /// It is remembered, and answered when it is told so; or never.
    Hold,
}

/// How it answers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Behave {
    /// Resets.
    #[serde(default)]
    pub resets: Obedience,
    /// Register accesses. Answered, a register reads as the last value written to it.
    #[serde(default)]
    pub registers: Obedience,
}

/// A tag.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tag {
    /// Absent for the oldest that is held.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag: Option<u64>,
}

/// An answer to a register access.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MmioAnswer {
    /// Absent for the oldest that is held.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag: Option<u64>,
    /// The value.
    #[serde(default)]
    pub value: u64,
}
