//! Interrupts on their way to whoever watches them: bounded, equal ones merged with a count, as edge-triggered interrupts are.

use std::collections::VecDeque;
use std::sync::{Arc, Weak};

use iommu_hardware::vtd::EventMessage;
use iommu_types::DeviceAddress;
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::bounds;
use crate::telemetry::warn_limited;

/// What is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// An interrupt of a device, after remapping.
    Device {
        /// Which.
        device: DeviceAddress,
        /// With which vector.
        vector: u8,
        /// To which processor.
        destination: u32,
    },
    /// An event message of a unit.
    Event(EventMessage),
}

#[derive(Debug, Default)]
struct Queue {
    signals: VecDeque<(Signal, u32)>,
}

/// One subscription.
#[derive(Debug, Default)]
pub struct Subscription {
    queue: Mutex<Queue>,
    ready: Notify,
}

impl Subscription {
    fn push(&self, signal: Signal) {
        {
            let mut queue = self.queue.lock();
            if let Some((_, count)) = queue.signals.iter_mut().rev().find(|(queued, _)| *queued == signal) {
                *count = count.saturating_add(1);
                return;
            }
            if queue.signals.len() >= bounds::INTERRUPTS_QUEUED_MAX {
                drop(queue);
                warn_limited!(?signal, "interrupt dropped: the subscriber does not read");
                return;
            }
            queue.signals.push_back((signal, 1));
        }
        self.ready.notify_one();
    }
    /// What came since the last call; waits until something did.
    pub async fn next(&self) -> Vec<(Signal, u32)> {
        loop {
            let ready = self.ready.notified();
            {
                let mut queue = self.queue.lock();
                if !queue.signals.is_empty() {
                    return queue.signals.drain(..).collect();
                }
            }
            ready.await;
        }
    }
}

/// All subscriptions of an owner or a machine.
#[derive(Debug, Default)]
pub struct InterruptFeed {
    subscriptions: Mutex<Vec<Weak<Subscription>>>,
}

impl InterruptFeed {
    /// Nobody listens yet.
    pub fn new() -> Self {
        Self::default()
    }
    /// From now on. Ends with the returned value.
    pub fn subscribe(&self) -> Arc<Subscription> {
        let subscription = Arc::new(Subscription::default());
        let mut subscriptions = self.subscriptions.lock();
        subscriptions.retain(|other| other.strong_count() > 0);
        subscriptions.push(Arc::downgrade(&subscription));
        subscription
    }
    /// Tells everybody. Never blocks.
    pub fn deliver(&self, signal: Signal) {
        for subscription in self.subscriptions.lock().iter().filter_map(Weak::upgrade) {
            subscription.push(signal);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn signal(vector: u8) -> Signal {
        Signal::Device { device: DeviceAddress::default(), vector, destination: 0 }
    }

    #[tokio::test]
    async fn equal_interrupts_of_a_slow_reader_are_merged_with_a_count() {
        let feed = InterruptFeed::new();
        let subscription = feed.subscribe();
        for vector in [1, 2, 1, 1] {
            feed.deliver(signal(vector));
        }
        assert_eq!(subscription.next().await, [(signal(1), 3), (signal(2), 1)]);
    }

    #[tokio::test]
    async fn i7_a_subscription_holds_a_bounded_number_of_distinct_interrupts() {
        let feed = InterruptFeed::new();
        let subscription = feed.subscribe();
        for destination in 0..2 * bounds::INTERRUPTS_QUEUED_MAX as u32 {
            feed.deliver(Signal::Device { device: DeviceAddress::default(), vector: 0, destination });
        }
        assert_eq!(subscription.next().await.len(), bounds::INTERRUPTS_QUEUED_MAX);
    }
}
