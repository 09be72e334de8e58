//! Errors: small structs with the facts, gathered into one enum per operation.
//!
//! A client matches on the very enum that the core returned: the wire carries every struct here with a stable reason
//! (see `iommu-proto`), and the SDK turns reasons back into these types. Messages are for people and name the field and
//! the remedy; reasons are for programs.

mod facts;
mod operations;

pub use facts::*;
pub use operations::*;
