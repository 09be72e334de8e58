//! Resume tokens of the logs of faults and of sanitizer reports: one sequence number per log, as text.
//!
//! `RUN;driver:0=12;-=3` — the run of the server, then each log with the last record that was seen; `-` is the log of faults of devices
//! that nobody owns. A token of another run names records that this server never had, and is refused.

use std::collections::BTreeMap;

use iommu_types::Owner;
use iommu_types::errors::BadResumeToken;

/// The log of devices that nobody owns.
const NOBODY: &str = "-";
/// Longest token that is looked at.
const TOKEN_BYTES_MAX: usize = 64 << 10;

/// How far each log was read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Positions {
    seen: BTreeMap<Option<Owner>, u64>,
}

impl Positions {
    /// Nothing was seen of a log that is not named.
    pub fn of(&self, log: Option<Owner>) -> u64 {
        self.seen.get(&log).copied().unwrap_or(0)
    }
    /// A log was read so far.
    pub fn set(&mut self, log: Option<Owner>, sequence: u64) {
        self.seen.insert(log, sequence);
    }
    /// As a token of this run.
    pub fn write(&self, run_id: u64) -> String {
        let mut token = format!("{run_id:x}");
        for (log, sequence) in &self.seen {
            let log = log.map_or_else(|| NOBODY.to_owned(), |owner| owner.to_string());
            token.push_str(&format!(";{log}={sequence}"));
        }
        token
    }
    /// Reads a token; `latest` says how far each log goes that its bearer may read, so that one from the future is refused, and so
    /// that nobody learns how far another's log goes.
    pub fn read(
        token: &str,
        run_id: u64,
        latest: impl Fn(Option<Owner>) -> Option<u64>,
    ) -> Result<Self, BadResumeToken> {
        let bad = || BadResumeToken { token: token.chars().take(128).collect() };
        if token.len() > TOKEN_BYTES_MAX {
            return Err(bad());
        }
        let mut parts = token.split(';');
        if parts.next() != Some(format!("{run_id:x}").as_str()) {
            return Err(bad());
        }
        let mut positions = Self::default();
        for part in parts {
            let (log, sequence) = part.split_once('=').ok_or_else(bad)?;
            let log = match log {
                NOBODY => None,
                owner => Some(owner.parse().map_err(|_| bad())?),
            };
            let latest = latest(log).ok_or_else(bad)?;
            let sequence = sequence.parse().ok().filter(|sequence| *sequence <= latest).ok_or_else(bad)?;
            positions.set(log, sequence);
        }
        Ok(positions)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_survives_the_round_trip() {
        let mut positions = Positions::default();
        positions.set(None, 3);
        positions.set(Some(Owner::Driver(7)), 12);
        assert_eq!(Positions::read(&positions.write(0xab), 0xab, |_| Some(100)), Ok(positions));
    }

    #[test]
    fn a_token_that_is_not_of_this_log_is_refused() {
        for token in
            ["", "ac", "ab;driver:0=101", "ab;driver:0", "ab;nobody=1", "ab;driver:0=-1", "ab;", "\u{e4}b"]
        {
            assert!(Positions::read(token, 0xab, |_| Some(100)).is_err(), "{token:?}");
        }
    }

    #[test]
    fn i7_a_token_tells_nobody_how_far_anothers_log_goes() {
        let own = |log| (log == Some(Owner::Driver(0))).then_some(100);
        assert!(Positions::read("ab;driver:0=7", 0xab, own).is_ok());
        for token in ["ab;driver:1=0", "ab;driver:0=7;-=0"] {
            assert!(Positions::read(token, 0xab, own).is_err(), "{token:?}");
        }
    }
}
