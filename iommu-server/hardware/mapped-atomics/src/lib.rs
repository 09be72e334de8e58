//! Sixteen-byte atomics on mapped memory.
