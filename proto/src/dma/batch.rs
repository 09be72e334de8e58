//! A received batch: checked once, then read in place.

use iommu_types::errors::{InvalidField, LimitReached};
use iommu_types::{AddressType, Iova, Pasid};

use super::{BatchLimits, kind};
use crate::pb;

/// Why a batch is not carried out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BatchError {
    /// Its columns do not add up: the peer broke the rules of the stream.
    #[error(transparent)]
    Columns(InvalidField),
    /// It has more operations than the session allows: the peer broke the rules of the stream, and an answer might be too large.
    #[error(transparent)]
    Operations(LimitReached),
    /// It moves more bytes than the session allows. It can be answered with [`refuse_whole`](super::refuse_whole).
    #[error(transparent)]
    Bytes(LimitReached),
}

/// An AtomicOp of PCIe with its operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Atomic {
    /// Adds to 4 bytes.
    FetchAdd32(u32),
    /// Adds to 8 bytes.
    FetchAdd64(u64),
    /// Replaces 4 bytes.
    Swap32(u32),
    /// Replaces 8 bytes.
    Swap64(u64),
    /// Replaces 4 bytes that equal `compare`.
    Cas32 {
        /// Value expected.
        compare: u32,
        /// Value to store.
        new: u32,
    },
    /// Replaces 8 bytes that equal `compare`.
    Cas64 {
        /// Value expected.
        compare: u64,
        /// Value to store.
        new: u64,
    },
    /// Replaces 16 bytes that equal `compare`.
    Cas128 {
        /// Value expected.
        compare: u128,
        /// Value to store.
        new: u128,
    },
}

/// What one operation asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action<'a> {
    /// A read; of size zero it is a zero-length read.
    Read,
    /// A write of at least one byte.
    Write {
        /// The bytes.
        data: &'a [u8],
        /// Whether the device does not wait for it. It is answered the same.
        posted: bool,
    },
    /// An AtomicOp. Its alignment is not checked here.
    Atomic(Atomic),
    /// Nonsense: an unknown kind, a write of nothing, an atomic of an odd size. To be answered with
    /// [`Refusal::Malformed`](iommu_types::Refusal::Malformed).
    Malformed,
}

/// One operation of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operation<'a> {
    /// Place in the batch.
    pub index: u32,
    /// Address.
    pub iova: Iova,
    /// Size in bytes: of the data, or of the operand.
    pub size_bytes: u32,
    /// What is asked.
    pub action: Action<'a>,
}

impl Operation<'_> {
    /// Bytes that the completion carries when the operation succeeds.
    pub const fn result_bytes(&self) -> u32 {
        match self.action {
            Action::Read | Action::Atomic(_) => self.size_bytes,
            Action::Write { .. } | Action::Malformed => 0,
        }
    }
}

/// A column with a value for each operation, or with one for all.
#[derive(Clone, Copy, Debug)]
struct Column<'a, T> {
    values: &'a [T],
    /// All ones when each operation has its own value, 0 when all share the first.
    index_mask: usize,
}

impl<'a, T: Copy> Column<'a, T> {
    fn new(values: &'a [T], operations: usize, field: &'static str) -> Result<Self, InvalidField> {
        let index_mask = match values.len() {
            length if length == operations => usize::MAX,
            1 => 0,
            length => {
                let why =
                    format!("has {length} elements; needs one for each of {operations} addresses, or one");
                return Err(InvalidField { field: field.to_owned(), why });
            }
        };
        Ok(Self { values, index_mask })
    }
    fn get(&self, index: usize) -> Option<T> {
        self.values.get(index & self.index_mask).copied()
    }
}

/// Bytes that an operation takes from the payload of its batch.
const fn payload_bytes(kind: u8, size_bytes: u32) -> u64 {
    match kind {
        kind::WRITE | kind::POSTED_WRITE | kind::FETCH_ADD | kind::SWAP => size_bytes as u64,
        kind::COMPARE_AND_SWAP => 2 * size_bytes as u64,
        _ => 0,
    }
}

/// Bytes that an operation adds to the completions of its batch.
const fn result_bytes(kind: u8, size_bytes: u32) -> u64 {
    match kind {
        kind::READ | kind::FETCH_ADD | kind::SWAP | kind::COMPARE_AND_SWAP => size_bytes as u64,
        _ => 0,
    }
}

/// A batch whose columns add up.
#[derive(Clone, Copy, Debug)]
pub struct BatchView<'a> {
    first_tag: u64,
    iovas: &'a [u64],
    sizes: Column<'a, u32>,
    kinds: Column<'a, u8>,
    payload: &'a [u8],
    pasid: Option<Pasid>,
    address_type: AddressType,
    result_bytes: u32,
}

impl<'a> BatchView<'a> {
    /// Checks the columns of `batch` against each other and against `limits`. Allocates only to report an error.
    pub fn parse(batch: &'a pb::DmaBatch, limits: BatchLimits) -> Result<Self, BatchError> {
        let operations = batch.iova.len();
        if operations > limits.operations_max as usize {
            return Err(BatchError::Operations(LimitReached {
                limit: "batch_operations_max".to_owned(),
                allowed: u64::from(limits.operations_max),
            }));
        }
        let columns = |field: &str, why: String| {
            BatchError::Columns(InvalidField { field: format!("dma.{field}"), why })
        };
        if batch.first_tag.checked_add(operations as u64).is_none() {
            return Err(columns("first_tag", format!("{operations} tags from {} wrap", batch.first_tag)));
        }
        let pasid = match batch.pasid {
            None => None,
            Some(raw) => Some(
                Pasid::new(raw).ok_or_else(|| columns("pasid", format!("{raw} needs more than 20 bits")))?,
            ),
        };
        let address_type = u8::try_from(batch.address_type).ok().and_then(AddressType::from_bits);
        let address_type = address_type
            .ok_or_else(|| columns("address_type", format!("{} is not 0, 1 or 2", batch.address_type)))?;
        let sizes =
            Column::new(&batch.size_bytes, operations, "dma.size_bytes").map_err(BatchError::Columns)?;
        let kinds = if batch.kind.is_empty() { &[kind::READ] } else { &*batch.kind };
        let kinds = Column::new(kinds, operations, "dma.kind").map_err(BatchError::Columns)?;

        let (mut taken_bytes, mut result_bytes_sum) = (0_u64, 0_u64);
        for index in 0..operations {
            let (Some(size_bytes), Some(kind)) = (sizes.get(index), kinds.get(index)) else { break };
            // A message holds fewer than 2^30 operations of fewer than 2^33 bytes each: the sums fit.
            taken_bytes += payload_bytes(kind, size_bytes);
            result_bytes_sum += result_bytes(kind, size_bytes);
        }
        if taken_bytes != batch.payload.len() as u64 {
            let why = format!("has {} bytes; the operations take {taken_bytes}", batch.payload.len());
            return Err(columns("payload", why));
        }
        let over = || {
            let allowed = u64::from(limits.bytes_max);
            BatchError::Bytes(LimitReached { limit: "batch_bytes_max".to_owned(), allowed })
        };
        if taken_bytes + result_bytes_sum > u64::from(limits.bytes_max) {
            return Err(over());
        }
        let result_bytes = u32::try_from(result_bytes_sum).map_err(|_| over())?;
        let (first_tag, payload) = (batch.first_tag, &*batch.payload);
        Ok(Self { first_tag, iovas: &batch.iova, sizes, kinds, payload, pasid, address_type, result_bytes })
    }
    /// Tag of operation 0.
    pub const fn first_tag(&self) -> u64 {
        self.first_tag
    }
    /// PASID of every operation.
    pub const fn pasid(&self) -> Option<Pasid> {
        self.pasid
    }
    /// AT field of every operation.
    pub const fn address_type(&self) -> AddressType {
        self.address_type
    }
    /// How many operations there are; may be none.
    pub const fn len(&self) -> usize {
        self.iovas.len()
    }
    /// Whether there is no operation.
    pub const fn is_empty(&self) -> bool {
        self.iovas.is_empty()
    }
    /// Bytes of data and operands that the batch brought.
    pub const fn payload_bytes(&self) -> usize {
        self.payload.len()
    }
    /// Most bytes that the completions can carry: what they carry when everything succeeds.
    pub const fn result_bytes(&self) -> u32 {
        self.result_bytes
    }
    /// The operations, in order.
    pub const fn operations(&self) -> Operations<'a> {
        Operations { view: *self, index: 0, payload: self.payload }
    }
}

/// The operations of a batch, in order.
#[derive(Clone, Debug)]
pub struct Operations<'a> {
    view: BatchView<'a>,
    index: usize,
    payload: &'a [u8],
}

impl<'a> Iterator for Operations<'a> {
    type Item = Operation<'a>;

    #[inline]
    fn next(&mut self) -> Option<Operation<'a>> {
        let iova = Iova::new(*self.view.iovas.get(self.index)?);
        let (size_bytes, kind) = (self.view.sizes.get(self.index)?, self.view.kinds.get(self.index)?);
        let (taken, rest) = self
            .payload
            .split_at_checked(payload_bytes(kind, size_bytes) as usize)
            .expect("the payload was found to hold what the operations take");
        self.payload = rest;
        let index = self.index as u32;
        self.index += 1;
        Some(Operation { index, iova, size_bytes, action: action(kind, taken) })
    }
    fn size_hint(&self) -> (usize, Option<usize>) {
        let left = self.view.iovas.len() - self.index;
        (left, Some(left))
    }
}

impl ExactSizeIterator for Operations<'_> {}

#[inline]
fn action(kind: u8, taken: &[u8]) -> Action<'_> {
    match kind {
        kind::READ => Action::Read,
        kind::WRITE | kind::POSTED_WRITE if !taken.is_empty() => {
            Action::Write { data: taken, posted: kind == kind::POSTED_WRITE }
        }
        kind::FETCH_ADD | kind::SWAP | kind::COMPARE_AND_SWAP => {
            atomic(kind, taken).map_or(Action::Malformed, Action::Atomic)
        }
        _ => Action::Malformed,
    }
}

/// The AtomicOp with these operands, or `None` when PCIe has none of that size.
fn atomic(kind: u8, operands: &[u8]) -> Option<Atomic> {
    if kind == kind::COMPARE_AND_SWAP {
        let (compare, new) = operands.split_at(operands.len() / 2);
        return Some(match compare.len() {
            4 => Atomic::Cas32 { compare: word(compare)?, new: word(new)? },
            8 => Atomic::Cas64 { compare: double_word(compare)?, new: double_word(new)? },
            16 => Atomic::Cas128 {
                compare: u128::from_le_bytes(compare.try_into().ok()?),
                new: u128::from_le_bytes(new.try_into().ok()?),
            },
            _ => return None,
        });
    }
    match (kind, operands.len()) {
        (kind::FETCH_ADD, 4) => Some(Atomic::FetchAdd32(word(operands)?)),
        (kind::FETCH_ADD, 8) => Some(Atomic::FetchAdd64(double_word(operands)?)),
        (kind::SWAP, 4) => Some(Atomic::Swap32(word(operands)?)),
        (kind::SWAP, 8) => Some(Atomic::Swap64(double_word(operands)?)),
        _ => None,
    }
}

fn word(bytes: &[u8]) -> Option<u32> {
    bytes.try_into().ok().map(u32::from_le_bytes)
}

fn double_word(bytes: &[u8]) -> Option<u64> {
    bytes.try_into().ok().map(u64::from_le_bytes)
}
