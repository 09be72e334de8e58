//! Virtual machines: made, fed, listed, unmade.

use std::time::Duration;

use anyhow::bail;
use guest_sdk::errors::SessionError;
use guest_sdk::{Gpa, GpaRange, SdkError, TransportError, VmOptions, VmState};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::args::{Cli, VmArgs, VmCommand};
use crate::ask::yes_no;
use crate::json::hex;
use crate::print::Output;
use crate::session::{self, Absent};
use crate::words::count;

/// Delay before another attempt to come back to a session: well below any grace.
const COME_BACK_AGAIN: Duration = Duration::from_millis(100);

fn range(gpa: u64, size_bytes: u64) -> anyhow::Result<GpaRange> {
    Ok(GpaRange::new(Gpa::new(gpa), size_bytes)?)
}

fn state_value(vm: &VmState) -> Value {
    let memory = vm.memory.iter();
    let memory =
        memory.map(|region| json!({ "gpa": hex(region.gpa.get()), "size_bytes": region.size_bytes }));
    json!({
        "number": vm.number,
        "name": vm.name,
        "connected": vm.connected,
        "memory": memory.collect::<Vec<_>>(),
        "functions": vm.functions.iter().map(ToString::to_string).collect::<Vec<_>>(),
    })
}

fn state_row(vm: &VmState) -> Vec<String> {
    let total: u64 = vm.memory.iter().fold(0, |sum, region| sum.saturating_add(region.size_bytes));
    let regions: Vec<String> =
        vm.memory.iter().map(|region| format!("{:#x}+{:#x}", region.gpa.get(), region.size_bytes)).collect();
    let functions: Vec<String> = vm.functions.iter().map(ToString::to_string).collect();
    vec![
        format!("vm:{}", vm.number),
        vm.name.clone(),
        yes_no(vm.connected),
        total.to_string(),
        if regions.is_empty() { "-".to_owned() } else { regions.join(" ") },
        if functions.is_empty() { "-".to_owned() } else { functions.join(" ") },
    ]
}

/// `vm …`.
pub(crate) async fn run(cli: &Cli, out: Output, args: &VmArgs) -> anyhow::Result<()> {
    let absent = match &args.command {
        VmCommand::Keep { seconds } => return keep(cli, out, args, *seconds).await,
        VmCommand::Create { .. } => Absent::Open,
        _ => Absent::Refuse,
    };
    let session = session::open(cli, &args.session, absent).await?;
    let hypervisor = &session.hypervisor;
    match &args.command {
        VmCommand::Create { guest_name, number, limits } => {
            let mut options = VmOptions::new(guest_name).with_limits(limits.limits());
            if let Some(number) = number {
                options = options.with_number(*number);
            }
            let number = hypervisor.create_vm(options).await?.number();
            let grace = hypervisor.grace();
            let value = json!({ "vm": number, "name": guest_name, "grace_ms": grace.as_millis() as u64 });
            out.line(&value, || {
                format!("created vm:{number}; it goes {grace:?} after the last command unless `iommuctl vm keep` runs")
            });
        }
        VmCommand::List => {
            let vms = hypervisor.vms().await?;
            let head = ["vm", "name", "connected", "memory bytes", "at", "functions"];
            out.table(&vms.iter().map(state_value).collect(), &head, vms.iter().map(state_row).collect());
        }
        VmCommand::Destroy { vm } => {
            hypervisor.vm(*vm).destroy().await?;
            out.line(&json!({ "vm": vm, "destroyed": true }), || format!("destroyed vm:{vm}"));
        }
        VmCommand::AddMemory { vm, gpa, size } => {
            hypervisor.vm(*vm).add_memory(range(*gpa, *size)?).await?;
            let value = json!({ "vm": vm, "gpa": hex(*gpa), "size_bytes": size });
            out.line(&value, || format!("vm:{vm} has {} at gpa:{gpa:#x}", count(*size, "byte")));
        }
        VmCommand::RemoveMemory { vm, gpa, size, how } => {
            let revoked = hypervisor.vm(*vm).remove_memory(range(*gpa, *size)?, how.revocation()).await?;
            let value =
                json!({ "vm": vm, "gpa": hex(*gpa), "size_bytes": size, "revoked_mappings": revoked });
            out.line(&value, || {
                let (bytes, mappings) = (count(*size, "byte"), count(revoked, "mapping revoked"));
                format!("took {bytes} at gpa:{gpa:#x} from vm:{vm}, {mappings}")
            });
        }
        VmCommand::MoveMemory { from_vm, from_gpa, size, to_vm, to_gpa, how } => {
            let (from, to) = (hypervisor.vm(*from_vm), hypervisor.vm(*to_vm));
            let range = range(*from_gpa, *size)?;
            let revoked = from.move_memory(range, &to, Gpa::new(*to_gpa), how.revocation()).await?;
            let value = json!({
                "from_vm": from_vm, "from_gpa": hex(*from_gpa), "size_bytes": size,
                "to_vm": to_vm, "to_gpa": hex(*to_gpa), "revoked_mappings": revoked,
            });
            out.line(&value, || {
                let (bytes, mappings) = (count(*size, "byte"), count(revoked, "mapping revoked"));
                format!("moved {bytes} from vm:{from_vm} gpa:{from_gpa:#x} to vm:{to_vm} gpa:{to_gpa:#x}, {mappings}")
            });
        }
        VmCommand::Keep { .. } => {}
    }
    Ok(())
}

/// Whether a failure to come back may pass by itself.
fn passes(error: &anyhow::Error) -> bool {
    match error.downcast_ref::<SdkError<SessionError>>() {
        Some(SdkError::Transport(error)) => matches!(
            error,
            TransportError::Unreachable { .. }
                | TransportError::Deadline { .. }
                | TransportError::Status { .. }
        ),
        Some(SdkError::Refused(refused)) => {
            matches!(refused, SessionError::ShuttingDown(_) | SessionError::LimitReached(_))
        }
        Some(SdkError::Call(_)) | None => false,
    }
}

/// Comes back once; gives the grace. A failure that may pass is tried again until `give_up`.
async fn come_back(cli: &Cli, args: &VmArgs, absent: Absent, give_up: Instant) -> anyhow::Result<Duration> {
    loop {
        match session::open(cli, &args.session, absent).await {
            Ok(session) => return Ok(session.hypervisor.grace()),
            Err(error) if passes(&error) && Instant::now() < give_up => {
                tokio::time::sleep(COME_BACK_AGAIN).await;
            }
            Err(error) => return Err(error),
        }
    }
}

/// `vm keep`: comes back within the grace, again and again; other commands use the session in between.
async fn keep(cli: &Cli, out: Output, args: &VmArgs, seconds: Option<u64>) -> anyhow::Result<()> {
    let end = seconds.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let keeping = keep_until(cli, out, args, end);
    tokio::select! {
        kept = keeping => kept,
        interrupted = tokio::signal::ctrl_c() => Ok(interrupted?),
    }
}

async fn keep_until(cli: &Cli, out: Output, args: &VmArgs, end: Option<Instant>) -> anyhow::Result<()> {
    // Where nothing is kept yet there is nothing to lose by giving up at once.
    let (mut absent, mut give_up) = (Absent::Open, Instant::now());
    loop {
        let grace = come_back(cli, args, absent, give_up).await?;
        if grace.is_zero() {
            bail!("the server keeps nothing of a lost connection; start it with a --grace");
        }
        if absent == Absent::Open {
            let name = &args.session.hypervisor;
            out.line(&json!({ "name": name, "grace_ms": grace.as_millis() as u64 }), || {
                format!("keeping the session of {name}; interrupt to let it go in {grace:?}")
            });
        }
        // One that is lost from here on is not another one's place to take.
        absent = Absent::Refuse;
        give_up = Instant::now() + grace;
        let wake = Instant::now() + grace / 3;
        tokio::time::sleep_until(end.map_or(wake, |end| wake.min(end))).await;
        if end.is_some_and(|end| Instant::now() >= end) {
            return Ok(());
        }
    }
}
