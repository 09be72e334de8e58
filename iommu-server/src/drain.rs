//! How the server ends: every stream is told, idle ones included, and what does not end in time is cut.
//!
//! The transport by itself would wait for open streams for ever.

use std::time::{Duration, Instant};

use tonic_health::ServingStatus;

use crate::bounds;
use crate::server::{SERVICES, Server};

/// How a drain went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drained {
    /// Every connection ended by itself.
    Cleanly,
    /// The deadline came first.
    Late,
}

impl Server {
    /// Stops accepting, tells every stream (SHUTTING_DOWN), and waits for connections to end, at most until the deadline.
    pub async fn drain(mut self, deadline: Duration) -> Drained {
        let began = Instant::now();
        self.health.set_service_status("", ServingStatus::NotServing).await;
        for service in SERVICES {
            self.health.set_service_status(service, ServingStatus::NotServing).await;
        }
        self.host.shut_down();
        let grace = deadline.min(bounds::ENDING_GRACE);
        let drained = match tokio::time::timeout(grace, &mut self.transport).await {
            Ok(_) => Drained::Cleanly,
            Err(_) => {
                // Who has not read its status by now does not read: its connection holds up the others.
                self.host.cut_device_sessions();
                let rest = deadline.saturating_sub(began.elapsed());
                match tokio::time::timeout(rest, &mut self.transport).await {
                    Ok(_) => Drained::Cleanly,
                    Err(_) => Drained::Late,
                }
            }
        };
        self.transport.abort();
        for task in &self.background {
            task.abort();
        }
        tracing::info!(
            took_ms = began.elapsed().as_millis() as u64,
            connections = self.host.connections.open(),
            ?drained,
            "drained"
        );
        drained
    }
}
