//! Where each register lies and who may write it.

use super::super::spec::registers::{
    Cap, Ecap, FAULT_RECORD_BYTES, Gcmd, Ics, Iqercd, VERSION, fault_records_offset, offset,
};
use super::{RegisterFile, State};

/// Dword `offset` relative to `base`, when it lies in a block of `dwords`.
const fn dword_of(at: u32, base: u32, dwords: u32) -> Option<u32> {
    if at >= base && at < base + 4 * dwords { Some((at - base) / 4) } else { None }
}

const fn half(register: u64, dword: u32) -> u32 {
    (register >> (32 * (dword & 1))) as u32
}

pub(super) fn with_half(register: u64, dword: u32, value: u32) -> u64 {
    let shift = 32 * (dword & 1);
    (register & !(0xffff_ffff << shift)) | u64::from(value) << shift
}

/// RTADDR: table, TTM and SSIRWE.
const RTADDR_WRITABLE: u64 = !0xfff | 0xc80;
/// IVA: address, IH and AM.
const IVA_WRITABLE: u64 = !0xfff | 0x7f;
/// IRTA: table, EIME and S.
const IRTA_WRITABLE: u64 = !0xfff | 0x80f;

impl RegisterFile {
    pub(super) fn read_dword(&self, state: &State, at: u32) -> u32 {
        let unit = &*self.unit;
        let pair = |base| dword_of(at, base, 2);
        if let Some(dword) = pair(offset::CAP) {
            return half(Cap::from(unit.capabilities()).into_bits(), dword);
        }
        if let Some(dword) = pair(offset::ECAP) {
            return half(Ecap::from(unit.capabilities()).into_bits(), dword);
        }
        for (base, register) in [
            (offset::RTADDR, state.root_address),
            (offset::CCMD, state.context_command.into_bits()),
            (offset::IQH, state.queue.head()),
            (offset::IQT, state.queue.tail()),
            (offset::IQA, state.queue.address()),
            (offset::IQERCD, Iqercd::new().with_error(state.queue.error_code()).into_bits()),
            (offset::IRTA, state.interrupt_table_address),
            (offset::IVA, state.invalidate_address),
            (offset::IOTLB, state.iotlb_command.into_bits()),
        ] {
            if let Some(dword) = pair(base) {
                return half(register, dword);
            }
        }
        if let Some(dword) = dword_of(at, offset::FECTL, 4) {
            return unit.faults.read_event(dword);
        }
        if let Some(dword) = dword_of(at, offset::IECTL, 4) {
            return state.completion_event.read(dword);
        }
        if let Some((index, dword)) = self.fault_record_at(at) {
            return unit.faults.read_recording(index, dword).unwrap_or(0);
        }
        match at {
            offset::VER => VERSION,
            offset::GSTS => state.status.into_bits(),
            offset::FSTS => unit.faults.read_status(),
            offset::ICS => state.completion.into_bits(),
            // GCMD is write-only; protected memory, page requests, performance monitoring and the rest are not built.
            _ => 0,
        }
    }

    pub(super) fn write_dword(&self, state: &mut State, at: u32, value: u32) {
        let unit = &*self.unit;
        if let Some(dword) = dword_of(at, offset::FECTL, 4) {
            return unit.faults.write_event(dword, value, unit.events());
        }
        if let Some(dword) = dword_of(at, offset::IECTL, 4) {
            return state.completion_event.write(dword, value, unit.events());
        }
        if let Some((index, dword)) = self.fault_record_at(at) {
            return unit.faults.write_recording(index, dword, value);
        }
        match at {
            offset::GCMD => self.write_global_command(state, Gcmd::from_bits(value)),
            offset::FSTS => {
                if unit.faults.write_status(value) {
                    state.queue.clear_error();
                }
            }
            offset::ICS => {
                if Ics::from_bits(value).wait_complete() {
                    state.completion.set_wait_complete(false);
                    state.completion_event.withdraw();
                }
            }
            _ => self.write_half(state, at, value),
        }
    }

    fn write_half(&self, state: &mut State, at: u32, value: u32) {
        let pair = |base| dword_of(at, base, 2);
        if let Some(dword) = pair(offset::RTADDR) {
            state.root_address = with_half(state.root_address, dword, value) & RTADDR_WRITABLE;
        } else if let Some(dword) = pair(offset::CCMD) {
            self.write_context_command(state, dword, value);
        } else if let Some(dword) = pair(offset::IQT) {
            let register = with_half(state.queue.tail(), dword, value);
            state.queue.set_tail(register);
        } else if let Some(dword) = pair(offset::IQA) {
            let register = with_half(state.queue.address(), dword, value);
            state.queue.set_address(register);
        } else if let Some(dword) = pair(offset::IRTA) {
            state.interrupt_table_address =
                with_half(state.interrupt_table_address, dword, value) & IRTA_WRITABLE;
        } else if let Some(dword) = pair(offset::IVA) {
            state.invalidate_address = with_half(state.invalidate_address, dword, value) & IVA_WRITABLE;
        } else if let Some(dword) = pair(offset::IOTLB) {
            self.write_iotlb_command(state, dword, value);
        }
    }

    /// The fault recording register and its dword at an offset.
    fn fault_record_at(&self, at: u32) -> Option<(usize, u32)> {
        let count = self.unit.capabilities().fault_records;
        let dword = dword_of(at, fault_records_offset(count), u32::from(count) * (FAULT_RECORD_BYTES / 4))?;
        Some(((dword / 4) as usize, dword % 4))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_of_a_register_do_not_disturb_each_other() {
        let register = 0x1111_2222_3333_4444;
        assert_eq!(with_half(register, 0, 0xaaaa_bbbb), 0x1111_2222_aaaa_bbbb);
        assert_eq!(with_half(register, 1, 0xaaaa_bbbb), 0xaaaa_bbbb_3333_4444);
        assert_eq!((half(register, 0), half(register, 1)), (0x3333_4444, 0x1111_2222));
    }
}
