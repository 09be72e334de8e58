//! A hostile PCI device.
//!
//! It speaks the wire itself, message by message, so that nothing polite stands between it and the server: no credits that it must keep,
//! no generation that it must tell, no reset that it must obey. It is told what to do in [lines of JSON](language), one at a time, and
//! answers each with one line: whoever tells it decides when what happens.
//!
//! **Promises:** it never acts by itself, but for what it was told to answer (registers, resets) and a [hammer](load) that it was told to
//! swing. Every number that reaches it has a bound ([`bounds`]), because a test bench must outlive its own mistakes.

pub mod bounds;
pub mod device;
mod execute;
pub mod language;
pub mod lines;
pub mod load;
pub mod named;
mod peer;
mod scan;
pub mod stream;
pub mod text;
