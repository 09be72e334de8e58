//! What guest and multiplexer say to each other in the payloads of hypercalls: a batch of requests, and how each ended.
//!
//! ```text
//! request   │ "MUX1" │ count │ 0 │  and for each  │ gpa │ length │ kind │ 0 0 0 │        little endian, 8 + 16 × count bytes
//!           │ 4      │ 2     │ 2 │                │ 8   │ 4      │ 1    │ 3     │
//! reply     │ "MUX1" │ count │ outcome │  and for each  │ bytes │ status │ 0 0 0 │         8 + 8 × count bytes
//!           │ 4      │ 2     │ 2       │                │ 4     │ 1      │ 3     │
//! ```
//!
//! There is one way to write each batch: what decodes is what its encoding gives again.

use bytes::Bytes;
use iommu_proto::limits::HYPERCALL_BYTES_MAX;
use iommu_types::{Gpa, GpaRange};

const MAGIC: [u8; 4] = *b"MUX1";
const HEAD_BYTES: usize = 8;
const ENTRY_BYTES: usize = 16;
const ENDED_BYTES: usize = 8;

/// Most entries of a batch: as many as a page holds.
pub const ENTRIES_MAX: usize = (HYPERCALL_BYTES_MAX - HEAD_BYTES) / ENTRY_BYTES;
/// Most bytes of one entry: a segment of a packet that the network stack has not cut yet.
pub const PACKET_BYTES_MAX: u32 = 64 << 10;
/// Most bytes of a batch: what the multiplexer holds in memory for one turn of a guest.
pub const BATCH_BYTES_MAX: u32 = 1 << 20;

const _: () = assert!(HEAD_BYTES + ENTRIES_MAX * ENDED_BYTES <= HYPERCALL_BYTES_MAX);
const _: () = assert!(BATCH_BYTES_MAX <= iommu_proto::limits::BATCH_BYTES_MAX);
const _: () = assert!(PACKET_BYTES_MAX <= BATCH_BYTES_MAX);

/// What the device does with a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It reads the guest's memory.
    Transmit,
    /// It writes the guest's memory.
    Receive,
}

/// One packet: what is done with it, and where it is in the guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// What the device does.
    pub kind: Kind,
    /// In the guest's memory, at any offset.
    pub range: GpaRange,
}

/// Entries that go over the wire as one: 1 to [`ENTRIES_MAX`], of [`PACKET_BYTES_MAX`] each and [`BATCH_BYTES_MAX`] together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    entries: Vec<Entry>,
}

/// Why bytes or entries are no batch.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadBatch {
    /// Not the length that their count asks for, or a head that is none.
    #[error("{bytes} bytes are no batch")]
    Malformed {
        /// How many.
        bytes: usize,
    },
    /// None, or too many.
    #[error("{count} entries are not 1 to {ENTRIES_MAX}")]
    Count {
        /// How many.
        count: usize,
    },
    /// An entry of no kind, or of no range.
    #[error("entry {index} is of no kind, has padding, or its range is empty or wraps")]
    Entry {
        /// Which.
        index: usize,
    },
    /// An entry that is too large.
    #[error("entry {index} has {bytes} bytes; {PACKET_BYTES_MAX} at most")]
    PacketTooLarge {
        /// Which.
        index: usize,
        /// Its size.
        bytes: u64,
    },
    /// All together are too large.
    #[error("{bytes} bytes in one batch; {BATCH_BYTES_MAX} at most")]
    BatchTooLarge {
        /// Their size.
        bytes: u64,
    },
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn double(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

/// Count and second half-word of a head, and what follows, in so many bytes each.
fn head(payload: &[u8], each_bytes: usize) -> Option<(u16, std::slice::ChunksExact<'_, u8>)> {
    let (head, rest) = payload.split_at_checked(HEAD_BYTES)?;
    let tail = word(head, 4)?;
    let (count, second) = (tail as u16, (tail >> 16) as u16);
    let is_whole = rest.len() == usize::from(count) * each_bytes;
    (head[..4] == MAGIC && is_whole).then(|| (second, rest.chunks_exact(each_bytes)))
}

impl Entry {
    /// Memory that the device reads.
    pub const fn transmit(range: GpaRange) -> Self {
        Self { kind: Kind::Transmit, range }
    }

    /// Memory that the device writes.
    pub const fn receive(range: GpaRange) -> Self {
        Self { kind: Kind::Receive, range }
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let kind = match word(bytes, 12)? {
            1 => Kind::Transmit,
            2 => Kind::Receive,
            _ => return None,
        };
        let range = GpaRange::new(Gpa::new(double(bytes, 0)?), word(bytes, 8)?.into()).ok()?;
        Some(Self { kind, range })
    }

    fn encode(self, into: &mut Vec<u8>) {
        let kind: u32 = match self.kind {
            Kind::Transmit => 1,
            Kind::Receive => 2,
        };
        let length = self.length();
        into.extend_from_slice(&self.range.base().get().to_le_bytes());
        into.extend_from_slice(&length.to_le_bytes());
        into.extend_from_slice(&kind.to_le_bytes());
    }

    /// Its bytes.
    pub fn length(self) -> u32 {
        u32::try_from(self.range.size_bytes()).expect("entries of a batch are at most PACKET_BYTES_MAX")
    }
}

impl Batch {
    /// A batch of these entries.
    pub fn new(entries: Vec<Entry>) -> Result<Self, BadBatch> {
        if !(1..=ENTRIES_MAX).contains(&entries.len()) {
            return Err(BadBatch::Count { count: entries.len() });
        }
        let mut total = 0;
        for (index, entry) in entries.iter().enumerate() {
            let bytes = entry.range.size_bytes();
            if bytes > PACKET_BYTES_MAX.into() {
                return Err(BadBatch::PacketTooLarge { index, bytes });
            }
            total += bytes;
        }
        if total > BATCH_BYTES_MAX.into() {
            return Err(BadBatch::BatchTooLarge { bytes: total });
        }
        Ok(Self { entries })
    }

    /// From a payload, whatever it is.
    pub fn decode(payload: &[u8]) -> Result<Self, BadBatch> {
        let malformed = BadBatch::Malformed { bytes: payload.len() };
        let Some((0, entries)) = head(payload, ENTRY_BYTES) else { return Err(malformed) };
        if entries.len() > ENTRIES_MAX {
            return Err(BadBatch::Count { count: entries.len() });
        }
        let decode = |(index, bytes)| Entry::decode(bytes).ok_or(BadBatch::Entry { index });
        Self::new(entries.enumerate().map(decode).collect::<Result<_, _>>()?)
    }

    /// As a payload.
    pub fn encode(&self) -> Bytes {
        let mut payload = Vec::with_capacity(HEAD_BYTES + self.entries.len() * ENTRY_BYTES);
        payload.extend_from_slice(&MAGIC);
        payload.extend_from_slice(&(self.entries.len() as u32).to_le_bytes());
        self.entries.iter().for_each(|entry| entry.encode(&mut payload));
        payload.into()
    }

    /// Its entries, in order.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }
}

/// How an entry ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// So many bytes were moved; of a packet that was received, at most as many as there was room for.
    Done {
        /// How many.
        bytes: u32,
    },
    /// Some of the range is not the guest's memory.
    NotYours,
    /// The device, or its driver, did not take the packet.
    DeviceFailed,
    /// The multiplexer did not come to the guest's memory.
    MemoryFailed,
}

/// The answer to a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// It was carried out: how each of its entries ended, in order.
    Ended(Vec<Ended>),
    /// Nothing of it was done: as many of the guest's batches wait already as may.
    Busy,
    /// Nothing of it was done: it is no batch.
    Malformed,
}

impl Ended {
    fn decode(bytes: &[u8]) -> Option<Self> {
        match (word(bytes, 0)?, word(bytes, 4)?) {
            (bytes, 0) => Some(Self::Done { bytes }),
            (0, 1) => Some(Self::NotYours),
            (0, 2) => Some(Self::DeviceFailed),
            (0, 3) => Some(Self::MemoryFailed),
            _ => None,
        }
    }

    fn encode(self, into: &mut Vec<u8>) {
        let (bytes, status): (u32, u32) = match self {
            Self::Done { bytes } => (bytes, 0),
            Self::NotYours => (0, 1),
            Self::DeviceFailed => (0, 2),
            Self::MemoryFailed => (0, 3),
        };
        into.extend_from_slice(&bytes.to_le_bytes());
        into.extend_from_slice(&status.to_le_bytes());
    }
}

impl Reply {
    /// From a payload; `None` for one that is no reply.
    pub fn decode(payload: &[u8]) -> Option<Self> {
        match head(payload, ENDED_BYTES)? {
            (0, ended) if ended.len() <= ENTRIES_MAX => {
                Some(Self::Ended(ended.map(Ended::decode).collect::<Option<_>>()?))
            }
            (1, ended) if ended.len() == 0 => Some(Self::Busy),
            (2, ended) if ended.len() == 0 => Some(Self::Malformed),
            _ => None,
        }
    }

    /// As a payload.
    pub fn encode(&self) -> Bytes {
        let (outcome, ended): (u32, &[Ended]) = match self {
            Self::Ended(ended) => (0, ended),
            Self::Busy => (1, &[]),
            Self::Malformed => (2, &[]),
        };
        let mut payload = Vec::with_capacity(HEAD_BYTES + ended.len() * ENDED_BYTES);
        payload.extend_from_slice(&MAGIC);
        payload.extend_from_slice(&(outcome << 16 | ended.len() as u32).to_le_bytes());
        ended.iter().for_each(|ended| ended.encode(&mut payload));
        payload.into()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn range(gpa: u64, size_bytes: u64) -> GpaRange {
        GpaRange::new(Gpa::new(gpa), size_bytes).expect("a range")
    }

    /// A payload that looks like a batch: a good head, and entries of any bytes.
    fn almost_a_batch() -> impl Strategy<Value = Vec<u8>> {
        let entry = (any::<u64>(), 0..80_000_u32, 0..4_u32);
        proptest::collection::vec(entry, 0..40).prop_map(|entries| {
            let mut payload = MAGIC.to_vec();
            payload.extend_from_slice(&(entries.len() as u32).to_le_bytes());
            for (gpa, length, kind) in entries {
                payload.extend_from_slice(&gpa.to_le_bytes());
                payload.extend_from_slice(&length.to_le_bytes());
                payload.extend_from_slice(&kind.to_le_bytes());
            }
            payload
        })
    }

    fn any_entry() -> impl Strategy<Value = Entry> {
        (0..u64::MAX - 0x1_0000, 1..4096_u64, any::<bool>()).prop_map(|(gpa, size_bytes, is_read)| {
            let kind = if is_read { Kind::Transmit } else { Kind::Receive };
            Entry { kind, range: range(gpa, size_bytes) }
        })
    }

    fn any_ended() -> impl Strategy<Value = Ended> {
        prop_oneof![
            any::<u32>().prop_map(|bytes| Ended::Done { bytes }),
            Just(Ended::NotYours),
            Just(Ended::DeviceFailed),
            Just(Ended::MemoryFailed),
        ]
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_batch_that_is_written_so_or_an_error(
            payload in prop_oneof![proptest::collection::vec(any::<u8>(), 0..200), almost_a_batch()],
        ) {
            if let Ok(batch) = Batch::decode(&payload) {
                prop_assert_eq!(&batch.encode()[..], &payload[..]);
            }
            if let Some(reply) = Reply::decode(&payload) {
                prop_assert_eq!(&reply.encode()[..], &payload[..]);
            }
        }

        #[test]
        fn a_batch_comes_out_as_it_went_in(entries in proptest::collection::vec(any_entry(), 1..=ENTRIES_MAX)) {
            let batch = Batch::new(entries);
            let Ok(batch) = batch else { return Err(TestCaseError::reject("too large")) };
            let payload = batch.encode();
            prop_assert!(payload.len() <= HYPERCALL_BYTES_MAX);
            prop_assert_eq!(Batch::decode(&payload), Ok(batch));
        }

        #[test]
        fn a_reply_comes_out_as_it_went_in(ended in proptest::collection::vec(any_ended(), 0..=ENTRIES_MAX)) {
            for reply in [Reply::Ended(ended), Reply::Busy, Reply::Malformed] {
                prop_assert_eq!(Reply::decode(&reply.encode()), Some(reply));
            }
        }
    }

    #[test]
    fn what_is_out_of_bounds_is_refused_by_name() {
        let packet = |bytes| Entry::transmit(range(0x1000, bytes));
        let largest = u64::from(PACKET_BYTES_MAX);
        for (entries, expected) in [
            (vec![], Some(BadBatch::Count { count: 0 })),
            (vec![packet(1); ENTRIES_MAX], None),
            (vec![packet(1); ENTRIES_MAX + 1], Some(BadBatch::Count { count: ENTRIES_MAX + 1 })),
            (vec![packet(1), packet(largest)], None),
            (
                vec![packet(1), packet(largest + 1)],
                Some(BadBatch::PacketTooLarge { index: 1, bytes: largest + 1 }),
            ),
            (vec![packet(largest); 16], None),
            (vec![packet(largest); 17], Some(BadBatch::BatchTooLarge { bytes: 17 * largest })),
        ] {
            assert_eq!(Batch::new(entries).err(), expected);
        }
    }

    #[test]
    fn every_byte_of_a_head_and_of_padding_counts() {
        let good = Batch::new(vec![Entry::receive(range(0x1000, 64))]).expect("a batch").encode();
        assert!(Batch::decode(&good).is_ok());
        for at in (0..8).chain(20..24) {
            let mut bad = good.to_vec();
            bad[at] ^= 0x10;
            assert!(Batch::decode(&bad).is_err(), "byte {at}");
        }
        for bad in [&good[..good.len() - 1], &[&good[..], &[0]].concat()] {
            assert_eq!(Batch::decode(bad), Err(BadBatch::Malformed { bytes: bad.len() }));
        }
    }
}
