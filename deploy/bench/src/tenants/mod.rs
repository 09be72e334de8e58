//! What tenants cost and what they do to each other, measured: `cargo measure tenants`.
//!
//! Everybody is a process of their own over mutual TLS: the server, the hypervisor, each guest and each device. They are this program with the hidden
//! subcommand `tenant`, told what to do line by line; the figures are made here.

pub(crate) mod actor;
mod busy;
mod device;
mod flood;
mod guest;
mod hypervisor;
pub(crate) mod iotlb;
pub(crate) mod isolation;
mod peer;
mod processors;
pub(crate) mod rates;
pub(crate) mod secured;
pub(crate) mod sharing;
mod stage;
mod words;
