//! Asks a running server whether it serves: for container health checks, which have no other client.

use std::time::Duration;

use tonic::transport::Endpoint;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

/// Whether the server at `server` (HOST:PORT or unix:PATH) serves; the error says why that could not be found out.
pub async fn healthcheck(server: &str, timeout: Duration) -> Result<bool, String> {
    let address = match server.strip_prefix("unix:") {
        Some(path) => format!("unix://{path}"),
        None => format!("http://{server}"),
    };
    let ask = async {
        let endpoint = Endpoint::from_shared(address).map_err(|e| e.to_string())?;
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
