//! Random maps, unmaps, syncs, DMA, frees and time in every mode and granularity, with the sanitizer on, against a flat twin.
//!
//! After every step: memory is byte for byte what the twin has; a DMA went through or was refused as the twin allows, for the reason that it
//! gives; a call that failed names a cause that there is, and changed nothing; no address and no frame is used again before what used it is
//! invalidated and drained (I9); and the sanitizer reported exactly what a judge reports who reads lists. At the end everything is back.

mod dma;
#[path = "../fixture/mod.rs"]
mod fixture;
mod found;
mod judge;
mod maps;
mod run;
mod steps;
mod twin;
mod unmaps;

use proptest::prelude::*;

use run::Run;
use steps::{any_options, any_step};

proptest! {
    #![proptest_config(ProptestConfig { cases: 160, max_shrink_iters: 1500, ..ProptestConfig::default() })]
    #[test]
    fn i2_i9_every_mode_does_what_the_flat_twin_does_and_the_sanitizer_says_so(
        options in any_options(),
        has_few_mappings in prop::bool::weighted(0.3),
        steps in prop::collection::vec(any_step(), 1..110),
    ) {
        let mut run = Run::new(options, has_few_mappings);
        for step in steps {
            run.step(step)?;
            run.check()?;
        }
        run.end()?;
    }
}
