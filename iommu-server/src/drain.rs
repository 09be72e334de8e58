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
        // Who has not read its status after a moment does not read, and its connection holds up the end; calls may take longer, but not
        // longer than there is time.
        let late = deadline.saturating_sub(bounds::ENDING_GRACE);
        let soon = deadline.min(bounds::ENDING_GRACE);
        let mut quiet = self.is_quiet_at(began + soon).await;
        if !quiet {
            self.host.cut_device_sessions();
            quiet = self.is_quiet_at(began + late).await;
        }
        if !quiet {
            self.host.connections.cut_all();
            quiet = self.is_quiet_at(began + deadline).await;
        }
        let drained = if quiet { Drained::Cleanly } else { Drained::Late };
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

    /// Whether the last connection ends by then.
    async fn is_quiet_at(&mut self, then: Instant) -> bool {
        tokio::time::timeout_at(then.into(), &mut self.transport).await.is_ok()
    }
}
