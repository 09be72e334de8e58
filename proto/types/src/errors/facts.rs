//! The small structs: one fact each, one stable reason each.

use crate::{DeviceAddress, Direction, DomainId, Gpa, Iova, Owner};

macro_rules! facts {
    ($($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $ty:ty),* $(,)? } = $message:literal;)*) => {
        $(
            $(#[$doc])*
            #[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
            #[error($message)]
            pub struct $name { $($(#[$field_doc])* pub $field: $ty),* }
        )*
    };
}

facts! {
    /// A field of a request does not parse.
    InvalidField {
        /// Path of the field in the message, such as `map.size_bytes`.
        field: String,
        /// What is wrong and what would be right.
        why: String,
    } = "{field}: {why}";
    /// An address or size is not a multiple of what is needed.
    Unaligned {
        /// The field.
        field: String,
        /// Its value.
        value: u64,
        /// What it must be a multiple of.
        alignment: u64,
    } = "{field}: {value:#x} is not a multiple of {alignment:#x}";
    /// No such device is declared.
    UnknownDevice {
        /// The address asked for.
        device: DeviceAddress,
    } = "no device is declared at {device}; declare it in the configuration or with `iommuctl device declare`";
    /// A device is already declared at the address.
    DeviceExists {
        /// The address.
        device: DeviceAddress,
    } = "a device is already declared at {device}";
    /// No such domain.
    UnknownDomain {
        /// The domain asked for.
        domain_id: DomainId,
    } = "there is no domain {domain_id}";
    /// No such owner.
    UnknownOwner {
        /// The owner asked for.
        owner: Owner,
    } = "there is no {owner}";
    /// No such bare machine.
    UnknownMachine {
        /// The segment asked for.
        segment: u16,
    } = "there is no bare machine at segment {segment:04x}";
    /// The object exists and belongs to somebody else.
    NotYours {
        /// What was asked for.
        object: String,
    } = "{object} belongs to another owner";
    /// The role of the peer does not allow the call.
    RoleRefused {
        /// Who called.
        role: String,
        /// What the call needs.
        needs: String,
    } = "a {role} may not do this; it needs {needs}";
    /// The device is not attached to a domain.
    NotAttached {
        /// The device.
        device: DeviceAddress,
    } = "{device} is attached to no domain";
    /// No agent is connected for the device.
    DeviceAbsent {
        /// The device.
        device: DeviceAddress,
    } = "no agent is connected for {device}";
    /// The device did not answer in time.
    DeviceTimeout {
        /// The device.
        device: DeviceAddress,
        /// How long was waited, in milliseconds.
        waited_ms: u64,
    } = "{device} did not answer within {waited_ms} ms";
    /// The device refused a register access.
    MmioRefused {
        /// The device.
        device: DeviceAddress,
        /// Offset of the register.
        offset: u64,
        /// Why.
        why: String,
    } = "{device} refused the access to register {offset:#x}: {why}";
    /// Part of the range is not memory of the owner.
    NotOwned {
        /// First address that is not.
        gpa: Gpa,
    } = "{gpa} is not memory of this owner";
    /// The range overlaps an existing mapping.
    RangeOverlaps {
        /// First address of the mapping that is in the way.
        iova: Iova,
    } = "the range overlaps the mapping at {iova}";
    /// The range would split a mapping; mappings are removed whole.
    SplitsMapping {
        /// First address of the mapping.
        iova: Iova,
    } = "the range would split the mapping at {iova}; unmap it whole";
    /// Nothing is mapped there.
    NotMapped {
        /// The address.
        iova: Iova,
    } = "nothing is mapped at {iova}";
    /// The size of an unmap is not that of its mapping.
    SizeMismatch {
        /// First address of the mapping.
        iova: Iova,
        /// Size it was mapped with, in bytes.
        mapped_bytes: u64,
        /// Size it was to be unmapped with, in bytes.
        asked_bytes: u64,
    } = "the mapping at {iova} has {mapped_bytes} bytes, not {asked_bytes}";
    /// The direction of an unmap is not that of its mapping.
    DirectionMismatch {
        /// First address of the mapping.
        iova: Iova,
        /// Direction it was mapped with.
        mapped: Direction,
        /// Direction it was to be unmapped with.
        asked: Direction,
    } = "the mapping at {iova} is {mapped}, not {asked}";
    /// The mapping was made by another function than the one that is to remove or use it.
    WrongFunction {
        /// First address of the mapping.
        iova: Iova,
        /// How it was made: `single`, `scatter-gather`, `coherent` or `fixed`.
        made_as: String,
        /// How it was to be used.
        asked_as: String,
    } = "the mapping at {iova} was made as {made_as}, not as {asked_as}";
    /// A range leaves the mapping that it begins in.
    OutsideMapping {
        /// First address of the range.
        iova: Iova,
        /// Its size in bytes.
        size_bytes: u64,
    } = "{size_bytes} bytes at {iova} leave the mapping";
    /// A ring has no slot for one more mapping: all are mapped, or wait for the end of a burst.
    RingOverflow {
        /// The ring.
        ring: u16,
        /// Its slots.
        slots: u32,
    } = "ring {ring} has no free slot of its {slots}; unmap, and end the burst, before mapping more";
    /// Memory for one slot of a ring is not contiguous.
    NotContiguous {
        /// First address that lies elsewhere.
        gpa: Gpa,
    } = "physical memory is not contiguous at {gpa}, and a slot of a ring holds one run; map it as scatter-gather";
    /// A segment is longer than the device takes.
    SegmentOverLimit {
        /// Size of the segment, in bytes.
        size_bytes: u64,
        /// What the device takes, in bytes.
        allowed_bytes: u64,
    } = "a segment of {size_bytes} bytes is longer than the {allowed_bytes} that the device takes; map it in pieces or raise the limit";
    /// An address is beyond the device's DMA mask.
    BeyondMask {
        /// The last address.
        iova: Iova,
        /// Width of the mask in bits.
        mask_bits: u8,
    } = "{iova} is beyond the {mask_bits}-bit DMA mask of the device";
    /// The protection mode of the domain has no such operation.
    ModeRefuses {
        /// The mode.
        mode: String,
        /// What it has not, and what to do instead.
        why: String,
    } = "a {mode} domain {why}";
    /// An address is beyond what the domain can translate.
    BeyondWidth {
        /// The last address of the range.
        iova: Iova,
        /// Width of the domain in bits.
        width_bits: u8,
    } = "{iova} is beyond the {width_bits}-bit address width of the domain";
    /// The range touches addresses that are never mapped (page 0, or FEEx_xxxx).
    ReservedRange {
        /// First reserved address in the range.
        iova: Iova,
    } = "{iova} is reserved: page 0 and FEE0_0000 to FEEF_FFFF are never mapped";
    /// The domain has no free address range of the size.
    IovaExhausted {
        /// Size asked for, in bytes.
        size_bytes: u64,
    } = "no free I/O virtual address range of {size_bytes} bytes is left in the domain";
    /// The server has no free memory left.
    OutOfMemory {
        /// Size asked for, in bytes.
        size_bytes: u64,
    } = "no {size_bytes} bytes of physical memory are free; start the server with a larger --memory";
    /// A buffer is still mapped for a device.
    StillMapped {
        /// First address of the page that is.
        gpa: Gpa,
    } = "{gpa} is still mapped for a device; unmap it first";
    /// Memory is about to leave its owner, so nothing new is done with it.
    MemoryLeaving {
        /// First address that is.
        gpa: Gpa,
    } = "{gpa} is being taken back from its owner; use other memory";
    /// The owner has memory at the address already, or is about to get it.
    MemoryOverlaps {
        /// First address that is taken.
        gpa: Gpa,
    } = "the owner has memory at {gpa} already; choose another address";
    /// The call is for drivers of the host.
    NotAHostDriver {
        /// Who called.
        owner: Owner,
    } = "{owner} has the memory that its hypervisor gives it: use that, and map it by its guest-physical address";
    /// A function of the isolation group belongs to somebody else.
    GroupInUse {
        /// The function.
        device: DeviceAddress,
        /// Its owner.
        owner: Owner,
    } = "{device} of the same isolation group belongs to {owner}; release it first";
    /// The function cannot be assigned.
    NotAssignable {
        /// The function.
        device: DeviceAddress,
        /// Why.
        why: String,
    } = "{device} cannot be assigned: {why}";
    /// No hypervisor serves the hypercalls of the virtual machine.
    NoHypervisor {} = "no hypervisor serves hypercalls of this owner";
    /// The hypervisor refused the hypercall.
    HypercallRefused {
        /// Why.
        why: String,
    } = "the hypervisor refused the call: {why}";
    /// The hypervisor did not answer in time.
    HypercallTimeout {
        /// How long was waited, in milliseconds.
        waited_ms: u64,
    } = "the hypervisor did not answer within {waited_ms} ms";
    /// No buffer was allocated at the address with that size.
    NotAllocated {
        /// The address.
        gpa: Gpa,
    } = "no buffer of that size was allocated at {gpa}";
    /// A device is still attached to the domain.
    DomainInUse {
        /// The domain.
        domain_id: DomainId,
        /// A device that is attached.
        device: DeviceAddress,
    } = "domain {domain_id} is in use by {device}; detach it first";
    /// A device is still assigned to the owner.
    OwnerInUse {
        /// The owner.
        owner: Owner,
        /// A device that is assigned to it.
        device: DeviceAddress,
    } = "{owner} still has {device}; assign it to somebody else or to nobody first";
    /// A limit is reached. The name of the limit is stable.
    LimitReached {
        /// Name of the limit, such as `domains_per_owner`.
        limit: String,
        /// How much is allowed.
        allowed: u64,
    } = "the limit {limit} of {allowed} is reached";
    /// The physical address leads to no memory.
    NoMemory {
        /// The address, as the caller gave it.
        address: u64,
    } = "there is no memory at {address:#x}";
    /// A register access that the unit does not take (misaligned, or of a width that the register does not have).
    BadRegisterAccess {
        /// Offset of the register in bytes.
        offset: u64,
        /// Width in bytes.
        width_bytes: u32,
    } = "a {width_bytes}-byte access at register {offset:#x} is not possible: use aligned 4- or 8-byte accesses inside the register page";
    /// A capability choice makes no sense.
    BadCapabilities {
        /// The field.
        field: String,
        /// What it must be.
        why: String,
    } = "capabilities.{field}: {why}";
    /// The call needs a session that the connection does not have.
    SessionRequired {} = "this connection has no session; call SessionService.Open first";
    /// The connection has a session already.
    SessionExists {} = "this connection has a session already; who a peer is never changes (I8)";
    /// A newer session of the same identity took over.
    SessionFenced {
        /// Generation of the session that took over.
        by_generation: u64,
    } = "this session was fenced by a newer one (generation {by_generation})";
    /// The declared identity is not in the configuration.
    IdentityRefused {
        /// The name given.
        name: String,
        /// Why.
        why: String,
    } = "{name:?} is refused: {why}";
    /// The certificate of the connection has expired while it was in use.
    CertificateExpired {
        /// When, in seconds since the UNIX epoch.
        expired_unix_s: u64,
    } = "the certificate of this connection has expired (at {expired_unix_s} s since 1970); connect again with a new one, which `iommuctl pki issue --force` makes";
    /// The certificate of the connection was revoked while it was in use.
    CertificateRevoked {
        /// Its serial number in hexadecimal.
        serial: String,
    } = "the certificate of this connection (serial {serial}) was revoked; only a new one is admitted";
    /// The schema versions do not work together.
    VersionMismatch {
        /// The server's major version.
        server: u32,
        /// The peer's.
        peer: u32,
    } = "the peer speaks schema version {peer}, this server version {server}; use matching releases";
    /// A request ID that is older than the window of remembered requests.
    RequestTooOld {
        /// The ID given.
        request_id: u64,
        /// The oldest that is remembered.
        oldest: u64,
    } = "request {request_id} is older than the oldest remembered one ({oldest}); its outcome is no longer known";
    /// A request ID was used again for a different request.
    RequestReused {
        /// The ID given.
        request_id: u64,
    } = "request {request_id} was used before for a different request";
    /// A peer broke the rules of its stream.
    ProtocolViolation {
        /// Which rule.
        why: String,
    } = "protocol violation: {why}";
    /// The message does not decode.
    MalformedMessage {
        /// What the decoder said.
        why: String,
    } = "the message does not decode: {why}";
    /// The message is larger than allowed.
    MessageTooLarge {
        /// What the transport said.
        why: String,
    } = "{why}";
    /// The method does not exist in this version.
    UnknownMethod {} = "no such method in this version of the schema";
    /// The server is going down.
    ShuttingDown {} = "the server is shutting down; try again later or elsewhere";
    /// The peer did not read its stream for too long.
    StreamStalled {
        /// How long, in milliseconds.
        stalled_ms: u64,
    } = "the peer did not read its stream for {stalled_ms} ms";
    /// A resume token that names records of another log or of the future, or a session that is not kept any more.
    BadResumeToken {
        /// The token; of a secret one, which brings a session back, only the beginning.
        token: String,
    } = "resume token {token:?} is not one that this server knows; start without one";
    /// Our own bug. Nothing else is said to the peer; the server logs the rest under the reference.
    Internal {
        /// Reference to the log line.
        reference: String,
    } = "internal error, see the server's log for {reference}";
}
