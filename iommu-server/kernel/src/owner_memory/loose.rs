//! Frames that an owner still pays for and that are in no memory map: on their way out, or to another owner.
//!
//! **Promises:** nobody reaches them, nobody pins them, and nothing of them is lost: whatever becomes of who carries them (an error, a
//! cancelled call, a panic), they are wiped, freed and paid back at the latest when this is dropped.

use std::sync::Arc;

use iommu_types::PAGE_SIZE_BYTES;

use crate::account::OwnerAccount;
use crate::boot::Kernel;
use crate::frames::{FrameAllocator, FrameRun};

/// See the module.
pub(super) struct LooseFrames {
    frames: Arc<FrameAllocator>,
    account: Arc<OwnerAccount>,
    runs: Vec<FrameRun>,
}

impl LooseFrames {
    /// Frames of this owner, which it was charged for.
    pub(super) fn new(kernel: &Kernel, account: &Arc<OwnerAccount>, runs: Vec<FrameRun>) -> Self {
        Self { frames: Arc::clone(&kernel.frames), account: Arc::clone(account), runs }
    }
    pub(super) fn pages(&self) -> u64 {
        self.runs.iter().map(|run| run.frames).sum()
    }
    /// Wipes them and gives them to another owner, who was charged for them already. They keep their order.
    pub(super) fn give_to(mut self, to: &Arc<OwnerAccount>) -> Self {
        let frames = Arc::clone(&self.frames);
        let mut theirs = Self { frames, account: Arc::clone(to), runs: Vec::new() };
        // One by one, so that each is in one of the two at every moment.
        self.runs.reverse();
        while let Some(run) = self.runs.pop() {
            self.frames.transfer(run, self.account.tag(), to.tag());
            self.account.memory.refund(run.frames * PAGE_SIZE_BYTES);
            theirs.runs.push(run);
        }
        theirs
    }
    /// Takes the frames out, to be put into the memory map of their owner.
    pub(super) fn settle(mut self) -> Vec<FrameRun> {
        std::mem::take(&mut self.runs)
    }
}

impl Drop for LooseFrames {
    fn drop(&mut self) {
        for run in self.runs.drain(..) {
            self.frames.free(run, self.account.tag());
            self.account.memory.refund(run.frames * PAGE_SIZE_BYTES);
        }
    }
}

impl std::fmt::Debug for LooseFrames {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LooseFrames").field("owner", &self.account.owner()).field("runs", &self.runs).finish()
    }
}
