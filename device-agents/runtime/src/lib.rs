//! The device side of the wire: session, DMA stream, MMIO, interrupts, reconnect.
