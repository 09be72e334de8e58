//! How the server ends: every stream is told, idle ones included, and what does not end in time is cut.
//!
//! The transport by itself would wait for open streams for ever.

use std::time::{Duration, Instant};

use tonic_health::ServingStatus;

use crate::bounds;
use crate::host::Host;
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
        let steps: [(Duration, fn(&Host)); 2] = [
            (deadline.min(bounds::ENDING_GRACE), Host::cut_device_sessions),
            (late, |host| host.connections.cut_all()),
        ];
        let mut drained = Drained::Late;
        for (until, then) in steps {
            if self.is_quiet(until.saturating_sub(began.elapsed())).await {
                drained = Drained::Cleanly;
                break;
            }
            then(&self.host);
        }
        if drained == Drained::Late && self.is_quiet(deadline.saturating_sub(began.elapsed())).await {
            drained = Drained::Cleanly;
        }
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

    /// Whether the last connection ends within the time.
    async fn is_quiet(&mut self, within: Duration) -> bool {
        tokio::time::timeout(within, &mut self.transport).await.is_ok()
    }
}
