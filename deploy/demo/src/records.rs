//! The fault log of a driver's devices, as a demonstration reads it.

use anyhow::Context;
use guest_sdk::{Driver, FaultFilter, FaultRecord};

/// Records come within milliseconds; a machine under load may need more.
const RECORD_DEADLINE: std::time::Duration = std::time::Duration::from_secs(5);

/// Where the fault log of this driver ends now.
pub(crate) async fn end_of_log(driver: &Driver) -> anyhow::Result<String> {
    Ok(driver.faults().list(FaultFilter::default(), 1).await?.resume_token)
}

/// The next record after `token`.
pub(crate) async fn record_after(driver: &Driver, token: &str) -> anyhow::Result<FaultRecord> {
    let mut new = driver.faults().watch(FaultFilter::default(), token).await?;
    let next = tokio::time::timeout(RECORD_DEADLINE, new.next());
    let next = next.await.with_context(|| format!("no fault record came within {RECORD_DEADLINE:?}"))?;
    let records = next.context("the fault log ended")??.records;
    records.into_iter().next().context("an empty message of the fault log")
}

/// A record in one line.
pub(crate) fn record_line(record: &FaultRecord) -> String {
    let domain = record.domain_id.map_or_else(|| "no domain".to_owned(), |domain| format!("domain {domain}"));
    format!("#{} {} ({domain}): {}", record.sequence, record.device, record.fault)
}
