//! The receive ring: descriptors in coherent memory, packets into the buffers that they name.
//!
//! ```text
//!   RING_BASE ┌────────────┬────────┬───────┬────────┬──────────┬──────────┐
//!             │ buffer     │ length │ flags │ status │ received │ sequence │  descriptor 0, 32 bytes
//!             │ 0      63  │ 8      │ 12    │ 16     │ 20       │ 24    31 │
//!             └────────────┴────────┴───────┴────────┴──────────┴──────────┘
//!               the driver writes             the device writes back
//! ```
//!
//! Descriptors from RING_HEAD up to, not including, RING_TAIL belong to the device. A ring of n descriptors
//! takes n - 1, since head = tail means empty.

use bytes::Bytes;
use iommu_types::{DmaFault, Iova};

use crate::bus::Bus;
use crate::pattern;
use crate::registers::*;
use crate::state::{Failure, Ring};

/// Bytes of a descriptor.
pub const DESCRIPTOR_BYTES: u32 = 32;
/// Where the half begins that the device writes back.
pub const COMPLETION_OFFSET: u32 = 16;
/// Descriptor flags: the descriptor is filled in.
pub const FLAG_VALID: u32 = 1 << 0;
/// Descriptor status: the device is done with it.
pub const COMPLETION_DONE: u32 = 1 << 0;
/// Descriptor status: the packet was refused; bits 31:16 are the code that FAULT_REASON shows.
pub const COMPLETION_ERROR: u32 = 1 << 1;

/// A descriptor: both halves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// Address of the buffer, as the device sees it.
    pub buffer: u64,
    /// Bytes of the buffer.
    pub length: u32,
    /// [`FLAG_VALID`].
    pub flags: u32,
    /// Written back: [`COMPLETION_DONE`], [`COMPLETION_ERROR`].
    pub status: u32,
    /// Written back: bytes of the packet.
    pub received_bytes: u32,
    /// Written back: sequence number of the packet; see [`pattern::packet`].
    pub sequence: u64,
}

impl Descriptor {
    /// A descriptor that gives a buffer to the device.
    pub fn for_buffer(buffer: Iova, length: u32) -> Self {
        Self { buffer: buffer.get(), length, flags: FLAG_VALID, ..Self::default() }
    }

    /// As it lies in memory.
    pub fn to_bytes(self) -> [u8; DESCRIPTOR_BYTES as usize] {
        let mut bytes = [0; DESCRIPTOR_BYTES as usize];
        bytes[..8].copy_from_slice(&self.buffer.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.length.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.flags.to_le_bytes());
        bytes[16..].copy_from_slice(&self.completion());
        bytes
    }

    /// From memory.
    pub fn from_bytes(bytes: [u8; DESCRIPTOR_BYTES as usize]) -> Self {
        let word = |from: usize| u32::from_le_bytes(std::array::from_fn(|i| bytes[from + i]));
        let double = |from: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[from + i]));
        Self {
            buffer: double(0),
            length: word(8),
            flags: word(12),
            status: word(16),
            received_bytes: word(20),
            sequence: double(24),
        }
    }

    fn completion(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&self.status.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.received_bytes.to_le_bytes());
        bytes[8..].copy_from_slice(&self.sequence.to_le_bytes());
        bytes
    }
}

/// What a burst has done.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Burst {
    /// Descriptors that the device is done with.
    pub(crate) descriptors: u32,
    /// Packets written.
    pub(crate) packets: u32,
    /// The last failure, when there was one.
    pub(crate) failure: Option<Failure>,
    /// The ring cannot go on: its descriptors could not be read or written.
    pub(crate) broken: bool,
}

/// A descriptor of a burst on its way.
struct Packet {
    at: Iova,
    descriptor: Descriptor,
    content: Bytes,
    outcome: Result<(), Failure>,
}

/// Receives packets into the next descriptors, as many as are there and fit a burst: one read each, one write
/// each, and one completion each.
pub(crate) async fn receive(bus: &impl Bus, ring: Ring) -> Burst {
    let waiting = (ring.tail + ring.size - ring.head) % ring.size;
    let count = waiting.min(ring.burst());
    let mut packets = match read_descriptors(bus, ring, count).await {
        Ok(packets) => packets,
        Err(failure) => return Burst { descriptors: 0, packets: 0, failure: Some(failure), broken: true },
    };
    let mut sequence = u64::from(ring.packets);
    for packet in &mut packets {
        if packet.outcome.is_ok() {
            let size = ring.packet_bytes.min(packet.descriptor.length);
            packet.descriptor.sequence = sequence;
            packet.descriptor.received_bytes = size;
            packet.content = pattern::packet(sequence, size as usize);
            sequence += 1;
        }
    }
    let mut broken = write_contents(bus, &mut packets).await.err();
    if broken.is_none() && ring.control & RING_WRITE_BACK != 0 {
        broken = write_back(bus, &packets).await.err();
    }
    let written = packets.iter().filter(|packet| packet.outcome.is_ok()).count() as u32;
    let failed = packets.iter().filter_map(|packet| packet.outcome.err()).last();
    Burst { descriptors: count, packets: written, failure: broken.or(failed), broken: broken.is_some() }
}

async fn read_descriptors(bus: &impl Bus, ring: Ring, count: u32) -> Result<Vec<Packet>, Failure> {
    let wraps = Failure { address: ring.base, reason: REASON_WRAPS };
    let places = (0..count)
        .map(|number| {
            let index = (ring.head + number) % ring.size;
            Iova::new(ring.base).checked_add(u64::from(index) * u64::from(DESCRIPTOR_BYTES)).ok_or(wraps)
        })
        .collect::<Result<Vec<_>, _>>()?;
    let reads = places.iter().map(|&place| (place, DESCRIPTOR_BYTES)).collect();
    let answers = bus.read_each(reads).await.map_err(|error| Failure::of(error, ring.base))?;
    let packet = |(at, answer): (Iova, Result<Bytes, DmaFault>)| {
        let bytes = answer.map_err(|fault| Failure::of_fault(&fault))?;
        let short = Failure { address: at.get(), reason: REASON_BAD_DESCRIPTOR };
        let descriptor = Descriptor::from_bytes((&*bytes).try_into().map_err(|_| short)?);
        let usable = descriptor.flags & FLAG_VALID != 0 && descriptor.length > 0;
        let outcome = if usable { Ok(()) } else { Err(short) };
        Ok(Packet { at, descriptor, content: Bytes::new(), outcome })
    };
    places.into_iter().zip(answers).map(packet).collect()
}

/// Writes the contents. `Err` when the bus is gone.
async fn write_contents(bus: &impl Bus, packets: &mut [Packet]) -> Result<(), Failure> {
    let writes = packets
        .iter()
        .filter(|packet| packet.outcome.is_ok())
        .map(|packet| (Iova::new(packet.descriptor.buffer), packet.content.clone()))
        .collect::<Vec<_>>();
    let Some(&(first, _)) = writes.first() else { return Ok(()) };
    let answers = bus.write_each(writes).await.map_err(|error| Failure::of(error, first.get()))?;
    let mut answers = answers.into_iter();
    for packet in packets.iter_mut().filter(|packet| packet.outcome.is_ok()) {
        if let Some(Err(fault)) = answers.next() {
            packet.outcome = Err(Failure::of_fault(&fault));
        }
    }
    Ok(())
}

/// Writes the completions. `Err` when one is refused: the driver would wait for it for ever.
async fn write_back(bus: &impl Bus, packets: &[Packet]) -> Result<(), Failure> {
    let mut writes = Vec::with_capacity(packets.len());
    for packet in packets {
        let mut descriptor = packet.descriptor;
        descriptor.status = match packet.outcome {
            Ok(()) => COMPLETION_DONE,
            Err(failure) => COMPLETION_DONE | COMPLETION_ERROR | (failure.reason & 0xffff) << 16,
        };
        if packet.outcome.is_err() {
            descriptor.received_bytes = 0;
        }
        let wraps = Failure { address: packet.at.get(), reason: REASON_WRAPS };
        let place = packet.at.checked_add(u64::from(COMPLETION_OFFSET)).ok_or(wraps)?;
        writes.push((place, Bytes::copy_from_slice(&descriptor.completion())));
    }
    let Some(&(first, _)) = writes.first() else { return Ok(()) };
    let answers = bus.write_each(writes).await.map_err(|error| Failure::of(error, first.get()))?;
    match answers.into_iter().find_map(Result::err) {
        Some(fault) => Err(Failure::of_fault(&fault)),
        None => Ok(()),
    }
}
