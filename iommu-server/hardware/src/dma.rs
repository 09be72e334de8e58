//! DMA operations over a port: page by page, stopping at the first fault, in bounded bursts.

use iommu_types::{
    Access, AddressType, AtomicOperation, DmaFault, FaultReason, Hpa, Iova, PAGE_SIZE_BYTES, Pasid, Refusal,
};

use crate::memory::{NoMemoryAt, PhysicalMemory};
use crate::vtd::interrupt::DeliveredInterrupt;
use crate::vtd::{BURST_BYTES_MAX, BURST_OPERATIONS_MAX, Burst, Port, Request};

// One page fits a burst, so a run can always go on by entering a new one.
const _: () = assert!(PAGE_SIZE_BYTES <= BURST_BYTES_MAX as u64 && BURST_OPERATIONS_MAX > 0);

/// What one operation moves.
#[derive(Debug)]
pub enum Transfer<'a> {
    /// From memory to the device. An empty slice is a zero-length read.
    Read(&'a mut [u8]),
    /// From memory to the device, to the end of a vector: on a fault the bytes done are there. No bytes are a zero-length read.
    Append {
        /// Where to.
        into: &'a mut Vec<u8>,
        /// How many.
        size_bytes: u32,
    },
    /// From the device to memory. Four bytes without PASID to FEEx_xxxx are an interrupt.
    Write(&'a [u8]),
    /// A PCIe AtomicOp.
    Atomic(AtomicOperation),
}

/// How an operation succeeded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Done {
    /// All its bytes have moved.
    Moved,
    /// The atomic found this value.
    Old(u128),
    /// It was an interrupt.
    Interrupt(DeliveredInterrupt),
}

/// A run of operations of one device, in order. The batches of the wire are executed through this.
///
/// It keeps the bounds of a burst by itself: it leaves its epoch and enters a new one every [`BURST_OPERATIONS_MAX`] pages or
/// [`BURST_BYTES_MAX`] bytes, and splits a large operation there. Between operations it stays in its epoch, so that a batch pays
/// for one: drop it at the end of the batch, and never wait for anything while holding it.
pub struct Run<'p> {
    burst: Burst<'p>,
    address_type: AddressType,
    burst_operations: u32,
    burst_bytes: u32,
}

/// A fault before the bytes done are known: a reason as [`DmaFault`] has it.
type Reason = Result<FaultReason, Refusal>;

impl<'p> Run<'p> {
    /// A run over a port. It enters an epoch with its first operation.
    pub fn new(port: &'p mut Port) -> Self {
        let address_type = AddressType::Untranslated;
        Self { burst: port.burst_outside(), address_type, burst_operations: 0, burst_bytes: 0 }
    }
    /// The same run with requests that bear another AT field.
    pub fn with_address_type(mut self, address_type: AddressType) -> Self {
        self.address_type = address_type;
        self
    }

    /// Executes one operation. It stops at its first fault, which says how many bytes are done and where it ended.
    ///
    /// An address and size that wrap, a write of nothing and a misaligned atomic are [`Refusal::Malformed`]; a translated
    /// address without memory behind it is [`Refusal::NoMemory`].
    pub fn execute(
        &mut self,
        iova: Iova,
        pasid: Option<Pasid>,
        transfer: Transfer<'_>,
    ) -> Result<Done, DmaFault> {
        match transfer {
            Transfer::Read(into) => {
                let size_bytes = into.len();
                let mut rest = into;
                self.read(iova, pasid, size_bytes, |memory, hpa, piece_bytes| {
                    let (part, after) = std::mem::take(&mut rest).split_at_mut(piece_bytes as usize);
                    rest = after;
                    memory.read(hpa, part)
                })
            }
            Transfer::Append { into, size_bytes } => {
                self.read(iova, pasid, size_bytes as usize, |memory, hpa, piece_bytes| {
                    memory.append(hpa, piece_bytes, into)
                })
            }
            Transfer::Write(from) => self.write(iova, pasid, from),
            Transfer::Atomic(operation) => self.atomic(iova, pasid, operation),
        }
    }

    #[inline]
    fn read(
        &mut self,
        iova: Iova,
        pasid: Option<Pasid>,
        size_bytes: usize,
        mut piece_from: impl FnMut(&PhysicalMemory, Hpa, u32) -> Result<(), NoMemoryAt>,
    ) -> Result<Done, DmaFault> {
        let pieces = Pieces::of(iova, size_bytes)?;
        let address_type = self.address_type;
        if size_bytes == 0 {
            let nothing = Request { iova, size_bytes: 0, access: Access::Read, pasid, address_type };
            return self.reach(nothing, |_, _| Ok(())).map(|()| Done::Moved).map_err(at_start(iova));
        }
        for piece in pieces {
            let request = piece.request(Access::Read, pasid, address_type);
            self.reach(request, |memory, hpa| piece_from(memory, hpa, piece.size_bytes))
                .map_err(|reason| piece.fault(reason))?;
        }
        Ok(Done::Moved)
    }

    fn write(&mut self, iova: Iova, pasid: Option<Pasid>, from: &[u8]) -> Result<Done, DmaFault> {
        let pieces = Pieces::of(iova, from.len())?;
        if from.is_empty() {
            return Err(at_start(iova)(Err(Refusal::Malformed)));
        }
        if let Ok(word) = <[u8; 4]>::try_from(from)
            && (Request {
                iova,
                size_bytes: 4,
                access: Access::Write,
                pasid,
                address_type: self.address_type,
            })
            .is_interrupt()
        {
            // An interrupt counts like any other operation: a run of them must not hold an epoch for ever.
            self.make_room(4);
            let delivered = self.burst.interrupt(iova.get(), u32::from_le_bytes(word));
            return delivered.map(Done::Interrupt).map_err(|fault| at_start(iova)(Ok(fault.reason)));
        }
        let mut rest = from;
        for piece in pieces {
            let (part, after) = rest.split_at(piece.size_bytes as usize);
            rest = after;
            self.reach(piece.request(Access::Write, pasid, self.address_type), |memory, hpa| {
                memory.write(hpa, part)
            })
            .map_err(|reason| piece.fault(reason))?;
        }
        Ok(Done::Moved)
    }

    fn atomic(
        &mut self,
        iova: Iova,
        pasid: Option<Pasid>,
        operation: AtomicOperation,
    ) -> Result<Done, DmaFault> {
        let size_bytes = operation.size_bytes();
        if !iova.is_aligned(u64::from(size_bytes)) {
            return Err(at_start(iova)(Err(Refusal::Malformed)));
        }
        let request =
            Request { iova, size_bytes, access: Access::Atomic, pasid, address_type: self.address_type };
        // A slot of a ring begins at any byte, and memory knows aligned atomics only.
        let old = self.reach(request, |memory, hpa| match hpa.is_aligned(u64::from(size_bytes)) {
            true => memory.atomic(hpa, operation).map(Some),
            false => Ok(None),
        });
        match old.map_err(at_start(iova))? {
            Some(old) => Ok(Done::Old(old)),
            None => Err(at_start(iova)(Err(Refusal::Malformed))),
        }
    }

    /// Translates one request and lets `op` reach the memory behind it, inside the epoch.
    #[inline]
    fn reach<R>(
        &mut self,
        request: Request,
        op: impl FnOnce(&PhysicalMemory, Hpa) -> Result<R, NoMemoryAt>,
    ) -> Result<R, Reason> {
        self.make_room(request.size_bytes);
        match self.burst.reach(request, op) {
            Ok(Ok(done)) => Ok(done),
            Ok(Err(NoMemoryAt { .. })) => Err(Err(Refusal::NoMemory)),
            Err(fault) => Err(Ok(fault.reason)),
        }
    }

    /// Leaves the epoch when the next piece would be over its bounds.
    #[inline]
    fn make_room(&mut self, size_bytes: u32) {
        if self.burst_operations == BURST_OPERATIONS_MAX || self.burst_bytes + size_bytes > BURST_BYTES_MAX {
            self.burst.leave();
            self.burst_operations = 0;
            self.burst_bytes = 0;
        }
        self.burst_operations += 1;
        self.burst_bytes += size_bytes;
    }
}

/// The fault of an operation of which nothing is done.
fn at_start(iova: Iova) -> impl FnOnce(Reason) -> DmaFault {
    move |reason| DmaFault { done_bytes: 0, iova, reason }
}

/// A part of an operation that lies in one 4 KiB page.
#[derive(Clone, Copy)]
struct Piece {
    iova: Iova,
    size_bytes: u32,
    done_bytes: u32,
}

impl Piece {
    fn request(self, access: Access, pasid: Option<Pasid>, address_type: AddressType) -> Request {
        Request { iova: self.iova, size_bytes: self.size_bytes, access, pasid, address_type }
    }
    fn fault(self, reason: Reason) -> DmaFault {
        DmaFault { done_bytes: self.done_bytes, iova: self.iova, reason }
    }
}

/// An operation cut at 4 KiB pages.
struct Pieces {
    base: u64,
    size_bytes: u32,
    done_bytes: u32,
}

impl Pieces {
    /// Fails on an address and size that wrap, or on a size that no operation has.
    fn of(iova: Iova, size_bytes: usize) -> Result<Self, DmaFault> {
        let malformed = DmaFault { done_bytes: 0, iova, reason: Err(Refusal::Malformed) };
        let size_bytes = u32::try_from(size_bytes).map_err(|_| malformed)?;
        let last_offset = u64::from(size_bytes).saturating_sub(1);
        iova.checked_add(last_offset).ok_or(malformed)?;
        Ok(Self { base: iova.get(), size_bytes, done_bytes: 0 })
    }
}

impl Iterator for Pieces {
    type Item = Piece;
    fn next(&mut self) -> Option<Piece> {
        let left_bytes = self.size_bytes - self.done_bytes;
        if left_bytes == 0 {
            return None;
        }
        let iova = Iova::new(self.base + u64::from(self.done_bytes));
        let room_bytes = (PAGE_SIZE_BYTES - iova.page_offset()) as u32;
        let piece = Piece { iova, size_bytes: left_bytes.min(room_bytes), done_bytes: self.done_bytes };
        self.done_bytes += piece.size_bytes;
        Some(piece)
    }
}
