//! The bit layouts of VT-d 5.10, one file per kind, and of our one extension ([`extent`]): plain data that encodes and decodes, and nothing that behaves.
//!
//! Every type here is a number with named fields. What a walk, a queue or a register file *does* with it is told
//! where it is done; what is told here is where the bits are and which of them are reserved. Reserved bits survive
//! `from_bits`, so that they can be checked.

pub mod extent;
pub mod invalidation;
pub mod irte;
pub mod pte;
pub mod registers;
pub mod root_context;

/// The bits of a 64-bit address field from `host_width_bits` up: reserved, because no physical address has them.
pub const fn beyond_host_width(host_width_bits: u8) -> u64 {
    match 1u64.checked_shl(host_width_bits as u32) {
        Some(limit) => !(limit - 1),
        None => 0,
    }
}
