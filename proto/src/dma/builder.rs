//! A batch to send: operations, gathered in the columns of the wire.
//!
//! A column stays one element as long as all its elements are equal, so a batch of 128 equal reads allocates
//! for its addresses and for nothing else.

use bytes::{BufMut, Bytes, BytesMut};
use iommu_types::{Generation, Iova, Pasid};

use super::batch::{payload_bytes, result_bytes};
use super::completed::BatchShape;
use super::kind;
use crate::pb;

/// A column of a batch: one value for all, or one each.
#[derive(Clone, Debug)]
pub(super) enum Gathered<T> {
    Empty,
    Equal(T),
    Each(Vec<T>),
}

impl<T: Copy + PartialEq> Gathered<T> {
    /// Adds the value of the next operation, of which `count` went before.
    fn push(&mut self, value: T, count: usize) {
        match self {
            Self::Empty => *self = Self::Equal(value),
            Self::Equal(equal) if *equal == value => {}
            Self::Equal(equal) => {
                let mut each = Vec::with_capacity((count + 1).max(16));
                each.resize(count, *equal);
                each.push(value);
                *self = Self::Each(each);
            }
            Self::Each(each) => each.push(value),
        }
    }

    /// The value of an operation of the batch.
    pub(super) fn get(&self, index: usize) -> Option<T> {
        match self {
            Self::Empty => None,
            Self::Equal(value) => Some(*value),
            Self::Each(each) => each.get(index).copied(),
        }
    }
}

/// An operand of a PCIe AtomicOp, and its width. Little endian on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AtomicValue {
    /// 4 bytes.
    U32(u32),
    /// 8 bytes.
    U64(u64),
    /// 16 bytes; only for compare-and-swap.
    U128(u128),
}

impl AtomicValue {
    /// Bytes of the operand.
    pub const fn size_bytes(self) -> u32 {
        match self {
            Self::U32(_) => 4,
            Self::U64(_) => 8,
            Self::U128(_) => 16,
        }
    }

    /// The value that `bytes` spell, little endian; `None` unless they are 4, 8 or 16.
    pub fn from_le_bytes(bytes: &[u8]) -> Option<Self> {
        match bytes.len() {
            4 => Some(Self::U32(u32::from_le_bytes(bytes.try_into().ok()?))),
            8 => Some(Self::U64(u64::from_le_bytes(bytes.try_into().ok()?))),
            16 => Some(Self::U128(u128::from_le_bytes(bytes.try_into().ok()?))),
            _ => None,
        }
    }

    fn put(self, payload: &mut BytesMut) {
        match self {
            Self::U32(value) => payload.put_u32_le(value),
            Self::U64(value) => payload.put_u64_le(value),
            Self::U128(value) => payload.put_u128_le(value),
        }
    }
}

/// Operations that travel as one message and are carried out in order; each ends for itself, and those after
/// a refused one still run. Operation `i` is the `i`-th that was added.
#[derive(Clone, Debug)]
pub struct Batch {
    iova: Vec<u64>,
    size_bytes: Gathered<u32>,
    kind: Gathered<u8>,
    payload: Payload,
    /// Bytes that come back when every operation succeeds.
    returned_bytes: u64,
    /// Bytes read, written and of operands, as the limit counts them.
    bytes: u64,
    pasid: Option<Pasid>,
    assignment_generation: Option<Generation>,
}

/// Data of the writes: the only write is sent as it was given, several are joined.
#[derive(Clone, Debug)]
enum Payload {
    Empty,
    Single(Bytes),
    Joined(BytesMut),
}

impl Payload {
    fn joined(&mut self) -> &mut BytesMut {
        if let Self::Single(first) = self {
            let mut joined = BytesMut::with_capacity(first.len().saturating_mul(2));
            joined.extend_from_slice(first);
            *self = Self::Joined(joined);
        } else if matches!(self, Self::Empty) {
            *self = Self::Joined(BytesMut::new());
        }
        match self {
            Self::Joined(joined) => joined,
            Self::Empty | Self::Single(_) => unreachable!("both were turned into joined above"),
        }
    }

    fn push(&mut self, data: Bytes) {
        match self {
            Self::Empty => *self = Self::Single(data),
            Self::Single(_) | Self::Joined(_) => self.joined().extend_from_slice(&data),
        }
    }

    fn into_bytes(self) -> Bytes {
        match self {
            Self::Empty => Bytes::new(),
            Self::Single(data) => data,
            Self::Joined(joined) => joined.freeze(),
        }
    }
}

impl Default for Batch {
    fn default() -> Self {
        Self::new()
    }
}

impl Batch {
    /// An empty batch.
    pub fn new() -> Self {
        Self::with_capacity(0)
    }

    /// An empty batch with room for so many operations.
    pub fn with_capacity(operations: usize) -> Self {
        Self {
            iova: Vec::with_capacity(operations),
            size_bytes: Gathered::Empty,
            kind: Gathered::Empty,
            payload: Payload::Empty,
            returned_bytes: 0,
            bytes: 0,
            pasid: None,
            assignment_generation: None,
        }
    }

    /// Sends every operation of the batch with this PASID.
    pub fn with_pasid(mut self, pasid: Pasid) -> Self {
        self.pasid = Some(pasid);
        self
    }
    /// Says under which generation of the device the operations were queued.
    pub fn with_assignment_generation(mut self, generation: Generation) -> Self {
        self.assignment_generation = Some(generation);
        self
    }

    /// Reads `size_bytes` bytes at `iova`. Zero is a zero-length read: it reads nothing and asks for read
    /// permission.
    pub fn read(&mut self, iova: Iova, size_bytes: u32) -> &mut Self {
        self.add(kind::READ, iova, size_bytes, u64::from(size_bytes));
        self
    }

    /// Writes `data` at `iova`. Data of 4 GiB and more is over every limit.
    pub fn write(&mut self, iova: Iova, data: impl Into<Bytes>) -> &mut Self {
        self.add_write(kind::WRITE, iova, data.into())
    }

    /// Writes `data` at `iova`, posted: the bus gives no order to what comes after. It is answered like any
    /// write.
    pub fn posted_write(&mut self, iova: Iova, data: impl Into<Bytes>) -> &mut Self {
        self.add_write(kind::POSTED_WRITE, iova, data.into())
    }

    /// Writes a copy of `data` at `iova`; the cheaper form when many small writes are joined.
    pub fn write_slice(&mut self, iova: Iova, data: &[u8]) -> &mut Self {
        self.add(kind::WRITE, iova, clamp(data.len()), data.len() as u64);
        self.payload.joined().extend_from_slice(data);
        self
    }

    /// Adds `operand` to the value at `iova`, which is answered as it was before.
    pub fn fetch_add(&mut self, iova: Iova, operand: AtomicValue) -> &mut Self {
        self.add_atomic(kind::FETCH_ADD, iova, operand.size_bytes(), &[operand])
    }

    /// Puts `operand` at `iova`; the value before is answered.
    pub fn swap(&mut self, iova: Iova, operand: AtomicValue) -> &mut Self {
        self.add_atomic(kind::SWAP, iova, operand.size_bytes(), &[operand])
    }

    /// Puts `new` at `iova` if `expected` is there; the value before is answered. Operands of two widths are
    /// refused as malformed by the server.
    pub fn compare_and_swap(&mut self, iova: Iova, expected: AtomicValue, new: AtomicValue) -> &mut Self {
        // The columns must add up, or the session ends. Of two widths the mean (6, 10 or 12) is one that no CAS has.
        let size_bytes = expected.size_bytes().midpoint(new.size_bytes());
        self.add_atomic(kind::COMPARE_AND_SWAP, iova, size_bytes, &[expected, new])
    }

    /// An interrupt: a posted 4-byte write of `data` to `address`, which lies in FEEx_xxxx.
    pub fn msi(&mut self, address: Iova, data: u32) -> &mut Self {
        self.add(kind::POSTED_WRITE, address, 4, 4);
        self.payload.joined().put_u32_le(data);
        self
    }

    /// How many operations there are.
    pub fn len(&self) -> usize {
        self.iova.len()
    }

    /// Whether there is no operation.
    pub fn is_empty(&self) -> bool {
        self.iova.is_empty()
    }

    /// Bytes written, of operands, and to be read, together: what [`BatchLimits::bytes_max`](super::BatchLimits) bounds.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    fn add(&mut self, kind: u8, iova: Iova, size_bytes: u32, counted_bytes: u64) {
        let count = self.iova.len();
        self.size_bytes.push(size_bytes, count);
        self.kind.push(kind, count);
        self.iova.push(iova.get());
        self.bytes = self.bytes.saturating_add(counted_bytes);
        self.returned_bytes = self.returned_bytes.saturating_add(result_bytes(kind, size_bytes));
    }

    fn add_write(&mut self, kind: u8, iova: Iova, data: Bytes) -> &mut Self {
        self.add(kind, iova, clamp(data.len()), data.len() as u64);
        self.payload.push(data);
        self
    }

    fn add_atomic(&mut self, kind: u8, iova: Iova, size_bytes: u32, operands: &[AtomicValue]) -> &mut Self {
        let counted_bytes = payload_bytes(kind, size_bytes) + result_bytes(kind, size_bytes);
        self.add(kind, iova, size_bytes, counted_bytes);
        let payload = self.payload.joined();
        operands.iter().for_each(|operand| operand.put(payload));
        self
    }

    /// The message, and what is needed to read its answer.
    pub fn into_message(self, first_tag: u64) -> (pb::DmaBatch, BatchShape) {
        let size_bytes = match &self.size_bytes {
            Gathered::Empty => Vec::new(),
            Gathered::Equal(size) => vec![*size],
            Gathered::Each(each) => each.clone(),
        };
        let kind = match &self.kind {
            Gathered::Empty | Gathered::Equal(kind::READ) => Bytes::new(),
            Gathered::Equal(kind) => single_kind(*kind),
            Gathered::Each(each) => each.clone().into(),
        };
        let shape = BatchShape {
            first_tag,
            count: self.iova.len(),
            size_bytes: self.size_bytes,
            kind: self.kind,
            returned_bytes: self.returned_bytes,
        };
        let message = pb::DmaBatch {
            first_tag,
            iova: self.iova,
            size_bytes,
            kind,
            payload: self.payload.into_bytes(),
            pasid: self.pasid.map(Pasid::get),
            address_type: 0,
            assignment_generation: self.assignment_generation.map(|generation| generation.0),
        };
        (message, shape)
    }
}

/// A size for the column. One that does not fit is over every limit, which `bytes` (kept whole) shows.
fn clamp(size: usize) -> u32 {
    u32::try_from(size).unwrap_or(u32::MAX)
}

fn single_kind(kind: u8) -> Bytes {
    const KINDS: &[u8; 6] = &[0, 1, 2, 3, 4, 5];
    Bytes::from_static(KINDS).slice(usize::from(kind)..=usize::from(kind))
}
