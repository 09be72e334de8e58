//! Asks a running server whether it serves: for container health checks, which have no other client.

use std::time::Duration;

use tonic::transport::Endpoint;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

/// Whether the server at `server` (`http://HOST:PORT` or `unix:///PATH`, as every client takes it) serves; the error says why that could
/// not be found out.
pub async fn healthcheck(server: &str, timeout: Duration) -> Result<bool, String> {
    let ask = async {
        let endpoint = Endpoint::from_shared(server.to_owned())
            .map_err(|e| format!("--server {server:?}: {e}; write http://HOST:PORT or unix:///PATH"))?;
        let channel = endpoint.connect().await.map_err(|e| format!("{server}: {e}"))?;
        let request = HealthCheckRequest { service: String::new() };
        let answer = HealthClient::new(channel).check(request).await;
        answer.map_err(|status| format!("{server}: {}", status.message()))
    };
    match tokio::time::timeout(timeout, ask).await {
        Ok(answer) => Ok(answer?.into_inner().status() == ServingStatus::Serving),
        Err(_) => Err(format!("{server}: no answer within {timeout:?}")),
    }
}
