//! What was issued: one line each, so that a certificate can be revoked when its file is long gone.

use std::str::FromStr;

use crate::Serial;

/// One issued certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IssuedRecord {
    /// Its number.
    pub serial: Serial,
    /// Last second of its validity.
    pub not_after_unix_s: u64,
    /// The URI of the identity, or `server`.
    pub subject: String,
}

impl IssuedRecord {
    pub(crate) fn line(&self) -> String {
        format!("{} {} {}\n", self.serial, self.not_after_unix_s, self.subject)
    }
    /// The records of a file. A line that a crash cut short is no record.
    pub(crate) fn parse_all(text: &str) -> Vec<Self> {
        text.lines().filter_map(Self::parse).collect()
    }
    fn parse(line: &str) -> Option<Self> {
        let mut words = line.split(' ');
        let (serial, not_after, subject) = (words.next()?, words.next()?, words.next()?);
        if words.next().is_some() {
            return None;
        }
        let serial = Serial::from_str(serial).ok()?;
        Some(Self { serial, not_after_unix_s: not_after.parse().ok()?, subject: subject.to_owned() })
    }
}
