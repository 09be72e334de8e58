//! `hypervisor.proto`: virtual machines, their memory, the devices given to them.

use bytes::Bytes;
use iommu_types::errors::{InvalidField, Unaligned};
use iommu_types::{
    DeviceAddress, Generation, Gpa, GpaRange, InvalidRange, Owner, PAGE_SIZE_BYTES, PciFunction,
};

use super::driver::RequestHeader;
use super::session::check_name;
use super::{Field, messages, parse, wrong_at};
use crate::limits::{HYPERCALL_BYTES_MAX, HYPERCALL_REFUSED_BYTES_MAX, REVOCATION_WAIT_MS_MAX};
use crate::pb;

fn check_create(create: &CreateVm) -> Result<(), InvalidField> {
    if create.number == Some(0) {
        return Err(wrong_at("number", "is 0; virtual machines are numbered from 1"));
    }
    check_name(&create.name)
}
fn check_declare(declare: &DeclareFunction) -> Result<(), InvalidField> {
    if declare.device.segment != 0 {
        return Err(wrong_at("device.segment", "is not 0; only the host's functions are declared"));
    }
    check_name(&declare.name)
}
fn check_hypercall(payload: &Bytes) -> Result<(), InvalidField> {
    if payload.len() > HYPERCALL_BYTES_MAX {
        let why = format!(
            "has {} bytes; {HYPERCALL_BYTES_MAX} at most: put more into memory and say where",
            payload.len()
        );
        return Err(wrong_at("payload", why));
    }
    Ok(())
}

messages! {
    /// What a virtual machine may hold and do; `None` for the server's default, which is the most that may be given.
    #[derive(Copy, Default)]
    TenantLimits as TenantLimits {
        /// Domains at once.
        domains: Option<u32>,
        /// Mappings at once.
        mappings: Option<u64>,
        /// Bytes mapped at once.
        mapped_bytes: Option<u64>,
        /// Bytes of memory.
        memory_bytes: Option<u64>,
        /// Interrupts.
        interrupts: Option<u32>,
        /// Requests of its driver in a second.
        requests_per_second: Option<u32>,
        /// DMA operations of its devices in a second.
        dma_operations_per_second: Option<u32>,
        /// Bytes of DMA of its devices in a second.
        dma_bytes_per_second: Option<u64>,
    };
    /// A virtual machine to create.
    CreateVm as CreateVmRequest {
        /// Names the request.
        header: RequestHeader,
        /// Name under which its driver opens its session.
        name: String,
        /// Its number; `None` for the next free one after the last that was given so.
        number: Option<u32>,
        /// What it may hold and do.
        limits: Option<TenantLimits>,
    } check check_create;
    /// A virtual machine to destroy.
    DestroyVm as DestroyVmRequest {
        /// Names the request.
        header: RequestHeader,
        /// Its number.
        vm: u32,
    };
    /// Virtual machines.
    Vms as ListVmsResponse {
        /// By number.
        vms: Vec<VmState>,
    };
    /// A virtual machine.
    VmState as VmState {
        /// Its number.
        number: u32,
        /// Name of its driver.
        name: String,
        /// Whether its driver has a session.
        connected: bool,
        /// Its memory, by address.
        memory: Vec<MemoryRegion>,
        /// The functions that are assigned to it.
        functions: Vec<DeviceAddress>,
    };
    /// A piece of guest-physical memory.
    #[derive(Copy)]
    MemoryRegion as MemoryRegion {
        /// First byte.
        gpa: Gpa,
        /// How long.
        size_bytes: u64,
    };
    /// A function to describe.
    DeclareFunction as DeclareFunctionRequest {
        /// Names the request.
        header: RequestHeader,
        /// Where; in segment 0.
        device: DeviceAddress,
        /// Name of its agent.
        name: String,
        /// What it is.
        function: PciFunction,
    } check check_declare;
    /// A function to forget.
    RemoveFunction as RemoveFunctionRequest {
        /// Names the request.
        header: RequestHeader,
        /// Which.
        device: DeviceAddress,
    };
    /// Functions.
    Functions as ListFunctionsResponse {
        /// By address.
        functions: Vec<FunctionState>,
    };
    /// A function.
    FunctionState as FunctionState {
        /// Where.
        device: DeviceAddress,
        /// Name of its agent.
        name: String,
        /// What it is.
        function: PciFunction,
        /// The lowest address of its isolation group.
        group: DeviceAddress,
        /// To whom it is assigned.
        owner: Option<Owner>,
        /// Whether its agent is connected.
        connected: bool,
        /// Counts its changes of hand and its resets.
        assignment_generation: Generation,
    };
    /// A function whose group is to be assigned.
    AssignGroup as AssignGroupRequest {
        /// Names the request.
        header: RequestHeader,
        /// A function of the group.
        device: DeviceAddress,
        /// To whom.
        vm: u32,
    };
    /// Assigned.
    AssignedGroup as AssignGroupResponse {
        /// All functions of the group.
        functions: Vec<DeviceAddress>,
    };
    /// A function whose group is to be released.
    ReleaseGroup as ReleaseGroupRequest {
        /// Names the request.
        header: RequestHeader,
        /// A function of the group.
        device: DeviceAddress,
    };
    /// Released.
    ReleasedGroup as ReleaseGroupResponse {
        /// All functions of the group.
        functions: Vec<DeviceAddress>,
    };
}

/// What is done about translations that lead to memory which is to leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Revocation {
    /// Refused when there are any.
    Refuse,
    /// Waits until the driver has unmapped.
    Wait {
        /// How long at most, in milliseconds.
        wait_ms: u32,
    },
    /// Unmapped by force.
    Revoke,
}

impl Revocation {
    fn parse(how: i32, wait_ms: u32) -> Result<Self, InvalidField> {
        super::known(how, pb::Revocation::try_from(how), |how| match how {
            pb::Revocation::Unspecified => None,
            pb::Revocation::Refuse => Some(Ok(Self::Refuse)),
            pb::Revocation::Revoke => Some(Ok(Self::Revoke)),
            pb::Revocation::Wait if (1..=REVOCATION_WAIT_MS_MAX).contains(&wait_ms) => {
                Some(Ok(Self::Wait { wait_ms }))
            }
            pb::Revocation::Wait => {
                Some(Err(wrong_at("wait_ms", format!("{wait_ms} is not 1 to {REVOCATION_WAIT_MS_MAX}"))))
            }
        })
        .map_err(|error| super::within("how", error))?
    }
    fn write(self) -> (i32, u32) {
        match self {
            Self::Refuse => (pb::Revocation::Refuse.into(), 0),
            Self::Wait { wait_ms } => (pb::Revocation::Wait.into(), wait_ms),
            Self::Revoke => (pb::Revocation::Revoke.into(), 0),
        }
    }
}

/// Why a request with whole pages of memory does not parse.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidPages {
    /// A field does not parse.
    #[error(transparent)]
    InvalidField(#[from] InvalidField),
    /// The fields make no range.
    #[error(transparent)]
    InvalidRange(#[from] InvalidRange),
    /// Not whole pages.
    #[error(transparent)]
    Unaligned(#[from] Unaligned),
}

fn aligned(field: &str, value: u64) -> Result<(), Unaligned> {
    if value.is_multiple_of(PAGE_SIZE_BYTES) {
        return Ok(());
    }
    Err(Unaligned { field: field.to_owned(), value, alignment: PAGE_SIZE_BYTES })
}

fn pages(gpa_field: &str, gpa: u64, size_bytes: u64) -> Result<GpaRange, InvalidPages> {
    aligned(gpa_field, gpa)?;
    aligned("size_bytes", size_bytes)?;
    Ok(GpaRange::new(Gpa::new(gpa), size_bytes)?)
}

/// Memory to give.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddMemory {
    /// Names the request.
    pub header: RequestHeader,
    /// To whom.
    pub vm: u32,
    /// Whole pages.
    pub range: GpaRange,
}

impl TryFrom<pb::AddMemoryRequest> for AddMemory {
    type Error = InvalidPages;
    fn try_from(wire: pb::AddMemoryRequest) -> Result<Self, InvalidPages> {
        let range = pages("gpa", wire.gpa, wire.size_bytes)?;
        Ok(Self { header: parse("header", wire.header)?, vm: wire.vm, range })
    }
}
impl From<AddMemory> for pb::AddMemoryRequest {
    fn from(add: AddMemory) -> Self {
        let (gpa, size_bytes) = (add.range.base().get(), add.range.size_bytes());
        Self { header: add.header.write(), vm: add.vm, gpa, size_bytes }
    }
}

/// Memory to take back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RemoveMemory {
    /// Names the request.
    pub header: RequestHeader,
    /// From whom.
    pub vm: u32,
    /// Whole pages.
    pub range: GpaRange,
    /// What is done about translations to it.
    pub how: Revocation,
}

impl TryFrom<pb::RemoveMemoryRequest> for RemoveMemory {
    type Error = InvalidPages;
    fn try_from(wire: pb::RemoveMemoryRequest) -> Result<Self, InvalidPages> {
        Ok(Self {
            header: parse("header", wire.header)?,
            vm: wire.vm,
            range: pages("gpa", wire.gpa, wire.size_bytes)?,
            how: Revocation::parse(wire.how, wire.wait_ms)?,
        })
    }
}
impl From<RemoveMemory> for pb::RemoveMemoryRequest {
    fn from(remove: RemoveMemory) -> Self {
        let (how, wait_ms) = remove.how.write();
        Self {
            header: remove.header.write(),
            vm: remove.vm,
            gpa: remove.range.base().get(),
            size_bytes: remove.range.size_bytes(),
            how,
            wait_ms,
        }
    }
}

/// Memory to move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MoveMemory {
    /// Names the request.
    pub header: RequestHeader,
    /// From whom.
    pub from_vm: u32,
    /// Whole pages of it.
    pub from: GpaRange,
    /// To whom.
    pub to_vm: u32,
    /// As many pages.
    pub to: GpaRange,
    /// What is done about translations to it.
    pub how: Revocation,
}

impl TryFrom<pb::MoveMemoryRequest> for MoveMemory {
    type Error = InvalidPages;
    fn try_from(wire: pb::MoveMemoryRequest) -> Result<Self, InvalidPages> {
        Ok(Self {
            header: parse("header", wire.header)?,
            from_vm: wire.from_vm,
            from: pages("from_gpa", wire.from_gpa, wire.size_bytes)?,
            to_vm: wire.to_vm,
            to: pages("to_gpa", wire.to_gpa, wire.size_bytes)?,
            how: Revocation::parse(wire.how, wire.wait_ms)?,
        })
    }
}
impl From<MoveMemory> for pb::MoveMemoryRequest {
    fn from(moved: MoveMemory) -> Self {
        let (how, wait_ms) = moved.how.write();
        Self {
            header: moved.header.write(),
            from_vm: moved.from_vm,
            from_gpa: moved.from.base().get(),
            size_bytes: moved.from.size_bytes(),
            to_vm: moved.to_vm,
            to_gpa: moved.to.base().get(),
            how,
            wait_ms,
        }
    }
}

/// Something to ask the hypervisor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hypercall {
    /// What guest and hypervisor have agreed on.
    pub payload: Bytes,
}

impl TryFrom<pb::HypercallRequest> for Hypercall {
    type Error = InvalidField;
    fn try_from(wire: pb::HypercallRequest) -> Result<Self, InvalidField> {
        check_hypercall(&wire.payload)?;
        Ok(Self { payload: wire.payload })
    }
}

/// The answer of a hypervisor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HypercallAnswer {
    /// Of the hypercall.
    pub tag: u64,
    /// For the guest, or why the hypervisor refuses.
    pub answer: Result<Bytes, String>,
}

impl TryFrom<pb::ServeHypercallsRequest> for HypercallAnswer {
    type Error = InvalidField;
    fn try_from(wire: pb::ServeHypercallsRequest) -> Result<Self, InvalidField> {
        let answer = match wire.payload {
            Some(payload) => {
                check_hypercall(&payload)?;
                Ok(payload)
            }
            None if wire.refused.len() > HYPERCALL_REFUSED_BYTES_MAX => {
                let why = format!("has {} bytes; {HYPERCALL_REFUSED_BYTES_MAX} at most", wire.refused.len());
                return Err(wrong_at("refused", why));
            }
            None => Err(wire.refused),
        };
        Ok(Self { tag: wire.tag, answer })
    }
}
impl From<HypercallAnswer> for pb::ServeHypercallsRequest {
    fn from(answer: HypercallAnswer) -> Self {
        match answer.answer {
            Ok(payload) => Self { tag: answer.tag, payload: Some(payload), refused: String::new() },
            Err(refused) => Self { tag: answer.tag, payload: None, refused },
        }
    }
}
