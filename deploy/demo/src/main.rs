//! The demonstrations, with real processes.
fn main() {}
