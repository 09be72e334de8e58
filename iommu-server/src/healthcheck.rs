//! Asks a running server whether it serves: for container health checks, which have no other client.

use std::time::Duration;

use iommu_proto::channel::{Dial, Dialled};
use iommu_proto::credentials::Credentials;
use iommu_types::{Identity, Role};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::tls::bootstrap::OBSERVER;

/// Whether the server at `server` (`https://HOST:PORT`, `http://HOST:PORT` or `unix:///PATH`, as every client takes it) serves; the error says
/// why that could not be found out. Over TLS it asks as an observer, who may do least.
pub async fn healthcheck(server: &str, credentials: &Credentials, timeout: Duration) -> Result<bool, String> {
    let observer = Identity { name: OBSERVER.to_owned(), role: Role::Observer };
    let ask = async {
        let dial = Dial::to(server, credentials, &observer).map_err(|error| format!("--server: {error}"))?;
        let Dialled { channel, trouble } =
            dial.connect().await.map_err(|error| format!("{server}: {error}"))?;
        let request = HealthCheckRequest { service: String::new() };
        let answer = HealthClient::new(channel).check(request).await;
        answer.map_err(|status| match trouble.take() {
            Some(refused) => format!("{server}: {refused}"),
            None => format!("{server}: {}", status.message()),
        })
    };
    match tokio::time::timeout(timeout, ask).await {
        Ok(answer) => Ok(answer?.into_inner().status() == ServingStatus::Serving),
        Err(_) => Err(format!("{server}: no answer within {timeout:?}")),
    }
}
