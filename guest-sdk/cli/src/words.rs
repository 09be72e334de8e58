//! Faults, explanations and memory in words, for people.

use std::fmt::Write;

use iommu_types::{CacheState, Explanation, Fault, FaultRecord, Outcome, Step, Structure, Translation};

/// One fault record in one line.
pub(crate) fn fault_line(record: &FaultRecord) -> String {
    let owner = record.owner.map_or_else(|| "nobody".to_owned(), |owner| owner.to_string());
    let domain = record.domain_id.map_or_else(|| "no domain".to_owned(), |domain| format!("domain {domain}"));
    let at = humantime::format_rfc3339_millis(
        std::time::UNIX_EPOCH + std::time::Duration::from_millis(record.at_unix_ms),
    );
    let what = match &record.fault {
        Fault::Dma(fault) => {
            let pasid = fault.pasid.map_or_else(String::new, |pasid| format!(" pasid {pasid}"));
            format!("{:<6} {}{pasid}", fault.access.to_string(), fault.iova)
        }
        Fault::Interrupt(fault) => match fault.index {
            Some(index) => format!("interrupt index {index}"),
            None => "interrupt".to_owned(),
        },
    };
    let more = if record.collapsed_count == 0 {
        String::new()
    } else {
        format!(" (+{} more)", record.collapsed_count)
    };
    format!(
        "{:>6}  {at}  {}  {owner}, {domain}  {what}  {}{more}",
        record.sequence,
        record.device,
        record.fault.reason()
    )
}

/// An explanation as a small page.
pub(crate) fn explanation_page(explanation: &Explanation) -> String {
    let mut page = String::new();
    let pasid = explanation.pasid.map_or_else(String::new, |pasid| format!(" with pasid {pasid}"));
    let mut line = |text: &str| {
        page.push_str(text);
        page.push('\n');
    };
    line(&format!(
        "{} of {} bytes at {} by {}{pasid}",
        explanation.access, explanation.size_bytes, explanation.iova, explanation.source_id
    ));
    line("");
    line("tables");
    if explanation.steps.is_empty() {
        line("  none is read");
    }
    for step in &explanation.steps {
        line(&format!("  {}", step_line(step)));
    }
    line("");
    line("caches, as they stand now");
    line(&format!("  context cache           {}", cache_words(&explanation.context_cache)));
    line(&format!("  IOTLB                   {}", cache_words(&explanation.iotlb)));
    line(&format!("  paging-structure cache  {}", cache_words(&explanation.paging_structure_cache)));
    line("");
    line(&format!("outcome: {}", outcome_words(&explanation.outcome)));
    if explanation.fault_suppressed {
        line("         the fault is not recorded: FPD is set on the way");
    }
    if let Some(stale) = &explanation.stale {
        line(&format!("STALE:   a cached entry would still lead it to {}", translation_words(stale)));
    }
    line(&explanation.conclusion);
    page
}

/// One table entry in one line.
pub(crate) fn step_line(step: &Step) -> String {
    let name = match step.structure {
        Structure::Root => "root".to_owned(),
        Structure::Context => "context".to_owned(),
        Structure::SecondStage { level } => format!("level {level}"),
        Structure::RingRoot => "rroot".to_owned(),
        Structure::RingDevice => "rdevice".to_owned(),
        Structure::Ring => "rring".to_owned(),
        Structure::RingSlot => "rpte".to_owned(),
    };
    let raw = match (step.low, step.high) {
        (None, _) => "unreadable".to_owned(),
        (Some(low), Some(high)) => format!("{high:#018x}:{low:#018x}"),
        (Some(low), None) => format!("{low:#018x}"),
    };
    let permissions = step.permissions.map_or_else(String::new, |p| format!(" [{p} so far]"));
    format!(
        "{name:<8} entry {:>3} at {:<18} {raw}{permissions}  {}",
        step.index,
        step.at.to_string(),
        step.reading
    )
}

fn cache_words(state: &CacheState) -> String {
    match state {
        CacheState::Hit { entry } => format!("hit: {entry}"),
        CacheState::Miss => "miss".to_owned(),
        CacheState::Insufficient { entry } => format!("gives less than asked, so the tables decide: {entry}"),
        CacheState::NotAsked => "not asked".to_owned(),
    }
}

/// How an access ends, in words.
pub(crate) fn outcome_words(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Translated(translation) => format!("translated to {}", translation_words(translation)),
        Outcome::Untranslated(hpa) => format!("passes untranslated to {hpa}"),
        Outcome::Interrupt => "an interrupt request: goes to interrupt remapping".to_owned(),
        Outcome::Refused(fault) => format!("refused, reason {}", fault.reason),
    }
}

fn translation_words(translation: &Translation) -> String {
    format!(
        "{} (page of {}, {}, domain {})",
        translation.hpa, translation.page_size, translation.permissions, translation.domain_id
    )
}

/// Bytes as offset, sixteen in hexadecimal, and text.
pub(crate) fn hex_dump(base: u64, bytes: &[u8]) -> String {
    let mut dump = String::new();
    for (row, chunk) in bytes.chunks(16).enumerate() {
        let mut hex = String::with_capacity(48);
        for byte in chunk {
            // Writing to a string does not fail.
            let _ = write!(hex, "{byte:02x} ");
        }
        let text: String = chunk
            .iter()
            .map(|&b| if b.is_ascii_graphic() || b == b' ' { char::from(b) } else { '.' })
            .collect();
        let address = base.wrapping_add(16 * row as u64);
        let _ = writeln!(dump, "{address:012x}  {hex:<48} {text}");
    }
    dump
}
