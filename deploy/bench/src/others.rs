//! What else the machine did meanwhile: figures on the wire are worth little when other programs want the same processors.

use anyhow::Context;
use rustix::time::{ClockId, clock_gettime};

use crate::figure::Figure;
use crate::samples::Samples;

/// Ticks of a processor in a second, as `/proc` counts them on every Linux (USER_HZ).
const TICKS_PER_SECOND: f64 = 100.0;

/// Processor time from the start of the machine until now.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Processors {
    busy_ticks: u64,
    /// Of this process and of the children that it has waited for.
    own_ticks: u64,
    seconds: f64,
}

impl Processors {
    /// As they stand.
    pub(crate) fn now() -> anyhow::Result<Self> {
        let read = |path| std::fs::read_to_string(path).with_context(|| format!("read {path}"));
        let busy_ticks = busy(&read("/proc/stat")?).context("/proc/stat tells the time of the processors")?;
        let own_ticks =
            own(&read("/proc/self/stat")?).context("/proc/self/stat tells the time of this process")?;
        let now = clock_gettime(ClockId::Monotonic);
        Ok(Self { busy_ticks, own_ticks, seconds: now.tv_sec as f64 + now.tv_nsec as f64 / 1e9 })
    }

    /// How many of the processors other programs had since, on average. Ask when all children have been waited for.
    pub(crate) fn taken_by_others(self, now: Self) -> f64 {
        let busy = now.busy_ticks.saturating_sub(self.busy_ticks);
        let own = now.own_ticks.saturating_sub(self.own_ticks);
        let seconds = (now.seconds - self.seconds).max(1.0 / TICKS_PER_SECOND);
        busy.saturating_sub(own) as f64 / TICKS_PER_SECOND / seconds
    }
}

/// The figure of the report.
pub(crate) fn figure(processors: f64) -> Figure {
    Figure::alone("taken-by-other-programs", "processors", &Samples::exactly(processors))
}

/// User, nice, system, interrupts, soft interrupts, stolen: all but idle and waiting for disks.
fn busy(stat: &str) -> Option<u64> {
    let fields: Vec<u64> =
        stat.lines().next()?.split_whitespace().skip(1).map_while(|f| f.parse().ok()).collect();
    [0, 1, 2, 5, 6, 7].into_iter().map(|index| fields.get(index).copied()).sum()
}

/// utime, stime, cutime, cstime: fields 14 to 17, counted behind the name in parentheses, which may hold anything.
fn own(stat: &str) -> Option<u64> {
    let (_, behind) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = behind.split_whitespace().collect();
    fields.get(11..15)?.iter().map(|field| field.parse::<u64>().ok()).sum()
}

#[cfg(test)]
mod tests {
    use super::{Processors, busy, own};

    #[test]
    fn processor_time_is_read_from_the_system() {
        assert_eq!(busy("cpu  10 1 5 1000 50 2 3 4 0 0\ncpu0 1 2\n"), Some(25));
        assert_eq!(busy("nonsense"), None);
        let stat = "42 (a) name) S 1 42 42 0 -1 4194304 100 0 0 0 7 3 20 10 20 0 4 0 100 1 1";
        assert_eq!(own(stat), Some(40));
        assert_eq!(own("42"), None);
        Processors::now().expect("this machine tells");
    }

    #[test]
    fn what_this_program_used_is_not_taken_by_others() {
        let at = |busy_ticks, own_ticks, seconds| Processors { busy_ticks, own_ticks, seconds };
        assert_eq!(at(100, 10, 1.0).taken_by_others(at(500, 110, 3.0)), 1.5);
        assert_eq!(at(100, 10, 1.0).taken_by_others(at(150, 110, 3.0)), 0.0);
    }
}
