//! The measurements, each beside its reference in the same run.
fn main() {}
