//! Domain options on the wire: every choice arrives, zero asks for the usual one, and what makes no sense is named by its path.

mod wire;

use expect_test::{Expect, expect};
use iommu_proto::model::CreateDomain;
use iommu_proto::pb;
use iommu_types::{
    BouncePool, Deferral, DomainOptions, IovaAllocation, MappingGranularity, PersistentQuota, Protection,
    Rings, WalkCachePolicy,
};
use pb::domain_options::Parameters;
use wire::{check, header, wrong};

#[test]
fn every_choice_arrives_as_it_is_sent() {
    let unusual = [
        Protection::Deferred(Deferral { batch: 1, interval_ms: 10_000 }),
        Protection::Persistent(PersistentQuota { pages_max: 1 }),
        Protection::Bounce(BouncePool { bytes_max: 1 << 30 }),
        Protection::Ring(Rings { count: 256, slots: 65_536 }),
    ];
    let mut sent = 0;
    for protection in Protection::ALL.into_iter().chain(unusual) {
        for granularity in [MappingGranularity::Page, MappingGranularity::Byte] {
            let options = DomainOptions::new(protection).with_granularity(granularity);
            if options.check().is_err() {
                continue;
            }
            for allocator in [IovaAllocation::Classic, IovaAllocation::Cached] {
                for walk_cache in [WalkCachePolicy::OnReclaim, WalkCachePolicy::OnEveryUnmap] {
                    for width_bits in [39, 48, 57] {
                        let options = options
                            .with_allocator(allocator)
                            .with_walk_cache(walk_cache)
                            .with_width(width_bits)
                            .with_sanitizer(width_bits == 57);
                        check::<pb::CreateDomainRequest, _>(CreateDomain { header: header(), options });
                        sent += 1;
                    }
                }
            }
        }
    }
    assert_eq!(sent, 17 * 2 * 2 * 3, "11 modes, of which 6 have both granularities");
}

#[test]
fn zero_is_the_usual_choice_of_the_mode() {
    for (wire, expected) in [
        (pb::Protection::Passthrough, Protection::Passthrough),
        (pb::Protection::Strict, Protection::Strict),
        (pb::Protection::Deferred, Protection::DEFERRED),
        (pb::Protection::Shared, Protection::Shared),
        (pb::Protection::Persistent, Protection::PERSISTENT),
        (pb::Protection::Bounce, Protection::BOUNCE),
        (pb::Protection::Ring, Protection::RING),
    ] {
        let wire = pb::DomainOptions { protection: wire.into(), ..Default::default() };
        assert_eq!(DomainOptions::try_from(wire), Ok(DomainOptions::new(expected)));
    }
}

#[test]
fn what_is_sent_says_every_choice() {
    for protection in Protection::ALL {
        let wire = pb::DomainOptions::from(DomainOptions::new(protection));
        let choices = [wire.protection, wire.granularity, wire.allocator, wire.walk_cache];
        assert!(choices.iter().all(|choice| *choice != 0) && wire.width_bits != 0, "{wire:?}");
        let bare = matches!(protection, Protection::Passthrough | Protection::Strict | Protection::Shared);
        assert_eq!(wire.parameters.is_none(), bare, "{wire:?}");
    }
}

fn refused(options: Option<pb::DomainOptions>, expected: Expect) {
    let header = Some(header().into());
    wrong::<_, CreateDomain>(pb::CreateDomainRequest { header, options }, expected);
}

fn mode(protection: pb::Protection, parameters: Option<Parameters>) -> pb::DomainOptions {
    pb::DomainOptions { protection: protection.into(), parameters, ..Default::default() }
}

#[test]
fn options_that_make_no_sense_are_named_by_their_path() {
    let strict = mode(pb::Protection::Strict, None);
    refused(None, expect!["options: is absent, or of a kind that this version does not know"]);
    refused(Some(pb::DomainOptions::default()), expect!["options.protection: is not given"]);
    refused(
        Some(pb::DomainOptions { protection: 8, ..strict }),
        expect!["options.protection: 8 is a value that this version does not know"],
    );
    refused(
        Some(pb::DomainOptions { allocator: 3, ..strict }),
        expect!["options.allocator: 3 is a value that this version does not know"],
    );
    refused(
        Some(pb::DomainOptions { granularity: -1, ..strict }),
        expect!["options.granularity: -1 is a value that this version does not know"],
    );
    refused(
        Some(pb::DomainOptions { walk_cache: 9, ..strict }),
        expect!["options.walk_cache: 9 is a value that this version does not know"],
    );
    refused(
        Some(pb::DomainOptions { width_bits: 40, ..strict }),
        expect!["options.width_bits: 40 is not a width; use 39, 48 or 57"],
    );
    refused(
        Some(pb::DomainOptions { width_bits: 304, ..strict }),
        expect!["options.width_bits: 304 is more than 255"],
    );
    let byte = pb::MappingGranularity::Byte.into();
    refused(
        Some(pb::DomainOptions { granularity: byte, ..mode(pb::Protection::Bounce, None) }),
        expect![
            "options.granularity: bounce shows the device no byte of the owner's pages, so byte adds nothing; use page"
        ],
    );
}

#[test]
fn parameters_are_checked_and_belong_to_their_mode() {
    let deferral = |batch, interval_ms| Some(Parameters::Deferred(pb::Deferral { batch, interval_ms }));
    let rings = |count, slots| Some(Parameters::Ring(pb::Rings { count, slots }));
    for (protection, parameters, expected) in [
        (
            pb::Protection::Strict,
            deferral(256, 10),
            expect![
                "options.deferred: are parameters of another mode than strict; leave them out, or ask for deferred"
            ],
        ),
        (
            pb::Protection::Deferred,
            Some(Parameters::Persistent(pb::PersistentQuota { pages_max: 4 })),
            expect![
                "options.persistent: are parameters of another mode than deferred; leave them out, or ask for persistent"
            ],
        ),
        (
            pb::Protection::Ring,
            Some(Parameters::Bounce(pb::BouncePool { bytes_max: 1 << 20 })),
            expect![
                "options.bounce: are parameters of another mode than ring; leave them out, or ask for bounce"
            ],
        ),
        (
            pb::Protection::Passthrough,
            rings(1, 2),
            expect![
                "options.ring: are parameters of another mode than passthrough; leave them out, or ask for ring"
            ],
        ),
        // A message of parameters that is there has no usual values: its zeros are zeros.
        (
            pb::Protection::Deferred,
            deferral(0, 10),
            expect!["options.deferred.batch: is 0, and must be between 1 and 32768"],
        ),
        (
            pb::Protection::Persistent,
            Some(Parameters::Persistent(pb::PersistentQuota { pages_max: 0 })),
            expect!["options.persistent.pages_max: is 0, and must be between 1 and 1048576"],
        ),
        (
            pb::Protection::Bounce,
            Some(Parameters::Bounce(pb::BouncePool { bytes_max: u64::MAX })),
            expect![
                "options.bounce.bytes_max: is 18446744073709551615, and must be between 1048576 and 1073741824"
            ],
        ),
        (pb::Protection::Ring, rings(65_536, 2), expect!["options.ring.count: 65536 is more than 65535"]),
        (
            pb::Protection::Ring,
            rings(257, 2),
            expect!["options.ring.count: is 257, and must be between 1 and 256"],
        ),
        (
            pb::Protection::Ring,
            rings(1, 1),
            expect!["options.ring.slots: is 1, and must be between 2 and 65536"],
        ),
    ] {
        refused(Some(mode(protection, parameters)), expected);
    }
}
