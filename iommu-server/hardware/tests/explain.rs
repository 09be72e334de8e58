//! Explain says what translate does: over sound and nonsense tables, with fresh and with stale caches; and it changes nothing.

mod machine;

use expect_test::expect;
use iommu_hardware::vtd::{Port, Request};
use iommu_types::{
    Access, AddressType, CacheState, Capabilities, Explanation, Hpa, Invalidation, Iova, Outcome, Pasid,
    Permissions, Structure, TranslationFault,
};
use machine::{DEVICE, Machine, ROOT, RW};
use proptest::prelude::*;

fn ask(machine: &Machine, request: Request) -> Explanation {
    machine.bare.unit().explain(DEVICE, request.pasid, request.iova, request.access, request.size_bytes)
}

fn translate(port: &mut Port, request: Request) -> Result<Hpa, TranslationFault> {
    port.burst().translate(request, |lent| lent.hpa)
}

/// What Explain expects of translate, where it says so.
fn expected(explanation: &Explanation) -> Result<Hpa, TranslationFault> {
    if let Some(stale) = explanation.stale {
        return Ok(stale.hpa);
    }
    match explanation.outcome {
        Outcome::Translated(translation) => Ok(translation.hpa),
        Outcome::Untranslated(hpa) => Ok(hpa),
        Outcome::Refused(fault) => Err(fault),
        Outcome::Interrupt => unreachable!("no 4-byte write is asked about"),
    }
}

/// Tables: the root, four frames that serve as context or page tables, and two frames of data.
const TABLES: [u64; 4] = [0x20_0000, 0x20_1000, 0x20_2000, 0x20_3000];

/// A word of a table: mostly a pointer with sensible bits, sometimes nonsense.
fn word() -> impl Strategy<Value = u64> {
    let pointer = prop_oneof![
        6 => proptest::sample::select(&TABLES[..]),
        1 => Just(0x40_0000),           // a frame, aligned to 2 MiB
        1 => Just(0x4000_0000),         // aligned to 1 GiB, beyond memory
        1 => Just(0xfee0_0000),
        1 => Just(1 << 46),
    ];
    let low = prop_oneof![8 => Just(3u64), 2 => Just(1), 2 => Just(2), 1 => Just(0), 2 => Just(0x83), 1 => Just(0x81), 1 => 0..0x1000u64];
    prop_oneof![
        12 => (pointer, low).prop_map(|(pointer, low)| pointer | low),
        1 => any::<u64>(),
        2 => Just(0),
    ]
}

fn context_word() -> impl Strategy<Value = u128> {
    let sound = (proptest::sample::select(&TABLES[..]), 1..4u128, 0..3u128, any::<bool>()).prop_map(
        |(table, width, domain, fpd)| {
            u128::from(table) | 1 | u128::from(fpd) << 1 | width << 64 | domain << 72
        },
    );
    let pass_through = Just(1 | 2 << 2 | 3 << 64 | 5 << 72);
    prop_oneof![8 => sound, 1 => pass_through, 1 => any::<u128>(), 1 => Just(2)]
}

#[derive(Clone, Debug)]
enum Step {
    Root(u64),
    Context(u128),
    Word(usize, u64, u64),
    Invalidate(Invalidation),
    Ask(Request),
}

fn request() -> impl Strategy<Value = Request> {
    let index = || 0..2u64;
    let address = prop_oneof![
        12 => (index(), index(), index(), index(), index()).prop_map(|(a, b, c, d, e)| a << 48 | b << 39 | c << 30 | d << 21 | e << 12),
        1 => Just(0xfee0_1000),
        1 => any::<u64>().prop_map(|address| address & !0xfff),
    ];
    let access = prop_oneof![3 => Just(Access::Read), 2 => Just(Access::Write), 1 => Just(Access::Atomic)];
    let pasid = prop_oneof![20 => Just(None), 1 => Just(Pasid::new(3))];
    let size = prop_oneof![1 => Just(0u32), 6 => Just(8u32)];
    (address, access, size, pasid).prop_map(|(address, access, size_bytes, pasid)| {
        let size_bytes = if access == Access::Read { size_bytes } else { 8 };
        Request {
            iova: Iova::new(address),
            size_bytes,
            access,
            pasid,
            address_type: AddressType::Untranslated,
        }
    })
}

fn step() -> impl Strategy<Value = Step> {
    let invalidations = vec![
        Invalidation::ContextGlobal,
        Invalidation::IotlbGlobal,
        Invalidation::IotlbDomain(iommu_types::DomainId::new(1)),
    ];
    prop_oneof![
        1 => prop_oneof![6 => Just(TABLES[0] | 1), 1 => any::<u64>()].prop_map(Step::Root),
        4 => context_word().prop_map(Step::Context),
        12 => (0..4usize, 0..3u64, word()).prop_map(|(table, index, word)| Step::Word(table, index, word)),
        2 => proptest::sample::select(invalidations).prop_map(Step::Invalidate),
        16 => request().prop_map(Step::Ask),
    ]
}

proptest! {
    #![proptest_config(machine::cases(96))]
    #[test]
    fn explain_agrees_with_translate_over_any_tables(
        steps in proptest::collection::vec(step(), 1..120),
        with_stale_caches in any::<bool>(),
        caching_mode in any::<bool>(),
    ) {
        let machine = Machine::translating(Capabilities { caching_mode, ..Capabilities::FULL });
        let root_at = Hpa::new(ROOT.get() + 16 * u64::from(DEVICE.bus()));
        let context_at = Hpa::new(TABLES[0] + 16 * u64::from(DEVICE.devfn()));
        machine.store(root_at, TABLES[0] | 1);
        // Every table leads to itself and to its neighbours from the start.
        for (index, table) in TABLES.iter().enumerate() {
            machine.store(Hpa::new(*table), TABLES[(index + 1) % 4] | 3);
            machine.store(Hpa::new(table + 8), TABLES[(index + 2) % 4] | 3);
        }
        let sound = 1 | 2 << 64 | u128::from(TABLES[1]) | 1 << 72;
        machine.store_wide(context_at, sound);
        let mut port = machine.port(DEVICE);
        for step in steps {
            match step {
                Step::Root(word) => machine.store(root_at, word),
                Step::Context(word) => machine.store_wide(context_at, word),
                Step::Word(table, index, word) => machine.store(Hpa::new(TABLES[table] + 8 * index), word),
                Step::Invalidate(what) => machine.invalidate(what),
                Step::Ask(request) => {
                    if !with_stale_caches {
                        machine.invalidate(Invalidation::ContextGlobal);
                        machine.invalidate(Invalidation::IotlbGlobal);
                    }
                    let before = (machine.bare.unit().counters(), machine.bare.unit().iotlb_entries());
                    let explanation = ask(&machine, request);
                    let after = (machine.bare.unit().counters(), machine.bare.unit().iotlb_entries());
                    prop_assert_eq!(before, after, "Explain changes nothing");
                    let suppressed = machine.bare.unit().counters().faults_suppressed;
                    let result = translate(&mut port, request);
                    if !with_stale_caches {
                        prop_assert_eq!(explanation.stale, None);
                        prop_assert!(!explanation.conclusion.contains("stale"));
                    }
                    let agrees = result == expected(&explanation);
                    let told = explanation.conclusion.contains("stale cached entry");
                    prop_assert!(agrees || told, "{:?}, but translate says {:?}", explanation, result);
                    // FPD of a stale cached context may differ from what the tables say.
                    if agrees && !with_stale_caches {
                        let now = machine.bare.unit().counters().faults_suppressed;
                        prop_assert_eq!(now - suppressed, u64::from(explanation.fault_suppressed && result.is_err()));
                    }
                }
            }
        }
    }
}

fn read(iova: u64) -> Request {
    Request {
        iova: Iova::new(iova),
        size_bytes: 8,
        access: Access::Read,
        pasid: None,
        address_type: AddressType::Untranslated,
    }
}

#[test]
fn a_refused_access_is_explained_step_by_step() {
    let (machine, table) = Machine::with_domain(Capabilities::FULL);
    machine.map(table, 0x7000, Hpa::new(0x40_0000), Permissions::READ);
    let request = Request { access: Access::Write, ..read(0x7008) };
    let explanation = ask(&machine, request);
    let steps: Vec<String> = explanation
        .steps
        .iter()
        .map(|step| format!("{:?}[{}] {}", step.structure, step.index, step.reading))
        .collect();
    expect![[r#"
        Root[3] present, context table hpa:0x101000
        Context[16] present, 48-bit, domain 7, table hpa:0x100000
        SecondStage { level: 4 }[0] present, rw, table hpa:0x102000
        SecondStage { level: 3 }[0] present, rw, table hpa:0x103000
        SecondStage { level: 2 }[0] present, rw, table hpa:0x104000
        SecondStage { level: 1 }[7] present, r-, 4 KiB page hpa:0x400000"#]]
    .assert_eq(&steps.join("\n"));
    expect!["The write at iova:0x7008 by 03:02.0 is refused: 0x05 the tables give no write permission (entry 7 of the level-1 table decides)."]
        .assert_eq(&explanation.conclusion);
    assert_eq!(
        explanation.steps.last().map(|step| step.structure),
        Some(Structure::SecondStage { level: 1 })
    );
    assert_eq!(machine.bare.unit().counters().faults, 0);
}

#[test]
fn a_stale_translation_is_told_with_both_its_ends() {
    let (machine, table) = Machine::with_domain(Capabilities::FULL);
    machine.map(table, 0x7000, Hpa::new(0x40_0000), RW);
    assert!(machine.read_byte(0x7000).is_ok());
    machine.unmap(table, 0x7000);
    let explanation = ask(&machine, read(0x7010));
    assert_eq!(explanation.stale.map(|stale| stale.hpa), Some(Hpa::new(0x40_0010)));
    assert!(matches!(explanation.context_cache, CacheState::Hit { .. }));
    assert!(matches!(explanation.iotlb, CacheState::Hit { .. }));
    expect!["The read at iova:0x7010 by 03:02.0 is refused: 0x06 the tables give no read permission (nothing is mapped there: entry 7 of the level-1 table is not present) by the tables, but a stale cached entry still leads it to hpa:0x400010."]
        .assert_eq(&explanation.conclusion);
}

#[test]
fn accesses_that_no_table_decides_are_explained_too() {
    let machine = Machine::new(Capabilities::FULL);
    let off = ask(&machine, read(0x5000));
    assert_eq!((off.outcome, &off.iotlb), (Outcome::Untranslated(Hpa::new(0x5000)), &CacheState::NotAsked));
    let message = Request {
        iova: Iova::new(0xfee0_0000),
        size_bytes: 4,
        access: Access::Write,
        pasid: None,
        address_type: AddressType::Untranslated,
    };
    assert_eq!(ask(&machine, message).outcome, Outcome::Interrupt);
    let (machine, _) = Machine::with_domain(Capabilities::FULL);
    let refused = |request| match ask(&machine, request).outcome {
        Outcome::Refused(fault) => fault.reason.0,
        outcome => panic!("{outcome:?}"),
    };
    assert_eq!(refused(read(0xfee0_0000)), 0x29);
    assert_eq!(refused(Request { pasid: Pasid::new(1), ..read(0x5000) }), 0x31);
}
