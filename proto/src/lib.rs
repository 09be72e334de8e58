//! The wire contract: schema, generated code, conversions, errors.
//!
//! This is the only crate that reads protobuf. What a peer sent is parsed here once, on the receiving side, into the types of
//! `iommu-types` and of [`model`]: behind it there are no `Option`s for required things and no numbers for enums.
//! Errors cross the wire as [`errors::WireError`] says, DMA as [`dma`] says.
//!
//! The schema is `proto/iommu/v1`; its comments and `proto/README.md` are enough to write a client in another language.

pub mod channel;
pub mod codec;
mod convert;
pub mod credentials;
pub mod dma;
pub mod errors;
pub mod framing;
pub mod limits;
pub mod tls;

/// What messages mean: the types of `iommu-types` where they have one, and these where they do not.
///
/// Receiving is `TryFrom` the message of [`pb`], sending is `From` the type. Errors name the path of the field.
pub mod model {
    pub use crate::convert::admin::*;
    pub use crate::convert::bare::*;
    pub use crate::convert::device::*;
    pub use crate::convert::dma_api::*;
    pub use crate::convert::driver::*;
    pub use crate::convert::explain::*;
    pub use crate::convert::fault::*;
    pub use crate::convert::hypervisor::*;
    pub use crate::convert::inspect::*;
    pub use crate::convert::memory::*;
    pub use crate::convert::sanitizer::*;
    pub use crate::convert::session::*;
    pub use crate::convert::stream::*;
    pub use crate::convert::types::*;
}

/// The generated messages, clients and servers of package `iommu.v1`. Checked in; `cargo gen` writes them again.
#[allow(
    missing_docs,
    unreachable_pub,
    clippy::allow_attributes_without_reason,
    clippy::large_enum_variant,
    reason = "generated: its documentation is the schema's, its shape is prost's"
)]
pub mod pb {
    include!("generated/iommu.v1.rs");
}

/// The compiled schema (a `google.protobuf.FileDescriptorSet`), for reflection.
pub const DESCRIPTOR: &[u8] = include_bytes!("generated/descriptor.bin");
