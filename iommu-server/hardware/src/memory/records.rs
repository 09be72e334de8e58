//! The mapping records: what is mapped, for whom, and how far a grant or a revoke has come.
//!
//! Page tables say where a page leads, but not where a mapping begins, which bytes it covers or whose it is. One
//! record per mapping says it, in physical memory, so that after a crash (I10) a *granting* record can be rolled back and a
//! *revoking* one forward.
//!
//! **Architecture invariant:** the state is written last when a record begins, so that a record which is not free is whole.
//! States only go forward:
//!
//! ```text
//!   free ──begin──▶ granting ──▶ live ──▶ revoking ──▶ free
//!                       └──────────────▶ (rolled back)
//! ```
//!
//! A record is 64 bytes: eight little-endian words. This layout is fixed with the first release.
//!
//! ```text
//!          63      48 47          32 31     24 23       16 15        8 7       0
//!         ┌──────────┬──────────────┬─────────┬───────────┬───────────┬─────────┐
//! word 0  │ zero     │ domain ID    │ kind    │ protection│permissions│ state   │
//!         ├──────────┴──────────────┼─────────┴───────────┴───────────┴─────────┤
//! word 1  │ zero                    │ owner                                     │
//!         ├─────────────────────────┴───────────────────────────────────────────┤
//! word 2  │ first IOVA                                                          │
//! word 3  │ size in bytes                                                       │
//! word 4  │ first guest-physical address                                        │
//! word 5  │ request ID                                                          │
//! word 6  │ state of the protection mode (zero for strict)                      │
//! word 7  │ zero                                                                │
//!         └─────────────────────────────────────────────────────────────────────┘
//!  state: 0 free, 1 granting, 2 live, 3 revoking     kind: 1 DMA API, 2 domain API, 3 coherent, 4 scatter-gather,
//!  5 direct map, 6 shadow buffer
//! ```
//!
//! Which indexes are free, and that one index has one writer at a time, is the kernel floor's to know.

use std::sync::Arc;

use iommu_types::{Hpa, HpaRange};

use super::PhysicalMemory;

const WORD_BYTES: u64 = 8;
const STATE_MASK: u64 = 0xff;

/// The place of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RecordIndex(pub u32);

/// How far a mapping has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecordState {
    /// There is no mapping here.
    Free,
    /// Entries are being written; nobody was answered.
    Granting,
    /// The mapping was answered.
    Live,
    /// Entries are being removed, flushed and drained; nobody was answered.
    Revoking,
}

impl RecordState {
    fn from_word(word: u64) -> Option<Self> {
        match word & STATE_MASK {
            0 => Some(Self::Free),
            1 => Some(Self::Granting),
            2 => Some(Self::Live),
            3 => Some(Self::Revoking),
            _ => None,
        }
    }

    fn bits(self) -> u64 {
        match self {
            Self::Free => 0,
            Self::Granting => 1,
            Self::Live => 2,
            Self::Revoking => 3,
        }
    }

    /// Whether a record in this state may go to `next`.
    fn may_become(self, next: Self) -> bool {
        matches!(
            (self, next),
            (Self::Granting, Self::Live | Self::Revoking | Self::Free)
                | (Self::Live, Self::Revoking)
                | (Self::Revoking, Self::Free)
        )
    }
}

/// What is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MappingRecord {
    /// What the mapping allows; the kernel floor's encoding.
    pub permissions: u8,
    /// The protection mode; the kernel floor's encoding.
    pub protection: u8,
    /// What the mapping is for: one of the `KIND_` constants.
    pub kind: u8,
    /// The domain.
    pub domain_id: u16,
    /// The owner, as in the frame array.
    pub owner: u32,
    /// First I/O virtual address.
    pub iova: u64,
    /// Bytes that the mapping covers, not rounded to pages.
    pub size_bytes: u64,
    /// First guest-physical address.
    pub gpa: u64,
    /// The request that asked for it.
    pub request_id: u64,
}

impl MappingRecord {
    /// A streaming mapping of the DMA API.
    pub const KIND_DMA_API: u8 = 1;
    /// A mapping at an address that the client chose.
    pub const KIND_DOMAIN_API: u8 = 2;
    /// Coherent memory of the DMA API.
    pub const KIND_COHERENT: u8 = 3;
    /// An element of a scatter-gather mapping.
    pub const KIND_SCATTER_GATHER: u8 = 4;
    /// A buffer in the direct map of a passthrough domain.
    pub const KIND_DIRECT: u8 = 5;
    /// A shadow buffer of a bounce domain.
    pub const KIND_SHADOW: u8 = 6;

    fn words(&self, state: RecordState) -> [u64; 8] {
        let head = state.bits()
            | u64::from(self.permissions) << 8
            | u64::from(self.protection) << 16
            | u64::from(self.kind) << 24
            | u64::from(self.domain_id) << 32;
        [head, u64::from(self.owner), self.iova, self.size_bytes, self.gpa, self.request_id, 0, 0]
    }

    fn from_words(words: [u64; 8]) -> Self {
        let [head, owner, iova, size_bytes, gpa, request_id, _, _] = words;
        Self {
            permissions: (head >> 8) as u8,
            protection: (head >> 16) as u8,
            kind: (head >> 24) as u8,
            domain_id: (head >> 32) as u16,
            owner: owner as u32,
            iova,
            size_bytes,
            gpa,
            request_id,
        }
    }
}

/// An array of mapping records in physical memory.
#[derive(Clone, Debug)]
pub struct MappingRecords {
    memory: Arc<PhysicalMemory>,
    base: Hpa,
    capacity: u32,
}

impl MappingRecords {
    /// Bytes of one record: one cache line.
    pub const RECORD_BYTES: u64 = 64;

    /// The `capacity` records at `base`, which must be RAM from a cache line's start. What stands there is taken as it is; zeros
    /// are free records.
    pub fn new(memory: Arc<PhysicalMemory>, base: Hpa, capacity: u32) -> Self {
        let range = HpaRange::new(base, u64::from(capacity) * Self::RECORD_BYTES);
        let inside = range.is_ok_and(|range| memory.contains(range));
        assert!(
            inside && base.is_aligned(Self::RECORD_BYTES),
            "mapping records lie in RAM: {capacity} at {base}"
        );
        Self { memory, base, capacity }
    }

    /// How many records there are.
    pub fn capacity(&self) -> u32 {
        self.capacity
    }

    /// Writes a free record as *granting*, its state last.
    #[inline]
    pub fn begin(&self, index: RecordIndex, record: &MappingRecord) {
        let state = state_of(index, self.load(index, 0));
        assert!(state == RecordState::Free, "only a free record begins: {index:?} is {state:?}");
        let words = record.words(RecordState::Granting).map(u64::to_le_bytes);
        let (head, rest) = words.split_at(1);
        let at = self.place(index, 1);
        self.memory.write(at, rest.as_flattened()).expect("the records lie in RAM");
        self.store(index, 0, u64::from_le_bytes(head[0]));
    }

    /// Moves a record on.
    #[inline]
    pub fn set_state(&self, index: RecordIndex, state: RecordState) {
        let head = self.load(index, 0);
        let before = state_of(index, head);
        assert!(before.may_become(state), "records only go forward: {index:?} from {before:?} to {state:?}");
        self.store(index, 0, head & !STATE_MASK | state.bits());
    }

    /// The state of a record, and what it says; of a free record that is what it last said.
    #[inline]
    pub fn get(&self, index: RecordIndex) -> (RecordState, MappingRecord) {
        let mut bytes = [[0; WORD_BYTES as usize]; 8];
        let at = self.place(index, 0);
        self.memory.read(at, bytes.as_flattened_mut()).expect("the records lie in RAM");
        let words = bytes.map(u64::from_le_bytes);
        (state_of(index, words[0]), MappingRecord::from_words(words))
    }

    #[inline]
    fn place(&self, index: RecordIndex, word: usize) -> Hpa {
        assert!(index.0 < self.capacity, "the kernel floor hands out only indexes that exist: {index:?}");
        let offset = u64::from(index.0) * Self::RECORD_BYTES + word as u64 * WORD_BYTES;
        self.base.checked_add(offset).expect("the records lie in RAM")
    }

    #[inline]
    fn load(&self, index: RecordIndex, word: usize) -> u64 {
        self.memory.load_u64(self.place(index, word)).expect("the records lie in RAM")
    }

    #[inline]
    fn store(&self, index: RecordIndex, word: usize, value: u64) {
        self.memory.store_u64(self.place(index, word), value).expect("the records lie in RAM");
    }
}

fn state_of(index: RecordIndex, head: u64) -> RecordState {
    RecordState::from_word(head)
        .unwrap_or_else(|| panic!("only this module writes records, and {index:?} begins with {head:#018x}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: Hpa = Hpa::new(0x4000);
    const RECORD: MappingRecord = MappingRecord {
        permissions: 0x03,
        protection: 0x05,
        kind: MappingRecord::KIND_DOMAIN_API,
        domain_id: 0xd0d1,
        owner: 0x0a0b_0c0d,
        iova: 0x1122_3344_5566_7000,
        size_bytes: 0x1801,
        gpa: 0x99_aabb_c000,
        request_id: u64::MAX - 1,
    };

    fn records() -> MappingRecords {
        MappingRecords::new(Arc::new(PhysicalMemory::bare(1 << 20).expect("memory")), BASE, 16)
    }

    #[test]
    fn a_record_has_its_golden_bytes() {
        let records = records();
        records.begin(RecordIndex(1), &RECORD);
        let mut bytes = [0xee; 64 * 3];
        records.memory.read(BASE, &mut bytes).expect("inside");
        #[rustfmt::skip]
        let golden: [u8; 64] = [
            0x01, 0x03, 0x05, 0x02, 0xd1, 0xd0, 0x00, 0x00, // state, permissions, protection, kind, domain ID
            0x0d, 0x0c, 0x0b, 0x0a, 0x00, 0x00, 0x00, 0x00, // owner
            0x00, 0x70, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11, // IOVA
            0x01, 0x18, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, // size
            0x00, 0xc0, 0xbb, 0xaa, 0x99, 0x00, 0x00, 0x00, // guest-physical address
            0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, // request ID
            0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, // mode state
            0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
        ];
        assert_eq!(bytes[..64], [0; 64], "the record before");
        assert_eq!(bytes[64..128], golden);
        assert_eq!(bytes[128..], [0; 64], "the record after");
    }

    #[test]
    fn a_state_change_touches_only_the_state_byte() {
        let records = records();
        let index = RecordIndex(15);
        records.begin(index, &RECORD);
        for (state, byte) in [(RecordState::Live, 2), (RecordState::Revoking, 3), (RecordState::Free, 0)] {
            records.set_state(index, state);
            assert_eq!(records.get(index), (state, RECORD));
            let mut first = [0; 2];
            records.memory.read(Hpa::new(BASE.get() + 15 * 64), &mut first).expect("inside");
            assert_eq!(first, [byte, RECORD.permissions]);
        }
        records.begin(index, &MappingRecord { iova: 0, ..RECORD });
        assert_eq!(records.get(index).1.iova, 0, "a freed record is used again");
    }

    #[test]
    fn states_only_go_forward() {
        use RecordState::{Free, Granting, Live, Revoking};
        let allowed =
            [(Granting, Live), (Granting, Revoking), (Granting, Free), (Live, Revoking), (Revoking, Free)];
        for from in [Free, Granting, Live, Revoking] {
            for to in [Free, Granting, Live, Revoking] {
                assert_eq!(from.may_become(to), allowed.contains(&(from, to)), "{from:?} to {to:?}");
            }
        }
    }

    #[test]
    fn our_own_bugs_stop_the_server_before_they_reach_memory() {
        let records = records();
        records.begin(RecordIndex(0), &RECORD);
        let bugs: [(&str, &dyn Fn()); 4] = [
            ("begin twice", &|| records.begin(RecordIndex(0), &RECORD)),
            ("live to free", &|| {
                records.set_state(RecordIndex(0), RecordState::Live);
                records.set_state(RecordIndex(0), RecordState::Free);
            }),
            ("index beyond capacity", &|| records.begin(RecordIndex(16), &RECORD)),
            ("records outside RAM", &|| {
                MappingRecords::new(Arc::clone(&records.memory), Hpa::new((1 << 20) - 64), 2);
            }),
        ];
        for (name, bug) in bugs {
            assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(bug)).is_err(), "{name}");
        }
        assert_eq!(records.get(RecordIndex(0)), (RecordState::Live, RECORD));
    }
}
