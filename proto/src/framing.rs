//! Errors that arise below the codec: oversized frames, unknown methods, broken framing.
//!
//! tonic answers these by itself, before any code of ours runs, with a bare code and an English message. A client is promised a
//! typed error for everything, so the server installs [`framing_layer`], and code that reads a request stream passes
//! what the stream ended with through [`typed_framing_status`].

use http::HeaderMap;
use iommu_types::errors::{MalformedMessage, MessageTooLarge, UnknownMethod};
use tonic::{Code, Status};
use tower::util::MapResponseLayer;

use crate::errors::WireError;

/// The same status with a typed error, when it is one of those that tonic makes itself; any other status unchanged.
pub fn typed_framing_status(status: Status) -> Status {
    if !status.details().is_empty() {
        return status;
    }
    let why = status.message().to_owned();
    let typed = match status.code() {
        // "Error, decoded message length too large: found … bytes, the limit is: … bytes".
        Code::OutOfRange => MessageTooLarge { why }.into_status(),
        // The router knows no such path, or a generated server no such method; neither says a word.
        Code::Unimplemented if why.is_empty() => UnknownMethod {}.into_status(),
        // An encoding that the server does not take. gRPC fixes the code, so only the details are ours.
        Code::Unimplemented => {
            let typed = MalformedMessage { why }.into_status();
            let details = bytes::Bytes::copy_from_slice(typed.details());
            Status::with_details(Code::Unimplemented, typed.message(), details)
        }
        // No message, a frame cut short, a compressed flag without an encoding.
        Code::Internal => MalformedMessage { why }.into_status(),
        _ => return status,
    };
    with_metadata_of(typed, status)
}

/// `typed` with what else stood in the headers of `original`, such as `grpc-accept-encoding`.
fn with_metadata_of(mut typed: Status, original: Status) -> Status {
    *typed.metadata_mut() = original.metadata().clone();
    typed
}

fn type_response<B>(mut response: http::Response<B>) -> http::Response<B> {
    if let Some(typed) = typed_headers(response.headers()) {
        *response.headers_mut() = typed;
    }
    response
}

/// The headers that replace those of a response that is nothing but a status; `None` where they may stay.
fn typed_headers(headers: &HeaderMap) -> Option<HeaderMap> {
    // Nearly every response has its status in trailers, after the body, and ends here.
    if !headers.contains_key(Status::GRPC_STATUS) || headers.contains_key(Status::GRPC_STATUS_DETAILS) {
        return None;
    }
    let status = Status::from_header_map(headers)?;
    let typed = typed_framing_status(status);
    if typed.details().is_empty() {
        return None;
    }
    let mut replaced = HeaderMap::new();
    typed.add_header(&mut replaced).ok()?;
    // A status does not carry the headers that belong to HTTP.
    if let Some(content_type) = headers.get(http::header::CONTENT_TYPE) {
        replaced.insert(http::header::CONTENT_TYPE, content_type.clone());
    }
    Some(replaced)
}

/// Gives every response of the server that is nothing but one of tonic's own statuses a typed error.
pub fn framing_layer<B>() -> MapResponseLayer<fn(http::Response<B>) -> http::Response<B>> {
    MapResponseLayer::new(type_response)
}
