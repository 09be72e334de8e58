//! Every limit of the service floor, with its unit and its reason (I7). Related limits are asserted at compile time.

use std::time::Duration;

use iommu_proto::dma::BatchLimits;
use iommu_proto::limits;

// ---- messages: what the wire contract fixes stands in iommu_proto::limits

/// What one batch may be: all that the contract allows. A session's memory holds one batch and its answer at a time.
pub const BATCH: BatchLimits = BatchLimits::CONTRACT;
/// Most bytes of one piece of a bulk read: small enough to share a connection, large enough to be cheap.
pub const BULK_PIECE_BYTES: usize = 256 << 10;
// ---- connections and streams

/// Connections at once. Each costs its HTTP/2 state and windows; 64 agents, 64 drivers and their tools fit many times.
pub const CONNECTIONS_MAX: usize = 1024;
/// Of them such that have not said who they are; the oldest makes room, so that a flood of strangers does not keep known peers out.
pub const ANONYMOUS_CONNECTIONS_MAX: usize = 256;
const _: () = assert!(ANONYMOUS_CONNECTIONS_MAX < CONNECTIONS_MAX);
/// Streams (calls) at once on one connection.
pub const STREAMS_PER_CONNECTION_MAX: u32 = 256;
/// Calls at once on all connections together, streams included.
pub const CALLS_MAX: usize = 8192;
/// Subscriptions (interrupts, faults) at once on one connection.
pub const WATCHERS_PER_CONNECTION_MAX: usize = 16;
/// HTTP/2 receive window of a stream: two full batches in flight at a round trip of a millisecond give 8 GB/s.
pub const STREAM_WINDOW_BYTES: u32 = 4 << 20;
/// HTTP/2 receive window of a connection: two streams at full speed.
pub const CONNECTION_WINDOW_BYTES: u32 = 8 << 20;
/// HTTP/2 frames up to this size: fewer frames for large DMA (measured: +50 % bytes/s at 64 KiB).
pub const FRAME_BYTES_MAX: u32 = 256 << 10;
/// Bytes of request headers, decompressed: ours need a few hundred.
pub const HEADER_BYTES_MAX: u32 = 16 << 10;
/// Streams that a peer reset before they were accepted (rapid reset, CVE-2023-44487); beyond it the connection ends.
pub const PENDING_RESETS_MAX: usize = 32;
/// Streams that we reset because of a peer's errors; beyond it the connection ends.
pub const LOCAL_RESETS_MAX: usize = 256;
/// TCP keepalive: idle seconds before the first probe; HTTP/2 pings come first, this is for half-open handshakes.
pub const TCP_KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
/// Pause after accept() failed for want of descriptors.
pub const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);
/// Connections accepted and not yet taken up by the transport.
pub const ACCEPTED_QUEUE_MAX: usize = 16;
/// Connections at once of one certified identity; the oldest makes room. Agents and drivers need one, tools a few.
pub const CONNECTIONS_PER_PEER_MAX: usize = 16;
const _: () = assert!(CONNECTIONS_PER_PEER_MAX + ANONYMOUS_CONNECTIONS_MAX < CONNECTIONS_MAX);
/// How long a TLS handshake may take: two round trips and a signature, on a bad network. Handshakes under way are anonymous connections, so
/// there are at most [`ANONYMOUS_CONNECTIONS_MAX`], and the oldest makes room.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// The niceness of the thread of all handshakes: where everybody wants the processors, it has a thirtieth of one, some 100 handshakes a second, so that a full
/// house of them ([`ANONYMOUS_CONNECTIONS_MAX`]) is through within [`HANDSHAKE_TIMEOUT`]; what nobody wants it has too.
pub const HANDSHAKE_NICENESS: i32 = 15;
/// How long a connection whose handshake was refused is read on, so that its peer reads the alert before it is reset.
pub const ALERT_LINGER: Duration = Duration::from_secs(1);
/// Bytes that are read meanwhile: what a client sends before it reads, such as its HTTP/2 settings.
pub const ALERT_LINGER_BYTES: u64 = 64 << 10;
/// How often certificates are looked at: whether their files have changed, and whether one that is in use has expired or was revoked.
pub const CERTIFICATES_TICK: Duration = Duration::from_secs(1);
/// How often the same failure to read certificates anew is logged; it is tried again with every look at them.
pub const RELOAD_FAILURE_TOLD_AGAIN: Duration = Duration::from_secs(60);
/// Bytes of a certificate, key or list that is read: a list with a hundred thousand entries has a few megabytes.
pub const CERTIFICATE_FILE_BYTES_MAX: u64 = 16 << 20;
/// The server warns once a day when its own certificate has less than this left.
pub const OWN_CERTIFICATE_WARNING: Duration = Duration::from_secs(30 * 86_400);

// ---- device sessions

/// DMA batches that a device may have unanswered. They are carried out one after the other, so memory holds one.
pub const DMA_CREDITS: u32 = 64;
/// MMIO calls that wait for a credit of the device; one more is refused.
pub const MMIO_WAITING_MAX: usize = 256;
/// How long a driver waits for its device to answer a register access, time for a credit included.
pub const MMIO_TIMEOUT: Duration = Duration::from_secs(5);
/// How long an ended stream has to carry its last status to a peer that reads, before its connection is cut.
pub const ENDING_GRACE: Duration = Duration::from_millis(500);
/// How often stalled and ended streams are looked for.
pub const WATCHDOG_TICK: Duration = Duration::from_millis(100);
/// How long a reclaim waits for a device to say that it was reset, before it goes on without.
pub const RESET_TIMEOUT: Duration = Duration::from_secs(2);
/// How often a reclaim looks whether domains that others dissolve are gone: a drain takes microseconds.
pub const RECLAIM_TICK: Duration = Duration::from_millis(1);
/// How long the first message of a device session may take.
pub const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// Devices on the host: half of a PCI segment's functions would fit; each costs a port's cache lines only while connected.
pub const DEVICES_MAX: u32 = 4096;
/// Sessions of devices at once, old ones that are being fenced included: the managed unit's ports.
pub const DEVICE_PORTS_MAX: u16 = 1024;

// ---- owners

/// Owners declared at once.
pub const OWNERS_MAX: u32 = 1024;
/// Domains of all owners together: DomainId has 16 bits, 0 is reserved in caching mode; as many for each partition of the IOTLB.
pub const DOMAINS_MAX: u16 = 65_520;
/// Domains of one owner, default domains of its devices included.
pub const DOMAINS_PER_OWNER_MAX: u32 = 2048;
/// Live mappings of one owner: one record of 64 bytes each.
pub const MAPPINGS_PER_OWNER_MAX: u64 = 1 << 20;
/// Interrupts of one owner.
pub const INTERRUPTS_PER_OWNER_MAX: u32 = 2048;
/// Fault records kept for one owner; older ones are overwritten and counted.
pub const FAULT_RECORDS_PER_OWNER: u32 = 1024;
/// Sanitizer reports kept for one owner; older ones are overwritten and counted. One takes about 250 bytes here.
pub const SANITIZER_REPORTS_PER_OWNER: usize = 1024;
/// How often domains give back cached addresses that they did not need since: a burst that comes again within a second still finds
/// them, and a domain's turn holds its lock for a millisecond at most.
pub const TRIM_INTERVAL: Duration = Duration::from_secs(1);
/// Requests of one owner's driver in a second: several times what one connection was measured to do.
pub const REQUESTS_PER_SECOND_MAX: u64 = 200_000;
/// DMA operations of one owner's devices in a second: several times what two cores were measured to do.
pub const DMA_OPERATIONS_PER_SECOND_MAX: u64 = 50_000_000;
/// Bytes of DMA of one owner's devices in a second: the same.
pub const DMA_BYTES_PER_SECOND_MAX: u64 = 64 << 30;
/// How much of a rate may come at once: a driver that was away for a moment is not held up, and a flood is noticed in no time.
pub const RATE_BURST: Duration = Duration::from_millis(100);
/// How long somebody waits who was refused because of a rate, at least and at most: a flood then costs 200 refusals a
/// second.
pub const RATE_PENALTY: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(50));
/// How long at most when many are refused at once, as each then waits for the one before: the calls of one connection take two thirds of it.
pub const RATE_PENALTY_QUEUE: Duration = Duration::from_secs(2);
const _: () = assert!(
    STREAMS_PER_CONNECTION_MAX as u128 * RATE_PENALTY.0.as_millis() <= RATE_PENALTY_QUEUE.as_millis()
);
/// Calls of one owner's driver that are not answered yet: most of what its connection allows. Streams count until they stand; then they are subscriptions.
pub const CALLS_PER_OWNER_MAX: usize = 240;
// One peer, whatever it calls, leaves half of all calls to the others.
const _: () = assert!(CONNECTIONS_PER_PEER_MAX * STREAMS_PER_CONNECTION_MAX as usize <= CALLS_MAX / 2);
const _: () = assert!(CALLS_PER_OWNER_MAX < STREAMS_PER_CONNECTION_MAX as usize);
/// Changes of what one tenant holds that are under way: its calls, one batch of each of its streams, and what goes on after its call was given up.
pub const CHANGES_PER_TENANCY_MAX: usize = 512;
const _: () =
    assert!(CALLS_PER_OWNER_MAX < CHANGES_PER_TENANCY_MAX && CHANGES_PER_TENANCY_MAX < REQUEST_WINDOW);
/// Subscriptions of one owner's driver.
pub const WATCHERS_PER_OWNER_MAX: usize = 64;
/// Functions of one owner. With `DMA_CREDITS` each it bounds the DMA that an owner has in flight.
pub const FUNCTIONS_PER_OWNER_MAX: usize = 256;
/// Bytes of memory that cost a driver as much as one request.
pub const BYTES_PER_REQUEST: u64 = 64 << 10;
/// Request IDs remembered per session identity.
pub const REQUEST_WINDOW: usize = 1024;
/// Bytes of answers remembered per session identity; the oldest go first.
pub const REPLAY_BYTES_MAX: usize = 1 << 20;
/// Distinct interrupts queued for one subscription; equal ones are merged, so this bounds distinct ones only.
pub const INTERRUPTS_QUEUED_MAX: usize = 1024;
/// Answers ready for a slow reader of a subscription or bulk stream.
pub const FEED_DEPTH: usize = 4;
/// How far apart the messages of one subscription to a log are at least: whoever faults as fast as it can costs each that watches some hundred messages in a
/// second, and the log keeps what comes meanwhile ([`FAULT_RECORDS_PER_OWNER`]).
pub const FEED_SPACING: Duration = Duration::from_millis(5);
/// Items (fault records, mappings, IOTLB entries, table entries) in one message; one takes less than 512 bytes.
pub const ITEMS_PER_MESSAGE_MAX: usize = 2048;
const _: () = assert!(ITEMS_PER_MESSAGE_MAX * 512 < limits::MESSAGE_BYTES_MAX);
const _: () = assert!(BULK_PIECE_BYTES < limits::BATCH_BYTES_MAX as usize);
/// Table entries in one dump: more than a million mappings have.
pub const DUMP_ENTRIES_MAX: usize = 4 << 20;

// ---- hypervisors

/// Names under which hypervisors are known at once.
pub const HYPERVISORS_MAX: usize = 64;
/// Virtual machines of one hypervisor.
pub const VMS_PER_HYPERVISOR_MAX: usize = limits::VMS_PER_HYPERVISOR_MAX;
/// Functions that one hypervisor declares.
pub const FUNCTIONS_PER_HYPERVISOR_MAX: usize = 512;
const _: () = assert!(FUNCTIONS_PER_HYPERVISOR_MAX < DEVICES_MAX as usize / 4);
/// What is wiped without a thread for it: as much as takes a tenth of a millisecond, a small batch of DMA.
pub const WIPED_ON_THE_SPOT_BYTES: u64 = 1 << 20;
/// Threads that wipe memory at once: one keeps a memory channel busy, and all the others wait without a thread.
pub const WIPING_MAX: usize = 2;
/// Requests of one hypervisor in a second: as many as of a driver. One that shares a device by copying reads or writes memory for each packet of all its guests.
pub const HYPERVISOR_REQUESTS_PER_SECOND_MAX: u32 = REQUESTS_PER_SECOND_MAX as u32;
/// Hypercalls of one virtual machine that wait for their answer: a ring's worth of requests, each a page at most.
pub const HYPERCALLS_PER_VM_MAX: usize = 64;
/// How long a guest waits for its hypervisor.
pub const HYPERCALL_TIMEOUT: Duration =
    Duration::from_millis(iommu_proto::limits::HYPERCALL_TIMEOUT_MS as u64);

// ---- bare machines

/// Bare machines of one client.
pub const MACHINES_PER_CLIENT_MAX: usize = 8;
/// Bare machines of all clients together.
pub const MACHINES_MAX: usize = 64;
/// Memory of one bare machine.
pub const MACHINE_MEMORY_BYTES_MAX: u64 = 1 << 30;
/// Memory of all bare machines of one client.
pub const MACHINE_MEMORY_PER_CLIENT_BYTES_MAX: u64 = 2 << 30;
/// Devices of one bare machine.
pub const MACHINE_DEVICES_MAX: usize = 64;
/// Names under which clients of bare machines are known at once.
pub const BARE_CLIENTS_MAX: usize = 64;

// ---- the managed unit

/// Sets of four ways in the IOTLB: 65,536 translations, 4,096 for each partition.
pub const IOTLB_SETS: u32 = 16_384;
/// Partitions of the IOTLB. Each owner gets the one with the fewest owners, so that up to so many never displace each other's translations.
pub const IOTLB_PARTITIONS: u16 = 16;
const _: () = assert!(DOMAINS_MAX / IOTLB_PARTITIONS >= DOMAINS_PER_OWNER_MAX as u16);
/// Sets of four ways in the context cache (all devices that fit the ports) and in the paging-structure cache.
pub const OTHER_CACHE_SETS: u32 = 1024;

// ---- log

/// Log lines of one kind that a peer can cause, per second; the rest is counted and told with the next line.
pub const PEER_LOG_LINES_PER_SECOND: u32 = 10;
