//! The fault log: recording registers, fault status and the fault event (VT-d 5.10 §7.2).
//!
//! ```text
//!            F=0             F=1 (pending)        software writes 1 to F
//!   index -> [   ] -record-> [ SID FR FI ] --------------------------------> [   ]
//!
//!   PPF = any F · FRI = the record that made PPF 1 · PFO = a fault found its register still pending
//! ```
//!
//! **Architecture invariant (I6):** every refused request is exactly one of recorded, collapsed into the pending record of its
//! source, overflowed or suppressed. Collapsing keeps one source from filling the registers, so that it cannot hide what
//! others did (I7).

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use iommu_types::Fault;

use super::counters::Counters;
use super::event::{EventRegisters, EventSink};
use super::spec::registers::{FaultRecord, Fsts};

/// A recorded fault, decoded from a fault recording register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordedFault {
    /// The fault. Its address is that of the page: FI has no low 12 bits.
    pub fault: Fault,
    /// Further faults of the same source that were collapsed into the record while it was pending.
    pub collapsed_count: u32,
}

/// A fault recording register and what was collapsed into it.
#[derive(Clone, Copy, Default)]
struct Recording {
    register: FaultRecord,
    collapsed_count: u32,
}

impl Recording {
    fn is_pending(&self) -> bool {
        self.register.fault()
    }
    fn clear(&mut self) {
        self.register.set_fault(false);
    }
}

/// The log of one unit. Faults are rare and cheap to record, so one lock is enough; `pending` spares it to whoever only asks.
pub(super) struct FaultLog {
    state: Mutex<State>,
    pending: AtomicBool,
}

struct State {
    recordings: Box<[Recording]>,
    write_index: usize,
    first_pending_index: usize,
    /// PFO and IQE; PPF and FRI are computed.
    status: Fsts,
    event: EventRegisters,
    recorded_count: u64,
    collapsed_count: u64,
    overflowed_count: u64,
    suppressed_count: u64,
}

impl FaultLog {
    pub(super) fn new(recording_count: u16) -> Self {
        assert!(recording_count > 0, "validated: there is at least one recording register");
        let state = State {
            recordings: vec![Recording::default(); usize::from(recording_count)].into_boxed_slice(),
            write_index: 0,
            first_pending_index: 0,
            status: Fsts::new(),
            event: EventRegisters::RESET,
            recorded_count: 0,
            collapsed_count: 0,
            overflowed_count: 0,
            suppressed_count: 0,
        };
        Self { state: Mutex::new(state), pending: AtomicBool::new(false) }
    }
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
    /// Records a fault by the procedure of VT-d 5.10 §7.2.1, or counts it where FPD keeps it out.
    pub(super) fn record(&self, fault: &Fault, suppressed: bool, sink: &dyn EventSink) {
        let mut state = self.lock();
        if suppressed {
            state.suppressed_count += 1;
            return;
        }
        state.record(fault, sink);
        self.pending.store(state.is_any_pending(), Ordering::Release);
    }
    /// Hands out every pending record, oldest first, and clears the log with its overflow mark.
    pub(super) fn take(&self) -> Vec<RecordedFault> {
        let mut state = self.lock();
        let taken = state.take();
        self.pending.store(false, Ordering::Release);
        taken
    }
    pub(super) fn is_any_pending(&self) -> bool {
        self.pending.load(Ordering::Acquire)
    }
    /// Translation and interrupt remapping are both off: the write index starts over.
    pub(super) fn rewind(&self) {
        self.lock().write_index = 0;
    }
    pub(super) fn add_to(&self, sum: &mut Counters) {
        let state = self.lock();
        sum.faults_recorded = state.recorded_count;
        sum.faults_collapsed = state.collapsed_count;
        sum.faults_overflowed = state.overflowed_count;
        sum.faults_suppressed = state.suppressed_count;
        sum.faults =
            sum.faults_recorded + sum.faults_collapsed + sum.faults_overflowed + sum.faults_suppressed;
    }

    /// FSTS.
    pub(super) fn read_status(&self) -> u32 {
        self.lock().status_register()
    }
    /// Writes FSTS: PFO and IQE are cleared by writing 1. Returns whether IQE was cleared by it.
    pub(super) fn write_status(&self, value: u32) -> bool {
        let mut state = self.lock();
        let cleared = state.status.into_bits() & value & Fsts::WRITE_ONE_TO_CLEAR;
        state.status = Fsts::from_bits(state.status.into_bits() & !cleared);
        state.withdraw_if_quiet();
        Fsts::from_bits(cleared).queue_error()
    }
    /// The invalidation queue stopped at an error: sets IQE, which shares the fault event.
    pub(super) fn set_queue_error(&self, sink: &dyn EventSink) {
        self.lock().set_cause(Fsts::new().with_queue_error(true), sink);
    }
    pub(super) fn read_event(&self, dword: u32) -> u32 {
        self.lock().event.read(dword)
    }
    pub(super) fn write_event(&self, dword: u32, value: u32, sink: &dyn EventSink) {
        self.lock().event.write(dword, value, sink);
    }
    /// Reads dword 0 to 3 of a recording register; `None` beyond the last.
    pub(super) fn read_recording(&self, index: usize, dword: u32) -> Option<u32> {
        let state = self.lock();
        let recording = state.recordings.get(index)?;
        Some((recording.register.into_bits() >> (32 * (dword & 3))) as u32)
    }
    /// Writes dword 0 to 3 of a recording register: only F (the top bit) is software's, and it is cleared by writing 1.
    pub(super) fn write_recording(&self, index: usize, dword: u32, value: u32) {
        if dword != 3 || value & 1 << 31 == 0 {
            return;
        }
        let mut state = self.lock();
        if let Some(recording) = state.recordings.get_mut(index) {
            recording.clear();
        }
        state.withdraw_if_quiet();
        self.pending.store(state.is_any_pending(), Ordering::Release);
    }
}

impl State {
    fn is_any_pending(&self) -> bool {
        self.recordings.iter().any(Recording::is_pending)
    }
    fn is_any_cause_set(&self) -> bool {
        self.status.into_bits() != 0 || self.is_any_pending()
    }
    fn status_register(&self) -> u32 {
        self.status
            .with_pending(self.is_any_pending())
            .with_record_index(self.first_pending_index as u8)
            .into_bits()
    }
    fn record(&mut self, fault: &Fault, sink: &dyn EventSink) {
        if self.status.overflow() {
            self.overflowed_count += 1;
            return;
        }
        let same_source = |recording: &&mut Recording| {
            recording.is_pending() && recording.register.source_id() == fault.source_id()
        };
        if let Some(pending) = self.recordings.iter_mut().find(same_source) {
            pending.collapsed_count = pending.collapsed_count.saturating_add(1);
            self.collapsed_count += 1;
            return;
        }
        if self.recordings[self.write_index].is_pending() {
            self.overflowed_count += 1;
            self.set_cause(Fsts::new().with_overflow(true), sink);
            return;
        }
        let is_first = !self.is_any_pending();
        let raises = !self.is_any_cause_set();
        self.recordings[self.write_index] =
            Recording { register: FaultRecord::of(fault).with_fault(true), collapsed_count: 0 };
        self.recorded_count += 1;
        if is_first {
            self.first_pending_index = self.write_index;
        }
        self.write_index = (self.write_index + 1) % self.recordings.len();
        if raises {
            self.event.raise(sink);
        }
    }
    fn set_cause(&mut self, cause: Fsts, sink: &dyn EventSink) {
        let raises = !self.is_any_cause_set();
        self.status = Fsts::from_bits(self.status.into_bits() | cause.into_bits());
        if raises {
            self.event.raise(sink);
        }
    }
    fn withdraw_if_quiet(&mut self) {
        if !self.is_any_cause_set() {
            self.event.withdraw();
        }
    }
    fn take(&mut self) -> Vec<RecordedFault> {
        let (wrapped, oldest) = self.recordings.split_at_mut(self.write_index);
        let mut taken = Vec::new();
        for recording in oldest.iter_mut().chain(wrapped).filter(|recording| recording.is_pending()) {
            taken.push(RecordedFault {
                fault: recording.register.to_fault(),
                collapsed_count: recording.collapsed_count,
            });
            recording.clear();
        }
        self.status.set_overflow(false);
        self.withdraw_if_quiet();
        taken
    }
}
