//! What virtual machines ask their hypervisor, and its answers, in any order.
//!
//! A call is a value that is answered, refused, or dropped, which refuses it too; so none is left without an answer. At most
//! [`Hypercalls::IN_FLIGHT_MAX`] are out at once: the next is read when one of them is answered. A call belongs to the stream it came on: when
//! that is lost, its answer goes nowhere, as the server has told its guest already; what has not been done for it is better not done
//! ([`Hypercall::is_lost`]).

use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use iommu_proto::limits::{HYPERCALL_BYTES_MAX, HYPERCALL_REFUSED_BYTES_MAX};
use iommu_proto::model::HypercallAnswer;
use iommu_proto::pb;
use iommu_types::Owner;
use iommu_types::errors::InvalidField;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::client;
use crate::connection::{Core, may_retry};
use crate::convert::bad_answer;
use crate::error::of_status;
use crate::subscription::may_stand_again;
use crate::{Never, SdkError};

/// Delay between attempts to serve again, beyond those of the call itself.
const RETRY_DELAY: Duration = Duration::from_millis(200);

type Answers = mpsc::Sender<pb::ServeHypercallsRequest>;

/// The hypercalls of a hypervisor's virtual machines. Dropping it ends serving: guests whose calls are out are told that
/// nobody serves them.
///
/// ```no_run
/// # async fn run(hypervisor: guest_sdk::Hypervisor) -> Result<(), Box<dyn std::error::Error>> {
/// let calls = hypervisor.serve_hypercalls().await?;
/// let ended = calls
///     .serve(|vm, payload| async move {
///         if payload.is_empty() { Err("nothing was asked".to_owned()) } else { Ok(format!("hello {vm}").into()) }
///     })
///     .await;
/// # Err(ended.into())
/// # }
/// ```
#[derive(Debug)]
pub struct Hypercalls {
    core: Arc<Core>,
    stream: Option<Stream>,
}

#[derive(Debug)]
struct Stream {
    answers: Answers,
    calls: Streaming<pb::ServeHypercallsResponse>,
    is_over: Arc<AtomicBool>,
}

/// Whether the stream of a call still stands.
#[derive(Clone, Debug)]
pub(crate) struct Standing {
    /// Closed by the transport, which may know it before the stream is read on.
    answers: Answers,
    is_over: Arc<AtomicBool>,
}

impl Standing {
    pub(crate) fn is_lost(&self) -> bool {
        self.is_over.load(Ordering::Relaxed) || self.answers.is_closed()
    }
}

/// A hypercall. It is answered or refused once; one that is dropped is refused.
#[derive(Debug)]
#[must_use = "a hypercall that is dropped is refused"]
pub struct Hypercall {
    vm: u32,
    payload: Bytes,
    reply: Reply,
    standing: Standing,
}

/// The place of an answer in its stream, kept until the answer is there.
struct Reply {
    tag: u64,
    place: Option<mpsc::OwnedPermit<pb::ServeHypercallsRequest>>,
}

impl fmt::Debug for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reply").field("tag", &self.tag).finish_non_exhaustive()
    }
}

impl Reply {
    fn send(&mut self, answer: Result<Bytes, String>) {
        if let Some(place) = self.place.take() {
            place.send(HypercallAnswer { tag: self.tag, answer }.into());
        }
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        self.send(Err("the hypervisor dropped the call".to_owned()));
    }
}

impl Hypercall {
    /// Who calls.
    pub fn vm(&self) -> u32 {
        self.vm
    }

    /// Who calls, as an owner.
    pub fn owner(&self) -> Owner {
        Owner::Vm(self.vm)
    }

    /// What it says: whatever guest and hypervisor have agreed on, and, as the guest says it, nothing to rely on.
    pub fn payload(&self) -> &Bytes {
        &self.payload
    }

    /// Whether the stream that it came on is lost. Its guest has been told that there is no answer then, and may ask again or put its memory to other
    /// use: whoever has not begun should not, and whoever has should leave the guest's memory alone.
    pub fn is_lost(&self) -> bool {
        self.standing.is_lost()
    }

    pub(crate) fn standing(&self) -> &Standing {
        &self.standing
    }

    /// Answers; 4096 bytes at most. A longer answer is an error here and a refusal for the guest.
    pub fn answer(mut self, payload: impl Into<Bytes>) -> Result<(), InvalidField> {
        let payload: Bytes = payload.into();
        if payload.len() > HYPERCALL_BYTES_MAX {
            let why = format!("has {} bytes; {HYPERCALL_BYTES_MAX} at most", payload.len());
            self.reply.send(Err("the answer of the hypervisor is too long".to_owned()));
            return Err(InvalidField { field: "payload".to_owned(), why });
        }
        self.reply.send(Ok(payload));
        Ok(())
    }

    /// Refuses, in words; they are cut at 256 bytes.
    pub fn refuse(mut self, why: impl Into<String>) {
        let mut why: String = why.into();
        let mut end = why.len().min(HYPERCALL_REFUSED_BYTES_MAX);
        while !why.is_char_boundary(end) {
            end -= 1;
        }
        why.truncate(end);
        self.reply.send(Err(why));
    }
}

impl Hypercalls {
    /// How many calls may be out at once, unanswered: several of each machine that a hypervisor may have, a page each.
    pub const IN_FLIGHT_MAX: usize = 2048;

    pub(super) async fn begin(core: Arc<Core>) -> Result<Self, SdkError<Never>> {
        let stream = Some(open(&core).await?);
        Ok(Self { core, stream })
    }

    /// The next call. Waits while [`IN_FLIGHT_MAX`](Self::IN_FLIGHT_MAX) are out. `None` once an error was given, such as
    /// [`SessionFenced`](crate::errors::SessionFenced) when another stream of this hypervisor took over; a lost connection is made anew by
    /// itself. May be cancelled without losing a call.
    pub async fn next(&mut self) -> Option<Result<Hypercall, SdkError<Never>>> {
        loop {
            let stream = self.stream.as_mut()?;
            let place = stream.answers.clone().reserve_owned();
            let ended = match place.await {
                // The transport let go of the answers, so the stream is over; it says why.
                Err(_) => stream.calls.message().await.err(),
                Ok(place) => match stream.calls.message().await {
                    Ok(Some(call)) => {
                        let pb::ServeHypercallsResponse { tag, vm, payload } = call;
                        let reply = Reply { tag, place: Some(place) };
                        let (answers, is_over) = (stream.answers.clone(), Arc::clone(&stream.is_over));
                        let standing = Standing { answers, is_over };
                        return Some(Ok(Hypercall { vm, payload, reply, standing }));
                    }
                    Ok(None) => None,
                    Err(status) => Some(status),
                },
            };
            stream.is_over.store(true, Ordering::Relaxed);
            if let Some(status) = ended.filter(|status| !may_retry(status)) {
                self.stream = None;
                return Some(Err(of_status(&status)));
            }
            match again(&self.core).await {
                Ok(stream) => self.stream = Some(stream),
                Err(error) => {
                    self.stream = None;
                    return Some(Err(error));
                }
            }
        }
    }

    /// Answers every call with what `answer` makes of it, several at once, until the stream ends; gives why. `Err` refuses the call. Dropping the
    /// future refuses what is not answered.
    pub async fn serve<F, A>(mut self, answer: F) -> SdkError<Never>
    where
        F: Fn(u32, Bytes) -> A,
        A: Future<Output = Result<Bytes, String>> + Send + 'static,
    {
        let mut answering = JoinSet::new();
        loop {
            let call = tokio::select! {
                call = self.next() => call,
                Some(_) = answering.join_next() => continue,
            };
            match call {
                Some(Ok(call)) => {
                    let answered = answer(call.vm, call.payload.clone());
                    answering.spawn(async move {
                        match answered.await {
                            // An answer that is too long refuses the call and says so.
                            Ok(payload) => {
                                if let Err(error) = call.answer(payload) {
                                    tracing::warn!(%error, "hypercall refused");
                                }
                            }
                            Err(why) => call.refuse(why),
                        }
                    });
                }
                Some(Err(error)) => return error,
                None => return bad_answer("the stream of hypercalls has ended before").into(),
            }
        }
    }
}

async fn open(core: &Core) -> Result<Stream, SdkError<Never>> {
    let (answers, mut calls) = core
        .call(|channel| async move {
            let (answers, sent) = mpsc::channel(Hypercalls::IN_FLIGHT_MAX);
            let response = client(channel).serve_hypercalls(ReceiverStream::new(sent)).await?;
            Ok(response.map(|calls| (answers, calls)))
        })
        .await?;
    match calls.message().await {
        Ok(Some(first)) if first.tag == 0 => Ok(Stream { answers, calls, is_over: Arc::default() }),
        Ok(Some(first)) => Err(bad_answer(format!("tag: {} in the first message", first.tag)).into()),
        Ok(None) => Err(bad_answer("the stream of hypercalls ended at once").into()),
        Err(status) => Err(of_status(&status)),
    }
}

/// Serves again after the stream was lost, for as long as that may help.
async fn again(core: &Core) -> Result<Stream, SdkError<Never>> {
    loop {
        tokio::time::sleep(RETRY_DELAY).await;
        match open(core).await {
            Err(error) if may_stand_again(&error) => {}
            ended => return ended,
        }
    }
}
