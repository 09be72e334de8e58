//! What the server asks of the device, and how far the device obeys.

use std::collections::{BTreeMap, VecDeque};

use iommu_proto::pb;
use iommu_proto::pb::device_to_server::Message as Up;
use iommu_proto::pb::server_to_device::Message as Down;

use crate::bounds::TOLD_MAX;
use crate::language::{Behave, Obedience, Status};

/// What was asked, and what is remembered of it.
#[derive(Debug, Default)]
pub struct Peer {
    /// For those who ask.
    pub status: Status,
    /// How far it obeys.
    pub behave: Behave,
    registers: BTreeMap<u64, u64>,
    resets: VecDeque<pb::Reset>,
    accesses: VecDeque<pb::MmioRequest>,
}

impl Peer {
    /// One that was asked nothing yet.
    pub fn behaving(behave: Behave) -> Self {
        Self { behave, ..Self::default() }
    }

    /// Takes a message that is no completion; the answer, if one is given at once.
    pub(crate) fn told(&mut self, message: Down) -> Option<Up> {
        match message {
            Down::Reset(reset) => {
                self.status.resets_told += 1;
                self.status.told_generation = reset.assignment_generation;
                let tag = Some(reset.tag);
                remember(&mut self.resets, reset);
                (self.behave.resets == Obedience::Answer).then(|| self.reset_done(tag)).flatten()
            }
            Down::Mmio(access) => {
                self.status.registers_told += 1;
                if let Some(value) = access.write_value
                    && (self.registers.len() < TOLD_MAX || self.registers.contains_key(&access.offset))
                {
                    self.registers.insert(access.offset, value);
                }
                let tag = Some(access.tag);
                remember(&mut self.accesses, access);
                (self.behave.registers == Obedience::Answer).then(|| self.access_done(tag, None)).flatten()
            }
            // A second Welcome, or a kind that this version does not know: a hostile device does not mind.
            Down::Welcome(_) | Down::Dma(_) => None,
        }
    }

    /// The answer to a reset; `None` when none is held and no tag was given.
    pub(crate) fn reset_done(&mut self, tag: Option<u64>) -> Option<Up> {
        let held = match tag {
            None => self.resets.pop_front(),
            Some(tag) => {
                let at = self.resets.iter().position(|reset| reset.tag == tag);
                at.and_then(|at| self.resets.remove(at))
            }
        };
        if let Some(reset) = &held {
            self.status.assignment_generation = reset.assignment_generation;
        }
        tag.or(held.map(|reset| reset.tag)).map(|tag| Up::ResetDone(pb::ResetDone { tag }))
    }

    /// The answer to a register access; `None` when none is held and no tag was given. Without a value, a register reads as it was written.
    pub(crate) fn access_done(&mut self, tag: Option<u64>, value: Option<u64>) -> Option<Up> {
        let held = match tag {
            None => self.accesses.pop_front(),
            Some(tag) => {
                let at = self.accesses.iter().position(|access| access.tag == tag);
                at.and_then(|at| self.accesses.remove(at))
            }
        };
        let kept = match &held {
            Some(access) if access.write_value.is_none() => self.registers.get(&access.offset).copied(),
            _ => None,
        };
        let tag = tag.or(held.map(|access| access.tag))?;
        let outcome = pb::mmio_completion::Outcome::Value(value.or(kept).unwrap_or_default());
        Some(Up::Mmio(pb::MmioCompletion { tag, outcome: Some(outcome) }))
    }

    /// What it knows, now.
    pub(crate) fn status(&self) -> Status {
        Status {
            resets_held: self.resets.iter().map(|reset| reset.tag).collect(),
            registers_held: self.accesses.iter().map(|access| access.tag).collect(),
            ..self.status.clone()
        }
    }
}

/// Keeps the newest [`TOLD_MAX`].
fn remember<T>(kept: &mut VecDeque<T>, one: T) {
    if kept.len() == TOLD_MAX {
        kept.pop_front();
    }
    kept.push_back(one);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_answered_at_once_is_what_was_told_and_what_was_held_before_stays_held() {
        let mut peer = Peer::behaving(Behave { resets: Obedience::Hold, registers: Obedience::Hold });
        let reset = |tag| Down::Reset(pb::Reset { tag, assignment_generation: tag });
        let read =
            |tag| Down::Mmio(pb::MmioRequest { tag, bar: 0, offset: 8, width_bytes: 8, write_value: None });
        assert_eq!((peer.told(reset(1)), peer.told(read(2))), (None, None));
        peer.behave = Behave::default();
        assert_eq!(peer.told(reset(3)), Some(Up::ResetDone(pb::ResetDone { tag: 3 })));
        let outcome = Some(pb::mmio_completion::Outcome::Value(0));
        assert_eq!(peer.told(read(4)), Some(Up::Mmio(pb::MmioCompletion { tag: 4, outcome })));
        let status = peer.status();
        assert_eq!((status.resets_held, status.registers_held), (vec![1], vec![2]));
        assert_eq!(status.assignment_generation, 3);
    }
}
