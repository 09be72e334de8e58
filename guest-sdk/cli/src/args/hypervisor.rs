//! What a hypervisor can be asked to do.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use guest_sdk::{FunctionKind, PciFunction, Revocation, TenantLimits};
use iommu_types::{DeviceAddress, Owner};

use super::number;

/// Longest time that a session is kept for at once: a century, which every clock can count.
const KEEP_SECONDS_MAX: u64 = 100 * 365 * 24 * 60 * 60;

/// As whom, and with which session.
#[derive(Clone, Debug, Args)]
pub(crate) struct SessionArgs {
    /// The hypervisor; the server's configuration may restrict hypervisors by name.
    #[arg(long = "as", global = true, env = "IOMMU_HYPERVISOR", default_value = "hv0", value_name = "NAME")]
    pub(crate) hypervisor: String,
    /// File with the session, made where it is absent and readable for its owner only; iommuctl-NAME.session in XDG_RUNTIME_DIR, or else .iommuctl-NAME.session in HOME, unless given.
    #[arg(long, global = true, env = "IOMMU_SESSION", value_name = "FILE")]
    pub(crate) session: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct VmArgs {
    #[command(flatten)]
    pub(crate) session: SessionArgs,
    #[command(subcommand)]
    pub(crate) command: VmCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum VmCommand {
    /// Creates a virtual machine without memory and without devices. Changes the server.
    ///
    /// Example: iommuctl vm create guest1 --number 1 --max-memory-bytes 0x4000000
    Create {
        /// Name with which its driver opens its session.
        guest_name: String,
        /// Its number; without it the next free one.
        #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
        number: Option<u32>,
        #[command(flatten)]
        limits: LimitArgs,
    },
    /// The virtual machines of the hypervisor, with memory in bytes and functions.
    List,
    /// Ends the sessions of its driver, releases its devices, removes its mappings, takes back and wipes its memory. Changes the server.
    Destroy {
        /// Its number, also as vm:NUMBER.
        #[arg(value_parser = vm)]
        vm: u32,
    },
    /// Gives a virtual machine zeroed memory. Changes the server.
    ///
    /// Example: iommuctl vm add-memory 1 0x100000 0x400000
    AddMemory {
        /// To whom.
        #[arg(value_parser = vm)]
        vm: u32,
        /// Guest-physical address of the first byte; a multiple of 4096.
        #[arg(value_parser = number)]
        gpa: u64,
        /// Size in bytes; a multiple of 4096.
        #[arg(value_parser = number, value_name = "BYTES")]
        size: u64,
    },
    /// Takes memory back and wipes it; done when nothing can reach it any more. Changes the server.
    RemoveMemory {
        /// From whom.
        #[arg(value_parser = vm)]
        vm: u32,
        /// Guest-physical address of the first byte; a multiple of 4096.
        #[arg(value_parser = number)]
        gpa: u64,
        /// Size in bytes; a multiple of 4096.
        #[arg(value_parser = number, value_name = "BYTES")]
        size: u64,
        #[command(flatten)]
        how: RevocationArgs,
    },
    /// Moves the very frames from one virtual machine to another, wiped on the way. Changes the server.
    ///
    /// Example: iommuctl vm move-memory 1 0x100000 0x1000 2 0x200000 --how revoke
    MoveMemory {
        /// From whom.
        #[arg(value_parser = vm)]
        from_vm: u32,
        /// Where it is there.
        #[arg(value_parser = number)]
        from_gpa: u64,
        /// Size in bytes; a multiple of 4096.
        #[arg(value_parser = number, value_name = "BYTES")]
        size: u64,
        /// To whom.
        #[arg(value_parser = vm)]
        to_vm: u32,
        /// Where it will be there.
        #[arg(value_parser = number)]
        to_gpa: u64,
        #[command(flatten)]
        how: RevocationArgs,
    },
    /// Keeps the session, and so all that the hypervisor made, until interrupted.
    Keep {
        /// End after so many seconds.
        #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(..=KEEP_SECONDS_MAX))]
        seconds: Option<u64>,
    },
}

/// Limits of a virtual machine; what is not given is the server's, which is also the most.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct LimitArgs {
    /// Domains at once.
    #[arg(long, value_name = "COUNT")]
    max_domains: Option<u32>,
    /// Mappings at once.
    #[arg(long, value_name = "COUNT")]
    max_mappings: Option<u64>,
    /// Bytes mapped at once; a byte mapped twice counts twice.
    #[arg(long, value_parser = number, value_name = "BYTES")]
    max_mapped_bytes: Option<u64>,
    /// Bytes of memory.
    #[arg(long, value_parser = number, value_name = "BYTES")]
    max_memory_bytes: Option<u64>,
    /// Interrupts.
    #[arg(long, value_name = "COUNT")]
    max_interrupts: Option<u32>,
    /// Requests of its driver in a second.
    #[arg(long, value_name = "PER_SECOND")]
    max_requests: Option<u32>,
    /// DMA operations of its devices in a second.
    #[arg(long, value_name = "PER_SECOND")]
    max_dma_operations: Option<u32>,
    /// Bytes of DMA of its devices in a second.
    #[arg(long, value_parser = number, value_name = "BYTES_PER_SECOND")]
    max_dma_bytes: Option<u64>,
}

impl LimitArgs {
    pub(crate) fn limits(self) -> TenantLimits {
        TenantLimits {
            domains: self.max_domains,
            mappings: self.max_mappings,
            mapped_bytes: self.max_mapped_bytes,
            memory_bytes: self.max_memory_bytes,
            interrupts: self.max_interrupts,
            requests_per_second: self.max_requests,
            dma_operations_per_second: self.max_dma_operations,
            dma_bytes_per_second: self.max_dma_bytes,
        }
    }
}

/// What is done about mappings of memory that is to leave.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct RevocationArgs {
    /// What is done about mappings of it.
    #[arg(long, value_enum, default_value_t = RevocationKind::Refuse)]
    how: RevocationKind,
    /// With --how wait: how long at most, in milliseconds.
    #[arg(long, default_value_t = 1000, value_name = "MILLISECONDS", value_parser = clap::value_parser!(u32).range(1..=30_000))]
    wait_ms: u32,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum RevocationKind {
    /// Refused when there are any.
    Refuse,
    /// Waits until the driver has unmapped.
    Wait,
    /// Unmapped by force, invalidated and drained.
    Revoke,
}

impl RevocationArgs {
    pub(crate) fn revocation(self) -> Revocation {
        match self.how {
            RevocationKind::Refuse => Revocation::Refuse,
            RevocationKind::Wait => Revocation::Wait { wait_ms: self.wait_ms },
            RevocationKind::Revoke => Revocation::Revoke,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct FunctionArgs {
    #[command(flatten)]
    pub(crate) session: SessionArgs,
    #[command(subcommand)]
    pub(crate) command: FunctionCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum FunctionCommand {
    /// Describes a function of the host, so that it can be assigned and its agent may connect. Changes the server.
    ///
    /// Example: iommuctl function declare 00:08.1 --device-name vf1 --virtual-function-of 00:08.0
    Declare {
        /// Where it sits.
        device: DeviceAddress,
        /// Name with which its agent says Hello.
        #[arg(long)]
        device_name: String,
        #[command(flatten)]
        function: FunctionDescription,
    },
    /// The functions that the hypervisor may assign or has assigned.
    ///
    /// An isolation group is named after the lowest address in it. "generation" counts the changes of hand and the resets of a function.
    List,
    /// Assigns the isolation group of a function to a virtual machine; one that another machine has is released first. Changes the server.
    Assign {
        /// A function of the group.
        device: DeviceAddress,
        /// To whom.
        #[arg(value_parser = vm)]
        vm: u32,
    },
    /// Releases the isolation group of a function: detached, drained, reset. Changes the server.
    Release {
        /// A function of the group.
        device: DeviceAddress,
    },
    /// Forgets a function that the hypervisor declared and nobody has. Changes the server.
    Remove {
        /// Which.
        device: DeviceAddress,
    },
}

/// What a PCI function is; an ordinary one with ACS unless said otherwise.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct FunctionDescription {
    /// It is a bridge or switch port to these buses, in hexadecimal: SECONDARY or SECONDARY-SUBORDINATE.
    #[arg(long, value_parser = buses, value_name = "BUSES", conflicts_with = "virtual_function_of")]
    bridge: Option<(u8, u8)>,
    /// It is an SR-IOV virtual function of this one.
    #[arg(long, value_name = "DEVICE")]
    virtual_function_of: Option<DeviceAddress>,
    /// It has no Access Control Services, so it shares an isolation group with its neighbours.
    #[arg(long)]
    no_acs: bool,
}

impl FunctionDescription {
    pub(crate) fn function(self) -> PciFunction {
        let kind = match (self.bridge, self.virtual_function_of) {
            (Some((secondary_bus, subordinate_bus)), _) => {
                FunctionKind::Bridge { secondary_bus, subordinate_bus }
            }
            (None, Some(physical)) => FunctionKind::VirtualFunction { physical },
            (None, None) => FunctionKind::Endpoint,
        };
        PciFunction { kind, acs: !self.no_acs }
    }
}

/// A virtual machine by number or as an owner.
fn vm(text: &str) -> Result<u32, String> {
    if let Ok(number) = text.parse() {
        return Ok(number);
    }
    match text.parse() {
        Ok(Owner::Vm(number)) => Ok(number),
        _ => Err("a virtual machine is named by its number; write 1 or vm:1".to_owned()),
    }
}

fn buses(text: &str) -> Result<(u8, u8), String> {
    let bus = |digits: &str| {
        let is_number =
            (1..=2).contains(&digits.len()) && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
        is_number.then(|| u8::from_str_radix(digits, 16).ok()).flatten()
    };
    let (secondary, subordinate) = text.split_once('-').unwrap_or((text, text));
    match (bus(secondary), bus(subordinate)) {
        (Some(secondary), Some(subordinate)) if secondary <= subordinate => Ok((secondary, subordinate)),
        _ => Err("buses are two hexadecimal digits, the lower one first; write 02 or 02-04".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machines_and_buses_are_read_and_nonsense_is_not() {
        for (text, expected) in
            [("1", Some(1)), ("vm:7", Some(7)), ("driver:1", None), ("0x1", None), ("-1", None)]
        {
            assert_eq!(vm(text).ok(), expected, "{text}");
        }
        for (text, expected) in [
            ("02", Some((2, 2))),
            ("2-a", Some((2, 10))),
            ("04-02", None),
            ("+2", None),
            ("100", None),
            ("02-", None),
            ("", None),
        ] {
            assert_eq!(buses(text).ok(), expected, "{text}");
        }
    }
}
