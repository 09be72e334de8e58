//! Hypercalls: a guest asks its hypervisor something, through the server, which says who asks.
//!
//! Each call has a tag and a place among the calls of its virtual machine; what is waiting is bounded per virtual machine (I7), so that one
//! guest cannot keep another's calls out. The hypervisor serves them over one stream; a later stream takes over, and calls that the
//! earlier had taken and not answered are refused, as nobody knows whether they were carried out.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use iommu_types::errors::{HypercallError, HypercallRefused, HypercallTimeout, LimitReached, NoHypervisor};
use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot};

use crate::bounds;
use crate::ending::{EndSignal, Ending};

/// A hypercall on its way to the hypervisor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Calling {
    /// Names it.
    pub tag: u64,
    /// Who calls.
    pub vm: u32,
    /// What it says.
    pub payload: Bytes,
}

type Answer = Result<Bytes, HypercallError>;

#[derive(Debug)]
struct Waiting {
    vm: u32,
    /// What it says, until a stream takes it.
    payload: Option<Bytes>,
    answer: oneshot::Sender<Answer>,
}

/// The stream that serves now. Its bell is its own: one that was rung for the stream before would wake nobody.
#[derive(Debug)]
struct Current {
    end: EndSignal,
    bell: Arc<Notify>,
}

#[derive(Debug, Default)]
struct Exchange {
    last_tag: u64,
    /// Tags of calls that no stream has taken; those whose caller is gone are taken out.
    queue: VecDeque<u64>,
    waiting: BTreeMap<u64, Waiting>,
    serving: Option<Current>,
    streams: u64,
}

impl Exchange {
    /// The oldest call that nobody has taken, for the stream that serves now.
    fn take(&mut self, stream: u64) -> Option<Calling> {
        if self.streams != stream {
            return None;
        }
        let tag = self.queue.pop_front()?;
        let waiting = self.waiting.get_mut(&tag)?;
        Some(Calling { tag, vm: waiting.vm, payload: waiting.payload.take()? })
    }
}

/// The hypercalls of one hypervisor's virtual machines.
#[derive(Debug, Default)]
pub struct Hypercalls {
    exchange: Mutex<Exchange>,
}

/// The one that serves; whoever drops it serves no more.
#[derive(Debug)]
pub struct Serving {
    /// Ends when another takes over.
    pub end: EndSignal,
    hypercalls: Arc<super::hypervisors::HypervisorState>,
    bell: Arc<Notify>,
    stream: u64,
}

impl Hypercalls {
    /// Asks, and waits for the answer, at most as long as `patience`.
    pub async fn call(&self, vm: u32, payload: Bytes, patience: Duration) -> Answer {
        let (tag, answer, bell) = {
            let mut exchange = self.exchange.lock();
            let Some(serving) = &exchange.serving else { return Err(NoHypervisor {}.into()) };
            let bell = Arc::clone(&serving.bell);
            let of_vm = exchange.waiting.values().filter(|waiting| waiting.vm == vm).count();
            if of_vm >= bounds::HYPERCALLS_PER_VM_MAX {
                let allowed = bounds::HYPERCALLS_PER_VM_MAX as u64;
                return Err(LimitReached { limit: "hypercalls_per_vm".to_owned(), allowed }.into());
            }
            exchange.last_tag += 1;
            let tag = exchange.last_tag;
            let (sender, answer) = oneshot::channel();
            exchange.waiting.insert(tag, Waiting { vm, payload: Some(payload), answer: sender });
            exchange.queue.push_back(tag);
            (tag, answer, bell)
        };
        bell.notify_one();
        // A caller that goes away leaves no place taken.
        let _place = Place { hypercalls: self, tag };
        match tokio::time::timeout(patience, answer).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(NoHypervisor {}.into()),
            Err(_) => {
                let waited_ms = patience.as_millis() as u64;
                Err(HypercallTimeout { waited_ms }.into())
            }
        }
    }
    /// The next call for a stream; waits for one, for ever when another stream has taken over.
    pub async fn next(&self, serving: &Serving) -> Calling {
        loop {
            let rung = serving.bell.notified();
            if let Some(calling) = self.exchange.lock().take(serving.stream) {
                return calling;
            }
            rung.await;
        }
    }
    /// The hypervisor answers; `false` when nobody waits: the caller may have gone, or the tag is wrong.
    pub fn answer(&self, tag: u64, answer: Result<Bytes, String>) -> bool {
        let waiting = {
            let mut exchange = self.exchange.lock();
            match exchange.waiting.get(&tag) {
                Some(waiting) if waiting.payload.is_none() => exchange.waiting.remove(&tag),
                _ => None,
            }
        };
        let Some(waiting) = waiting else { return false };
        let answer = answer.map_err(|why| HypercallRefused { why }.into());
        waiting.answer.send(answer).is_ok()
    }
    /// Whether a tag was ever given.
    pub fn knows(&self, tag: u64) -> bool {
        tag != 0 && tag <= self.exchange.lock().last_tag
    }
}

struct Place<'a> {
    hypercalls: &'a Hypercalls,
    tag: u64,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut exchange = self.hypercalls.exchange.lock();
        exchange.waiting.remove(&self.tag);
        exchange.queue.retain(|tag| *tag != self.tag);
    }
}

impl Serving {
    /// Takes over the calls of a hypervisor's virtual machines.
    pub fn begin(hypervisor: &Arc<super::hypervisors::HypervisorState>) -> Self {
        let (end, bell) = (EndSignal::new(), Arc::new(Notify::new()));
        let mut exchange = hypervisor.hypercalls.exchange.lock();
        exchange.streams += 1;
        let stream = exchange.streams;
        let before = exchange.serving.replace(Current { end: end.clone(), bell: Arc::clone(&bell) });
        exchange.waiting.retain(|_, waiting| waiting.payload.is_some());
        drop(exchange);
        if let Some(before) = before {
            before.end.end(Ending::Fenced { by_generation: stream });
        }
        Self { end, hypercalls: Arc::clone(hypervisor), bell, stream }
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let mut exchange = self.hypercalls.hypercalls.exchange.lock();
        if exchange.streams == self.stream {
            exchange.serving = None;
            exchange.queue.clear();
            exchange.waiting.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::hypervisors::Hypervisors;

    const LONG: Duration = Duration::from_secs(10);

    #[tokio::test]
    async fn a_call_is_answered_refused_or_given_up_and_leaves_no_place_taken() {
        let hypervisor = Hypervisors::default().get_or_make("hv0").expect("room");
        let calls = &hypervisor.hypercalls;
        assert_eq!(calls.call(1, Bytes::new(), LONG).await, Err(NoHypervisor {}.into()), "nobody serves");
        let serving = Serving::begin(&hypervisor);
        let ask = |vm, text: &'static str| {
            let hypervisor = Arc::clone(&hypervisor);
            tokio::spawn(async move {
                hypervisor.hypercalls.call(vm, Bytes::from_static(text.as_bytes()), LONG).await
            })
        };
        let asked = ask(1, "ping");
        let calling = calls.next(&serving).await;
        assert_eq!((calling.vm, &*calling.payload), (1, &b"ping"[..]));
        assert!(!calls.answer(calling.tag + 1, Ok(Bytes::new())), "a tag that nobody has");
        assert!(calls.answer(calling.tag, Ok(Bytes::from_static(b"pong"))));
        assert!(!calls.answer(calling.tag, Ok(Bytes::new())), "a second answer");
        assert_eq!(asked.await.expect("no panic"), Ok(Bytes::from_static(b"pong")));

        let asked = ask(1, "no");
        let calling = calls.next(&serving).await;
        assert!(calls.answer(calling.tag, Err("not now".to_owned())));
        assert_eq!(
            asked.await.expect("no panic"),
            Err(HypercallRefused { why: "not now".to_owned() }.into())
        );

        let given_up = calls.call(1, Bytes::new(), Duration::from_millis(1)).await;
        assert_eq!(given_up, Err(HypercallTimeout { waited_ms: 1 }.into()));

        let asked = ask(2, "unanswered");
        let _taken = calls.next(&serving).await;
        let later = Serving::begin(&hypervisor);
        assert!(serving.end.ended().is_some(), "a later stream ends the earlier");
        assert_eq!(asked.await.expect("no panic"), Err(NoHypervisor {}.into()));
        drop(later);
        assert!(calls.exchange.lock().waiting.is_empty());
    }

    #[tokio::test]
    async fn a_call_is_taken_by_the_stream_that_serves_though_an_earlier_one_waits_too() {
        let hypervisor = Hypervisors::default().get_or_make("hv0").expect("room");
        let earlier = Serving::begin(&hypervisor);
        let waits = |serving: Serving| {
            let hypervisor = Arc::clone(&hypervisor);
            tokio::spawn(async move { hypervisor.hypercalls.next(&serving).await.vm })
        };
        // It waits before the later one does, and has not heard yet that it is over.
        let of_earlier = waits(earlier);
        tokio::task::yield_now().await;
        let of_later = waits(Serving::begin(&hypervisor));
        tokio::task::yield_now().await;
        let caller = Arc::clone(&hypervisor);
        let _asked = tokio::spawn(async move { caller.hypercalls.call(7, Bytes::new(), LONG).await });
        let taken = tokio::time::timeout(LONG, of_later).await.expect("it is not left lying");
        assert_eq!(taken.expect("no panic"), 7);
        assert!(!of_earlier.is_finished());
        of_earlier.abort();
    }

    #[tokio::test]
    async fn i7_one_guest_that_calls_without_end_keeps_no_other_out() {
        let hypervisor = Hypervisors::default().get_or_make("hv0").expect("room");
        let serving = Serving::begin(&hypervisor);
        let mut asked = tokio::task::JoinSet::new();
        for _ in 0..bounds::HYPERCALLS_PER_VM_MAX {
            let hypervisor = Arc::clone(&hypervisor);
            asked.spawn(async move { hypervisor.hypercalls.call(1, Bytes::new(), LONG).await });
        }
        while hypervisor.hypercalls.exchange.lock().waiting.len() < bounds::HYPERCALLS_PER_VM_MAX {
            tokio::task::yield_now().await;
        }
        let over = hypervisor.hypercalls.call(1, Bytes::new(), LONG).await;
        let allowed = bounds::HYPERCALLS_PER_VM_MAX as u64;
        assert_eq!(over, Err(LimitReached { limit: "hypercalls_per_vm".to_owned(), allowed }.into()));
        let other = {
            let hypervisor = Arc::clone(&hypervisor);
            tokio::spawn(async move { hypervisor.hypercalls.call(2, Bytes::new(), LONG).await })
        };
        loop {
            let calling = hypervisor.hypercalls.next(&serving).await;
            assert!(hypervisor.hypercalls.answer(calling.tag, Ok(Bytes::new())));
            if calling.vm == 2 {
                break;
            }
        }
        assert_eq!(other.await.expect("no panic"), Ok(Bytes::new()));
    }
}
