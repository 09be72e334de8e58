//! How long a process has had processors, as the scheduler counts it: in nanoseconds, not in ticks.

use anyhow::Context;

/// Seconds of all threads that it has now. A process whose threads come and go is not told right.
pub(super) fn processor_seconds(process: u32) -> anyhow::Result<f64> {
    let tasks = format!("/proc/{process}/task");
    let mut nanoseconds = 0;
    for task in std::fs::read_dir(&tasks).with_context(|| format!("list {tasks}"))? {
        let path = task.with_context(|| format!("list {tasks}"))?.path().join("schedstat");
        // A thread that has ended meanwhile.
        let Ok(told) = std::fs::read_to_string(&path) else { continue };
        nanoseconds += parse(&told).with_context(|| format!("{} says {told:?}", path.display()))?;
    }
    Ok(nanoseconds as f64 / 1e9)
}

fn parse(schedstat: &str) -> Option<u64> {
    schedstat.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::{parse, processor_seconds};

    #[test]
    fn time_on_processors_is_the_first_word() {
        assert_eq!(parse("123456 789 3\n"), Some(123_456));
        assert_eq!(parse(""), None);
        let before = processor_seconds(std::process::id()).expect("this process is counted");
        let mut sum = 0_u64;
        while processor_seconds(std::process::id()).expect("it is") < before + 0.01 {
            sum = std::hint::black_box(sum + 1);
        }
    }
}
