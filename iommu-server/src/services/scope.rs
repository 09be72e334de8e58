//! Which logs a caller reads: a driver its own, a hypervisor those of its virtual machines, observers and operators all of them.

use std::sync::Arc;

use iommu_types::Owner;
use iommu_types::errors::NotYours;

use super::Caller;
use crate::host::hypervisors::HypervisorState;

/// Which logs a caller reads. One that comes later may be among them.
#[derive(Clone, Debug)]
pub(super) enum Scope {
    /// One: an owner's, or that of what nobody owns.
    One(Option<Owner>),
    /// That of one virtual machine, for as long as it is the hypervisor's: its number may come again, and be another's.
    Vm(Arc<HypervisorState>, Owner),
    /// Those of a hypervisor's virtual machines.
    Vms(Arc<HypervisorState>),
    /// All there are.
    All,
}

impl Scope {
    /// What a caller may read; only the log of `named` if one is named. `what` says what it is a log of.
    pub(super) fn of(caller: &Caller, named: Option<Owner>, what: &str) -> Result<Self, NotYours> {
        if let Some(named) = named {
            caller.must_see(Some(named), format!("{what} {named}"))?;
            let of_hypervisor = caller.session.hypervisor().map(|own| Self::Vm(Arc::clone(own), named));
            return Ok(of_hypervisor.unwrap_or(Self::One(Some(named))));
        }
        if caller.sees_all() {
            return Ok(Self::All);
        }
        let of_hypervisor = caller.session.hypervisor().map(|own| Self::Vms(Arc::clone(own)));
        Ok(of_hypervisor.unwrap_or_else(|| Self::One(caller.session.owner().map(|own| own.owner))))
    }
    /// Whether a log is one of these.
    pub(super) fn has(&self, log: Option<Owner>) -> bool {
        match self {
            Self::One(only) => *only == log,
            Self::Vm(hypervisor, only) => log == Some(*only) && hypervisor.owns(*only),
            Self::Vms(hypervisor) => log.is_some_and(|owner| hypervisor.owns(owner)),
            Self::All => true,
        }
    }
    /// Of the logs there are those that are of these; the only one also when there is none yet.
    pub(super) fn among(&self, all: impl IntoIterator<Item = Option<Owner>>) -> Vec<Option<Owner>> {
        match self {
            Self::One(only) => vec![*only],
            _ => all.into_iter().filter(|log| self.has(*log)).collect(),
        }
    }
}
