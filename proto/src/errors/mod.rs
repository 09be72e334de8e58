//! Errors on the wire: every fact of `iommu_types::errors` as a gRPC status and back.
//!
//! A status carries `google.rpc.ErrorInfo` with the domain [`DOMAIN`], a stable reason for programs and the facts as text,
//! and beside it the standard detail for its kind (`BadRequest`, `ResourceInfo`, …). The message is for people. A client
//! gets back the very enum that the core returned; a status without our details gives `None` and is the transport's.
//!
//! Codes, reasons and details stand in one table, [`REASONS`] (`table.rs`); `proto/README.md` prints it.

mod operations;
mod table;
mod text;

use std::collections::HashMap;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

pub use table::{REASONS, Row};
pub(crate) use text::bounded;

/// The domain of our `ErrorInfo`.
pub const DOMAIN: &str = "iommu.v1";

/// Longest text fact, in bytes: a status travels in HTTP/2 trailers, which peers bound at 8 to 16 KiB, and the longest facts stand
/// in three places of it.
pub const FACT_BYTES_MAX: usize = 512;

/// An error that crosses the wire.
pub trait WireError: std::error::Error + Sized {
    /// Stable reason, as in `ErrorInfo.reason`.
    fn reason(&self) -> &'static str;
    /// gRPC code.
    fn code(&self) -> Code;
    /// The facts as text, as in `ErrorInfo.metadata`.
    fn metadata(&self) -> HashMap<String, String>;
    /// The standard detail that goes with the `ErrorInfo`.
    fn details(&self) -> ErrorDetails;
    /// The error with this reason and these facts; `None` when it is none of this type.
    fn from_reason(reason: &str, metadata: &HashMap<String, String>) -> Option<Self>;

    /// The status that carries this error.
    fn into_status(self) -> Status {
        let mut details = self.details();
        details.set_error_info(self.reason(), DOMAIN, self.metadata());
        Status::with_error_details(self.code(), text::bounded(&self.to_string()), details)
    }
    /// The error that a status carries; `None` when it carries none of this type.
    fn from_status(status: &Status) -> Option<Self> {
        let carried = status.get_details_error_info()?;
        if carried.domain != DOMAIN {
            return None;
        }
        Self::from_reason(&carried.reason, &carried.metadata)
    }
}

/// The reason that a status of ours carries; `None` for one that is the transport's.
pub fn reason_of(status: &Status) -> Option<String> {
    status.get_details_error_info().filter(|carried| carried.domain == DOMAIN).map(|carried| carried.reason)
}
