//! `domains`: what each domain is and how it stands, as a table or as a page about one.

use guest_sdk::{DomainState, Operator, Owner};
use iommu_types::{Deferral, Protection};
use serde_json::{Value, json};

use crate::print::{Output, table};
use crate::words::{count, duration, or_dash};

/// `domains`: all of them in a table, or one on a page.
pub(crate) async fn run(
    operator: &Operator,
    out: Output,
    domain: Option<u16>,
    owner: Option<Owner>,
) -> anyhow::Result<()> {
    let domains = operator.inspect().domains(owner).await?;
    let Some(number) = domain else {
        let value = domains.iter().map(value).collect();
        out.table(&value, &HEAD, domains.iter().map(row).collect());
        return Ok(());
    };
    let found = domains.iter().find(|state| state.domain_id.get() == number);
    let state = found.ok_or_else(|| {
        let whose = owner.map_or_else(String::new, |owner| format!(" of {owner}"));
        anyhow::anyhow!("there is no domain {number}{whose}; `iommuctl domains` lists those there are")
    })?;
    out.page(&value(state), || page(state));
    Ok(())
}

/// Everything about a domain, for programs.
fn value(state: &DomainState) -> Value {
    let options = state.options;
    json!({
        "domain_id": state.domain_id.get(),
        "owner": state.owner.to_string(),
        "protection": options.protection.name(),
        "parameters": parameters(options.protection),
        "granularity": options.granularity.to_string(),
        "allocator": options.allocator.to_string(),
        "walk_cache": options.walk_cache.to_string(),
        "width_bits": options.width_bits,
        "sanitizer": options.sanitizer,
        "devices": state.devices.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "mappings": state.mappings,
        "idle_mappings": state.idle_mappings,
        "mapped_bytes": state.mapped_bytes,
        "table_bytes": state.table_bytes,
        "maps": state.maps,
        "unmaps": state.unmaps,
        "invalidations": state.invalidations,
        "pending_flushes": state.pending_flushes,
        "oldest_pending_us": state.oldest_pending_us,
        "flushes": state.flushes,
        "live_iova_ranges": state.live_iova_ranges,
        "cached_iova_ranges": state.cached_iova_ranges,
        "iova_allocations": state.iova_allocations,
        "iova_visits": state.iova_visits,
        "shadow_bytes": state.shadow_bytes,
        "copied_bytes": state.copied_bytes,
        "sanitizer_reports": state.sanitizer_reports,
    })
}

fn parameters(protection: Protection) -> Value {
    match protection {
        Protection::Passthrough | Protection::Strict | Protection::Shared => json!({}),
        Protection::Deferred(deferral) => {
            json!({ "batch": deferral.batch, "interval_ms": deferral.interval_ms })
        }
        Protection::Persistent(quota) => json!({ "pages_max": quota.pages_max }),
        Protection::Bounce(pool) => json!({ "bytes_max": pool.bytes_max }),
        Protection::Ring(rings) => json!({ "count": rings.count, "slots": rings.slots }),
    }
}

const HEAD: [&str; 11] = [
    "domain",
    "owner",
    "mode",
    "granularity",
    "allocator",
    "devices",
    "live",
    "cached",
    "pending",
    "oldest",
    "sanitizer",
];

fn row(state: &DomainState) -> Vec<String> {
    vec![
        state.domain_id.to_string(),
        state.owner.to_string(),
        state.options.protection.to_string(),
        state.options.granularity.to_string(),
        allocator(state),
        devices(state),
        state.mappings.to_string(),
        state.idle_mappings.to_string(),
        state.pending_flushes.to_string(),
        or_dash(state.oldest_pending_us.map(duration)),
        sanitizer(state),
    ]
}

fn devices(state: &DomainState) -> String {
    state.devices.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
}

/// The allocator, or a dash where the mode allocates no addresses.
fn allocator(state: &DomainState) -> String {
    let protection = state.options.protection;
    let allocates = !protection.is_identity() && !matches!(protection, Protection::Ring(_));
    or_dash(allocates.then_some(state.options.allocator))
}

fn sanitizer(state: &DomainState) -> String {
    match (state.options.sanitizer, state.sanitizer_reports) {
        (false, _) => "off".to_owned(),
        (true, 0) => "on, no reports".to_owned(),
        (true, reports) => format!("on, {}", count(reports, "report")),
    }
}

/// What a device can still reach after an unmap.
fn stale_window(protection: Protection) -> String {
    match protection {
        Protection::Passthrough => {
            "always open: the device reaches all memory of the owner, mapped or not".to_owned()
        }
        Protection::Strict => "none: an unmap is answered after invalidation and drain".to_owned(),
        Protection::Deferred(Deferral { batch, interval_ms }) => {
            format!("until the flush: up to {} or {interval_ms} ms", count(batch.into(), "unmap"))
        }
        Protection::Shared => {
            "none after the last unmap of a page; until then its other users keep it open".to_owned()
        }
        Protection::Persistent(_) => "by design: a page stays open until it is evicted".to_owned(),
        Protection::Bounce(_) => "none: the device sees only shadow buffers".to_owned(),
        Protection::Ring(_) => "at most 2 slots of each ring, until the end of the burst".to_owned(),
    }
}

/// Everything about a domain, for people. Lines that mean nothing in its mode are left out.
fn page(state: &DomainState) -> String {
    let options = state.options;
    let mut lines = vec![
        ("mode", options.protection.to_string()),
        ("stale window", stale_window(options.protection)),
        ("granularity", options.granularity.to_string()),
        ("allocator", allocator(state)),
        ("walk cache", options.walk_cache.to_string()),
        ("width", format!("{} bits", options.width_bits)),
        ("devices", or_dash((!state.devices.is_empty()).then(|| devices(state)))),
        ("sanitizer", sanitizer(state)),
        ("live mappings", format!("{} of {}", state.mappings, count(state.mapped_bytes, "byte"))),
    ];
    if matches!(options.protection, Protection::Persistent(_)) {
        lines.push(("cached mappings", format!("{} kept and used by nobody", state.idle_mappings)));
    }
    lines.extend([
        ("page tables", count(state.table_bytes, "byte")),
        ("ever", format!("{}, {}", count(state.maps, "map"), count(state.unmaps, "unmap"))),
        ("invalidations", state.invalidations.to_string()),
    ]);
    if matches!(options.protection, Protection::Deferred(_)) {
        let oldest = state
            .oldest_pending_us
            .map_or_else(String::new, |us| format!(", the oldest for {}", duration(us)));
        lines.push(("pending flush", format!("{}{oldest}", count(state.pending_flushes, "unmap"))));
        lines.push(("flushes", state.flushes.to_string()));
    }
    if allocator(state) != "-" {
        let (live, cached) = (state.live_iova_ranges, state.cached_iova_ranges);
        lines.push(("address ranges", format!("{live} live, {cached} cached")));
        let visits = count(state.iova_visits, "node visited");
        lines.push(("allocations", format!("{}, {visits}", state.iova_allocations)));
    }
    if matches!(options.protection, Protection::Bounce(_)) {
        lines.push(("shadow buffers", count(state.shadow_bytes, "byte")));
        lines.push(("copied", count(state.copied_bytes, "byte")));
    }
    let head = format!("domain {} of {}", state.domain_id, state.owner);
    let rows = lines.into_iter().map(|(name, text)| vec![name.to_owned(), text]).collect();
    table(&[&head, ""], rows)
}

#[cfg(test)]
mod tests {
    use iommu_types::{DomainId, DomainOptions, IovaAllocation};

    use super::*;

    fn state(options: DomainOptions) -> DomainState {
        DomainState {
            domain_id: DomainId::new(7),
            owner: Owner::Driver(1),
            options,
            devices: vec!["0000:00:05.0".parse().expect("an address")],
            mappings: 12,
            mapped_bytes: 49_152,
            table_bytes: 12_288,
            maps: 100,
            unmaps: 1,
            live_iova_ranges: 14,
            cached_iova_ranges: 21,
            iova_allocations: 33,
            iova_visits: 44,
            pending_flushes: 3,
            oldest_pending_us: Some(4_250),
            flushes: 6,
            invalidations: 8,
            idle_mappings: 5,
            shadow_bytes: 65_536,
            copied_bytes: 1,
            sanitizer_reports: 0,
        }
    }

    #[test]
    fn a_row_tells_mode_parameters_allocator_mappings_and_what_waits() {
        let rows: [(Protection, &str, &str, &str); 7] = [
            (Protection::Passthrough, "passthrough", "page", "-"),
            (Protection::Strict, "strict", "page", "classic"),
            (Protection::DEFERRED, "deferred (256 or 10 ms)", "page", "classic"),
            (Protection::Shared, "shared", "page", "-"),
            (Protection::PERSISTENT, "persistent (4096 pages)", "page", "-"),
            (Protection::BOUNCE, "bounce (16777216 bytes)", "page", "classic"),
            (Protection::RING, "ring (2 x 1024)", "byte", "-"),
        ];
        for (protection, mode, granularity, allocator) in rows {
            let options = DomainOptions::new(protection).with_allocator(IovaAllocation::Classic);
            let expected = [
                "7",
                "driver:1",
                mode,
                granularity,
                allocator,
                "0000:00:05.0",
                "12",
                "5",
                "3",
                "4.25 ms",
                "off",
            ];
            assert_eq!(row(&state(options)), expected);
            assert_eq!(expected.len(), HEAD.len());
        }
        let nothing =
            DomainState { oldest_pending_us: None, ..state(DomainOptions::new(Protection::Strict)) };
        assert_eq!(row(&nothing)[9], "-");
    }

    #[test]
    fn the_sanitizer_is_told_with_its_reports() {
        for (on, reports, expected) in [
            (false, 0, "off"),
            (true, 0, "on, no reports"),
            (true, 1, "on, 1 report"),
            (true, 1_000, "on, 1000 reports"),
        ] {
            let options = DomainOptions::new(Protection::Strict).with_sanitizer(on);
            let state = DomainState { sanitizer_reports: reports, ..state(options) };
            assert_eq!(sanitizer(&state), expected);
        }
    }

    /// The parts that a page has, and those that it does not.
    fn check_page(protection: Protection, has: &[&str], lacks: &[&str]) {
        let page = page(&state(DomainOptions::new(protection)));
        // Columns are padded; words are not.
        let page = page.split_whitespace().collect::<Vec<_>>().join(" ");
        for part in has {
            assert!(page.contains(part), "{part:?} is missing:\n{page}");
        }
        for part in lacks {
            assert!(!page.contains(part), "{part:?} means nothing here:\n{page}");
        }
    }

    #[test]
    fn a_page_has_what_means_something_in_its_mode() {
        let ranges = "14 live, 21 cached";
        let (kept, waits) = ("5 kept and used by nobody", "3 unmaps, the oldest for 4.25 ms");
        let shadow = "65536 bytes";
        for (protection, has, lacks) in [
            (Protection::Passthrough, vec!["always open"], vec![ranges, kept, waits, shadow]),
            (
                Protection::Strict,
                vec![
                    ranges,
                    "none: an unmap",
                    "33, 44 nodes visited",
                    "12 of 49152 bytes",
                    "100 maps, 1 unmap",
                ],
                vec![kept, waits, shadow],
            ),
            (
                Protection::Deferred(Deferral { batch: 1, interval_ms: 5 }),
                vec![ranges, waits, "up to 1 unmap or 5 ms", "flushes 6", "invalidations 8"],
                vec![kept, shadow],
            ),
            (Protection::Shared, vec!["none after the last"], vec![ranges, kept, waits, shadow]),
            (Protection::PERSISTENT, vec![kept, "by design"], vec![ranges, waits, shadow]),
            (Protection::BOUNCE, vec![ranges, shadow, "1 byte"], vec![kept, waits]),
            (Protection::RING, vec!["at most 2 slots"], vec![ranges, kept, waits, shadow]),
        ] {
            check_page(protection, &has, &lacks);
        }
    }

    #[test]
    fn json_has_every_choice_and_parameter() {
        for (protection, expected) in [
            (Protection::Strict, json!({})),
            (Protection::DEFERRED, json!({ "batch": 256, "interval_ms": 10 })),
            (Protection::PERSISTENT, json!({ "pages_max": 4096 })),
            (Protection::BOUNCE, json!({ "bytes_max": 16_777_216 })),
            (Protection::RING, json!({ "count": 2, "slots": 1024 })),
        ] {
            let told = value(&state(DomainOptions::new(protection).with_sanitizer(true)));
            assert_eq!(told["protection"], protection.name());
            assert_eq!(told["parameters"], expected);
            assert_eq!((&told["sanitizer"], &told["oldest_pending_us"]), (&json!(true), &json!(4_250)));
        }
    }
}
