//! How one access ends and why: the shipping walk, told step by step.

use crate::{Access, DomainId, Hpa, Iova, PageSize, Pasid, Permissions, SourceId, TranslationFault};

/// A structure that a walk reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Structure {
    /// Root table, indexed by bus.
    Root,
    /// Context table, indexed by device and function.
    Context,
    /// Second-stage table at a level, 5 to 1.
    SecondStage {
        /// The level.
        level: u8,
    },
    /// Root of the ring unit, indexed by bus.
    RingRoot,
    /// rDEVICE: the device table of the ring unit, indexed by device and function.
    RingDevice,
    /// rRING: a ring of a device.
    Ring,
    /// rPTE: a slot of a ring.
    RingSlot,
}

/// One entry that the walk read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Which structure.
    pub structure: Structure,
    /// Index of the entry in its table. A slot beyond 65,535 stands as that; its reading says which it is.
    pub index: u16,
    /// Where the entry lies.
    pub at: Hpa,
    /// The raw entry: bits 63:0. `None` when memory could not be read.
    pub low: Option<u64>,
    /// Bits 127:64 of entries of 16 bytes, or the extent of a partial page; `None` for other page-table entries.
    pub high: Option<u64>,
    /// Permissions left after this entry (the AND so far); only for page-table entries and slots.
    pub permissions: Option<Permissions>,
    /// The entry in words, such as `present, 48-bit, domain 7, table hpa:0x…`.
    pub reading: String,
}

/// What a cache would do for the access, as it stands now. Looking does not change it or its counters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CacheState {
    /// An entry would be used.
    Hit {
        /// The entry in words.
        entry: String,
    },
    /// There is no entry; the tables decide.
    Miss,
    /// An entry is there but gives less than asked, so the tables decide.
    Insufficient {
        /// The entry in words.
        entry: String,
    },
    /// The cache is not asked for such an access.
    NotAsked,
}

/// A successful translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Translation {
    /// Where the address leads.
    pub hpa: Hpa,
    /// The page that holds it.
    pub page_size: PageSize,
    /// What the tables allow there.
    pub permissions: Permissions,
    /// The domain.
    pub domain_id: DomainId,
}

/// How the access ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// It is translated.
    Translated(Translation),
    /// Translation is off, or the context entry is pass-through: the address is used as it is.
    Untranslated(Hpa),
    /// It is an interrupt request and goes to interrupt remapping.
    Interrupt,
    /// It is refused.
    Refused(TranslationFault),
}

/// One access explained.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explanation {
    /// The requester.
    pub source_id: SourceId,
    /// PASID of the request.
    pub pasid: Option<Pasid>,
    /// Address of the request.
    pub iova: Iova,
    /// What is asked.
    pub access: Access,
    /// Size of the access in bytes; 0 is a zero-length read.
    pub size_bytes: u32,
    /// What the context cache would do.
    pub context_cache: CacheState,
    /// What the IOTLB would do.
    pub iotlb: CacheState,
    /// What the paging-structure cache would do.
    pub paging_structure_cache: CacheState,
    /// Every entry that the walk reads, in order, with the caches left aside.
    pub steps: Vec<Step>,
    /// How it ends according to the tables.
    pub outcome: Outcome,
    /// Whether a fault is kept out of the fault log by FPD.
    pub fault_suppressed: bool,
    /// How a cached entry would end it, where that differs from the tables: a stale translation.
    pub stale: Option<Translation>,
    /// The end in one sentence.
    pub conclusion: String,
}
