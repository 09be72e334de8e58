//! A bound on calls at once, over all connections. One connection is bounded by HTTP/2 (`STREAMS_PER_CONNECTION_MAX`).

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use iommu_proto::errors::WireError;
use iommu_types::errors::LimitReached;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::body::Body;
use tower::{Layer, Service};

use crate::bounds;
use crate::telemetry::warn_limited;

/// Refuses calls beyond the bound at once, instead of queueing them.
#[derive(Clone, Debug)]
pub struct LimitLayer {
    places: Arc<Semaphore>,
    places_max: usize,
}

impl LimitLayer {
    /// With so many places.
    pub fn new(places_max: usize) -> Self {
        Self { places: Arc::new(Semaphore::new(places_max)), places_max }
    }
}

impl Default for LimitLayer {
    fn default() -> Self {
        Self::new(bounds::CALLS_MAX)
    }
}

impl<S> Layer<S> for LimitLayer {
    type Service = Limit<S>;
    fn layer(&self, inner: S) -> Limit<S> {
        Limit { places: Arc::clone(&self.places), places_max: self.places_max, inner }
    }
}

/// The services behind the bound.
#[derive(Clone, Debug)]
pub struct Limit<S> {
    places: Arc<Semaphore>,
    places_max: usize,
    inner: S,
}

/// A response body that keeps the call's place until it ends.
struct Placed {
    body: Body,
    _place: OwnedSemaphorePermit,
}

impl http_body::Body for Placed {
    type Data = bytes::Bytes;
    type Error = tonic::Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<bytes::Bytes>, tonic::Status>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }
    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }
    fn size_hint(&self) -> http_body::SizeHint {
        self.body.size_hint()
    }
}

impl<S> Service<http::Request<Body>> for Limit<S>
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
        let Ok(place) = Arc::clone(&self.places).try_acquire_owned() else {
            let allowed = self.places_max as u64;
            warn_limited!(allowed, "call refused: too many at once");
            let status = LimitReached { limit: "calls".to_owned(), allowed }.into_status();
            return Box::pin(std::future::ready(Ok(status.into_http())));
        };
        let call = self.inner.call(request);
        Box::pin(async move { Ok(call.await?.map(|body| Body::new(Placed { body, _place: place }))) })
    }
}
