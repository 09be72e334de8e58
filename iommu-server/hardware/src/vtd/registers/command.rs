//! Commands: GCMD and the two invalidation registers (VT-d 5.10 §11.4.4, §11.4.6).
//!
//! A command starts an operation of the unit and leaves an effect behind: its status changes when the drain is done. A
//! command whose kind is still in flight is ignored; software waits for the status first.

use iommu_types::{Granularity, Hpa, Invalidation};

use super::super::interrupt::InterruptTable;
use super::super::spec::invalidation::{decode_function_mask, masked_range};
use super::super::spec::registers::{Ccmd, Gcmd, Iotlb, Irta, Iva, Rtaddr};
use super::super::walk::{RootMode, RootTable};
use super::page::with_half;
use super::{Effect, RegisterFile, State};
use crate::drain::PendingDrain;

impl RegisterFile {
    /// Software changes at most one bit at a time; when it changes more, pointers are set before what uses them is enabled.
    pub(super) fn write_global_command(&self, state: &mut State, command: Gcmd) {
        let capabilities = *self.unit.capabilities();
        if command.set_root_table() {
            self.set_root_table(state);
        }
        if capabilities.interrupt_remapping {
            if command.set_interrupt_table() {
                self.set_interrupt_table(state);
            }
            let allowed = command.compatibility_interrupts();
            if allowed != state.status.compatibility_interrupts() {
                self.unit.set_compatibility_interrupts(allowed);
                state.status.set_compatibility_interrupts(allowed);
            }
        }
        if capabilities.queued_invalidation
            && command.queued_invalidation() != state.status.queued_invalidation()
        {
            set_queue(state, command.queued_invalidation());
        }
        if capabilities.interrupt_remapping
            && command.interrupt_remapping() != state.status.interrupt_remapping()
        {
            self.set_interrupt_remapping(state, command.interrupt_remapping());
        }
        if command.translation() != state.status.translation() {
            let effect = Effect::Translation(command.translation());
            if !state.waiting.holds_kind_of(&effect) {
                state.waiting.push(self.unit.set_translation(command.translation()), effect);
            }
        }
    }

    fn set_root_table(&self, state: &mut State) {
        if state.waiting.holds_kind_of(&Effect::RootTable) {
            return;
        }
        let written = Rtaddr::from_bits(state.root_address);
        let mode = match RootMode::from_ttm(written.table_mode()) {
            // SSIRWE has no meaning in legacy mode: the table mode as a whole is invalid.
            RootMode::Legacy if written.second_stage_ir_iw() => RootMode::Reserved,
            mode => mode,
        };
        state.status.set_set_root_table(false);
        self.unit.set_root_table(RootTable { base: Hpa::new(written.frame() << 12), mode });
        let pending = if self.unit.capabilities().enhanced_set_root {
            let contexts = self.unit.invalidate(Invalidation::ContextGlobal);
            contexts.and(self.unit.invalidate(Invalidation::IotlbGlobal))
        } else {
            PendingDrain::none()
        };
        state.waiting.push(pending, Effect::RootTable);
    }

    fn set_interrupt_table(&self, state: &mut State) {
        if state.waiting.holds_kind_of(&Effect::InterruptTable) {
            return;
        }
        let written = Irta::from_bits(state.interrupt_table_address);
        state.status.set_set_interrupt_table(false);
        self.unit.set_interrupt_table(InterruptTable {
            base: Hpa::new(written.frame() << 12),
            entries_log2: written.size() + 1,
            extended_mode: written.extended_mode() && self.unit.capabilities().extended_interrupt_mode,
        });
        let pending = self.enhanced_interrupt_invalidation();
        state.waiting.push(pending, Effect::InterruptTable);
    }

    fn set_interrupt_remapping(&self, state: &mut State, on: bool) {
        let effect = Effect::InterruptRemapping(on);
        if state.waiting.holds_kind_of(&effect) {
            return;
        }
        let mut pending = self.unit.set_interrupt_remapping(on);
        if !on {
            pending = pending.and(self.enhanced_interrupt_invalidation());
        }
        state.waiting.push(pending, effect);
    }

    /// ESIRTPS: SIRTP and IRE off invalidate by themselves.
    fn enhanced_interrupt_invalidation(&self) -> PendingDrain {
        if self.unit.capabilities().enhanced_set_interrupt_table {
            self.unit.invalidate(Invalidation::InterruptGlobal)
        } else {
            PendingDrain::none()
        }
    }

    /// Register-based invalidation exists only in legacy mode; elsewhere it is ignored and reports granularity 00.
    fn is_legacy_mode(&self) -> bool {
        self.unit.root_table().mode == RootMode::Legacy
    }

    pub(super) fn write_context_command(&self, state: &mut State, dword: u32, value: u32) {
        if state.context_command.invalidate() {
            return;
        }
        let register = with_half(state.context_command.into_bits(), dword, value);
        let actual = state.context_command.actual_granularity();
        let command = Ccmd::from_bits(register).with_actual_granularity(actual);
        let begins = dword == 1 && command.invalidate();
        state.context_command = command.with_invalidate(begins);
        if !begins {
            return;
        }
        let asked = match command.granularity() {
            1 => Some((Granularity::Global, Invalidation::ContextGlobal)),
            2 => Some((Granularity::Domain, Invalidation::ContextDomain(command.domain_id()))),
            3 => {
                let function_mask = decode_function_mask(command.function_mask());
                let (domain_id, source_id) = (command.domain_id(), command.source_id());
                let device = Invalidation::ContextDevice { domain_id, source_id, function_mask };
                Some((Granularity::Device, device))
            }
            _ => None,
        };
        let (pending, done) = self.carry_out(asked);
        state.waiting.push(pending, Effect::ContextCommand(done));
    }

    pub(super) fn write_iotlb_command(&self, state: &mut State, dword: u32, value: u32) {
        if state.iotlb_command.invalidate() {
            return;
        }
        let register = with_half(state.iotlb_command.into_bits(), dword, value);
        let actual = state.iotlb_command.actual_granularity();
        let command = Iotlb::from_bits(register).with_actual_granularity(actual);
        let begins = dword == 1 && command.invalidate();
        state.iotlb_command = command.with_invalidate(begins);
        if !begins {
            return;
        }
        let domain_id = command.domain_id();
        let asked = match command.granularity() {
            1 => Some((Granularity::Global, Invalidation::IotlbGlobal)),
            2 => Some((Granularity::Domain, Invalidation::IotlbDomain(domain_id))),
            3 if !self.unit.capabilities().page_selective => {
                Some((Granularity::Domain, Invalidation::IotlbDomain(domain_id)))
            }
            3 => {
                let address = Iva::from_bits(state.invalidate_address);
                let mask = address.address_mask();
                let range = masked_range(address.page_number() << 12, mask)
                    .filter(|_| mask <= self.unit.capabilities().max_address_mask);
                range.map(|range| {
                    let leaf_only = address.leaf_only();
                    (Granularity::Page, Invalidation::IotlbPages { domain_id, range, leaf_only })
                })
            }
            _ => None,
        };
        let (pending, done) = self.carry_out(asked);
        state.waiting.push(pending, Effect::IotlbCommand(done));
    }

    fn carry_out(&self, asked: Option<(Granularity, Invalidation)>) -> (PendingDrain, Option<Granularity>) {
        match asked {
            Some((granularity, invalidation)) if self.is_legacy_mode() => {
                (self.unit.invalidate(invalidation), Some(granularity))
            }
            _ => (PendingDrain::none(), None),
        }
    }
}

/// QIE. Going off drains what was taken; software has waited for the queue to be empty before.
fn set_queue(state: &mut State, on: bool) {
    if state.waiting.holds_kind_of(&Effect::QueueOff) {
        return;
    }
    if on {
        state.queue.start();
        state.status.set_queued_invalidation(true);
    } else {
        let pending = state.queue.stop();
        state.waiting.push(pending, Effect::QueueOff);
    }
}
