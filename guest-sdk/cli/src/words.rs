//! Faults, explanations, memory and numbers in words, for people. Reports of the sanitizer are in `reports.rs`.

use std::fmt::Write;

use iommu_types::{CacheState, Explanation, Fault, FaultRecord, Outcome, Step, Structure, Translation};

/// A value, or a dash where there is none.
pub(crate) fn or_dash<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

/// A number with what it counts; the first word of `what` takes the plural.
pub(crate) fn count(number: u64, what: &str) -> String {
    let (noun, rest) = what.split_once(' ').unwrap_or((what, ""));
    let plural = if number == 1 { "" } else { "s" };
    let space = if rest.is_empty() { "" } else { " " };
    format!("{number} {noun}{plural}{space}{rest}")
}

/// A duration of so many microseconds, in the unit that fits it.
pub(crate) fn duration(us: u64) -> String {
    // Sums for people: three digits are enough, and a double has more.
    #[expect(clippy::cast_precision_loss, reason = "it is printed with two decimals")]
    let in_unit = |us_of_unit: u64| us as f64 / us_of_unit as f64;
    match us {
        0..1_000 => format!("{us} µs"),
        1_000..1_000_000 => format!("{:.2} ms", in_unit(1_000)),
        _ => format!("{:.2} s", in_unit(1_000_000)),
    }
}

/// The last microsecond that has a date of four digits.
const LAST_DATE_US: u64 = 253_402_300_799_999_999;

/// When it was, so many microseconds after the UNIX epoch.
pub(crate) fn instant(us: u64) -> String {
    if us > LAST_DATE_US {
        return format!("{us} µs after 1970");
    }
    humantime::format_rfc3339_micros(std::time::UNIX_EPOCH + std::time::Duration::from_micros(us)).to_string()
}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_have_their_plural_at_the_noun() {
        for (number, what, expected) in [
            (0, "byte", "0 bytes"),
            (1, "byte", "1 byte"),
            (2, "byte", "2 bytes"),
            (1, "node visited", "1 node visited"),
            (9, "node visited", "9 nodes visited"),
        ] {
            assert_eq!(count(number, what), expected);
        }
    }

    #[test]
    fn durations_have_the_unit_that_fits() {
        for (us, expected) in [
            (0, "0 µs"),
            (999, "999 µs"),
            (1_000, "1.00 ms"),
            (9_876, "9.88 ms"),
            (1_000_000, "1.00 s"),
            (90_500_000, "90.50 s"),
        ] {
            assert_eq!(duration(us), expected);
        }
    }

    #[test]
    fn instants_are_dates_and_nonsense_is_shown_as_it_is() {
        for (us, expected) in [
            (0, "1970-01-01T00:00:00.000000Z"),
            (1_767_323_045_000_006, "2026-01-02T03:04:05.000006Z"),
            (LAST_DATE_US, "9999-12-31T23:59:59.999999Z"),
            (LAST_DATE_US + 1, "253402300800000000 µs after 1970"),
            (u64::MAX, "18446744073709551615 µs after 1970"),
        ] {
            assert_eq!(instant(us), expected);
        }
    }
}
