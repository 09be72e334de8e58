//! Builds the real binaries and runs them: what the demonstration, the measurements and the end-to-end tests have in common.
//!
//! `cargo run` and `cargo test` build no other package's binary, and a stale one is worse than none; so [`binaries`] asks cargo to
//! build them, in the profile of the program that calls, and uses the paths that cargo reports.
//!
//! Every process is a child of the caller, ends with it, and writes its log to a file that is shown when something fails.

mod build;
mod process;
mod server;

pub use build::{Binaries, binaries, binaries_beside};
pub use process::Process;
pub use server::{AgentOptions, Server, ServerOptions, Wire};
