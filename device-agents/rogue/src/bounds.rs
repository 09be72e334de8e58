//! Every limit of the hostile device, with its unit and its reason. They protect the machine that it runs on, not the server.

use std::time::Duration;

/// Bytes of one command line: a whole batch of 2 MiB in hexadecimal digits, and its columns.
pub const LINE_BYTES_MAX: usize = 5 << 20;
/// Operations of one batch: 64 times what a server allows, so that "too many" can be tried.
pub const OPERATIONS_MAX: usize = 1 << 16;
/// Bytes of one batch, read and written: twice what a server allows, so that "too large" can be tried; below what gRPC carries at all there is no bound of ours.
pub const BATCH_BYTES_MAX: usize = 4 << 20;
/// Addresses of one scan.
pub const SCAN_ADDRESSES_MAX: u64 = 1 << 20;
/// Bytes that a scan reads at each address: a page.
pub const SCAN_BYTES_MAX: u32 = 4096;
/// Addresses that an answer lists; the rest is only counted.
pub const LISTED_MAX: usize = 64;
/// Bytes that one batch of a scan reads or writes: what any server allows.
pub const SCAN_BATCH_BYTES: u64 = 256 << 10;
/// Operations of one batch of a scan: the same.
pub const SCAN_BATCH_OPERATIONS: u64 = 512;
/// Batches that wait to be sent later.
pub const QUEUED_MAX: usize = 1024;
/// Bytes of their payloads together: sixteen of the largest, as a queue of those alone would be 4 GiB.
pub const QUEUED_BYTES_MAX: usize = 16 * BATCH_BYTES_MAX;
/// Addresses of a hammer.
pub const HAMMERED_MAX: usize = 1024;
/// Batches of a flood.
pub const FLOOD_BATCHES_MAX: u64 = 1 << 20;
/// Batches in flight at once, credits or not.
pub const IN_FLIGHT_MAX: usize = 4096;
/// How long anything that runs for a time may run.
pub const RUN_MAX: Duration = Duration::from_secs(600);
/// Largest message that is read or written: whatever a server may send, and more than any command makes.
pub const MESSAGE_BYTES_MAX: usize = 64 << 20;
/// How long an answer of the server is waited for, and room for a message to it: far longer than any drain.
pub const ANSWER_DEADLINE: Duration = Duration::from_secs(20);
/// Resets and register accesses that are remembered.
pub const TOLD_MAX: usize = 1024;
