//! Generations: which walks may still fill a cache (I4).
//!
//! An invalidation *moves* the generation of what it covers before it clears anything; a walk notes the
//! generation before it reads anything, and its fill is dropped unless the generation still is what it was.
//! Between the move and the end of the clearing, a walk may read a paging-structure entry that is about to be
//! cleared and arrive at tables that are gone. Such a walk gets [`NEVER`]: what it finds may be used inside
//! its epoch, which the drain waits for, but is not cached.
//!
//! ```text
//!  word   63            16 15                    0
//!        [ started         | invalidations under way ]
//! ```
//!
//! Domains share a bounded number of words. Sharing one only drops more fills than it must, which a cache may
//! always do.

use std::sync::atomic::Ordering;

use iommu_types::{DomainId, Generation};

use super::atomics::{AtomicWord, Atomics};

/// The generation of a walk whose result must not be cached. No current generation equals it.
pub const NEVER: Generation = Generation(u64::MAX);

const STARTED_SHIFT: u32 = 16;
const ONE_STARTED: u64 = 1 << STARTED_SHIFT;
const UNDER_WAY: u64 = ONE_STARTED - 1;

/// Which word an invalidation moves.
#[derive(Clone, Copy, Debug)]
pub(super) enum Covered {
    Translations,
    TranslationsOf(DomainId),
    Contexts,
}

pub(super) struct Generations<A: Atomics> {
    translations: A::Word,
    contexts: A::Word,
    domains: Box<[A::Word]>,
}

impl<A: Atomics> Generations<A> {
    pub(super) fn new(words: usize) -> Self {
        assert!(words.is_power_of_two(), "domains are spread over a power of two of words");
        Self {
            translations: A::Word::new(0),
            contexts: A::Word::new(0),
            domains: (0..words).map(|_| A::Word::new(0)).collect(),
        }
    }

    /// Moves the generation and marks an invalidation as under way. What the caller reads from now on is
    /// ordered after the move (the fence pairs with the one that a fill passes between locking its set and
    /// asking [`Self::is_current`]).
    pub(super) fn begin(&self, covered: Covered) {
        let before = self.word(covered).fetch_add(ONE_STARTED + 1, Ordering::AcqRel);
        assert!(before & UNDER_WAY < UNDER_WAY, "fewer invalidations than threads");
        A::fence(Ordering::SeqCst);
    }

    /// The caches are clear: walks that begin after seeing this may fill them.
    pub(super) fn end(&self, covered: Covered) {
        self.word(covered).fetch_sub(1, Ordering::Release);
    }

    /// For a walk that begins now, through a context that was looked up under `context`.
    ///
    /// The context is asked about *after* the domain. An invalidation of the domain that follows one of the
    /// context is therefore never seen without it, and tables that only a forgotten context leads to fill
    /// nothing. A context that was looked up under [`NEVER`] may be one that was about to be forgotten, and
    /// that it is [`NEVER`] again now does not make it the same.
    pub(super) fn of_walk(&self, domain: DomainId, context: Generation) -> Generation {
        let all = self.translations.load(Ordering::Acquire);
        let own = self.word(Covered::TranslationsOf(domain)).load(Ordering::Acquire);
        if (all | own) & UNDER_WAY != 0 || context == NEVER || self.of_contexts() != context {
            return NEVER;
        }
        sum(all, own)
    }

    /// For a look at the context cache or the context tables that begins now.
    pub(super) fn of_contexts(&self) -> Generation {
        let word = self.contexts.load(Ordering::Acquire);
        if word & UNDER_WAY == 0 { Generation(word >> STARTED_SHIFT) } else { NEVER }
    }

    /// Asked by a fill, behind a sequentially consistent fence and holding its set's lock. Both words only
    /// grow, so their sum is what it was only if each is.
    pub(super) fn is_current(&self, domain: DomainId, walked_under: Generation) -> bool {
        let all = self.translations.load(Ordering::Relaxed);
        let own = self.word(Covered::TranslationsOf(domain)).load(Ordering::Relaxed);
        sum(all, own) == walked_under
    }

    /// As [`Self::is_current`], for contexts.
    pub(super) fn is_current_context(&self, walked_under: Generation) -> bool {
        Generation(self.contexts.load(Ordering::Relaxed) >> STARTED_SHIFT) == walked_under
    }

    fn word(&self, covered: Covered) -> &A::Word {
        match covered {
            Covered::Translations => &self.translations,
            Covered::Contexts => &self.contexts,
            // An odd factor permutes the words and keeps neighbouring domains off one cache line.
            Covered::TranslationsOf(domain) => {
                let spread = usize::from(domain.get().wrapping_mul(0x9e37));
                &self.domains[spread & (self.domains.len() - 1)]
            }
        }
    }
}

fn sum(all: u64, own: u64) -> Generation {
    Generation((all >> STARTED_SHIFT) + (own >> STARTED_SHIFT))
}
