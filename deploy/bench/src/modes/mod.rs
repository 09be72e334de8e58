//! What protection costs and what each shortcut gives up, measured: `cargo measure modes`.
//!
//! One load, a replay of a NIC's rings, runs in every configuration of the rIOMMU paper and in the modes that it has not. Three layers stand
//! side by side: event counts of the shipping code, which are the same everywhere and held by tests; cycles that a model makes of
//! them with unit costs from a file; and time, as ratios of one run. Around it stand the questions that the load does not answer.

pub(crate) mod ageing;
pub(crate) mod configuration;
pub(crate) mod copies;
pub(crate) mod costs;
pub(crate) mod counted;
pub(crate) mod counts;
pub(crate) mod growth;
pub(crate) mod model;
pub(crate) mod pair;
pub(crate) mod reach;
pub(crate) mod replay;
pub(crate) mod rings;
pub(crate) mod sanitizer;
pub(crate) mod stage;
pub(crate) mod stale;
pub(crate) mod tenants;
pub(crate) mod visits;
pub(crate) mod walk_cache;
pub(crate) mod watch;
pub(crate) mod workload;

#[cfg(test)]
mod tests;
