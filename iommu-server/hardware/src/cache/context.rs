//! The context cache: decoded context entries, by source.
//!
//! ```text
//!  tag    63    15       0        data   59  58       57    56 55     40 39              0
//!        [valid|0|source  ]             [FPD|pass-thr.|levels-3 |domain  | table, 4 KiB page ]
//! ```

use iommu_types::{DomainId, FunctionMask, Generation, Hpa, SourceId};

use super::set::Sets;
use super::{CacheGeometry, Filled};
use crate::drain::{Atomics, Drains, Std};

const VALID: u64 = 1 << 63;
const DOMAIN_SHIFT: u32 = 40;
const LEVELS_SHIFT: u32 = 56;
const PASS_THROUGH: u64 = 1 << 58;
const FAULT_PROCESSING_DISABLE: u64 = 1 << 59;
const TABLE_MASK: u64 = (1 << DOMAIN_SHIFT) - 1;
const PAGE_SHIFT: u32 = 12;
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// A decoded context entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CachedContext {
    /// The domain that the source is attached to.
    pub domain_id: DomainId,
    /// How its requests are translated.
    pub translation: ContextTranslation,
    /// FPD: faults of the source that depend on it are not recorded.
    pub fault_processing_disable: bool,
}

/// What a context entry asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ContextTranslation {
    /// Second-stage tables.
    SecondStage {
        /// The top table.
        table: Hpa,
        /// Levels to walk: 3, 4 or 5.
        levels: u8,
    },
    /// Requests are not translated (TT=10).
    PassThrough,
}

/// Contexts, keyed by source.
pub struct ContextCache<A: Atomics = Std> {
    sets: Sets<A>,
    index_bits: u32,
}

impl<A: Atomics> ContextCache<A> {
    /// An empty cache. Panics on an [impossible geometry](CacheGeometry::is_possible).
    pub fn new(geometry: CacheGeometry) -> Self {
        Self { sets: Sets::new(geometry), index_bits: geometry.sets.trailing_zeros() }
    }

    /// The context of a source. Takes no lock and writes nothing.
    #[inline]
    pub fn lookup(&self, source: SourceId) -> Option<CachedContext> {
        self.sets.find(self.index(source), tag(source)).map(from_data)
    }

    /// Puts a context in, unless an invalidation of contexts overtook the look at the tables (I4).
    /// `walked_under` is what [`Drains::context_generation`] said before.
    pub fn fill(
        &self,
        drains: &Drains<A>,
        walked_under: Generation,
        source: SourceId,
        context: CachedContext,
    ) -> Filled {
        let is_current = || drains.is_current_context(walked_under);
        self.sets.insert(self.index(source), tag(source), to_data(context), is_current)
    }

    /// Forgets everything. As for every invalidation here, the generation was moved before
    /// ([`Drains::move_context_generation`]).
    pub fn invalidate_all(&self) {
        self.sets.clear_everywhere(|_, _| true);
    }

    /// Forgets the contexts that name a domain.
    pub fn invalidate_domain(&self, domain: DomainId) {
        self.sets.clear_everywhere(|_, data| domain_of(data) == domain);
    }

    /// Forgets the context of a source, and of those that differ from it only in function bits that the mask
    /// ignores.
    pub fn invalidate_device(&self, source: SourceId, mask: FunctionMask) {
        let functions = (0..8).map(|function| SourceId::new(source.get() & !7 | function));
        for meant in functions.filter(|&function| mask.matches(source, function)) {
            self.sets.clear(self.index(meant), |known, _| known == tag(meant));
        }
    }

    /// What is cached now, sorted by source.
    pub fn entries(&self) -> Vec<(SourceId, CachedContext)> {
        let source = |tag: u64| SourceId::new(tag as u16);
        let words = self.sets.entries().into_iter();
        let mut entries: Vec<_> = words.map(|(tag, data)| (source(tag), from_data(data))).collect();
        entries.sort_unstable_by_key(|&(source, _)| source);
        entries
    }

    /// Fibonacci hashing: sources are often multiples of eight, and this spreads any such run evenly over the
    /// sets.
    #[inline]
    fn index(&self, source: SourceId) -> usize {
        (u64::from(source.get()).wrapping_mul(GOLDEN) >> (u64::BITS - 1 - self.index_bits) >> 1) as usize
    }
}

fn tag(source: SourceId) -> u64 {
    VALID | u64::from(source.get())
}

fn domain_of(data: u64) -> DomainId {
    DomainId::new((data >> DOMAIN_SHIFT) as u16)
}

fn to_data(context: CachedContext) -> u64 {
    let translation = match context.translation {
        ContextTranslation::PassThrough => PASS_THROUGH,
        ContextTranslation::SecondStage { table, levels } => {
            let page = table.page_number();
            assert!((3..=5).contains(&levels), "a walk checks the width first: {context:?}");
            assert!(
                table.page_offset() == 0 && page <= TABLE_MASK,
                "a walk checks reserved bits first: {context:?}"
            );
            u64::from(levels - 3) << LEVELS_SHIFT | page
        }
    };
    let disable = if context.fault_processing_disable { FAULT_PROCESSING_DISABLE } else { 0 };
    translation | disable | u64::from(context.domain_id.get()) << DOMAIN_SHIFT
}

fn from_data(data: u64) -> CachedContext {
    let translation = if data & PASS_THROUGH != 0 {
        ContextTranslation::PassThrough
    } else {
        ContextTranslation::SecondStage {
            table: Hpa::new((data & TABLE_MASK) << PAGE_SHIFT),
            levels: (data >> LEVELS_SHIFT & 3) as u8 + 3,
        }
    };
    CachedContext {
        domain_id: domain_of(data),
        translation,
        fault_processing_disable: data & FAULT_PROCESSING_DISABLE != 0,
    }
}
