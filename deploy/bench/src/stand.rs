//! What the measurements run on.

use crate::progress::Progress;
use crate::rounds::Plan;

/// The plan and the stage.
pub(crate) struct Bench {
    /// How much is measured.
    pub(crate) plan: Plan,
    /// Where it is told.
    pub(crate) progress: Progress,
}

impl Bench {
    pub(crate) fn new(plan: Plan, progress: Progress) -> Self {
        Self { plan, progress }
    }
    pub(crate) async fn stop(&mut self) {}
}
