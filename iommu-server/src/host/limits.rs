//! What a hypervisor may ask for as the limits of a virtual machine.

use iommu_kernel::OwnerLimits;
use iommu_proto::model::TenantLimits;
use iommu_types::errors::InvalidField;

use crate::bounds;

fn invalid(field: &str, why: String) -> InvalidField {
    InvalidField { field: format!("limits.{field}"), why }
}

/// What is asked for, or what every owner may have; more cannot be given.
fn at_most<T: Copy + PartialOrd + std::fmt::Display>(
    field: &str,
    asked: Option<T>,
    most: T,
) -> Result<T, InvalidField> {
    match asked {
        Some(asked) if asked > most => {
            Err(invalid(field, format!("{asked} is more than {most}, which is the most")))
        }
        asked => Ok(asked.unwrap_or(most)),
    }
}

/// A rate that is given is at least 1.
fn rate(field: &str, asked: Option<u64>, most: u64) -> Result<(), InvalidField> {
    if at_most(field, asked, most)? == 0 {
        return Err(invalid(field, "is 0; give at least 1".to_owned()));
    }
    Ok(())
}

/// The limits of a new tenant: nobody gets more than the server's own bounds, and no rate is nothing.
pub(super) fn within(most: &OwnerLimits, asked: TenantLimits) -> Result<OwnerLimits, InvalidField> {
    let (requests, operations) = (bounds::REQUESTS_PER_SECOND_MAX, bounds::DMA_OPERATIONS_PER_SECOND_MAX);
    rate("requests_per_second", asked.requests_per_second.map(u64::from), requests)?;
    rate("dma_operations_per_second", asked.dma_operations_per_second.map(u64::from), operations)?;
    rate("dma_bytes_per_second", asked.dma_bytes_per_second, bounds::DMA_BYTES_PER_SECOND_MAX)?;
    Ok(OwnerLimits {
        domains: at_most("domains", asked.domains, most.domains)?,
        mappings: at_most("mappings", asked.mappings, most.mappings)?,
        mapped_bytes: at_most("mapped_bytes", asked.mapped_bytes, most.mapped_bytes)?,
        memory_bytes: at_most("memory_bytes", asked.memory_bytes, most.memory_bytes)?,
        interrupts: at_most("interrupts", asked.interrupts, most.interrupts)?,
    })
}
