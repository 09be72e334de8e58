//! Random sequences against a twin that keeps a list of what is in use and works everything out from it.

use proptest::prelude::*;
use proptest::sample::Index;

use super::*;

/// 39 bits.
const END: u64 = 1 << 27;

/// One range in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Live {
    first: u64,
    pages: u64,
    is_exact: bool,
}

impl Live {
    /// The first page after it, and after what is rounded up.
    fn end(self) -> u64 {
        self.first + if self.is_exact { self.pages } else { rounded(self.pages).expect("small") }
    }
}

#[derive(Clone, Debug)]
enum Step {
    Allocate { pages: u64, limit: u64, client: u8 },
    Free { pick: Index, client: u8 },
    TakeExact { first: u64, pages: u64 },
    Trim,
}

fn step() -> impl Strategy<Value = Step> {
    let pages = || prop_oneof![3 => 1u64..20, 1 => 1u64..1200];
    let limit = prop_oneof![4 => Just(ANY), 2 => Just(LAST_32), 1 => Just(0x7_ffff), 2 => Just(0xfff), 2 => 0u64..1500];
    let client = || any::<u8>();
    prop_oneof![
        8 => (pages(), limit, client()).prop_map(|(pages, limit, client)| Step::Allocate { pages, limit, client }),
        5 => (any::<Index>(), client()).prop_map(|(pick, client)| Step::Free { pick, client }),
        2 => (1u64..4000, pages()).prop_map(|(first, pages)| Step::TakeExact { first, pages }),
        1 => Just(Step::Trim),
    ]
}

/// Whether there is room for an aligned range, from the list of what is in use.
fn has_room(live: &[Live], pages: u64, limit: u64) -> bool {
    let rounded = rounded(pages).expect("small");
    let alignment = rounded.min(512);
    let (interrupts, after) = INTERRUPT_PAGES;
    let mut walls = vec![(0, 1), (interrupts, after), (PAGE_4G, PAGE_4G), (END, END)];
    walls.extend(live.iter().map(|live| (live.first, live.end())));
    walls.sort_unstable();
    walls.windows(2).any(|pair| {
        let first = pair[0].1.next_multiple_of(alignment);
        first + rounded <= pair[1].0 && first + rounded - 1 <= limit
    })
}

fn run(kind: IovaAllocation, steps: &[Step]) -> Result<(), TestCaseError> {
    let mut iovas = IovaAllocator::new(kind, 39);
    let mut live: Vec<Live> = Vec::new();
    let mut allocations = 0;
    for step in steps {
        match *step {
            Step::Allocate { pages, limit, client } => match iovas.allocate(pages, limit, client) {
                Some(first) => {
                    let taken = Live { first, pages, is_exact: false };
                    prop_assert!(taken.end() - 1 <= limit, "{taken:?} beyond {limit:#x}");
                    prop_assert_eq!(first % rounded(pages).expect("small").min(512), 0, "{:?}", taken);
                    live.push(taken);
                    allocations += 1;
                }
                None => prop_assert!(!has_room(&live, pages, limit), "{pages} pages up to {limit:#x}"),
            },
            Step::TakeExact { first, pages } => {
                let taken = Live { first, pages, is_exact: true };
                let clashes = live.iter().any(|live| first < live.end() && live.first < taken.end());
                prop_assert_eq!(iovas.take_exact(first, pages), !clashes);
                live.extend((!clashes).then_some(taken));
            }
            Step::Free { .. } if live.is_empty() => {}
            Step::Free { pick, client } => free(&mut iovas, live.swap_remove(pick.index(live.len())), client),
            Step::Trim => {
                iovas.trim();
            }
        }
        let mut sorted = live.clone();
        sorted.sort_unstable();
        for pair in sorted.windows(2) {
            prop_assert!(pair[0].end() <= pair[1].first, "{:?} overlaps {:?}", pair[0], pair[1]);
        }
        let counters = iovas.counters();
        prop_assert_eq!((counters.live_ranges, counters.allocations), (live.len() as u64, allocations));
    }
    for live in live {
        free(&mut iovas, live, 0);
    }
    iovas.left_alone();
    prop_assert_eq!(iovas.free_ranges(), IovaAllocator::new(kind, 39).free_ranges());
    Ok(())
}

fn free(iovas: &mut IovaAllocator, live: Live, client: u8) {
    if live.is_exact {
        iovas.free_exact(live.first, live.pages);
    } else {
        iovas.free(live.first, live.pages, client);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn ranges_in_use_never_overlap_limits_hold_and_everything_comes_back(
        steps in prop::collection::vec(step(), 1..200)
    ) {
        run(Classic, &steps)?;
        run(Cached, &steps)?;
    }
}
