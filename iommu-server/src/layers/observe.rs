//! Observation: a span for each call, and counts and latencies by method and outcome.
//!
//! A unary call is counted when it is answered, a stream when it ends; nothing is done per message.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use tonic::body::Body;
use tower::{Layer, Service};
use tracing::Instrument;
use tracing::field::Empty;

use crate::connection::ConnectionHandle;
use crate::metrics::{Method, Metrics};

/// Puts observation around the services.
#[derive(Clone, Debug)]
pub struct ObserveLayer {
    /// Where it is counted.
    pub metrics: Arc<Metrics>,
}

impl<S> Layer<S> for ObserveLayer {
    type Service = Observe<S>;
    fn layer(&self, inner: S) -> Observe<S> {
        Observe { metrics: Arc::clone(&self.metrics), inner }
    }
}

/// The observed services.
#[derive(Clone, Debug)]
pub struct Observe<S> {
    metrics: Arc<Metrics>,
    inner: S,
}

/// A call under way; counted once, when its outcome is known or it is dropped.
struct Observed {
    metrics: Arc<Metrics>,
    method: Method,
    began: Instant,
    code: Option<i32>,
}

impl Observed {
    fn saw(&mut self, headers: &http::HeaderMap) {
        let code = headers.get("grpc-status").and_then(|code| code.to_str().ok());
        if let Some(code) = code.and_then(|code| code.parse().ok()) {
            self.code = Some(code);
        }
    }
}

impl Drop for Observed {
    fn drop(&mut self) {
        // Without a status the peer went away first: CANCELLED.
        let code = self.code.unwrap_or(tonic::Code::Cancelled as i32);
        self.metrics.called(&self.method, code, self.began.elapsed());
    }
}

/// A response body that sees the status in its trailers.
struct ObservedBody {
    body: Body,
    observed: Observed,
}

impl http_body::Body for ObservedBody {
    type Data = bytes::Bytes;
    type Error = tonic::Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<bytes::Bytes>, tonic::Status>>> {
        let polled = Pin::new(&mut self.body).poll_frame(context);
        if let Poll::Ready(Some(Ok(frame))) = &polled
            && let Some(trailers) = frame.trailers_ref()
        {
            self.observed.saw(trailers);
        }
        polled
    }
    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }
    fn size_hint(&self) -> http_body::SizeHint {
        self.body.size_hint()
    }
}

impl<S> Service<http::Request<Body>> for Observe<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let method = Method::of(request.uri().path());
        let span = tracing::debug_span!("call", method = method.name(), peer = Empty, identity = Empty);
        if let Some(connection) = request.extensions().get::<ConnectionHandle>()
            && !span.is_disabled()
        {
            span.record("peer", tracing::field::display(connection.peer()));
            if let Some(identity) = connection.identity() {
                span.record("identity", tracing::field::display(identity));
            }
        }
        let metrics = Arc::clone(&self.metrics);
        let mut observed = Observed { metrics, method, began: Instant::now(), code: None };
        let call = self.inner.call(request);
        Box::pin(
            async move {
                let response = call.await?;
                observed.saw(response.headers());
                Ok(response.map(|body| Body::new(ObservedBody { body, observed })))
            }
            .instrument(span),
        )
    }
}
