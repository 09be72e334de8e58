//! What completions say, in the words of the [language](crate::language).

use std::collections::BTreeMap;

use iommu_proto::pb;

use crate::bounds::LISTED_MAX;
use crate::language::{Answer, Fault};
use crate::text::{Address, Hex};

/// A reason as it is counted: `0x5`.
pub(crate) fn reason_text(reason: u32) -> String {
    format!("{reason:#x}")
}

/// The faults of an answer. Columns of different length are cut to the shortest: the server is believed nothing.
pub(crate) fn faults(completions: &pb::DmaCompletions) -> impl Iterator<Item = Fault> + '_ {
    let reasons = completions.fault_reason.iter().zip(&completions.fault_index);
    let places = completions.fault_iova.iter().zip(&completions.fault_done_bytes);
    reasons.zip(places).map(|((reason, index), (iova, done_bytes))| Fault {
        index: *index,
        reason: Address((*reason).into()),
        iova: Address(*iova),
        done_bytes: *done_bytes,
    })
}

/// Counts the reasons of an answer into `refused`; how many there were.
pub(crate) fn count(completions: &pb::DmaCompletions, refused: &mut BTreeMap<String, u64>) -> u64 {
    for reason in &completions.fault_reason {
        *refused.entry(reason_text(*reason)).or_default() += 1;
    }
    completions.fault_reason.len() as u64
}

/// The answer to a single operation.
pub(crate) fn answer_of_one(completions: pb::DmaCompletions) -> Answer {
    match faults(&completions).next() {
        Some(fault) => Answer::Fault(fault),
        None => Answer::Done { data: Hex(completions.payload.to_vec()) },
    }
}

/// The answer to a batch of so many operations.
pub(crate) fn answer_of_batch(operations: u64, completions: &pb::DmaCompletions) -> Answer {
    let mut refused = BTreeMap::new();
    let refusals = count(completions, &mut refused);
    Answer::Batch {
        succeeded: operations.saturating_sub(refusals),
        faults: faults(completions).take(LISTED_MAX).collect(),
        refused,
        payload_bytes: completions.payload.len() as u64,
    }
}
