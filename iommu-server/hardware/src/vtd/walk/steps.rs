//! The tracer of Explain: every entry that a walk reads, with its raw value and in words.

use iommu_types::{Capabilities, Hpa, Permissions, Step, Structure};

use super::{Trace, reading};
use crate::vtd::spec::{pte, root_context};

/// Collects the steps of a walk.
#[derive(Clone, Debug)]
pub struct StepCollector {
    capabilities: Capabilities,
    steps: Vec<Step>,
}

impl StepCollector {
    /// A collector for walks of a unit with these capabilities.
    pub fn new(capabilities: &Capabilities) -> Self {
        Self { capabilities: *capabilities, steps: Vec::new() }
    }
    /// The steps, in the order in which they were made.
    pub fn into_steps(self) -> Vec<Step> {
        self.steps
    }
}

impl Trace for StepCollector {
    fn read_root(&mut self, at: Hpa, raw: Option<u128>) {
        self.steps.push(wide_step(Structure::Root, at, raw, |raw| reading::root(raw, &self.capabilities)));
    }
    fn read_context(&mut self, at: Hpa, raw: Option<u128>) {
        self.steps
            .push(wide_step(Structure::Context, at, raw, |raw| reading::context(raw, &self.capabilities)));
    }
    fn read_table(&mut self, level: u8, at: Hpa, raw: Option<u64>, permissions: Permissions) {
        self.steps.push(table_step(&self.capabilities, level, at, raw, permissions));
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
    capabilities: &Capabilities,
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
        reading: raw.map_or_else(
            || reading::UNREADABLE.to_owned(),
            |raw| reading::second_stage(raw, level, capabilities),
        ),
    }
}
