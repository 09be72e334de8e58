//! The admin port: /metrics for Prometheus, /healthz (the process runs), /readyz (it takes calls). Plain HTTP on loopback.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;

use crate::host::Host;

#[derive(Clone)]
struct Admin {
    host: Arc<Host>,
    registry: Arc<Registry>,
}

async fn metrics(State(admin): State<Admin>) -> impl IntoResponse {
    let mut text = String::new();
    if prometheus_client::encoding::text::encode(&mut text, &admin.registry).is_err() {
        return (StatusCode::INTERNAL_SERVER_ERROR, [(header::CONTENT_TYPE, "text/plain")], String::new());
    }
    let content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    (StatusCode::OK, [(header::CONTENT_TYPE, content_type)], text)
}

async fn ready(State(admin): State<Admin>) -> impl IntoResponse {
    match admin.host.shutdown.ended() {
        None => (StatusCode::OK, "ready\n"),
        Some(_) => (StatusCode::SERVICE_UNAVAILABLE, "shutting down\n"),
    }
}

/// Binds the port.
pub async fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    TcpListener::bind(address).await
}

/// Serves until the process ends: metrics of a drain are worth having.
pub async fn serve(listener: TcpListener, host: Arc<Host>) {
    let registry = Arc::new(crate::metrics::registry(&host));
    let router = Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .with_state(Admin { host, registry });
    if let Err(reason) = axum::serve(listener, router).await {
        tracing::error!(%reason, "the admin port failed");
    }
}
