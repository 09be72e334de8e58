//! Raw entries in words, for Explain and for table dumps.
//!
//! Every reading begins with `present` or `not present`, and a present entry that the walk would refuse says so at its end.

use iommu_types::{Capabilities, PageSize};

use super::TableRules;
use super::context::{is_reserved_domain, is_widest};
use super::second_stage::reserved_checks;
use crate::vtd::spec::extent::ByteExtent;
use crate::vtd::spec::pte::SecondStageEntry;
use crate::vtd::spec::root_context::{ContextEntry, RootEntry, TranslationType};

/// What stands for an entry that could not be read.
pub const UNREADABLE: &str = "no memory here";

/// A root entry.
pub fn root(raw: u128, capabilities: &Capabilities) -> String {
    let entry = RootEntry::from_bits(raw);
    if !entry.is_present() {
        return "not present".to_owned();
    }
    let mut words = format!("present, context table {}", entry.context_table());
    append_reserved(&mut words, raw & RootEntry::reserved_bits(capabilities.host_width_bits));
    words
}

/// A context entry.
pub fn context(raw: u128, capabilities: &Capabilities) -> String {
    let entry = ContextEntry::from_bits(raw);
    let recording = if entry.fault_processing_disable() { ", faults not recorded (FPD)" } else { "" };
    if !entry.is_present() {
        return format!("not present{recording}");
    }
    let width = match entry.width() {
        Some(width) if capabilities.widths.contains(width) => {
            format!("{}-bit", 30 + 9 * u32::from(entry.address_width()))
        }
        _ => format!("unsupported width (AW={})", entry.address_width()),
    };
    let domain = entry.domain_id();
    let target = match entry.translation_type() {
        TranslationType::SECOND_STAGE => format!("table {}", entry.second_stage_table()),
        TranslationType::PASS_THROUGH if capabilities.pass_through => "pass-through".to_owned(),
        other => format!("unsupported type (TT={})", other.0),
    };
    let mut words = format!("present, {width}, domain {domain}, {target}{recording}");
    if entry.translation_type() == TranslationType::PASS_THROUGH && !is_widest(capabilities, entry) {
        words.push_str(", but pass-through needs the widest width");
    }
    if is_reserved_domain(capabilities, entry) {
        words.push_str(", but domain 0 is reserved in caching mode");
    }
    append_reserved(&mut words, raw & entry.reserved_bits(capabilities.host_width_bits));
    words
}

/// An entry of a second-stage table of `level`.
pub fn second_stage(raw: u64, level: u8, rules: TableRules<'_>) -> String {
    let entry = SecondStageEntry::from_bits(raw);
    if !entry.is_present() {
        return "not present".to_owned();
    }
    let permissions = entry.permissions();
    let address = entry.address();
    let mut words = match PageSize::at_level(level).filter(|_| entry.is_leaf_at(level)) {
        Some(size) => format!("present, {permissions}, {size} page {address}"),
        None => format!("present, {permissions}, table {address}"),
    };
    if rules.byte_extents && level == 1 && entry.partial_page() {
        words.push_str(", granted in part");
    }
    let reserved_bits = entry.reserved_bits(level, reserved_checks(rules.capabilities));
    append_reserved(&mut words, u128::from(raw & reserved_bits));
    words
}

/// The extent of a partial page, to be said after its entry; `None` when it could not be read.
pub fn extent(raw: Option<u64>) -> String {
    match raw.map(|raw| (raw, ByteExtent::from_word(raw))) {
        None => format!("but {UNREADABLE} for its extent"),
        Some((_, Some(extent))) => extent.to_string(),
        Some((raw, None)) => format!("no byte (extent {raw:#x} is not valid)"),
    }
}

fn append_reserved(words: &mut String, reserved_set: u128) {
    if reserved_set != 0 {
        words.push_str(&format!(", reserved bits {reserved_set:#x} set"));
    }
}
