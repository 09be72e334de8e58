//! Interrupt remapping (VT-d 5.10 chapter 5): one request against one table, every check in the order of the specification.
//!
//! ```text
//! IRES off ─► as it is        compatibility format ─► 25, or as it is (CFIS=1 and EIME=0)
//! remappable: reserved bits 20 ─► bounds 21 ─► fetch 23 ─► present 22 ─► source 26 ─► reserved bits of the entry 24
//! ```
//!
//! Posted format (IM=1) is not built (CAP.PI=0) and reported as 24. An entry is read in one 16-byte atomic load, so a change
//! by software is seen whole or not at all.

use iommu_types::{Capabilities, FaultReason, Hpa, InterruptFault, SourceId};

use super::spec::beyond_host_width;
use super::spec::invalidation::decode_function_mask;
use super::spec::irte::{InterruptAddress, Irte, entry_address};
use super::walk::{TableMemory, is_interrupt_range};

/// What SIRTP latched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InterruptTable {
    /// Where the table begins.
    pub base: Hpa,
    /// log2 of the number of entries: S + 1, 1 to 16.
    pub entries_log2: u8,
    /// EIME: destinations have 32 bits, and compatibility format is blocked.
    pub extended_mode: bool,
}

/// What decides about a request besides the table's entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InterruptState {
    /// IRES.
    pub remapping_enabled: bool,
    /// CFIS.
    pub compatibility_allowed: bool,
    /// What SIRTP latched; `None` before the first one, when every index is beyond the table.
    pub table: Option<InterruptTable>,
}

/// An interrupt on its way to a processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeliveredInterrupt {
    /// The vector.
    pub vector: u8,
    /// APIC ID or logical destination: 32 bits in extended mode, else 8.
    pub destination: u32,
    /// DLM: 0 fixed, 1 lowest priority, 2 SMI, 4 NMI, 5 INIT, 7 ExtINT.
    pub delivery_mode: u8,
    /// TM.
    pub level_triggered: bool,
    /// DM.
    pub logical_destination: bool,
    /// RH.
    pub redirection_hint: bool,
    /// The entry that it came through; `None` for one that was not remapped.
    pub index: Option<u16>,
}

/// Remaps a 4-byte write of `data` to `address` in FEEx_xxxx by `source`. With a fault comes whether the entry's FPD
/// suppresses its record.
pub fn remap(
    memory: &impl TableMemory,
    capabilities: &Capabilities,
    state: InterruptState,
    source: SourceId,
    address: u64,
    data: u32,
) -> Result<DeliveredInterrupt, (InterruptFault, bool)> {
    let fault = |reason, index| (InterruptFault { source_id: source, index, reason }, false);
    if !is_interrupt_range(address) {
        return Err(fault(FaultReason::IR_INVALID_ACCESS, None));
    }
    let request = InterruptAddress::from_bits(address as u32);
    if !state.remapping_enabled {
        return Ok(deliver_compatibility(request, data));
    }
    let extended_mode = state.table.is_some_and(|table| table.extended_mode);
    if !request.remappable() {
        return if state.compatibility_allowed && !extended_mode {
            Ok(deliver_compatibility(request, data))
        } else {
            Err(fault(FaultReason::IR_COMPATIBILITY_BLOCKED, None))
        };
    }
    let index = request_index(request, data).map_err(|reason| fault(reason, None))?;
    // The record holds 16 bits of an index that a subhandle has carried beyond them.
    let recorded = Some(index as u16);
    let at = locate(capabilities, state.table, index)
        .ok_or_else(|| fault(FaultReason::IR_INDEX_BEYOND_TABLE, recorded))?;
    let raw = memory.load_u128(at).map_err(|_| fault(FaultReason::IR_ACCESS, recorded))?;
    let entry = Irte::from_bits(raw);
    check_entry(entry, source, extended_mode).map_err(|reason| {
        (InterruptFault { source_id: source, index: recorded, reason }, entry.fault_processing_disable())
    })?;
    Ok(DeliveredInterrupt {
        vector: entry.vector(),
        destination: entry.destination(extended_mode),
        delivery_mode: entry.delivery_mode(),
        level_triggered: entry.level_triggered(),
        logical_destination: entry.logical_destination(),
        redirection_hint: entry.redirection_hint(),
        index: recorded,
    })
}

/// A message as it is: what the address and the data word say themselves (VT-d 5.10 §5.1.2.1).
fn deliver_compatibility(request: InterruptAddress, data: u32) -> DeliveredInterrupt {
    DeliveredInterrupt {
        vector: data as u8,
        destination: u32::from(request.compatibility_destination()),
        delivery_mode: (data >> 8 & 0x7) as u8,
        level_triggered: data >> 15 & 1 != 0,
        logical_destination: request.handle_high(),
        redirection_hint: request.subhandle_valid(),
        index: None,
    }
}

/// The handle, plus the subhandle where there is one. Without SHV the data word is ignored altogether.
fn request_index(request: InterruptAddress, data: u32) -> Result<u32, FaultReason> {
    let handle = u32::from(request.handle());
    if !request.subhandle_valid() {
        return Ok(handle);
    }
    if data >> 16 != 0 {
        return Err(FaultReason::IR_REQUEST_RESERVED);
    }
    Ok(handle + data)
}

/// Where the entry lies; `None` when it is beyond the table or beyond physical addresses.
fn locate(capabilities: &Capabilities, table: Option<InterruptTable>, index: u32) -> Option<Hpa> {
    let table = table?;
    let index = u16::try_from(index).ok().filter(|index| u64::from(*index) >> table.entries_log2 == 0)?;
    entry_address(table.base, index)
        .filter(|at| at.get() & beyond_host_width(capabilities.host_width_bits) == 0)
}

fn check_entry(entry: Irte, source: SourceId, extended_mode: bool) -> Result<(), FaultReason> {
    if !entry.is_present() {
        return Err(FaultReason::IR_NOT_PRESENT);
    }
    let field = SourceId::new(entry.source_field());
    match entry.source_validation() {
        Irte::SOURCE_ANY => {}
        Irte::SOURCE_ID => {
            if !decode_function_mask(entry.source_qualifier()).matches(field, source) {
                return Err(FaultReason::IR_SOURCE_DENIED);
            }
        }
        Irte::SOURCE_BUS_RANGE => {
            let [first, last] = entry.source_field().to_be_bytes();
            if !(first..=last).contains(&source.bus()) {
                return Err(FaultReason::IR_SOURCE_DENIED);
            }
        }
        // SVT=3 says nothing about sources; it is a reserved value.
        _ => return Err(FaultReason::IR_RESERVED),
    }
    if entry.into_bits() & Irte::reserved_bits(extended_mode) != 0 {
        return Err(FaultReason::IR_RESERVED);
    }
    Ok(())
}
