//! The tracer of Explain: every entry that a walk reads, with its raw value and in words.

use iommu_types::{Hpa, Permissions, Step, Structure};

use super::{TableRules, Trace, reading};
use crate::vtd::spec::{pte, root_context};

/// Collects the steps of a walk.
#[derive(Clone, Debug)]
pub struct StepCollector<'a> {
    rules: TableRules<'a>,
    steps: Vec<Step>,
}

impl<'a> StepCollector<'a> {
    /// A collector for walks of a unit that reads its tables so.
    pub fn new(rules: TableRules<'a>) -> Self {
        Self { rules, steps: Vec::new() }
    }
    /// The steps, in the order in which they were made.
    pub fn into_steps(self) -> Vec<Step> {
        self.steps
    }
}

impl Trace for StepCollector<'_> {
    fn read_root(&mut self, at: Hpa, raw: Option<u128>) {
        let capabilities = self.rules.capabilities;
        self.steps.push(wide_step(Structure::Root, at, raw, |raw| reading::root(raw, capabilities)));
    }
    fn read_context(&mut self, at: Hpa, raw: Option<u128>) {
        let capabilities = self.rules.capabilities;
        self.steps.push(wide_step(Structure::Context, at, raw, |raw| reading::context(raw, capabilities)));
    }
    fn read_table(&mut self, level: u8, at: Hpa, raw: Option<u64>, permissions: Permissions) {
        self.steps.push(table_step(self.rules, level, at, raw, permissions));
    }
    fn read_extent(&mut self, _at: Hpa, raw: Option<u64>) {
        add_extent(self.steps.last_mut().expect("the entry of the page comes before its extent"), raw);
    }
}

fn wide_step(structure: Structure, at: Hpa, raw: Option<u128>, read: impl FnOnce(u128) -> String) -> Step {
    Step {
        structure,
        index: (at.page_offset() / root_context::ENTRY_BYTES) as u16,
        at,
        low: raw.map(|raw| raw as u64),
        high: raw.map(|raw| (raw >> 64) as u64),
        permissions: None,
        reading: raw.map_or_else(|| reading::UNREADABLE.to_owned(), read),
    }
}

/// The step of one second-stage entry.
pub(super) fn table_step(
    rules: TableRules<'_>,
    level: u8,
    at: Hpa,
    raw: Option<u64>,
    permissions: Permissions,
) -> Step {
    Step {
        structure: Structure::SecondStage { level },
        index: (at.page_offset() / pte::ENTRY_BYTES) as u16,
        at,
        low: raw,
        high: None,
        permissions: Some(permissions),
        reading: raw
            .map_or_else(|| reading::UNREADABLE.to_owned(), |raw| reading::second_stage(raw, level, rules)),
    }
}

/// The extent belongs to the entry of its page, so the two are one step.
pub(super) fn add_extent(step: &mut Step, raw: Option<u64>) {
    step.high = raw;
    step.reading.push_str(&format!(": {}", reading::extent(raw)));
}
