//! Access to physical memory: bytes in bulk, and atomics on table entries.
//!
//! **Architecture invariant:** an access is all or nothing. One that touches a single byte that is not RAM, or that would
//! cross the hole, moves nothing and is a [`NoMemoryAt`].
//!
//! Bulk access copies as the machine's `memcpy` does and promises no order between bytes. [`PhysicalMemory::read_units`] and
//! [`PhysicalMemory::write_units`] move every aligned 8-byte unit in one piece and in ascending order, which is what a
//! processor would do that shares a ring with a device. Atomics must be naturally aligned; that is for the caller to check,
//! and a misaligned one is our own bug. Values are little endian, as x86 and PCI have them.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use iommu_types::{AtomicOperation, Hpa, HpaRange, PAGE_SIZE_BYTES};
use vm_memory::{AtomicInteger, VolatileMemory, WriteVolatile};

use super::PhysicalMemory;

const _: () =
    assert!(cfg!(target_endian = "little"), "table entries are stored as the machine stores integers");

const UNIT_BYTES: usize = size_of::<u64>();

/// An access that is not wholly inside RAM. Nothing was read or written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no memory at {at} for {size_bytes} bytes")]
pub struct NoMemoryAt {
    /// First address of the access.
    pub at: Hpa,
    /// Bytes of the access.
    pub size_bytes: u64,
}

// === Bytes in bulk ===

impl PhysicalMemory {
    /// Copies memory at `at` into the whole of `into`.
    #[inline]
    pub fn read(&self, at: Hpa, into: &mut [u8]) -> Result<(), NoMemoryAt> {
        self.slice(at, into.len())?.copy_to(into);
        Ok(())
    }

    /// Copies `size_bytes` bytes of memory at `at` to the end of `into`, which need not be written before. With room for them in
    /// `into`, nothing is allocated.
    #[inline]
    pub fn append(&self, at: Hpa, size_bytes: u32, into: &mut Vec<u8>) -> Result<(), NoMemoryAt> {
        let from = self.slice(at, size_bytes as usize)?;
        let written = into.write_volatile(&from);
        assert!(written.is_ok_and(|bytes| bytes == from.len()), "a vector takes everything at once");
        Ok(())
    }

    /// Copies the whole of `from` to memory at `at`.
    #[inline]
    pub fn write(&self, at: Hpa, from: &[u8]) -> Result<(), NoMemoryAt> {
        self.slice(at, from.len())?.copy_from(from);
        Ok(())
    }

    /// Copies bytes from one place to another.
    pub fn copy(&self, from: Hpa, to: Hpa, size_bytes: usize) -> Result<(), NoMemoryAt> {
        let (from, to) = (self.slice(from, size_bytes)?, self.slice(to, size_bytes)?);
        from.copy_to_volatile_slice(to);
        Ok(())
    }

    /// As [`read`](Self::read), but every aligned 8-byte unit inside moves in one atomic access (the CPU's view).
    pub fn read_units(&self, at: Hpa, into: &mut [u8]) -> Result<(), NoMemoryAt> {
        let (mapping, mut offset) = self.place(at, into.len())?;
        let (head, rest) = into.split_at_mut(bytes_before_unit(at, into.len()));
        self.read(at, head)?;
        offset += head.len();
        let (units, tail) = rest.as_chunks_mut::<UNIT_BYTES>();
        for unit in units {
            *unit = atomic_at::<AtomicU64>(mapping, offset).load(Ordering::Acquire).to_le_bytes();
            offset += UNIT_BYTES;
        }
        copy_in(mapping, offset, tail.len()).copy_to(tail);
        Ok(())
    }

    /// As [`write`](Self::write), but every aligned 8-byte unit inside moves in one atomic access (the CPU's view).
    pub fn write_units(&self, at: Hpa, from: &[u8]) -> Result<(), NoMemoryAt> {
        let (mapping, mut offset) = self.place(at, from.len())?;
        let (head, rest) = from.split_at(bytes_before_unit(at, from.len()));
        self.write(at, head)?;
        offset += head.len();
        let (units, tail) = rest.as_chunks::<UNIT_BYTES>();
        for unit in units {
            atomic_at::<AtomicU64>(mapping, offset).store(u64::from_le_bytes(*unit), Ordering::Release);
            offset += UNIT_BYTES;
        }
        copy_in(mapping, offset, tail.len()).copy_from(tail);
        Ok(())
    }

    /// Writes zeros over `range`.
    pub fn zero(&self, range: HpaRange) -> Result<(), NoMemoryAt> {
        const ZEROS: [u8; PAGE_SIZE_BYTES as usize] = [0; PAGE_SIZE_BYTES as usize];
        let refused = NoMemoryAt { at: range.base(), size_bytes: range.size_bytes() };
        let size_bytes = usize::try_from(range.size_bytes()).map_err(|_| refused)?;
        let (mapping, start) = self.place(range.base(), size_bytes)?;
        for done in (0..size_bytes).step_by(ZEROS.len()) {
            let step_bytes = ZEROS.len().min(size_bytes - done);
            copy_in(mapping, start + done, step_bytes).copy_from(&ZEROS);
        }
        Ok(())
    }
}

// === Table entries and PCIe AtomicOps ===

impl PhysicalMemory {
    /// Reads 8 aligned bytes (Acquire): the step of a page walk.
    #[inline]
    pub fn load_u64(&self, at: Hpa) -> Result<u64, NoMemoryAt> {
        Ok(self.atomic_ref::<AtomicU64>(at)?.load(Ordering::Acquire))
    }

    /// Writes 8 aligned bytes (Release).
    #[inline]
    pub fn store_u64(&self, at: Hpa, value: u64) -> Result<(), NoMemoryAt> {
        self.atomic_ref::<AtomicU64>(at)?.store(value, Ordering::Release);
        Ok(())
    }

    /// Replaces `current` by `new` in 8 aligned bytes (AcqRel). Inside, `Ok` holds the old value when it was `current`, `Err` the
    /// one that stood there instead and still does.
    #[inline]
    pub fn compare_exchange_u64(
        &self,
        at: Hpa,
        current: u64,
        new: u64,
    ) -> Result<Result<u64, u64>, NoMemoryAt> {
        let word = self.atomic_ref::<AtomicU64>(at)?;
        Ok(word.compare_exchange(current, new, Ordering::AcqRel, Ordering::Acquire))
    }

    /// Reads 16 aligned bytes in one piece (Acquire).
    #[inline]
    pub fn load_u128(&self, at: Hpa) -> Result<u128, NoMemoryAt> {
        Ok(aligned(mapped_atomics::load(&self.wide_entry(at)?, 0)))
    }

    /// Writes 16 aligned bytes in one piece (Release).
    #[inline]
    pub fn store_u128(&self, at: Hpa, value: u128) -> Result<(), NoMemoryAt> {
        aligned(mapped_atomics::store(&self.wide_entry(at)?, 0, value));
        Ok(())
    }

    /// Writes 4 aligned bytes (Release): the status of a wait descriptor.
    #[inline]
    pub fn store_u32(&self, at: Hpa, value: u32) -> Result<(), NoMemoryAt> {
        self.atomic_ref::<AtomicU32>(at)?.store(value, Ordering::Release);
        Ok(())
    }

    /// A PCIe AtomicOp on naturally aligned bytes (AcqRel). Returns the old value.
    pub fn atomic(&self, at: Hpa, operation: AtomicOperation) -> Result<u128, NoMemoryAt> {
        use AtomicOperation as Op;
        const ORDER: Ordering = Ordering::AcqRel;
        const SEEN: Ordering = Ordering::Acquire;
        let narrow = || self.atomic_ref::<AtomicU32>(at);
        let word = || self.atomic_ref::<AtomicU64>(at);
        Ok(match operation {
            Op::FetchAdd32(operand) => narrow()?.fetch_add(operand, ORDER).into(),
            Op::FetchAdd64(operand) => word()?.fetch_add(operand, ORDER).into(),
            Op::Swap32(new) => narrow()?.swap(new, ORDER).into(),
            Op::Swap64(new) => word()?.swap(new, ORDER).into(),
            Op::Cas32 { compare, new } => old(narrow()?.compare_exchange(compare, new, ORDER, SEEN)).into(),
            Op::Cas64 { compare, new } => old(word()?.compare_exchange(compare, new, ORDER, SEEN)).into(),
            Op::Cas128 { compare, new } => {
                old(aligned(mapped_atomics::compare_exchange(&self.wide_entry(at)?, 0, compare, new)))
            }
        })
    }

    #[inline]
    fn atomic_ref<T: AtomicInteger>(&self, at: Hpa) -> Result<&T, NoMemoryAt> {
        assert!(
            at.is_aligned(size_of::<T>() as u64),
            "the caller checks that atomics are naturally aligned: {at}"
        );
        let (mapping, offset) = self.place(at, size_of::<T>())?;
        Ok(atomic_at(mapping, offset))
    }

    #[inline]
    fn wide_entry(&self, at: Hpa) -> Result<vm_memory::VolatileSlice<'_>, NoMemoryAt> {
        assert!(at.is_aligned(16), "the caller checks that atomics are naturally aligned: {at}");
        self.slice(at, mapped_atomics::WIDTH_BYTES)
    }
}

/// How many of `size_bytes` bytes at `at` come before the first aligned unit.
fn bytes_before_unit(at: Hpa, size_bytes: usize) -> usize {
    let unit_offset = (at.get() % UNIT_BYTES as u64) as usize;
    size_bytes.min((UNIT_BYTES - unit_offset) % UNIT_BYTES)
}

/// An atomic at a place that was checked.
#[inline]
fn atomic_at<T: AtomicInteger>(mapping: &impl VolatileMemory, offset: usize) -> &T {
    mapping.get_atomic_ref(offset).expect("the place was checked, and mappings start at a page")
}

/// Bytes at a place that was checked.
#[inline]
fn copy_in(
    mapping: &vm_memory::mmap::MmapRegion,
    offset: usize,
    size_bytes: usize,
) -> vm_memory::VolatileSlice<'_> {
    mapping.get_slice(offset, size_bytes).expect("the place was checked")
}

#[inline]
fn aligned<T>(result: Result<T, mapped_atomics::InvalidPlace>) -> T {
    result.expect("the place was checked, and mappings start at a page")
}

/// The value that a compare-and-swap found.
fn old<T>(found: Result<T, T>) -> T {
    found.unwrap_or_else(|other| other)
}
