//! Numbers and bytes as text: addresses as `0x` and digits, bytes as two digits each.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// An address: written `"0x1000"`, read from that or from a plain number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address(pub u64);

impl Address {
    /// Reads `0x1000` or `4096`.
    pub fn parse(text: &str) -> Option<Self> {
        match text.strip_prefix("0x") {
            Some(digits) if digits.bytes().all(|digit| digit.is_ascii_hexdigit()) => {
                u64::from_str_radix(digits, 16).ok().map(Self)
            }
            Some(_) => None,
            None => text.bytes().all(|digit| digit.is_ascii_digit()).then(|| text.parse().ok().map(Self))?,
        }
    }
}

impl std::str::FromStr for Address {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        Self::parse(text).ok_or_else(|| format!("{text:?} is not an address; write 0x1000 or 4096"))
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl Serialize for Address {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.to_string())
    }
}

impl<'de> Deserialize<'de> for Address {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Either {
            Number(u64),
            Text(String),
        }
        match Either::deserialize(deserializer)? {
            Either::Number(number) => Ok(Self(number)),
            Either::Text(text) => text.parse().map_err(D::Error::custom),
        }
    }
}

/// Bytes, written as two hexadecimal digits each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hex(pub Vec<u8>);

impl Hex {
    /// Reads pairs of digits.
    pub fn parse(text: &str) -> Option<Self> {
        let digits: Option<Vec<u8>> =
            text.chars().map(|digit| digit.to_digit(16).map(|value| value as u8)).collect();
        let digits = digits.filter(|digits| digits.len() % 2 == 0)?;
        Some(Self(digits.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect()))
    }
}

impl std::str::FromStr for Hex {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        Self::parse(text).ok_or_else(|| "bytes are written as pairs of hexadecimal digits".to_owned())
    }
}

impl std::fmt::Display for Hex {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl Serialize for Hex {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.to_string())
    }
}

impl<'de> Deserialize<'de> for Hex {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_in_both_ways_and_nothing_else_is() {
        for (text, value) in
            [("0x1000", Some(0x1000)), ("4096", Some(4096)), ("0xffffffffffffffff", Some(u64::MAX))]
        {
            assert_eq!(Address::parse(text).map(|address| address.0), value, "{text}");
        }
        for text in ["", "0x", "-1", "+1", "0x+1", "0x1 ", "1e3", "0x10000000000000000"] {
            assert_eq!(Address::parse(text), None, "{text}");
        }
    }

    #[test]
    fn bytes_survive_the_way_through_text() {
        for bytes in [vec![], vec![0], vec![0xde, 0xad, 0xff]] {
            assert_eq!(Hex::parse(&Hex(bytes.clone()).to_string()), Some(Hex(bytes)));
        }
        for text in ["0", "zz", "0x00", "é"] {
            assert_eq!(Hex::parse(text), None, "{text}");
        }
    }
}
