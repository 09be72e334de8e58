//! What the replay and the model must show, exactly: the same on every machine.

use super::configuration::Configuration as C;
use super::costs::Costs;
use super::counts::Counts;
use super::model::{Bill, EXPECTED};
use super::replay::Replay;
use super::workload::{Profile, Workload};

/// Small enough for a debug build.
const SMALL: Workload = Workload { profile: Profile::Mlx, descriptors: 256, burst: 200 };

fn counts(configuration: C, workload: Workload) -> Counts {
    let mut replay = Replay::new(configuration, workload).expect("a replay");
    replay.counted(workload.interrupts(4))
}

/// Invalidations per packet, exactly.
fn check_invalidations(configuration: C, workload: Workload, per_packet: f64) {
    let counted = counts(configuration, workload);
    assert_eq!(counted.invalidations, per_packet, "{} {}", configuration.name(), workload.name());
}

#[test]
fn invalidations_per_packet_are_what_the_mode_says() {
    for burst in [1, 16, 64, 200] {
        let two = Workload { burst, ..SMALL };
        let one = Workload { profile: Profile::Brcm, ..two };
        for (configuration, with_two, with_one) in [
            (C::Strict, 2.0, 1.0),
            (C::StrictCached, 2.0, 1.0),
            (C::Deferred, 2.0 / 256.0, 1.0 / 256.0),
            (C::DeferredCached, 2.0 / 256.0, 1.0 / 256.0),
            // One for each ring at the end of its burst.
            (C::Ring, 1.0 / f64::from(burst), 1.0 / f64::from(burst)),
            (C::Bounce, 0.0, 0.0),
            (C::Persistent, 0.0, 0.0),
            (C::Passthrough, 0.0, 0.0),
        ] {
            check_invalidations(configuration, two, with_two);
            check_invalidations(configuration, one, with_one);
        }
    }
}

#[test]
fn modelled_cycles_are_those_of_the_paper_and_in_its_order() {
    let costs = Costs::of_riommu_paper();
    let mut before = f64::INFINITY;
    for (configuration, expected) in EXPECTED {
        let cycles = Bill::of(configuration, &counts(configuration, SMALL), &costs).cycles();
        assert!((cycles / expected - 1.0).abs() <= 0.01, "{}: {cycles} of {expected}", configuration.name());
        assert!(cycles < before, "{}: {cycles} after {before}", configuration.name());
        before = cycles;
    }
}

#[test]
fn a_burst_reads_ring_tables_for_its_first_dma_only() {
    let workload = Workload { burst: 64, ..SMALL };
    let counted = counts(C::Ring, workload);
    let bursts = 1.0 / 64.0;
    assert_eq!(counted.ring_walks, bursts, "one walk for each ring and burst");
    assert_eq!(counted.ring_promotions, 2.0 - bursts, "every other DMA finds its slot prefetched");
    let each = counts(C::Ring, Workload { burst: 1, ..SMALL });
    let reads_per_walk = each.table_reads / each.ring_walks;
    assert_eq!(counted.table_reads, reads_per_walk * bursts, "no other DMA waits for a read");
}

#[test]
fn i9_nothing_is_used_again_before_its_flush() {
    for configuration in [C::Deferred, C::DeferredCached, C::StrictCached] {
        let mut replay = Replay::watched(configuration, Workload { burst: 16, ..SMALL }).expect("a replay");
        replay.run(40);
        let seen = replay.seen();
        let waiting_max = if configuration == C::StrictCached { 0 } else { 255 };
        assert_eq!(seen.waiting_max, waiting_max, "{}", configuration.name());
        assert!(seen.unmaps > 2000);
    }
}

#[test]
fn a_ring_serves_two_stale_slots_at_most_and_none_after_the_burst() {
    for burst in [1, 16, 200] {
        let mut replay = Replay::watched(C::Ring, Workload { burst, ..SMALL }).expect("a replay");
        replay.run(8);
        let seen = replay.seen();
        assert!(seen.stale_max <= 2 && seen.stale_max >= 1, "burst {burst}: {}", seen.stale_max);
        assert_eq!(seen.stale_after_burst_max, 0, "burst {burst}");
    }
}
