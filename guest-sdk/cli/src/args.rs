//! The command line: what can be asked, and how it is explained.

mod hypervisor;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use guest_sdk::DEFAULT_ENDPOINT;
use iommu_types::{Access, AccessWidth, DeviceAddress, Owner, Pasid};

use crate::pki_args::PkiCommand;

pub(crate) use hypervisor::{
    FunctionArgs, FunctionCommand, FunctionDescription, SessionArgs, VmArgs, VmCommand,
};

/// See and steer an IOMMU server.
///
/// Everything is read-only unless its help says otherwise. Addresses may be written in hexadecimal (0x1000) or decimal; devices as
/// bus:device.function (00:01.0), with a segment for those of bare machines (0001:00:01.0); owners as driver:0 or vm:1.
#[derive(Debug, Parser)]
#[command(name = "iommuctl", version, max_term_width = 110, after_help = EXIT_CODES)]
pub(crate) struct Cli {
    /// Where the server listens: https://HOST:PORT, http://HOST:PORT (plaintext) or unix:///PATH.
    #[arg(long, global = true, env = "IOMMU_SERVER", default_value = DEFAULT_ENDPOINT, value_name = "URL")]
    pub(crate) server: String,
    /// Directory with certificates [default: $XDG_STATE_HOME/iommu/pki or ~/.local/state/iommu/pki].
    #[arg(long, global = true, env = "IOMMU_PKI", value_name = "DIR")]
    pub(crate) pki: Option<PathBuf>,
    /// File with certificate and key [default: operator-NAME.pem in the directory].
    #[arg(long, global = true, env = "IOMMU_CREDENTIAL", value_name = "FILE")]
    pub(crate) credential: Option<PathBuf>,
    /// File with the certificate of the authority [default: ca.crt in the directory].
    #[arg(long, global = true, env = "IOMMU_CA", value_name = "FILE")]
    pub(crate) ca: Option<PathBuf>,
    /// Name under which this session opens; over TLS that of the certificate. The server's configuration may restrict operators by name.
    #[arg(long, global = true, env = "IOMMU_NAME", default_value = "iommuctl", value_name = "NAME")]
    pub(crate) name: String,
    /// Print JSON: one document, or one line per record where records follow each other.
    #[arg(long, global = true)]
    pub(crate) json: bool,
    #[command(subcommand)]
    pub(crate) command: Command,
}

const EXIT_CODES: &str = "Exit codes: 0 done; 1 the server refused or failed; 2 wrong usage; 3 the access would be refused \
(translate, explain); 69 the server cannot be reached.";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Server, memory, owners and devices at a glance.
    Status,
    /// Devices: list, declare, attach, detach.
    #[command(subcommand)]
    Device(DeviceCommand),
    /// Owners: list them, declare a driver.
    #[command(subcommand)]
    Owner(OwnerCommand),
    /// Domains: mode, allocator, mappings, pending flushes, sanitizer.
    ///
    /// The table has a line per domain: "live" are mappings in use, "cached" mappings that are kept for the next map (persistent mode), "pending"
    /// unmaps that are answered and not yet invalidated, and "oldest" how long the oldest of them has waited: that is how long a device may
    /// already have used a stale translation (deferred mode). With a domain's number, a page tells everything about it.
    ///
    /// Example: iommuctl domains --owner driver:1
    Domains {
        /// Only this one, on a page with all its counters.
        domain: Option<u16>,
        /// Only those of this owner.
        #[arg(long)]
        owner: Option<Owner>,
    },
    /// What each owner uses of its limits, what is allowed, and how often each limit refused something.
    ///
    /// The names say the unit: one with _bytes in it is in bytes, one that ends in _per_second is a rate, of which the last second is shown as used; all
    /// others are counts.
    ///
    /// Example: iommuctl limits --owner vm:1
    Limits {
        /// Only of this owner.
        #[arg(long)]
        owner: Option<Owner>,
    },
    /// Virtual machines: create, list, destroy; give memory, take it back, move it. As a hypervisor.
    ///
    /// What a hypervisor has made lasts as long as its session, and a session outlives its last
    /// command by the server's grace (5 s unless configured). So keep it in the background:
    ///
    ///     iommuctl vm keep &
    ///     iommuctl vm create guest1
    ///     iommuctl vm add-memory 1 0x100000 0x400000
    ///     iommuctl function assign 00:03.0 1
    ///
    /// The session is in a file (--session), so that the next command goes on with it. `vm create`,
    /// `vm keep` and `function declare` open one when there is none; that takes the name over, and
    /// whatever another process has under it is reclaimed.
    #[command(verbatim_doc_comment)]
    Vm(VmArgs),
    /// PCI functions: describe them, assign them to virtual machines by isolation group, release them. As a hypervisor.
    ///
    /// All functions of an isolation group go to one virtual machine, since they can reach each other around the IOMMU. For the session see
    /// `iommuctl vm --help`.
    Function(FunctionArgs),
    /// Mappings of a domain, in the order of their addresses.
    Mappings {
        /// The domain.
        domain: u16,
        /// Only those that end above this address.
        #[arg(long, value_parser = number, default_value = "0", value_name = "IOVA")]
        from: u64,
        /// Without so many of those that begin at that very address.
        #[arg(long, default_value_t = 0)]
        skip: u32,
        /// At most so many.
        #[arg(long, default_value_t = 1000)]
        limit: u32,
    },
    /// Where an address of a device leads, in one line. Records no fault.
    Translate(AccessArgs),
    /// What would happen to one access and why: every table entry, every cache, the reason in words. Records no fault.
    ///
    /// Example: iommuctl explain 00:01.0 0xfffff000 --access write
    Explain(AccessArgs),
    /// Root, context and page-table entries of a device, raw and in words.
    Tables {
        /// The device.
        device: DeviceAddress,
        /// Root and context entries only.
        #[arg(long)]
        without_page_tables: bool,
    },
    /// What the IOTLB holds now.
    Iotlb {
        /// Only of this domain.
        #[arg(long)]
        domain: Option<u16>,
        /// At most so many entries.
        #[arg(long, default_value_t = 1000)]
        limit: u32,
    },
    /// Counters of the unit: caches, walks, invalidations, faults.
    Counters,
    /// Faults: list what is kept, or follow what comes.
    #[command(subcommand)]
    Fault(FaultCommand),
    /// Reports of the DMA sanitizer: list, follow, explain.
    ///
    /// They tell misuse that the hardware cannot see. The sanitizer looks only at domains that were created with it; `iommuctl domains` shows which. A report tells what went wrong (such as
    /// use-after-unmap, overrun, double-unmap), when, with which mapping, and who is to blame: the driver, the device, or unknown. Its kind,
    /// where that can be known, is V1 (the driver gave a wrong address), V2 (the device made a wrong access by itself) or V3 (memory was used
    /// after it was repurposed, or before).
    #[command(subcommand)]
    Sanitizer(SanitizerCommand),
    /// Memory of an owner as its processor sees it. Operators only.
    #[command(subcommand)]
    Memory(MemoryCommand),
    /// Registers of a device. Operators only; for debugging beside its driver.
    #[command(subcommand)]
    Mmio(MmioCommand),
    /// Certificates: make an authority, issue, revoke, list, show. Works on a directory, without a server.
    #[command(subcommand)]
    Pki(PkiCommand),
    /// Prints a completion script for a shell.
    Completion {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum DeviceCommand {
    /// Every declared device.
    List,
    /// Declares a device, so that an agent may connect for it. Changes the server. Over TLS its agent needs a certificate, which a
    /// server that has the key of the authority (ca.key) issues by itself; where the key is elsewhere: iommuctl pki issue device.
    Declare {
        /// Where it sits.
        device: DeviceAddress,
        /// Name with which its agent says Hello.
        #[arg(long)]
        device_name: String,
        /// Owner to give it to; attached to that owner's default domain.
        #[arg(long)]
        owner: Option<Owner>,
        #[command(flatten)]
        function: FunctionDescription,
    },
    /// Detaches a device, ends its session and forgets it. Changes the server.
    Remove {
        /// Which.
        device: DeviceAddress,
    },
    /// Gives a device to an owner and attaches it to a domain of that owner. Changes the server.
    Attach {
        /// Which.
        device: DeviceAddress,
        /// To whom.
        #[arg(long)]
        owner: Owner,
        /// To which domain; without it the owner's default domain of the device.
        #[arg(long)]
        domain: Option<u16>,
    },
    /// Detaches a device; every DMA of it is refused until it is attached again. Changes the server.
    Detach {
        /// Which.
        device: DeviceAddress,
    },
    /// Ends the session of a device's agent at once. Changes the server.
    Quarantine {
        /// Which.
        device: DeviceAddress,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum OwnerCommand {
    /// Every declared owner.
    List,
    /// Declares a driver, so that it may connect. Changes the server. Over TLS it needs a certificate, which a server that has the key of
    /// the authority (ca.key) issues by itself; where the key is elsewhere: iommuctl pki issue driver.
    Declare {
        /// driver:NUMBER.
        owner: Owner,
        /// Name with which it opens its session.
        #[arg(long)]
        owner_name: String,
    },
    /// Ends the session of an owner's driver at once and reclaims what it held. Changes the server.
    Quarantine {
        /// Which.
        owner: Owner,
    },
}

#[derive(Debug, Args)]
pub(crate) struct AccessArgs {
    /// By which device.
    pub(crate) device: DeviceAddress,
    /// At which I/O virtual address.
    #[arg(value_parser = number)]
    pub(crate) iova: u64,
    /// What is asked.
    #[arg(long, value_enum, default_value_t = AccessKind::Read)]
    pub(crate) access: AccessKind,
    /// Size in bytes; 0 is a zero-length read.
    #[arg(long, default_value_t = 1, value_name = "BYTES")]
    pub(crate) size: u32,
    /// PASID of the request, 20 bits.
    #[arg(long, value_parser = pasid)]
    pub(crate) pasid: Option<Pasid>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum AccessKind {
    /// A memory read.
    Read,
    /// A memory write.
    Write,
    /// A PCIe AtomicOp.
    Atomic,
}

impl From<AccessKind> for Access {
    fn from(kind: AccessKind) -> Self {
        match kind {
            AccessKind::Read => Self::Read,
            AccessKind::Write => Self::Write,
            AccessKind::Atomic => Self::Atomic,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct FaultFilter {
    /// Only of this owner's devices.
    #[arg(long)]
    pub(crate) owner: Option<Owner>,
    /// Only of this device.
    #[arg(long)]
    pub(crate) device: Option<DeviceAddress>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum FaultCommand {
    /// The records that are kept, oldest first.
    List {
        #[command(flatten)]
        filter: FaultFilter,
        /// At most so many, the newest.
        #[arg(long, default_value_t = 100)]
        limit: u32,
    },
    /// New records as they come, until interrupted.
    Follow {
        #[command(flatten)]
        filter: FaultFilter,
        /// Go on after this resume token (printed by list and follow with --json).
        #[arg(long, default_value = "", value_name = "TOKEN")]
        from: String,
        /// End after so many records.
        #[arg(long, value_name = "COUNT")]
        count: Option<u64>,
    },
}

#[derive(Debug, Args)]
pub(crate) struct ReportFilter {
    /// Only on this owner's domains.
    #[arg(long)]
    pub(crate) owner: Option<Owner>,
    /// Only on this domain.
    #[arg(long)]
    pub(crate) domain: Option<u16>,
    /// Only about this device.
    #[arg(long)]
    pub(crate) device: Option<DeviceAddress>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum SanitizerCommand {
    /// The reports that are kept, oldest first, one line each.
    List {
        #[command(flatten)]
        filter: ReportFilter,
        /// Only those with a larger number, and of them the oldest; numbers count per owner.
        #[arg(long, value_name = "NUMBER")]
        after: Option<u64>,
        /// At most so many; the newest, unless --after is given.
        #[arg(long, default_value_t = 100)]
        limit: u32,
    },
    /// New reports as they come, until interrupted.
    Follow {
        #[command(flatten)]
        filter: ReportFilter,
        /// Go on after this resume token (printed by list and follow with --json).
        #[arg(long, default_value = "", value_name = "TOKEN")]
        from: String,
        /// End after so many reports.
        #[arg(long, value_name = "COUNT")]
        count: Option<u64>,
    },
    /// One report in sentences, from what happened to what to do.
    ///
    /// It tells what and when, the life of the mapping with its requests, how long after, who is to blame and why, and what to do.
    ///
    /// Example: iommuctl sanitizer explain 7 --owner driver:1
    Explain {
        /// Its number, the first column of the list.
        #[arg(value_parser = clap::value_parser!(u64).range(1..))]
        number: u64,
        /// Whose; needed where several owners have a report of this number.
        #[arg(long)]
        owner: Option<Owner>,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum MemoryCommand {
    /// Reads memory; prints a hex dump unless --output is given.
    Read {
        /// Whose memory.
        owner: Owner,
        /// First byte.
        #[arg(value_parser = number)]
        gpa: u64,
        /// How many bytes.
        #[arg(value_parser = number)]
        size: u64,
        /// Write the bytes to this file; - for standard output.
        #[arg(long, value_name = "FILE")]
        output: Option<PathBuf>,
    },
    /// Writes memory. Changes the owner's memory.
    Write {
        /// Whose memory.
        owner: Owner,
        /// First byte.
        #[arg(value_parser = number)]
        gpa: u64,
        /// The bytes in hexadecimal.
        #[arg(long, conflicts_with = "input", required_unless_present = "input")]
        hex: Option<String>,
        /// Take the bytes from this file; - for standard input.
        #[arg(long, value_name = "FILE")]
        input: Option<PathBuf>,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum MmioCommand {
    /// Reads a register.
    Read(RegisterArgs),
    /// Writes a register. Changes the device.
    Write {
        #[command(flatten)]
        register: RegisterArgs,
        /// The value.
        #[arg(value_parser = number)]
        value: u64,
    },
}

#[derive(Debug, Args)]
pub(crate) struct RegisterArgs {
    /// Of which device.
    pub(crate) device: DeviceAddress,
    /// Offset in the BAR.
    #[arg(value_parser = number)]
    pub(crate) offset: u64,
    /// Base address register.
    #[arg(long, default_value_t = 0)]
    pub(crate) bar: u8,
    /// Width in bytes: 1, 2, 4 or 8.
    #[arg(long, default_value = "4", value_parser = width)]
    pub(crate) width: AccessWidth,
}

/// Reads 0x-prefixed hexadecimal or decimal.
pub(crate) fn number(text: &str) -> Result<u64, String> {
    let (digits, radix) = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => (digits, 16),
        None => (text, 10),
    };
    // `from_str_radix` would take a sign as well.
    if digits.starts_with('+') {
        return Err("a number has no sign; write 0x1000 or 4096".to_owned());
    }
    u64::from_str_radix(digits, radix).map_err(|error| format!("{error}; write 0x1000 or 4096"))
}

fn pasid(text: &str) -> Result<Pasid, String> {
    let number = u32::try_from(number(text)?).ok();
    number.and_then(Pasid::new).ok_or_else(|| "a PASID has 20 bits, so it is at most 0xfffff".to_owned())
}

fn width(text: &str) -> Result<AccessWidth, String> {
    let bytes = u32::try_from(number(text)?).ok();
    bytes.and_then(AccessWidth::from_bytes).ok_or_else(|| "a register is 1, 2, 4 or 8 bytes wide".to_owned())
}
