//! See and steer an IOMMU server from the command line.
fn main() {}
