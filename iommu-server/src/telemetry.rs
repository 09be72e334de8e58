//! Logs: human or JSON lines on standard error, and a limiter for what a peer can repeat.
//!
//! Rules: a line is written where an error ends; fields have fixed names (`peer`, `device`, `owner`, `domain_id`, `generation`,
//! `method`, `reason`); ERROR means that a person must look.

use std::io::IsTerminal;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use iommu_kernel::Tick;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::prelude::*;

use crate::bounds;
use crate::cli::LogFormat;
use crate::config::ConfigError;

/// Starts logging. Once per process.
pub fn start(filter: &str, format: LogFormat) -> Result<(), ConfigError> {
    let filter = EnvFilter::try_new(filter).map_err(|e| ConfigError {
        flag: "--log".to_owned(),
        why: format!("{filter:?}: {e}"),
        remedy: "write a tracing filter, such as info or iommu_server=debug".to_owned(),
    })?;
    let registry = tracing_subscriber::registry().with(filter);
    // Colours are for people at a terminal, not for files.
    let colours = std::io::stderr().is_terminal();
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(colours);
    match format {
        LogFormat::Human => registry.with(lines).init(),
        LogFormat::Json => registry.with(lines.json()).init(),
    }
    Ok(())
}

/// Milliseconds since the UNIX epoch.
pub fn now_unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

/// The time as the kernel floor takes it: since the UNIX epoch, and never backwards, whatever is done to the system's clock.
pub fn now() -> Tick {
    static START: OnceLock<(Instant, u64)> = OnceLock::new();
    let (start, unix_us) = START.get_or_init(|| {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        (Instant::now(), since.map_or(0, |since| since.as_micros() as u64))
    });
    Tick(unix_us.saturating_add(start.elapsed().as_micros() as u64))
}

/// Lets a bounded number of lines through each second and counts the rest.
#[derive(Debug)]
pub struct LogLimiter {
    second: AtomicU64,
    lines: AtomicU32,
    suppressed: AtomicU64,
}

impl LogLimiter {
    /// Nothing logged yet.
    pub const fn new() -> Self {
        Self { second: AtomicU64::new(0), lines: AtomicU32::new(0), suppressed: AtomicU64::new(0) }
    }
    /// Whether a line may be written now: then with how many were left out since the last one.
    pub fn admit(&self, now_s: u64) -> Option<u64> {
        if self.second.swap(now_s, Ordering::Relaxed) != now_s {
            self.lines.store(0, Ordering::Relaxed);
        }
        if self.lines.fetch_add(1, Ordering::Relaxed) < bounds::PEER_LOG_LINES_PER_SECOND {
            return Some(self.suppressed.swap(0, Ordering::Relaxed));
        }
        self.suppressed.fetch_add(1, Ordering::Relaxed);
        None
    }
}

impl Default for LogLimiter {
    fn default() -> Self {
        Self::new()
    }
}

/// `tracing::warn!` for what a peer can repeat: at most [`bounds::PEER_LOG_LINES_PER_SECOND`] lines a second from each place in the
/// code; the next one says how many were left out (`suppressed`).
macro_rules! warn_limited {
    ($($arguments:tt)+) => {{
        static LIMITER: $crate::telemetry::LogLimiter = $crate::telemetry::LogLimiter::new();
        if let Some(suppressed) = LIMITER.admit($crate::telemetry::now_unix_ms() / 1000) {
            tracing::warn!(suppressed, $($arguments)+);
        }
    }};
}
pub(crate) use warn_limited;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limiter_counts_what_it_leaves_out_and_begins_anew_each_second() {
        let limiter = LogLimiter::new();
        let admitted = (0..15).filter(|_| limiter.admit(7).is_some()).count();
        assert_eq!(admitted, bounds::PEER_LOG_LINES_PER_SECOND as usize);
        assert_eq!(limiter.admit(8), Some(5));
    }
}
