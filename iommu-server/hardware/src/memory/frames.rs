//! The frame array: who owns each frame of RAM, and how many mappings hold it.
//!
//! **Architecture invariant (I9):** no frame changes owner while a translation to it exists or a DMA through one is in flight.
//! The kernel floor pins a frame *before* it writes a table entry that leads to it, and unpins it only *after* the entry
//! was flushed from every cache and the DMA drained; so a frame without pins is reached by nobody, and
//! [`FrameArray::transfer`] moves only such frames. Owner and pins stand in one word, so that the check and the change are one
//! atomic step and no pin can slip in between.
//!
//! One little-endian word per frame, in physical memory itself, in the order of the frames (low RAM, then high RAM; the hole has
//! no words):
//!
//! ```text
//!  63                             33   32   31                              0
//! ┌─────────────────────────────────┬───────┬────────────────────────────────┐
//! │ pins                            │leaving│ owner: 0 none, 1 the server    │
//! └─────────────────────────────────┴───────┴────────────────────────────────┘
//! ```
//!
//! All zero is a free frame. A *leaving* frame takes no new pin; it may still be unpinned and transferred.

use std::sync::Arc;

use iommu_types::{Hpa, HpaRange, PAGE_SIZE_BYTES};

use super::PhysicalMemory;

/// Owner of a free frame: nobody.
pub const OWNER_NONE: u32 = 0;
/// Owner of the frames of the server itself: tables, records, this array.
pub const OWNER_SERVER: u32 = 1;

const WORD_BYTES: u64 = size_of::<u64>() as u64;
const LEAVING: u64 = 1 << 32;
const PINS_SHIFT: u32 = 33;
const PINS_MAX: u32 = (1 << 31) - 1;

/// What the array says of one frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameState {
    /// Who owns the frame: [`OWNER_NONE`], [`OWNER_SERVER`] or a number of the kernel floor's.
    pub owner: u32,
    /// Whether the frame is about to leave its owner and takes no new pin.
    pub leaving: bool,
    /// How many mappings lead to the frame, those whose removal still drains included.
    pub pins: u32,
}

impl FrameState {
    fn from_word(word: u64) -> Self {
        Self { owner: word as u32, leaving: word & LEAVING != 0, pins: (word >> PINS_SHIFT) as u32 }
    }

    fn word(self) -> u64 {
        let leaving = if self.leaving { LEAVING } else { 0 };
        u64::from(self.owner) | leaving | u64::from(self.pins) << PINS_SHIFT
    }
}

/// Why a frame was not pinned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PinError {
    /// The frame belongs to someone else, to nobody, or is not RAM.
    #[error("not the owner")]
    NotOwner,
    /// The frame is about to leave its owner.
    #[error("frame is leaving")]
    Leaving,
    /// The pin count is at its maximum.
    #[error("too many pins")]
    Saturated,
}

/// Why a frame did not change owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TransferError {
    /// So many mappings still lead to the frame.
    #[error("frame has {0} pins")]
    Pinned(u32),
    /// The frame does not belong to the giver, or is not RAM.
    #[error("not the owner")]
    NotOwner,
}

/// Owner and pins of every frame of a [`PhysicalMemory`], kept in that memory.
#[derive(Clone, Debug)]
pub struct FrameArray {
    memory: Arc<PhysicalMemory>,
    base: Hpa,
}

impl FrameArray {
    /// Bytes that the array of `memory` takes, rounded up to whole frames.
    pub fn bytes_needed(memory: &PhysicalMemory) -> u64 {
        (memory.size_bytes() / PAGE_SIZE_BYTES * WORD_BYTES).next_multiple_of(PAGE_SIZE_BYTES)
    }

    /// The array of `memory`, at `base`: [`bytes_needed`](Self::bytes_needed) bytes of RAM from a frame's start. What stands
    /// there is taken as it is; zeros are free frames.
    pub fn new(memory: Arc<PhysicalMemory>, base: Hpa) -> Self {
        let range =
            HpaRange::new(base, Self::bytes_needed(&memory)).expect("no region ends at the end of the space");
        assert!(
            base.is_aligned(PAGE_SIZE_BYTES) && memory.contains(range),
            "the frame array lies in RAM: {range}"
        );
        Self { memory, base }
    }

    /// What the array says of the frame that holds `frame`, or `None` where there is no RAM.
    pub fn state(&self, frame: Hpa) -> Option<FrameState> {
        self.place(frame).map(|at| FrameState::from_word(self.load(at)))
    }

    /// Takes one pin on a frame of `owner`, before a table entry leads to it (I9).
    #[inline]
    pub fn pin(&self, frame: Hpa, owner: u32) -> Result<(), PinError> {
        let at = self.place(frame).ok_or(PinError::NotOwner)?;
        self.update(at, |state| match state {
            _ if state.owner != owner || owner == OWNER_NONE => Err(PinError::NotOwner),
            FrameState { leaving: true, .. } => Err(PinError::Leaving),
            FrameState { pins: PINS_MAX, .. } => Err(PinError::Saturated),
            FrameState { pins, .. } => Ok(FrameState { pins: pins + 1, ..state }),
        })
    }

    /// Gives one pin back, after the entry was flushed and the DMA drained (I9).
    #[inline]
    pub fn unpin(&self, frame: Hpa) {
        let at = self.place_of_ours(frame);
        let unpinned = self.update(at, |state| match state.pins.checked_sub(1) {
            Some(pins) => Ok(FrameState { pins, ..state }),
            None => Err(state),
        });
        assert!(unpinned.is_ok(), "only what was pinned is unpinned: {frame}, {unpinned:?}");
    }

    /// Gives a frame without pins from one owner to another, and in one step with it ends its leaving (I9).
    pub fn transfer(&self, frame: Hpa, from: u32, to: u32) -> Result<(), TransferError> {
        let at = self.place(frame).ok_or(TransferError::NotOwner)?;
        self.update(at, |state| match state {
            _ if state.owner != from => Err(TransferError::NotOwner),
            FrameState { pins: 0, .. } => Ok(FrameState { owner: to, leaving: false, pins: 0 }),
            FrameState { pins, .. } => Err(TransferError::Pinned(pins)),
        })
    }

    /// Says that a frame takes no new pin, or takes them again.
    pub fn set_leaving(&self, frame: Hpa, leaving: bool) {
        let at = self.place_of_ours(frame);
        let Ok(()) =
            self.update(at, |state| Ok::<_, std::convert::Infallible>(FrameState { leaving, ..state }));
    }

    /// Where the word of a frame is, or `None` where there is no RAM.
    fn place(&self, frame: Hpa) -> Option<Hpa> {
        self.base.checked_add(self.memory.frame_index(frame)? * WORD_BYTES)
    }

    fn place_of_ours(&self, frame: Hpa) -> Hpa {
        self.place(frame).unwrap_or_else(|| panic!("only frames of RAM are counted: {frame}"))
    }

    fn load(&self, at: Hpa) -> u64 {
        self.memory.load_u64(at).expect("the array lies in RAM")
    }

    /// Changes one word in one atomic step, or leaves it alone when `change` refuses what it finds.
    fn update<E>(&self, at: Hpa, change: impl Fn(FrameState) -> Result<FrameState, E>) -> Result<(), E> {
        let mut seen = self.load(at);
        loop {
            let new = change(FrameState::from_word(seen))?.word();
            match self.memory.compare_exchange_u64(at, seen, new).expect("the array lies in RAM") {
                Ok(_) => return Ok(()),
                Err(other) => seen = other,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use iommu_types::PAGE_SIZE_BYTES as PAGE;
    use proptest::prelude::*;
    use std::collections::HashMap;
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

    const A: u32 = 7;
    const B: u32 = 8;

    fn array() -> FrameArray {
        let memory = Arc::new(PhysicalMemory::bare(1 << 20).expect("memory"));
        FrameArray::new(memory, Hpa::new(0x8000))
    }

    fn frame(number: u64) -> Hpa {
        Hpa::new(number * PAGE)
    }

    fn owned(frames: &FrameArray, number: u64) -> Hpa {
        frames.transfer(frame(number), OWNER_NONE, A).expect("a free frame");
        frame(number)
    }

    #[test]
    fn the_word_of_a_frame_has_its_golden_bytes() {
        let frames = array();
        let at = frame(2);
        frames.transfer(at, OWNER_NONE, 0x1122_3344).expect("free");
        for _ in 0..5 {
            frames.pin(at, 0x1122_3344).expect("owned");
        }
        frames.set_leaving(at, true);
        let mut bytes = [0; 24];
        frames.memory.read(Hpa::new(0x8000 + 8), &mut bytes).expect("inside");
        #[rustfmt::skip]
        assert_eq!(bytes, [
            0, 0, 0, 0, 0, 0, 0, 0,
            0x44, 0x33, 0x22, 0x11, 0b0000_1011, 0, 0, 0, // pins 5 from bit 33, leaving in bit 32
            0, 0, 0, 0, 0, 0, 0, 0,
        ]);
    }

    #[test]
    fn frames_beyond_the_hole_follow_those_before_it() {
        let size_bytes = crate::memory::LOW_RAM_BYTES_MAX + (4 << 20);
        let config = crate::memory::MemoryConfig { size_bytes, backing: crate::memory::Backing::Memfd };
        let memory = Arc::new(PhysicalMemory::new(&config).expect("memory"));
        assert_eq!(FrameArray::bytes_needed(&memory), size_bytes / 512);
        let frames = FrameArray::new(Arc::clone(&memory), Hpa::new(0));
        let first_high = crate::memory::HIGH_RAM_BASE;
        frames.transfer(first_high, OWNER_NONE, A).expect("free");
        let place = Hpa::new(crate::memory::LOW_RAM_BYTES_MAX / PAGE * 8);
        assert_eq!(memory.load_u64(place), Ok(u64::from(A)));
        assert_eq!(frames.state(Hpa::new(crate::memory::LOW_RAM_BYTES_MAX)), None);
        assert_eq!(frames.state(Hpa::new(first_high.get() + (4 << 20))), None);
    }

    #[test]
    fn i9_a_pinned_frame_does_not_change_owner() {
        let frames = array();
        let at = owned(&frames, 3);
        frames.pin(at, A).expect("owned");
        frames.pin(Hpa::new(at.get() + 0xabc), A).expect("any address of the frame names it");
        assert_eq!(frames.transfer(at, A, B), Err(TransferError::Pinned(2)));
        frames.set_leaving(at, true);
        assert_eq!(frames.transfer(at, A, B), Err(TransferError::Pinned(2)), "leaving is not gone");
        frames.unpin(at);
        frames.unpin(at);
        assert_eq!(frames.transfer(at, A, B), Ok(()));
        assert_eq!(frames.state(at), Some(FrameState { owner: B, leaving: false, pins: 0 }));
    }

    #[test]
    fn a_refused_step_changes_nothing() {
        let frames = array();
        let at = owned(&frames, 3);
        assert_eq!(frames.pin(at, B), Err(PinError::NotOwner));
        assert_eq!(frames.pin(frame(4), OWNER_NONE), Err(PinError::NotOwner), "a free frame has no owner");
        assert_eq!(frames.transfer(at, B, A), Err(TransferError::NotOwner));
        assert_eq!(frames.state(at), Some(FrameState { owner: A, leaving: false, pins: 0 }));
        frames.set_leaving(at, true);
        assert_eq!(frames.pin(at, A), Err(PinError::Leaving));
        frames.set_leaving(at, false);
        assert_eq!(frames.pin(at, A), Ok(()));
        let nowhere = Hpa::new(1 << 20);
        assert_eq!(frames.pin(nowhere, A), Err(PinError::NotOwner));
        assert_eq!(frames.transfer(nowhere, A, B), Err(TransferError::NotOwner));
        assert_eq!(frames.state(nowhere), None);
    }

    #[test]
    fn a_full_pin_count_refuses_instead_of_wrapping() {
        let frames = array();
        let full = FrameState { owner: A, leaving: false, pins: PINS_MAX };
        frames.memory.store_u64(Hpa::new(0x8000), full.word()).expect("inside");
        assert_eq!(frames.pin(frame(0), A), Err(PinError::Saturated));
        assert_eq!(frames.state(frame(0)), Some(full));
    }

    #[test]
    fn unpinning_what_nobody_pinned_stops_the_server() {
        let frames = array();
        let at = owned(&frames, 1);
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| frames.unpin(at)));
        assert!(caught.is_err());
        assert_eq!(frames.state(at), Some(FrameState { owner: A, leaving: false, pins: 0 }));
    }

    /// Pinners hold a frame for a moment, during which its owner must not change, while transfers try to move it.
    #[test]
    fn i9_no_transfer_succeeds_between_a_pin_and_its_unpin() {
        let frames = array();
        let at = owned(&frames, 5);
        let stop = AtomicBool::new(false);
        let held = AtomicU64::new(0);
        std::thread::scope(|threads| {
            let pinners: Vec<_> = [A, B]
                .map(|owner| {
                    let (frames, held) = (&frames, &held);
                    threads.spawn(move || {
                        // Until each owner has had its pins: who runs when is the scheduler's.
                        let mut pins = 0;
                        while pins < 500 {
                            if frames.pin(at, owner).is_ok() {
                                let state = frames.state(at).expect("RAM");
                                assert_eq!(state.owner, owner, "the frame moved under a pin");
                                assert!(state.pins >= 1);
                                pins += 1;
                                held.fetch_add(1, Ordering::Relaxed);
                                frames.unpin(at);
                            } else {
                                std::thread::yield_now();
                            }
                        }
                    })
                })
                .into();
            threads.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let _ = frames.transfer(at, A, B);
                    let _ = frames.transfer(at, B, A);
                }
            });
            let outcomes: Vec<_> = pinners.into_iter().map(|pinner| pinner.join()).collect();
            stop.store(true, Ordering::Relaxed);
            assert!(outcomes.iter().all(Result::is_ok), "a pinner saw its frame move");
        });
        assert!(held.load(Ordering::Relaxed) > 0, "nobody ever got a pin, so nothing was tested");
        assert_eq!(frames.state(at).map(|state| state.pins), Some(0));
    }

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Pin(u64, u32),
        Unpin(u64),
        Transfer(u64, u32, u32),
        SetLeaving(u64, bool),
    }

    fn step() -> impl Strategy<Value = Step> {
        let number = 0..4_u64;
        let owner = 0..3_u32;
        prop_oneof![
            3 => (number.clone(), owner.clone()).prop_map(|(f, o)| Step::Pin(f, o)),
            2 => number.clone().prop_map(Step::Unpin),
            3 => (number.clone(), owner.clone(), owner).prop_map(|(f, from, to)| Step::Transfer(f, from, to)),
            1 => (number, any::<bool>()).prop_map(|(f, leaving)| Step::SetLeaving(f, leaving)),
        ]
    }

    /// The stupid twin: a map of three loose fields, updated by the sentences of the contract.
    #[derive(Default)]
    struct Twin(HashMap<u64, (u32, bool, u32)>);

    impl Twin {
        fn run(&mut self, step: Step) -> bool {
            match step {
                Step::Pin(f, owner) => {
                    let (has, leaving, pins) = self.0.entry(f).or_default();
                    let allowed = *has == owner && owner != 0 && !*leaving;
                    *pins += u32::from(allowed);
                    allowed
                }
                Step::Unpin(f) => {
                    let (_, _, pins) = self.0.entry(f).or_default();
                    let allowed = *pins > 0;
                    *pins -= u32::from(allowed);
                    allowed
                }
                Step::Transfer(f, from, to) => {
                    let entry = self.0.entry(f).or_default();
                    let allowed = entry.0 == from && entry.2 == 0;
                    if allowed {
                        *entry = (to, false, 0);
                    }
                    allowed
                }
                Step::SetLeaving(f, leaving) => {
                    self.0.entry(f).or_default().1 = leaving;
                    true
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
        #[test]
        fn the_array_agrees_with_a_flat_twin(steps in prop::collection::vec(step(), 1..200)) {
            let frames = array();
            let mut twin = Twin::default();
            for step in steps {
                let expected = twin.run(step);
                match step {
                    Step::Pin(f, owner) => prop_assert_eq!(frames.pin(frame(f), owner).is_ok(), expected),
                    Step::Unpin(f) if expected => frames.unpin(frame(f)),
                    Step::Unpin(_) => {}
                    Step::Transfer(f, from, to) => {
                        prop_assert_eq!(frames.transfer(frame(f), from, to).is_ok(), expected);
                    }
                    Step::SetLeaving(f, leaving) => frames.set_leaving(frame(f), leaving),
                }
                for f in 0..4 {
                    let (owner, leaving, pins) = twin.0.get(&f).copied().unwrap_or_default();
                    prop_assert_eq!(frames.state(frame(f)), Some(FrameState { owner, leaving, pins }));
                }
            }
        }
    }
}
