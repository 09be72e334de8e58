//! The host-physical space: which addresses are RAM, and what file is behind them.
//!
//! ```text
//!  0                  3 GiB          4 GiB                        4 GiB + size - 3 GiB
//!  ├── low RAM ─────────┤   no RAM     ├── high RAM, if size > 3 GiB ──┤
//!                        FEE0_0000..=FEEF_FFFF: interrupts
//!  file offset 0 …      3 GiB ────────┘ (the file has no hole)
//! ```
//!
//! **Architecture invariant:** the address range of interrupts (FEE0_0000..=FEEF_FFFF) is never RAM, whatever the size.
//!
//! The backing file belongs to this process alone and is allocated whole: writing into a hole when the disk is full
//! would be a SIGBUS, which no code can answer. A file is allocated before [`PhysicalMemory::new`] returns; a memfd, where
//! that takes a third of a second per GiB and where no disk can be full, by [`PhysicalMemory::preallocate`] (ADR 0003).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use iommu_types::{Hpa, HpaRange, PAGE_SIZE_BYTES};
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use vm_memory::mmap::{MmapRegion, MmapRegionError};
use vm_memory::{FileOffset, VolatileMemory, VolatileSlice};

use super::NoMemoryAt;

/// RAM below 4 GiB ends here, as on PCs: the rest of the first 4 GiB belongs to devices and interrupts.
pub const LOW_RAM_BYTES_MAX: u64 = 3 << 30;
/// RAM beyond [`LOW_RAM_BYTES_MAX`] goes on here.
pub const HIGH_RAM_BASE: Hpa = Hpa::new(4 << 30);
/// The smallest memory: room for root, context and page tables of a bare machine and a few buffers.
pub const MEMORY_BYTES_MIN: u64 = 1 << 20;
/// The largest memory: 1 TiB, far beyond any host this runs on, so that a slip in a unit is refused instead of tried.
pub const MEMORY_BYTES_MAX: u64 = 1 << 40;

/// Interrupts live in FEE0_0000..=FEEF_FFFF (VT-d 5.10 §3.14); the host address width is 46 bits.
const INTERRUPT_BASE: u64 = 0xFEE0_0000;
const INTERRUPT_LAST: u64 = 0xFEEF_FFFF;
const HOST_ADDRESS_WIDTH: u32 = 46;
/// One step of preallocation: some 20 ms on a memfd, so that the inode's lock is never held for long.
const PREALLOCATION_STEP_BYTES: u64 = 64 << 20;

const _: () = assert!(LOW_RAM_BYTES_MAX <= INTERRUPT_BASE && HIGH_RAM_BASE.get() > INTERRUPT_LAST);
const _: () = assert!(HIGH_RAM_BASE.get() + MEMORY_BYTES_MAX <= 1 << HOST_ADDRESS_WIDTH);
const _: () = assert!(
    MEMORY_BYTES_MIN <= LOW_RAM_BYTES_MAX && PREALLOCATION_STEP_BYTES.is_multiple_of(PAGE_SIZE_BYTES)
);
const _: () = assert!(usize::BITS == 64, "offsets into a mapping are cast between u64 and usize");

/// How much memory, and on what.
#[derive(Clone, Debug)]
pub struct MemoryConfig {
    /// Bytes of RAM: whole frames, between [`MEMORY_BYTES_MIN`] and [`MEMORY_BYTES_MAX`].
    pub size_bytes: u64,
    /// What is behind the RAM.
    pub backing: Backing,
}

/// What is behind the RAM.
#[derive(Clone, Debug)]
pub enum Backing {
    /// An anonymous file in the kernel's memory, gone with the process.
    Memfd,
    /// A file of this name, which must not exist yet. It stays when the process ends.
    File(PathBuf),
}

/// Why there is no physical memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The size is below [`MEMORY_BYTES_MIN`].
    #[error("{size_bytes} bytes of physical memory are too few; at least {MEMORY_BYTES_MIN} are needed")]
    TooSmall {
        /// Size asked for.
        size_bytes: u64,
    },
    /// The size is above [`MEMORY_BYTES_MAX`].
    #[error("{size_bytes} bytes of physical memory are too many; at most {MEMORY_BYTES_MAX} are possible")]
    TooLarge {
        /// Size asked for.
        size_bytes: u64,
    },
    /// The size is not a whole number of frames.
    #[error(
        "{size_bytes} bytes of physical memory are not a multiple of the frame size, {PAGE_SIZE_BYTES} bytes"
    )]
    NotWholeFrames {
        /// Size asked for.
        size_bytes: u64,
    },
    /// The processor cannot access 16-byte table entries in one piece.
    #[error("this processor has no 16-byte atomic operations, which table entries need")]
    NoWideAtomics,
    /// The file for the memory exists.
    #[error(
        "the memory file {} exists already, and memory is created fresh at each start: \
         remove the file if no other server uses it, or name another one",
        .path.display()
    )]
    FileExists {
        /// The file.
        path: PathBuf,
    },
    /// The file for the memory could not be created.
    #[error("create the memory file {}", .path.display())]
    CreateFile {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// The memfd could not be created.
    #[error("create an anonymous memory file")]
    CreateMemfd {
        /// What the operating system said.
        source: io::Error,
    },
    /// The backing file could not be brought to its size.
    #[error("set the size of the memory file to {size_bytes} bytes")]
    SetSize {
        /// Size asked for.
        size_bytes: u64,
        /// What the operating system said.
        source: io::Error,
    },
    /// The memory could not be allocated.
    #[error(
        "allocate {size_bytes} bytes for the memory file; give it less memory or a file system with more room"
    )]
    Allocate {
        /// Size asked for.
        size_bytes: u64,
        /// What the operating system said.
        source: io::Error,
    },
    /// The memory could not be mapped.
    #[error("map {size_bytes} bytes of physical memory")]
    Map {
        /// Bytes of the region.
        size_bytes: u64,
        /// What the operating system said.
        source: MmapRegionError,
    },
}

/// One run of RAM.
#[derive(Debug)]
struct Region {
    range: HpaRange,
    /// Where the region starts in the backing file.
    file_offset: u64,
    mapping: MmapRegion,
}

impl Region {
    fn map(file: &Arc<File>, base: Hpa, file_offset: u64, size_bytes: u64) -> Result<Self, MemoryError> {
        let range =
            HpaRange::new(base, size_bytes).expect("the size was checked: not empty, far from wrapping");
        let behind = FileOffset::from_arc(Arc::clone(file), file_offset);
        let mapping = MmapRegion::from_file(behind, size_bytes as usize)
            .map_err(|source| MemoryError::Map { size_bytes, source })?;
        Ok(Self { range, file_offset, mapping })
    }
}

/// The host-physical space. It is shared by everybody at once: every access is volatile or atomic, takes no lock and
/// allocates nothing.
#[derive(Debug)]
pub struct PhysicalMemory {
    // At most two regions, so the lookup of the hot path is one comparison and no pointer to follow.
    low: Region,
    high: Option<Region>,
    file: Arc<File>,
    size_bytes: u64,
}

impl PhysicalMemory {
    /// Creates the memory, all zero. A file is allocated whole before this returns; a memfd has only its size, and
    /// [`preallocate`](Self::preallocate) is the second step. A file that this call created is removed again when it fails.
    pub fn new(config: &MemoryConfig) -> Result<Self, MemoryError> {
        check_size(config.size_bytes)?;
        if !mapped_atomics::is_lock_free() {
            return Err(MemoryError::NoWideAtomics);
        }
        match &config.backing {
            Backing::Memfd => {
                let file = create_memfd(config.size_bytes)?;
                Self::over(file, config.size_bytes)
            }
            Backing::File(path) => {
                let file = create_file(path)?;
                let memory = check_room(&file, config.size_bytes)
                    .and_then(|()| set_size(&file, config.size_bytes))
                    .and_then(|()| Self::over(file, config.size_bytes))
                    .and_then(|memory| memory.preallocate().map(|()| memory));
                if memory.is_err() {
                    // The reason to report is the one that we have; a file that cannot be removed is named by the next start.
                    let _ = std::fs::remove_file(path);
                }
                memory
            }
        }
    }

    /// The memory of a bare machine, or of a test: `size_bytes` from address 0 on a memfd, allocated whole.
    pub fn bare(size_bytes: u64) -> Result<Self, MemoryError> {
        let memory = Self::new(&MemoryConfig { size_bytes, backing: Backing::Memfd })?;
        memory.preallocate()?;
        Ok(memory)
    }

    fn over(file: File, size_bytes: u64) -> Result<Self, MemoryError> {
        let file = Arc::new(file);
        let low_bytes = size_bytes.min(LOW_RAM_BYTES_MAX);
        let high_bytes = size_bytes - low_bytes;
        let low = Region::map(&file, Hpa::new(0), 0, low_bytes)?;
        let high = match high_bytes {
            0 => None,
            _ => Some(Region::map(&file, HIGH_RAM_BASE, low_bytes, high_bytes)?),
        };
        Ok(Self { low, high, file, size_bytes })
    }

    /// Allocates every frame, so that no later access can fail for want of one. It may run on a thread of its own while the
    /// memory is in use: it changes no byte. Calling it again is harmless.
    ///
    /// On a memfd this takes about a third of a second per GiB (ADR 0003).
    pub fn preallocate(&self) -> Result<(), MemoryError> {
        let mut offset = 0;
        while offset < self.size_bytes {
            let step_bytes = PREALLOCATION_STEP_BYTES.min(self.size_bytes - offset);
            rustix::io::retry_on_intr(|| {
                rustix::fs::fallocate(&self.file, FallocateFlags::empty(), offset, step_bytes)
            })
            .map_err(|errno| MemoryError::Allocate { size_bytes: self.size_bytes, source: errno.into() })?;
            offset += step_bytes;
        }
        Ok(())
    }

    /// Bytes of RAM.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// The RAM ranges, ascending.
    pub fn ranges(&self) -> Vec<HpaRange> {
        std::iter::once(&self.low).chain(&self.high).map(|region| region.range).collect()
    }

    /// Whether every address of `range` is RAM. No range crosses the hole.
    pub fn contains(&self, range: HpaRange) -> bool {
        self.region(range.base()).is_some_and(|region| region.range.covers(range))
    }

    /// The number of the frame that holds `at`, counted over RAM only (the hole has no frames).
    pub(super) fn frame_index(&self, at: Hpa) -> Option<u64> {
        let region = self.region(at)?;
        let offset =
            at.offset_from(region.range.base()).filter(|offset| *offset < region.range.size_bytes())?;
        Some((region.file_offset + offset) / PAGE_SIZE_BYTES)
    }

    #[inline]
    fn region(&self, at: Hpa) -> Option<&Region> {
        if at < HIGH_RAM_BASE { Some(&self.low) } else { self.high.as_ref() }
    }

    /// The mapping and the offset in it of `size_bytes` bytes at `at`, which are all there. Zero bytes need one byte of RAM to
    /// stand at.
    #[inline]
    pub(super) fn place(&self, at: Hpa, size_bytes: usize) -> Result<(&MmapRegion, usize), NoMemoryAt> {
        let refused = NoMemoryAt { at, size_bytes: size_bytes as u64 };
        let region = self.region(at).ok_or(refused)?;
        let offset = at.offset_from(region.range.base()).ok_or(refused)?;
        match region.range.size_bytes().checked_sub(offset) {
            Some(room_bytes) if room_bytes >= (size_bytes as u64).max(1) => {
                Ok((&region.mapping, offset as usize))
            }
            _ => Err(refused),
        }
    }

    /// The bytes themselves.
    #[inline]
    pub(super) fn slice(&self, at: Hpa, size_bytes: usize) -> Result<VolatileSlice<'_>, NoMemoryAt> {
        let (mapping, offset) = self.place(at, size_bytes)?;
        mapping.get_slice(offset, size_bytes).map_err(|_| NoMemoryAt { at, size_bytes: size_bytes as u64 })
    }
}

fn check_size(size_bytes: u64) -> Result<(), MemoryError> {
    match size_bytes {
        ..MEMORY_BYTES_MIN => Err(MemoryError::TooSmall { size_bytes }),
        _ if size_bytes > MEMORY_BYTES_MAX => Err(MemoryError::TooLarge { size_bytes }),
        _ if !size_bytes.is_multiple_of(PAGE_SIZE_BYTES) => Err(MemoryError::NotWholeFrames { size_bytes }),
        _ => Ok(()),
    }
}

/// Refuses what cannot fit before any of it is allocated, so that a refused start does not fill the disk for everyone else.
fn check_room(file: &File, size_bytes: u64) -> Result<(), MemoryError> {
    let refused = |errno: rustix::io::Errno| MemoryError::Allocate { size_bytes, source: errno.into() };
    let system = rustix::fs::fstatvfs(file).map_err(refused)?;
    match system.f_bavail.saturating_mul(system.f_frsize) {
        free_bytes if free_bytes < size_bytes => Err(refused(rustix::io::Errno::NOSPC)),
        _ => Ok(()),
    }
}

fn set_size(file: &File, size_bytes: u64) -> Result<(), MemoryError> {
    file.set_len(size_bytes).map_err(|source| MemoryError::SetSize { size_bytes, source })
}

/// A memfd of this size, sealed at it: a mapping whose file shrinks is a SIGBUS.
fn create_memfd(size_bytes: u64) -> Result<File, MemoryError> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file: File = rustix::fs::memfd_create("iommu-memory", flags)
        .map_err(|errno| MemoryError::CreateMemfd { source: errno.into() })?
        .into();
    set_size(&file, size_bytes)?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
        .map_err(|errno| MemoryError::CreateMemfd { source: errno.into() })?;
    Ok(file)
}

/// A new file that only this user may open.
fn create_file(path: &Path) -> Result<File, MemoryError> {
    OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path).map_err(|source| {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::AlreadyExists => MemoryError::FileExists { path },
            _ => MemoryError::CreateFile { path, source },
        }
    })
}
