//! Sixteen-byte atomics on mapped memory.
//!
//! VT-d's root entries, context entries, interrupt entries and invalidation descriptors are 16 bytes, and a PCIe
//! compare-and-swap may be. vm-memory gives atomic references of up to 8 bytes, so this crate adds the one width that is
//! missing. It is the only crate of the workspace with `unsafe` (ADR 0001), and it is kept this small so that the
//! argument can be read in a minute.
//!
//! What it promises:
//! - No call from safe code is undefined behaviour: bounds and alignment are checked here, in every call, and a violation
//!   is an [`InvalidPlace`].
//! - Where [`is_lock_free`] holds, each operation is one indivisible access to the sixteen bytes, also against 4- and
//!   8-byte atomic accesses to a part of them. Where it does not, the operations exclude only each other; a user that
//!   mixes widths must ask first and refuse.
//! - Loads are Acquire, stores Release, compare-and-swap AcqRel.

use std::sync::atomic::Ordering;

use portable_atomic::AtomicU128;
use vm_memory::VolatileSlice;

/// Bytes that every operation of this crate touches, and the alignment it needs.
pub const WIDTH_BYTES: usize = 16;

const _: () = assert!(size_of::<AtomicU128>() == WIDTH_BYTES && align_of::<AtomicU128>() == WIDTH_BYTES);

/// Why sixteen bytes of a mapping cannot be accessed as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidPlace {
    /// The sixteen bytes are not all inside the memory.
    #[error("16 bytes at offset {offset:#x} are not inside {size_bytes:#x} bytes of memory")]
    OutOfBounds {
        /// Offset asked for, in bytes.
        offset: usize,
        /// Bytes of the memory.
        size_bytes: usize,
    },
    /// The place is not a multiple of 16 in the address space of this process.
    #[error("offset {offset:#x} is not 16-byte aligned in memory")]
    Misaligned {
        /// Offset asked for, in bytes.
        offset: usize,
    },
}

/// Whether this processor has sixteen-byte atomics (every x86-64 with `cmpxchg16b`, every AArch64).
pub fn is_lock_free() -> bool {
    AtomicU128::is_lock_free()
}

/// Reads the sixteen bytes at `offset` of `memory`, in this machine's byte order.
pub fn load(memory: &VolatileSlice<'_>, offset: usize) -> Result<u128, InvalidPlace> {
    with_cell(memory, offset, |cell| cell.load(Ordering::Acquire))
}

/// Writes the sixteen bytes at `offset` of `memory`.
pub fn store(memory: &VolatileSlice<'_>, offset: usize, value: u128) -> Result<(), InvalidPlace> {
    with_cell(memory, offset, |cell| cell.store(value, Ordering::Release))
}

/// Replaces `current` by `new` at `offset` of `memory`. Inside, `Ok` holds the old value when it was `current`, `Err` the
/// one that stood there instead and still does.
pub fn compare_exchange(
    memory: &VolatileSlice<'_>,
    offset: usize,
    current: u128,
    new: u128,
) -> Result<Result<u128, u128>, InvalidPlace> {
    with_cell(memory, offset, |cell| cell.compare_exchange(current, new, Ordering::AcqRel, Ordering::Acquire))
}

/// Lends the sixteen bytes at `offset` to `operate` as an atomic. The only unsafe code of the workspace.
#[inline]
fn with_cell<R>(
    memory: &VolatileSlice<'_>,
    offset: usize,
    operate: impl FnOnce(&AtomicU128) -> R,
) -> Result<R, InvalidPlace> {
    let place = memory
        .subslice(offset, WIDTH_BYTES)
        .map_err(|_| InvalidPlace::OutOfBounds { offset, size_bytes: memory.len() })?;
    // The guard keeps the bytes mapped; it lives until the operation is over.
    let guard = place.ptr_guard_mut();
    let pointer = guard.as_ptr().cast::<u128>();
    if !pointer.cast::<AtomicU128>().is_aligned() {
        return Err(InvalidPlace::Misaligned { offset });
    }
    // SAFETY: `AtomicU128::from_ptr` asks for four things.
    // 1. Alignment: checked just above, for the alignment of `AtomicU128` (the constant assertion fixes it at 16).
    // 2. Validity for reads and writes during the lifetime of the reference: whoever made the `VolatileSlice` vouched that
    //    all its bytes are valid for both as long as it lives; `subslice` returned exactly these 16 of them; and the
    //    reference cannot leave `operate`, whose argument has a lifetime of its own, during which `memory` and `guard` are
    //    borrowed and alive.
    // 3. No reference that claims the bytes exclusively or as constant: mapped memory is reached through vm-memory only,
    //    which makes raw volatile copies and atomic references of it; an `AtomicU128` is an `UnsafeCell`.
    // 4. No conflicting non-atomic or differently sized access at the same time. Devices, drivers and table walks do race on
    //    these bytes, as on a real machine: that is what the memory is for. The racing accesses are vm-memory's raw
    //    copies and 4- and 8-byte atomics; on the architectures where `is_lock_free` holds, a 16-byte access is
    //    inline assembly of one instruction, which the compiler cannot see through or split, and the processor keeps it
    //    coherent with accesses of other widths. A race then decides which bytes are seen, every bit pattern of which is
    //    a valid `u128`, and nothing else. ADR 0001 says what rests on this.
    let cell = unsafe { AtomicU128::from_ptr(pointer) };
    Ok(operate(cell))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{VolatileMemory, mmap::MmapRegion};

    const SIZE_BYTES: usize = 4096;

    fn mapping() -> MmapRegion {
        MmapRegion::new(SIZE_BYTES).expect("a page can be mapped")
    }

    fn check_refused(offset: usize, expected: InvalidPlace) {
        let mapping = mapping();
        let memory = mapping.as_volatile_slice();
        assert_eq!(load(&memory, offset), Err(expected), "load at {offset:#x}");
        assert_eq!(store(&memory, offset, 1), Err(expected), "store at {offset:#x}");
        assert_eq!(compare_exchange(&memory, offset, 0, 1), Err(expected), "swap at {offset:#x}");
    }

    #[test]
    fn a_place_outside_or_across_the_end_is_refused() {
        for offset in
            [SIZE_BYTES - 15, SIZE_BYTES - 8, SIZE_BYTES, SIZE_BYTES + 16, usize::MAX, usize::MAX - 15]
        {
            check_refused(offset, InvalidPlace::OutOfBounds { offset, size_bytes: SIZE_BYTES });
        }
    }

    #[test]
    fn a_misaligned_place_is_refused() {
        for offset in [1, 4, 8, 15, 24, SIZE_BYTES - 24] {
            check_refused(offset, InvalidPlace::Misaligned { offset });
        }
    }

    #[test]
    fn alignment_is_that_of_the_place_and_not_of_the_offset() {
        let mapping = mapping();
        let memory = mapping.get_slice(8, 64).expect("inside");
        assert_eq!(load(&memory, 0), Err(InvalidPlace::Misaligned { offset: 0 }));
        assert_eq!(load(&memory, 8), Ok(0));
    }

    #[test]
    fn operations_touch_exactly_their_sixteen_bytes() {
        let mapping = mapping();
        let memory = mapping.as_volatile_slice();
        let value = u128::from_le_bytes(std::array::from_fn(|i| i as u8 + 1));
        store(&memory, 16, value).expect("inside");
        let mut bytes = [0; 48];
        memory.copy_to(&mut bytes);
        assert_eq!(bytes[..16], [0; 16]);
        assert_eq!(bytes[16..32], value.to_ne_bytes());
        assert_eq!(bytes[32..], [0; 16]);

        assert_eq!(compare_exchange(&memory, 16, 7, 9), Ok(Err(value)));
        assert_eq!(compare_exchange(&memory, 16, value, 9), Ok(Ok(value)));
        assert_eq!(load(&memory, 16), Ok(9));
        store(&memory, SIZE_BYTES - WIDTH_BYTES, 3).expect("the last sixteen bytes");
    }

    #[test]
    fn two_threads_never_see_half_of_a_write() {
        assert!(is_lock_free(), "the machines we support have sixteen-byte atomics");
        let mapping = mapping();
        let both_halves = |n: u64| u128::from(n) << 64 | u128::from(n);
        std::thread::scope(|threads| {
            for writer in 0..2_u64 {
                let mapping = &mapping;
                threads.spawn(move || {
                    let memory = mapping.as_volatile_slice();
                    for n in 0..20_000 {
                        store(&memory, 0, both_halves(n * 2 + writer)).expect("inside");
                        let seen = load(&memory, 0).expect("inside");
                        assert_eq!((seen >> 64) as u64, seen as u64, "a torn read");
                    }
                });
            }
        });
    }

    #[test]
    fn two_threads_counting_by_compare_and_swap_lose_no_step() {
        const STEPS: u128 = 10_000;
        let mapping = mapping();
        // The count starts just below the carry into the upper half, so that both halves move.
        let start = u128::from(u64::MAX) - STEPS;
        store(&mapping.as_volatile_slice(), 0, start).expect("inside");
        std::thread::scope(|threads| {
            for _ in 0..2 {
                threads.spawn(|| {
                    let memory = mapping.as_volatile_slice();
                    for _ in 0..STEPS {
                        let mut seen = load(&memory, 0).expect("inside");
                        while let Err(other) = compare_exchange(&memory, 0, seen, seen + 1).expect("inside") {
                            seen = other;
                        }
                    }
                });
            }
        });
        assert_eq!(load(&mapping.as_volatile_slice(), 0), Ok(start + 2 * STEPS));
    }
}
