//! An agent: one device model, its sessions one after another.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::time::Duration;

use iommu_proto::credentials::Credentials;
use iommu_types::DeviceAddress;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::link::Link;
use crate::session::{Peer, serve};
use crate::{Backoff, DeviceModel, Dma, EndReason, LinkState, Reconnect};

/// How an agent is to run.
#[derive(Clone, Debug)]
#[must_use = "a builder does nothing until it is run or built"]
pub struct AgentBuilder {
    peer: Peer,
    reconnect: Reconnect,
    stop: CancellationToken,
}

impl AgentBuilder {
    /// Where the certificate is with which the agent shows who it is; unless given, in the [default
    /// directory](iommu_proto::credentials::default_directory), under the address of the device.
    pub fn credentials(mut self, credentials: Credentials) -> Self {
        self.peer.credentials = credentials;
        self
    }

    /// When to connect again; [`Reconnect::STANDARD`] unless given.
    pub fn reconnect(mut self, policy: Reconnect) -> Self {
        self.reconnect = policy;
        self
    }

    /// Ends the agent gracefully when the token is cancelled: no new DMA, what is in flight is awaited for 2
    /// s.
    pub fn stop_on(mut self, token: CancellationToken) -> Self {
        self.stop = token;
        self
    }

    /// An agent, not yet running; for models that need its [`Dma`] handle when they are made.
    pub fn build(self) -> Agent {
        Agent { peer: self.peer, reconnect: self.reconnect, stop: self.stop, link: Arc::new(Link::new()) }
    }

    /// Builds the agent and runs it; see [`Agent::run`].
    pub async fn run<M: DeviceModel>(self, model: M) -> Result<(), EndReason> {
        self.build().run(model).await
    }
}

/// A device agent.
#[derive(Debug)]
pub struct Agent {
    peer: Peer,
    reconnect: Reconnect,
    stop: CancellationToken,
    link: Arc<Link>,
}

impl Agent {
    /// An agent that connects to `endpoint` (`https://127.0.0.1:7450` or `unix:///run/iommu.sock`) as the device that the server's
    /// configuration knows as `name` at `address`.
    pub fn builder(
        endpoint: impl Into<String>,
        name: impl Into<String>,
        address: DeviceAddress,
    ) -> AgentBuilder {
        AgentBuilder {
            peer: Peer {
                endpoint: endpoint.into(),
                credentials: Credentials::from_default_directory(),
                name: name.into(),
                address,
            },
            reconnect: Reconnect::STANDARD,
            stop: CancellationToken::new(),
        }
    }

    /// The handle for DMA; good before, during and between sessions.
    pub fn dma(&self) -> Dma {
        Dma::new(Arc::clone(&self.link))
    }

    /// Runs the model until the agent is stopped (`Ok`) or its session ends for a reason that a new session
    /// would not mend (`Err`), such as a newer agent for the same address.
    pub async fn run<M: DeviceModel>(self, model: M) -> Result<(), EndReason> {
        let model = Arc::new(model);
        let dma = self.dma();
        let own_work = {
            let model = Arc::clone(&model);
            tokio::spawn(async move { model.run(dma).await })
        };
        // Dropping this future must leave neither the model running nor a DMA waiting.
        let mut own_work = AbortOnDrop(own_work);
        let mut end = EndOnDrop { link: &self.link, reason: EndReason::Cancelled };
        let reason = tokio::select! {
            reason = self.sessions(&model) => reason,
            () = panicked(&mut own_work) => unreachable!("it goes on or unwinds"),
        };
        end.reason = reason.clone();
        drop(end);
        match reason {
            EndReason::Cancelled => Ok(()),
            reason => Err(reason),
        }
    }

    async fn sessions<M: DeviceModel>(&self, model: &Arc<M>) -> EndReason {
        let mut backoff = Backoff::new(&self.reconnect);
        let mut attempts = 0u32;
        loop {
            let mut stood = false;
            let reason = serve(&self.peer, &self.link, model, &self.stop, || stood = true).await;
            if stood {
                attempts = 0;
                backoff.succeeded();
            }
            let exhausted = self.reconnect.attempts_max.is_some_and(|most| attempts >= most);
            if exhausted || !reason.allows_reconnect(&self.reconnect) {
                return reason;
            }
            attempts = attempts.saturating_add(1);
            let delay = backoff.next_delay().max(reason.least_delay());
            self.tell_retry(&reason, delay);
            self.link.down(LinkState::Down { reason: Some(reason), retry_in: delay });
            tokio::select! {
                biased;
                () = self.stop.cancelled() => return EndReason::Cancelled,
                () = tokio::time::sleep(delay) => {}
            }
        }
    }

    fn tell_retry(&self, reason: &EndReason, delay: Duration) {
        tracing::warn!(device = %self.peer.address, %reason, retry_ms = delay.as_millis() as u64, "session ended");
    }
}

/// Waits for a panic of the model's own work, to pass it on: an agent without its device must not look alive. A model
/// whose work has ended goes on answering register accesses.
async fn panicked(own_work: &mut JoinHandle<()>) {
    if let Err(ended) = own_work.await
        && ended.is_panic()
    {
        std::panic::resume_unwind(ended.into_panic());
    }
    std::future::pending().await
}

/// Ends the link with the agent, also when the agent's future is dropped, so that every operation ends.
struct EndOnDrop<'a> {
    link: &'a Link,
    reason: EndReason,
}

impl Drop for EndOnDrop<'_> {
    fn drop(&mut self) {
        self.link.down(LinkState::Ended { reason: self.reason.clone() });
    }
}

/// A task that ends with this value.
#[derive(Debug)]
pub(crate) struct AbortOnDrop(pub(crate) JoinHandle<()>);

impl Deref for AbortOnDrop {
    type Target = JoinHandle<()>;
    fn deref(&self) -> &JoinHandle<()> {
        &self.0
    }
}

impl DerefMut for AbortOnDrop {
    fn deref_mut(&mut self) -> &mut JoinHandle<()> {
        &mut self.0
    }
}

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}
