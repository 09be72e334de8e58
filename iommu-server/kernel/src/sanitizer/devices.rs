//! What is remembered of each device: the addresses it was given, and the transfers it is in the middle of.
//!
//! A device moves a long transfer piece by piece, and several transfers at once. A run is such a transfer: the next piece is the
//! access of the same kind that begins where the run ends.

use std::collections::VecDeque;

use iommu_types::{Access, DeviceAddress};

use super::mapping::{Asked, Mapping};
use super::supplied::{Supplied, Supply};

/// Transfers of one device that are followed at once: the queues of a usual device, and the rings beside them.
const RUNS_MAX: usize = 64;

/// A transfer in pieces.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run {
    /// Where the next piece begins.
    end: u64,
    access: Access,
    /// First address of its first piece.
    pub(super) start: u64,
    pub(super) origin: Origin,
}

/// Where a transfer began.
#[derive(Clone, Copy, Debug)]
pub(super) enum Origin {
    /// In a mapping, alive or dead.
    Mapping(Mapping),
    Outside,
    /// Where it could not be judged.
    Doubtful,
}

/// One device.
#[derive(Debug)]
pub(super) struct Device {
    address: DeviceAddress,
    used_at: u64,
    pub(super) supplied: Supplied,
    runs: VecDeque<Run>,
    /// Whether a run was forgotten that had reached the end of its mapping, as most do.
    has_forgotten_whole: bool,
    /// Between which addresses the other runs ended that were forgotten outside of a mapping.
    forgotten_ends: Option<(u64, u64)>,
}

impl Device {
    /// The run that the access continues.
    pub(super) fn continued(&self, asked: &Asked) -> Option<&Run> {
        self.runs.iter().find(|run| run.end == asked.first && run.access == asked.access)
    }
    /// The access was a piece of a transfer that began so.
    pub(super) fn follow(&mut self, asked: &Asked, start: u64, origin: Origin) {
        let Some(end) = asked.last.checked_add(1) else { return };
        let access = asked.access;
        self.runs.retain(|run| run.access != access || (run.end != asked.first && run.end != end));
        if self.runs.len() >= RUNS_MAX {
            self.forget_oldest_run();
        }
        self.runs.push_back(Run { end, access, start, origin });
    }
    /// What goes on inside of a mapping needs no run to be judged. What goes on outside does, unless its start was the device's own.
    fn forget_oldest_run(&mut self) {
        let Some(run) = self.runs.pop_front() else { return };
        let supply = match run.origin {
            Origin::Mapping(mapping) if mapping.contains(run.end) => return,
            Origin::Mapping(mapping) if mapping.contains(run.end - 1) => {
                self.has_forgotten_whole = true;
                return;
            }
            Origin::Mapping(mapping) => self.supplied.within(mapping.first(), mapping.last()),
            Origin::Outside => self.supplied.exactly(run.start),
            Origin::Doubtful => Supply::Perhaps,
        };
        if supply != Supply::Never {
            let (first, last) = self.forgotten_ends.unwrap_or((run.end, run.end));
            self.forgotten_ends = Some((first.min(run.end), last.max(run.end)));
        }
    }
    /// Whether a transfer that was forgotten may go on at the address, which lies outside of all mappings.
    pub(super) fn may_go_on_at(&self, address: u64, ends_a_mapping: impl FnOnce() -> bool) -> bool {
        self.forgotten_ends.is_some_and(|(first, last)| (first..=last).contains(&address))
            || (self.has_forgotten_whole && ends_a_mapping())
    }
}

/// The devices of a domain.
#[derive(Debug)]
pub(super) struct Devices {
    capacity: usize,
    supplied_capacity: usize,
    devices: Vec<Device>,
    uses: u64,
    /// Whether a device was forgotten: one that comes anew may have been given anything before.
    has_forgotten: bool,
}

impl Devices {
    pub(super) fn new(capacity: usize, supplied_capacity: usize) -> Self {
        let capacity = capacity.max(1);
        Self { capacity, supplied_capacity, devices: Vec::new(), uses: 0, has_forgotten: false }
    }
    /// The device; when there are too many, the one that was used least recently makes place.
    pub(super) fn device(&mut self, address: DeviceAddress) -> &mut Device {
        self.uses += 1;
        let known = self.devices.iter().position(|device| device.address == address);
        let index = known.unwrap_or_else(|| self.add(address));
        let device = &mut self.devices[index];
        device.used_at = self.uses;
        device
    }
    fn add(&mut self, address: DeviceAddress) -> usize {
        if self.devices.len() >= self.capacity {
            let least = self.devices.iter().enumerate().min_by_key(|(_, device)| device.used_at);
            if let Some((index, _)) = least {
                self.devices.swap_remove(index);
                self.has_forgotten = true;
            }
        }
        let supplied = Supplied::new(self.supplied_capacity, self.has_forgotten);
        self.devices.push(Device {
            address,
            used_at: self.uses,
            supplied,
            runs: VecDeque::new(),
            has_forgotten_whole: false,
            forgotten_ends: None,
        });
        self.devices.len() - 1
    }
    /// A mapping died: runs that began in it say so.
    pub(super) fn mapping_died(&mut self, mapping: &Mapping) {
        for run in self.devices.iter_mut().flat_map(|device| &mut device.runs) {
            if let Origin::Mapping(origin) = &mut run.origin
                && origin.number == mapping.number
            {
                *origin = *mapping;
            }
        }
    }
}
