//! `bare.proto`: bare machines.

use bytes::Bytes;
use iommu_types::errors::{BadCapabilities, CreateMachineError, InvalidField};
use iommu_types::{AccessWidth, AddressWidths, Capabilities, Hpa, HpaRange, InvalidCapabilities, SourceId};

use super::driver::InvalidRequest;
use super::session::check_name;
use super::types::Interrupt;
use super::{Field, absent, message_field, messages, parse, within, wrong, wrong_at};
use crate::pb;

// Whether the choices make sense together is Capabilities::validate's to say.
impl TryFrom<pb::Capabilities> for Capabilities {
    type Error = InvalidField;
    fn try_from(wire: pb::Capabilities) -> Result<Self, InvalidField> {
        let mut widths = AddressWidths::empty();
        widths.set(AddressWidths::BITS_39, wire.width_39);
        widths.set(AddressWidths::BITS_48, wire.width_48);
        widths.set(AddressWidths::BITS_57, wire.width_57);
        Ok(Self {
            widths,
            max_guest_width_bits: parse("max_guest_width_bits", wire.max_guest_width_bits)?,
            host_width_bits: parse("host_width_bits", wire.host_width_bits)?,
            pages_2m: wire.pages_2m,
            pages_1g: wire.pages_1g,
            zero_length_read: wire.zero_length_read,
            caching_mode: wire.caching_mode,
            pass_through: wire.pass_through,
            snoop_control: wire.snoop_control,
            queued_invalidation: wire.queued_invalidation,
            interrupt_remapping: wire.interrupt_remapping,
            extended_interrupt_mode: wire.extended_interrupt_mode,
            page_selective: wire.page_selective,
            max_address_mask: parse("max_address_mask", wire.max_address_mask)?,
            fault_records: parse("fault_records", wire.fault_records)?,
            enhanced_set_root: wire.enhanced_set_root,
            enhanced_set_interrupt_table: wire.enhanced_set_interrupt_table,
        })
    }
}
impl From<Capabilities> for pb::Capabilities {
    fn from(model: Capabilities) -> Self {
        Self {
            width_39: model.widths.contains(AddressWidths::BITS_39),
            width_48: model.widths.contains(AddressWidths::BITS_48),
            width_57: model.widths.contains(AddressWidths::BITS_57),
            max_guest_width_bits: model.max_guest_width_bits.write(),
            host_width_bits: model.host_width_bits.write(),
            pages_2m: model.pages_2m,
            pages_1g: model.pages_1g,
            zero_length_read: model.zero_length_read,
            caching_mode: model.caching_mode,
            pass_through: model.pass_through,
            snoop_control: model.snoop_control,
            queued_invalidation: model.queued_invalidation,
            interrupt_remapping: model.interrupt_remapping,
            extended_interrupt_mode: model.extended_interrupt_mode,
            page_selective: model.page_selective,
            max_address_mask: model.max_address_mask.write(),
            fault_records: model.fault_records.write(),
            enhanced_set_root: model.enhanced_set_root,
            enhanced_set_interrupt_table: model.enhanced_set_interrupt_table,
        }
    }
}
message_field!(Capabilities, pb::Capabilities);

/// A choice that makes no sense, as the client is told: by the name of the field in the message.
pub fn bad_capabilities(error: InvalidCapabilities) -> CreateMachineError {
    BadCapabilities { field: error.field.to_owned(), why: error.why.to_owned() }.into()
}

fn check_device(device: &MachineDevice) -> Result<(), InvalidField> {
    check_name(&device.name)
}
fn check_memory(create: &CreateMachine) -> Result<(), InvalidField> {
    let size_bytes = create.memory_bytes;
    if size_bytes != 0 && size_bytes.is_multiple_of(iommu_types::PAGE_SIZE_BYTES) {
        return Ok(());
    }
    Err(wrong_at("memory_bytes", format!("{size_bytes} is not a multiple of 4096 above 0")))
}
fn check_register_width(width: AccessWidth) -> Result<(), InvalidField> {
    match width {
        AccessWidth::Bytes4 | AccessWidth::Bytes8 => Ok(()),
        AccessWidth::Bytes1 | AccessWidth::Bytes2 => {
            Err(within("width_bytes", wrong("registers are read and written with 4 or 8 bytes")))
        }
    }
}
fn check_read(read: &ReadRegister) -> Result<(), InvalidField> {
    check_register_width(read.width_bytes)
}
fn check_write(write: &WriteRegister) -> Result<(), InvalidField> {
    check_register_width(write.width_bytes)?;
    if write.value & !write.width_bytes.mask() == 0 {
        return Ok(());
    }
    Err(wrong_at("value", format!("{:#x} does not fit a {} access", write.value, write.width_bytes)))
}

messages! {
    /// A device behind the unit of a machine.
    MachineDevice as MachineDevice {
        /// Requester ID in the machine's segment.
        source_id: SourceId,
        /// Name with which its agent says Hello.
        name: String,
    } check check_device;
    /// A machine to create.
    CreateMachine as CreateMachineRequest {
        /// Memory from address 0, a multiple of 4096.
        memory_bytes: u64,
        /// What its unit can do; `None` for everything that is built.
        capabilities: Option<Capabilities>,
        /// The devices behind the unit.
        devices: Vec<MachineDevice>,
    } check check_memory;
    /// A machine that was created.
    CreatedMachine as CreateMachineResponse {
        /// Its segment, which names it.
        segment: u16,
        /// What its unit can do.
        capabilities: Capabilities,
    };
    /// A machine to destroy.
    DestroyMachine as DestroyMachineRequest {
        /// Which.
        segment: u16,
    };
    /// A machine.
    Machine as Machine {
        /// Its segment.
        segment: u16,
        /// Bytes of memory.
        memory_bytes: u64,
        /// Its devices.
        devices: Vec<MachineDevice>,
    };
    /// The machines of a client.
    Machines as ListMachinesResponse {
        /// One each.
        machines: Vec<Machine>,
    };
    /// A register to read.
    ReadRegister as ReadRegisterRequest {
        /// Of which machine.
        segment: u16,
        /// Offset in the register page.
        offset: u32,
        /// 4 or 8 bytes.
        width_bytes: AccessWidth,
    } check check_read;
    /// A register to write.
    WriteRegister as WriteRegisterRequest {
        /// Of which machine.
        segment: u16,
        /// Offset in the register page.
        offset: u32,
        /// 4 or 8 bytes.
        width_bytes: AccessWidth,
        /// The value; fits the width.
        value: u64,
    } check check_write;
    /// A subscription to the interrupts of a machine.
    WatchMachineInterrupts as WatchMachineInterruptsRequest {
        /// Which machine.
        segment: u16,
    };
    /// Interrupts, in the order of their delivery.
    MachineInterrupts as WatchMachineInterruptsResponse {
        /// They; empty in the first message.
        interrupts: Vec<MachineInterrupt>,
    };
    /// An event message of a unit: a write of `data` to `address`, never remapped.
    #[derive(Copy)]
    EventMessage as EventMessage {
        /// As programmed.
        address: u64,
        /// As programmed.
        data: u32,
    };
}

/// An interrupt of a bare machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MachineInterrupt {
    /// From a device.
    Device(Interrupt),
    /// From the unit itself.
    Event(EventMessage),
}

impl TryFrom<pb::MachineInterrupt> for MachineInterrupt {
    type Error = InvalidField;
    fn try_from(wire: pb::MachineInterrupt) -> Result<Self, InvalidField> {
        match wire.kind.ok_or_else(|| within("kind", absent()))? {
            pb::machine_interrupt::Kind::Device(interrupt) => parse("device", interrupt).map(Self::Device),
            pb::machine_interrupt::Kind::Event(event) => parse("event", event).map(Self::Event),
        }
    }
}
impl From<MachineInterrupt> for pb::MachineInterrupt {
    fn from(interrupt: MachineInterrupt) -> Self {
        let kind = match interrupt {
            MachineInterrupt::Device(interrupt) => pb::machine_interrupt::Kind::Device(interrupt.into()),
            MachineInterrupt::Event(event) => pb::machine_interrupt::Kind::Event(event.into()),
        };
        Self { kind: Some(kind) }
    }
}
message_field!(MachineInterrupt, pb::MachineInterrupt);

/// Memory of a machine to read. Its addresses are the machine's physical ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadMachineMemory {
    /// Which machine.
    pub segment: u16,
    /// Which bytes.
    pub range: HpaRange,
}

impl TryFrom<pb::ReadMachineMemoryRequest> for ReadMachineMemory {
    type Error = InvalidRequest;
    fn try_from(wire: pb::ReadMachineMemoryRequest) -> Result<Self, InvalidRequest> {
        let range = HpaRange::new(Hpa::new(wire.address), u64::from(wire.size_bytes))?;
        Ok(Self { segment: parse("segment", wire.segment)?, range })
    }
}

/// Memory of a machine to write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WriteMachineMemory {
    /// Which machine.
    pub segment: u16,
    /// Where; as large as the data.
    pub range: HpaRange,
    /// The bytes.
    pub data: Bytes,
}

impl TryFrom<pb::WriteMachineMemoryRequest> for WriteMachineMemory {
    type Error = InvalidRequest;
    fn try_from(wire: pb::WriteMachineMemoryRequest) -> Result<Self, InvalidRequest> {
        let range = HpaRange::new(Hpa::new(wire.address), wire.data.len() as u64)?;
        Ok(Self { segment: parse("segment", wire.segment)?, range, data: wire.data })
    }
}
