//! What the end-to-end tests stand on: a server of their own as a process, peers that are this process, peers that are processes
//! of their own, and peers that break the rules. The tests are in `tests/`.
//!
//! Everything here panics when it cannot do what it is for: it only ever runs inside a test, where that is the report.

pub mod bare;
pub mod device;
pub mod guests;
pub mod http;
pub mod link;
pub mod random;
pub mod raw;
pub mod raw_device;
pub mod stage;
