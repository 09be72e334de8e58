//! What was issued: one line each, so that a certificate can be revoked when its file is long gone.

use std::str::FromStr;

use crate::Serial;

/// Certificates that are issued and in their time, at most: each is read whenever one is revoked, and there are a few for each peer.
pub const ISSUED_MAX: usize = 100_000;
/// Of those the ones that are left to peers which come and go while a server runs: each leaves one record, revoked, until it expires.
pub const DECLARED_MAX: usize = ISSUED_MAX / 2;
/// Certificates that are revoked and in their time, at most: servers read them all whenever the list changes, and it must stay well below 16 MiB.
pub const REVOKED_MAX: usize = 100_000;
/// How long a record stays after its certificate has expired: other machines' clocks are not this one's.
const KEPT_EXPIRED_S: u64 = 86_400;
/// Records that have had their day before the index is written anew without them.
const EXPIRED_MAX: usize = 256;

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
    /// Whether its certificate may still be taken somewhere.
    pub(crate) fn counts(&self, now_unix_s: u64) -> bool {
        self.not_after_unix_s.saturating_add(KEPT_EXPIRED_S) >= now_unix_s
    }
    /// The index without what has expired, where that is worth it.
    pub(crate) fn compacted(records: &[Self], now_unix_s: u64) -> Option<String> {
        let expired = records.iter().filter(|record| !record.counts(now_unix_s)).count();
        (expired >= EXPIRED_MAX)
            .then(|| records.iter().filter(|record| record.counts(now_unix_s)).map(Self::line).collect())
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

#[cfg(test)]
mod tests {
    use super::*;

    fn record(number: u64, not_after_unix_s: u64) -> IssuedRecord {
        let serial = Serial::from_bytes(&(number + 1).to_be_bytes());
        IssuedRecord { serial, not_after_unix_s, subject: "server".to_owned() }
    }

    #[test]
    fn an_index_is_written_anew_once_enough_of_it_has_expired() {
        let now = 10 * KEPT_EXPIRED_S;
        for (expired, rewritten) in [(0, false), (EXPIRED_MAX - 1, false), (EXPIRED_MAX, true)] {
            let mut records: Vec<_> =
                (0..expired as u64).map(|number| record(number, now - KEPT_EXPIRED_S - 1)).collect();
            let kept = [record(1000, now - KEPT_EXPIRED_S), record(1001, now), record(1002, now + 1)];
            records.extend(kept.clone());
            let compacted = IssuedRecord::compacted(&records, now);
            assert_eq!(
                compacted.map(|text| IssuedRecord::parse_all(&text)),
                rewritten.then(|| kept.to_vec()),
                "{expired}"
            );
        }
    }
}
