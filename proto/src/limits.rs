//! Limits that are part of the wire contract. A server may allow less and says so in its handshake; it never allows more.

/// Major version of the schema. A peer with another one is refused in the handshake.
pub const SCHEMA_VERSION: u32 = 1;

/// Largest message, either way. gRPC libraries accept 4 MiB unless they are told otherwise; 64 KiB of that are left for what
/// proxies count into a message.
pub const MESSAGE_BYTES_MAX: usize = (4 << 20) - (64 << 10);

/// Most operations in one batch of DMA, of maps or of unmaps. A batch is answered as one message, so even a batch whose every
/// operation failed must fit one.
pub const BATCH_OPERATIONS_MAX: u32 = 1024;

/// Most bytes that one batch or memory message reads and writes together: half a message, so that columns always fit.
pub const BATCH_BYTES_MAX: u32 = 2 << 20;

/// Most MMIO requests that a device leaves unanswered. More would only queue behind its driver.
pub const MMIO_CREDITS_MAX: u32 = 256;

/// Longest name of a peer, in bytes.
pub const NAME_BYTES_MAX: usize = 64;

/// Longest explanation that a device gives for a refused register access, in bytes.
pub const MMIO_REFUSED_BYTES_MAX: usize = 256;

/// Most virtual machines of one hypervisor: who serves their hypercalls has room for some of each at once.
pub const VMS_PER_HYPERVISOR_MAX: usize = 256;

/// Longest payload of a hypercall and of its answer, in bytes: a page, as what is larger goes through memory.
pub const HYPERCALL_BYTES_MAX: usize = 4096;

/// Longest explanation that a hypervisor gives for a refused hypercall, in bytes.
pub const HYPERCALL_REFUSED_BYTES_MAX: usize = 256;

/// How long a guest's hypercall waits for its hypervisor's answer, in milliseconds. Who asks must wait longer to be told of it, and who answers
/// must not begin later: the guest may have put its memory to other use.
pub const HYPERCALL_TIMEOUT_MS: u32 = 10_000;

/// Longest time that memory may be waited for before it is taken from a virtual machine, in milliseconds.
pub const REVOCATION_WAIT_MS_MAX: u32 = 30_000;

/// Bytes of a session's resume token: 128 bits cannot be guessed.
pub const RESUME_TOKEN_BYTES: usize = 16;

/// Most bytes that an operation costs in a `DmaBatch` beside its payload: address 8, size 5, kind 1.
const REQUEST_COLUMN_BYTES: usize = 8 + 5 + 1;
/// Most bytes that a failed operation costs in `DmaCompletions`: index 5, reason 5, address 8, bytes done 5.
const FAULT_COLUMN_BYTES: usize = 5 + 5 + 8 + 5;
/// Most bytes of an `OperationError`: message, facts, reason and their keys.
const OPERATION_ERROR_BYTES: usize = 3 * crate::errors::FACT_BYTES_MAX + 256;
/// Tags, lengths and the envelope around the columns.
const FRAME_BYTES: usize = 256;

const _: () = assert!(
    BATCH_BYTES_MAX as usize + BATCH_OPERATIONS_MAX as usize * REQUEST_COLUMN_BYTES + FRAME_BYTES
        <= MESSAGE_BYTES_MAX
);
const _: () = assert!(
    BATCH_BYTES_MAX as usize + BATCH_OPERATIONS_MAX as usize * FAULT_COLUMN_BYTES + FRAME_BYTES
        <= MESSAGE_BYTES_MAX
);
const _: () =
    assert!(BATCH_OPERATIONS_MAX as usize * (8 + OPERATION_ERROR_BYTES) + FRAME_BYTES <= MESSAGE_BYTES_MAX);
