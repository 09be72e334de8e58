//! Machines for those who in earnest have one of their own: the processors of this one, divided.

use std::collections::BTreeSet;

use anyhow::{Context, ensure};
use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Two sets of processors that have none in common.
#[derive(Debug)]
pub(super) struct Machines {
    all: CpuSet,
    /// All but the last one.
    near: CpuSet,
    /// The last one.
    far: CpuSet,
}

impl Machines {
    /// Of the processors that this process may use; none where that is a single one.
    pub(super) fn divide() -> anyhow::Result<Option<Self>> {
        let all = sched_getaffinity(None).context("ask for the processors of this process")?;
        if all.count() < 2 {
            return Ok(None);
        }
        let mut near = all;
        let last = (0..CpuSet::MAX_CPU).rev().find(|&number| near.is_set(number));
        let last = last.context("a processor is among those counted")?;
        let mut far = CpuSet::new();
        far.set(last);
        near.unset(last);
        Ok(Some(Self { all, near, far }))
    }
    /// Moves this process to the near one. What it starts there sees no other, and has as many threads as fit.
    pub(super) fn enter(&self) -> anyhow::Result<()> {
        bind(std::process::id(), &self.near)
    }
    /// Moves this process back to all.
    pub(super) fn leave(&self) -> anyhow::Result<()> {
        bind(std::process::id(), &self.all)
    }
    /// Moves a process to the far one.
    pub(super) fn send_away(&self, process: u32) -> anyhow::Result<()> {
        bind(process, &self.far)
    }
}

/// Binds all threads of a process; those that it starts later inherit it.
fn bind(process: u32, to: &CpuSet) -> anyhow::Result<()> {
    let path = format!("/proc/{process}/task");
    let mut bound = BTreeSet::new();
    // A thread that was started by one that was not bound yet is found when all are listed again.
    loop {
        let before = bound.len();
        for task in std::fs::read_dir(&path).with_context(|| format!("list {path}"))? {
            let name = task.with_context(|| format!("list {path}"))?.file_name();
            let number: i32 =
                name.to_string_lossy().parse().with_context(|| format!("{name:?} in {path}"))?;
            match sched_setaffinity(Pid::from_raw(number), to) {
                Ok(()) => bound.insert(number),
                // It has ended meanwhile.
                Err(rustix::io::Errno::SRCH) => continue,
                Err(error) => return Err(error).with_context(|| format!("bind thread {number}")),
            };
        }
        ensure!(!bound.is_empty(), "process {process} has ended");
        if bound.len() == before {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_thread_of_a_process_is_bound_and_nobody_else() {
        let all = sched_getaffinity(None).expect("the processors are told");
        let first = (0..CpuSet::MAX_CPU).find(|&number| all.is_set(number)).expect("there is one");
        let mut one = CpuSet::new();
        one.set(first);
        let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("sleep starts");
        for wanted in [&one, &all] {
            bind(child.id(), wanted).expect("it can be bound");
            assert_eq!(sched_getaffinity(Some(Pid::from_child(&child))).expect("told"), *wanted);
        }
        assert_eq!(sched_getaffinity(None).expect("told"), all, "nobody else is");
        child.kill().expect("it ends");
        child.wait().expect("it has ended");
        assert!(bind(child.id(), &all).is_err(), "nor one that has ended");
    }

    #[test]
    fn machines_have_no_processor_in_common() {
        let all = sched_getaffinity(None).expect("the processors are told");
        match Machines::divide().expect("they can be divided") {
            None => assert_eq!(all.count(), 1),
            Some(Machines { near, far, .. }) => {
                assert_eq!((near.count(), far.count()), (all.count() - 1, 1));
                let both = |number: &usize| near.is_set(*number) && far.is_set(*number);
                assert_eq!((0..CpuSet::MAX_CPU).find(both), None);
            }
        }
    }
}
