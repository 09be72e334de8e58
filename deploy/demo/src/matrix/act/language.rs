//! What a driver, a guest, a hypervisor or the operating system of a bare machine can be told, and what it answers: one line of JSON each.

use std::collections::BTreeMap;

use rogue::text::{Address, Hex};
use serde::{Deserialize, Serialize};

use crate::matrix::column::Column;

/// Which way data flows, seen from the CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Way {
    ToDevice,
    FromDevice,
    Both,
}

/// What an actor is told.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "snake_case")]
pub(crate) enum Ask {
    // A driver, of the host or of a virtual machine.
    /// A buffer: gives its address.
    Allocate { bytes: u64 },
    /// Gives a buffer back.
    Free { gpa: Address },
    /// Maps; gives the address for the device.
    Map { device: String, gpa: Address, bytes: u64, way: Way },
    /// Unmaps, rightly or wrongly.
    Unmap { device: String, iova: Address, bytes: u64, way: Way, end_of_burst: bool },
    /// Hands a mapping to the CPU.
    SyncForCpu { iova: Address },
    /// A domain of a column's mode, with the device in it; gives its number.
    Domain { column: Column, device: String },
    /// A larger one of the mode, for many pages.
    RoomyDomain { column: Column, device: String },
    /// Puts the device back into its default domain and destroys the domain.
    Leave { device: String, domain: u64 },
    /// Attaches the device to nothing.
    Detach { device: String },
    /// An interrupt of the device: gives its address and its data word.
    Interrupt { device: String },
    /// Interrupts that came so far.
    Interrupts,
    /// Maps the same page again and again until it is refused, `at_most` times.
    ExhaustMappings { device: String, gpa: Address, at_most: u64 },
    /// Creates domains until it is refused, `at_most` times. They go with the session.
    ExhaustDomains { column: Column, at_most: u64 },

    // Everybody who has memory.
    /// Reads, as the CPU.
    Read { gpa: Address, bytes: u64 },
    /// Writes, as the CPU.
    Write { gpa: Address, data: Hex },

    // A hypervisor.
    /// Creates a virtual machine with memory.
    CreateVm { number: u32, name: String, limits: BTreeMap<String, u64> },
    /// Gives memory.
    AddMemory { vm: u32, gpa: Address, bytes: u64 },
    /// Moves memory.
    MoveMemory { from: u32, gpa: Address, bytes: u64, to: u32, to_gpa: Address, revoke: bool },
    /// Describes a function.
    Declare { device: String, name: String },
    /// Assigns a function.
    Assign { device: String, vm: u32 },

    // An operating system.
    /// Makes a machine with two devices; gives its segment.
    Machine { bytes: u64, devices: Vec<(String, String)> },
    /// Fault status and global status of its unit.
    Unit,
}

/// What it answers.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Reply {
    /// An address or a number.
    #[serde(default)]
    pub(crate) value: u64,
    /// A second number.
    #[serde(default)]
    pub(crate) further: u64,
    /// Bytes read.
    #[serde(default)]
    pub(crate) bytes: Hex,
    /// Why it was refused, when it was.
    #[serde(default)]
    pub(crate) refused: Option<Refused>,
}

/// A refusal.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Refused {
    /// Stable reason; a limit has its name behind it, as in `LIMIT_REACHED:mappings_per_owner`.
    pub(crate) reason: String,
    /// In words.
    pub(crate) message: String,
}

impl Reply {
    pub(crate) fn value(value: u64) -> Self {
        Self { value, ..Self::default() }
    }
}
