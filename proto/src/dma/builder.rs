//! A batch to send.

use bytes::{BufMut as _, Bytes, BytesMut};
use iommu_types::errors::InvalidField;
use iommu_types::{Iova, Pasid};

use super::{Atomic, BatchLimits, Results, kind};
use crate::pb;

/// The operation does not fit the batch any more: send it and begin the next one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the batch is full")]
pub struct BatchFull;

/// Gathers operations until the batch is sent.
#[derive(Debug)]
pub struct BatchBuilder {
    limits: BatchLimits,
    bytes_left: u32,
    pasid: Option<Pasid>,
    iovas: Vec<u64>,
    sizes: Vec<u32>,
    kinds: Vec<u8>,
    payload: BytesMut,
}

impl BatchBuilder {
    /// An empty batch. `limits` are those of the session's Welcome.
    pub fn new(limits: BatchLimits, pasid: Option<Pasid>) -> Self {
        Self {
            limits,
            bytes_left: limits.bytes_max,
            pasid,
            iovas: Vec::new(),
            sizes: Vec::new(),
            kinds: Vec::new(),
            payload: BytesMut::new(),
        }
    }
    /// How many operations are gathered.
    pub fn len(&self) -> usize {
        self.iovas.len()
    }
    /// Whether nothing is gathered.
    pub fn is_empty(&self) -> bool {
        self.iovas.is_empty()
    }
    /// How many more bytes may be moved.
    pub fn bytes_left(&self) -> u32 {
        self.bytes_left
    }
    /// Adds a read; of size zero it is a zero-length read.
    pub fn read(&mut self, iova: Iova, size_bytes: u32) -> Result<(), BatchFull> {
        self.add(kind::READ, iova, size_bytes, u64::from(size_bytes))
    }
    /// Adds a write. `posted` says that the device does not wait for it.
    pub fn write(&mut self, iova: Iova, data: &[u8], posted: bool) -> Result<(), BatchFull> {
        let kind = if posted { kind::POSTED_WRITE } else { kind::WRITE };
        let size_bytes = u32::try_from(data.len()).map_err(|_| BatchFull)?;
        self.add(kind, iova, size_bytes, u64::from(size_bytes))?;
        self.payload.put_slice(data);
        Ok(())
    }
    /// Adds an AtomicOp.
    pub fn atomic(&mut self, iova: Iova, atomic: Atomic) -> Result<(), BatchFull> {
        match atomic {
            Atomic::FetchAdd32(operand) => self.operands(kind::FETCH_ADD, iova, &[&operand.to_le_bytes()]),
            Atomic::FetchAdd64(operand) => self.operands(kind::FETCH_ADD, iova, &[&operand.to_le_bytes()]),
            Atomic::Swap32(operand) => self.operands(kind::SWAP, iova, &[&operand.to_le_bytes()]),
            Atomic::Swap64(operand) => self.operands(kind::SWAP, iova, &[&operand.to_le_bytes()]),
            Atomic::Cas32 { compare, new } => {
                self.operands(kind::COMPARE_AND_SWAP, iova, &[&compare.to_le_bytes(), &new.to_le_bytes()])
            }
            Atomic::Cas64 { compare, new } => {
                self.operands(kind::COMPARE_AND_SWAP, iova, &[&compare.to_le_bytes(), &new.to_le_bytes()])
            }
            Atomic::Cas128 { compare, new } => {
                self.operands(kind::COMPARE_AND_SWAP, iova, &[&compare.to_le_bytes(), &new.to_le_bytes()])
            }
        }
    }
    fn operands<const N: usize>(
        &mut self,
        kind: u8,
        iova: Iova,
        operands: &[&[u8; N]],
    ) -> Result<(), BatchFull> {
        let size_bytes = N as u32;
        self.add(kind, iova, size_bytes, u64::from(size_bytes) * (operands.len() as u64 + 1))?;
        for operand in operands {
            self.payload.put_slice(*operand);
        }
        Ok(())
    }
    fn add(&mut self, kind: u8, iova: Iova, size_bytes: u32, moved_bytes: u64) -> Result<(), BatchFull> {
        if self.iovas.len() >= self.limits.operations_max as usize {
            return Err(BatchFull);
        }
        let moved_bytes = u32::try_from(moved_bytes).map_err(|_| BatchFull)?;
        self.bytes_left = self.bytes_left.checked_sub(moved_bytes).ok_or(BatchFull)?;
        self.iovas.push(iova.get());
        self.sizes.push(size_bytes);
        self.kinds.push(kind);
        Ok(())
    }
    /// The batch as a message, and its shape, which the completions are read with. Columns of equal values travel as one.
    pub fn finish(self, first_tag: u64) -> (pb::DmaBatch, BatchShape) {
        let expected = std::iter::zip(&self.kinds, &self.sizes).map(|(kind, size_bytes)| match *kind {
            kind::READ => Expected::Data(*size_bytes),
            kind::WRITE | kind::POSTED_WRITE => Expected::Nothing(*size_bytes),
            _ => Expected::OldValue(*size_bytes),
        });
        let shape = BatchShape { first_tag, expected: expected.collect() };
        let kinds = match shared(&self.kinds) {
            Some(kind::READ) => Bytes::new(),
            Some(kind) => Bytes::copy_from_slice(&[kind]),
            None => self.kinds.into(),
        };
        let batch = pb::DmaBatch {
            first_tag,
            iova: self.iovas,
            size_bytes: shared(&self.sizes).map_or(self.sizes, |size_bytes| vec![size_bytes]),
            kind: kinds,
            payload: self.payload.freeze(),
            pasid: self.pasid.map(Pasid::get),
            address_type: 0,
        };
        (batch, shape)
    }
}

/// The value that all of a column share; `None` when they differ or there is none.
fn shared<T: Copy + PartialEq>(column: &[T]) -> Option<T> {
    let (first, rest) = column.split_first()?;
    rest.iter().all(|value| value == first).then_some(*first)
}

/// What an operation is answered with, and its size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Expected {
    /// Data of a read: all of it, or the bytes done before its fault.
    Data(u32),
    /// The old value of an atomic, unless it failed.
    OldValue(u32),
    /// Nothing.
    Nothing(u32),
}

/// What was asked in a batch: as much as is needed to read its completions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchShape {
    pub(super) first_tag: u64,
    pub(super) expected: Vec<Expected>,
}

impl BatchShape {
    /// Tag of the first operation.
    pub fn first_tag(&self) -> u64 {
        self.first_tag
    }
    /// How many operations were asked.
    pub fn len(&self) -> usize {
        self.expected.len()
    }
    /// Whether none was.
    pub fn is_empty(&self) -> bool {
        self.expected.is_empty()
    }
    /// How each operation ended, in order. Everything is checked before the first result is given out.
    pub fn results(self, completions: pb::DmaCompletions) -> Result<Results, InvalidField> {
        Results::new(self, completions)
    }
}
