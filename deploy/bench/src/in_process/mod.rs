//! Measurements inside this process: the hardware and kernel floors as libraries.

pub(crate) mod growth;
pub(crate) mod host;
pub(crate) mod iotlb;
pub(crate) mod mapping;
pub(crate) mod memory;
pub(crate) mod tenant;
pub(crate) mod translate;
