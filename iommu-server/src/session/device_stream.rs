//! The stream of a device session: one task, no channel, no hop (ADR 0002).
//!
//! The transport polls the response stream when it has room to write. Then, in this order: messages for the device (MMIO, resets) go out; else
//! the next message of the device is read, and a DMA batch is carried out on the spot and its completions returned. So reading
//! happens only when writing can, excess credit cannot pile up in memory, and since a device always reads its stream nothing
//! deadlocks: whatever it still has to send waits in its own buffers while completions flow.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use futures_core::Stream;
use iommu_hardware::vtd::Port;
use iommu_hardware::vtd::interrupt::DeliveredInterrupt;
use iommu_proto::errors::WireError;
use iommu_proto::framing::typed_framing_status;
use iommu_proto::pb::{self, device_to_server, server_to_device};
use iommu_proto::{limits, model};
use iommu_types::errors::{
    IdentityRefused, LimitReached, ProtocolViolation, SessionExists, ShuttingDown, VersionMismatch,
};
use iommu_types::{DeviceAddress, Identity, Refusal, Role};
use tokio::task::coop;
use tonic::{Status, Streaming};

use super::device::DeviceSession;
use super::execute::{Executed, execute_for, refuse};
use super::payer::Payer;
use crate::bounds;
use crate::connection::ConnectionHandle;
use crate::ending::Ending;
use crate::host::Host;
use crate::host::devices::{DeviceState, Home};
use crate::interrupts::Signal;
use crate::telemetry::warn_limited;

/// Time that costs one unit of the task's budget. A task has 128, so whoever waits for a worker waits for half a millisecond of another's DMA at a time,
/// and for one batch, however the batches look: large ones, and such that fault throughout, take long. (With a quarter of it large reads lose a tenth.)
const TIME_PER_BUDGET_UNIT: Duration = Duration::from_micros(4);

struct Live {
    port: Port,
    session: Arc<DeviceSession>,
    device: Arc<DeviceState>,
    /// Until it is sent; `None` afterwards.
    welcome: Option<Welcoming>,
    /// Whose rates its DMA counts for.
    payer: Payer,
    /// While it is over a rate of its owner, nothing is read.
    penalty: Option<Pin<Box<tokio::time::Sleep>>>,
    /// How the stream ended; as long as it did not, the only way out is a lost connection (closed, broken, or silent for too long).
    left: Option<String>,
}

/// A Welcome that waits for the last batch of the sessions before: what a fenced session does is done before the new one begins (I8).
struct Welcoming {
    before_are_quiet: Pin<Box<dyn Future<Output = ()> + Send>>,
    welcome: pb::Welcome,
}

impl Drop for Live {
    fn drop(&mut self) {
        self.session.leave();
        self.device.unseat(&self.session);
        let reason = self.left.as_deref().unwrap_or("the connection is lost");
        tracing::info!(
            device = %self.session.address, generation = self.session.generation, reason, "device session left"
        );
    }
}

enum Stage {
    /// Waiting for Hello; the future resolves when it takes too long or the server goes down.
    Greeting(Pin<Box<dyn Future<Output = Ending> + Send>>),
    Live(Box<Live>),
    Over,
}

/// The response stream of `DeviceService.Attach`.
pub struct DeviceStream {
    host: Arc<Host>,
    connection: ConnectionHandle,
    inbound: Streaming<pb::DeviceToServer>,
    stage: Stage,
}

type Message = server_to_device::Message;

impl DeviceStream {
    /// A stream that waits for Hello.
    pub fn new(
        host: Arc<Host>,
        connection: ConnectionHandle,
        inbound: Streaming<pb::DeviceToServer>,
    ) -> Self {
        let shutdown = host.shutdown.wait_owned();
        let greeting = async move {
            let why = "no Hello came in time".to_owned();
            tokio::select! {
                ending = shutdown => ending,
                () = tokio::time::sleep(bounds::HELLO_TIMEOUT) => Ending::Violation { why },
            }
        };
        Self { host, connection, inbound, stage: Stage::Greeting(Box::pin(greeting)) }
    }

    fn poll_greeting(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Message, Status>>> {
        let Stage::Greeting(limit) = &mut self.stage else { return Poll::Ready(None) };
        if let Poll::Ready(ending) = limit.as_mut().poll(context) {
            return Poll::Ready(Some(Err(ending.into_status())));
        }
        let Some(message) = ready!(Pin::new(&mut self.inbound).poll_next(context)) else {
            return Poll::Ready(None);
        };
        let greeted =
            message.map_err(typed_framing_status).and_then(|message| match message.message {
                Some(device_to_server::Message::Hello(hello)) => self.greet(hello),
                _ => Err(ProtocolViolation { why: "the first message of a session is Hello".to_owned() }
                    .into_status()),
            });
        if let Err(status) = greeted {
            warn_limited!(peer = %self.connection.peer(), reason = status.message(), "device refused");
            return Poll::Ready(Some(Err(status)));
        }
        self.poll_live(context)
    }

    fn greet(&mut self, hello: pb::Hello) -> Result<(), Status> {
        if self.host.shutdown.ended().is_some() {
            return Err(ShuttingDown {}.into_status());
        }
        if hello.schema_version != limits::SCHEMA_VERSION {
            let (server, peer) = (limits::SCHEMA_VERSION, hello.schema_version);
            return Err(VersionMismatch { server, peer }.into_status());
        }
        let hello = model::Hello::try_from(hello).map_err(WireError::into_status)?;
        let address = hello.address;
        let identity = Identity { name: hello.name.clone(), role: Role::Device(address) };
        self.connection.must_be_certified(&identity).map_err(WireError::into_status)?;
        self.host.certificate_holds(&self.connection)?;
        let device = self.known(&hello.name, address).map_err(WireError::into_status)?;
        // The agent of the same device may come back on the connection that it has; anybody else may not (I8).
        if !self.connection.identify(&identity) && self.connection.identity() != Some(&identity) {
            return Err(SessionExists {}.into_status());
        }
        self.seat(device, hello.mmio_credits)
    }

    /// The device of that name at that address, as the configuration or a machine's creator declared it.
    fn known(&self, name: &str, address: DeviceAddress) -> Result<Arc<DeviceState>, IdentityRefused> {
        let refused = |why: String| IdentityRefused { name: name.to_owned(), why };
        let device = self.host.devices.get(address).map_err(|unknown| refused(unknown.to_string()))?;
        if device.name != name {
            return Err(refused(format!("the device at {address} has another name")));
        }
        Ok(device)
    }

    fn seat(&mut self, device: Arc<DeviceState>, mmio_credits: u32) -> Result<(), Status> {
        let unit = match &device.home {
            Home::Host => self.host.kernel.unit(),
            Home::Machine(machine) => machine.unit(),
        };
        let port = unit.port(device.address.source_id).map_err(|_| {
            let limit = "device_sessions".to_owned();
            LimitReached { limit, allowed: u64::from(bounds::DEVICE_PORTS_MAX) }.into_status()
        })?;
        let connection = self.connection.clone();
        let make = |generation| {
            DeviceSession::new(device.address, generation, device.assignment(), mmio_credits, connection)
        };
        let (session, fenced) = device.seat(make).map_err(WireError::into_status)?;
        self.host.watchdog.watch(&session);
        // Whoever ends the connection meanwhile finds the session there, or is found here.
        if let Some(why) = self.connection.ended() {
            session.end(why.clone());
        }
        tracing::info!(
            device = %device.address, name = %device.name, generation = session.generation, peer = %self.connection.peer(),
            "device session begins"
        );
        let welcome = pb::Welcome {
            schema_version: limits::SCHEMA_VERSION,
            generation: session.generation,
            dma_credits: bounds::DMA_CREDITS,
            batch_operations_max: bounds::BATCH.operations_max,
            batch_bytes_max: bounds::BATCH.bytes_max,
            assignment_generation: session.acknowledged(),
        };
        let quiet = async move {
            for before in fenced {
                before.quiet().await;
            }
        };
        let welcome = Some(Welcoming { before_are_quiet: Box::pin(quiet), welcome });
        self.stage = Stage::Live(Box::new(Live {
            port,
            session,
            device,
            welcome,
            payer: Payer::default(),
            penalty: None,
            left: None,
        }));
        if self.host.shutdown.ended().is_some() {
            // The drain may have looked before this session was there to be seen.
            self.host.end_device_sessions();
        }
        Ok(())
    }

    fn poll_live(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Message, Status>>> {
        let Stage::Live(live) = &mut self.stage else { return Poll::Ready(None) };
        live.session.progress.polled();
        if let Some(welcoming) = &mut live.welcome {
            ready!(welcoming.before_are_quiet.as_mut().poll(context));
            let welcome = live.welcome.take().map(|welcoming| Ok(Message::Welcome(welcoming.welcome)));
            return Poll::Ready(welcome);
        }
        loop {
            // First the waker is put in place, then the end is looked for: an end in between is not missed.
            let queued = live.session.mailbox.poll_take(context);
            if let Some(ending) = live.session.ended() {
                return Poll::Ready(Some(Err(ending.clone().into_status())));
            }
            if let Poll::Ready(message) = queued {
                return Poll::Ready(Some(Ok(message)));
            }
            if let Some(penalty) = &mut live.penalty {
                ready!(penalty.as_mut().poll(context));
                live.penalty = None;
            }
            let budget = ready!(coop::poll_proceed(context));
            let Some(message) = ready!(Pin::new(&mut self.inbound).poll_next(context)) else {
                return Poll::Ready(None);
            };
            budget.made_progress();
            let message = match message {
                Ok(message) => message.message,
                Err(status) => return Poll::Ready(Some(Err(typed_framing_status(status)))),
            };
            let begun = Instant::now();
            match live.take(&self.host, message) {
                Ok(Some(executed)) => {
                    spend(context, begun.elapsed());
                    return Poll::Ready(Some(Ok(Message::Dma(executed.completions))));
                }
                Ok(None) => {}
                Err(why) => {
                    // The ending is then told as for every other reason, at the top of the loop.
                    live.session.end(Ending::Violation { why });
                }
            }
        }
    }
}

/// Takes more of the task's budget for a batch that took long. Running out is no harm: the task yields at its next poll.
fn spend(context: &mut Context<'_>, took: Duration) {
    for _ in 0..took.as_nanos() / TIME_PER_BUDGET_UNIT.as_nanos() {
        match coop::poll_proceed(context) {
            Poll::Ready(budget) => budget.made_progress(),
            Poll::Pending => break,
        }
    }
}

impl Live {
    /// Takes one message of the device; the error is its violation of the protocol.
    fn take(
        &mut self,
        host: &Arc<Host>,
        message: Option<device_to_server::Message>,
    ) -> Result<Option<Executed>, String> {
        match message {
            Some(device_to_server::Message::Dma(batch)) => self.dma(host, &batch).map(Some),
            Some(device_to_server::Message::Mmio(completion)) => self.mmio(completion).map(|()| None),
            Some(device_to_server::Message::ResetDone(done)) if self.session.reset_done(done.tag) => Ok(None),
            Some(device_to_server::Message::ResetDone(done)) => {
                Err(format!("reset_done.tag: no reset with tag {} was asked for", done.tag))
            }
            Some(device_to_server::Message::Hello(_)) => Err("a second Hello".to_owned()),
            None => Err("message: absent, or of a kind that this version does not know".to_owned()),
        }
    }

    fn dma(&mut self, host: &Arc<Host>, batch: &pb::DmaBatch) -> Result<Executed, String> {
        // Fenced between the check at the top of the loop and here: refused, not carried out (I6: answered and counted). Whoever ended the
        // session may wait for `executing`, so it is asked with that lock held.
        let executing = self.session.executing.try_lock();
        let executed = if self.is_stale(batch) {
            // Whoever moves the device raised its generation first and then waits for `executing`.
            refuse(batch, Refusal::StaleGeneration)
        } else if self.session.ended().is_some() {
            refuse(batch, Refusal::Fenced)
        } else if executing.is_err() {
            // Of a session that has not ended, whoever waits for the end of a batch is resetting the device.
            refuse(batch, Refusal::StaleGeneration)
        } else if let Err(over) = self.payer.pay(&self.device, batch) {
            self.penalty = Some(Box::pin(tokio::time::sleep(over.penalty)));
            refuse(batch, over.refusal)
        } else {
            let device = &self.device;
            let deliver = |interrupt: DeliveredInterrupt| {
                let signal = Signal::Device {
                    device: device.address,
                    vector: interrupt.vector,
                    destination: interrupt.destination,
                };
                match &device.home {
                    Home::Host => {
                        if let Some(owner) = device.owner() {
                            owner.interrupts.deliver(signal);
                        }
                    }
                    Home::Machine(machine) => machine.interrupts.deliver(signal),
                }
            };
            execute_for(device, &mut self.port, batch, deliver)?
        };
        self.device.counters.add(executed.count);
        if executed.count.faults > 0 && matches!(self.device.home, Home::Host) {
            host.faults.collect(host);
        }
        Ok(executed)
    }

    /// Whether a batch was queued before the device changed hands or was reset, or comes before the device knows of it.
    fn is_stale(&self, batch: &pb::DmaBatch) -> bool {
        let (current, acknowledged) = (self.device.assignment(), self.session.acknowledged());
        acknowledged != current || batch.assignment_generation.is_some_and(|claimed| claimed != current)
    }

    fn mmio(&self, completion: pb::MmioCompletion) -> Result<(), String> {
        let completion = model::MmioCompletion::try_from(completion).map_err(|e| format!("mmio.{e}"))?;
        let tag = completion.tag;
        if !self.session.mmio.complete(tag, completion.outcome) {
            return Err(format!("mmio.tag: no request with tag {tag} is outstanding"));
        }
        Ok(())
    }
}

impl DeviceStream {
    fn over(&mut self, why: &str) {
        if let Stage::Live(live) = &mut self.stage {
            live.left = Some(why.to_owned());
        }
        self.stage = Stage::Over;
    }
}

impl Stream for DeviceStream {
    type Item = Result<pb::ServerToDevice, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let polled = match &self.stage {
            Stage::Greeting(_) => self.poll_greeting(context),
            Stage::Live(_) => self.poll_live(context),
            Stage::Over => return Poll::Ready(None),
        };
        match &polled {
            Poll::Ready(Some(Ok(_))) => {
                if let Stage::Live(live) = &self.stage {
                    live.session.progress.handed_out();
                }
            }
            Poll::Pending => {
                if let Stage::Live(live) = &self.stage {
                    live.session.progress.nothing();
                }
            }
            // A status ends the stream, and so does the device by closing its side.
            Poll::Ready(Some(Err(status))) => self.over(status.message()),
            Poll::Ready(None) => self.over("the device closed its stream"),
        }
        polled.map(|next| next.map(|next| next.map(|message| pb::ServerToDevice { message: Some(message) })))
    }
}
