//! One session from Hello to its end: the handshake, and the task that reads the stream.

use std::sync::Arc;
use std::time::Duration;

use iommu_proto::channel::{Dial, Dialled};
use iommu_proto::credentials::Credentials;
use iommu_proto::limits::{MESSAGE_BYTES_MAX, SCHEMA_VERSION};
use iommu_proto::model::{FromDevice, Hello, ToDevice, Welcome};
use iommu_proto::pb;
use iommu_proto::pb::device_service_client::DeviceServiceClient;
use iommu_types::{DeviceAddress, Identity, Role};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Streaming;

use crate::agent::AbortOnDrop;
use crate::device_task::{self, Work};
use crate::link::{DMA_CREDITS_MAX, Link, MMIO_CREDITS, OUTBOUND_MAX, Session};
use crate::{DeviceModel, Dma, EndReason, LinkState, SessionLimits};

/// How long the server may take from Hello to Welcome.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a graceful stop waits for batches in flight.
const STOP_GRACE: Duration = Duration::from_secs(2);
/// How long a register access may run on after its session has ended.
const DEVICE_TASK_GRACE: Duration = Duration::from_secs(5);

/// Who says Hello, and where.
#[derive(Clone, Debug)]
pub(crate) struct Peer {
    pub(crate) endpoint: String,
    pub(crate) credentials: Credentials,
    pub(crate) name: String,
    pub(crate) address: DeviceAddress,
}

/// Connects, shakes hands, and serves until the session ends. `established` is called once it stands.
pub(crate) async fn serve<M: DeviceModel>(
    peer: &Peer,
    link: &Arc<Link>,
    model: &Arc<M>,
    stop: &CancellationToken,
    established: impl FnOnce(),
) -> EndReason {
    let handshake = tokio::time::timeout(HANDSHAKE_TIMEOUT, shake_hands(peer));
    let shaken = tokio::select! {
        biased;
        () = stop.cancelled() => return EndReason::Cancelled,
        shaken = handshake => shaken,
    };
    let (session, mut inbound) = match shaken {
        Ok(Ok(shaken)) => shaken,
        Ok(Err(reason)) => return reason,
        Err(_) => return EndReason::Lost(format!("no Welcome within {HANDSHAKE_TIMEOUT:?}")),
    };
    tracing::info!(device = %peer.address, generation = session.generation.0, "session stands");
    link.up(Arc::clone(&session));
    established();
    let (work, queue) = device_task::work_queue();
    let dma = Dma::new(Arc::clone(link));
    let mut device =
        AbortOnDrop(tokio::spawn(device_task::run(Arc::clone(model), dma, Arc::clone(&session), queue)));
    let reason = tokio::select! {
        reason = read(&session, &mut inbound, &work) => reason,
        reason = stop_gracefully(&session, stop) => reason,
        () = session.overrun.cancelled() => {
            EndReason::Protocol("the server asks and answers beyond its credits and does not read".into())
        }
        ended = &mut *device => {
            // The queue is open, so only a panic ends it. A device whose registers are broken must not look alive.
            let panic = ended.expect_err("the device task runs for as long as its queue is open");
            std::panic::resume_unwind(panic.into_panic())
        }
    };
    // At once, so that whoever waits for a session does not find this one while the last access runs out.
    link.down(LinkState::Down { reason: Some(reason.clone()), retry_in: Duration::ZERO });
    drop(work);
    // The next session's accesses must not run beside one of this session: order on the bus.
    if tokio::time::timeout(DEVICE_TASK_GRACE, &mut *device).await.is_err() {
        tracing::warn!("a register access did not end with its session and is dropped");
    }
    reason
}

async fn shake_hands(peer: &Peer) -> Result<(Arc<Session>, Streaming<pb::ServerToDevice>), EndReason> {
    let identity = Identity { name: peer.name.clone(), role: Role::Device(peer.address) };
    let dial = Dial::to(&peer.endpoint, &peer.credentials, &identity)?;
    let Dialled { channel, trouble } = dial.connect().await?;
    let mut client = DeviceServiceClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
    let (outbound, messages) = mpsc::channel(OUTBOUND_MAX);
    let hello = FromDevice::Hello(Hello {
        schema_version: SCHEMA_VERSION,
        name: peer.name.clone(),
        address: peer.address,
        mmio_credits: MMIO_CREDITS,
    });
    outbound.try_send(hello.into()).expect("a new channel has room");
    // A certificate that the server refuses is told with the first answer, in TLS 1.3.
    let refused = |status| trouble.take().map_or_else(|| EndReason::of(&status, false), EndReason::from);
    let mut inbound = client.attach(ReceiverStream::new(messages)).await.map_err(refused)?.into_inner();
    let Some(first) = inbound.message().await.map_err(refused)? else {
        return Err(EndReason::Lost("the stream ended before Welcome".into()));
    };
    let welcome = match ToDevice::try_from(first) {
        Ok(ToDevice::Welcome(welcome)) => welcome,
        Ok(_) => return Err(EndReason::Protocol("the first message is not Welcome".into())),
        Err(error) => return Err(EndReason::Protocol(error.to_string())),
    };
    let limits = limits_of(&welcome)?;
    let session = Session::new(welcome.generation, limits, welcome.assignment_generation, outbound);
    Ok((Arc::new(session), inbound))
}

fn limits_of(welcome: &Welcome) -> Result<SessionLimits, EndReason> {
    let rule = |holds: bool, what: &str| {
        if holds { Ok(()) } else { Err(EndReason::Protocol(format!("welcome.{what}"))) }
    };
    rule(welcome.schema_version == SCHEMA_VERSION, "schema_version: this agent speaks version 1")?;
    rule(welcome.dma_credits >= 1, "dma_credits: at least 1 is needed")?;
    rule(welcome.batch_operations_max >= 1, "batch_operations_max: at least 1 is needed")?;
    rule(welcome.batch_bytes_max >= 1, "batch_bytes_max: at least 1 is needed")?;
    Ok(SessionLimits {
        dma_credits: welcome.dma_credits.min(DMA_CREDITS_MAX),
        batch_operations_max: welcome.batch_operations_max,
        batch_bytes_max: welcome.batch_bytes_max,
    })
}

/// Reads the stream until it ends. Waits for nothing but the stream.
async fn read(
    session: &Session,
    inbound: &mut Streaming<pb::ServerToDevice>,
    work: &mpsc::Sender<Work>,
) -> EndReason {
    loop {
        let message = match inbound.message().await {
            Ok(Some(message)) => message,
            Ok(None) => return EndReason::Lost("the server ended the stream".into()),
            Err(status) => return EndReason::of(&status, true),
        };
        if let Err(broken) = take(session, work, message) {
            return EndReason::Protocol(broken);
        }
    }
}

/// Takes one message. `Err` says which rule it breaks.
fn take(session: &Session, work: &mpsc::Sender<Work>, message: pb::ServerToDevice) -> Result<(), String> {
    let queue = |item| {
        work.try_send(item).map_err(|_| format!("more than {MMIO_CREDITS} register accesses unanswered"))
    };
    match ToDevice::try_from(message).map_err(|error| error.to_string())? {
        ToDevice::Dma(completions) => session.completed(completions),
        ToDevice::Mmio(request) => queue(Work::Mmio(request)),
        ToDevice::Reset { tag, assignment_generation } => {
            session.reset_begun()?;
            queue(Work::Reset { tag, assignment_generation })
        }
        ToDevice::Welcome(_) => Err("a second Welcome".into()),
    }
}

/// Waits to be asked to stop, then for what is in flight, but not for long.
async fn stop_gracefully(session: &Session, stop: &CancellationToken) -> EndReason {
    stop.cancelled().await;
    session.stop_admitting();
    let quiet = async {
        while !session.is_quiet() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    if tokio::time::timeout(STOP_GRACE, quiet).await.is_err() {
        tracing::warn!(
            "batches are still in flight after {STOP_GRACE:?}; the session ends without their answers"
        );
    }
    EndReason::Cancelled
}
