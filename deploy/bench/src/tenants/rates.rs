//! What it costs a batch of DMA to be paid for: its owner's rates, beside the batch itself.

use anyhow::Context;
use iommu_proto::model::TenantLimits;
use iommu_server::host::rates::OwnerBounds;

use crate::figure::{Figure, RatioOf, Target};
use crate::modes::counted::{DmaPath, Stage};
use crate::report::Report;
use crate::rounds::{in_turn, nanoseconds_each};
use crate::stand::Bench;

/// DMA of a batch, and bytes of it.
const OPERATIONS: u32 = 128;
const BYTES: u64 = 128 * 64;
/// Accounts that pay in turn. The highest rate that there is gives 128 operations back in 30 ns, about as long as a payment takes: one of several is never empty.
const ACCOUNTS: usize = 8;

/// The payment beside a batch of 128 DMA of 64 bytes in this process, without the wire.
pub(crate) fn payment(bench: &mut Bench) -> anyhow::Result<Report> {
    let limits = TenantLimits {
        dma_operations_per_second: Some(u32::MAX),
        dma_bytes_per_second: Some(1 << 40),
        ..TenantLimits::default()
    };
    let accounts: [_; ACCOUNTS] = std::array::from_fn(|_| OwnerBounds::new(limits));
    let mut stage = Stage::new(DmaPath::Off)?;
    let batch = stage.batch(OPERATIONS);
    stage.uncounted(&batch).map_err(anyhow::Error::msg).context("carry out a batch")?;
    let count = bench.plan.operations() / 64;
    let (payment, whole) = in_turn(
        bench.plan,
        || {
            nanoseconds_each(count, |count| {
                for bounds in accounts.iter().cycle().take(count as usize) {
                    let paid = std::hint::black_box(bounds.pay_dma(OPERATIONS.into(), BYTES));
                    paid.expect("the accounts fill faster than they are emptied");
                }
            })
        },
        || {
            nanoseconds_each(count, |count| {
                for _ in 0..count {
                    stage.uncounted(std::hint::black_box(&batch)).expect("it was carried out before");
                }
            })
        },
    );
    let figure = Figure::alone("tenants-rates-payment", "ns/batch", &payment);
    let figure = figure.beside("the batch itself", &whole, RatioOf::ValueToReference);
    Ok(Report { figures: vec![figure.judged(Target::ratio_at_most(0.02))], ..Report::default() })
}
