//! One device for many guests, shared in software: for a device that has no functions to assign, and for a guest without an IOMMU of its own.
//!
//! The hypervisor process drives the device as an ordinary driver of the host, with buffers of its own that stay mapped. Guests post batches of packets by
//! hypercall ([`MultiplexedDevice`]); the multiplexer copies between their memory and its buffers, programs the device ([`Backend`]), and answers with
//! how each packet ended. What that costs is the copy; what it gives is that a guest's memory is never open to the device, and the IOMMU holds one set of
//! mappings, whatever guests do.
//!
//! Guests are hostile. Who asks comes from the server, not from the payload (I8). A range is checked against the memory that the guest has, and the server checks
//! it again, page by page, when it is copied (I2). What waits is bounded per guest, and guests take turns (I7).
//!
//! ```no_run
//! use guest_sdk::multiplexer::{Backend, MultiplexedDevice, Multiplexer};
//! use guest_sdk::{Connection, Driver, Hypervisor};
//!
//! // In the hypervisor's process, with the driver of the device:
//! # async fn share(hypervisor: Hypervisor, backend: impl Backend) -> Result<(), Box<dyn std::error::Error>> {
//! let multiplexer = Multiplexer::new(hypervisor, backend);
//! let counters = multiplexer.counters();
//! let ended = multiplexer.run().await; // until the session ends
//! println!("{} packets; {ended}", counters.total().packets);
//! # Ok(())
//! # }
//! // In each guest:
//! # async fn use_it(driver: Driver) -> Result<(), Box<dyn std::error::Error>> {
//! let device = MultiplexedDevice::new(&driver);
//! let packet = driver.allocate(4096).await?;
//! packet.write(0, &b"hello"[..]).await?;
//! let ended = device.transmit(&[packet.slice(0, 5)?]).await?;
//! # Ok(())
//! # }
//! ```

mod awaited;
mod backend;
mod codec;
mod counters;
mod guest;
mod guests;
mod queues;

use std::convert::Infallible;
use std::time::Duration;

use iommu_proto::limits::{HYPERCALL_TIMEOUT_MS, VMS_PER_HYPERVISOR_MAX};

use crate::convert::bad_answer;
use crate::{Hypercall, Hypercalls, Hypervisor, Never, SdkError};

pub use backend::{Backend, DeviceFailure};
pub use codec::{BATCH_BYTES_MAX, BadBatch, Batch, ENTRIES_MAX, Ended, Entry, Kind, PACKET_BYTES_MAX, Reply};
pub use counters::{GuestCounters, MultiplexerCounters};
pub use guest::{MultiplexError, MultiplexedDevice};
pub use queues::WAITING_PER_GUEST_MAX;

use awaited::Awaited;
use guests::Guests;
use queues::Queues;

// Every guest's queue and the batch in hand are taken from the stream at once, so that no guest keeps another's calls from being taken.
const _: () = assert!(VMS_PER_HYPERVISOR_MAX * WAITING_PER_GUEST_MAX < Hypercalls::IN_FLIGHT_MAX);

const HYPERCALL_TIMEOUT: Duration = Duration::from_millis(HYPERCALL_TIMEOUT_MS as u64);
/// How long a batch waits for its turns: less than its guest waits for the answer, by what the last turn and the ways take.
const LONGEST_WAIT: Duration = Duration::from_secs(8);
const _: () = assert!(LONGEST_WAIT.as_millis() < HYPERCALL_TIMEOUT_MS as u128);

/// Shares a device among the virtual machines of a hypervisor.
#[derive(Debug)]
#[must_use = "a multiplexer does nothing until it runs"]
pub struct Multiplexer<B> {
    hypervisor: Hypervisor,
    backend: B,
    counters: MultiplexerCounters,
    longest_wait: Duration,
}

/// A multiplexer whose guests' calls come to it.
#[derive(Debug)]
#[must_use = "a multiplexer does nothing until it runs"]
pub struct Listening<B> {
    calls: Hypercalls,
    guests: Guests,
    backend: B,
    counters: MultiplexerCounters,
    longest_wait: Duration,
}

impl<B: Backend> Multiplexer<B> {
    /// Shares the device behind `backend` among the virtual machines of `hypervisor`, whose hypercalls all come here.
    pub fn new(hypervisor: Hypervisor, backend: B) -> Self {
        Self { hypervisor, backend, counters: MultiplexerCounters::default(), longest_wait: LONGEST_WAIT }
    }

    /// How long a batch may wait for its turns, 8 s unless said: what is not begun then is refused, as its guest is about to be told that there is no answer and
    /// may put the memory to other use. Longer than the time of a hypercall (10 s) is of no use to anybody.
    pub fn longest_wait(self, longest_wait: Duration) -> Self {
        Self { longest_wait: longest_wait.min(HYPERCALL_TIMEOUT), ..self }
    }

    /// What was done, for whom; goes on counting while it runs.
    pub fn counters(&self) -> MultiplexerCounters {
        self.counters.clone()
    }

    /// Takes the hypercalls over. Guests that ask from now on are served once [`Listening::run`] is called.
    pub async fn listen(self) -> Result<Listening<B>, SdkError<Never>> {
        let Self { hypervisor, backend, counters, longest_wait } = self;
        let calls = hypervisor.serve_hypercalls().await?;
        Ok(Listening { calls, guests: Guests::new(hypervisor), backend, counters, longest_wait })
    }

    /// Serves until the stream of hypercalls ends, and gives why. Guests whose batches are not carried out then are told so.
    pub async fn run(self) -> SdkError<Never> {
        match self.listen().await {
            Ok(listening) => listening.run().await,
            Err(error) => error,
        }
    }
}

impl<B: Backend> Listening<B> {
    /// Serves, as [`Multiplexer::run`] does.
    pub async fn run(self) -> SdkError<Never> {
        let Self { mut calls, guests, backend, counters, longest_wait } = self;
        let queues = Queues::new();
        let intake = async {
            loop {
                match calls.next().await {
                    Some(Ok(call)) => admit(&queues, &counters, call, longest_wait),
                    Some(Err(error)) => return error,
                    None => return bad_answer("the stream of hypercalls has ended before").into(),
                }
            }
        };
        tokio::select! {
            error = intake => error,
            never = work(&queues, &counters, guests, backend) => match never {},
        }
    }
}

/// A batch, how far it is, and whom to answer.
struct Asked {
    batch: Batch,
    /// How its entries ended, so far.
    ended: Vec<Ended>,
    call: Hypercall,
    awaited: Awaited,
}

/// Puts a call into its guest's queue, or answers it at once.
fn admit(queues: &Queues<Asked>, counters: &MultiplexerCounters, call: Hypercall, longest_wait: Duration) {
    let guest = call.vm();
    let (refused, call) = match Batch::decode(call.payload()) {
        Err(bad) => {
            tracing::debug!(vm = guest, %bad, "not a batch");
            (Reply::Malformed, call)
        }
        Ok(batch) => {
            let awaited = Awaited::new(&call, longest_wait);
            match queues.push(guest, Asked { batch, ended: Vec::new(), call, awaited }) {
                Ok(()) => return,
                Err(asked) => (Reply::Busy, asked.call),
            }
        }
    };
    counters.of(guest, |counted| counted.refused += 1);
    answer(call, &refused);
}

fn answer(call: Hypercall, reply: &Reply) {
    call.answer(reply.encode()).expect("a reply fits a hypercall");
}

/// Carries out batch after batch, a command of the device at a time, the guests in turn.
async fn work(
    queues: &Queues<Asked>,
    counters: &MultiplexerCounters,
    mut guests: Guests,
    mut backend: impl Backend,
) -> Infallible {
    loop {
        let (guest, mut asked) = queues.next().await;
        match asked.awaited.over() {
            None => carry_on(&mut guests, &mut backend, guest, &mut asked).await,
            Some(why) if asked.ended.is_empty() => {
                counters.of(guest, |counted| counted.refused += 1);
                asked.call.refuse(why);
                continue;
            }
            // Some of it was done, and who is refused does it all again: so it is told packet by packet.
            Some(_) => asked.ended.resize(asked.batch.entries().len(), Ended::MemoryFailed),
        }
        if asked.ended.len() < asked.batch.entries().len() {
            queues.put_back(guest, asked);
            continue;
        }
        counters.of(guest, |counted| counted.add(&asked.ended));
        answer(asked.call, &Reply::Ended(asked.ended));
    }
}

/// Carries out the next packets of a batch that are of one kind: those go to the device together. After a deadline of the device the rest has failed too.
async fn carry_on(guests: &mut Guests, backend: &mut impl Backend, guest: u32, asked: &mut Asked) {
    let Asked { batch, ended, awaited, .. } = asked;
    let rest = batch.entries().get(ended.len()..).unwrap_or_default();
    let Some(same) = rest.chunk_by(|one, next| one.kind == next.kind).next() else { return };
    let own = guests.own(guest, same).await;
    let admitted: Vec<Entry> =
        same.iter().zip(&own).filter(|(_, refused)| refused.is_none()).map(|(entry, _)| *entry).collect();
    let mut timed_out = false;
    let done = match admitted.first().map(|entry| entry.kind) {
        None => Vec::new(),
        Some(Kind::Transmit) => transmit(guests, backend, guest, &admitted, awaited, &mut timed_out).await,
        Some(Kind::Receive) => receive(guests, backend, guest, &admitted, awaited, &mut timed_out).await,
    };
    let mut done = done.into_iter();
    ended.extend(
        own.into_iter().map(|refused| refused.or_else(|| done.next()).unwrap_or(Ended::DeviceFailed)),
    );
    if timed_out {
        ended.resize(batch.entries().len(), Ended::DeviceFailed);
    }
}

async fn transmit(
    guests: &Guests,
    backend: &mut impl Backend,
    guest: u32,
    entries: &[Entry],
    awaited: &Awaited,
    timed_out: &mut bool,
) -> Vec<Ended> {
    let read = guests.read(guest, entries).await;
    if awaited.over().is_some() {
        return vec![Ended::MemoryFailed; entries.len()];
    }
    let packets: Vec<_> = read.iter().filter_map(|read| read.as_ref().ok().cloned()).collect();
    let mut sent = if packets.is_empty() { Vec::new() } else { backend.transmit(&packets).await }.into_iter();
    let of = |read: Result<bytes::Bytes, Ended>| match read {
        Err(ended) => ended,
        Ok(packet) => match sent.next() {
            Some(Ok(())) => Ended::Done { bytes: packet.len() as u32 },
            failed => device_failed(failed.and_then(Result::err), timed_out),
        },
    };
    read.into_iter().map(of).collect()
}

async fn receive(
    guests: &Guests,
    backend: &mut impl Backend,
    guest: u32,
    entries: &[Entry],
    awaited: &Awaited,
    timed_out: &mut bool,
) -> Vec<Ended> {
    // Learning whose memory it is may have taken its time, and what the device gives now is lost to whoever asks next.
    if awaited.over().is_some() {
        return vec![Ended::MemoryFailed; entries.len()];
    }
    let sizes: Vec<u32> = entries.iter().map(|entry| entry.length()).collect();
    let mut received = backend.receive(&sizes).await.into_iter();
    let packets = entries.iter().map(|entry| match received.next() {
        // What there is no room for is not the guest's.
        Some(Ok(packet)) => Ok(packet.slice(..packet.len().min(entry.length() as usize))),
        failed => Err(device_failed(failed.and_then(Result::err), timed_out)),
    });
    let packets: Vec<Result<bytes::Bytes, Ended>> = packets.collect();
    guests.write(guest, entries, packets, awaited).await
}

fn device_failed(failure: Option<DeviceFailure>, timed_out: &mut bool) -> Ended {
    let failure = failure.unwrap_or_else(|| DeviceFailure::new("it told nothing of the packet"));
    tracing::debug!(why = %failure, "packet failed in the device");
    *timed_out |= failure.timed_out;
    Ended::DeviceFailed
}
