//! The commands that change something: devices, owners, registers.

use guest_sdk::{DomainId, Operator, Peer};
use serde_json::json;

use crate::args::{DeviceCommand, MmioCommand, OwnerCommand, RegisterArgs};
use crate::ask;
use crate::json::{self, hex};
use crate::print::Output;

/// `device …`.
pub(crate) async fn device(operator: &Operator, out: Output, command: &DeviceCommand) -> anyhow::Result<()> {
    let admin = operator.admin();
    match command {
        DeviceCommand::List => ask::devices(operator, out).await,
        DeviceCommand::Declare { device, device_name, owner, function } => {
            let function = function.function();
            admin.declare_device_as(*device, device_name, *owner, function).await?;
            let value = json!({ "device": device.to_string(), "declared": true, "function": json::function(function) });
            out.line(&value, || format!("declared {device} as {device_name}: {function}"));
            Ok(())
        }
        DeviceCommand::Remove { device } => {
            admin.remove_device(*device).await?;
            out.line(&json!({ "device": device.to_string(), "removed": true }), || {
                format!("removed {device}")
            });
            Ok(())
        }
        DeviceCommand::Attach { device, owner, domain } => {
            let domain = admin.attach_to_owner(*device, *owner, domain.map(DomainId::new)).await?;
            let value = json!({ "device": device.to_string(), "owner": owner.to_string(), "domain_id": domain.get() });
            out.line(&value, || format!("{device} belongs to {owner} and is attached to domain {domain}"));
            Ok(())
        }
        DeviceCommand::Detach { device } => {
            admin.detach(*device).await?;
            out.line(&json!({ "device": device.to_string(), "detached": true }), || {
                format!("detached {device}; every DMA of it is refused until it is attached again")
            });
            Ok(())
        }
        DeviceCommand::Quarantine { device } => {
            quarantine(operator, out, Peer::Device(*device), device.to_string()).await
        }
    }
}

/// `owner …`.
pub(crate) async fn owner(operator: &Operator, out: Output, command: &OwnerCommand) -> anyhow::Result<()> {
    match command {
        OwnerCommand::List => ask::owners(operator, out).await,
        OwnerCommand::Declare { owner, owner_name } => {
            operator.admin().declare_driver(*owner, owner_name).await?;
            let value = json!({ "owner": owner.to_string(), "declared": true });
            out.line(&value, || format!("declared {owner} as {owner_name}"));
            Ok(())
        }
        OwnerCommand::Quarantine { owner } => {
            quarantine(operator, out, Peer::Owner(*owner), owner.to_string()).await
        }
    }
}

async fn quarantine(operator: &Operator, out: Output, peer: Peer, name: String) -> anyhow::Result<()> {
    let ended = operator.admin().quarantine(peer).await?;
    out.line(&json!({ "peer": name, "ended": ended }), || {
        if ended { format!("ended the session of {name}") } else { format!("{name} had no session") }
    });
    Ok(())
}

/// `mmio …`.
pub(crate) async fn mmio(operator: &Operator, out: Output, command: &MmioCommand) -> anyhow::Result<()> {
    match command {
        MmioCommand::Read(register) => {
            let RegisterArgs { device, offset, bar, width } = *register;
            let value = operator.admin().mmio_read(device, bar, offset, width).await?;
            out.line(&json!({ "offset": hex(register.offset), "value": hex(value) }), || hex(value));
        }
        MmioCommand::Write { register, value } => {
            let RegisterArgs { device, offset, bar, width } = *register;
            operator.admin().mmio_write(device, bar, offset, width, *value).await?;
            out.line(&json!({ "offset": hex(register.offset), "written": hex(*value) }), || {
                format!("wrote {value:#x} to register {:#x} of {}", register.offset, register.device)
            });
        }
    }
    Ok(())
}
