//! What arises below the codec reaches a client as a typed error too: against a generated server, in process.

use bytes::{BufMut as _, Bytes, BytesMut};
use http_body_util::{BodyExt as _, Full};
use iommu_proto::errors::WireError as _;
use iommu_proto::framing::{framing_layer, typed_framing_status};
use iommu_proto::pb;
use iommu_proto::pb::session_service_server::{SessionService, SessionServiceServer};
use iommu_types::errors::{CallError, IdentityRefused, InvalidField, SessionError};
use prost::Message as _;
use tonic::body::Body;
use tonic::service::Routes;
use tonic::{Code, Request, Response, Status};
use tower::{Layer as _, Service as _};

/// Largest message that the server of these tests takes.
const MESSAGE_BYTES_MAX: usize = 64;

struct Refuses;

#[tonic::async_trait]
impl SessionService for Refuses {
    async fn open(&self, request: Request<pb::OpenRequest>) -> Result<Response<pb::OpenResponse>, Status> {
        let name = request.into_inner().name;
        if name == "untyped" {
            return Err(Status::not_found("no such thing"));
        }
        Err(IdentityRefused { name, why: "nobody is known here".to_owned() }.into_status())
    }
}

fn frame(flag: u8, message: &[u8]) -> Bytes {
    let mut frame = BytesMut::new();
    frame.put_u8(flag);
    frame.put_u32(message.len() as u32);
    frame.put_slice(message);
    frame.freeze()
}

/// The headers, or where there is a body the trailers, that the server answers with.
async fn answer(path: &str, body: Bytes) -> Status {
    let server = SessionServiceServer::new(Refuses).max_decoding_message_size(MESSAGE_BYTES_MAX);
    let mut service = framing_layer().layer(Routes::new(server));
    let request = http::Request::builder()
        .method("POST")
        .uri(path)
        .header("content-type", "application/grpc")
        .body(Body::new(Full::new(body)))
        .expect("a request");
    let response = service.call(request).await.expect("routes do not fail");
    assert_eq!(
        response.headers().get("content-type").map(|value| value.as_bytes()),
        Some(&b"application/grpc"[..])
    );
    if let Some(status) = Status::from_header_map(response.headers()) {
        return status;
    }
    let trailers = response.into_body().collect().await.expect("a body").trailers().cloned();
    Status::from_header_map(&trailers.expect("trailers")).expect("a status")
}

async fn check(path: &str, body: Bytes, code: Code, reason: &str) {
    let status = answer(path, body).await;
    let error = CallError::from_status(&status);
    assert_eq!((status.code(), error.map(|error| error.reason())), (code, Some(reason)), "{status:?}");
}

const OPEN: &str = "/iommu.v1.SessionService/Open";

#[tokio::test]
async fn oversized_and_unknown_and_broken_requests_get_typed_errors() {
    let oversized = frame(0, &[0; MESSAGE_BYTES_MAX + 1]);
    check(OPEN, oversized, Code::ResourceExhausted, "MESSAGE_TOO_LARGE").await;
    check("/iommu.v1.SessionService/Close", frame(0, b""), Code::Unimplemented, "UNKNOWN_METHOD").await;
    check("/iommu.v9.Nothing/At", frame(0, b""), Code::Unimplemented, "UNKNOWN_METHOD").await;
    check(OPEN, frame(0, b"\xff\xff\xff"), Code::InvalidArgument, "MALFORMED_MESSAGE").await;
    check(OPEN, frame(1, b""), Code::InvalidArgument, "MALFORMED_MESSAGE").await;
    check(OPEN, frame(7, b""), Code::InvalidArgument, "MALFORMED_MESSAGE").await;
    check(OPEN, Bytes::new(), Code::InvalidArgument, "MALFORMED_MESSAGE").await;
    check(OPEN, frame(0, b"cut").slice(..6), Code::InvalidArgument, "MALFORMED_MESSAGE").await;
}

#[tokio::test]
async fn other_statuses_pass_as_they_are() {
    let named = |name: &str| {
        frame(0, &pb::OpenRequest { name: name.to_owned(), ..Default::default() }.encode_to_vec())
    };
    let status = answer(OPEN, named("net0")).await;
    let refused = IdentityRefused { name: "net0".to_owned(), why: "nobody is known here".to_owned() };
    assert_eq!(SessionError::from_status(&status), Some(refused.into()));
    let status = answer(OPEN, named("untyped")).await;
    assert_eq!(
        (status.code(), status.message(), status.details()),
        (Code::NotFound, "no such thing", &b""[..])
    );
}

#[test]
fn typing_a_status_keeps_what_it_carries() {
    let ours = InvalidField { field: "x".to_owned(), why: "y".to_owned() }.into_status();
    let details = ours.details().to_vec();
    assert_eq!(typed_framing_status(ours).details(), details);
    let mut compressed = Status::unimplemented("Content is compressed with `br` which isn't supported");
    compressed.metadata_mut().insert("grpc-accept-encoding", "identity".parse().expect("ascii"));
    let typed = typed_framing_status(compressed);
    // gRPC fixes this code and this header.
    assert_eq!(typed.code(), Code::Unimplemented);
    assert!(typed.metadata().contains_key("grpc-accept-encoding"));
    assert!(matches!(CallError::from_status(&typed), Some(CallError::MalformedMessage(_))));
}
