//! A PCI copy engine as a device agent: copies, fills, single accesses, interrupts, and a receive ring.
//!
//! It does exactly what its registers say, and checks no address: what it may touch is the IOMMU's to decide.
//! Every register, command, bit and code is a constant of [`registers`], whose documentation is the register
//! table; the layout of ring descriptors is [`ring::Descriptor`].
//!
//! # A copy, as a driver does it
//!
//! ```text
//! write SRC, DST, LENGTH          addresses as the IOMMU's mappings gave them (IOVA)
//! write MSI_ADDRESS, MSI_DATA, MSI_ENABLE = 1    or poll STATUS
//! write COMMAND = COPY            STATUS.BUSY
//! interrupt                       STATUS.DONE, or STATUS.ERROR with FAULT_ADDRESS and FAULT_REASON
//! ```
//!
//! # The receive flow
//!
//! The driver writes descriptors into a ring in coherent memory and moves `RING_TAIL`; for each descriptor
//! the device reads it (one DMA), writes a packet into its buffer (one DMA), and, with
//! `RING_CONTROL.WRITE_BACK`, writes the completion into the second half of the descriptor (one DMA, in the
//! same page as the first). After each burst it raises one interrupt. So a packet costs two translations, the
//! descriptor's and the content's, and one more for a completion, which finds the descriptor's page cached.

pub mod bus;
mod command;
mod engine;
pub mod pattern;
pub mod registers;
pub mod ring;
mod state;

pub use engine::Engine;
