//! PCI functions: described, listed, handed out by isolation group.

use guest_sdk::{DeviceAddress, FunctionState};
use serde_json::{Value, json};

use crate::args::{Cli, FunctionArgs, FunctionCommand};
use crate::ask::yes_no;
use crate::json;
use crate::print::Output;
use crate::session::{self, Absent};
use crate::words::or_dash;

fn state_value(state: &FunctionState) -> Value {
    json!({
        "device": state.device.to_string(),
        "name": state.name,
        "function": json::function(state.function),
        "group": state.group.to_string(),
        "owner": state.owner.map(|owner| owner.to_string()),
        "connected": state.connected,
        "assignment_generation": state.assignment_generation.0,
    })
}

fn state_row(state: &FunctionState) -> Vec<String> {
    vec![
        state.device.to_string(),
        state.name.clone(),
        state.function.to_string(),
        state.group.to_string(),
        or_dash(state.owner),
        yes_no(state.connected),
        state.assignment_generation.0.to_string(),
    ]
}

fn names(functions: &[DeviceAddress]) -> Vec<String> {
    functions.iter().map(ToString::to_string).collect()
}

/// `function …`.
pub(crate) async fn run(cli: &Cli, out: Output, args: &FunctionArgs) -> anyhow::Result<()> {
    let absent = match &args.command {
        FunctionCommand::Declare { .. } => Absent::Open,
        _ => Absent::Refuse,
    };
    let session = session::open(cli, &args.session, absent).await?;
    let hypervisor = &session.hypervisor;
    match &args.command {
        FunctionCommand::Declare { device, device_name, function } => {
            let function = function.function();
            hypervisor.declare_function(*device, device_name, function).await?;
            let value = json!({ "device": device.to_string(), "declared": true, "function": json::function(function) });
            out.line(&value, || format!("declared {device} as {device_name}: {function}"));
        }
        FunctionCommand::List => {
            let functions = hypervisor.functions().await?;
            let head = ["device", "name", "function", "group", "owner", "connected", "generation"];
            let rows = functions.iter().map(state_row).collect();
            out.table(&functions.iter().map(state_value).collect(), &head, rows);
        }
        FunctionCommand::Assign { device, vm } => {
            let functions = names(&hypervisor.assign(*device, *vm).await?);
            let value = json!({ "vm": vm, "functions": functions });
            out.line(&value, || format!("assigned {} to vm:{vm}", functions.join(", ")));
        }
        FunctionCommand::Release { device } => {
            let functions = names(&hypervisor.release(*device).await?);
            out.line(&json!({ "functions": functions }), || format!("released {}", functions.join(", ")));
        }
        FunctionCommand::Remove { device } => {
            hypervisor.remove_function(*device).await?;
            let value = json!({ "device": device.to_string(), "removed": true });
            out.line(&value, || format!("removed {device}"));
        }
    }
    Ok(())
}
