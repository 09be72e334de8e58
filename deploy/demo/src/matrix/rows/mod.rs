//! The attacks, row by row, one file for each family.

mod addresses;
mod boot;
mod crowds;
mod devices;
mod lifetimes;
mod pages;
mod recycling;
mod rings;
mod tenants;

use super::evidence::Evidence;
use super::scene::{Scene, Sides};

/// Which sides play in a row: within one operating system, or between tenants.
pub(crate) fn sides(number: u8) -> Sides {
    match number {
        1..=18 | 20 | 28 => Sides::Own,
        _ => Sides::Tenants,
    }
}

/// Carries out the attack of a row.
pub(crate) async fn attack(number: u8, scene: &mut Scene<'_>) -> anyhow::Result<Evidence> {
    match number {
        1 => addresses::raw_address(scene).await,
        2 => addresses::into_the_next_page(scene).await,
        3 => pages::within_the_last_page(scene).await,
        4 => addresses::wrong_direction(scene).await,
        5 => addresses::of_another_domain(scene).await,
        6 => lifetimes::wrong_unmaps(scene).await,
        7 => lifetimes::freed_while_mapped(scene).await,
        8 => lifetimes::unmapped_early(scene).await,
        9 => addresses::flipped_bit(scene).await,
        10 => lifetimes::repeated(scene).await,
        11 => lifetimes::scanned(scene).await,
        12 => lifetimes::between_unmap_and_flush(scene).await,
        13 => pages::after_the_check(scene).await,
        14 => pages::neighbour(scene).await,
        15 => pages::behind_the_payload(scene).await,
        16 => pages::before_the_buffer(scene).await,
        17 => pages::second_address(scene).await,
        18 => rings::forged(scene).await,
        19 => devices::another_identity(scene).await,
        20 => devices::already_translated(scene).await,
        21 => devices::peer_to_peer(scene).await,
        22 => devices::forged_interrupts(scene).await,
        23 => tenants::not_owned(scene).await,
        24 => tenants::moved_while_mapped(scene).await,
        25 => tenants::late_dma(scene).await,
        26 => recycling::domain_number(scene).await,
        27 => recycling::table_pages(scene).await,
        28 => recycling::acknowledged_early(scene).await,
        29 => crowds::uses_everything_up(scene).await,
        30 => crowds::listens(scene).await,
        31 => boot::before_and_after(scene).await,
        other => anyhow::bail!("there is no row {other}"),
    }
}

/// The lecture's V2 between tenants, which is no row of its own: a device looks through all addresses for another tenant's secret.
pub(crate) async fn scan_of_another_tenant(scene: &mut Scene<'_>) -> anyhow::Result<Evidence> {
    tenants::scanned(scene).await
}
