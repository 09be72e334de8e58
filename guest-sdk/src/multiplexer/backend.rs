//! The device, as the multiplexer sees it.

use std::future::Future;

use bytes::Bytes;

/// Why the device did not take or give a packet, for the log; guests are told only that it did not.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{why}")]
pub struct DeviceFailure {
    /// In words.
    pub why: String,
    /// The device did not answer within its deadline. What else its guest has asked for in the same batch ends with it, and would only wait as long.
    pub timed_out: bool,
}

impl DeviceFailure {
    /// The device or its driver failed; the next packet may go well.
    pub fn new(why: impl Into<String>) -> Self {
        Self { why: why.into(), timed_out: false }
    }
    /// The device did not answer within its deadline.
    pub fn timeout(why: impl Into<String>) -> Self {
        Self { why: why.into(), timed_out: true }
    }
}

/// The driver of a device that is shared: an ordinary driver of the host, with buffers that stay mapped.
///
/// A call gets at most [`ENTRIES_MAX`](super::ENTRIES_MAX) packets of [`PACKET_BYTES_MAX`](super::PACKET_BYTES_MAX) bytes each and
/// [`BATCH_BYTES_MAX`](super::BATCH_BYTES_MAX) together, all of one guest. It waits for the device, with a deadline of its own: while it waits nobody
/// else is served. It answers in order, an element for each packet; those that are missing count as failed.
pub trait Backend: Send {
    /// Has the device read these packets out of the driver's buffers.
    fn transmit(&mut self, packets: &[Bytes]) -> impl Future<Output = Vec<Result<(), DeviceFailure>>> + Send;

    /// Has the device write packets of these sizes at most into the driver's buffers. A packet is what the device wrote, and nothing else that was in the
    /// buffer: that may be another guest's.
    fn receive(&mut self, sizes: &[u32]) -> impl Future<Output = Vec<Result<Bytes, DeviceFailure>>> + Send;
}
