//! `fault.proto`: what was refused.

use iommu_types::errors::InvalidField;
use iommu_types::{DeviceAddress, FaultRecord, Owner};

use super::messages;

messages! {
    /// Which records; nothing set means all that the caller may see.
    #[derive(Copy, Default)]
    FaultFilter as FaultFilter {
        /// Of this owner's devices.
        owner: Option<Owner>,
        /// Of this device.
        device: Option<DeviceAddress>,
    };
    /// Records to list.
    ListFaults as ListFaultsRequest {
        /// Which; `None` for all.
        filter: Option<FaultFilter>,
        /// At most so many, the newest; 0 for as many as fit one message.
        limit: u32,
    };
    /// Records that are kept.
    FaultList as ListFaultsResponse {
        /// Oldest first.
        records: Vec<FaultRecord>,
        /// Records that these logs lost to overflow.
        overwritten_count: u64,
        /// Faults that the unit dropped because its recording registers were full.
        unit_overflow_count: u64,
        /// Where to go on after these records.
        resume_token: String,
    };
    /// A subscription.
    WatchFaults as WatchFaultsRequest {
        /// Which; `None` for all.
        filter: Option<FaultFilter>,
        /// Where to go on; empty to start with what comes from now on.
        resume_token: String,
    };
    /// New records.
    NewFaults as WatchFaultsResponse {
        /// Oldest first; empty in the first message.
        records: Vec<FaultRecord>,
        /// Records lost between the last message and this one.
        missed_count: u64,
        /// Where to go on after these records.
        resume_token: String,
    };
}
