//! Small blocks of coherent memory, such as descriptors and rings (Linux `dma_pool`).
//!
//! Coherent memory comes in whole pages; a pool cuts it into blocks of one size that are aligned and cross no boundary, as devices ask for
//! them. It is made of [`dma_alloc_coherent`](crate::Driver::dma_alloc_coherent) alone, so the server sees pages and not blocks: blocks of one
//! page are open to the device together. In a virtual machine it is made of the machine's own pages, mapped for as long as the pool lives; that is
//! coherent in every mode but bounce, where it is refused.

mod pages;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use iommu_types::errors::{DmaMapError, DmaUnmapError, InvalidField};
use iommu_types::{Gpa, GpaRange, Iova, PAGE_SIZE_BYTES};

use self::pages::PoolPages;
use crate::convert::bad_answer;
use crate::{DeviceHandle, Driver, SdkError, TransportError};

/// A pool of blocks of coherent memory for one device. It keeps the pages that it took until it is destroyed; they go with the session
/// too.
#[derive(Debug)]
pub struct DmaPool {
    driver: Driver,
    device: DeviceHandle,
    layout: Layout,
    state: Arc<Mutex<State>>,
}

/// A block of a pool. [`free`](Self::free) gives it back; dropping it instead keeps it from being used again until the pool is destroyed.
#[derive(Debug)]
pub struct PoolBlock {
    place: Place,
    size_bytes: u64,
    pool: Arc<Mutex<State>>,
}

/// Why a pool was not destroyed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DestroyPoolError {
    /// Blocks were not given back.
    #[error("{blocks} blocks of the pool are in use; free them first")]
    InUse {
        /// How many.
        blocks: u64,
    },
    /// An allocation of pages was not freed; those after it are still the pool's.
    #[error(transparent)]
    Free(#[from] SdkError<DmaUnmapError>),
}

/// Where a block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    iova: Iova,
    gpa: Gpa,
}

#[derive(Debug, Default)]
struct State {
    free: Vec<Place>,
    in_use: u64,
    pages: Vec<PoolPages>,
}

/// A panic while the lock was held leaves a state that is still whole.
fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl DmaPool {
    /// A pool of blocks of `block_bytes` (at least 1) whose addresses are multiples of `alignment`, a power of two, and which do not cross a
    /// multiple of `boundary`, a power of two that is not below the block; 0 is no boundary. Takes no memory before the first block.
    pub fn new(
        driver: &Driver,
        device: &DeviceHandle,
        block_bytes: u64,
        alignment: u64,
        boundary: u64,
    ) -> Result<Self, InvalidField> {
        let layout = Layout::new(block_bytes, alignment, boundary)?;
        Ok(Self { driver: driver.clone(), device: device.clone(), layout, state: Arc::default() })
    }

    /// Size of a block in bytes: as asked for, in whole alignments.
    pub fn block_bytes(&self) -> u64 {
        self.layout.block_bytes
    }

    /// Takes a block (Linux `dma_pool_alloc`), out of new pages when there is none. A block that was used before holds what was left in it.
    pub async fn alloc(&self) -> Result<PoolBlock, SdkError<DmaMapError>> {
        if let Some(block) = self.take(&mut lock(&self.state)) {
            return Ok(block);
        }
        // Usually an allocation is aligned to its size. Where the mode gives the addresses it may be only to pages, and a large block then
        // needs room to be moved in.
        for bytes in [self.layout.usual_bytes(), self.layout.sure_bytes()] {
            let pages = PoolPages::take(&self.driver, &self.device, bytes).await?;
            let offsets = self.layout.offsets(pages.iova(), pages.range().size_bytes());
            let places = offsets.map(|offset| {
                let (iova, gpa) = (pages.iova(), pages.range().base());
                Some(Place { iova: iova.checked_add(offset)?, gpa: gpa.checked_add(offset)? })
            });
            let places: Option<Vec<Place>> = places.collect();
            let places = places.ok_or_else(|| bad_answer("coherent memory that wraps"))?;
            let fits = !places.is_empty();
            let mut state = lock(&self.state);
            state.pages.push(pages);
            // Blocks are taken from the end; the first of an allocation is given first.
            state.free.extend(places.into_iter().rev());
            if fits && let Some(block) = self.take(&mut state) {
                return Ok(block);
            }
        }
        Err(TransportError::BadAnswer("coherent memory smaller than was asked for".to_owned()).into())
    }

    fn take(&self, state: &mut State) -> Option<PoolBlock> {
        let place = state.free.pop()?;
        state.in_use += 1;
        Some(PoolBlock { place, size_bytes: self.layout.block_bytes, pool: Arc::clone(&self.state) })
    }

    /// How many blocks are taken and not given back.
    pub fn in_use(&self) -> u64 {
        lock(&self.state).in_use
    }

    /// Frees the pages (Linux `dma_pool_destroy`). Refused while blocks are in use, and then given back to the caller.
    pub async fn destroy(self) -> Result<(), (Self, DestroyPoolError)> {
        let pages = {
            let mut state = lock(&self.state);
            if state.in_use > 0 {
                Err(DestroyPoolError::InUse { blocks: state.in_use })
            } else {
                state.free.clear();
                Ok(std::mem::take(&mut state.pages))
            }
        };
        let mut pages = match pages {
            Ok(pages) => pages.into_iter(),
            Err(error) => return Err((self, error)),
        };
        while let Some(page) = pages.next() {
            if let Err(error) = page.free().await {
                lock(&self.state).pages.extend(pages);
                return Err((self, error.into()));
            }
        }
        Ok(())
    }
}

impl PoolBlock {
    /// For the device.
    pub fn iova(&self) -> Iova {
        self.place.iova
    }

    /// For the CPU.
    pub fn range(&self) -> GpaRange {
        GpaRange::new(self.place.gpa, self.size_bytes)
            .expect("a block lies in the memory that it was cut from")
    }

    /// Size in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Gives the block back to its pool (Linux `dma_pool_free`). The device must be done with it: its page stays mapped.
    pub fn free(self) {
        let mut state = lock(&self.pool);
        state.free.push(self.place);
        state.in_use -= 1;
    }
}

/// How memory is cut into blocks.
#[derive(Clone, Copy, Debug)]
struct Layout {
    /// In whole alignments.
    block_bytes: u64,
    alignment: u64,
    /// A power of two; `None` for no boundary.
    boundary: Option<u64>,
}

/// Larger blocks are better allocated one by one.
const BLOCK_BYTES_MAX: u64 = 1 << 30;

impl Layout {
    fn new(block_bytes: u64, alignment: u64, boundary: u64) -> Result<Self, InvalidField> {
        let refused = |field: &str, why: String| Err(InvalidField { field: field.to_owned(), why });
        if !(1..=BLOCK_BYTES_MAX).contains(&block_bytes) {
            return refused(
                "block_bytes",
                format!("is {block_bytes}, and must be between 1 and {BLOCK_BYTES_MAX}"),
            );
        }
        if !alignment.is_power_of_two() || alignment > BLOCK_BYTES_MAX {
            let why = format!("{alignment} is not a power of two up to {BLOCK_BYTES_MAX}");
            return refused("alignment", why);
        }
        let block_bytes = block_bytes.next_multiple_of(alignment);
        if boundary != 0 && (!boundary.is_power_of_two() || boundary < block_bytes) {
            let why =
                format!("{boundary} is not a power of two from {block_bytes}, the size of a block, or 0");
            return refused("boundary", why);
        }
        Ok(Self { block_bytes, alignment, boundary: (boundary != 0).then_some(boundary) })
    }

    /// Whole pages that hold at least one block when they are aligned to their size.
    fn usual_bytes(&self) -> u64 {
        self.block_bytes.next_multiple_of(PAGE_SIZE_BYTES)
    }

    /// Whole pages that hold at least one block wherever they begin: one alignment less 1 to the first aligned address, one block less 1 from
    /// there to the next boundary, and the block.
    fn sure_bytes(&self) -> u64 {
        (self.alignment + 2 * self.block_bytes).next_multiple_of(PAGE_SIZE_BYTES)
    }

    /// Where the blocks of `size_bytes` from `base` are, as offsets.
    fn offsets(self, base: Iova, size_bytes: u64) -> impl Iterator<Item = u64> {
        let (base, end) = (u128::from(base.get()), u128::from(base.get()) + u128::from(size_bytes));
        let block = u128::from(self.block_bytes);
        let first = base.next_multiple_of(u128::from(self.alignment));
        let placed = move |at: u128| {
            let Some(boundary) = self.boundary.map(u128::from) else { return at };
            // A boundary is a multiple of the alignment, so what begins there is aligned too.
            if at / boundary == (at + block - 1) / boundary { at } else { at.next_multiple_of(boundary) }
        };
        let starts = std::iter::successors(Some(placed(first)), move |at| Some(placed(at + block)));
        starts
            .take_while(move |at| at + block <= end)
            .map(move |at| u64::try_from(at - base).expect("less than the size, which has 64 bits"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(layout: (u64, u64, u64), base: u64, size_bytes: u64, expected: &[u64]) {
        let (block_bytes, alignment, boundary) = layout;
        let cut = Layout::new(block_bytes, alignment, boundary).expect("a layout");
        let offsets: Vec<u64> = cut.offsets(Iova::new(base), size_bytes).collect();
        assert_eq!(offsets, expected, "{layout:?} in {size_bytes} bytes at {base:#x}");
    }

    #[test]
    fn blocks_are_aligned_and_cross_no_boundary() {
        check((1024, 1, 0), 0x1000, 4096, &[0, 1024, 2048, 3072]);
        // A size is rounded to whole alignments.
        check((1000, 512, 0), 0x1000, 4096, &[0, 1024, 2048, 3072]);
        check((1500, 4, 0), 0x1000, 4096, &[0, 1500]);
        // 1,500 bytes do not fit twice before a boundary of 2 KiB.
        check((1500, 4, 2048), 0x1000, 4096, &[0, 2048]);
        check((1500, 4, 4096), 0x1000, 8192, &[0, 1500, 4096, 5596]);
        check((4096, 4096, 4096), 0x3000, 4096, &[0]);
        // Blocks larger than a page, where the allocation is aligned to pages only.
        check((8192, 1, 8192), 0x3000, 8192, &[]);
        check((8192, 1, 8192), 0x3000, 16384, &[4096]);
        check((8192, 8192, 0), 0x3000, 16384, &[4096]);
        // At the end of the address space nothing wraps.
        check((4096, 4096, 4096), !0xfff, 4096, &[0]);
        check((8192, 1, 8192), !0xfff, 4096, &[]);
    }

    #[test]
    fn a_sure_allocation_holds_a_block_wherever_it_begins() {
        for block_bytes in [1, 100, 4096, 5000, 8192, 12288] {
            for alignment in [1, 64, 4096, 16384] {
                for boundary in [0, 65536] {
                    let layout = Layout::new(block_bytes, alignment, boundary).expect("a layout");
                    for page in 0..64 {
                        let base = Iova::new(page * 4096);
                        let first = layout.offsets(base, layout.sure_bytes()).next();
                        assert!(first.is_some(), "{layout:?} at {base}");
                        let aligned =
                            Iova::new(layout.usual_bytes().next_power_of_two().max(alignment) * (page + 1));
                        let usual = layout.offsets(aligned, layout.usual_bytes()).next();
                        assert!(usual.is_some(), "{layout:?} at {aligned}");
                    }
                }
            }
        }
    }

    #[test]
    fn layouts_without_a_meaning_are_refused_by_name() {
        for (block_bytes, alignment, boundary, field) in [
            (0, 1, 0, "block_bytes"),
            (BLOCK_BYTES_MAX + 1, 1, 0, "block_bytes"),
            (64, 0, 0, "alignment"),
            (64, 48, 0, "alignment"),
            (64, BLOCK_BYTES_MAX * 2, 0, "alignment"),
            (64, 1, 96, "boundary"),
            (64, 1, 32, "boundary"),
            // The block is rounded up before it is compared.
            (64, 256, 128, "boundary"),
        ] {
            let refused = Layout::new(block_bytes, alignment, boundary).expect_err("refused");
            assert_eq!(refused.field, field, "{refused}");
        }
    }
}
