//! Resident memory of a process, as the system counts it.

use anyhow::Context;

/// Bytes resident.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Resident {
    /// Heap and stacks.
    pub(crate) anonymous: u64,
    /// Shared memory: the server's physical memory, as far as it was touched.
    pub(crate) shared: u64,
}

impl Resident {
    /// Of the process that asks.
    pub(crate) fn of_this_process() -> anyhow::Result<Self> {
        Self::of(std::process::id())
    }

    /// Of another process.
    pub(crate) fn of(process: u32) -> anyhow::Result<Self> {
        let path = format!("/proc/{process}/status");
        let status = std::fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
        Self::parse(&status).with_context(|| format!("{path} does not tell RssAnon and RssShmem"))
    }

    fn parse(status: &str) -> Option<Self> {
        let field = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name))?;
            let kibibytes: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
            kibibytes.checked_mul(1024)
        };
        Some(Self { anonymous: field("RssAnon:")?, shared: field("RssShmem:")? })
    }

    /// What came since. Memory that was given back counts as none.
    pub(crate) fn since(self, before: Self) -> Self {
        Self {
            anonymous: self.anonymous.saturating_sub(before.anonymous),
            shared: self.shared.saturating_sub(before.shared),
        }
    }

    /// Both together.
    pub(crate) fn all(self) -> u64 {
        self.anonymous + self.shared
    }
}

#[cfg(test)]
mod tests {
    use super::Resident;

    #[test]
    fn resident_memory_is_read_from_the_status_file() {
        let status =
            "Name:\tx\nVmRSS:\t  900 kB\nRssAnon:\t     300 kB\nRssFile:\t 1 kB\nRssShmem:\t   64 kB\n";
        let expected = Resident { anonymous: 300 << 10, shared: 64 << 10 };
        assert_eq!(Resident::parse(status), Some(expected));
        assert_eq!(Resident::parse("Name:\tx\n"), None);
        assert!(Resident::of_this_process().expect("this process has a status").all() > 0);
    }
}
