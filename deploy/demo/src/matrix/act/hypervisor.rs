//! A hypervisor.

use std::collections::BTreeMap;

use guest_sdk::{DeviceAddress, Gpa, GpaRange, Hypervisor, PciFunction, Revocation, TenantLimits, VmOptions};

use super::language::{Ask, Refused, Reply};
use super::nonsense;

fn range(gpa: u64, bytes: u64) -> Result<GpaRange, Refused> {
    GpaRange::new(Gpa::new(gpa), bytes).map_err(nonsense)
}

fn limits(named: &BTreeMap<String, u64>) -> Result<TenantLimits, Refused> {
    let mut limits = TenantLimits::default();
    for (name, value) in named {
        match name.as_str() {
            "mappings" => limits.mappings = Some(*value),
            "domains" => limits.domains = Some(u32::try_from(*value).map_err(nonsense)?),
            "dma_operations_per_second" => {
                limits.dma_operations_per_second = Some(u32::try_from(*value).map_err(nonsense)?);
            }
            other => return Err(nonsense(other)),
        }
    }
    Ok(limits)
}

pub(super) async fn obey(hypervisor: &Hypervisor, ask: Ask) -> Result<Reply, Refused> {
    let address = |device: &str| device.parse::<DeviceAddress>().map_err(nonsense);
    match ask {
        Ask::CreateVm { number, name, limits: named } => {
            let options = VmOptions::new(name).with_number(number).with_limits(limits(&named)?);
            hypervisor.create_vm(options).await?;
        }
        Ask::AddMemory { vm, gpa, bytes } => hypervisor.vm(vm).add_memory(range(gpa.0, bytes)?).await?,
        Ask::MoveMemory { from, gpa, bytes, to, to_gpa, revoke } => {
            let how = if revoke { Revocation::Revoke } else { Revocation::Refuse };
            let (from, to) = (hypervisor.vm(from), hypervisor.vm(to));
            let revoked = from.move_memory(range(gpa.0, bytes)?, &to, Gpa::new(to_gpa.0), how).await?;
            return Ok(Reply::value(revoked));
        }
        Ask::Declare { device, name } => {
            hypervisor.declare_function(address(&device)?, name, PciFunction::ISOLATED).await?;
        }
        Ask::Assign { device, vm } => {
            hypervisor.vm(vm).assign(address(&device)?).await?;
        }
        other => return Err(nonsense(other)),
    }
    Ok(Reply::default())
}
