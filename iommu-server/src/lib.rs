//! The service floor of the IOMMU: sessions, identity, streams, limits, telemetry.
//!
//! Below are the kernel floor (what host software does) and the hardware floor (what silicon does), neither of which knows about time,
//! tasks or the wire. This is the only floor with a runtime: it parses what peers send, takes the locks, awaits drains with none held, and
//! answers. [`server::Server`] puts it together; the binary is a short `main`.
//!
//! - [`tls`]: certificates, handshakes, rotation; [`listen`]: who is let in.
//! - [`connection`] and [`session`]: who a peer is (I8), device streams, client sessions, retries.
//! - [`host`] and [`machine`]: the state, and what changes it.
//! - [`services`]: one file per service of the schema; [`layers`]: what every call passes.
//! - [`bounds`]: every limit (I7); [`ending`]: why things end; [`drain`]: how the whole server ends.

pub mod admin_http;
pub mod bounds;
pub mod cli;
pub mod config;
pub mod connection;
pub mod drain;
pub mod ending;
pub mod healthcheck;
pub mod host;
pub mod interrupts;
pub mod layers;
pub mod listen;
pub mod machine;
pub mod metrics;
pub mod server;
pub mod services;
pub mod session;
pub mod telemetry;
pub mod tls;
