//! Sessions: of devices (one stream each, all of a PCI function's traffic) and of clients (a connection with an identity).

pub mod device;
mod device_stream;
pub mod driver;
pub mod execute;
mod mailbox;
pub mod mmio;
pub mod open;
mod payer;
pub mod replay;
pub(crate) mod watch;
pub mod watchdog;

pub use device_stream::DeviceStream;
