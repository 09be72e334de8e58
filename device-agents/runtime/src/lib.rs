//! The device side of the wire: session, DMA stream, MMIO, interrupts, reconnect.
//!
//! A device agent is a process that plays one PCI function. It implements [`DeviceModel`] (what its registers
//! do) and runs it with an [`Agent`]; everything it reads and writes goes through a [`Dma`] handle, over the
//! wire and through the server's translation.
//!
//! ```no_run
//! use device_runtime::{Agent, DeviceModel, Dma, MmioRefusal, Register};
//!
//! struct Nothing;
//! impl DeviceModel for Nothing {
//!     async fn mmio_read(&self, register: Register, _dma: &Dma) -> Result<u64, MmioRefusal> {
//!         Err(MmioRefusal::new(format!("there is no register at {:#x}", register.offset)))
//!     }
//!     async fn mmio_write(&self, register: Register, _value: u64, _dma: &Dma) -> Result<(), MmioRefusal> {
//!         Err(MmioRefusal::new(format!("there is no register at {:#x}", register.offset)))
//!     }
//!     async fn reset(&self) {}
//! }
//!
//! # async fn start() -> Result<(), Box<dyn std::error::Error>> {
//! let address = "0000:00:05.0".parse()?;
//! Agent::builder("https://127.0.0.1:7450", "nothing0", address).run(Nothing).await?;
//! # Ok(())
//! # }
//! ```
//!
//! What it promises:
//!
//! - **No deadlock by crossing traffic.** The task that reads the stream never waits for anything but the stream. What it
//!   may have to store is bounded by credits; a server that exceeds them ends its session as a protocol violation.
//! - **Register accesses may do DMA.** They run one after another, in the order of the bus, in a task of their own, and
//!   their answers never wait for DMA credit.
//! - **Every operation ends**, with its result, a fault, [`DmaError::SessionLost`] or [`DmaError::Reset`].
//! - **A refused DMA is a value** ([`DmaError::Fault`]) and leaves the session alone.

mod agent;
mod backoff;
mod device_task;
mod dma;
mod end;
mod link;
mod model;
mod session;

pub use agent::{Agent, AgentBuilder};
pub use backoff::{Backoff, Reconnect};
pub use dma::{Dma, DmaError, Ticket};
pub use end::EndReason;
pub use iommu_proto::channel::{BadEndpoint, DEFAULT_ENDPOINT};
pub use iommu_proto::credentials::{CredentialError, Credentials, Refused};
pub use iommu_proto::dma::{AtomicValue, Batch, Completed, OperationResult};
pub use link::{LinkState, SessionLimits};
pub use model::{DeviceModel, MmioRefusal, Register};
